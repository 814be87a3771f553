"""Checkpoints of stage 1: one file with all that the next epoch depends on (``last``) and what is dumped (``best``).

format      2
config      the settings of run_rq.py (common/config.py)
inputs      file name -> sha256 of what was read
trained_on  hash of the training triples
model       the arguments of RQGCN
last        epoch, seconds, model, optimizer, codes, average, rng, history
best        epoch, valid, codes, codes_sha256, relations, model; None before an epoch was scored from codes
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import LIMITS, Config
from common.errors import InputError
from common.files import load_torch

FORMAT = 2


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of run_rq.py; InputError for another file, another format or a damaged one."""
    stored = load_torch(path, "checkpoint")
    if isinstance(stored, Mapping) and "comparable" in stored:
        raise InputError(
            f"checkpoint {path} is from an older version of run_rq.py, whose settings cannot be compared with these; "
            "train again (codes files of that version stay usable)"
        )
    fault = fault_of(stored)
    if fault is not None:
        raise InputError(f"checkpoint file {path} was not written by run_rq.py, or is damaged: {fault}")
    return stored


def check_same_run(stored: Mapping[str, Any], path: Path, config: Config, inputs: Mapping[str, str]) -> None:
    """InputError where ``stored`` belongs to other settings or inputs; limits may differ with ``--restore``."""
    names = config.compared()
    then = {name: stored["config"].get(name) for name in names} | _named(stored["inputs"])
    now = names | _named(inputs)
    free = LIMITS if config.restore else set()
    differing = sorted(key for key in (now.keys() | then.keys()) - free if now.get(key) != then.get(key))
    if not differing:
        return
    shown = ", ".join(f"{key} (there {then.get(key)}, here {now.get(key)})" for key in differing[:3])
    goes_on = "--restore to go on, " if set(differing) <= LIMITS else ""
    hint = "give the same flags" if config.restore else f"give {goes_on}another --name and --out_dir, or --overwrite"
    raise InputError(f"{path} comes from other arguments: {shown}; {hint}")


def _named(inputs: Mapping[str, str]) -> dict[str, str]:
    return {f"file {name}": value for name, value in inputs.items()}


# ---------------------------------------------------------------- damage


def fault_of(stored: Any) -> str | None:
    """What is wrong with a loaded checkpoint by itself; None where nothing is.

    Tensors with a row per entity may be missing: ranking from codes needs none of them.
    """
    if not isinstance(stored, Mapping):
        return f"it holds a {type(stored).__name__}, expected the entries config, last and best"
    if stored.get("format") != FORMAT:
        return f"its format is {str(stored.get('format'))[:20]}, expected {FORMAT}"
    for key in ("config", "inputs", "model", "last"):
        if not isinstance(stored.get(key), Mapping):
            return f"its entry {key} is missing or damaged"
    if not all(_is_plain(value) for key in ("config", "inputs", "model") for value in stored[key].values()):
        return "config, inputs or model holds more than plain values"
    last, best = stored["last"], stored.get("best", 0)
    if not (best is None or isinstance(best, Mapping)):
        return "its entry best is missing or damaged"
    for name, part in (("last", last), ("best", best or {"model": {}})):
        fault = _weights_fault(part.get("model"))
        if fault:
            return f"{name}: {fault}"
    return _last_fault(last) or (None if best is None else _best_fault(best))


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float)


def _weights_fault(weights: Any) -> str | None:
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        return "model is no set of tensors"
    broken = [name for name, value in weights.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    return f"{broken[0]} holds values that are not finite" if broken else None


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) else math.nan


def _last_fault(last: Mapping[str, Any]) -> str | None:
    epoch, seconds, history = last.get("epoch"), _number(last.get("seconds")), last.get("history")
    if type(epoch) is not int or not 0 <= seconds < math.inf:
        return "last: epoch or seconds is no number"
    if not isinstance(history, list) or len(history) != epoch or not all(isinstance(row, dict) for row in history):
        return f"last: the history has not one entry for each of {epoch} epochs"
    return None if _is_json(history) else "last: the history holds what no record can"


def _best_fault(best: Mapping[str, Any]) -> str | None:
    for valid in (best.get("valid"), best.get("valid_before_collision_pass", best.get("valid"))):
        if type(best.get("epoch")) is not int or not isinstance(valid, Mapping) or not _is_json(valid):
            return "best: epoch or valid is missing or damaged"
        if type(valid.get("mrr")) not in (int, float) or not 0 <= valid["mrr"] <= 1:
            return f"best: its valid MRR is {valid.get('mrr')}"
    relations = best.get("relations")
    if not isinstance(relations, Tensor) or relations.dim() != 2 or not bool(relations.isfinite().all()):
        return "best: damaged relation vectors"
    return None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def check_fits(stored: Mapping[str, Any], model: torch.nn.Module, codes_shape: tuple[int, ...], num_code: int) -> None:
    """ValueError where ``last`` or ``best`` belongs to another model or to codes of another shape or range."""
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    for name in ("last", "best"):
        part = stored[name]
        if part is None:
            continue
        there = {key: value.shape for key, value in part["model"].items()}
        if there != wanted:
            other = sorted(key for key in there.keys() | wanted.keys() if there.get(key) != wanted.get(key))
            raise ValueError(f"{name}: {other[0]} is missing or of another shape")
        codes = part["codes"]
        if codes is not None and not (
            isinstance(codes, Tensor) and codes.dtype == torch.int64 and codes.shape == codes_shape
            and int(codes.min()) >= 0 and int(codes.max()) < num_code
        ):  # fmt: skip
            raise ValueError(f"{name}: its codes are not integers {list(codes_shape)} in 0..{num_code - 1}")


def check_optimizer(optimizer: torch.optim.Optimizer, before: list[dict[str, Any]]) -> None:
    """ValueError where restored moments do not have their parameter's shape, or settings are not those ``before``."""
    for parameter, state in optimizer.state.items():
        moments = [value for key, value in state.items() if key != "step"]
        step = state.get("step")
        if not all(isinstance(m, Tensor) and m.shape == parameter.shape and bool(m.isfinite().all()) for m in moments):
            raise ValueError("the optimizer's moments are damaged")
        if not isinstance(step, Tensor) or step.numel() != 1 or not 0 <= float(step) < math.inf:
            raise ValueError("the optimizer's count of steps is damaged")
    if [settings_of(group) for group in optimizer.param_groups] != before:
        raise ValueError("the optimizer's settings are others")


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's settings: all but its parameters and the rate, which a schedule moves."""
    return {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}


# ---------------------------------------------------------------- random state


def random_states(device: torch.device, generator: torch.Generator, one_gpu: bool) -> dict[str, Any]:
    """States of all generators that training draws from; ``one_gpu``: of this process's GPU alone."""
    gpus: list[Tensor] = []
    if device.type == "cuda":
        gpus = [torch.cuda.get_rng_state(device)] if one_gpu else torch.cuda.get_rng_state_all()
    return {"order": generator.get_state(), "torch": torch.get_rng_state(), "cuda": gpus}


def set_random_states(
    states: Mapping[str, Any], device: torch.device, generator: torch.Generator, one_gpu: bool
) -> None:
    """Put stored states back."""
    generator.set_state(states["order"].cpu())
    torch.set_rng_state(states["torch"].cpu())
    if device.type != "cuda" or not states["cuda"]:
        return
    if one_gpu:
        torch.cuda.set_rng_state(states["cuda"][0].cpu(), device)
    else:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])

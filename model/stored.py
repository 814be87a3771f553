"""What a checkpoint must hold, so that a damaged or foreign one is named before anything rests on it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fault_of(stored: Any) -> str | None:
    """What is wrong with a loaded checkpoint by itself; None where nothing is.

    Tensors with a row per entity may be missing: ranking from codes needs none of them.
    """
    if not isinstance(stored, Mapping):
        return f"it holds a {type(stored).__name__}, expected the entries config, last and best"
    for key in ("config", "comparable", "last"):
        if not isinstance(stored.get(key), Mapping):
            return f"its entry {key} is missing or damaged"
    if not all(_is_plain(value) for key in ("config", "comparable") for value in stored[key].values()):
        return "config or comparable holds more than plain values"
    last, best = stored["last"], stored.get("best", 0)
    if not (best is None or isinstance(best, Mapping)):
        return "its entry best is missing or damaged"
    for name, part in (("last", last), ("best", best or {"model": {}})):
        fault = _weights_fault(part.get("model"))
        if fault:
            return f"{name}: {fault}"
    return _last_fault(last) or (None if best is None else _best_fault(best))


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float) or value == {}


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
        if not isinstance(step, Tensor) or step.numel() != 1 or not 0 < float(step) < math.inf:
            raise ValueError("the optimizer's count of steps is damaged")
    if [settings_of(group) for group in optimizer.param_groups] != before:
        raise ValueError("the optimizer's settings are others")


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's settings: all but its parameters and the rate, which a schedule moves."""
    return {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}

"""--report_to: losses, metrics and entity embeddings for TensorBoard or Weights & Biases. Nothing is read back, and no
random number is drawn between the first epoch and the last, so a run gives the same codes with a logger and without.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import Config
from common.errors import InputError

MOST_ENTITIES = 20_000  # in the projector, which a browser loads whole


class Log:
    """A logger that drops everything: ``--report_to none``, and every process but the first."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """``row``: of the trainer's history."""

    def entities(self, vectors: Tensor, names: Sequence[str]) -> None:
        """``vectors``: decoded codes [M, L, code_dim]; ``names``: M labels."""

    def close(self) -> None:
        """Write what is still in memory."""


class TensorBoard(Log):
    """Event files in ``folder``; those of an interrupted run are hidden from ``epoch`` on."""

    def __init__(self, folder: Path, config: Config, epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.writer = folder, SummaryWriter(str(folder), purge_step=epoch)
        print(f"logging to {folder}; show it: tensorboard --logdir {folder}")

    def epoch(self, row: Mapping[str, Any]) -> None:
        for name, value in values_of(row).items():
            self.writer.add_scalar(name, value, row["epoch"])

    def entities(self, vectors: Tensor, names: Sequence[str]) -> None:
        kept = torch.linspace(0, len(vectors) - 1, min(len(vectors), MOST_ENTITIES)).long()  # evenly over the ids
        shutil.rmtree(self.folder / "00000", ignore_errors=True)  # of the run before
        self.writer.add_embedding(
            vectors[kept].flatten(1), metadata=[names[i] for i in kept.tolist()], tag="entities", global_step=0
        )

    def close(self) -> None:
        self.writer.close()


class WandB(Log):
    """A run of Weights & Biases in ``folder``; offline unless the environment variable WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, config: Config, epoch: int) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self.run = wandb.init(
            project="residual-codes", name=config.name, dir=str(folder), mode=mode, config=config.as_plain()
        )

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.run.log(values_of(row), step=row["epoch"])

    def close(self) -> None:
        self.run.finish()


LOGGERS: dict[str, type[TensorBoard | WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # what each one imports


def values_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch by name; those of levels count from 1."""
    found = {f"loss/{name}": row[name] for name in ("structure", "semantic", "quantization")}
    found |= {f"loss/quantization_level_{level}": value for level, value in enumerate(row["levels"], 1)}
    valid = row.get("valid", {})
    found |= {f"valid/{name}": value for name, value in valid.items() if isinstance(value, float)}
    found |= {f"perplexity/level_{level}": value for level, value in enumerate(valid.get("perplexity", ()), 1)}
    return found | {"learning_rate": row["lr"]}


def check_logger(name: str) -> None:
    """InputError where the package of a logger is not installed."""
    try:
        if name in MODULES:
            importlib.import_module(MODULES[name])
    except ImportError as error:
        raise InputError(f"--report_to {name}: {error}; run: pip install {name}, or leave --report_to out") from error


@contextmanager
def open_log(config: Config, folder: Path, epoch: int, writes: bool = True) -> Iterator[Log]:
    """The logger of ``--report_to`` with its files in ``folder``, for a run that starts with ``epoch`` (1: a new one).

    ``writes``: whether this process does.
    """
    log = LOGGERS[config.report_to](folder, config, epoch) if writes and config.report_to in LOGGERS else Log()
    try:
        yield log
    finally:
        log.close()

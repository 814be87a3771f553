"""The run record beside each artifact: flags, seed, commit, versions, input hashes, time and memory. Seeds."""

from __future__ import annotations

import importlib.metadata
import platform
import random
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.device import device_name, peak_memory_mb
from common.files import ROOT

if TYPE_CHECKING:
    import torch

RECORDED_PACKAGES = ("torch", "dgl", "numpy", "numba", "transformers", "peft", "accelerate", "optuna")


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def git_commit() -> str | None:
    """The repository's commit, with ``+changes`` when tracked files differ from it; None outside git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def by_name(given: Mapping[str, Path | None]) -> dict[str, Path]:
    """The files of ``given`` (role -> file) by their names, as records name inputs; those of one name by role too, but
    for the role "", which is its name alone."""
    names = [path.name for path in given.values() if path]
    return {
        path.name if names.count(path.name) == 1 or not role else f"{role}: {path.name}": path
        for role, path in given.items() if path
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the recorded packages that are installed (none is imported for it)."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def make_record(
    args: Mapping[str, Any],
    inputs: Mapping[str, str],
    wall_seconds: float,
    device: str | torch.device = "cpu",
    **extra: Any,
) -> dict[str, Any]:
    """The run record written beside an artifact.

    ``args``: the parsed flags; ``inputs``: file name -> sha256; ``wall_seconds``: of the whole run, resumed parts
    included; ``extra``: metrics and whatever else the command reports (``seed`` is taken from ``args``).
    """
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "args": {key: str(value) if isinstance(value, Path) else value for key, value in args.items()},
        "seed": args.get("seed"),
        "git_commit": git_commit(),
        "versions": versions(),
        "device": device_name(device),
        "inputs": dict(inputs),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(wall_seconds, 2),
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        **extra,
    }

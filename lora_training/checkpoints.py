"""Checkpoints of an interrupted training run: found, of a run with the same settings, and unchanged on the disk."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from common.errors import InputError, content_of
from common.files import read_json, sha256_file
from lora_training.memory import sharding

ADAPTERS, CHECKPOINTS = "lora_adapters", "checkpoints"  # in the output folder
PLAN, SECONDS = "plan.json", "seconds.json"
STATE, OTHER_CHECKPOINT = "trainer_state.json", "give an earlier checkpoint"
# settings that a run must share with the one whose checkpoint it continues
PLANNED = (
    "model_name", "epochs", "max_steps", "batch_size", "gradient_accumulation", "learning_rate", "warmup_ratio",
    "rows_lr", "lora_r", "lora_alpha", "lora_dropout", "lora_target", "train_rows", "max_length",
    "skip_long", "adam_beta2", "seed", "load_in_4bit", "bf16", "fp16", "eval_steps", "val_limit",
)  # fmt: skip


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to continue from, None for a new run.

    InputError if there is none, or if a new run would replace a finished adapter or an unfinished run.
    """
    folder, finished = args.output_dir / CHECKPOINTS, args.output_dir / ADAPTERS
    # the file of seconds is written last: a checkpoint that was killed while it was saved has none
    steps = [path.parent for path in folder.glob(f"checkpoint-*/{SECONDS}") if path.parent.name[11:].isdigit()]
    there = sorted(steps, key=lambda path: int(path.name[11:]))
    if args.resume_from_checkpoint is None:
        if there and not args.overwrite:
            raise InputError(
                f"{folder} holds an unfinished run; continue it with --resume_from_checkpoint last, or give --overwrite"
            )
        if finished.is_dir() and not args.overwrite:
            raise InputError(
                f"{finished} is a finished adapter; give another --output_dir, or --overwrite to replace it"
            )
        return None
    if args.resume_from_checkpoint == "last":
        if not there and finished.is_dir():
            raise InputError(
                f"--resume_from_checkpoint last: the run in {args.output_dir} is finished; to train further give "
                f"--init_adapter {finished} and another --output_dir"
            )
        if not there:
            raise InputError(f"--resume_from_checkpoint last: {folder} has no checkpoint; start without the flag")
        return there[-1]
    given = Path(args.resume_from_checkpoint)
    if not (given / SECONDS).is_file():
        raise InputError(f"--resume_from_checkpoint {given} is no checkpoint: it has no {SECONDS}")
    return given


def run_plan(args: argparse.Namespace) -> dict[str, Any]:
    """The settings and inputs that a resumed run must share with the first one."""
    plan: dict[str, Any] = {key: getattr(args, key) for key in PLANNED}
    adapter = None if args.init_adapter is None else args.init_adapter / "adapter_model.safetensors"
    files = {"train": args.train_data, "validation": args.val_data, "code_init": args.code_init, "adapter": adapter}
    plan |= {f"{name}_sha256": sha256_file(path) if path else None for name, path in files.items()}
    return plan | {"processes": int(os.environ.get("WORLD_SIZE", "1"))}


def check_plan(args: argparse.Namespace, checkpoint: Path) -> None:
    """InputError if a resumed run differs from the one that wrote ``checkpoint``."""
    folder = checkpoint.parent
    before, now = read_json(folder / PLAN, "plan"), run_plan(args)
    before = before if isinstance(before, dict) else {}
    differing = [f"{key} {before.get(key)!r} before, {now[key]!r} now" for key in now if before.get(key) != now[key]]
    if differing:
        raise InputError(
            f"cannot continue {folder}: {'; '.join(differing)}; give the same flags, or "
            "--overwrite in place of --resume_from_checkpoint"
        )


def saved_sums(checkpoint: Path) -> dict[str, str]:
    """sha256 of a checkpoint's files that this process has written or waited for."""
    names = [path.name for path in checkpoint.iterdir() if path.is_file()] if sharding() == "ddp" else [STATE]
    own = sorted(name for name in names if name != SECONDS and not name.startswith("rng_state_"))
    return {name: sha256_file(checkpoint / name) for name in own}


def check_checkpoint(checkpoint: Path) -> float:
    """The seconds that the run had taken when it wrote a checkpoint.

    InputError if one of its files changed: transformers does not check them, and continues without a missing one.
    """
    found = read_json(checkpoint / SECONDS, "time")
    with content_of(checkpoint / SECONDS, "mark of a checkpoint", OTHER_CHECKPOINT):
        seconds, before = float(found["seconds"]), dict(found["sha256"])
    count = os.environ.get("WORLD_SIZE", "1")
    state = "rng_state.pth" if count == "1" else f"rng_state_{os.environ.get('RANK', '0')}.pth"
    now = saved_sums(checkpoint)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if not (checkpoint / state).is_file():
        raise InputError(f"{checkpoint} holds no {state}, for one of {count} processes; {OTHER_CHECKPOINT}")
    if changed or STATE not in before:
        raise InputError(f"{checkpoint / (changed or [STATE])[0]} is not the file that was saved; {OTHER_CHECKPOINT}")
    return seconds

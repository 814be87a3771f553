"""The checkpoint that a tuning run goes on from: found, of a run of the same plan, and not a byte of it changed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from common.errors import InputError, content_of
from common.files import read_json, sha256_file
from lora_training.memory import sharding

CHECKPOINTS, PLAN, SECONDS = "checkpoints", "plan.json", "seconds.json"
STATE, OTHER_CHECKPOINT = "trainer_state.json", "give an earlier checkpoint"
# what two runs must share for one to go on from the other's checkpoint
PLANNED = (
    "model_name", "epochs", "max_steps", "batch_size", "gradient_accumulation", "learning_rate", "warmup_ratio",
    "weight_decay", "lora_r", "lora_alpha", "lora_dropout", "lora_target", "train_rows", "max_length", "skip_long",
    "adam_beta2", "seed", "load_in_4bit", "bf16", "fp16", "matmul_precision", "eval_steps",
)  # fmt: skip


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from; InputError where there is none, or an unfinished run would be overwritten."""
    folder = args.output_dir / CHECKPOINTS
    # the file of seconds is written last: what a kill in the middle of saving left has none
    steps = [path.parent for path in folder.glob(f"checkpoint-*/{SECONDS}") if path.parent.name[11:].isdigit()]
    there = sorted(steps, key=lambda path: int(path.name[11:]))
    if args.resume_from_checkpoint is None:
        if there and not args.overwrite:
            raise InputError(
                f"{folder} holds an unfinished run; go on with --resume_from_checkpoint last, or give --overwrite"
            )
        return None
    if args.resume_from_checkpoint == "last":
        if not there:
            raise InputError(f"--resume_from_checkpoint last: {folder} holds no checkpoint; start without the flag")
        return there[-1]
    given = Path(args.resume_from_checkpoint)
    if not (given / SECONDS).is_file():
        raise InputError(f"--resume_from_checkpoint {given} is no checkpoint: it has no {SECONDS}")
    return given


def run_plan(args: argparse.Namespace) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on from."""
    plan: dict[str, Any] = {key: getattr(args, key) for key in PLANNED}
    plan |= {"train_sha256": sha256_file(args.train_data), "validation_sha256": sha256_file(args.val_data)}
    plan["code_init_sha256"] = sha256_file(args.code_init) if args.code_init else None
    return plan | {"processes": int(os.environ.get("WORLD_SIZE", "1"))}


def check_plan(args: argparse.Namespace, checkpoint: Path) -> None:
    """InputError where a resumed run differs from the one that wrote ``checkpoint``."""
    folder = checkpoint.parent
    before, now = read_json(folder / PLAN, "plan"), run_plan(args)
    before = {"train_rows": "code"} | (before if isinstance(before, dict) else {})  # plans of before have no such entry
    differing = [f"{key} {before.get(key)!r} before, {now[key]!r} now" for key in now if before.get(key) != now[key]]
    if differing:
        raise InputError(
            f"cannot go on from {folder}: {'; '.join(differing)}; give the same flags, or "
            "--overwrite in place of --resume_from_checkpoint"
        )


def saved_sums(checkpoint: Path) -> dict[str, str]:
    """sha256 of a checkpoint's files as far as this process has seen them written: not the other processes' ones."""
    names = [path.name for path in checkpoint.iterdir() if path.is_file()] if sharding() == "ddp" else [STATE]
    own = sorted(name for name in names if name != SECONDS and not name.startswith("rng_state_"))
    return {name: sha256_file(checkpoint / name) for name in own}


def check_checkpoint(checkpoint: Path) -> float:
    """The seconds that the run had taken when it wrote a checkpoint, all of whose files are still those.

    InputError otherwise: transformers checks no sums, and where a file is gone it goes on without it, to other weights.
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

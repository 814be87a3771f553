"""Scripts in processes that can be killed: forked from a server that has torch loaded, so that a start is cheap."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

LORA = ("transformers", "peft", "accelerate", "lora_training.train_lora")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["run_rq", "model.trainer", "model.RQGCN", "tests.faults.children", *LORA])


def run_script(module: str, arguments: Sequence[str], output: str) -> None:
    """What a child does: the script's ``main`` as its own command, both outputs into one file."""
    import importlib

    import torch

    from common.errors import run_command

    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    run_command(importlib.import_module(module).main)


def start(module: str, arguments: Sequence[str], output: Path) -> BaseProcess:
    """Start a script; its output goes to a file."""
    process: BaseProcess = CONTEXT.Process(target=run_script, args=(module, list(arguments), str(output)))
    process.start()
    return process


def finish(module: str, arguments: Sequence[str], output: Path) -> int:
    """Run a script to its end; its exit code."""
    process = start(module, arguments, output)
    process.join()
    assert process.exitcode is not None
    return process.exitcode

"""A small copy of everything that the scripts read, made once per process by the scripts themselves.

Scripts are called as the shell calls them: by their file and arguments. Nothing here knows what is inside them.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import multiprocessing
import os
import resource
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from tests.conftest import RING, M, Outcome, write_graph

STEM = RING
CODES, CHECKPOINT = f"codes/{STEM}.pt", f"checkpoints/{STEM}.pt"
MEMORY = 2 * 2**30  # bytes that a script may take beyond what the process has

# Commands over the world. W/ stands for the world's folder, OUT/ for an empty one.
SIZES = "--seq_len 3 --num_code 8 --num_quantizers 2 --init_dim 12 --gcn_dim 12 --gcn_layers 1 --att_head 2"
SMALL = f"{SIZES} --ensemble 1 --decoder distmult --batch 32 --lr 0.01 --device cpu --graph_backend torch"
STAGE1 = f"--dataset W/data/ring --out_dir W/codes --checkpoint_dir W/checkpoints {SMALL} --epoch 3"
RANK = f"--dataset W/data/ring --eval_codes W/{CODES} --checkpoint W/{CHECKPOINT} --device cpu"
ROWS = f"--codes W/{CODES} --dataset W/data/ring --limit 12"
TUNE = (
    "--model_name W/base --train_data W/rows/train.json --val_data W/rows/validation.json --batch_size 4 "
    "--lora_r 4 --lora_alpha 8 --lora_dropout 0.1 --learning_rate 0.01 --logging_steps 1 --eval_steps 1"
)
MERGE = "--lora_adapter W/tuned/lora_adapters --base_model W/base"
ANSWER = f"{MERGE} --test_data W/rows/test_tasks.json --device cpu --max_new_tokens 4 --limit 3 --val_limit 3"
BASE = "--dataset W/data/ring --width 16 --heads 2 --layers 1 --steps 1 --vocab_size 300"

MAKE = [
    f"run_rq.py {STAGE1}",
    f"run_rq.py {RANK} --split valid --top 6 --export_candidates W/lists/valid.npz",
    f"run_rq.py {RANK} --split test --top 6 --export_candidates W/lists/test.npz",
    f"Class/gen_lp_data_rq.py {ROWS} --out_dir W/rows --candidates W/lists/valid.npz W/lists/test.npz",
    f"Class/gen_fb_data_rq.py {ROWS} --out_dir W/rows --neg_ratio 1",
    "Class/build_mix.py --out_dir W/rows",
    f"lora_training/make_tiny_base.py {BASE} --out W/base",
    f"lora_training/train_lora.py {TUNE} --max_steps 1 --output_dir W/tuned",
    f"lora_training/inference.py {ANSWER} --output W/answers/inference_results.json",
]


def make_world(folder: Path) -> None:
    """Run every command of MAKE in ``folder``. About six seconds on one core."""
    write_graph(folder / "data" / "ring")
    np.save(folder / "text.npy", np.random.default_rng(0).standard_normal((M, 6)).astype(np.float32))
    flags = SMALL.replace(" --", "\n--")
    (folder / "flags.txt").write_text(f"# a small run\n{flags}\n")
    for command in MAKE:
        outcome = call(command, folder, folder)
        assert outcome.code == 0, f"{command}\n{outcome.err}"


def words_of(command: str, world: Path, out: Path) -> tuple[str, list[str]]:
    """The script of a command and its arguments."""
    script, *words = shlex.split(command)
    return script, [word.replace("W/", f"{world}/", 1).replace("OUT/", f"{out}/", 1) for word in words]


def module_of(script: str) -> str:
    return script.removesuffix(".py").replace("/", ".")


@contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    """A limit of this process (``resource.RLIMIT_...``) for a while."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def used_memory() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def clear_caches() -> None:
    """Empty every ``lru_cache`` of our modules, as a process of its own would find them."""
    folders = ("Class", "common", "data", "lora_training", "model", "tables")
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in folders:
            for value in vars(module).values():
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


def call(command: str, world: Path, out: Path, memory: int = MEMORY) -> Outcome:
    """Run a script in this process. A traceback, if there is one, is on stderr with exit code 1."""
    from common.errors import run_command

    script, words = words_of(command, world, out)
    main = importlib.import_module(module_of(script)).main
    stdout, stderr, before, code = io.StringIO(), io.StringIO(), sys.argv, 0
    clear_caches()
    sys.argv = [script, *words]
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr), limited(resource.RLIMIT_AS, used_memory() + memory):
            run_command(main)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        code = 1
        stderr.write(traceback.format_exc())
    finally:
        sys.argv = before
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def assert_one_line(outcome: Outcome, *words: str) -> None:
    """Exit code 2, and one line ``error: ...`` at the end of stderr that holds one of ``words``."""
    lines = outcome.err.splitlines()
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], outcome.err
    assert not words or any(word in lines[-1] for word in words), f"none of {words} in: {lines[-1]}"
    assert len(outcome.err) < 2500, outcome.err


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with its hash."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---------------------------------------------------------------- processes that can be killed

CONTEXT = multiprocessing.get_context("forkserver")  # the server has torch loaded, so that a start is cheap
CONTEXT.set_forkserver_preload(["run_rq", "transformers", "peft", "accelerate", "lora_training.train_lora"])


def run_script(script: str, words: list[str], output: str) -> None:
    """What a child does: the script's ``main``, both outputs into one file."""
    import torch

    from common.errors import run_command

    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [script, *words]
    run_command(importlib.import_module(module_of(script)).main)


def start(command: str, world: Path, out: Path) -> BaseProcess:
    """Start a script; its output goes to ``OUT/log.txt``."""
    out.mkdir(exist_ok=True)
    script, words = words_of(command, world, out)
    process: BaseProcess = CONTEXT.Process(target=run_script, args=(script, words, str(out / "log.txt")))
    process.start()
    return process


def finish(command: str, world: Path, out: Path) -> str:
    """Run a script to its end, which must be a good one; what it printed."""
    process = start(command, world, out)
    process.join()
    text = (out / "log.txt").read_text()
    assert process.exitcode == 0, text
    return text

"""The paper's Table 5 in small, on a GPU: a base of 35M parameters from scratch, tuned with and without codes.

    OUT=DIR python3 benchmarks/llm_in_small.py --limit_s 560           repeat it until it says that it is done
    python benchmarks/llm_in_small.py --quick --limit_s 0              the same path on the family graph, without a GPU

It runs lora_training/compare_llm.py with configs/FB15k-237_llm_gpu.json for at most --limit_s seconds; --work keeps
codes, models and answers between calls, and the same command goes on where it stopped. --out (or OUT) gets one small
file, llm_in_small.json: the comparison when it is done; until then metrics, losses and seconds of the steps that are.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import os
import signal
import subprocess
from contextlib import suppress
from typing import Any

from benchmarks.measure import DATASET, FAMILY
from common.errors import CommandParser, InputError, run_command
from common.files import ROOT, read_json, write_json

RECIPE = ROOT / "configs" / "FB15k-237_llm_gpu.json"
RECORDS = ("inference_results.json", "run_record.json")
# of a record, what is small: no answers, no candidates
KEPT = ("args", "device", "versions", "wall_seconds", "peak_memory_mb", "metrics", "trained_parameters", "parameters",
        "tokens", "losses", "validation", "best_step", "steps", "tokens_per_row", "rows", "history",
        "test")  # fmt: skip


def small(record: Any) -> dict[str, Any]:
    """The entries of a run record that say how well and how fast; {} for another file."""
    return {key: record[key] for key in KEPT if key in record} if isinstance(record, dict) else {}


def gather(work: Path) -> dict[str, Any]:
    """What the steps that are done have left in ``work``: seconds, records by path, the comparison (None: not yet)."""
    found: dict[str, Any] = {"seconds": {}, "records": {}, "comparison": None}
    for seed in sorted(work.glob("seed_*")):
        marks = {mark.stem: read_json(mark, "mark").get("seconds") for mark in sorted((seed / "done").glob("*.json"))}
        found["seconds"][seed.name] = marks
        paths = [path for name in RECORDS for path in seed.rglob(name)] + list(seed.glob("*/*_rq.json"))
        for path in sorted(paths):
            found["records"][str(path.relative_to(work))] = small(read_json(path, "record"))
    if (work / "comparison.json").is_file():
        found["comparison"] = read_json(work / "comparison.json", "comparison")
    return found


def run_for(words: list[str], seconds: float) -> int:
    """Exit code of a command that is stopped, with all that it has started, after ``seconds`` (0: never).

    It is asked alone, so that it may ask its own: twice would be at once, without what a step saves. What is left of
    its session then is ended too.
    """
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds or None)
    except BaseException as end:
        process.terminate()
        code = process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        if isinstance(end, subprocess.TimeoutExpired):
            return code
        raise


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="benchmarks/llm_in_small.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the family graph; minutes on a CPU")
    parser.add_argument("--data", type=Path, default=os.environ.get("DATA"), help="graph folder (or DATA)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of everything per seed")
    parser.add_argument("--limit_s", type=float, default=560, help="seconds of this call (0: to the end)")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder of the result (or OUT)")
    parser.add_argument("--work", type=Path, default=os.environ.get("WORK"), help="kept between calls (or WORK)")
    args = parser.parse_args(argv)
    if args.limit_s < 0:
        parser.error(f"--limit_s must be 0 or more, got {args.limit_s}")
    args.data = args.data or (FAMILY if args.quick else DATASET)
    name = f"llm_in_small{'_quick' * args.quick}"
    args.work = args.work or ROOT / "lora_training" / "lora_outputs" / name
    args.out = args.out or args.work / "out"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    import torch

    if not args.quick and not torch.cuda.is_available():
        raise InputError("no CUDA device is there; give --quick to try the path on the CPU")
    words = [sys.executable, "lora_training/compare_llm.py", "--dataset", str(args.data), "--out", str(args.work)]
    words += ["--seeds", *map(str, args.seeds), *(["--quick"] if args.quick else ["--recipe", str(RECIPE)])]
    code = run_for(words, args.limit_s)
    found = gather(args.work)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(found, args.out / "llm_in_small.json")
    done = sum(len(marks) for marks in found["seconds"].values())
    print(f"{done} steps are done; wrote {args.out / 'llm_in_small.json'}")
    if found["comparison"] is None and code in (143, -signal.SIGTERM):
        print("stopped at --limit_s: repeat the command to go on")
        return 0
    return code


if __name__ == "__main__":
    run_command(main)

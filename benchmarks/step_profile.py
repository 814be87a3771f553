"""A training step by its parts, each with the ratio of its time to the time of its matrix products alone.

    python benchmarks/step_profile.py [--quick] [--json F] [--dataset DIR] [--device D] [-- FLAGS OF run_rq.py]

Runs the trainer's own loop in its phase with codes. A cycle is the steps from one encoder pass and assignment to the
next; the best of --cycles counts. floor: the FLOPs of all matrix products and convolutions of a part, counted by torch,
divided by the rate of a square float32 product under the same precision setting, measured in the same run; ratio: time
over floor. The sum over neighbours and the optimizer are not matrix products.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import (
    DATASET,
    FAMILY,
    STEP_PARTS,
    PartTimes,
    Row,
    around_parts,
    benchmark_parser,
    make_trainer,
    matmul_rate,
    print_table,
    run_steps,
    steps_per_epoch,
    write_rows,
)
from common.device import find_device
from common.errors import at_least, run_command
from data.knowledge_graph import KnowledgeGraph
from model.precision import FULL, keep_freed_memory
from model.schedule import CODES
from model.trainer import TRAINING_PRECISION, Trainer

IN_CODES_PHASE = ["--warmup_epochs", "0", "--freeze_at", "1"]
COLUMNS = {
    "part": "<", "calls": ".3f", "ms": ".2f", "share": ".3f", "gflop": ".2f", "floor_ms": ".2f", "ratio": ".2f",
}  # fmt: skip


class PartFlops:
    """FLOPs of the matrix products of each part."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops[part] = self.flops.get(part, 0) + counter.get_total_flops()


def ready_trainer(kg: KnowledgeGraph, flags: list[str], device: torch.device | str, folder: Path) -> Trainer:
    """A trainer in its phase with codes, after one cycle of warm-up steps."""
    trainer = make_trainer(kg, [*flags, *IN_CODES_PHASE], folder / "unused.pt", device)
    trainer._start_epoch(CODES)  # k-means, once per run
    run_steps(trainer, cycle_of(trainer))
    return trainer


def cycle_of(trainer: Trainer) -> int:
    """Steps from one assignment to the next."""
    every, assigned = trainer.config.encoder_every, trainer.schedule.assign_every(steps_per_epoch(trainer))
    return -(-assigned // every) * every


def profile_step(trainer: Trainer, cycles: int, rates: Mapping[str, float]) -> list[Row]:
    """A row per part and one for the whole step: ms per step of the best cycle, GFLOP, the floor's ms and the ratio.

    ``rates``: FLOP/s under TRAINING_PRECISION and under FULL, which the search for codes uses.
    """
    cycle, device = cycle_of(trainer), trainer.device
    best, whole = PartTimes(device), float("inf")
    for _ in range(cycles):
        parts = PartTimes(device)
        with around_parts(trainer, parts):
            seconds = run_steps(trainer, cycle) - parts.seconds["_start_epoch"]
        if seconds < whole:
            whole, best = seconds, parts
    counted = PartFlops()
    with around_parts(trainer, counted):
        run_steps(trainer, cycle)
    rows: list[Row] = []
    for part in STEP_PARTS.keys() - {"_start_epoch"}:
        rate = rates[FULL if part == "_refresh" else TRAINING_PRECISION]
        flops = counted.flops.get(part, 0) / cycle
        rows.append({
            "part": STEP_PARTS[part], "calls": best.calls.get(part, 0) / cycle, "gflop": flops / 1e9,
            "ms": 1e3 * best.seconds.get(part, 0.0) / cycle, "floor_ms": 1e3 * flops / rate,
        })  # fmt: skip
    rows.sort(key=lambda row: -row["ms"])
    rest = 1e3 * whole / cycle - sum(row["ms"] for row in rows)
    rows.append({"part": "the loop itself", "ms": rest, "gflop": 0.0, "floor_ms": 0.0})
    rows.append({"part": "one step", **{key: sum(row[key] for row in rows) for key in ("ms", "gflop", "floor_ms")}})
    for row in rows:
        row["share"] = row["ms"] / rows[-1]["ms"]
        row["ratio"] = row["ms"] / row["floor_ms"] if row["floor_ms"] else None
    return rows


def main() -> int:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = benchmark_parser(__doc__, "the bundled family graph, one cycle")
    parser.add_argument("--dataset", type=Path, help="graph folder (default: data/FB15k-237, with --quick data/family)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--cycles", type=at_least(1), default=3, help="cycles timed, the best counts")
    args = parser.parse_args(words[:end])
    begun = time.perf_counter()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    args.dataset = args.dataset or (FAMILY if args.quick else DATASET)
    args.device = str(find_device(args.device))
    kg = KnowledgeGraph.load(args.dataset)
    flags = [*words[end + 1 :], "--device", args.device]
    with tempfile.TemporaryDirectory() as folder:
        trainer = ready_trainer(kg, flags, args.device, Path(folder))
        rates = {precision: matmul_rate(precision, args.device) for precision in (TRAINING_PRECISION, FULL)}
        rows = profile_step(trainer, 1 if args.quick else args.cycles, rates)
    print(f"{kg.name}, {args.device}, {args.threads} threads, flags: {' '.join(flags)}")
    print(f"per step, over cycles of {cycle_of(trainer)} steps; encoder_every {trainer.config.encoder_every}")
    print_table(rows, COLUMNS)
    print(
        f"ratio: time over floor; products at {', '.join(f'{r / 1e9:.0f} GFLOP/s ({p})' for p, r in rates.items())}\n"
    )
    write_rows(args, rows, begun, inputs=kg.input_hashes, device=args.device, flags=flags, rates=rates)
    return 0


if __name__ == "__main__":
    run_command(main)

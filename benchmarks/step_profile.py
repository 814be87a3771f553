"""A training step by its parts, and its ratio to the matrix products in it at this machine's own rate.

    python benchmarks/step_profile.py [--quick] [--json F] [--dataset DIR] [--device D] [-- FLAGS OF run_rq.py]

Trains by the trainer's own loop with the flags of time_to_quality.py's RECIPE and those after ``--``. A cycle is the
steps from one encoder pass and assignment to the next; the best cycle of --cycles counts. floor: the FLOPs of all
matrix products and convolutions of a part, counted by torch, over the rate of a square float32 product under the same
precision setting, measured in this run; ratio: time over floor. The sum over neighbours and the optimizer are no
products. gbyte: what the operators in use read and write, the sum over neighbours left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
    write_rows,
)
from benchmarks.time_to_quality import RECIPE
from common.device import find_device
from common.errors import run_command
from data.knowledge_graph import KnowledgeGraph
from model.precision import FULL, keep_freed_memory
from model.schedule import CODES
from model.trainer import TRAINING_PRECISION, Trainer

INSIDE = ("_scorer_step", "_encoder_step", "_refresh", "optimizer.step")
SHOWN_OPERATORS = 12
GATHERS, SCATTERS = ("index_select", "index", "embedding", "gather"), ("index_add_", "index_add")


def stored_bytes(x: torch.Tensor) -> int:
    """Bytes of a tensor; of a sparse one, of its indices and values (sampled negatives have such gradients)."""
    return x._indices().nbytes + x._values().nbytes if x.is_sparse else x.nbytes


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write: all their tensors, of gathers and scatters only the rows they touch."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            read, written = (
                sum(stored_bytes(x) for x in tree_leaves(y) if isinstance(x, torch.Tensor)) for y in (args, result)
            )
            name = func.overloadpacket.__name__
            if name in GATHERS:
                read = written
            elif name in SCATTERS:
                read, written = args[3].nbytes, 2 * args[3].nbytes
            self.total += read + written
        return result


class PartCosts:
    """FLOPs of the products of each part, and bytes of all its operators."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        with Traffic() as traffic, FlopCounterMode(display=False) as counter:
            yield
        self.flops[part] = self.flops.get(part, 0) + counter.get_total_flops()
        self.bytes[part] = self.bytes.get(part, 0) + traffic.total


def ready_trainer(kg: KnowledgeGraph, flags: list[str], device: torch.device | str, folder: Path) -> Trainer:
    """A trainer in the middle of its codes phase, warmed up by a cycle."""
    words = ["--warmup_epochs", "0", "--freeze_at", "1", "--frozen_noise", "0", "--weight_average", "0"]
    trainer = make_trainer(kg, [*flags, *words], folder / "unused.pt", device)
    trainer._start_epoch(CODES)  # k-means, once per run
    run_steps(trainer, cycle_of(trainer))
    return trainer


def cycle_of(trainer: Trainer) -> int:
    """Steps from one assignment to the next."""
    every, assigned = trainer.config.encoder_every, trainer.schedule.assign_every(len(trainer._batches()))
    return -(-assigned // every) * every


def profile_step(trainer: Trainer, cycles: int, rates: Mapping[str, float]) -> list[Row]:
    """A row per part and one for the whole step: ms per step of the best cycle, GFLOP, the floor's ms and the ratio.

    ``rates``: FLOP/s under the trainer's precision setting and under FULL, at which codes are searched.
    """
    cycle, device = cycle_of(trainer), trainer.device
    best = PartTimes(device)
    whole = float("inf")
    for _ in range(cycles):
        parts = PartTimes(device)
        with around_parts(trainer, parts):
            seconds = run_steps(trainer, cycle) - parts.seconds["_start_epoch"]
        if seconds < whole:
            whole, best = seconds, parts
    counted = PartCosts()
    with around_parts(trainer, counted):
        run_steps(trainer, cycle)
    rows: list[Row] = []
    for part in INSIDE:
        rate = rates[FULL if part == "_refresh" else TRAINING_PRECISION]
        rows.append({
            "part": STEP_PARTS[part], "calls": best.calls.get(part, 0) / cycle,
            "ms": 1e3 * best.seconds.get(part, 0.0) / cycle, "gflop": counted.flops.get(part, 0) / 1e9 / cycle,
            "floor_ms": 1e3 * counted.flops.get(part, 0) / rate / cycle, "gflop_per_s": rate / 1e9,
            "gbyte": counted.bytes.get(part, 0) / 1e9 / cycle,
        })  # fmt: skip
    inside = sum(row["ms"] for row in rows)
    rows.append({"part": "the loop itself", "ms": 1e3 * whole / cycle - inside, "gflop": 0.0, "floor_ms": 0.0,
                 "gbyte": 0.0})  # fmt: skip
    rows.append({
        "part": "one step", "ms": 1e3 * whole / cycle, "gflop": sum(row["gflop"] for row in rows),
        "floor_ms": sum(row["floor_ms"] for row in rows), "gbyte": sum(row["gbyte"] for row in rows),
    })  # fmt: skip
    for row in rows:
        row["share"] = row["ms"] / (1e3 * whole / cycle)
        row["ratio"] = row["ms"] / row["floor_ms"] if row["floor_ms"] else None
    return rows


def operators(trainer: Trainer) -> list[Row]:
    """The operators that take most of a cycle, by their own time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    gpu = trainer.device.type == "cuda"
    if gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        run_steps(trainer, cycle_of(trainer))
    events = [
        (event.self_device_time_total if gpu else event.self_cpu_time_total, event.key, event.count)
        for event in found.key_averages()
    ]
    total = sum(time for time, *_ in events)
    return [
        {"operator": key, "calls": count, "ms": spent / 1e3 / cycle_of(trainer), "share": spent / total}
        for spent, key, count in sorted(events, reverse=True)[:SHOWN_OPERATORS]
    ]


PROFILE_COLUMNS = {
    "part": "<", "calls": ".3f", "ms": ".2f", "share": ".3f", "gbyte": ".3f", "gflop": ".2f", "gflop_per_s": ".0f",
    "floor_ms": ".2f", "ratio": ".2f",
}  # fmt: skip


def main() -> int:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = benchmark_parser(__doc__, "the bundled family graph, one cycle")
    parser.add_argument("--dataset", type=Path, help="graph folder (default: data/FB15k-237, with --quick data/family)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--cycles", type=int, default=3, help="cycles timed, the best counts")
    args = parser.parse_args(words[:cut])
    begun = time.perf_counter()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    args.dataset = args.dataset or (FAMILY if args.quick else DATASET)
    if args.quick:
        args.cycles = 1
    args.device = str(find_device(args.device))
    kg = KnowledgeGraph.load(args.dataset)
    flags = [*RECIPE, *words[cut + 1 :], "--device", args.device]
    with tempfile.TemporaryDirectory() as folder:
        trainer = ready_trainer(kg, flags, args.device, Path(folder))
        settings = {TRAINING_PRECISION, FULL}
        rates = {precision: matmul_rate(precision, args.device) for precision in settings}
        rows = profile_step(trainer, args.cycles, rates)
        top = operators(trainer)
    cycle = cycle_of(trainer)
    print(f"{kg.name}, {args.device}, {args.threads} threads, flags: {' '.join(flags)}")
    print(f"per step, over cycles of {cycle} steps with one encoder pass per {trainer.config.encoder_every}")
    print_table(rows, PROFILE_COLUMNS)
    print("ratio: time over floor, the part's matrix products alone at the rate measured here\n")
    print_table(top, {"operator": "<", "calls": "d", "ms": ".2f", "share": ".3f"})
    write_rows(args, rows, begun, inputs=kg.input_hashes, device=args.device, flags=flags, operators=top)
    return 0


if __name__ == "__main__":
    run_command(main)

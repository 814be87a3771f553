"""Time per epoch and peak memory of training as the graph grows: 10^4, 10^5, 10^6 entities, ten triples each.

    python benchmarks/growth.py [--quick] [--json F] [--sizes M ...]

Graphs from random_graph.py. Each row runs in its own process, so that its peak memory is its own: draw the graph, build
the trainer, initialize the codebooks, run --steps steps (at least one encoder cycle). An
encoder pass reads the whole graph, so above 10^5 entities ``encoder_every`` grows with M. The time of an epoch is its
start plus these steps, scaled to all steps of an epoch.
Model: D = 128, one graph layer, L x Q = 4 x 4 codes of K = 256, DistMult, no transformer block; loss exact or sampled.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from benchmarks.measure import (
    PartTimes,
    Row,
    around_parts,
    benchmark_parser,
    make_trainer,
    print_table,
    run_steps,
    steps_per_epoch,
    write_rows,
)
from benchmarks.random_graph import random_kg
from common.device import peak_memory_mb
from common.errors import InputError, at_least, run_command
from model.precision import keep_freed_memory
from model.schedule import CODES
from model.sizes import EXACT_UP_TO, encoder_pace

MODEL = [
    "--gcn_dim", "128", "--init_dim", "128", "--gcn_layers", "1", "--gcn_drop", "0", "--tf_layers", "0",
    "--seq_len", "4", "--num_code", "256", "--num_quantizers", "4", "--code_dim", "32", "--decoder", "distmult",
    "--warmup_epochs", "0", "--freeze_at", "1", "--epoch", "80", "--device", "cpu",
]  # fmt: skip
COLUMNS = {
    "entities": ",d", "triples": ",d", "loss": "<", "steps": ",d", "sampled_steps": "d", "encoder_every": "d",
    "ms_scorer": ".1f", "s_encoder": ".2f", "s_assign": ".2f", "epoch_seconds": ".1f", "us_per_triple": ".0f",
    "peak_gb": ".2f", "ratio": ".2f",
}  # fmt: skip


def measure(args: argparse.Namespace, M: int, negatives: int) -> Row:
    """One row: graph, trainer, ``steps`` steps."""
    torch.set_num_threads(args.threads)
    encoder_every = args.encoder_every or encoder_pace(M)
    if not negatives:  # as run_rq.py does
        keep_freed_memory()
    kg = random_kg(M, 10 * M, args.seed, held_out=(1, 1))
    flags = {"batch": args.batch, "encoder_every": encoder_every, "seed": args.seed, "num_negatives": negatives}
    trainer = make_trainer(kg, [*MODEL, *(f"--{key}={value}" for key, value in flags.items())], Path("unused"))
    trainer._start_epoch(CODES)  # k-means, once per run
    run_steps(trainer, 1)
    parts, all_steps = PartTimes(), steps_per_epoch(trainer)
    steps = min(max(args.steps, encoder_every), all_steps)
    with around_parts(trainer, parts):
        total = run_steps(trainer, steps)
    beginning = parts.seconds["_start_epoch"]
    epoch_seconds = beginning + (total - beginning) * all_steps / steps
    return {
        "entities": M,
        "triples": len(kg.train),
        "loss": f"sampled, N = {negatives:,}" if negatives else "exact",
        "steps": all_steps,
        "sampled_steps": steps,
        "encoder_every": encoder_every,
        "ms_scorer": 1e3 * parts.seconds["_scorer_step"] / parts.calls["_scorer_step"],
        "s_encoder": parts.seconds["_encoder_step"] / parts.calls["_encoder_step"],
        "s_assign": parts.seconds["_refresh"] / parts.calls["_refresh"],
        "epoch_seconds": epoch_seconds,
        "us_per_triple": 1e6 * epoch_seconds / len(kg.train),
        "peak_gb": peak_memory_mb() / 1024,
    }


def in_own_process(args: argparse.Namespace, M: int, negatives: int) -> Row:
    """The row, measured by a child process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, args, M, negatives).result()
        except BrokenProcessPool as error:
            raise InputError(f"--sizes {M}: the process was killed; it may need more memory than there is") from error


def main() -> int:
    parser = benchmark_parser(__doc__, "10^3 and 10^4 entities, eight steps")
    sizes = [10_000, 100_000, 1_000_000]
    parser.add_argument("--sizes", type=at_least(1), nargs="+", default=sizes, help="M of each graph; 10^6 need 16 GB")
    parser.add_argument("--num_negatives", type=at_least(1), default=4096, help="N of the sampled softmax")
    parser.add_argument("--steps", type=at_least(1), default=64, help="steps that are measured and scaled to an epoch")
    parser.add_argument("--batch", type=at_least(1), default=1024, help="B, queries per step")
    parser.add_argument("--encoder_every", type=at_least(1), help="steps per encoder pass (default: 64 per 10^5 rows)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the graph and the model")
    args = parser.parse_args()
    begun = time.perf_counter()
    if args.quick:
        args.sizes, args.steps, args.encoder_every = [1000, 10_000], 8, 8
    rows: list[Row] = []
    for M in args.sizes:
        exact = in_own_process(args, M, 0) if M <= EXACT_UP_TO else None
        for found in [*([exact] if exact else []), in_own_process(args, M, args.num_negatives)]:
            found["ratio"] = exact["epoch_seconds"] / found["epoch_seconds"] if exact else None
            rows.append(found)
    print_table(rows, COLUMNS)
    print("epoch_seconds: scaled from sampled_steps; peaks in GiB; ratio: the exact loss's epoch over this row's")
    write_rows(args, rows, begun)
    return 0


if __name__ == "__main__":
    run_command(main)

"""Seconds until codes alone reach a valid MRR on FB15k-237, and what the original's recipe reaches in the same time.

    python benchmarks/time_to_quality.py [--quick] [--json F] [--minutes 45] [--marks 0.30 0.33] [--record RUN.json]

ours: run_rq.py with RECIPE and --max_minutes; the seconds are those of its run record, rankings of valid included.
--record takes the record of a run that was made before, as far as it came in the given minutes.
original: its training step in the same minutes: two CompGCN layers whose every edge's message is a matrix product in a
user-defined DGL function, quantizer and ConvE in one graph, all entities passed anew every step, binary cross-entropy
against dense labels, batch 1024, Adam at 5e-4, D = 200. Here the quantizer has RECIPE's L, K and Q. It is ranked once,
from the codes, when the minutes are over; the ranking takes none of them. A mark or an epoch that was not reached stays
blank: nothing is extrapolated.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import subprocess
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import DATASET, FAMILY, Row, benchmark_parser, print_table, write_rows
from common.config import parse_config
from common.errors import InputError, content_of, run_command
from common.files import ROOT, read_json
from data.knowledge_graph import KnowledgeGraph
from model.CompGCN import CompGCN
from model.losses import gather_targets
from model.precision import keep_freed_memory
from model.RQGCN import RQGCN
from model.trainer import Trainer

# The recommended CPU recipe, as flags of run_rq.py
RECIPE = ["--config", str(ROOT / "configs" / "FB15k-237_4x4_cpu.txt")]
ORIGINAL = ["--config", "/dev/null", "--loss", "bce", "--batch", "1024", "--lr", "0.0005", "--gcn_layers", "2",
            "--gcn_dim", "200", "--init_dim", "200", "--decoder", "conve", "--device", "cpu"]  # fmt: skip


# ---------------------------------------------------------------- ours


def train_ours(dataset: Path, flags: list[str], minutes: float, threads: int, folder: Path) -> dict[str, Any]:
    """The run record of run_rq.py with these flags."""
    words = [sys.executable, str(ROOT / "run_rq.py"), *flags, "--dataset", str(dataset), "--max_minutes", str(minutes),
             "--out_dir", str(folder / "codes"), "--checkpoint_dir", str(folder), "--device", "cpu", "--split", "valid",
             "--num_workers", str(threads)]  # fmt: skip
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"run_rq.py ended with {done.returncode}: {reason}")
    record: dict[str, Any] = read_json(next((folder / "codes").glob("*.json")), "record")
    return record


def ours_row(record: dict[str, Any], marks: list[float], minutes: float) -> Row:
    """Seconds to each mark by the record's history, codes alone; the best epoch's MRR of those within ``minutes``.

    Raises InputError where no epoch was over by then. The epoch that the clock ended may stand a little past it.
    """
    history = [row for row in record["history"] if row["seconds"] <= 60 * minutes]
    if record["args"]["max_minutes"] and record["args"]["max_minutes"] <= minutes:
        history = record["history"]
    if not history:
        raise InputError(f"no epoch of {record['name']} was over after --minutes {minutes:g}; give more")
    ranked = [row for row in history if row["phase"] != "warm-up" and "valid" in row]

    def seconds_to(mark: float) -> float | None:
        return next((row["seconds"] for row in ranked if row["valid"]["mrr"] >= mark), None)

    return {
        "recipe": "ours", **{f"s_to_{mark:.2f}": seconds_to(mark) for mark in marks},
        "minutes": history[-1]["seconds"] / 60, "epochs": len(history),
        "s_per_epoch": history[-1]["seconds"] / len(history),
        "mrr": max((row["valid"]["mrr"] for row in ranked), default=None),
    }  # fmt: skip


# ---------------------------------------------------------------- the original's recipe


def original_model(kg: KnowledgeGraph, flags: list[str], folder: Path) -> Trainer:
    """A trainer's data and model with every graph layer replaced by one that multiplies each edge's message.

    Of ``flags`` it takes L, K and Q; all else is ORIGINAL's or run_rq.py's default.
    """
    from benchmarks.measure import make_trainer
    from benchmarks.message_passing import PerEdgeLayer

    recipe = parse_config(flags)
    size = [f"--{name}={getattr(recipe, name)}" for name in ("seq_len", "num_code", "num_quantizers")]
    trainer = make_trainer(kg, [*size, *ORIGINAL], folder / "unused.pt")
    encoder = trainer.model.encoder
    assert isinstance(encoder, CompGCN)
    for layer in encoder.layers:
        layer.__class__ = PerEdgeLayer
    return trainer


def original_step(trainer: Trainer, model: RQGCN, batch: torch.Tensor) -> torch.Tensor:
    """Eq. 9 of a batch in one graph: pass all entities, quantize, score, dense labels [B, M]."""
    encoded = model.encode(trainer.graph)
    quantized = model.rq_codebook(encoded.z)
    q_all = model.scorer.entity_vectors(quantized.z_q)
    scores = model.scorer.scores(q_all[trainer.heads[batch]], encoded.relations[trainer.rels[batch]], q_all)
    labels = torch.zeros_like(scores)
    rows, columns = gather_targets(trainer.indptr, trainer.targets, batch)
    labels[rows, columns] = 1
    smoothing = trainer.config.lbl_smooth
    labels = (1 - smoothing) * labels + smoothing / labels.shape[1]
    return F.binary_cross_entropy_with_logits(scores, labels) + trainer.config.vq_weight * quantized.total_loss


def train_original(kg: KnowledgeGraph, flags: list[str], minutes: float, folder: Path) -> Row:
    """As many steps as fit the minutes, then the MRR of the codes."""
    from model.evaluation import evaluate_codes

    trainer = original_model(kg, flags, folder)
    model, settings = trainer.model, trainer.config
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.l2)
    model.train()
    start, steps, epoch_ends = time.perf_counter(), 0, []
    per_epoch, spent = len(trainer._batches()), 0.0
    while spent < 60 * minutes:
        for batch in trainer._batches():
            optimizer.zero_grad(set_to_none=True)
            original_step(trainer, model, batch).backward()
            optimizer.step()
            steps += 1
            spent = time.perf_counter() - start
            if spent >= 60 * minutes:
                break
        if steps % per_epoch == 0:
            epoch_ends.append(spent)
    model.eval()
    with torch.no_grad():
        codes = model.cal_allent_codes(trainer.graph)
        metrics = evaluate_codes(model.scorer, model.relation_vectors(), codes, kg, "valid")
    return {
        "recipe": "original", "minutes": spent / 60, "epochs": steps / per_epoch, "steps": steps,
        "s_per_step": spent / steps, "s_per_epoch": epoch_ends[-1] / len(epoch_ends) if epoch_ends else None,
        "mrr": metrics["mrr"],
    }  # fmt: skip


def main() -> int:
    parser = benchmark_parser(__doc__, "the bundled family graph, small codes, some seconds each")
    parser.add_argument("--dataset", type=Path, help="graph folder (default: data/FB15k-237, with --quick data/family)")
    parser.add_argument("--minutes", type=float, default=45, help="of training, for each recipe")
    parser.add_argument("--marks", type=float, nargs="+", default=[0.30, 0.33], help="valid MRRs from codes alone")
    parser.add_argument("--record", type=Path, metavar="RUN.json", help="our run, made before: its record")
    parser.add_argument("--only", choices=["ours", "original"], help="leave the other recipe out")
    args = parser.parse_args()
    begun, flags = time.perf_counter(), list(RECIPE)
    args.dataset = args.dataset or (FAMILY if args.quick else DATASET)
    if args.quick:
        args.minutes = 0.1
        flags += ["--seq_len", "4", "--num_code", "64", "--num_quantizers", "2"]
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    ours = "run_rq.py " + " ".join(flags)
    kg = KnowledgeGraph.load(args.dataset)
    with tempfile.TemporaryDirectory() as name:
        if args.only != "original":
            record = read_json(args.record, "record") if args.record else train_ours(
                args.dataset, flags, args.minutes, args.threads, Path(name))  # fmt: skip
            with content_of(args.record or args.dataset, "run record"):
                rows.append(ours_row(record, args.marks, args.minutes))
                ours = record["command"]
        if args.only != "ours":
            rows.append(train_original(kg, flags, args.minutes, Path(name)))
    if len(rows) == 2:
        rows[0]["ratio"], rows[1]["ratio"] = rows[0]["mrr"] / rows[1]["mrr"] if rows[0]["mrr"] else None, 1.0
    print(f"{kg.name}, CPU, {args.threads} threads, {args.minutes:g} minutes each; ours: {ours}")
    print_table(rows, {
        "recipe": "<", **{f"s_to_{mark:.2f}": ".0f" for mark in args.marks}, "minutes": ".1f", "epochs": ".2f",
        "s_per_epoch": ".1f", "s_per_step": ".2f", "mrr": ".4f", "ratio": ".1f",
    })  # fmt: skip
    print("mrr: valid, from codes alone (ours: the best epoch's); ratio: of the MRRs; blank: not reached, not run")
    write_rows(args, rows, begun, inputs=kg.input_hashes, ours=ours, original=ORIGINAL)
    return 0


if __name__ == "__main__":
    run_command(main)

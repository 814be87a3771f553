"""Checks that need a GPU, in one run: kernels against float64, the time of a step, and a short training.

    python3 benchmarks/gpu_checklist.py [--data DIR] [--out DIR] [--limit_s 530] [--dry_run]

Needs torch, numpy, tqdm and Triton (part of CUDA torch); no DGL, no Numba, no network. --data is a graph folder, by
default data/FB15k-237, which git ignores: copy it to the machine first. --out receives table.txt, checklist.json,
train.log and, after training, the run record and the codes. The checkpoint stays in --work: a second call with the same
folder continues from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO

import torch

from benchmarks.measure import DATASET, FAMILY, Row, best_times, matmul_rate, print_table
from benchmarks.step_profile import profile_step, ready_trainer
from common.errors import CommandParser, InputError, run_command
from common.files import ROOT, load_torch, output_folder, read_json, write_json, write_text
from common.record import make_record
from data.knowledge_graph import KnowledgeGraph
from model.message_passing import compose_sum, resolve_backend
from model.precision import FULL
from model.relational_graph import RelationalGraph

# the paper's sizes, where they differ from the defaults of run_rq.py
PAPER = ["--config", os.devnull, "--seq_len", "32", "--num_code", "2048", "--num_quantizers", "4", "--epoch", "800"]
TOY = ["--config", os.devnull, "--seq_len", "4", "--num_code", "32", "--num_quantizers", "2", "--epoch", "2",
       "--init_dim", "32", "--gcn_dim", "32", "--decoder", "distmult"]  # fmt: skip
RESERVE_S = 45  # after training, for ranking and writing
COLUMNS = {"check": "<", "ms": ".3f", "floor_ms": ".3f", "ratio": ".2f", "error": ".1e", "note": "<"}


# ---------------------------------------------------------------- the kernels


def parity(kg: KnowledgeGraph, device: str, width: int) -> list[Row]:
    """Fused sums and gradients against the torch backend in float64; the largest relative error of the three."""
    graph = RelationalGraph.from_triples(kg.train, kg.num_entities, kg.num_relations).to(device)
    torch.manual_seed(0)
    x = torch.randn(kg.num_entities, width, device=device, dtype=torch.float64)
    v = torch.randn(2 * kg.num_relations, width, device=device, dtype=torch.float64)
    grad = torch.randn(2 * kg.num_entities, width, device=device, dtype=torch.float64)

    def results(backend: str, composition: str, dtype: torch.dtype) -> list[torch.Tensor]:
        a, b = x.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()
        out = compose_sum(a, b, graph.edges, backend, composition)
        return [out.detach(), *torch.autograd.grad(out, (a, b), grad.to(dtype))]

    rows: list[Row] = []
    for composition in ("mult", "sub"):
        exact = results("torch", composition, torch.float64)
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            found = results("fused", composition, dtype)
            error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
            name = f"parity {composition} {str(dtype).removeprefix('torch.')}"
            rows.append({"check": name, "error": error, "note": "" if error < bound else f"FAILED: above {bound:.0e}"})
    return rows


def kernel_times(kg: KnowledgeGraph, device: str, width: int, repeats: int) -> list[Row]:
    """The sum, and the sum with both gradients: fused against torch."""
    graph = RelationalGraph.from_triples(kg.train, kg.num_entities, kg.num_relations).to(device)
    x = torch.randn(kg.num_entities, width, device=device, requires_grad=True)
    v = torch.randn(2 * kg.num_relations, width, device=device, requires_grad=True)
    grad = torch.randn(2 * kg.num_entities, width, device=device)

    def both(backend: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(compose_sum(x, v, graph.edges, backend), (x, v), grad)

    def forward(backend: str) -> Callable[[], object]:
        return lambda: compose_sum(x.detach(), v.detach(), graph.edges, backend)

    rows: list[Row] = []
    for name, way in (("sum over neighbours", forward), ("the same with gradients", both)):
        times = best_times({backend: way(backend) for backend in ("fused", "torch")}, repeats, device)
        ratio = times["torch"] / times["fused"]
        rows.append({"check": name, "ms": 1e3 * times["fused"], "ratio": ratio, "note": "ratio: torch over fused"})
    return rows


# ---------------------------------------------------------------- the step


def step_times(kg: KnowledgeGraph, device: str, flags: list[str], rates: dict[str, float], cycles: int) -> list[Row]:
    """Every part of a step against the time of its matrix products."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = ready_trainer(kg, [*flags, "--device", device], device, Path(folder))
        parts = profile_step(trainer, cycles, rates)
    return [
        {
            "check": part["part"], "ms": part["ms"], "floor_ms": part["floor_ms"], "ratio": part["ratio"],
            "note": f"{part['gflop']:.1f} GFLOP per step; ratio: time over floor",
        }
        for part in parts
    ]  # fmt: skip


# ---------------------------------------------------------------- training


def train(args: argparse.Namespace, flags: list[str], seconds: float) -> list[Row]:
    """run_rq.py for ``seconds``, from its checkpoint if there is one; record and codes go to --out."""
    codes, checkpoint = args.work / "codes", args.work / "gpu_checklist.pt"
    spent = load_torch(checkpoint, "checkpoint")["last"]["seconds"] if checkpoint.exists() else 0.0
    words = [sys.executable, str(ROOT / "run_rq.py"), "--dataset", str(args.data), *flags, "--name", checkpoint.stem,
             "--out_dir", str(codes), "--checkpoint_dir", str(args.work), "--device", args.device,
             "--max_minutes", f"{(spent + seconds) / 60:.3f}"]  # earlier calls count too  # fmt: skip
    start = time.perf_counter()
    with open(args.out / "train.log", "a") as log:
        how = "--restore" if checkpoint.exists() else "--overwrite"
        code = subprocess.run([*words, how], stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        last = (args.out / "train.log").read_text().strip().splitlines()[-1:]
        raise InputError(f"run_rq.py ended with {code}: {' '.join(last)}")
    written = next(codes.glob("*_rq.json"))
    record = read_json(written, "record")
    for path in (written, written.with_suffix(".pt")):
        shutil.copy(path, args.out)
    history = record["history"]
    valid, test, shuffled = (record[key]["mrr"] for key in ("valid", "test", "test_shuffled_codes"))
    note = (
        f"ms per epoch; MRR from codes: valid {valid:.4f} (epoch {record['best_epoch']}), test {test:.4f}, test with "
        f"shuffled codes {shuffled:.4f}; {history[-1]['seconds']:.0f} s of training in total, "
        f"{time.perf_counter() - start:.0f} s in this call"
    )
    return [{"check": f"training, {record['epochs']} epochs", "ms": 1e3 * history[-1]["seconds"] / len(history),
             "note": note}]  # fmt: skip


# ---------------------------------------------------------------- all of it


def attempt(rows: list[Row], what: str, section: Callable[[], list[Row]]) -> None:
    """Add the section's rows, or one row with the reason of its failure; the other sections still run."""
    start = time.perf_counter()
    try:
        found = section()
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        found = [{"check": what, "note": f"FAILED: {type(error).__name__}: {reason[:300]}"}]
    rows += found
    print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)


def main() -> int:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="graph folder (default: data/FB15k-237)")
    parser.add_argument("--out", type=output_folder, help="folder of the results (default: in --work)")
    parser.add_argument("--work", type=output_folder, help="folder of the checkpoint (default: below checkpoints)")
    parser.add_argument("--limit_s", type=float, default=530, help="seconds of the whole call")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--dry_run", action="store_true", help="the bundled family graph, toy size, on the CPU")
    args = parser.parse_args()
    begun = time.perf_counter()
    if args.dry_run:
        args.device = "cpu"
    elif not args.device.startswith("cuda"):
        raise InputError("there is no CUDA device; give --dry_run to test the script on the CPU")
    args.data = args.data or (FAMILY if args.dry_run else DATASET)
    args.work = args.work or ROOT / "checkpoints" / ("gpu_checklist_dry" if args.dry_run else "gpu_checklist")
    args.out = args.out or args.work / "out"
    kg = KnowledgeGraph.load(args.data)
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    flags, width, repeats = (TOY, 32, 1) if args.dry_run else (PAPER, 200, 10)
    size = 256 if args.dry_run else 8192
    rates = {precision: matmul_rate(precision, args.device, size) for precision in ("medium", FULL)}
    backend = resolve_backend("auto", args.device)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU, a dry run without meaningful times"
    heading = (
        f"{name}; torch {torch.__version__}; {kg.name}; message passing: {backend}\n"
        f"products of {size}: "
        + ", ".join(f"{precision} {rate / 1e12:.1f} TFLOP/s" for precision, rate in rates.items())
    )
    print(heading, flush=True)

    rows: list[Row] = []
    if backend == "fused":
        attempt(rows, "parity", lambda: parity(kg, args.device, width))
        attempt(rows, "kernels", lambda: kernel_times(kg, args.device, width, repeats))
    else:
        note = "left out: numba is not installed" if args.dry_run else "FAILED: the fused kernels cannot run here"
        rows.append({"check": "parity", "note": note})
    attempt(rows, "step", lambda: step_times(kg, args.device, flags, rates, 1 if args.dry_run else 3))
    left = args.limit_s - (time.perf_counter() - begun) - RESERVE_S
    attempt(rows, "training", lambda: train(args, flags, max(5.0, left)))

    record = make_record(vars(args), kg.input_hashes, time.perf_counter() - begun, args.device,
                         rows=rows, matmul_rates=rates)  # fmt: skip
    write_json(record, args.out / "checklist.json")
    table = StringIO()
    with redirect_stdout(table):
        print(heading)
        print_table(rows, COLUMNS)
    write_text(table.getvalue(), args.out / "table.txt")
    print(f"{time.perf_counter() - begun:.0f} s; results in {args.out}\n{table.getvalue()}", end="")
    return int(any("FAILED" in str(row.get("note")) for row in rows))


if __name__ == "__main__":
    run_command(main)

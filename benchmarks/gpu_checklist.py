"""What only a GPU can tell, in one pass: kernel parity, step time against its floor, the paper's setting trained.

    bash benchmarks/gpu_checklist.sh [--data DIR] [--out DIR] [--limit_s 530] [--total_minutes N] [--dry_run]

Needs torch, numpy and tqdm, and Triton, which comes with CUDA torch: no DGL, no Numba, no network. --data (or DATA)
is a graph folder, by default data/FB15k-237, which git ignores: copy it to the machine first. --out (or OUT)
receives table.txt, checklist.json and, when training got far enough, metrics.json (the run record), codes.pt and
decoder.pt (scorer, relations and configuration). Checkpoints stay in --work (or WORK): a second call with the
same folder goes on from there. --total_minutes: of training over all calls, to which the schedules are fitted; by
default what this call has left, so that one call is a whole short run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO

import torch

from benchmarks.measure import DATASET, FAMILY, Row, best_times, copy_bandwidth, matmul_rate, print_table
from benchmarks.step_profile import profile_step, ready_trainer
from common.errors import CommandParser, InputError, run_command
from common.files import ROOT, load_torch, read_json, save_torch, write_json, write_text
from common.record import make_record
from data.knowledge_graph import KnowledgeGraph
from model.message_passing import compose_sum, resolve_backend
from model.precision import FULL
from model.relational_graph import RelationalGraph

# The paper's setting; what differs from run_rq.py's defaults.
PAPER = ["--config", "/dev/null", "--seq_len", "32", "--num_code", "2048", "--epoch", "800"]
TOY = ["--config", "/dev/null", "--seq_len", "4", "--num_code", "32", "--num_quantizers", "2", "--epoch", "2",
       "--init_dim", "32", "--gcn_dim", "32", "--decoder", "distmult"]  # fmt: skip
RESERVE_S = 45  # after training: ranking from the dump, writing
LIMIT_MB = 60
COLUMNS = {"check": "<", "ms": ".3f", "floor_ms": ".3f", "share": ".2f", "ratio": ".2f", "error": ".1e", "note": "<"}


# ---------------------------------------------------------------- the kernels


def sum_bytes(graph: RelationalGraph, width: int) -> int:
    """Bytes of one sum over neighbours in float32: a row of x, ids and weight per edge, and the result."""
    return graph.edges.num_edges * (4 * width + 12) + graph.edges.num_destinations * 4 * width


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


def kernel_times(kg: KnowledgeGraph, device: str, width: int, bandwidth: float, repeats: int) -> list[Row]:
    """The sum, and the sum with both gradients: fused against torch, and against its bytes at the copy bandwidth."""
    graph = RelationalGraph.from_triples(kg.train, kg.num_entities, kg.num_relations).to(device)
    x = torch.randn(kg.num_entities, width, device=device, requires_grad=True)
    v = torch.randn(2 * kg.num_relations, width, device=device, requires_grad=True)
    grad = torch.randn(2 * kg.num_entities, width, device=device)

    def both(backend: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(compose_sum(x, v, graph.edges, backend), (x, v), grad)

    def forward(backend: str) -> Callable[[], object]:
        return lambda: compose_sum(x.detach(), v.detach(), graph.edges, backend)

    rows: list[Row] = []
    for name, way, passes in (("sum over neighbours", forward, 1), ("the same with gradients", both, 3)):
        times = best_times({backend: way(backend) for backend in ("fused", "torch")}, repeats, device)
        floor = passes * sum_bytes(graph, width) / bandwidth
        rows.append({
            "check": name, "ms": 1e3 * times["fused"], "floor_ms": 1e3 * floor, "share": floor / times["fused"],
            "ratio": times["torch"] / times["fused"], "note": "ratio: torch backend over fused",
        })  # fmt: skip
    return rows


# ---------------------------------------------------------------- the step


def step_times(
    kg: KnowledgeGraph, device: str, flags: list[str], bandwidth: float, rates: dict[str, float], cycles: int
) -> list[Row]:
    """Every part of a step; its floor is the longer of FLOPs at the product rate and bytes at the copy bandwidth."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = ready_trainer(kg, [*flags, "--device", device], device, Path(folder))
        parts = profile_step(trainer, cycles, rates)
    rows: list[Row] = []
    for part in parts:
        floor = max(part["floor_ms"], 1e3 * part["gbyte"] * 1e9 / bandwidth)
        rows.append({
            "check": part["part"], "ms": part["ms"], "floor_ms": floor, "share": floor / part["ms"],
            "ratio": part["ms"] / floor if floor else None,
            "note": f"{part['gflop']:.1f} GFLOP, {part['gbyte']:.2f} GB a step; ratio: time over floor",
        })  # fmt: skip
    return rows


# ---------------------------------------------------------------- training


def train(args: argparse.Namespace, flags: list[str], seconds: float) -> list[Row]:
    """run_rq.py for ``seconds``, from its checkpoint where there is one; then the best epoch's codes are dumped."""
    codes, checkpoint = args.work / "codes", args.work / "gpu_checklist.pt"
    spent = load_torch(checkpoint, "checkpoint")["last"]["seconds"] if checkpoint.exists() else 0.0
    minutes = args.total_minutes or (spent + seconds) / 60  # --max_minutes counts earlier calls too
    words = [sys.executable, str(ROOT / "run_rq.py"), "--dataset", str(args.data), *flags, "--name", checkpoint.stem,
             "--out_dir", str(codes), "--checkpoint_dir", str(args.work), "--device", args.device,
             "--max_minutes", f"{minutes:.3f}"]  # fmt: skip
    how = ["--restore"] if checkpoint.exists() else ["--overwrite"]
    start = time.perf_counter()
    with open(args.out / "train.log", "a") as log:
        process = subprocess.Popen([*words, *how], stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=seconds + (0 if args.total_minutes else RESERVE_S / 2))
        except subprocess.TimeoutExpired:  # the checkpoint of the last whole epoch is there
            process.terminate()
            process.wait()
            done = load_torch(checkpoint, "checkpoint")["last"]["epoch"]
            stop = ["--restore", "--epoch", str(done)]
            code = subprocess.run([*words, *stop], stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        last = (args.out / "train.log").read_text().strip().splitlines()[-1:]
        raise InputError(f"run_rq.py ended with {code}: {' '.join(last)}")
    record = read_json(next(codes.glob("*_rq.json")), "record")
    keep_results(args.out, record, next(codes.glob("*_rq.pt")), checkpoint)
    history, spent = record["history"], record["history"][-1]["seconds"]
    valid, test, shuffled = (record[key]["mrr"] for key in ("valid", "test", "test_shuffled_codes"))
    note = (
        f"ms per epoch; MRR from codes: valid {valid:.4f} (epoch {record['best_epoch']}), test {test:.4f}, test with "
        f"shuffled codes {shuffled:.4f}; {spent:.0f} s of training in all, {time.perf_counter() - start:.0f} s here"
    )
    return [{"check": f"training, {record['epochs']} epochs", "ms": 1e3 * spent / len(history), "note": note}]


def keep_results(out: Path, record: Row, codes_file: Path, checkpoint: Path) -> None:
    """metrics.json, codes.pt and decoder.pt: all that is needed to rank from the codes."""
    stored = load_torch(checkpoint, "checkpoint")
    best = stored["best"]
    scorer = {name: value.cpu() for name, value in best["model"].items() if name.startswith("scorer.")}
    write_json(record, out / "metrics.json")
    save_torch(load_torch(codes_file, "codes"), out / "codes.pt")
    slim = {key: best[key] for key in ("epoch", "valid", "codes_sha256")}
    last = {key: stored["last"][key] for key in ("epoch", "seconds", "history")}
    # what run_rq.py --eval_codes CODES --checkpoint decoder.pt reads of a checkpoint, and no more
    save_torch(
        {
            **{key: stored[key] for key in ("format", "config", "inputs", "model", "trained_on")},
            "last": {"model": {}, **last},
            "best": {"model": scorer, "relations": best["relations"].cpu(), **slim},
        },
        out / "decoder.pt",
    )


# ---------------------------------------------------------------- all of it


def attempt(rows: list[Row], what: str, section: Callable[[], list[Row]]) -> None:
    """The section's rows, or one that says what kept it from running: the other sections still run."""
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
    environment = os.environ
    parser.add_argument("--data", type=Path, default=environment.get("DATA"), help="graph folder (or DATA)")
    parser.add_argument("--out", type=Path, default=environment.get("OUT"), help="folder of the results (or OUT)")
    parser.add_argument("--work", type=Path, default=environment.get("WORK"), help="folder of the checkpoint (or WORK)")
    parser.add_argument("--limit_s", type=float, default=530, help="seconds that all of it may take")
    parser.add_argument("--total_minutes", type=float, default=0, help="of training over all calls (0: this one's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--dry_run", action="store_true", help="the bundled family graph, toy size, on the CPU")
    args = parser.parse_args()
    begun = time.perf_counter()
    if args.dry_run:
        args.device = "cpu"
    elif not args.device.startswith("cuda"):
        raise InputError("no CUDA device is there; give --dry_run to try the path on the CPU")
    args.data = args.data or (FAMILY if args.dry_run else DATASET)
    args.work = args.work or ROOT / "checkpoints" / ("gpu_checklist_dry" if args.dry_run else "gpu_checklist")
    args.out = args.out or args.work / "out"
    kg = KnowledgeGraph.load(args.data)
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    flags, width, repeats = (TOY, 32, 1) if args.dry_run else (PAPER, 200, 10)
    size, block = (256, 2**22) if args.dry_run else (8192, 2**30)
    bandwidth = copy_bandwidth(args.device, block)
    rates = {precision: matmul_rate(precision, args.device, size) for precision in ("medium", FULL)}
    backend = resolve_backend("auto", args.device)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU, a dry run: no figure here counts"
    heading = (
        f"{name}; torch {torch.__version__}; {kg.name}; neighbours summed by {backend}\n"
        f"copy {bandwidth / 1e9:,.0f} GB/s; products of {size}: "
        + ", ".join(f"{precision} {rate / 1e12:.1f} TFLOP/s" for precision, rate in rates.items())
    )
    print(heading, flush=True)

    rows: list[Row] = []
    if backend == "fused":
        attempt(rows, "parity", lambda: parity(kg, args.device, width))
        attempt(rows, "kernels", lambda: kernel_times(kg, args.device, width, bandwidth, repeats))
    else:
        note = "left out: numba is not installed" if args.dry_run else "FAILED: the fused kernels cannot run here"
        rows.append({"check": "parity", "note": note})
    attempt(rows, "step", lambda: step_times(kg, args.device, flags, bandwidth, rates, 1 if args.dry_run else 3))
    left = args.limit_s - (time.perf_counter() - begun) - RESERVE_S
    attempt(rows, "training", lambda: train(args, flags, max(5.0, left)))

    record = make_record(vars(args), kg.input_hashes, time.perf_counter() - begun, args.device,
                         rows=rows, bandwidth=bandwidth, matmul_rates=rates)  # fmt: skip
    write_json(record, args.out / "checklist.json")
    table = StringIO()
    with redirect_stdout(table):
        print(heading)
        print_table(rows, COLUMNS)
    write_text(table.getvalue(), args.out / "table.txt")
    megabytes = sum(file.stat().st_size for file in args.out.iterdir() if file.is_file()) / 1e6
    print(f"{time.perf_counter() - begun:.0f} s; {args.out}: {megabytes:.1f} MB\n{table.getvalue()}", end="")
    if megabytes > LIMIT_MB:
        raise InputError(f"{args.out} holds {megabytes:.0f} MB, more than {LIMIT_MB}; give an empty --out")
    return int(any("FAILED" in str(row.get("note")) for row in rows))


if __name__ == "__main__":
    run_command(main)

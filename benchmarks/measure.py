"""Shared by the benchmarks: flags, best times, rates of this machine, a training step by its parts, tables and JSON."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.errors import CommandParser, at_least
from common.files import ROOT, output_file, write_json
from common.record import make_record
from model.precision import matmul_precision

if TYPE_CHECKING:
    from data.knowledge_graph import KnowledgeGraph
    from model.trainer import Trainer

Row = dict[str, Any]
DATASET = ROOT / "data" / "FB15k-237"
FAMILY = ROOT / "data" / "family"


def benchmark_parser(doc: str, quick: str) -> CommandParser:
    """A parser with the flags of every benchmark: --quick (``quick``: what it does), --json and --threads."""
    parser = CommandParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{quick}; under 50 s on two cores")
    parser.add_argument("--json", type=output_file, metavar="F", help="also write the table to this file as JSON")
    parser.add_argument("--threads", type=at_least(1), default=2, help="CPU threads")
    return parser


def print_table(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """One line per row; ``columns``: key -> format, as in ``.2f`` or ``<30``. None and missing values are blank."""

    def shown(value: Any, form: str) -> str:
        if value is None:
            return ""
        return format(value, form.lstrip("<") if not isinstance(value, str) else "")

    cells = [list(columns)] + [[shown(row.get(key), form) for key, form in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print(
            "  ".join(
                text.ljust(width) if form.startswith("<") else text.rjust(width)
                for text, width, form in zip(line, widths, columns.values(), strict=True)
            ).rstrip()
        )


def write_rows(args: argparse.Namespace, rows: Sequence[Row], begun: float, **more: Any) -> None:
    """With --json: the rows in a run record; ``begun``: time.perf_counter() at the start; ``more``: further entries."""
    if args.json:
        inputs, device = more.pop("inputs", {}), more.pop("device", "cpu")
        write_json(make_record(vars(args), inputs, time.perf_counter() - begun, device, rows=rows, **more), args.json)
        print(f"wrote {args.json}")


# ---------------------------------------------------------------- times and rates


def finish(device: torch.device | str) -> None:
    """Wait until a GPU has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def best_times(
    ways: Mapping[str, Callable[[], object]], repeats: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Seconds of the best of ``repeats`` runs of each way, after one warm-up run; the ways alternate."""
    best: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            finish(device)
            start = time.perf_counter()
            way()
            finish(device)
            if turn:
                best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
    return best


def matmul_rate(precision: str, device: torch.device | str = "cpu", size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a product of two float32 [size, size] matrices under ``matmul_precision(precision)``."""
    a, b = torch.randn(2, size, size, device=device)
    out = torch.empty_like(a)
    with matmul_precision(precision):
        seconds = best_times({"product": lambda: torch.mm(a, b, out=out)}, repeats, device)["product"]
    return 2 * size**3 / seconds


# ---------------------------------------------------------------- a training step, by its parts

STEP_PARTS = {  # methods of the trainer -> their names in the table
    "_start_epoch": "start of the epoch",
    "_scorer_step": "scorer, forward and backward",
    "_encoder_step": "encoder, forward and backward",
    "_refresh": "encoder without dropout, assignment",
    "optimizer.step": "Adam",
}


def make_trainer(
    kg: KnowledgeGraph, flags: Sequence[str], checkpoint: Path, device: torch.device | str = "cpu"
) -> Trainer:
    """The trainer of ``run_rq.py FLAGS`` for ``kg``, seeded, before its first step."""
    from common.config import parse_config
    from common.record import seed_everything
    from model.inputs import load_text
    from model.RQGCN import RQGCN, model_arguments
    from model.sizes import with_sizes
    from model.trainer import Trainer

    config = with_sizes(parse_config(list(flags)), kg.num_entities, kg.num_relations, len(kg.train))
    seed_everything(config.seed)
    text = load_text(config.text_emb, kg.num_entities)
    arguments = model_arguments(config, None if text is None else text.shape[1])
    model = RQGCN(kg.num_entities, kg.num_relations, **arguments)
    return Trainer(kg, model, config, checkpoint, arguments, {}, text, device, lambda line: None)


@contextmanager
def around_parts(trainer: Trainer, context: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
    """Run every call of one of STEP_PARTS inside ``context(part)``; a part called by another part is not separate."""
    replaced = []
    inside = False
    for part in STEP_PARTS:
        *owners, name = part.split(".")
        owner = getattr(trainer, owners[0]) if owners else trainer
        method = getattr(owner, name)

        def wrapped(*args: Any, method: Callable[..., Any] = method, part: str = part, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return method(*args, **kwargs)
            inside = True
            try:
                with context(part):
                    return method(*args, **kwargs)
            finally:
                inside = False

        setattr(owner, name, wrapped)
        replaced.append((owner, name, method))
    try:
        yield
    finally:
        for owner, name, method in replaced:
            setattr(owner, name, method)


class PartTimes:
    """Seconds and calls of each part."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device, self.seconds, self.calls = device, dict[str, float](), dict[str, int]()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        finish(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            finish(self.device)
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
            self.calls[part] = self.calls.get(part, 0) + 1


def run_steps(trainer: Trainer, steps: int) -> float:
    """Seconds of an epoch of the trainer that is cut to its first ``steps`` batches, by the trainer's own loop."""
    batches, schedule = trainer._batches, trainer.schedule
    every, assign_every = schedule.assign_every(steps_per_epoch(trainer)), schedule.assign_every
    trainer._batches = lambda: batches()[:steps]  # type: ignore[method-assign]
    schedule.assign_every = lambda steps: every  # type: ignore[method-assign]
    try:
        finish(trainer.device)
        start = time.perf_counter()
        trainer._train_epoch(trainer.phase())
        finish(trainer.device)
        return time.perf_counter() - start
    finally:
        trainer._batches, schedule.assign_every = batches, assign_every  # type: ignore[method-assign]


def steps_per_epoch(trainer: Trainer) -> int:
    return -(-len(trainer.heads) // trainer.config.batch)

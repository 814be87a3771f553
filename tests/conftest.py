"""Shared by the tests of stage 1: a tiny graph with structure, small dimensions, and run_rq.py called in-process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import run_rq
from common import errors, record
from common.config import Config
from data.knowledge_graph import KnowledgeGraph
from model import trainer as trainer_module
from model.RQGCN import RQGCN, model_arguments
from model.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
# M = 43 differs from every other size below, so that a tensor with 43 rows is indexed by entities
M, R, L, K, Q, CODE_DIM, D = 43, 3, 3, 8, 2, 6, 12
SHAPE: dict[str, Any] = {
    "init_dim": D, "gcn_dim": D, "gcn_layers": 1, "seq_len": L, "num_code": K, "num_quantizers": Q,
    "code_dim": CODE_DIM, "att_head": 2, "decoder": "distmult", "quantizer": "rq",
}  # fmt: skip


RING = "ring_3_8_2_rq"
FAMILY_FLAGS: dict[str, Any] = {
    "seq_len": 4, "num_code": 32, "num_quantizers": 2, "code_dim": 16, "init_dim": 48, "gcn_dim": 48, "gcn_layers": 1,
    "tf_layers": 0, "decoder": "distmult", "decoder_drop": 0, "gcn_drop": 0, "epoch": 8, "batch": 256, "lr": 0.01,
    "lbl_smooth": 0,
}  # fmt: skip


class Outcome(NamedTuple):
    """What one call of a script left."""

    code: int
    out: str
    err: str


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2 and one line on stderr that holds ``words``."""
    assert outcome.code == 2, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    for word in words:
        assert word in lines[0], lines[0]


def graph_triples() -> np.ndarray:
    """43 entities on a ring: next (+1), over (+2), and the hub of an entity's class (mod 5)."""
    rows = [(i, 0, (i + 1) % M) for i in range(M)] + [(i, 1, (i + 2) % M) for i in range(M)]
    rows += [(i, 2, i % 5) for i in range(5, M)]
    triples = np.array(rows)
    return triples[np.random.default_rng(0).permutation(len(triples))]


def write_graph(folder: Path) -> Path:
    """The ring as a graph folder with names, so that ids are not the order of the names."""
    folder.mkdir(parents=True)
    triples = graph_triples()
    relations = ["next", "over", "hub"]
    for split, rows in {"train": triples[24:], "valid": triples[:12], "test": triples[12:24]}.items():
        lines = [f"e{h}\t{relations[r]}\te{t}\n" for h, r, t in rows]
        (folder / f"{split}.txt").write_text("".join(lines))
    (folder / "entities.dict").write_text("".join(f"{i}\te{i}\n" for i in range(M)))
    (folder / "relations.dict").write_text("".join(f"{i}\t{name}\n" for i, name in enumerate(relations)))
    (folder / "entity2label.txt").write_text("".join(f"e{i}\tEntity {i}\n" for i in range(M)))
    return folder


@pytest.fixture(scope="session")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny graph."""
    return write_graph(tmp_path_factory.mktemp("data") / "ring")


@pytest.fixture(scope="session")
def ring_kg(ring: Path) -> KnowledgeGraph:
    return KnowledgeGraph.load(ring)


@pytest.fixture(scope="session")
def family() -> KnowledgeGraph:
    return KnowledgeGraph.load(ROOT / "data" / "family")


def flags_of(values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def small_flags(dataset: Path, folder: Path, **more: Any) -> list[str]:
    """Flags of a small run of stage 1 whose outputs go to ``folder``."""
    small: dict[str, Any] = {
        "config": os.devnull, "dataset": dataset, "out_dir": folder / "codes",
        "checkpoint_dir": folder / "checkpoints", **SHAPE, "epoch": 4, "batch": 32, "lr": 0.01,
        "device": "cpu", "freeze_at": 0.7,
    }  # fmt: skip
    return flags_of(small | more)


@contextmanager
def arguments(words: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["run_rq.py", *words]
    try:
        yield
    finally:
        sys.argv = before


Command = Callable[..., Outcome]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Command:
    """A script as the shell would run it, without a second process: shell(run_rq, "--dataset", ...) -> Outcome."""

    def call(script: ModuleType, *words: object) -> Outcome:
        capsys.readouterr()
        with arguments([str(word) for word in words]), pytest.raises(SystemExit) as end:
            errors.run_command(script.main)
        captured = capsys.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def rq(shell: Command) -> Command:
    """run_rq.py: rq("--dataset", ...) -> Outcome."""
    return partial(shell, run_rq)


class Run(NamedTuple):
    """A finished run and its files."""

    dataset: Path
    folder: Path
    stem: str
    flags: list[str]

    @property
    def codes(self) -> Path:
        return self.folder / "codes" / f"{self.stem}.pt"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"{self.stem}.pt"

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.codes.with_suffix(".json").read_text())

    def scored(self, codes: Path | None = None, checkpoint: Path | None = None, *more: str) -> list[str]:
        """The flags that rank from codes."""
        pair = {"dataset": self.dataset, "eval_codes": codes or self.codes, "checkpoint": checkpoint or self.checkpoint}
        return [*flags_of(pair), "--device", "cpu", *more]


def finished(dataset: Path, folder: Path, stem: str, **changes: Any) -> Run:
    flags = small_flags(dataset, folder, **changes)
    run_rq.train(run_rq.parse_config(flags))
    return Run(dataset, folder, stem, flags)


@pytest.fixture(scope="session")
def ring_run(ring: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(ring, tmp_path_factory.mktemp("rq"), RING)


@pytest.fixture(scope="session")
def family_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small run on the bundled graph that learns: 4 s on one core."""
    return finished(ROOT / "data" / "family", tmp_path_factory.mktemp("family"), "family_4_32_2_rq", **FAMILY_FLAGS)


def ranked(
    rq: Command, run: Run, folder: Path, *more: str, codes: Path | None = None, checkpoint: Path | None = None
) -> dict[str, Any]:
    """What --eval_codes writes to a --metrics_out in ``folder``, which it prints too."""
    path = folder / "metrics.json"
    outcome = rq(*run.scored(codes, checkpoint, "--metrics_out", str(path), *more))
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(path.read_text())
    assert f"mrr {found['mrr']:.4f}" in outcome.out and f"wrote {path}" in outcome.out
    return found


TrainerMaker = Callable[..., Trainer]


def books_of(model: RQGCN) -> list[torch.Tensor]:
    """The codebooks [K, code_dim] by level."""
    return [model.rq_codebook.codes_of_level(level) for level in range(model.rq_codebook.num_quantizers)]


def make_model(kg: KnowledgeGraph, seed: int = 0, **changes: Any) -> RQGCN:
    torch.manual_seed(seed)
    return RQGCN(kg.num_entities, kg.num_relations, **(SHAPE | changes))


@pytest.fixture
def trainer_of(ring_kg: KnowledgeGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainerMaker:
    """trainer_of(model={...}, epoch=..., ...) -> a Trainer on the ring, quiet and in full precision, checkpoint in
    tmp_path. Settings of the model may be given either way."""
    monkeypatch.setattr(trainer_module, "TRAINING_PRECISION", "highest")

    def make(model: dict[str, Any] | None = None, text: torch.Tensor | None = None, **settings: Any) -> Trainer:
        args = SHAPE | {"gcn_drop": 0.2, "decoder_drop": None} | (model or {})
        names = {field.name for field in fields(Config)}
        values = {"epoch": 6, "lr": 0.01, "batch": 16} | {key: args[key] for key in args.keys() & names} | settings
        config = Config(**values)
        record.seed_everything(config.seed)
        args = model_arguments(config, args.get("text_dim")) | {key: args[key] for key in args.keys() - names}
        net = RQGCN(ring_kg.num_entities, ring_kg.num_relations, **args)
        checkpoint = tmp_path / "run.pt"
        return Trainer(ring_kg, net, config, checkpoint, args, {}, text, "cpu", lambda line: None)

    return make

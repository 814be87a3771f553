"""A damaged file is refused: exit code 2, one line that names it, no traceback, within seconds, nothing written.

By default all damages of what stage 1 reads as tensors run, and one of every other file, drawn with a fixed seed; all
of them run with ``-m slow``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.faults import damage
from tests.faults.damage import Damage, put
from tests.faults.world import (
    ANSWER,
    BASE,
    CHECKPOINT,
    CODES,
    MERGE,
    RANK,
    ROWS,
    STAGE1,
    STEM,
    TUNE,
    assert_one_line,
    call,
    snapshot,
)

SECONDS = 10.0  # processor time


class Reader(NamedTuple):
    """A command and the files that it reads."""

    command: str
    files: Mapping[str, Mapping[str, Damage]]
    named: tuple[str, ...] = ()  # what may stand for a file in the message


def without(damages: Mapping[str, Damage], *names: str) -> dict[str, Damage]:
    """Where a file may be left out, or a form of it is good for this script."""
    return {name: each for name, each in damages.items() if name not in names}


GRAPH = {
    **{f"data/ring/{split}.txt": damage.TRIPLES for split in ("train", "valid", "test")},
    **{f"data/ring/{name}.dict": damage.DICT for name in ("entities", "relations")},
    "data/ring/entity2label.txt": damage.OPTIONAL_TEXT,
}
TRAIN = {"data/ring/train.txt": damage.TRIPLES}
CODED = {CODES: damage.PT, f"codes/{STEM}.entities.txt": damage.ENTITIES, f"codes/{STEM}.json": damage.JSON}
ADAPTER = "tuned/lora_adapters"
MODEL = {
    "base/config.json": damage.JSON,
    "base/tokenizer.json": damage.JSON,
    "base/model.safetensors": damage.SAFETENSORS,
}
CONFIG = {"base/config.json": damage.JSON}
ADAPTED = {
    f"{ADAPTER}/adapter_config.json": damage.JSON,
    f"{ADAPTER}/adapter_model.safetensors": damage.SAFETENSORS,
    f"{ADAPTER}/run_record.json": damage.JSON,
}
OPTIONAL = ("missing", "a folder")
READERS = {
    "graph": Reader("data/knowledge_graph.py W/data/ring", GRAPH),
    "embed": Reader("data/embed_text.py --dataset W/data/ring --out OUT/words.npy", GRAPH),
    "train": Reader(
        f"run_rq.py {STAGE1} --text_emb W/text.npy --name texts --out_dir OUT/codes --checkpoint_dir OUT/checkpoints",
        {"text.npy": damage.NPY, **GRAPH},
    ),
    "config": Reader(
        "run_rq.py --config W/flags.txt --dataset W/data/ring --epoch 2 --out_dir OUT/codes --checkpoint_dir OUT/ck",
        {"flags.txt": damage.FLAGS},
        ("error: --",),
    ),
    "resume": Reader(f"run_rq.py {STAGE1} --restore", {CHECKPOINT: damage.PT_CHECKPOINT}),
    "rank": Reader(
        f"run_rq.py {RANK}",
        {CODES: damage.PT_CODES, CHECKPOINT: damage.PT_SCORER, f"codes/{STEM}.entities.txt": damage.ENTITIES},
    ),
    "triples": Reader(f"Class/gen_fb_data_rq.py {ROWS} --out_dir OUT/rows", CODED | GRAPH),
    "entities": Reader(f"Class/gen_entity_data_rq.py {ROWS} --out_dir OUT/rows", CODED),
    "lists": Reader(
        f"Class/gen_lp_data_rq.py {ROWS} --out_dir OUT/rows --candidates W/lists/valid.npz W/lists/test.npz",
        CODED | {"lists/valid.npz": damage.NPZ},
    ),
    "mix": Reader(
        "Class/build_mix.py --out_dir W/rows",
        {"rows/link_prediction/train.json": without(damage.ROWS, *OPTIONAL, "no rows")},
    ),
    "base": Reader(f"lora_training/make_tiny_base.py {BASE} --out OUT/base", TRAIN),
    "tune": Reader(
        f"lora_training/train_lora.py {TUNE} --max_steps 1 --output_dir OUT/tuned",
        {"rows/train.json": damage.ROWS, "rows/validation.json": damage.ROWS, **MODEL},
    ),
    "merge": Reader(f"lora_training/merge_adapter.py {MERGE} --output_dir OUT/merged", ADAPTED | CONFIG),
    "answer": Reader(
        f"lora_training/inference.py {ANSWER} --output OUT/results.json",
        {"rows/test_tasks.json": without(damage.ROWS, "no rows"), **ADAPTED},
    ),
    "score": Reader(
        "lora_training/score_answers.py --answers W/answers/answers.jsonl --output OUT/metrics.json",
        {"answers/answers.jsonl": damage.ANSWERS},
    ),
    "quality": Reader(f"tables/code_quality.py --codes W/{CODES} --k 5", CODED),
    "export": Reader(
        f"tables/export.py --codes W/{CODES} --checkpoint W/{CHECKPOINT} --dataset W/data/ring --out OUT/export "
        f"--adapter W/{ADAPTER}",
        CODED | ADAPTED | {CHECKPOINT: damage.PT_SCORER},
    ),
}


class Case(NamedTuple):
    reader: Reader
    file: str
    damage: Damage


TENSORS = (CODES, CHECKPOINT, "text.npy")


def all_cases() -> list[Any]:
    """Every damage of every file of every command; for most files all but one, drawn by a seed, are slow."""
    rng = random.Random(8)
    cases: list[Any] = []
    for name, reader in READERS.items():
        for file, damages in reader.files.items():
            chosen = rng.choice(sorted(damages))
            whole = name in ("train", "resume", "rank") and file in TENSORS
            for kind, each in damages.items():
                marks = [] if whole or kind == chosen else [pytest.mark.slow]
                cases.append(pytest.param(Case(reader, file, each), marks=marks, id=f"{name}-{Path(file).name}-{kind}"))
    return cases


@pytest.mark.parametrize("case", all_cases())
def test_a_damaged_file_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    path = world / case.file
    put(path, case.damage(path.read_bytes()))
    before, began = snapshot(world), time.process_time()
    outcome = call(case.reader.command, world, out)
    assert time.process_time() - began < SECONDS
    assert_one_line(outcome, path.name, str(path.parent), *case.reader.named)
    assert snapshot(world) == before
    assert not list(out.rglob("*.*")), "a refused command leaves no files"


@pytest.mark.parametrize("name", READERS)
def test_the_same_commands_accept_good_files(world: Path, tmp_path: Path, name: str) -> None:
    """The control: what is refused above is the damage."""
    outcome = call(READERS[name].command, world, tmp_path / "out")
    assert outcome.code == 0, outcome.err

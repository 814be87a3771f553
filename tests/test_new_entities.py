"""The table and figure of new entities, from records of benchmarks/new_entities.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.new_entities import rank_queries
from common.errors import InputError
from data.knowledge_graph import KnowledgeGraph
from model.from_codes import load_scored_codes
from tables.new_entities import draw, read_records, table
from tests.conftest import Run


def record(folder: Path, name: str, **results: float) -> Path:
    rows = {key: {"mrr": value, "mrr_over_entities": value / 2} for key, value in results.items()}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"new_entities": 7, "queries": 1400, "results": rows}))
    return path


def test_table_and_figure_show_what_was_measured(tmp_path: Path) -> None:
    paths = [
        record(tmp_path, "a", fold_in_1=0.25, fold_in_10=0.5, retrained=0.75),
        record(tmp_path, "b", eravg_1=0.125, random=0.01),
    ]
    records = read_records(paths)
    lines = table(records).splitlines()
    assert lines[0].split(" | ")[1:] == ["a (7 new, 1,400 queries)", "b (7 new, 1,400 queries) |"]
    assert "| fold-in, 10 triples | .500 / .250 |  |" in lines and "| ERAvg, 1 triple |  | .125 / .062 |" in lines
    assert len(lines) == 2 + 5
    assert all(path.stat().st_size for path in draw(records, tmp_path / "figure"))


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"results": {}}')
    with pytest.raises(InputError, match=r"--out"):
        read_records([tmp_path / "x.json"])


def test_the_mean_over_entities_gives_each_the_same_weight(ring_run: Run) -> None:
    kg = KnowledgeGraph.load(ring_run.dataset)
    scored = load_scored_codes(ring_run.checkpoint, ring_run.codes, kg, torch.device("cpu"))
    first = kg.num_entities - 1
    of_last = kg.train[(kg.train[:, [0, 2]] == first).any(1) & (kg.train[:, 0] != kg.train[:, 2])]
    found = rank_queries(scored, kg, of_last, first)
    assert found["mrr_over_entities"] == pytest.approx(found["mrr"])  # one entity
    assert found["mrr"] == pytest.approx(np.mean([found["new_entity_in_query"], found["new_entity_is_answer"]]))

"""Random graphs have the degrees they are drawn with; the rows of the growth benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import growth
from benchmarks.random_graph import RELATION_EXPONENT, RELATIONS, random_kg, random_triples
from common.files import read_json


def test_triples_are_distinct_in_range_and_of_the_seed() -> None:
    triples = random_triples(2000, 20_000, seed=1)
    assert triples.shape == (20_000, 3) and triples.dtype == np.int64
    assert len(np.unique(triples, axis=0)) == 20_000
    assert triples.min() == 0 and (triples.max(axis=0) < [2000, RELATIONS, 2000]).all()
    assert np.array_equal(triples, random_triples(2000, 20_000, seed=1))
    assert not np.array_equal(triples, random_triples(2000, 20_000, seed=2))


def test_ids_and_order_do_not_depend_on_the_degree() -> None:
    triples = random_triples(2000, 20_000, seed=0)
    degree = np.bincount(triples[:, 2], minlength=2000)
    assert abs(np.corrcoef(np.arange(2000), degree)[0, 1]) < 0.1
    first, second = (np.bincount(part[:, 2], minlength=2000) for part in np.split(triples, 2))
    assert np.corrcoef(first, second)[0, 1] > 0.9


def test_degrees_and_relations_have_the_stated_distribution() -> None:
    """The k-th largest frequency falls as k^-s for relations; tails (a = 2.5) are less even than heads (a = 3.1)."""
    triples = random_triples(30_000, 300_000, seed=0)
    counts = np.sort(np.bincount(triples[:, 1], minlength=RELATIONS))[::-1]
    ranks = np.arange(1, RELATIONS + 1)
    slope = np.polyfit(np.log(ranks[5:100]), np.log(counts[5:100]), 1)[0]
    assert slope == pytest.approx(-RELATION_EXPONENT, abs=0.05)
    heads, tails = (np.sort(np.bincount(triples[:, end], minlength=30_000))[::-1] for end in (0, 2))
    for degrees, exponent in ((heads, 3.147), (tails, 2.488)):
        slope = np.polyfit(np.log(ranks[10:]), np.log(degrees[10:RELATIONS]), 1)[0]
        assert slope == pytest.approx(-1 / (exponent - 1), abs=0.05)


def test_too_many_triples_are_rejected() -> None:
    with pytest.raises(ValueError):
        random_triples(3, 3 * 3 * RELATIONS + 1, seed=0)


def test_random_kg_splits_without_overlap() -> None:
    kg = random_kg(500, 4000, seed=0, held_out=(100, 50))
    assert (len(kg.train), len(kg.valid), len(kg.test)) == (4000, 100, 50)
    assert len(np.unique(np.concatenate([kg.train, kg.valid, kg.test]), axis=0)) == 4150
    assert kg.num_entities == 500 and kg.num_relations == RELATIONS


def run_growth(words: str, result: Path, monkeypatch: pytest.MonkeyPatch) -> list[growth.Row]:
    monkeypatch.setattr("sys.argv", ["growth.py", *words.split(), "--json", str(result)])
    assert growth.main() == 0
    rows: list[growth.Row] = read_json(result, "rows")["rows"]
    return rows


def test_rows_of_exact_and_sampled_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "in_own_process", growth.measure)
    words = "--sizes 300 --steps 4 --encoder_every 2 --num_negatives 20 --batch 32 --threads 1"
    exact, sampled = run_growth(words, tmp_path / "rows.json", monkeypatch)
    assert (exact["loss"], sampled["loss"]) == ("exact", "sampled, N = 20")
    for row in (exact, sampled):
        assert row["triples"] == 3000 and row["sampled_steps"] == 4 < row["steps"]
        assert row["epoch_seconds"] > 0 and row["peak_gb"] > 0
    assert exact["ratio"] == 1 and sampled["ratio"] == pytest.approx(exact["epoch_seconds"] / sampled["epoch_seconds"])
    assert "ratio" in capsys.readouterr().out


@pytest.mark.slow
def test_each_row_has_a_process_and_its_own_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--sizes 300 40000 --steps 2 --encoder_every 2 --threads 1 --num_negatives 64"
    small, _, large, _ = run_growth(words, tmp_path / "rows.json", monkeypatch)
    assert large["peak_gb"] > small["peak_gb"] + 0.05

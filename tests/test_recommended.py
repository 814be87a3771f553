"""--num_quantizers auto: the records decide, the number goes into names and records, the reason is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, K, L, M, Q, small_flags  # type: ignore[import-not-found]

import model.recommended
from model.recommended import WORTH, Measured, measured, recommend, worthwhile
from run_record import ROOT, InputError


def run_of(entities: int, mrr: list[float], positions: int = 4, num_code: int = 16, graph: str = "g") -> Measured:
    return Measured(graph, entities, positions, num_code, mrr, ROOT / "tables" / "records" / f"{graph}.json")


@pytest.mark.parametrize(
    ("mrr", "levels"),
    [([0.3], 1), ([0.3, 0.31], 2), ([0.3, 0.3 + 2 * WORTH, 0.3 + 2.5 * WORTH], 2), ([0.3, 0.2, 0.5], 1),
     ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6)],
)  # fmt: skip
def test_levels_are_taken_while_each_adds_enough(mrr: list[float], levels: int) -> None:
    assert worthwhile(mrr) == levels


def test_the_nearest_graph_decides_then_positions_then_codes() -> None:
    small, large = run_of(100, [0.1, 0.2], graph="small"), run_of(10_000, [0.1, 0.2, 0.3], graph="large")
    wide = run_of(10_000, [0.1], positions=16, graph="wide")
    fine = run_of(10_000, [0.1, 0.2, 0.3, 0.4], num_code=64, graph="fine")
    runs = [small, large, wide, fine]
    assert [recommend(M, 4, 16, runs).number for M in (1, 100, 900, 1100, 10**6)] == [2, 2, 2, 3, 3]
    assert recommend(9_000, 12, 16, runs).number == 1 and recommend(9_000, 4, 50, runs).number == 4
    assert "g, 100 entities, the nearest measured" in recommend(80, 4, 16, [run_of(100, [0.1, 0.2])]).reasons[0]
    assert recommend(5, 4, 16, []).number == 4  # nothing to go by


def test_the_reason_says_what_the_last_level_and_the_next_one_add() -> None:
    levels = recommend(100, 4, 16, [run_of(100, [0.1, 0.25, 0.2501])])
    assert levels.number == 2
    assert levels.reasons == [
        "2 levels (100 entities; on g, the 2nd level still added +0.150 valid MRR, the 3rd +0.000, "
        "record tables/records/g.json)"
    ]


def test_more_codes_for_fewer_entities_than_measured_is_said() -> None:
    runs = [run_of(1000, [0.1], num_code=250), run_of(1000, [0.1], num_code=10)]
    assert len(recommend(1000, 4, 250, runs).reasons) == 1
    warned = recommend(1000, 4, 251, runs).reasons
    assert len(warned) == 2 and warned[1].endswith("had fewer than 4.0 (g): --num_code 128 keeps to what was measured")


def test_the_readme_names_the_files_that_auto_makes() -> None:
    """README's commands name FB15k-237_16_1024_4_rq after a run without --num_quantizers."""
    assert recommend(14_541, 16, 1024, measured()).number == 4
    assert "FB15k-237_16_1024_4_rq.pt" in (ROOT / "README.md").read_text(encoding="utf-8")


def write_record(path: Path, **changes: Any) -> None:
    record = {"dataset": "g", "shape": [50, 3, 2], "args": {"quantizer": "rq", "num_code": 8},
              "valid_mrr_by_levels": [0.1, 0.2]} | changes  # fmt: skip
    path.write_text(json.dumps(record), encoding="utf-8")


def test_records_that_are_no_residual_run_are_passed_over(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json")
    write_record(
        tmp_path / "b.json", args={"quantizer": "vq", "num_code": 8}, shape=[50, 3, 1], valid_mrr_by_levels=[0.1]
    )
    (tmp_path / "c.json").write_text('{"answers": [], "metrics": {}}')
    assert measured(tmp_path) == [Measured("g", 50, 3, 8, [0.1, 0.2], tmp_path / "a.json")]


@pytest.mark.parametrize("damage", [{"shape": [50, 3, 3]}, {"shape": None}, {"shape": [0, 3, 2]}, {"args": {}},
                                    {"valid_mrr_by_levels": ["x"]}])  # fmt: skip
def test_a_damaged_record_is_one_line(tmp_path: Path, damage: dict[str, Any]) -> None:
    write_record(tmp_path / "a.json", **damage)
    with pytest.raises(InputError, match=r"a\.json is damaged.*give --num_quantizers a number"):
        measured(tmp_path)


@pytest.mark.parametrize("given", [["--num_quantizers", "auto"], []], ids=["auto", "none given"])
def test_the_number_stands_in_names_and_record(
    rq: Command, ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    monkeypatch.setattr(model.recommended, "measured", lambda: [run_of(M, [0.1, 0.2, 0.3], L, K, "ring")])
    flags = small_flags(ring, tmp_path)
    at = flags.index("--num_quantizers")
    flags[at : at + 2] = given
    outcome = rq(*flags)
    assert outcome.code == 0, outcome.err
    assert f"--num_quantizers auto: 3 levels ({M} entities; on ring" in outcome.out
    record = json.loads((tmp_path / "codes" / f"ring_{L}_{K}_3_rq.json").read_text())
    assert record["args"]["num_quantizers"] == 3 and record["shape"] == [M, L, 3]
    # the same run by its number: nothing is printed, and its checkpoint is continued
    flags[at : at + len(given)] = ["--num_quantizers", "3"]
    again = rq(*flags, "--restore", "--dump_only")
    assert again.code == 0 and "auto" not in again.out, again.err


def test_a_given_number_wins_and_a_word_is_refused(rq: Command, ring: Path, tmp_path: Path) -> None:
    outcome = rq(*small_flags(ring, tmp_path))
    assert outcome.code == 0 and "auto" not in outcome.out
    assert (tmp_path / "codes" / f"ring_{L}_{K}_{Q}_rq.pt").is_file()
    refused = rq(*small_flags(ring, tmp_path, num_quantizers="many"))
    assert refused.code == 2 and "'many' is no number of levels" in refused.err and refused.err.count("\n") == 1

"""--recipe auto and --num_quantizers auto: records decide, what is taken is printed and goes into names and records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import model.recommended
import pytest
from model.flags import parse_args, set_settings, take_open_settings
from model.recommended import EXACT_UP_TO, WORTH, Measured, measured, recipe, recommend, worthwhile

from common.errors import InputError
from common.files import ROOT
from tests.conftest import Command, K, L, M, Q, small_flags


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
    """README's commands name FB15k-237_4_1024_4_rq after a run without settings."""
    taken = settings_for(14_541, measured())
    name = f"FB15k-237_{taken['seq_len']}_{taken['num_code']}_{taken['num_quantizers']}_rq.pt"
    assert name == "FB15k-237_4_1024_4_rq.pt" and name in (ROOT / "README.md").read_text(encoding="utf-8")


def write_record(path: Path, **changes: Any) -> None:
    record = {"dataset": "g", "shape": [50, 3, 2], "args": {"quantizer": "rq", "num_code": 8},
              "valid_mrr_by_levels": [0.1, 0.2], "epochs": 3, "wall_seconds": 120} | changes  # fmt: skip
    path.write_text(json.dumps(record), encoding="utf-8")


def test_records_that_are_no_residual_run_are_passed_over(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json")
    write_record(
        tmp_path / "b.json", args={"quantizer": "vq", "num_code": 8}, shape=[50, 3, 1], valid_mrr_by_levels=[0.1]
    )
    (tmp_path / "c.json").write_text('{"answers": [], "metrics": {}}')
    write_record(tmp_path / "d.json", args={"quantizer": "rq", "num_code": 8, "codes_from": "a.pt"})
    flags = {"quantizer": "rq", "num_code": 8}
    assert measured(tmp_path) == [Measured("g", 50, 3, 8, [0.1, 0.2], tmp_path / "a.json", flags, 3, 2.0)]


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
    assert again.code == 0 and "--num_quantizers auto" not in again.out, again.err


def test_a_given_number_wins_and_a_word_is_refused(rq: Command, ring: Path, tmp_path: Path) -> None:
    outcome = rq(*small_flags(ring, tmp_path))
    assert outcome.code == 0 and "--num_quantizers auto" not in outcome.out
    assert (tmp_path / "codes" / f"ring_{L}_{K}_{Q}_rq.pt").is_file()
    refused = rq(*small_flags(ring, tmp_path, num_quantizers="many"))
    assert refused.code == 2 and "'many' is no number of levels" in refused.err and refused.err.count("\n") == 1


# ---------------------------------------------------------------- settings


def kept(name: str, entities: int, mrr: float, positions: int = 4, **flags: Any) -> Measured:
    path = ROOT / "tables" / "records" / f"{name}.json"
    flags = {"seq_len": positions, "num_quantizers": 2} | flags
    return Measured(name, entities, positions, 16, [0.1, mrr], path, flags, 7, 3.0)


def settings_for(entities: int, runs: list[Measured], *words: str) -> dict[str, Any]:
    """The flags after --recipe auto, for a graph of so many entities."""
    args = parse_args([*words])
    assert args.recipe == "auto"
    found = recipe(entities, args.text_emb is not None, take_open_settings(args), runs, args.quantizer == "vq")
    set_settings(args, found.settings)
    return vars(args)


def test_settings_are_those_of_the_nearest_graph_with_few_codes_then_the_best_score() -> None:
    runs = [
        kept("small", 100, 0.9, lr=0.1),
        kept("short", 10_000, 0.2, positions=1, lr=0.9),
        kept("long", 10_000, 0.9, positions=16, lr=0.2),
        kept("worse", 10_000, 0.3, lr=0.3),
        kept("best", 10_000, 0.4, lr=0.4, num_code=16),
        kept("text", 10_000, 0.5, lr=0.5, text_emb="x.npy", text_init=True),
    ]
    assert [settings_for(M, runs)["lr"] for M in (50, 900, 1100, 20_000)] == [0.1, 0.1, 0.4, 0.4]
    assert settings_for(9_000, runs, "--text_emb", "y.npy")["lr"] == 0.5
    # a graph of more than eight times the size is farther than one without text
    assert settings_for(100, runs, "--text_emb", "y.npy")["lr"] == 0.1
    assert settings_for(100, runs[1:], "--text_emb", "y.npy")["lr"] == 0.5
    names = kept("names", 10_000, 0.9, lr=0.6)._replace(num_code=5_001)  # two levels: more code vectors than entities
    assert settings_for(10_000, [*runs, names])["lr"] == 0.4 and settings_for(10_000, [names])["lr"] == 0.6
    only_text = settings_for(9_000, runs[-1:])
    assert only_text["lr"] == 0.5 and not only_text["text_init"] and only_text["text_emb"] is None


def test_what_the_encoder_starts_from_is_taken_with_text_alone() -> None:
    own: dict[str, Any] = {"inputs": "neighbours+text", "text_neighbours": 7, "text_emb": "x.npy"}
    runs = [kept("text", 10_000, 0.5, **own)]
    names = ("inputs", "text_neighbours", "text_init")
    taken = settings_for(9_000, runs, "--text_emb", "y.npy")
    assert [taken[name] for name in names] == ["neighbours+text", 7, False]
    assert [settings_for(9_000, runs)[name] for name in names] == [None, None, False]
    other = settings_for(9_000, runs, "--recipe", "auto", "--text_emb", "y.npy", "--text_init")
    assert [other[name] for name in names] == [None, None, True]
    before = [kept("text", 10_000, 0.5, text_emb="x.npy", text_init=True)]
    other = settings_for(9_000, before, "--recipe", "auto", "--text_emb", "y.npy", "--inputs", "text")
    assert [other[name] for name in names] == ["text", None, False]


def test_what_is_given_wins_and_what_no_record_knows_is_the_papers() -> None:
    runs = [kept("g", 1000, 0.4, lr=0.3, batch=64, num_code=16, epoch=800, max_minutes=26)]
    taken = settings_for(1000, runs, "--recipe", "auto", "--lr", "0.7")
    assert (taken["lr"], taken["batch"], taken["num_code"], taken["gcn_dim"]) == (0.7, 64, 16, 200)
    assert (taken["epoch"], taken["max_minutes"]) == (7, 0)  # the epochs that were run, not the clock that ended them
    assert settings_for(1000, runs, "--epoch", "5")["epoch"] == 5
    timed = settings_for(1000, runs, "--max_minutes", "2")
    assert (timed["epoch"], timed["max_minutes"], timed["lr"]) == (800, 2, 0.3)
    vq = settings_for(1000, runs, "--quantizer", "vq", "--control", "posthoc")
    assert (vq["quantizer"], vq["num_quantizers"], vq["lr"]) == ("vq", 1, 0.3)
    assert (vq["seq_len"], vq["code_dim"]) == (8, 16), "as many codes as 4 positions x 2 levels, z as wide"
    own = settings_for(1000, runs, "--recipe", "auto", "--quantizer", "vq", "--seq_len", "3")
    assert (own["seq_len"], own["code_dim"]) == (3, 32)
    levels = [["--recipe", "auto"], ["--num_quantizers", "5"], ["--num_quantizers", "auto"]]
    assert [settings_for(1000, runs, *words)["num_quantizers"] for words in levels] == [2, 5, "auto"]


def test_codes_and_softmax_are_fitted_to_a_graph_far_from_what_was_measured() -> None:
    runs = [kept("g", 1000, 0.4, num_code=250, encoder_every=2)]
    runs = [run._replace(num_code=250) for run in runs]
    assert [settings_for(M, runs)["num_code"] for M in (1000, 999, 300)] == [250, 128, 64]
    assert settings_for(300, runs, "--recipe", "auto", "--num_code", "200")["num_code"] == 200
    large, larger = settings_for(EXACT_UP_TO, runs), settings_for(10 * EXACT_UP_TO, runs)
    assert (large["num_negatives"], large["encoder_every"]) == (0, 2)
    assert (larger["num_negatives"], larger["encoder_every"]) == (4096, 640)


@pytest.mark.parametrize(
    "words", [["--lr", "0.001"], ["--text_init", "--text_emb", "a.npy"], ["--recipe", "paper"],
              ["--config", str(ROOT / "configs" / "FB15k-237_4x4_cpu.txt")], ["--codes_from", "a.pt"],
              ["--eval_codes", "a.pt", "--checkpoint", "b.pt"]],
)  # fmt: skip
def test_a_setting_of_ones_own_means_the_papers_for_the_rest(words: list[str]) -> None:
    args = parse_args(words)
    assert args.recipe == "paper" and not take_open_settings(args)
    assert "left_open" not in vars(args)


def test_every_kept_recipe_is_one_that_the_flags_accept() -> None:
    runs = measured()
    for run in runs:
        words = ["--text_emb", "a.npy"] if run.args["text_emb"] else []
        taken = settings_for(run.entities, [run], *words)
        assert {name: taken[name] for name in ("seq_len", "lr", "decoder")} == {
            name: run.args[name] for name in ("seq_len", "lr", "decoder")
        }
    with pytest.raises(InputError, match=r"--recipe auto: .* give --recipe paper"):
        recipe(10, False, {"lr": 1}, [])


def test_a_run_without_settings_takes_a_kept_runs_and_says_so(
    rq: Command, ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = small_flags(ring, tmp_path)
    run = kept("ring", M, 0.4, positions=L)._replace(num_code=K, epochs=2, args=vars(parse_args(flags)))
    monkeypatch.setattr(model.recommended, "measured", lambda: [run])
    place = ["--dataset", str(ring), "--out_dir", str(tmp_path / "codes"),
             "--checkpoint_dir", str(tmp_path / "checkpoints"), "--device", "cpu"]  # fmt: skip
    outcome = rq(*place)
    assert outcome.code == 0, outcome.err
    assert "--recipe auto: the settings of tables/records/ring.json" in outcome.out
    record = json.loads((tmp_path / "codes" / f"ring_{L}_{K}_2_rq.json").read_text())
    assert record["epochs"] == 2 and record["args"]["recipe"] == "auto" and "left_open" not in record["args"]
    # its flags, as printed, are the same run
    printed = next(line for line in outcome.out.splitlines() if "in flags: " in line).split("in flags: ")[1].split()
    again = rq(*place, *printed, "--restore", "--dump_only")
    assert again.code == 0 and "--recipe paper" in again.out, again.err


@pytest.mark.parametrize(
    "words", [["--teacher_weight", "0.5"], ["--split", "valid"], ["--recipe", "paper", "--split", "train"]], ids=str
)
def test_a_flag_whose_partner_is_missing_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--dataset", "data/family", *words])
    found = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(found.splitlines()) == 1
    assert f"{words[-2]} {words[-1]} says nothing without" in found

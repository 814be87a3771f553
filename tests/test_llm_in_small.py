"""The recipe for a GPU against the stages' own parsers, the time limit, and what is gathered."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks import llm_in_small
from benchmarks.measure import FAMILY
from Class import gen_lp_data_rq
from common.files import read_json, write_json
from lora_training import compare_llm, inference, make_tiny_base, train_lora


def test_the_recipe_is_one_that_every_stage_takes() -> None:
    import torch

    import run_rq

    recipe = compare_llm.read_recipe(llm_in_small.RECIPE, False)
    given = read_json(llm_in_small.RECIPE, "recipe")
    assert given.keys() <= compare_llm.RECIPE.keys()
    for model in (recipe["stage1"], recipe["stage1"] | recipe["codes"]):
        assert run_rq.parse_config(["--dataset", "x", *compare_llm.flags(model)]).decoder == "complex"
    base = make_tiny_base.parse_args(compare_llm.flags(recipe["base"]))
    with torch.device("meta"):
        size = sum(value.numel() for value in make_tiny_base.build_model(base, base.vocab_size).parameters())
    assert 30e6 < size <= 100e6
    words = ["--model_name", "x", *compare_llm.flags(recipe["tuning"])]
    args = train_lora.parse_args(words)
    assert args.batch_size == 512 and args.eval_steps
    data = ["--candidates", "x", "--predict", *compare_llm.flags(recipe["data"])]
    assert gen_lp_data_rq.parse_args(data).num_candidates == 20
    assert inference.parse_args(compare_llm.flags(recipe["answers"])).limit == 4000


def test_time_limit_ends_what_was_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', %r])"
    inner = f"import time, pathlib; time.sleep(8); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    assert llm_in_small.run_for([sys.executable, "-c", child % inner], 3) != 0, "it was not left to its end"
    time.sleep(6)
    assert not (tmp_path / "alive").exists()
    assert llm_in_small.run_for([sys.executable, "-c", "raise SystemExit(3)"], 0) == 3


def test_gathered_is_small_and_says_what_is_done(tmp_path: Path) -> None:
    seed = tmp_path / "seed_0"
    write_json({"command": [], "seconds": 3.5}, seed / "done" / "stage1.json")
    write_json({"test": {"mrr": 0.3}, "inputs": {"a": "b"}}, seed / "codes" / "x_4_4_2_rq.json")
    write_json({"metrics": {"t": {"mrr": 0.4}}, "answers": [{"id": i} for i in range(9)]},
               seed / "with_codes" / "inference_results.json")  # fmt: skip
    found = llm_in_small.gather(tmp_path)
    assert found["seconds"] == {"seed_0": {"stage1": 3.5}} and found["comparison"] is None
    assert found["records"] == {
        "seed_0/codes/x_4_4_2_rq.json": {"test": {"mrr": 0.3}},
        "seed_0/with_codes/inference_results.json": {"metrics": {"t": {"mrr": 0.4}}},
    }
    assert "answers" not in str(found)


def test_without_a_gpu_only_quick_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(llm_in_small.InputError, match="no CUDA device is there; give --quick"):
        llm_in_small.main(["--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")])
    assert llm_in_small.parse_args(["--quick"]).data == FAMILY


def test_a_stopped_call_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """compare_llm.py itself, for a moment."""
    words = ["--quick", "--limit_s", "12", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    assert llm_in_small.main(words) == 0
    assert "repeat the command to go on" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["llm_in_small.json"]

"""Records to tables: broken records are refused, formats agree, seeds are averaged, nothing is typed by hand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import InputError
from common.files import ROOT, read_json, sha256_file, write_json
from common.metrics import check_judging, check_ranking
from lora_training.score_answers import report
from tables import make_tables, results
from tables.results import CODES, KEPT, LINKS, TRIPLES, Row, collect, groups, keep, stat
from tables.rows import stage1_setting
from tables.table_formats import Cell, Column, Line, Table, from_csv, to_csv, to_latex, to_markdown
from tests.test_latex import check_latex

FAMILY = KEPT / "family_4_256_4_rq.json"
Record = dict[str, Any]


def family_record() -> Record:
    found: Record = read_json(FAMILY, "record")
    return found


def saved(record: Any, folder: Path, name: str = "run.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, folder / name)
    return folder / name


def with_seed(seed: int, mrr_change: float = 0.0) -> Record:
    """The family record under another seed; a change of MRR small enough to be possible, in both directions."""
    record = family_record()
    record["seed"] = record["args"]["seed"] = seed
    for part in (record["test"], record["test"]["head"], record["test"]["tail"]):
        part["mrr"] += mrr_change
    return record


# ---------------------------------------------------------------- what is expected


def test_published_numbers_have_sources_and_are_possible() -> None:
    for number in make_tables.NUMBERS:
        for method in make_tables.expected(number)["methods"]:
            assert method["source"], method["method"]
            for dataset, values in method["values"].items():
                where = f"{method['method']} on {dataset}"
                if len(values) == 4 and "mrr" in values:
                    check_ranking(Path("expected"), where, values, slack=0.0015)  # three printed digits
                if "f1" in values:
                    check_judging(Path("expected"), where, values, slack=0.0015)


def test_no_number_of_the_paper_is_typed_elsewhere() -> None:
    for name in ("rows", "results", "sanity", "make_tables", "table_formats"):
        path = ROOT / "tables" / f"{name}.py"
        assert not re.findall(r"(?<![\w.])0?\.[1-9]\d{2}(?!\d)", path.read_text(encoding="utf-8")), path


def test_a_number_without_source_is_refused(tmp_path: Path) -> None:
    content = make_tables.expected(2)
    del content["methods"][3]["source"]
    write_json(content, tmp_path / "table2.json")
    with pytest.raises(InputError, match="names no source"):
        make_tables.expected(2, tmp_path)


# ---------------------------------------------------------------- broken records


def put(*path: str, value: Any) -> Callable[[Record], None]:
    """A change: the field at ``path`` becomes ``value``."""

    def change(record: Record) -> None:
        for name in path[:-1]:
            record = record[name]
        record[path[-1]] = value

    return change


def double_counts(metrics: Record) -> None:
    """Twice the queries, in both directions."""
    for part in (metrics, metrics["head"], metrics["tail"]):
        part["count"] *= 2


BROKEN = {
    "hits above one": (put("test", "hits@10", value=1.2), "test.hits@10"),
    "negative hits": (put("valid", "hits@1", value=-0.1), "valid.hits@1"),
    "hits out of order": (put("test", "hits@1", value=1.0), "test.hits@1"),
    "mrr below what hits imply": (put("test", "mrr", value=0.9), "test.mrr"),
    "mrr above what hits imply": (put("test", "mrr", value=0.9999), "test.mrr"),
    "not a number": (put("test", "mrr", value="0.97"), "test.mrr"),
    "no number": (put("test", "mrr", value=None), "test.mrr"),
    "a bool": (put("valid", "hits@3", value=True), "valid.hits@3"),
    "half a query": (put("test", "hits@1", value=0.942), "test.hits@1"),
    "queries of one direction": (put("test", "count", value=2 * 952), "test.count"),
    "too many queries": (lambda record: double_counts(record["valid"]), "valid.count"),
    "head and tail are not the whole": (put("test", "head", "mrr", value=0.975), "test.mrr"),
    "control impossible": (put("test_shuffled_codes", "hits@1", value=0.5), "test_shuffled_codes.hits@1"),
    "level above one": (put("valid_mrr_by_levels", value=[1.5, 0.9]), "valid_mrr_by_levels[0]"),
    "levels end elsewhere": (put("valid_mrr_by_levels", value=[0.5, 0.9]), "valid_mrr_by_levels"),
    "other data": (put("inputs", "test.txt", value="0" * 64), "inputs.test.txt"),
    "no time": (put("wall_seconds", value=0), "wall_seconds"),
    "no device": (put("device", value=None), "device"),
    "no flags": (put("args", value=[]), "args"),
    "no metrics": (put("valid", value={}), "valid"),
    "a list for a seed": (put("seed", value=[1]), "seed"),
    "a number for a commit": (put("git_commit", value=3), "git_commit"),
    "a word for the codes": (put("codes", value="x"), "codes"),
    "a text for a size": (put("args", "num_code", value="many"), "no complete run record"),
    "a list for metrics": (put("valid_mrr_by_levels", value=7), "no complete run record"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_impossible_record_stops_everything(name: str, tmp_path: Path) -> None:
    change, field = BROKEN[name]
    record = family_record()
    change(record)
    path = saved(record, tmp_path)
    with pytest.raises(InputError) as error:
        collect([tmp_path])
    assert str(path) in str(error.value) and field in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hits", "least", "most"),
    [((0, 1, 1), 1 / 3, 1 / 1.5), ((0, 0, 1), 1 / 10, 1 / 3.5), ((0, 0, 0), 0, 1 / 10.5), ((1, 1, 1), 1, 1)],
)
def test_mrr_lies_where_the_hits_allow(hits: tuple[int, int, int], least: float, most: float) -> None:
    """All ranks in 2..3, in 4..10, beyond 10, at 1; ties end in a half: 1.5, 3.5 and 10.5 are the nearest."""
    one, three, ten = hits
    for mrr, fits in ((least, True), (most, True), (least - 1e-3, False), (most + 1e-3, False)):
        metrics = {"mrr": mrr, "hits@1": one, "hits@3": three, "hits@10": ten}
        if fits:
            check_ranking(Path("x"), "test", metrics)
        else:
            with pytest.raises(InputError, match=r"test\.mrr"):
                check_ranking(Path("x"), "test", metrics)


def test_nan_is_no_metric(tmp_path: Path) -> None:
    record = family_record()
    record["test"]["mrr"] = float("nan")
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"(?i)nan"):
        collect([tmp_path])


def test_the_record_itself_is_good(tmp_path: Path) -> None:
    """The control of the two tests above."""
    saved(family_record(), tmp_path)
    assert [row.variant for row in collect([tmp_path]).rows] == ["", "control: codes shuffled"]


def test_queries_are_counted_where_the_data_are_not_there(tmp_path: Path) -> None:
    """Without the data folder, the paper's Table 6 says how many queries there are."""
    record = read_json(KEPT / "FB15k-237_16_1024_4_rq.json", "record")
    path = saved(record, tmp_path)
    assert collect([path], data=tmp_path / "none").rows
    double_counts(record["test"])
    saved(record, tmp_path)
    with pytest.raises(InputError, match=r"test.count is 81864, expected 40932 \(2 x test\)"):
        collect([path], data=tmp_path / "none")


@pytest.mark.parametrize("missing", ["args", "seed", "git_commit", "device", "finished", "wall_seconds"])
def test_a_row_without_its_record_is_refused(missing: str, tmp_path: Path) -> None:
    record = family_record()
    del record[missing]
    path = saved(record, tmp_path / "runs")
    found = collect([tmp_path / "runs"])
    assert not found.rows and len(found.refused) == 1 and missing in found.refused[0]
    with pytest.raises(InputError, match=f"no run record .no .*{missing}"):
        collect([path])
    with pytest.raises(InputError, match="nothing was kept"):
        keep(path, tmp_path / "kept")


def test_files_without_metrics_are_passed_over(tmp_path: Path) -> None:
    saved({"vocabulary": 3}, tmp_path, "tokenizer.json")
    saved([1, 2], tmp_path, "list.json")
    assert collect([tmp_path]) == ([], [])
    with pytest.raises(InputError, match=r"--records .* does not exist"):
        collect([tmp_path / "typo"])
    with pytest.raises(InputError, match="is no record of"):
        collect([tmp_path / "list.json"])


# ---------------------------------------------------------------- seeds and settings


def test_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    for seed, change in enumerate((-1e-3, 0.0, 1e-3)):
        saved(with_seed(seed, change), tmp_path, f"{seed}.json")
    group = groups(collect([tmp_path]).rows)[0]
    middle = family_record()["test"]["mrr"]
    found = group.stat("mrr")
    assert found is not None and group.seeds == [0, 1, 2]
    assert found == pytest.approx((middle, 1e-3, 3))  # of x - d, x, x + d the sample deviation is d
    assert stat([0.25]) == (0.25, None, 1) and stat([0.0, 1.0]) == pytest.approx((0.5, 0.5**0.5, 2))
    assert group.stat("accuracy") is None
    assert group.stat("mrr", "valid") == pytest.approx((family_record()["valid"]["mrr"], 0.0, 3))


def test_a_run_and_a_seed_count_once(tmp_path: Path) -> None:
    saved(with_seed(0), tmp_path, "first.json")
    saved(with_seed(0), tmp_path / "copies", "same.json")
    later = with_seed(0, 1e-3) | {"finished": "2099-01-01T00:00:00+00:00"}
    saved(later, tmp_path, "again.json")
    rows = collect([tmp_path]).rows
    assert len(rows) == 4  # two runs, each with its control; the copy is the same run
    (group,) = [group for group in groups(rows) if not group.first.variant]
    assert group.stat("mrr") == (later["test"]["mrr"], None, 1)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("quantizer", "vq"), "VQ 4 of 256"), (("gcn_layers", 0), "no GCN"), (("tf_layers", 0), "tf_layers 0"),
        (("lr", 0.01), "lr 0.01"), (("text_emb", "some/file.npy"), "text"), (("text_init", "svd"), "text init"),
        (("decoder", "complex"), "ComplEx"), (("some_new_flag", 3), "some_new_flag 3"), (("ensemble", 2), "ensemble 2"),
        (("codes_from", "codes.pt"), "given codes"),
    ],
)  # fmt: skip
def test_what_is_learned_differently_is_another_setting(change: tuple[str, Any], word: str, tmp_path: Path) -> None:
    saved(with_seed(0), tmp_path, "a.json")
    other = with_seed(1)
    other["args"][change[0]] = change[1]
    saved(other, tmp_path, "b.json")
    labels = [group.first.setting for group in groups(collect([tmp_path]).rows) if not group.first.variant]
    assert len(set(labels)) == 2 and word in labels[1].split(", ")[0] + ", " + labels[1] and word not in labels[0]


def test_texts_of_one_name_are_known_by_their_hash(tmp_path: Path) -> None:
    for seed, digest in enumerate(("ab" * 32, "cd" * 32, "cd" * 32)):
        record = with_seed(seed)
        record["args"]["text_emb"] = f"folder{seed}/minilm.npy"
        record["inputs"]["minilm.npy"] = digest
        saved(record, tmp_path, f"{seed}.json")
    found = [group for group in groups(collect([tmp_path]).rows) if not group.first.variant]
    assert [group.seeds for group in found] == [[0], [1, 2]]
    assert "text minilm ababab" in found[0].first.setting and "text minilm cdcdcd" in found[1].first.setting


def test_a_run_dumped_before_its_end_does_not_pass_for_it(tmp_path: Path) -> None:
    """--dump_only of a stopped run leaves the flags of the whole; it is later, and must not take the whole's place."""
    whole = with_seed(0)
    saved(whole, tmp_path, "whole.json")
    part = with_seed(0, 1e-3) | {"epochs": whole["epochs"] - 1, "finished": "2099-01-01T00:00:00+00:00"}
    saved(part, tmp_path, "part.json")
    found = {group.first.setting: group for group in groups(collect([tmp_path]).rows) if not group.first.variant}
    short = f"stopped after {whole['epochs'] - 1}"
    assert len(found) == 2 and [short in label.split(", ") for label in found].count(True) == 1
    for name in ("max_minutes", "patience"):  # the clock or patience ended it: that is its setting
        assert short not in stage1_setting(part | {"args": part["args"] | {name: 5}})


def test_teachers_make_a_setting(tmp_path: Path) -> None:
    for count in range(3):
        record = with_seed(0)
        record["inputs"] |= {f"teacher {place}": "0" * 64 for place in range(1, count + 1)}
        saved(record, tmp_path, f"{count}.json")
    labels = [group.first.setting for group in groups(collect([tmp_path]).rows) if not group.first.variant]
    assert len(labels) == 3 and "taught by 1" in labels[1] and "taught by 2" in labels[2]


@pytest.mark.parametrize(
    ("control", "method"),
    [
        ("unquantized", "4 vectors, DistMult, {} (control: unquantized)"),
        ("frozen_vectors", "4 vectors, DistMult, {} (control: unquantized, vectors frozen as codes are)"),
        ("random_codes", "RQ 4 x 4 of 256, DistMult, {} (control: random codes)"),
        ("posthoc", "RQ 4 x 4 of 256, DistMult, {} (control: codes made after training)"),
    ],
)
def test_controls_stand_apart_and_win_nothing(control: str, method: str, tmp_path: Path) -> None:
    """A record of --control has no codes, no levels and no shuffled copy; better than the codes, it is not the best."""
    saved(with_seed(0), tmp_path, "a.json")
    other = as_control(with_seed(1, 1e-3), control)
    saved(other, tmp_path, "b.json")
    (table,) = [
        table for table in make_tables.make_tables([2], [tmp_path], ROOT / "data") if table.title.endswith("family")
    ]
    rest = "GCN 2, assign_every 2, batch 256, encoder_every 2, epoch 40, lr 0.005"
    found = {line.method: line for line in table.lines}
    assert [line.block for line in table.lines] == ["ours", "control", "control"]
    line = found[method.format(rest)]
    assert not line.competes and line.cells[Column("family", "mrr")].value == other["test"]["mrr"]
    for change in ({"control": None}, {"control": "other"}):
        saved(other | change, tmp_path, "b.json")
        with pytest.raises(InputError, match="control is "):
            collect([tmp_path])


def as_control(record: Record, control: str) -> Record:
    """The record that run_rq.py --control leaves."""
    left_out = ("shape", "outputs", "codes", "valid_mrr_by_levels", "mrr_before_collision_pass", "test_shuffled_codes")
    record["args"]["control"] = control
    return {name: value for name, value in record.items() if name not in left_out} | {"control": control}


def test_runs_that_left_the_test_alone_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What run_ablations.py leaves: a folder per run, its record without test, and the results file."""
    for name in ("4x4", "posthoc"):
        record = with_seed(0) if name == "4x4" else as_control(with_seed(0), name)
        saved({key: value for key, value in record.items() if not key.startswith("test")}, tmp_path / f"{name}_seed0")
    saved({"rows": [{"name": "4x4", "mrr": 0.5}]}, tmp_path, "ablations.json")
    results.main(["--records", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(f"valid mrr {record['valid']['mrr']:.3f}" in line for line in lines)
    make_tables.main(["--table", "2", "--records", str(tmp_path)])
    printed = capsys.readouterr()
    assert "| ours" not in printed.out and "| control" not in printed.out
    assert "2 settings without test metrics" in printed.err and "tables/results.py" in printed.err


def test_where_and_when_do_not_make_a_setting(tmp_path: Path) -> None:
    saved(with_seed(0), tmp_path, "a.json")
    other = with_seed(1)
    other["args"] |= {"out_dir": "elsewhere", "device": "cuda", "num_workers": 7, "some_new_flag": None, "name": "x"}
    del other["args"]["patience"]
    saved(other, tmp_path, "b.json")
    assert len({row.setting for row in collect([tmp_path]).rows}) == 1


# ---------------------------------------------------------------- answers of an LLM


def answers(rng: np.random.Generator, queries: int, split: str) -> list[Record]:
    """Link prediction over six candidates, and as many judgements, of random scores."""
    blank = {"decode": "score", "tokens": None, "text": "", "expected": "", "parsed": True, "split": split}
    found: list[Record] = []
    for i in range(queries):
        names = [f"e{name}" for name in rng.permutation(40)[:6]]
        rank = int(rng.integers(1, 9))
        truth = names[rank - 1] if rank <= 6 else "e41"
        found.append({**blank, "id": f"l{i}", "task_type": LINKS, "direction": ("tail", "head")[i % 2],
                      "candidates": names, "scores": rng.normal(size=6).tolist(), "truth": [truth],
                      "candidate_rank": rank})  # fmt: skip
        found.append({**blank, "id": f"t{i}", "task_type": TRIPLES, "direction": None, "candidate_rank": None,
                      "candidates": ["True", "False"], "scores": rng.normal(size=2).tolist(),
                      "truth": [("True", "False")[i % 2]]})  # fmt: skip
    return found


class Chain:
    """What inference.py leaves of a run on the ring graph, with everything its record points to."""

    def __init__(self, folder: Path, seed: int = 0, codes: str = "with") -> None:
        rng = np.random.default_rng(seed)
        self.test = folder / "data" / "test_tasks.json"
        saved([{"seed": seed, "codes": codes}], folder / "data", "test_tasks.json")
        saved({"args": {"limit": 0}, "datasets": {LINKS: "ring", TRIPLES: "ring"}}, folder / "data",
              "dataset_stats.json")  # fmt: skip
        used: Record = {"file": None} if codes == "without" else {
            "file": "ring.pt", "sha256": "5", "seq_len": 3, "num_code": 8, "num_quantizers": 2, "dataset": "ring",
            "shuffled": codes == "shuffled"}  # fmt: skip
        base = {"git_commit": "c" * 40, "device": "cpu (1 threads)", "finished": f"2026-01-0{seed + 1}"}
        self.adapter = saved(
            {**base, "args": {"lora_r": 4, "epochs": 2.0, "seed": seed, "learning_rate": 1e-3}, "seed": seed,
             "wall_seconds": 60.0, "base_model": "models/tiny", "rows": {"train": 1234}, "trained_parameters": {}},
            folder / "adapter", "run_record.json")  # fmt: skip
        found = answers(rng, 24, "validation") + answers(rng, 24, "test")
        self.record: Record = {
            **base, "args": {"lora_adapter": str(folder / "adapter"), "test_data": str(self.test), "limit": 0,
                             "decode": "score"},
            "seed": None, "wall_seconds": 30.0, "inputs": {"test_tasks.json": sha256_file(self.test)},
            "model": {"base_model": "models/tiny", "run_record.json": sha256_file(self.adapter)}, "codes": used,
            "metrics": report(found), "answers": found,
        }  # fmt: skip
        self.path = saved(self.record, folder, "inference_results.json")


def read_chain(chain: Chain, ring: Path) -> list[Row]:
    return collect([chain.path], ring.parent).rows


def test_answers_become_rows(tmp_path: Path, ring: Path) -> None:
    chain = Chain(tmp_path, seed=3)
    rows = read_chain(chain, ring)
    kinds = ["", "the candidates' model", "copies the first candidate", ""]
    assert [row.variant for row in rows] == kinds and [row.task for row in rows] == [LINKS] * 3 + [TRIPLES]
    assert {row.dataset for row in rows} == {"ring"} and {row.seed for row in rows} == {3}
    assert {row.minutes for row in rows} == {1.5}  # training and answering
    label = "tiny, LoRA r 4, 2 epochs, 1,234 rows, learning_rate 0.001, codes 3 x 2 of 8"
    assert {row.setting for row in rows} == {label}
    metrics = chain.record["metrics"]
    assert rows[0].metrics["mrr"] == metrics[LINKS]["test"]["mrr"]
    assert rows[1].metrics["hits@1"] == metrics[LINKS]["test"]["candidate_model"]["hits@1"]
    assert rows[3].metrics["f1"] == metrics[TRIPLES]["test"]["f1"]


def swap_metrics(chain: Chain) -> None:
    """Possible metrics, typed in: those of other answers to as many queries."""
    chain.record["metrics"][LINKS]["test"] = report(answers(np.random.default_rng(99), 24, "test"))[LINKS]["test"]


def change_metric(task: str, name: str, value: Any) -> Callable[[Chain], None]:
    return lambda chain: chain.record["metrics"][task]["test"].update({name: value})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_metric(LINKS, "count", 23), "link_prediction.test"),
        (change_metric(LINKS, "mrr", 0.99), "link_prediction.test.mrr"),
        (change_metric(TRIPLES, "accuracy", 0.99), "triple_classification.test.accuracy"),
        (change_metric(TRIPLES, "f1", 0.01), "triple_classification.test.f1"),
        (change_metric(TRIPLES, "positives", 11), "triple_classification.test"),
        (swap_metrics, r"link_prediction\.test\..*, which its answers give"),
        (lambda chain: chain.adapter.unlink(), "adapter's record .* is not there"),
        (lambda chain: chain.adapter.write_text("{}"), "adapter's record .* is another run"),
        (lambda chain: chain.test.write_text("[]"), "are others now"),
        (lambda chain: chain.record["args"].update(limit=5), "at most --limit 5"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_traced_or_true_are_refused(
    change: Callable[[Chain], Any], says: str, tmp_path: Path, ring: Path
) -> None:
    chain = Chain(tmp_path)
    change(chain)
    write_json(chain.record, chain.path)
    with pytest.raises(InputError, match=says):
        read_chain(chain, ring)


def test_missing_queries_of_an_llm_are_refused(tmp_path: Path, ring: Path) -> None:
    """Possible metrics over fewer queries than the test split has."""
    chain = Chain(tmp_path)
    chain.record["metrics"] = report(answers(np.random.default_rng(0), 20, "test"))
    write_json(chain.record, chain.path)
    with pytest.raises(InputError, match=r"link_prediction\.test\.count is 20, expected 24"):
        read_chain(chain, ring)
    del chain.record["metrics"][LINKS]
    write_json(chain.record, chain.path)
    with pytest.raises(InputError, match=r"triple_classification\.test\.positives is 10, expected 12"):
        read_chain(chain, ring)


def test_a_limited_run_says_so(tmp_path: Path, ring: Path) -> None:
    chain = Chain(tmp_path)
    chain.record["args"]["limit"] = 30
    write_json(chain.record, chain.path)
    assert not any(row.limited or "at most" in row.setting for row in read_chain(chain, ring)), "24 are all there are"
    chain.record["args"]["limit"] = 20
    chain.record["answers"] = answers(np.random.default_rng(0), 20, "test")
    chain.record["metrics"] = report(chain.record["answers"])
    write_json(chain.record, chain.path)
    rows = read_chain(chain, ring)
    assert all(row.setting.endswith("20 test rows at most") and row.limited for row in rows)
    tables = make_tables.make_tables([3, 4], [chain.path], ring.parent)
    found = [line for table in tables if table.title.endswith("on ring") for line in table.lines]
    assert len(found) == 4 and not any(line.competes for line in found), "other queries than the full runs'"


def test_a_kept_record_gives_the_same_rows_alone(tmp_path: Path, ring: Path) -> None:
    chain = Chain(tmp_path / "run")
    before = read_chain(chain, ring)
    kept = keep(chain.path, tmp_path / "kept", ring.parent)
    shutil.rmtree(tmp_path / "run")
    after = collect([kept], ring.parent).rows
    drop = {"path", "record"}
    assert [{k: v for k, v in vars(row).items() if k not in drop} for row in after] == [
        {k: v for k, v in vars(row).items() if k not in drop} for row in before
    ]
    assert "answers" not in read_json(kept, "record")


def test_keeping_never_replaces_another_run(tmp_path: Path) -> None:
    first = keep(saved(with_seed(0), tmp_path), tmp_path / "kept")
    assert keep(tmp_path / "run.json", tmp_path / "kept") == first  # the same run again
    with pytest.raises(InputError, match="another run's record; give --name"):
        keep(saved(with_seed(1), tmp_path), tmp_path / "kept")
    assert keep(tmp_path / "run.json", tmp_path / "kept", name="second").name == "second.json"


def test_a_kept_record_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    record = with_seed(0)
    record["args"]["dataset"] = f"{ROOT}/data/family"
    kept = keep(saved(record, tmp_path), tmp_path / "kept")
    assert str(ROOT) not in kept.read_text() and read_json(kept, "record")["args"]["dataset"] == "data/family"
    for path in KEPT.glob("*.json"):
        assert not re.search(r'"/\w+/|file:/', path.read_text(encoding="utf-8")), path


def test_keeping_names_every_page_that_kept_records_write(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "keep", lambda *_, **__: Path("kept.json"))
    results.main(["--keep", "run.json"])
    said = capsys.readouterr().out
    marked = [
        page for page in (ROOT / "docs").glob("*.md") if re.search(r"<!-- (levels|table \d) -->", page.read_text())
    ]
    assert len(marked) > 1 and all(f"docs/{page.name}" in said for page in marked)


def test_a_line_names_the_codes_that_its_llm_was_given(tmp_path: Path, ring: Path) -> None:
    for codes, named in (("with", True), ("shuffled", True), ("without", False)):
        first = groups(read_chain(Chain(tmp_path / codes, codes=codes), ring))[0]
        assert ("codes 5" in make_tables.provenance(first).split(", ")) is named
    own = groups([row for row in collect().rows if row.task == CODES])[0]
    assert "codes" not in " ".join(part for part in make_tables.provenance(own).split(", ") if "/" not in part)
    given = own.first.record | {"inputs": own.first.record["inputs"] | {"codes": "abcdef" + "0" * 58}}
    assert make_tables.given_codes(replace(own.first, record=given)) == "abcdef"


def test_tables_of_the_llm(tmp_path: Path, ring: Path) -> None:
    for number, codes in enumerate(("with", "without", "shuffled")):
        for seed in range(2):
            Chain(tmp_path / f"{number}{seed}", seed, codes)
    tables = make_tables.make_tables([3, 4, 5], [tmp_path], ring.parent)
    third, fourth, fifth = (
        [table for table in tables if table.number == n and table.title.endswith("on ring")] for n in (3, 4, 5)
    )
    assert [line.block for line in third[0].lines] == ["ours", "rival", "rival"]
    assert [len(found[0].lines) for found in (third, fourth, fifth)] == [3, 3, 3]
    assert all(", without codes" not in line.method for line in third[0].lines)
    assert sum("without codes" in line.method for line in fifth[0].lines) == 1
    assert all(cell.n == 2 and cell.std is not None for line in fifth[0].lines for cell in line.cells.values())
    assert "seeds 0, 1" in fifth[0].lines[0].note
    for table in (fourth[0], fifth[0]):
        assert [line.block for line in table.lines] == ["ours", "ours", "control"]
        assert [line.competes for line in table.lines] == [True, True, False], "shuffled codes win nothing"


# ---------------------------------------------------------------- Table 6


def test_counts_of_the_bundled_graph_are_its_files() -> None:
    (table,) = make_tables.data_table(ROOT / "data", only=["family"])
    (line,) = [line for line in table.lines if line.block == "counted here"]
    rows = {split: (ROOT / "data" / "family" / f"{split}.txt").read_text().splitlines()
            for split in ("train", "valid", "test")}  # fmt: skip
    triples = [row.split("\t") for split in rows.values() for row in split]
    wanted = {split: len(found) for split, found in rows.items()}
    wanted |= {
        "entities": len({e for h, _, t in triples for e in (h, t)}),
        "relations": len({r for _, r, _ in triples}),
    }
    assert {column.metric: cell.value for column, cell in line.cells.items()} == wanted


def test_a_data_set_that_is_not_the_papers_is_an_error(tmp_path: Path, ring: Path) -> None:
    shutil.copytree(ring, tmp_path / "data" / "mine")
    assert make_tables.data_table(tmp_path / "data")[0].lines[-1].method == "mine"
    shutil.copytree(ring, tmp_path / "data" / "WN18RR")
    with pytest.raises(InputError, match="WN18RR has 43 entities, expected the paper's 40,943"):
        make_tables.data_table(tmp_path / "data")


# ---------------------------------------------------------------- formats


ODD = "a|b {c} ~ #1 ^ \\ <d> $"


def example() -> Table:
    columns = [Column("A_1", "mrr"), Column("A_1", "hits@10"), Column("B", "mrr")]
    lines = [
        Line("peers", "50% of X & Y_z", {columns[0]: Cell(0.25), columns[1]: Cell(0.5)}),
        Line("ours", ODD, {columns[0]: Cell(1 / 3, 0.0123, 3), columns[1]: Cell(0.5)}, "seed, 0 | 1"),
        Line("ours", "two digits", {columns[2]: Cell(0.5, decimals=2)}, "seed, 0 | 1"),
        Line("control", "higher", {columns[0]: Cell(1.0)}, "z", competes=False),
    ]  # fmt: skip
    return Table(2, "An example_title", columns, lines, ["A note, with 100%."])


def markdown_cells(text: str) -> list[list[str]]:
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip(" *") for cell in re.split(r"(?<!\\)\|", row)[3:-1]] for row in rows]


def latex_cells(text: str) -> list[list[str]]:
    body = text.split(r"\midrule", 1)[1].split(r"\bottomrule")[0]
    rows = [line.removesuffix(r" \\") for line in body.splitlines() if " & " in line]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)&", row)[1:]] for row in rows]
    return [[re.sub(r"\\textbf\{(.*)\}", r"\1", cell).replace(r"$\pm$", "±") for cell in row] for row in cells]


def csv_cells(text: str) -> list[list[str]]:
    return [cells for table in from_csv(text) for cells in markdown_cells(to_markdown(table))]


def test_formats_agree_on_all_numbers() -> None:
    tables = [example(), *make_tables.make_tables(make_tables.NUMBERS, [KEPT], ROOT / "data", ["family"])]
    for table in tables:
        found = markdown_cells(to_markdown(table))
        assert len(found) == len(table.lines) and found == latex_cells(to_latex(table)) == csv_cells(to_csv([table]))
    assert from_csv(to_csv(tables)) == tables  # numbers in full, blanks, notes, all


def test_what_is_printed() -> None:
    assert markdown_cells(to_markdown(example())) == [
        [".250", ".500", ""], [".333 ± .012", ".500", ""], ["", "", ".50"], ["1.000", "", ""]]  # fmt: skip


def test_the_best_is_bold_in_both_and_ties_share_it() -> None:
    markdown, latex = to_markdown(example()), to_latex(example())
    assert re.findall(r"\*\*(.*?)\*\*", markdown) == [".500", ".333 ± .012", ".500"]
    assert re.findall(r"\\textbf\{(.*?)\}", latex) == [".500", r".333 $\pm$ .012", ".500"]


def test_latex_is_escaped() -> None:
    text = to_latex(example())
    assert r"50\% of X \& Y\_z" in text and r"a\textbar{}b \{c\} \textasciitilde{} \#1 \textasciicircum{}" in text
    assert r"\textbackslash{} \textless{}d\textgreater{} \$" in text and r"A\_1" in text
    check_latex(text)


def test_equal_notes_share_a_mark_and_blanks_stay() -> None:
    text = to_markdown(example())
    assert text.count("[a]") == 3 and text.count("[b]") == 2  # two lines and the note; one line and the note
    assert "| ours | two digits [a] |  |  | .50 |" in text


# ---------------------------------------------------------------- end to end


def test_nothing_measured_leaves_the_papers_table(tmp_path: Path) -> None:
    for number in (2, 3, 4, 5):
        (table,) = make_tables.make_tables([number], [tmp_path], ROOT / "data")
        assert {line.block for line in table.lines} <= {"peers", "paper", "references"}


def test_untested_runs_leave_no_line(tmp_path: Path) -> None:
    record = family_record()
    del record["test"], record["test_shuffled_codes"]
    saved(record, tmp_path)
    assert len(collect([tmp_path]).rows) == 1
    assert len(make_tables.make_tables([2], [tmp_path], ROOT / "data")) == 1


def test_from_records_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--records", str(KEPT)]
    make_tables.main([*flags, "--table", "2"])
    text = capsys.readouterr().out
    rows = collect([KEPT]).rows
    assert sum(row.task == CODES for row in rows) >= 4
    for group in groups(rows):
        if group.first.task == CODES and not group.first.variant:
            mrr = group.stat("mrr")
            assert mrr is not None and f"{mrr.mean:.3f}".removeprefix("0") in text
            assert all(str(row.path) in text for row in group.rows)
    assert "### Table 2: Link prediction from quantized representations, no LLM, on family" in text
    make_tables.main([*flags, "--table", "2", "--format", "csv", "--out", str(tmp_path / "all.csv")])
    ours = [
        line for table in from_csv((tmp_path / "all.csv").read_text()) for line in table.lines if line.block == "ours"
    ]
    assert any(cell.value == family_record()["test"]["mrr"] for line in ours for cell in line.cells.values())
    make_tables.main([*flags, "--format", "latex", "--out", str(tmp_path / "folder")])
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [f"table{n}.tex" for n in (2, 3, 4, 5, 6)]

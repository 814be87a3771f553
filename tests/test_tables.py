"""Records to tables: broken records are refused, formats agree, seeds are averaged, data sets are hashes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import InputError
from common.files import ROOT, read_json, sha256_file, write_json
from common.metrics import check_classification, check_ranking
from data.knowledge_graph import KnowledgeGraph
from lora_training.score_answers import report
from tables import make_tables, results
from tables.results import CODES, KEPT, LINKS, TRIPLES, Row, collect, groups, keep
from tables.rows import public_hashes
from tables.system import BASELINES
from tables.table_formats import Cell, Column, Line, Table, to_latex, to_markdown
from tests.test_latex import check_latex

FAMILY = KEPT / "family_4_256_4_rq.json"
FACTS = "graph encoder of 2 layers, trained quantizer, no text, 1 member"
Record = dict[str, Any]


def family_record() -> Record:
    found: Record = read_json(FAMILY, "record")
    return found


def saved(record: Any, folder: Path, name: str = "run.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, folder / name)
    return folder / name


def with_seed(seed: int, mrr_change: float = 0.0) -> Record:
    """The family record with another seed; a change of MRR small enough to be possible, in both directions."""
    record = family_record()
    record["seed"] = record["args"]["seed"] = seed
    for part in (record["test"], record["test"]["head"], record["test"]["tail"]):
        part["mrr"] += mrr_change
    return record


def results_of(folder: Path) -> list[results.Group]:
    """The groups of a folder without variants."""
    return [group for group in groups(collect([folder])) if not group.first.variant]


def one_line(error: pytest.ExceptionInfo[InputError], *words: str) -> None:
    """The message is one line that contains ``words``."""
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


# ---------------------------------------------------------------- expected numbers


def test_published_numbers_have_sources_and_are_possible() -> None:
    for number in make_tables.NUMBERS:
        for method in make_tables.expected(number)["methods"]:
            assert method["source"], method["method"]
            for dataset, values in method["values"].items():
                where = f"{method['method']} on {dataset}"
                if len(values) == 4 and "mrr" in values:
                    check_ranking(Path("expected"), where, values, slack=0.0015)  # three printed digits
                if "f1" in values:
                    check_classification(Path("expected"), where, values, slack=0.0015)
    for point in read_json(ROOT / "tables" / "expected" / "pareto.json", "points")["points"]:
        assert point["source"] and 0 < point["mrr"] < 1 < point["parameters"]


def test_no_number_of_the_paper_is_in_the_code() -> None:
    for name in ("rows", "results", "system", "make_tables", "table_formats"):
        path = ROOT / "tables" / f"{name}.py"
        assert not re.findall(r"(?<![\w.])0?\.[1-9]\d{2}(?!\d)", path.read_text(encoding="utf-8")), path


def test_a_number_without_source_is_refused(tmp_path: Path) -> None:
    content = make_tables.expected(2)
    del content["methods"][3]["source"]
    write_json(content, tmp_path / "table2.json")
    with pytest.raises(InputError):
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
    "mrr below the hits' bound": (put("test", "mrr", value=0.9), "test.mrr"),
    "mrr above the hits' bound": (put("test", "mrr", value=0.9999), "test.mrr"),
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
    "no time": (put("wall_seconds", value=0), "wall_seconds"),
    "no device": (put("device", value=None), "device"),
    "no flags": (put("args", value=[]), "args"),
    "no metrics": (put("valid", value={}), "valid"),
    "a list for a seed": (put("seed", value=[1]), "seed"),
    "a number for a commit": (put("git_commit", value=3), "git_commit"),
    "a word for the codes": (put("codes", value="x"), "run record"),
    "a text for a size": (put("args", "num_code", value="many"), "run record"),
    "a word for perplexity": (put("codes", "perplexity", value=["x"]), "run record"),
    "a list for metrics": (put("valid_mrr_by_levels", value=7), "run record"),
    "a control in one place": (put("control", value="posthoc"), "control"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_impossible_record_is_an_error(name: str, tmp_path: Path) -> None:
    change, field = BROKEN[name]
    record = family_record()
    change(record)
    path = saved(record, tmp_path)
    with pytest.raises(InputError) as error:
        collect([tmp_path])
    one_line(error, str(path), field)


def test_nan_is_no_metric_and_the_record_itself_is_good(tmp_path: Path) -> None:
    record = family_record()
    saved(record, tmp_path)
    assert [row.variant for row in collect([tmp_path])] == ["", "control: codes shuffled"]
    record["test"]["mrr"] = float("nan")
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError):
        collect([tmp_path])


@pytest.mark.parametrize(
    ("hits", "least", "most"),
    [((0, 1, 1), 1 / 3, 1 / 1.5), ((0, 0, 1), 1 / 10, 1 / 3.5), ((0, 0, 0), 0, 1 / 10.5), ((1, 1, 1), 1, 1)],
)
def test_mrr_lies_between_the_bounds_of_the_hits(hits: tuple[int, int, int], least: float, most: float) -> None:
    """All ranks in 2..3, in 4..10, above 10, at 1; tied ranks end in a half: 1.5, 3.5 and 10.5 are the nearest."""
    one, three, ten = hits
    for mrr, fits in ((least, True), (most, True), (least - 1e-3, False), (most + 1e-3, False)):
        metrics = {"mrr": mrr, "hits@1": one, "hits@3": three, "hits@10": ten}
        if fits:
            check_ranking(Path("x"), "test", metrics)
        else:
            with pytest.raises(InputError):
                check_ranking(Path("x"), "test", metrics)


@pytest.mark.parametrize("missing", ["args", "seed", "git_commit", "device", "finished", "wall_seconds"])
def test_metrics_without_a_record_are_left_out(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = family_record()
    del record[missing]
    path = saved(record, tmp_path / "runs")
    assert not collect([tmp_path / "runs"])
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and missing in printed
    for read in (lambda: collect([path]), lambda: keep(path, tmp_path / "kept")):
        with pytest.raises(InputError) as error:
            read()
        one_line(error, missing)


def test_files_without_metrics_are_skipped(tmp_path: Path) -> None:
    saved({"vocabulary": 3}, tmp_path, "tokenizer.json")
    saved([1, 2], tmp_path, "list.json")
    assert collect([tmp_path]) == []
    for name in ("typo", "list.json"):
        with pytest.raises(InputError) as error:
            collect([tmp_path / name])
        one_line(error, "--records", name)


# ---------------------------------------------------------------- data sets


def test_known_hashes_are_those_of_the_paper_and_the_download() -> None:
    from data.download import DATASETS

    assert set(public_hashes()) == {"FB15k-237", "WN18RR", "FB15k-237N"}
    for name, hashes in public_hashes().items():
        for file in ("train.txt", "valid.txt", "test.txt"):
            assert hashes[file] == DATASETS[name][file].sha256


def test_another_graph_of_a_public_name_gets_another_name(ring: Path, tmp_path: Path) -> None:
    """A small graph in a folder named FB15k-237 must not appear in the paper's table."""
    shutil.copytree(ring, tmp_path / "data" / "FB15k-237")
    record = family_record() | {"dataset": "FB15k-237"}
    saved(record, tmp_path / "runs")
    (row, _) = collect([tmp_path / "runs"], tmp_path / "data")
    assert row.dataset.startswith("FB15k-237 (other triples, ")
    tables = make_tables.make_tables([2], [tmp_path / "runs"], tmp_path / "data")
    assert not any(line.block == "ours" for line in tables[0].lines) and row.dataset in tables[1].title


def test_a_public_graph_is_known_whatever_its_folder_is_called(tmp_path: Path) -> None:
    record = read_json(KEPT / "FB15k-237_16_1024_4_rq.json", "record")
    path = saved(record | {"dataset": "mine"}, tmp_path)
    assert {row.dataset for row in collect([path], data=tmp_path / "none")} == {"FB15k-237"}
    double_counts(record["test"])  # the paper's Table 6 gives the number of queries
    saved(record | {"dataset": "mine"}, tmp_path)
    with pytest.raises(InputError) as error:
        collect([path], data=tmp_path / "none")
    one_line(error, "test.count", "81864", "40932")


def test_triples_that_changed_since_are_another_data_set(tmp_path: Path) -> None:
    record = family_record()
    record["inputs"]["test.txt"] = "0" * 64
    saved(record, tmp_path)
    assert {row.dataset for row in collect([tmp_path])} == {"family (other triples, 000000)"}
    digest = record | {"dataset": "WN18RR", "inputs": {}, "trained_on": public_hashes()["WN18RR"]["triples"]}
    for part in ("valid", "test", "test_shuffled_codes"):
        digest.pop(part)
    saved(digest | {"valid": {**family_record()["valid"]}}, tmp_path)
    with pytest.raises(InputError) as error:  # WN18RR by the digest of its training triples, but not its queries
        collect([tmp_path])
    one_line(error, "valid.count", "6068")


# ---------------------------------------------------------------- seeds and settings


def test_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    for seed, change in enumerate((-1e-3, 0.0, 1e-3)):
        saved(with_seed(seed, change), tmp_path, f"{seed}.json")
    (group,) = results_of(tmp_path)
    middle = family_record()["test"]["mrr"]
    assert group.seeds == [0, 1, 2] and group.stat("accuracy") is None
    assert group.stat("mrr") == pytest.approx((middle, 1e-3))  # the sample deviation of x - d, x, x + d is d
    assert group.stat("mrr", "valid") == pytest.approx((family_record()["valid"]["mrr"], 0.0))


def test_a_run_and_a_seed_count_once(tmp_path: Path) -> None:
    saved(with_seed(0), tmp_path, "first.json")
    saved(with_seed(0), tmp_path / "copies", "same.json")
    later = with_seed(0, 1e-3) | {"finished": "2099-01-01T00:00:00+00:00"}
    saved(later, tmp_path, "again.json")
    (group,) = results_of(tmp_path)
    assert group.stat("mrr") == (later["test"]["mrr"], None)


TEXT = {"text_emb": "some/file.npy"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"quantizer": "vq"}, "VQ 4 of 256"), ({"gcn_layers": 0}, "no graph encoder"), ({"tf_layers": 0}, None),
        ({"lr": 0.01}, "lr 0.01"), ({"decoder": "complex"}, "ComplEx"), ({"some_new_flag": 3}, "some_new_flag 3"),
        ({"ensemble": 2}, "2 members"), (TEXT, "text as loss"), (TEXT | {"inputs": "learned+text"}, "input and loss"),
        (TEXT | {"text_init": True, "text_weight": 0}, "text as input"), ({"num_code": 64}, "96 bits per entity"),
    ],
)  # fmt: skip
def test_what_is_learned_differently_is_another_setting(
    change: dict[str, Any], word: str | None, tmp_path: Path
) -> None:
    saved(with_seed(0), tmp_path, "a.json")
    other = with_seed(1)
    other["args"] |= change
    saved(other, tmp_path, "b.json")
    settings = [group.first.setting for group in results_of(tmp_path)]
    assert len(set(settings)) == 2 and (word is None or (word in settings[1] and word not in settings[0]))


def test_where_and_when_do_not_make_a_setting(tmp_path: Path) -> None:
    saved(with_seed(0), tmp_path, "a.json")
    other = with_seed(1)
    other["args"] |= {"out_dir": "elsewhere", "device": "cuda", "num_workers": 7, "some_new_flag": None, "name": "x"}
    del other["args"]["patience"]
    saved(other, tmp_path, "b.json")
    assert len(results_of(tmp_path)) == 1


def test_texts_of_one_name_are_known_by_their_hash(tmp_path: Path) -> None:
    for seed, digest in enumerate(("ab" * 32, "cd" * 32, "cd" * 32)):
        record = with_seed(seed)
        record["args"]["text_emb"] = f"folder{seed}/minilm.npy"
        record["inputs"]["minilm.npy"] = digest
        saved(record, tmp_path, f"{seed}.json")
    assert [group.seeds for group in results_of(tmp_path)] == [[0], [1, 2]]
    tables = make_tables.make_tables([2], [tmp_path], ROOT / "data")
    methods = [line.method for line in tables[1].lines if line.block == "ours"]
    assert [word in method for word, method in zip(("minilm ababab", "minilm cdcdcd"), methods, strict=True)] == [
        True
    ] * 2


def test_a_run_dumped_before_its_end_is_another_setting(tmp_path: Path) -> None:
    """A stopped run has the flags of the whole one; it is later, and must not take its place."""
    whole = with_seed(0)
    saved(whole, tmp_path, "whole.json")
    part = with_seed(0, 1e-3) | {"epochs": whole["epochs"] - 1, "finished": "2099-01-01T00:00:00+00:00"}
    saved(part, tmp_path, "part.json")
    stopped = f"stopped after {whole['epochs'] - 1}"
    assert [stopped in group.first.flags for group in results_of(tmp_path)].count(True) == 1
    for name in ("max_minutes", "patience"):  # the clock or patience ended it: that is its setting
        saved(part | {"args": part["args"] | {name: 5}}, tmp_path, "part.json")
        assert not any(stopped in group.first.flags for group in results_of(tmp_path))


@pytest.mark.parametrize(
    ("change", "method"),
    [
        ({"control": "unquantized"}, "4 vectors, DistMult, {}no quantizer{}control: unquantized)"),
        ({"control": "random_codes"}, "RQ 4 x 4 of 256, DistMult, {}random quantizer{}control: random codes)"),
        ({"quantizer": "random"}, "RQ 4 x 4 of 256, DistMult, {}random quantizer{}control: random codes)"),
        ({"quantizer": "none"}, "4 vectors, DistMult, {}no quantizer{}control: unquantized)"),
        ({"control": "posthoc"}, "RQ 4 x 4 of 256, DistMult, {}k-means quantizer{}control: codes made after training)"),
    ],
)
def test_controls_are_marked_and_never_the_best(change: dict[str, str], method: str, tmp_path: Path) -> None:
    """A record of a control has no codes, no levels and no shuffled copy; better than the codes, it is not the best."""
    saved(with_seed(0), tmp_path, "a.json")
    other = as_control(with_seed(1, 1e-3), change)
    saved(other, tmp_path, "b.json")
    table = make_tables.make_tables([2], [tmp_path], ROOT / "data")[1]
    assert [line.block for line in table.lines] == ["ours", "control", "control"]
    (line,) = [line for line in table.lines if "shuffled" not in line.method and line.block == "control"]
    first, second, third = method.split("{}")
    assert line.method.startswith(first) and second in line.method and line.method.endswith(third)
    assert not line.competes and line.cells[Column("family", "mrr")].value == other["test"]["mrr"]


def as_control(record: Record, change: dict[str, str]) -> Record:
    """The record of a control."""
    left_out = ("shape", "outputs", "codes", "valid_mrr_by_levels", "mrr_before_collision_pass", "test_shuffled_codes")
    record = {name: value for name, value in record.items() if name not in left_out}
    history = [epoch for epoch in record["history"] if epoch["phase"] != "codes"]
    control = change.get("control") or BASELINES[change["quantizer"]]
    return record | {"args": record["args"] | change, "history": history, "control": control}


def test_every_line_states_the_facts(tmp_path: Path) -> None:
    """Graph encoder, quantizer, text, members, parameters, bits and seeds in the line; perplexity in the note."""
    for seed in range(2):
        saved(with_seed(seed), tmp_path, f"{seed}.json")
    line = make_tables.make_tables([2], [tmp_path], ROOT / "data")[1].lines[0]
    expected = f"RQ 4 x 4 of 256, DistMult, {FACTS}, 0.06M parameters behind the codes, 128 bits per entity, 2 seeds"
    assert line.method == expected and "perplexity by level 195, 198, 212, 211" in line.note


def test_kept_records_state_the_facts() -> None:
    rows = [row for row in collect([KEPT]) if row.task == CODES and not row.variant]
    assert len(rows) >= 16 and all("parameters behind the codes" in row.label for row in rows)
    assert all(len(row.record["codes"]["perplexity"]) == row.record["shape"][2] for row in rows)
    assert {row.label.split(", ")[3] for row in rows} == {"trained quantizer", "k-means quantizer"}


def test_runs_without_test_are_listed_and_in_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As run_ablations.py leaves them: a folder per run, its record without test, and the results file."""
    for name in ("4x4", "posthoc"):
        record = with_seed(0) if name == "4x4" else as_control(with_seed(0), {"control": name})
        saved({key: value for key, value in record.items() if not key.startswith("test")}, tmp_path / f"{name}_seed0")
    saved({"rows": [{"name": "4x4", "mrr": 0.5}]}, tmp_path, "ablations.json")
    results.main(["--records", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(f"valid mrr {record['valid']['mrr']:.3f}" in line for line in lines)
    make_tables.main(["--table", "2", "--records", str(tmp_path)])
    printed = capsys.readouterr()
    assert "| ours" not in printed.out and "| control" not in printed.out
    assert "2 settings without test metrics" in printed.err and "tables/results.py" in printed.err


# ---------------------------------------------------------------- answers of an LLM


def answers(rng: np.random.Generator, queries: int, split: str) -> list[Record]:
    """Link prediction over six candidates, and as many classifications, with random scores."""
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
    """The files of a run of inference.py on the ring graph, with everything that its record refers to."""

    def __init__(self, folder: Path, seed: int = 0, codes: str = "with", inputs: Record | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.test = folder / "data" / "test_tasks.json"
        saved([{"seed": seed, "codes": codes}], folder / "data", "test_tasks.json")
        stats = {"args": {"limit": 0}, "datasets": {LINKS: "ring", TRIPLES: "ring"}, "inputs": inputs or {}}
        saved(stats, folder / "data", "dataset_stats.json")
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
    return collect([chain.path], ring.parent)


def test_answers_become_rows(tmp_path: Path, ring: Path) -> None:
    chain = Chain(tmp_path, seed=3)
    rows = read_chain(chain, ring)
    kinds = ["", "candidate ranker", "first candidate of the list", "random choice", ""]
    assert [row.variant for row in rows] == kinds and [row.task for row in rows] == [LINKS] * 4 + [TRIPLES]
    assert {row.dataset for row in rows} == {"ring"} and {row.seed for row in rows} == {3}
    assert {row.minutes for row in rows} == {1.5}  # training and answering
    label = "tiny, LoRA r 4, 2 epochs, 1,234 rows, codes 3 x 2 of 8 (18 bits)"
    assert {(row.label, row.flags) for row in rows} == {(label, ("learning_rate 0.001",))}
    metrics = chain.record["metrics"]
    assert rows[0].metrics["mrr"] == metrics[LINKS]["test"]["mrr"]
    assert rows[1].metrics["hits@1"] == metrics[LINKS]["test"]["candidate_model"]["hits@1"]
    assert rows[4].metrics["f1"] == metrics[TRIPLES]["test"]["f1"]


def test_answers_about_other_triples_get_another_name(tmp_path: Path, ring: Path) -> None:
    hashes = KnowledgeGraph.load(ring).input_hashes
    assert {row.dataset for row in read_chain(Chain(tmp_path / "a", inputs=hashes), ring)} == {"ring"}
    other = Chain(tmp_path / "b", inputs=hashes | {"train.txt": "f" * 64})
    assert {row.dataset for row in read_chain(other, ring)} == {"ring (other triples, ffffff)"}


def change_metric(task: str, name: str, value: Any) -> Callable[[Chain], None]:
    return lambda chain: chain.record["metrics"][task]["test"].update({name: value})


def fewer_queries(chain: Chain) -> None:
    """Possible metrics over fewer queries than the test split has."""
    chain.record["metrics"] = report(answers(np.random.default_rng(0), 20, "test"))


def fewer_triples(chain: Chain) -> None:
    fewer_queries(chain)
    del chain.record["metrics"][LINKS]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (change_metric(LINKS, "count", 23), "link_prediction.test"),
        (change_metric(LINKS, "mrr", 0.99), "link_prediction.test.mrr"),
        (change_metric(TRIPLES, "accuracy", 0.99), "triple_classification.test.accuracy"),
        (change_metric(TRIPLES, "f1", 0.01), "triple_classification.test.f1"),
        (change_metric(TRIPLES, "positives", 11), "triple_classification.test"),
        (fewer_queries, "link_prediction.test.count"),
        (fewer_triples, "triple_classification.test.positives"),
        (lambda chain: chain.adapter.unlink(), "adapter"), (lambda chain: chain.adapter.write_text("{}"), "adapter"),
        (lambda chain: chain.test.write_text("[]"), "test_tasks.json"),
        (lambda chain: chain.record["args"].update(limit=5), "--limit 5"),
    ],
)  # fmt: skip
def test_answers_without_their_files_or_with_other_metrics_are_refused(
    change: Callable[[Chain], Any], field: str, tmp_path: Path, ring: Path
) -> None:
    chain = Chain(tmp_path)
    change(chain)
    write_json(chain.record, chain.path)
    with pytest.raises(InputError) as error:
        read_chain(chain, ring)
    one_line(error, field)


def test_a_limited_run_says_so(tmp_path: Path, ring: Path) -> None:
    chain = Chain(tmp_path)
    assert not any(row.partial or "at most" in row.label for row in read_chain(chain, ring))
    chain.record["args"]["limit"] = 20
    chain.record["answers"] = answers(np.random.default_rng(0), 20, "test")
    chain.record["metrics"] = report(chain.record["answers"])
    write_json(chain.record, chain.path)
    rows = read_chain(chain, ring)
    assert all(row.label.endswith("at most 20 test rows") and row.partial for row in rows)
    tables = make_tables.make_tables([3, 4], [chain.path], ring.parent)
    found = [line for table in tables if table.title.endswith("on ring") for line in table.lines]
    assert len(found) == 5 and not any(line.competes for line in found), "other queries than the full runs'"


def test_a_kept_record_gives_the_same_rows_alone(tmp_path: Path, ring: Path) -> None:
    chain = Chain(tmp_path / "run", inputs=KnowledgeGraph.load(ring).input_hashes)
    before = read_chain(chain, ring)
    kept = keep(chain.path, tmp_path / "kept", ring.parent)
    shutil.rmtree(tmp_path / "run")
    after = collect([kept], ring.parent)
    drop = {"path", "record"}
    assert [{k: v for k, v in vars(row).items() if k not in drop} for row in after] == [
        {k: v for k, v in vars(row).items() if k not in drop} for row in before
    ]
    assert "answers" not in read_json(kept, "record")


def test_keeping_never_replaces_another_run_and_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    record = with_seed(0)
    record["args"]["dataset"] = f"{ROOT}/data/family"
    path = saved(record, tmp_path)
    kept = keep(path, tmp_path / "kept")
    assert keep(path, tmp_path / "kept") == kept  # the same run again
    assert str(ROOT) not in kept.read_text() and read_json(kept, "record")["args"]["dataset"] == "data/family"
    saved(with_seed(1), tmp_path)
    with pytest.raises(InputError) as error:
        keep(path, tmp_path / "kept")
    one_line(error, "--name")
    assert keep(path, tmp_path / "kept", name="second").name == "second.json"
    for file in KEPT.glob("*.json"):
        assert not re.search(r'"/\w+/|file:/', file.read_text(encoding="utf-8")), file


def test_keeping_names_every_page_that_is_made_from_kept_records(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "keep", lambda *_, **__: Path("kept.json"))
    results.main(["--keep", "run.json"])
    printed = capsys.readouterr().out
    pages = [page for page in (ROOT / "docs").glob("*.md") if re.search(r"<!-- table \d -->", page.read_text())]
    assert pages and all(f"docs/{page.name}" in printed for page in pages)


def test_a_line_names_the_codes_that_its_llm_was_given(tmp_path: Path, ring: Path) -> None:
    for codes, named in (("with", True), ("shuffled", True), ("without", False)):
        first = groups(read_chain(Chain(tmp_path / codes, codes=codes), ring))[0]
        assert ("codes 5" in make_tables.provenance(first).split(", ")) is named


def test_tables_of_the_llm(tmp_path: Path, ring: Path) -> None:
    for number, codes in enumerate(("with", "without", "shuffled")):
        for seed in range(2):
            Chain(tmp_path / f"{number}{seed}", seed, codes)
    tables = make_tables.make_tables([3, 4, 5], [tmp_path], ring.parent)
    third, fourth, fifth = (
        next(table for table in tables if table.number == n and table.title.endswith("on ring")) for n in (3, 4, 5)
    )
    assert [line.block for line in third.lines] == ["ours", *["baseline"] * 3]
    assert all(", without codes" not in line.method for line in third.lines)
    assert sum("without codes" in line.method for line in fifth.lines) == 1
    assert all(cell.std is not None for line in fifth.lines for cell in line.cells.values())
    assert "seeds 0, 1" in fifth.lines[0].note
    for table in (fourth, fifth):
        assert [line.block for line in table.lines] == ["ours", "ours", "control"]
        assert [line.competes for line in table.lines] == [True, True, False], "shuffled codes are never the best"


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


def test_another_graph_in_the_folder_of_a_public_one_is_not_counted_as_it(tmp_path: Path, ring: Path) -> None:
    for name in ("mine", "WN18RR"):
        shutil.copytree(ring, tmp_path / "data" / name)
    lines = make_tables.data_table(tmp_path / "data")[0].lines[-2:]
    assert lines[0].method.startswith("WN18RR (other triples, ") and lines[1].method == "mine"
    assert [line.cells[Column("", "entities")].value for line in lines] == [43, 43]


# ---------------------------------------------------------------- formats


ODD = "a|b {c} ~ #1 ^ \\ <d> $"


def example() -> Table:
    columns = [Column("A_1", "mrr"), Column("A_1", "hits@10"), Column("B", "mrr")]
    lines = [
        Line("peers", "50% of X & Y_z", {columns[0]: Cell(0.25), columns[1]: Cell(0.5)}),
        Line("ours", ODD, {columns[0]: Cell(1 / 3, 0.0123), columns[1]: Cell(0.5)}, "seed, 0 | 1"),
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


def test_formats_agree_on_all_numbers() -> None:
    for table in [example(), *make_tables.make_tables(make_tables.NUMBERS, [KEPT], ROOT / "data", ["family"])]:
        found = markdown_cells(to_markdown(table))
        assert len(found) == len(table.lines)
        assert found == latex_cells(to_latex(table))


def test_the_printed_numbers_and_the_best_of_each_column() -> None:
    markdown, latex = to_markdown(example()), to_latex(example())
    assert markdown_cells(markdown) == [
        [".250", ".500", ""], [".333 ± .012", ".500", ""], ["", "", ".50"], ["1.000", "", ""]]  # fmt: skip
    assert re.findall(r"\*\*(.*?)\*\*", markdown) == [".500", ".333 ± .012", ".500"], "ties share it"
    assert re.findall(r"\\textbf\{(.*?)\}", latex) == [".500", r".333 $\pm$ .012", ".500"]
    assert markdown.count("[a]") == 3 and markdown.count("[b]") == 2  # equal notes share a mark
    assert "| ours | two digits [a] |  |  | .50 |" in markdown


def test_latex_is_escaped() -> None:
    text = to_latex(example())
    assert r"50\% of X \& Y\_z" in text and r"a\textbar{}b \{c\} \textasciitilde{} \#1 \textasciicircum{}" in text
    assert r"\textbackslash{} \textless{}d\textgreater{} \$" in text and r"A\_1" in text
    check_latex(text)


# ---------------------------------------------------------------- end to end


def test_without_results_the_papers_table_remains(tmp_path: Path) -> None:
    record = family_record()
    del record["test"], record["test_shuffled_codes"]
    saved(record, tmp_path)
    assert len(collect([tmp_path])) == 1
    for number in (2, 3, 4, 5):
        (table,) = make_tables.make_tables([number], [tmp_path], ROOT / "data")
        assert {line.block for line in table.lines} <= {"peers", "paper", "references"}


def test_from_records_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--records", str(KEPT)]
    make_tables.main([*flags, "--table", "2"])
    text = capsys.readouterr().out
    for group in groups(collect([KEPT])):
        if group.first.task == CODES and not group.first.variant:
            mrr = group.stat("mrr")
            assert mrr is not None and f"{mrr.mean:.3f}".removeprefix("0") in text
            assert all(str(row.path) in text for row in group.rows)
    make_tables.main([*flags, "--format", "latex", "--out", str(tmp_path / "all.tex")])
    assert (tmp_path / "all.tex").read_text(encoding="utf-8").count(r"\begin{table}") >= len(make_tables.NUMBERS)

"""tables/export.py: load.py gives the toolkit's scores without the toolkit; the card runs as pasted; faults."""

# ruff: noqa: F811  (fixtures of another file)
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from Class.codes import load_codes, load_entities, parse_codes
from common.files import ROOT, load_torch, save_torch, sha256_file, write_json
from data.knowledge_graph import KnowledgeGraph, with_inverse
from lora_training.adapters import load_adapted, read_saved
from model.decoders import DECODERS
from model.from_codes import Scored
from model.quantizers import QUANTIZERS
from model.ranking import filtered_ranks, summarize
from model.RQGCN import CodeScorer
from tables import export
from tables.card import data_terms, metrics
from tables.load import Decoder
from tests.conftest import Command, Run, assert_refused, finished, ranked, write_graph
from tests.test_train_lora import base, data, libraries, trained  # noqa: F401

SITE = """import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Refuse())
"""
BLOCKED = ["common", "data", "Class", "model", "lora_training", "tables", "pyarrow", "pandas", "transformers", "peft"]
ALL_SCORES = """import sys, torch
from pathlib import Path
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
from load import Codes
for folder in sys.argv[1:]:
    loaded = Codes(folder)
    M, R = len(loaded.codes), len(loaded.relations)
    heads, relations = torch.arange(M).repeat_interleave(R), torch.arange(R).repeat(M)
    scores = loaded.scores(heads, relations).view(M, R, M)
    save_file({"scores": scores, "vectors": loaded.vectors}, str(Path(folder, "..", Path(folder).name + ".scores")))
"""


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """alone(folder, *words) -> the output of ``python *words`` in ``folder``, where the toolkit cannot be imported."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE.format(blocked=BLOCKED))

    def call(folder: Path, *words: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        ended = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    with pytest.raises(AssertionError, match="model is blocked"):
        call(ROOT, "-c", "import model")
    return call


@pytest.fixture
def exporting(shell: Command) -> Command:
    """exporting(run, out, *flags) -> Outcome of export.py."""
    return lambda run, out, *words: shell(
        export, "--codes", run.codes, "--checkpoint", run.checkpoint, "--out", out, *words
    )


# ---------------------------------------------------------------- every decoder, ensemble, map and quantizer


class Case(NamedTuple):
    decoder: str
    members: int
    dim: int  # D; L * code_dim = 36: another D needs a map W_q
    quantizer: str

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


CASES = [
    *(Case(decoder, members, dim, "rq") for decoder in DECODERS for members in (1, 2) for dim in (24, 36)),
    *(Case("complex", 1, 36, quantizer) for quantizer in QUANTIZERS if quantizer != "rq"),
    Case("distmult", 12, 24, "rq"),  # several members read one position; two digits
]


def random_scored(case: Case, M: int, R: int) -> Scored:
    """Random weights, batch norms' statistics too, with scores near 1."""
    L, K, Q = 3, 8, 1 if case.quantizer == "vq" else 2
    torch.manual_seed(CASES.index(case))
    scorer = CodeScorer(L, K, Q, 12, case.dim, case.decoder, 0.3, case.members, case.quantizer).eval()
    with torch.no_grad():
        for name, value in scorer.state_dict().items():
            if name.endswith(("norm.running_mean", "norm.bias")):
                value.normal_(std=0.2)
            elif name.endswith(("norm.running_var", "norm.weight")):
                value.uniform_(0.5, 1.5)
            elif name == "W_q.weight":
                value.normal_(std=0.4)
    return Scored(scorer, torch.randn(2 * R, case.dim) * 0.5, torch.randint(K, (M, L, Q)))


def toolkit_scores(scored: Scored) -> torch.Tensor:
    """[M, 2R, M]"""
    with torch.no_grad():
        q_all, count = scored.scorer.entity_vectors_from_codes(scored.codes), len(scored.relations)
        heads, relations = torch.arange(len(q_all)).repeat_interleave(count), torch.arange(count).repeat(len(q_all))
        return scored.scorer.scores(q_all[heads], scored.relations[relations], q_all).view(len(q_all), count, -1)


@pytest.fixture(scope="module")
def loaded_alone(
    tmp_path_factory: pytest.TempPathFactory, ring_kg: KnowledgeGraph, alone: Callable[..., str]
) -> dict[Case, tuple[Scored, dict[str, torch.Tensor]]]:
    """What load.py makes of all cases, in one process without the toolkit."""
    top = tmp_path_factory.mktemp("cases")
    made = {case: random_scored(case, ring_kg.num_entities, ring_kg.num_relations) for case in CASES}
    for case, scored in made.items():
        folder = top / case.name
        folder.mkdir()
        export.write_tensors(scored, folder)
        export.write_names(ring_kg, ring_kg.entities, folder)
        shutil.copyfile(export.LOADER, folder / "load.py")
    alone(top, "-c", ALL_SCORES, *(str(top / case.name) for case in CASES))
    return {case: (scored, load_file(top / f"{case.name}.scores")) for case, scored in made.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_load_py_gives_the_scores_of_every_decoder(
    case: Case, loaded_alone: dict[Case, tuple[Scored, dict[str, torch.Tensor]]]
) -> None:
    scored, found = loaded_alone[case]
    expected = toolkit_scores(scored)
    assert 0.1 < float(expected.std()) < 10
    torch.testing.assert_close(found["scores"], expected, rtol=1e-6, atol=1e-6)
    vectors = scored.scorer.entity_vectors_from_codes(scored.codes).detach()
    torch.testing.assert_close(found["vectors"], vectors, rtol=0, atol=1e-6)


def test_load_py_is_short_and_has_every_decoder() -> None:
    assert len(export.LOADER.read_text().splitlines()) <= 80
    assert all(name in vars(Decoder) for name in DECODERS)


# ---------------------------------------------------------------- from a run to the metrics


def metrics_of(scores: torch.Tensor, kg: KnowledgeGraph, split: str = "test") -> dict[str, Any]:
    """Filtered metrics from scores [M, 2R, M]."""
    triples = with_inverse(kg.split(split), kg.num_relations)
    ranks = filtered_ranks(lambda h, r: scores[h, r], triples, kg.answers(), kg.num_relations)
    return summarize(ranks, triples[:, 1] >= kg.num_relations)


@pytest.fixture(scope="module")
def family_export(family_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "family"
    export.main(["--codes", str(family_run.codes), "--checkpoint", str(family_run.checkpoint), "--out", str(out)])
    return out


def test_the_metrics_are_those_of_eval_codes(
    family_export: Path, family_run: Run, family: KnowledgeGraph, rq: Command, tmp_path: Path, alone: Callable[..., str]
) -> None:
    alone(family_export, "-c", ALL_SCORES, str(family_export))
    found = metrics_of(load_file(family_export.parent / "family.scores")["scores"], family)
    expected = ranked(rq, family_run, tmp_path)
    assert found["mrr"] > 0.2
    for part in (lambda x: x, lambda x: x["head"], lambda x: x["tail"]):
        for key in ("mrr", "hits@1", "hits@3", "hits@10", "mr"):
            assert part(found)[key] == pytest.approx(part(expected)[key], abs=1e-6), key


def test_the_folder_is_complete_and_recorded(family_export: Path, family_run: Run, family: KnowledgeGraph) -> None:
    from pyarrow import parquet

    record = json.loads((family_export / "record.json").read_text())
    names = {path.name for path in family_export.iterdir()} - {"__pycache__"}
    assert names == {*record["outputs"], "record.json"} >= {"card.md", "load.py"}
    assert all(sha256_file(family_export / name) == value for name, value in record["outputs"].items())
    assert record["run"] == family_run.record and record["score_difference"] <= 1e-6
    codes = load_codes(family_run.codes)
    assert torch.equal(load_file(family_export / "codes.safetensors")["codes"], codes)
    table = parquet.read_table(family_export / "codes.parquet").to_pydict()
    assert table["entity"] == family.entities and len(set(table["name"])) == len(codes)
    assert all(np.array_equal(parse_codes(text), row) for text, row in zip(table["codes"], codes.numpy(), strict=True))
    modes = {path.stat().st_mode & 0o777 for path in family_export.iterdir() if path.is_file()}
    assert len(modes) == 1, "some files are not readable by others"


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"(?s)```{language}\n(.*?)```", card)


def test_the_card_runs_as_pasted(family_export: Path, alone: Callable[..., str]) -> None:
    card = (family_export / "card.md").read_text()
    (command,), (shown,), (script,) = (blocks(card, language) for language in ("sh", "text", "python"))
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True).stdout
    out = alone(family_export, *words.splitlines()[1:])
    assert len(out.splitlines()) == 10 and out.startswith(shown)
    printed = alone(family_export, "-c", script).splitlines()
    best = shown.splitlines()[0].split("  ")[-1]
    assert best in printed[0] and printed[1:] == ["torch.Size([1000, 48])", "torch.Size([1, 1000])"]


def test_a_wrong_name_is_said_without_a_traceback(family_export: Path) -> None:
    words = [sys.executable, "load.py", "Nobody", "has grandmother"]
    ended = subprocess.run(words, cwd=family_export, capture_output=True, text=True)
    assert ended.returncode == 1 and "Nobody" in ended.stderr and "Traceback" not in ended.stderr


def test_the_card_states_the_records_metrics_control_and_terms(family_export: Path, family_run: Run) -> None:
    card, record = (family_export / "card.md").read_text(), family_run.record
    for split, title in (("test", "test"), ("test_shuffled_codes", "test, shuffled codes (control)")):
        assert f"| {title} | {record[split]['mrr']:.4f} | {record[split]['hits@1']:.4f} |" in card
    assert record["command"] in card and f"seed {record['seed']}" in card and "MIT" in card
    assert data_terms({"train.txt": "0" * 64}) is None and data_terms(record["inputs"]) is not None


def test_a_card_without_test_metrics_says_so(family_run: Run, family: KnowledgeGraph) -> None:
    found = metrics({"valid": family_run.record["valid"]}, family)
    assert "| valid |" in found and "| test" not in found and "were not ranked" in found
    assert "were not ranked" not in metrics(family_run.record, family)


def test_names_and_ids_reach_the_same_query(family_export: Path, family: KnowledgeGraph) -> None:
    from tables.load import Codes

    loaded = Codes(family_export)
    h, r = 5, 2
    by_id = loaded.rank(family.entities[h], family.relations[r])
    assert by_id == loaded.rank(family.labels[h], family.relation_labels[r])
    heads = loaded.rank(family.entities[h], f"~{family.relations[r]}")
    scores = loaded.scores(torch.tensor([h]), torch.tensor([r + family.num_relations]))[0]
    assert heads != by_id and heads[0] == (loaded.names["entities"][int(scores.argmax())], float(scores.max()))


# ---------------------------------------------------------------- other runs


def test_vq_codes_export(ring: Path, tmp_path: Path, exporting: Command) -> None:
    """Their file is [M, L]. (A run with random codes writes none: its scorer is among the cases above.)"""
    run = finished(ring, tmp_path, "ring_3_8", quantizer="vq", num_quantizers=1, epoch=2)
    outcome = exporting(run, tmp_path / "out", "--data_licence", "CC0 by us")
    assert outcome.code == 0, outcome.err
    assert "hf upload USER/" in outcome.out
    assert list(load_file(tmp_path / "out" / "codes.safetensors")["codes"].shape) == [43, 3, 1]
    assert "CC0 by us" in (tmp_path / "out" / "card.md").read_text()


def test_codes_with_new_entities_export(
    ring_run: Run, rq: Command, tmp_path: Path, exporting: Command, alone: Callable[..., str]
) -> None:
    new, encoded = tmp_path / "new.txt", tmp_path / "more.pt"
    new.write_text("n0\tnext\te1\nn0\tover\te2\ne4\tnext\tn1\n")
    assert rq(*ring_run.scored(None, None, "--encode", str(new), "--encoded", str(encoded))).code == 0
    outcome = exporting(ring_run, tmp_path / "out", "--codes", str(encoded))
    assert outcome.code == 0, outcome.err
    card = (tmp_path / "out" / "card.md").read_text()
    assert "2 of the entities arrived after training" in card and "The record has none" in card
    assert "k-means" not in card, "the epochs of the run are in the checkpoint"
    assert load_entities(encoded.with_suffix(".entities.txt"))[-2:] == ["n0", "n1"]
    assert len(alone(tmp_path / "out", "load.py", "n1", "~next").splitlines()) == 10


def adapter_of(run: Run, trained: Path, folder: Path, sha256: str | None = None) -> Path:
    """The trained adapter with a record that names the run's codes."""
    shutil.copytree(trained / "lora_adapters", folder)
    record = json.loads((folder / "run_record.json").read_text())
    record["codes"] |= {"file": run.codes.name, "sha256": sha256 or sha256_file(run.codes), "code_format": "compact"}
    write_json(record, folder / "run_record.json")
    return folder


def test_the_adapter_loads_as_the_card_says(
    ring_run: Run, trained: Path, tmp_path: Path, exporting: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet

    adapter = adapter_of(ring_run, trained, tmp_path / "adapter")
    outcome = exporting(ring_run, tmp_path / "out", "--adapter", str(adapter))
    assert outcome.code == 0, outcome.err
    monkeypatch.chdir(tmp_path / "out")
    found: dict[str, Any] = {}
    exec(blocks(Path("card.md").read_text(), "python")[1], found)
    saved = read_saved(adapter)
    texts = parquet.read_table("codes.parquet").to_pydict()["codes"]
    ids = found["tokenizer"](texts[0], return_tensors="pt")["input_ids"]
    assert ids.shape[1] <= 3 * 2 + 4, "each code is one token, in the format of the adapter's rows"
    with torch.no_grad():
        ours = load_adapted(saved, saved.base, torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(found["model"](input_ids=ids).logits, ours, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("stem", ["family_4_1024_4_rq", "my graph (1)_4_8_2_rq", "家族_4_8_2_rq", "-x- 'y", "家族"])
def test_the_printed_repository_is_a_name_of_the_hub(stem: str) -> None:
    utils = pytest.importorskip("huggingface_hub.utils")
    name = export.repository_name(stem)
    utils.validate_repo_id(f"USER/{name}")
    assert shlex.quote(name) == name and (name == stem or re.search(r"[^\w]", stem, re.ASCII))


def test_an_export_is_replaced_with_overwrite_only(ring_run: Run, tmp_path: Path, exporting: Command) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is none
    assert exporting(ring_run, out).code == 0
    (out / "card.md").write_text("mine")
    assert_refused(exporting(ring_run, out), "not empty", "--overwrite")
    assert (out / "card.md").read_text() == "mine"
    assert exporting(ring_run, out, "--overwrite").code == 0
    assert (out / "card.md").read_text() != "mine"
    (out / "notes.txt").write_text("mine")
    assert_refused(exporting(ring_run, out, "--overwrite"), "notes.txt")
    assert (out / "notes.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def unfinished(run: Run, folder: Path, trained: Path) -> list[str]:
    stored = load_torch(run.checkpoint, "checkpoint")
    save_torch(stored | {"best": None}, folder / "ck.pt")
    return ["--checkpoint", str(folder / "ck.pt")]


def of_another_run(run: Run, folder: Path, trained: Path) -> list[str]:
    other = finished(run.dataset, folder / "other", run.stem, epoch=1, seed=1)
    return ["--checkpoint", str(other.checkpoint)]


def of_other_sizes(run: Run, folder: Path, trained: Path) -> list[str]:
    other = finished(run.dataset, folder / "other", "ring_2_8_2_rq", epoch=1, seq_len=2)
    return ["--checkpoint", str(other.checkpoint)]


def of_another_graph(run: Run, folder: Path, trained: Path) -> list[str]:
    graph = write_graph(folder / "elsewhere" / "ring")
    train = graph / "train.txt"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:-1]))
    other = finished(graph, folder / "other", run.stem, epoch=1)
    return ["--checkpoint", str(other.checkpoint)]


def changed_codes(run: Run, folder: Path, trained: Path) -> list[str]:
    for path in run.codes.parent.iterdir():
        shutil.copy(path, folder)
    save_torch(load_codes(run.codes).flip(0), folder / run.codes.name)
    return ["--codes", str(folder / run.codes.name)]


def without_record(run: Run, folder: Path, trained: Path) -> list[str]:
    shutil.copy(run.codes, folder)
    return ["--codes", str(folder / run.codes.name)]


def without_graph(run: Run, folder: Path, trained: Path) -> list[str]:
    for path in run.codes.parent.iterdir():
        shutil.copy(path, folder)
    record = run.record
    record["inputs"]["train.txt"] = "0" * 64
    write_json(record, folder / run.codes.with_suffix(".json").name)
    return ["--codes", str(folder / run.codes.name)]


def adapter_of_other_codes(run: Run, folder: Path, trained: Path) -> list[str]:
    return ["--adapter", str(adapter_of(run, trained, folder / "adapter", "b" * 64))]


FAULTS: list[tuple[Callable[[Run, Path, Path], list[str]], list[str]]] = [
    (unfinished, ["no epoch with codes yet"]),
    (of_another_run, ["not the codes of the best epoch", "finished run"]),
    (of_other_sizes, ["--codes", "[L, Q] = [3, 2]", "[2, 2]"]),
    (of_another_graph, ["was trained on other triples"]),
    (changed_codes, ["sha256 differs"]),
    (without_record, ["has no record"]),
    (without_graph, ["was not found", "--dataset"]),
    (adapter_of_other_codes, ["--adapter", "another code"]),
    (lambda run, folder, trained: ["--adapter", str(folder)], ["adapter_config.json"]),
    (lambda run, folder, trained: ["--checkpoint", str(folder / "no.pt")], ["no.pt does not exist"]),
    (lambda run, folder, trained: ["--checkpoint", str(run.codes)], ["was not written by run_rq.py"]),
    (lambda run, folder, trained: ["--out", str(run.codes)], ["is a file"]),
    (lambda run, folder, trained: ["--out", str(run.codes.parent), "--overwrite"], ["name another"]),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=[said[0] for _, said in FAULTS])
def test_a_fault_is_one_line_and_nothing_is_written(
    fault: Callable[[Run, Path, Path], list[str]], said: list[str], ring_run: Run, trained: Path, tmp_path: Path,
    exporting: Command,
) -> None:  # fmt: skip
    flags = fault(ring_run, tmp_path, trained)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert_refused(exporting(ring_run, tmp_path / "out", *flags), *said)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_an_interrupted_export_leaves_what_was_there(
    ring_run: Run, tmp_path: Path, exporting: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exporting(ring_run, tmp_path / "out").code == 0
    before = (tmp_path / "out" / "record.json").read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "compare_scores", interrupt)
    assert exporting(ring_run, tmp_path / "out", "--overwrite").code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "record.json").read_bytes() == before


def test_without_pyarrow_the_line_says_how_to_install_it(
    ring_run: Run, tmp_path: Path, exporting: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert_refused(exporting(ring_run, tmp_path / "out"), "pip install pyarrow")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["other scores", "no such decoder"])
def test_a_loader_that_differs_from_the_toolkit_is_refused(
    change: str, ring_run: Run, tmp_path: Path, exporting: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens if a decoder is changed or added in model/decoders.py alone."""
    if change == "no such decoder":
        monkeypatch.delattr(Decoder, "distmult")
    else:
        monkeypatch.setattr(Decoder, "distmult", lambda self, h, r: h * r * (1 + 1e-4))
    assert_refused(exporting(ring_run, tmp_path / "out"), "load.py")
    assert not list(tmp_path.iterdir())

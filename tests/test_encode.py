"""Entities that arrive after training: the semi-inductive split, and their codes (model/encode.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from Class.codes import load_codes, load_entities
from Class.source import codes_key, fit_codes
from common.errors import InputError
from data.hold_out import hold_out
from data.knowledge_graph import KnowledgeGraph
from model import encode as encode_module
from model.checkpoint import load_checkpoint
from model.encode import (
    Method,
    batches_of,
    distinct,
    edges_of_new,
    load_graph_encoder,
    read_new,
    rounds_of,
    support_of,
)
from model.fold_in import FoldIn, Support
from model.from_codes import load_scored_codes
from model.graph_encode import GraphEncoder
from model.relational_graph import RelationalGraph
from model.RQGCN import RQGCN
from tests.conftest import FAMILY_FLAGS, Command, Outcome, Run, assert_refused, finished, ranked

ROOT = Path(__file__).resolve().parent.parent
FAMILY = ROOT / "data" / "family"

Triples = list[tuple[str, ...]]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled graph without a tenth of its entities."""
    out = tmp_path_factory.mktemp("held_out") / "part"
    hold_out(FAMILY, 0.1, 0, out)
    return out


def triples_of(file: Path) -> Triples:
    return [tuple(line.split("\t")) for line in file.read_text().splitlines()]


def test_hold_out_removes_entities_and_keeps_every_other_triple(held_out: Path) -> None:
    whole, part = KnowledgeGraph.load(FAMILY), KnowledgeGraph.load(held_out)
    new = set(whole.entities) - set(part.entities)
    assert len(new) == 100 and part.entities == [name for name in whole.entities if name not in new]
    assert part.relations == whole.relations and part.labels[0] == whole.labels[0]
    for split in ("train", "valid", "test"):
        kept = [triple for triple in triples_of(FAMILY / f"{split}.txt") if not {triple[0], triple[2]} & new]
        assert triples_of(held_out / f"{split}.txt") == kept


def test_supports_are_nested_and_disjoint_from_the_queries(held_out: Path) -> None:
    part = set(KnowledgeGraph.load(held_out).entities)
    train = set(triples_of(FAMILY / "train.txt"))
    before: dict[str, set[tuple[str, ...]]] = {}
    for count in (1, 3, 10, 10**6):
        of: dict[str, set[tuple[str, ...]]] = {}
        for triple in triples_of(held_out / f"support_{'all' if count > 10 else count}.txt"):
            ends = [name for name in (triple[0], triple[2]) if name not in part]
            assert len(ends) == 1 and triple in train  # one new and one known entity
            of.setdefault(ends[0], set()).add(triple)
        assert len(of) == 100 and max(map(len, of.values())) <= count
        for name, triples in before.items():
            assert triples <= of[name] and (len(of[name]) > len(triples) or len(triples) < count)
        before = of
    query = triples_of(held_out / "query.txt")
    assert query and not set(query) & train
    assert all(len({triple[0], triple[2]} & set(before)) == 1 for triple in query)


def test_the_graph_with_new_entities_continues_the_one_without(held_out: Path) -> None:
    part, whole = KnowledgeGraph.load(held_out), KnowledgeGraph.load(held_out / "part_with_new")
    M = part.num_entities
    assert whole.entities[:M] == part.entities and whole.entities[M:] == sorted(whole.entities[M:])
    assert (whole.train[: len(part.train)] == part.train).all() and not whole.unseen[M:].any()
    assert len(whole.test) == len(triples_of(held_out / "query.txt"))


def test_hold_out_depends_on_its_seed_only(held_out: Path, tmp_path: Path) -> None:
    hold_out(FAMILY, 0.1, 0, tmp_path / "again")
    hold_out(FAMILY, 0.1, 1, tmp_path / "other")
    for file in ("train.txt", "support_3.txt", "query.txt"):
        assert (tmp_path / "again" / file).read_bytes() == (held_out / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (held_out / file).read_bytes()


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_hold_out_refuses_fractions_that_leave_nothing(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(InputError, match="--fraction"):
        hold_out(FAMILY, fraction, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- codes of new entities


@pytest.fixture(scope="module")
def run(held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Codes of the known entities."""
    return finished(held_out, tmp_path_factory.mktemp("known"), "part_4_32_2_rq", **FAMILY_FLAGS, mask_inputs=0.1)


@pytest.fixture(scope="module")
def fold_in(run: Run) -> FoldIn:
    kg = KnowledgeGraph.load(run.dataset)
    return FoldIn(*load_scored_codes(run.checkpoint, run.codes, kg, torch.device("cpu")), kg)


def load_model(run: Run, kg: KnowledgeGraph) -> RQGCN:
    stored = load_checkpoint(run.checkpoint)
    model = RQGCN(kg.num_entities, kg.num_relations, **stored["model"])
    model.load_state_dict(stored["best"]["model"])
    return model


def graph_encoder_of(run: Run, kg: KnowledgeGraph) -> GraphEncoder:
    return GraphEncoder(load_model(run, kg), load_codes(run.codes), kg)


def encoded(rq: Command, run: Run, new: Path, out: Path, *more: str) -> Outcome:
    return rq(*run.scored(None, None, "--encode", str(new), "--encoded", str(out), *more))


def test_encode_appends_distinct_codes_and_keeps_the_known_ones(rq: Command, run: Run, tmp_path: Path) -> None:
    out, new = tmp_path / "grown.pt", run.dataset / "support_3.txt"
    outcome = encoded(rq, run, new, out)
    assert outcome.code == 0, outcome.err
    before, after = load_codes(run.codes), load_codes(out)
    M = len(before)
    assert after.dtype == torch.int64 and after[:M].numpy().tobytes() == before.numpy().tobytes()
    assert len(after) == M + 100 == len(after.flatten(1).unique(dim=0))
    names = load_entities(out.with_suffix(".entities.txt"))
    assert names == KnowledgeGraph.load(run.dataset / "part_with_new").entities
    assert torch.load(tmp_path / "grown_emd.pt", weights_only=True).shape[0] == len(names)
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["extends"] == run.record["outputs"][run.codes.name]
    assert record["encoded"]["new_entities"] == 100 and record["encoded"]["triples"] == len(triples_of(new))
    # known entities are ranked as before, to the last digit
    assert ranked(rq, run, tmp_path / "before") == ranked(rq, run, tmp_path / "after", codes=out)
    # the graph folder has the new entities: ranking, prediction, instruction data
    grown = KnowledgeGraph.load(tmp_path / "grown")
    assert grown.entities == names and len(grown.train) == len(triples_of(run.dataset / "train.txt")) + len(
        triples_of(new)
    )
    files = ["--dataset", str(tmp_path / "grown"), "--eval_codes", str(out), "--checkpoint", str(run.checkpoint)]
    assert rq(*files, "--device", "cpu").code == 0
    assert grown.labels[M] in rq(*files, "--predict", names[M], "brother").out.splitlines()[-21]
    codes, _, info = fit_codes(out, grown, tmp_path / "grown")
    base = fit_codes(run.codes, KnowledgeGraph.load(run.dataset), run.dataset)[2]
    assert (codes == after.numpy()).all() and codes_key(info) == codes_key(base)  # an adapter of these codes takes both


def test_codes_do_not_depend_on_the_batch(run: Run, fold_in: FoldIn) -> None:
    kg = KnowledgeGraph.load(run.dataset)
    edges = edges_of_new(read_new(run.dataset / "support_10.txt", kg), kg)[:400]

    for method in (fold_in, graph_encoder_of(run, kg)):

        def encode(part: np.ndarray, method: Method = method) -> torch.Tensor:
            return method.encode(support_of(part, np.unique(part[:, 0])))

        alone = [encode(edges[edges[:, 0] == entity]) for entity in np.unique(edges[:, 0])]
        assert torch.equal(torch.cat(alone), encode(edges))


def test_fold_in_ranks_better_than_other_codes(run: Run, fold_in: FoldIn) -> None:
    from benchmarks.new_entities import codes_by, rank_queries

    part, whole = KnowledgeGraph.load(run.dataset), KnowledgeGraph.load(run.dataset / "part_with_new")
    base = load_scored_codes(run.checkpoint, run.codes, part, torch.device("cpu"))
    edges = edges_of_new(read_new(run.dataset / "support_all.txt", part), part)
    books, M = base.scorer.rq_codebook, part.num_entities

    def mrr(codes: torch.Tensor) -> float:
        return rank_queries(base._replace(codes=torch.cat([base.codes, codes])), whole, whole.test, M)["mrr"]

    folded, mean = (mrr(codes_by(method, fold_in, edges)) for method in ("fold_in", "eravg"))
    assert folded > mean > mrr(books.random_codes(100, 4))


def test_entities_linked_by_new_ones_follow_in_a_later_round(rq: Command, run: Run, tmp_path: Path) -> None:
    kg, new = KnowledgeGraph.load(run.dataset), tmp_path / "new.txt"
    new.write_text(f"a\tbrother\t{kg.entities[0]}\nb\tbrother\ta\nc\tbrother\tb\nb\tsister\tb\n")
    found = read_new(new, kg)
    assert [len(part) for part in rounds_of(edges_of_new(found, kg), found, kg.num_entities)] == [1, 1, 1]
    outcome = encoded(rq, run, new, tmp_path / "out.pt")
    assert outcome.code == 0 and len(load_codes(tmp_path / "out.pt")) == kg.num_entities + 3


def test_the_encoder_pass_is_that_of_the_extended_graph(run: Run) -> None:
    """Without batch norms, whose statistics are those of the known entities, z is what a masked entity would have."""
    kg = KnowledgeGraph.load(run.dataset)
    model, M = load_model(run, kg), kg.num_entities
    model.norm = torch.nn.Identity()
    for layer in model.encoder.layers:
        layer.norm = torch.nn.Identity()
    edges = np.array([[0, 1, 3], [0, 2, 8], [0, kg.num_relations + 2, 5]])
    found = GraphEncoder(model, load_codes(run.codes), kg).vectors(support_of(edges, np.arange(1)))
    graph = RelationalGraph.from_triples(
        np.concatenate([kg.train, [[M, 1, 3], [M, 2, 8], [5, 2, M]]]), M + 1, kg.num_relations
    )
    model = model.double().eval()
    table = torch.cat([model.entity_embedding.data, torch.full((1, 48), 9.0)])
    model.entity_embedding = torch.nn.Parameter(table)
    expected = model.encode(graph, None, torch.arange(M + 1) == M).z[M:]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_encoder_pass_gives_codes(rq: Command, run: Run, tmp_path: Path) -> None:
    out, new = tmp_path / "out.pt", run.dataset / "support_3.txt"
    outcome = encoded(rq, run, new, out, "--encode_by", "encoder")
    assert outcome.code == 0 and "warning" not in outcome.out, outcome
    assert json.loads(out.with_suffix(".json").read_text())["encoded"]["method"] == "encoder"
    kg = KnowledgeGraph.load(run.dataset)
    assert len(load_codes(out)) == kg.num_entities + 100
    # it finds the codes of known entities again, since these have learned inputs: all but what collisions changed
    assert graph_encoder_of(run, kg).same_codes > 0.8


@pytest.mark.parametrize("change", [{"gcn_layers": 0}, {"init_dim": 12}])
def test_without_a_graph_encoder_of_these_entities_fold_in_is_named(run: Run, change: dict[str, int]) -> None:
    kg = KnowledgeGraph.load(run.dataset)
    stored = load_checkpoint(run.checkpoint)
    stored["model"] |= change
    base = load_scored_codes(run.checkpoint, run.codes, kg, torch.device("cpu"))
    with pytest.raises(InputError, match="--encode_by fold_in"):
        load_graph_encoder(run.checkpoint, stored, base, kg, None, read_new(run.dataset / "support_1.txt", kg))


def write_texts(folder: Path, names: list[str], rows: np.ndarray) -> Path:
    np.save(folder / "new.npy", rows)
    (folder / "new.entities.txt").write_text("".join(f"{name}\n" for name in names))
    return folder / "new.npy"


@pytest.fixture
def texts(run: Run, tmp_path: Path) -> np.ndarray:
    """Texts of the known entities [M, 16], also as text.npy."""
    rows = np.random.default_rng(0).normal(size=(KnowledgeGraph.load(run.dataset).num_entities, 16)).astype(np.float32)
    np.save(tmp_path / "text.npy", rows)
    return rows


def with_texts(rq: Command, run: Run, folder: Path, *more: str) -> Outcome:
    out, text, new = (str(folder / name) for name in ("out.pt", "text.npy", "new.npy"))
    return rq(*run.scored(None, None, "--encoded", out, "--text_emb", text, "--new_text", new, *more))


def test_an_entity_with_a_text_needs_no_triple(rq: Command, run: Run, tmp_path: Path, texts: np.ndarray) -> None:
    kg = KnowledgeGraph.load(run.dataset)
    # known names have rows too, which are not used; of the new ones, zeno has triples and no text
    write_texts(tmp_path, ["apart", kg.entities[1], "beth"], texts[[7, 1, 9]])
    new = tmp_path / "new.txt"
    new.write_text(f"zeno\tbrother\t{kg.entities[0]}\nbeth\tbrother\tapart\n")
    outcome = with_texts(rq, run, tmp_path, "--encode", str(new))
    assert outcome.code == 0, outcome.err
    codes, names = load_codes(tmp_path / "out.pt"), load_entities(tmp_path / "out.entities.txt")
    assert names[kg.num_entities :] == ["apart", "beth", "zeno"] == KnowledgeGraph.load(tmp_path / "out").entities[-3:]
    assert torch.equal(codes[-3, :, 0], codes[7, :, 0])  # the nearest by text has nearly all of the weight
    assert json.loads((tmp_path / "out.json").read_text())["encoded"]["with_text"] == 2
    assert with_texts(rq, run, tmp_path, "--overwrite").code == 0  # texts alone, without NEW.txt
    assert torch.equal(load_codes(tmp_path / "out.pt")[kg.num_entities], codes[-3])


def test_texts_move_the_center(run: Run, texts: np.ndarray) -> None:
    kg = KnowledgeGraph.load(run.dataset)
    scored = load_scored_codes(run.checkpoint, run.codes, kg, torch.device("cpu"))
    fold_in = FoldIn(*scored, kg, torch.from_numpy(texts))
    edges, rows = np.array([[0, 0, 3], [1, 0, 3]]), torch.from_numpy(texts[[7, 7]])
    rows[1] = torch.nan
    plain, moved = (fold_in.center(support_of(edges, np.arange(2), text)) for text in (None, rows))
    assert torch.equal(plain[1], moved[1])
    near = fold_in.mean_by_text(rows[:1])[0]
    assert float((moved[0] - near).norm()) < float((plain[0] - near).norm())


@pytest.mark.parametrize(
    ("names", "width", "more", "word"),
    [
        (["new"], 15, [], "width 15"),
        (["known"], 16, [], "exist already"),
        (["new", "new"], 16, [], "distinct"),
        (["new"], 16, ["--encode_by", "encoder", "--encode", "{}"], "'other'"),
    ],
)
def test_bad_texts_are_refused_and_nothing_is_written(
    rq: Command, run: Run, tmp_path: Path, texts: np.ndarray, names: list[str], width: int, more: list[str], word: str
) -> None:
    (tmp_path / "in").mkdir()
    shutil.move(tmp_path / "text.npy", tmp_path / "in" / "text.npy")
    known = KnowledgeGraph.load(run.dataset).entities[0]
    names = [known if name == "known" else name for name in names]
    write_texts(tmp_path / "in", names, np.ones((len(names), width), dtype=np.float32))
    (tmp_path / "in" / "new.txt").write_text("other\tbrother\tnew\n")
    more = [word.format(tmp_path / "in" / "new.txt") for word in more]
    assert_refused(with_texts(rq, run, tmp_path / "in", *more), word)
    assert not list((tmp_path / "in").glob("out*"))


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("new\tno_relation\t{0}", "no_relation"),
        ("{0}\tbrother\t{1}", "already"),
        ("new\tbrother\tother", "'new'"),
        ("new\tbrother", ":2"),
        ("first\tbrother\t{0}", "line 1"),
    ],
)
def test_bad_triples_are_refused_and_nothing_is_written(
    rq: Command, run: Run, tmp_path: Path, line: str, word: str
) -> None:
    known, new = KnowledgeGraph.load(run.dataset).entities, tmp_path / "new.txt"
    new.write_text(f"first\tbrother\t{known[0]}\n" + line.format(*known) + "\n")
    assert_refused(encoded(rq, run, new, tmp_path / "out" / "codes.pt"), word)
    assert not (tmp_path / "out").exists()


def test_queries_that_were_encoded_are_not_ranked(rq: Command, run: Run, tmp_path: Path) -> None:
    out, new = tmp_path / "out.pt", run.dataset / "query.txt"
    assert encoded(rq, run, new, out).code == 0
    other = tmp_path / "other"  # a graph with the same entities, in which encoded triples are test triples
    shutil.copytree(tmp_path / "out", other)
    (other / "test.txt").write_text("".join("\t".join(triple) + "\n" for triple in triples_of(new)[:9]))
    (other / "train.txt").write_text((run.dataset / "train.txt").read_text())
    scored = ["--dataset", str(other), "--eval_codes", str(out), "--checkpoint", str(run.checkpoint)]
    assert_refused(rq(*scored, "--device", "cpu"), "9 of the 9")


def test_a_stopped_run_continues(rq: Command, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = run.dataset / "support_3.txt"
    monkeypatch.setattr(encode_module, "BATCH_EDGES", 64)
    monkeypatch.setattr(encode_module, "SAVE_SECONDS", 0)
    whole, calls, encode = tmp_path / "whole.pt", list[int](), FoldIn.encode
    assert encoded(rq, run, new, whole).code == 0

    def stopping(self: FoldIn, support: Support) -> torch.Tensor:
        calls.append(len(support.entity))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, support)

    monkeypatch.setattr(FoldIn, "encode", stopping)
    out = tmp_path / "out.pt"
    assert encoded(rq, run, new, out).code == 130 and not out.exists()
    assert "continuing" in encoded(rq, run, new, out).out
    assert torch.equal(load_codes(out), load_codes(whole)) and not list(tmp_path.glob("*.part"))
    kg = KnowledgeGraph.load(run.dataset)
    assert len(calls) == 1 + len(batches_of(edges_of_new(read_new(new, kg), kg)))  # what was done is not done again


def test_distinct_changes_new_codes_only(fold_in: FoldIn) -> None:
    known = fold_in.codes
    codes, changed = distinct(fold_in.codebook, known, known[:5])
    assert (
        changed == 5
        and len(torch.cat([known, codes]).flatten(1).unique(dim=0)) == len(known.flatten(1).unique(dim=0)) + 5
    )
    assert torch.equal(codes[..., :-1], known[:5, :, :-1])  # last-level codes are changed

"""Several scorers of the same integers, and learning from what trained models answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import model.teacher as teacher_module
import numpy as np
import pytest
import torch
from model.ensemble import JointScorer
from model.teacher import Trained, ask, trained_model

import run_rq
from common.files import load_torch, save_torch
from data.knowledge_graph import KnowledgeGraph, with_inverse
from model.RQGCN import CodeScorer
from model.trainer import Phase
from tests.conftest import (
    CODE_DIM,
    FAMILY_FLAGS,
    RING,
    ROOT,
    Command,
    K,
    L,
    M,
    Q,
    R,
    Run,
    TrainerMaker,
    assert_refused,
    finished,
    small_flags,
)  # fmt: skip


@pytest.fixture(scope="module")
def other(ring_run: Run, ring: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Another scorer of the ring's codes, by another decoder of another width."""
    folder = tmp_path_factory.mktemp("other")
    changes = {"gcn_layers": 0, "init_dim": 16, "decoder": "complex", "seed": 3}
    return finished(ring, folder, "second", codes_from=ring_run.codes, name="second", **changes)


def both(one: Run, two: Run) -> list[str]:
    return ["--checkpoint", str(one.checkpoint), str(two.checkpoint)]


# ---------------------------------------------------------------- given codes


def test_a_scorer_of_given_codes_leaves_them_alone(other: Run, ring_run: Run) -> None:
    given = load_torch(ring_run.codes, "codes")
    best = load_torch(other.checkpoint, "checkpoint")["best"]
    assert torch.equal(best["codes"], given.long())
    (only,) = (other.folder / "codes").iterdir()
    assert only.name == "second.json"
    assert other.record["args"]["codes_from"] == str(ring_run.codes)
    assert {row["phase"] for row in other.record["history"]} == {"frozen"}


def test_its_record_is_what_the_given_file_ranks(rq: Command, other: Run, ring_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "metrics.json"
    found = rq(*other.scored(ring_run.codes, None, "--metrics_out", str(out)))
    assert found.code == 0 and "warning" not in found.err, found.err
    assert json.loads(out.read_text()) == other.record["test"]
    assert other.record["test"] != ring_run.record["test"]
    shuffled = rq(*other.scored(ring_run.codes, None, "--metrics_out", str(out), "--shuffle_codes", "--seed", "3"))
    assert shuffled.code == 0 and json.loads(out.read_text()) == other.record["test_shuffled_codes"]


def test_given_codes_learn_the_graph_and_wrong_ones_do_not(family_run: Run, tmp_path: Path) -> None:
    """The same scorer for the family's codes and for the same codes given to the wrong entities."""
    codes = load_torch(family_run.codes, "codes")
    wrong = tmp_path / "wrong.pt"
    torch.save(codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))], wrong)
    flags = FAMILY_FLAGS | {"gcn_layers": 0, "epoch": 4}
    mrr = [
        finished(family_run.dataset, tmp_path / name, name, codes_from=path, name=name, **flags).record["test"]["mrr"]
        for name, path in (("right", family_run.codes), ("wrong", wrong))
    ]
    assert mrr[0] > 0.2 > 3 * mrr[1], mrr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seq_len": L + 1}, ["[L, Q] = [3, 2]", "--seq_len 3 --num_quantizers 2"]),
        ({"num_code": K // 2}, ["codes", "0..3"]),
        ({"control": "posthoc"}, ["--codes_from", "--control"]),
        ({"codes_from": "missing.pt"}, ["missing.pt"]),
    ],
    ids=["length", "range", "control", "missing"],
)
def test_codes_that_do_not_fit_are_refused(
    rq: Command, ring: Path, ring_run: Run, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    found = rq(*small_flags(ring, tmp_path, **({"codes_from": ring_run.codes} | changes)))
    assert_refused(found, *words)
    assert not (tmp_path / "codes").exists()


def test_the_number_of_levels_is_the_given_codes(rq: Command, ring: Path, ring_run: Run, tmp_path: Path) -> None:
    found = rq(*small_flags(ring, tmp_path, codes_from=ring_run.codes, num_quantizers="auto", name="own", epoch=1))
    assert found.code == 0, found.err
    assert json.loads((tmp_path / "codes" / "own.json").read_text())["args"]["num_quantizers"] == Q


def test_what_a_run_rests_on_is_not_written_over(rq: Command, ring: Path, tmp_path: Path) -> None:
    """Neither the given codes' record nor a teacher, though --overwrite may take any other run's place."""
    run = finished(ring, tmp_path, RING, epoch=2)
    before = [path.read_bytes() for path in (run.codes.with_suffix(".json"), run.checkpoint)]
    flags = [*run.flags, "--name", RING, "--overwrite"]
    assert_refused(rq(*flags, "--codes_from", str(run.codes)), "--codes_from", "another --name")
    assert_refused(rq(*flags, "--teacher", str(run.checkpoint)), "--teacher", "another --name")
    assert before == [path.read_bytes() for path in (run.codes.with_suffix(".json"), run.checkpoint)]
    beside = [*small_flags(ring, tmp_path, checkpoint_dir=run.codes.parent, codes_from=run.codes, name=run.codes.stem,
                           out_dir=tmp_path / "elsewhere"), "--overwrite"]  # fmt: skip
    codes = run.codes.read_bytes()
    assert_refused(rq(*beside), "is where this run's checkpoint goes", "another --name")
    assert run.codes.read_bytes() == codes


def test_what_learned_from_other_facts_is_refused(rq: Command, ring: Path, ring_run: Run, tmp_path: Path) -> None:
    """The same graph with its test triples in training: its codes, its answers and its scorer know them."""
    leaky = tmp_path / "leaky" / ring.name
    shutil.copytree(ring, leaky)
    with open(leaky / "train.txt", "a") as file:
        file.write((ring / "test.txt").read_text())
    run = finished(leaky, tmp_path / "knows", RING, epoch=2)
    flags = small_flags(ring, tmp_path / "honest", name="honest", epoch=2)
    words = ("was trained on other triples than", "test facts", "data set of its run")
    assert_refused(rq(*flags, "--codes_from", str(run.codes)), "--codes_from", *words)
    assert_refused(rq(*flags, "--teacher", str(run.checkpoint)), "--teacher", *words)
    assert_refused(rq(*ring_run.scored(run.codes, run.checkpoint)), "--checkpoint", *words)
    same = tmp_path / "copy" / ring.name
    shutil.copytree(ring, same)
    (same / "train.txt").write_bytes((ring / "train.txt").read_bytes().replace(b"\n", b"\r\n"))
    found = rq(*small_flags(same, tmp_path / "same", name="same", epoch=1, codes_from=ring_run.codes))
    assert found.code == 0 and "warning" not in found.err, "the same triples in another form"
    stored = load_torch(ring_run.checkpoint, "checkpoint")
    del stored["trained_on"]
    save_torch(stored, tmp_path / "before.pt")
    flags = ["--dataset", str(same), "--eval_codes", str(ring_run.codes), "--checkpoint", str(tmp_path / "before.pt")]
    found = rq(*flags, "--device", "cpu")
    assert found.code == 0 and "or on another form of them" in found.err, "files of before hold no more than hashes"


# ---------------------------------------------------------------- several scorers


def test_a_joint_score_is_the_sum() -> None:
    torch.manual_seed(0)
    scorers = [CodeScorer(L, K, Q, CODE_DIM, dim, name).eval() for dim, name in ((12, "conve"), (8, "complex"))]
    codes = torch.randint(K, (M, L, Q))
    relations = [torch.randn(2 * R, 12), torch.randn(2 * R, 8)]
    heads, rels = torch.arange(5), torch.tensor([0, 5, 3, 3, 1])
    joint = JointScorer(scorers).eval()
    with torch.no_grad():
        expected = torch.zeros(5, M)
        for scorer, v in zip(scorers, relations, strict=True):
            e = scorer.entity_vectors_from_codes(codes, levels=1)
            expected += scorer.scores(e[heads], v[rels], e)
        e = joint.entity_vectors_from_codes(codes, levels=1)
        found = joint.scores(e[heads], torch.cat(relations, dim=1)[rels], e)
    torch.testing.assert_close(found, expected)
    assert joint.rq_codebook is scorers[0].rq_codebook


def test_a_scorer_twice_ranks_as_once(rq: Command, family_run: Run, tmp_path: Path) -> None:
    """Twice the scores are the same order, up to the rounding of a sum over twice the width."""
    out = tmp_path / "metrics.json"
    found = rq(*family_run.scored(), *both(family_run, family_run), "--metrics_out", str(out))
    assert found.code == 0, found.err
    for key in ("mrr", "hits@1", "hits@3", "hits@10"):
        assert json.loads(out.read_text())[key] == pytest.approx(family_run.record["test"][key], abs=1e-4)


def test_two_scorers_rank_by_the_sum_of_their_scores(
    rq: Command, other: Run, ring_run: Run, ring_kg: KnowledgeGraph, tmp_path: Path
) -> None:
    out = tmp_path / "metrics.json"
    found = rq(*ring_run.scored(), *both(ring_run, other), "--metrics_out", str(out))
    assert found.code == 0 and "warning" not in found.err, found.err
    codes = load_torch(ring_run.codes, "codes").long()
    scores = torch.zeros(2 * len(ring_kg.test), M)
    triples = torch.from_numpy(with_inverse(ring_kg.test, ring_kg.num_relations))
    for run in (ring_run, other):
        stored = load_torch(run.checkpoint, "checkpoint")
        one = trained_model(stored["config"], stored["best"], ring_kg, None, "cpu")
        with torch.no_grad():
            assert torch.equal(stored["best"]["codes"], codes)
            scores += one.decoder.eval()(one.entities[triples[:, 0]], one.relations[triples[:, 1]], one.entities)
    facts: dict[tuple[int, int], set[int]] = {}
    for split in ("train", "valid", "test"):
        for h, r, t in with_inverse(ring_kg.split(split), ring_kg.num_relations).tolist():
            facts.setdefault((h, r), set()).add(t)
    ranks = []
    for row, (h, r, t) in zip(scores.tolist(), triples.tolist(), strict=True):
        rivals = [row[e] for e in range(M) if e == t or e not in facts[h, r]]
        higher, equal = sum(x > row[t] for x in rivals), sum(x == row[t] for x in rivals)
        ranks.append(higher + (equal + 1) / 2)
    assert json.loads(out.read_text())["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]), abs=1e-6)


def test_candidates_and_predictions_come_from_all_scorers(
    rq: Command, other: Run, ring_run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "candidates.json"
    joint = [*ring_run.scored(), *both(ring_run, other)]
    found = rq(*joint, "--export_candidates", str(out), "--top", "5")
    assert found.code == 0, found.err
    info = json.loads(out.read_text())["info"]
    assert info["model"] == f"{ring_run.checkpoint.name} + {other.checkpoint.name}"
    lines = [rq(*words, "--predict", "Entity 3", "next", "--top", "1").out for words in (joint, ring_run.scored())]
    assert "Entity" in lines[0] and lines[0] != lines[1], "the sum of scores is another score"


def test_scorers_of_other_sizes_are_refused(rq: Command, ring: Path, ring_run: Run, tmp_path: Path) -> None:
    wider = finished(ring, tmp_path, "ring_3_16_2_rq", num_code=16, epoch=2)
    assert_refused(rq(*ring_run.scored(), *both(ring_run, wider)), "16 codes a level", "same codes")
    foreign = finished(ring, tmp_path / "foreign", RING, seed=5, epoch=2)
    found = rq(*ring_run.scored(), *both(ring_run, foreign))
    assert found.code == 0 and "are not the codes of" in found.err


# ---------------------------------------------------------------- a teacher


def models_of(run: Run, kg: KnowledgeGraph) -> Trained:
    stored = load_torch(run.checkpoint, "checkpoint")
    return trained_model(stored["config"], stored["best"], kg, None, "cpu")


def test_a_teachers_answers_are_the_best_of_the_mean_score(ring_run: Run, other: Run, ring_kg: KnowledgeGraph) -> None:
    models = [models_of(ring_run, ring_kg), models_of(other, ring_kg)]
    heads, rels = torch.arange(7), torch.tensor([0, 1, 2, 3, 4, 5, 0])
    teacher = ask(models, heads, rels, weight=0.4, top=6, batch=3)
    with torch.no_grad():
        mean = sum(m.decoder(m.entities[heads], m.relations[rels], m.entities) for m in models) / 2
    best = mean.topk(6, dim=1)
    assert torch.equal(teacher.entities.long(), best.indices)
    torch.testing.assert_close(teacher.mass, torch.softmax(best.values, 1))
    soft = teacher.answers(torch.tensor([4, 2]))
    assert soft.weight == 0.4 and soft.rows.tolist() == [0] * 6 + [1] * 6
    assert torch.equal(soft.columns, best.indices[[4, 2]].flatten())
    torch.testing.assert_close(torch.zeros(2).index_add_(0, soft.rows, soft.mass), torch.ones(2))


def test_a_large_graphs_scores_are_asked_for_in_parts(
    ring_run: Run, ring_kg: KnowledgeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models_of(ring_run, ring_kg)
    query, sizes = model.decoder.query, list[int]()

    def counted(q_h: torch.Tensor, v_r: torch.Tensor) -> torch.Tensor:
        sizes.append(len(q_h))
        return query(q_h, v_r)

    monkeypatch.setattr(model.decoder, "query", counted)
    heads, rels = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    whole = ask([model], heads, rels, 1.0)
    monkeypatch.setattr(teacher_module, "SCORES_AT_ONCE", 3 * M)
    parts = ask([model], heads, rels, 1.0)
    assert sizes == [8, 3, 3, 2]
    torch.testing.assert_close(parts.mass, whole.mass)


def test_an_unquantized_teacher_answers_by_its_vectors(ring: Path, ring_kg: KnowledgeGraph, tmp_path: Path) -> None:
    run = finished(ring, tmp_path, "ring_3_8_2_rq_unquantized", control="unquantized", epoch=2)
    stored = load_torch(run.checkpoint, "checkpoint")
    assert stored["best"]["codes"] is None
    model = models_of(run, ring_kg)
    found = ask([model], torch.arange(M), torch.zeros(M, dtype=torch.int64), 1.0, top=1).entities.flatten()
    assert len(found.unique()) > 5, "one answer for all: these are no vectors of entities"
    assert len(model.entities.unique(dim=0)) == M


def test_a_teacher_without_weight_changes_nothing(
    trainer_of: TrainerMaker, ring_run: Run, ring_kg: KnowledgeGraph
) -> None:
    """Weight 0: the gradients of the plain loss, to the last bit; weight 1: others."""
    found = {}
    for weight in (None, 0.0, 1.0):
        trainer = trainer_of(teacher_weight=weight or 0.0)
        if weight is not None:
            trainer.teacher = ask([models_of(ring_run, ring_kg)], trainer.heads, trainer.rels, weight)
        phase = Phase(0.0, "warm-up")
        trainer.model.train()
        trainer._start_epoch(phase)
        trainer.model.zero_grad()
        torch.manual_seed(0)
        found[weight] = trainer._scorer_step(torch.arange(0, 40, 3), phase)[2]
    assert torch.equal(found[0.0], found[None])
    assert not torch.allclose(found[1.0], found[None], atol=1e-4)


def test_a_student_comes_near_its_teacher(family_run: Run, family: KnowledgeGraph, tmp_path: Path) -> None:
    """By its teacher's answers alone, a student agrees with them more than one that sees the true tails alone."""
    flags = FAMILY_FLAGS | {"gcn_layers": 0, "epoch": 3, "codes_from": family_run.codes, "seed": 4}
    teacher = models_of(family_run, family)
    triples = torch.from_numpy(with_inverse(family.valid, family.num_relations))

    @torch.no_grad()
    def law(model: Trained) -> torch.Tensor:
        scores = model.decoder.eval()(model.entities[triples[:, 0]], model.relations[triples[:, 1]], model.entities)
        return torch.log_softmax(scores, 1)

    apart = {}
    for name, more in (("alone", {}), ("taught", {"teacher": family_run.checkpoint, "teacher_weight": 1.0})):
        run = finished(family_run.dataset, tmp_path / name, name, name=name, **flags, **more)
        of_teacher = law(teacher)
        apart[name] = float((of_teacher.exp() * (of_teacher - law(models_of(run, family)))).sum(1).mean())
        if more:
            assert run.record["inputs"]["teacher 1"] and run.record["args"]["teacher"] == str(family_run.checkpoint)
    assert apart["taught"] < 0.8 * apart["alone"], apart


def test_a_taught_run_continues_to_the_same_bits(
    ring: Path, ring_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"teacher": ring_run.checkpoint, "lr_schedule": "constant", "freeze_at": 1.0}
    whole = finished(ring, tmp_path / "whole", RING, epoch=4, **changes)
    half = finished(ring, tmp_path / "half", RING, epoch=2, **changes)
    run_rq.train(run_rq.parse_config([*small_flags(ring, tmp_path / "half", epoch=4, **changes), "--restore"]))
    one, two = (load_torch(run.checkpoint, "checkpoint")["last"]["model"] for run in (whole, half))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    monkeypatch.delattr(run_rq, "load_teachers")  # what is only dumped needs no answers
    again = [*small_flags(ring, tmp_path / "half", epoch=4, **changes), "--restore", "--dump_only"]
    run_rq.train(run_rq.parse_config(again))


def test_a_teacher_of_mixed_widths_is_refused(rq: Command, ring: Path, ring_run: Run, tmp_path: Path) -> None:
    stored = load_torch(ring_run.checkpoint, "checkpoint")
    stored["best"]["relations"] = torch.zeros(2 * R, 13)
    torch.save(stored, tmp_path / "mixed.pt")
    assert_refused(rq(*small_flags(ring, tmp_path, teacher=tmp_path / "mixed.pt")), "mixed.pt", "differ in width")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "bce"}, ["--teacher", "--loss ce"]),
        ({"num_negatives": 5}, ["--teacher", "--num_negatives"]),
        ({"teacher_weight": 1.5}, ["--teacher_weight 1.5", "0 to 1"]),
        ({"dataset": ROOT / "data" / "family"}, ["--teacher", "43 entities"]),
        ({"teacher": "missing.pt"}, ["missing.pt"]),
    ],
    ids=["bce", "negatives", "weight", "graph", "missing"],
)
def test_teachers_that_do_not_fit_are_refused(
    rq: Command, ring: Path, ring_run: Run, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    flags = {"teacher": ring_run.checkpoint} | changes
    found = rq(*small_flags(flags.pop("dataset", ring), tmp_path, **flags))
    assert_refused(found, *words)
    assert not (tmp_path / "codes").exists()


def test_a_teacher_that_starts_from_text_needs_it(rq: Command, ring: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.npy"
    np.save(text, np.random.default_rng(0).normal(size=(M, 5)).astype(np.float32))
    words = small_flags(ring, tmp_path / "teacher", control="unquantized", text_emb=text, epoch=2)
    run_rq.train(run_rq.parse_config([*words, "--text_init"]))
    path = tmp_path / "teacher" / "checkpoints" / "ring_3_8_2_rq_unquantized.pt"
    assert_refused(rq(*small_flags(ring, tmp_path, teacher=path, epoch=2)), "--teacher", "text")
    found = rq(*small_flags(ring, tmp_path, teacher=path, epoch=2, text_emb=text))
    assert found.code == 0, found.err

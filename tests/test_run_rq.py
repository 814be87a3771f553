"""run_rq.py end to end: the files it leaves, ranking from the integers alone, what it continues and what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import run_rq
from common.config import AUTO, BASELINES, Config, build_parser
from common.errors import InputError
from common.files import load_torch, save_torch
from data.knowledge_graph import KnowledgeGraph, with_inverse
from model import inputs
from model.checkpoint import fault_of
from model.from_codes import load_scored_codes
from model.sizes import N3_WEIGHTS, explain_oom, sizes_for, smaller_model, with_sizes
from model.trainer import Trainer
from tests.conftest import (
    CODE_DIM,
    RING,
    ROOT,
    Command,
    K,
    L,
    M,
    Q,
    R,
    Run,
    assert_refused,
    finished,
    ranked,
    small_flags,
)  # fmt: skip


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize(
    ("changes", "stem", "shape"),
    [
        ({}, RING, (M, L, Q)),
        ({"num_quantizers": 1}, "ring_3_8_1_rq", (M, L, 1)),
        ({"quantizer": "vq"}, "ring_3_8", (M, L)),
    ],
    ids=["rq", "rq of one level", "vq"],
)
def test_a_run_writes_four_files_of_the_promised_names_and_forms(
    rq: Command, ring: Path, tmp_path: Path, changes: dict[str, Any], stem: str, shape: tuple[int, ...]
) -> None:
    outcome = rq(*small_flags(ring, tmp_path, **changes))
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "codes"
    assert {path.name for path in folder.iterdir()} == {
        f"{stem}.pt", f"{stem}_emd.pt", f"{stem}.entities.txt", f"{stem}.json"
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"{stem}.pt"}
    codes = torch.load(folder / f"{stem}.pt", weights_only=True)
    assert codes.dtype == torch.int64 and codes.shape == shape and codes.is_contiguous()
    assert int(codes.min()) >= 0 and int(codes.max()) < K
    embeddings = torch.load(folder / f"{stem}_emd.pt", weights_only=True)
    assert embeddings.dtype == torch.float32 and embeddings.shape == (M, L, CODE_DIM) and embeddings.is_contiguous()
    best = torch.load(tmp_path / "checkpoints" / f"{stem}.pt", weights_only=True)["best"]
    books = [best["model"][f"scorer.rq_codebook.codebooks.{q}.weight"] for q in range(codes.view(M, L, -1).shape[2])]
    levels = codes.view(M, L, -1).unbind(-1)
    by_hand = sum(book[level] for book, level in zip(books, levels, strict=True))
    torch.testing.assert_close(embeddings, by_hand)
    assert torch.equal(codes.view(M, L, -1), best["codes"])
    assert (folder / f"{stem}.entities.txt").read_text() == "".join(f"e{i}\n" for i in range(M))

    assert (
        ranked(rq, Run(ring, tmp_path, stem, []), tmp_path) == json.loads((folder / f"{stem}.json").read_text())["test"]
    )


def test_the_record_holds_what_a_reader_needs(ring_run: Run, ring: Path) -> None:
    record = ring_run.record
    assert record["seed"] == 0 and record["args"]["seq_len"] == L and record["args"]["lr"] == 0.01
    assert record["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", record["git_commit"])
    assert record["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"cpu \(\d+ threads?, [\w ]+\)", record["device"])
    read = {path.name: sha256(path) for path in ring.iterdir()}
    assert record["inputs"] == read
    outputs = {path.name: sha256(path) for path in ring_run.codes.parent.iterdir() if path.suffix != ".json"}
    assert record["outputs"] == outputs
    assert 0 < record["wall_seconds"] < 600 and 50 < record["peak_memory_mb"] < 2**16
    for split in ("valid", "test"):
        for part in (record[split], record[split]["head"], record[split]["tail"]):
            assert part["hits@1"] + part["mrr"] > 0 and part["hits@1"] <= part["mrr"] <= part["hits@10"] + 0.1
            assert part["hits@1"] <= part["hits@3"] <= part["hits@10"] <= 1 <= part["mr"] <= M
        assert record[split]["count"] == 24 == 2 * record[split]["head"]["count"]
        assert record[split]["mrr"] == pytest.approx((record[split]["head"]["mrr"] + record[split]["tail"]["mrr"]) / 2)
    assert len(record["history"]) == 4 == record["epochs"] and 2 <= record["best_epoch"] <= 4
    assert record["epochs_codes_phase"] == [row["phase"] for row in record["history"]].count("codes") == 2
    assert record["bits_per_entity"] == L * Q * math.log2(K)
    kept = load_torch(ring_run.checkpoint, "checkpoint")["best"]
    scorer = sum(value.numel() for name, value in kept["model"].items() if name.startswith("scorer.")
                 and value.is_floating_point() and "ema_count" not in name)  # fmt: skip
    assert record["parameters"]["behind_codes"] == scorer + kept["relations"].numel()


def test_the_record_counts_the_codes_of_the_file(ring_run: Run) -> None:
    codes = torch.load(ring_run.codes, weights_only=True).numpy()
    found = ring_run.record["codes"]
    for q in range(Q):
        counts = np.bincount(codes[..., q].ravel(), minlength=K) / (M * L)
        seen = counts[counts > 0]
        assert found["perplexity"][q] == pytest.approx(np.exp(-(seen * np.log(seen)).sum()))
    shared: dict[bytes, int] = defaultdict(int)
    for row in codes:
        shared[row.tobytes()] += 1
    assert found["collisions"] == sum(n for n in shared.values() if n > 1)
    share = np.array(list(shared.values())) / M
    assert found["entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum())


def test_split_valid_leaves_the_test_split_out(rq: Command, ring: Path, tmp_path: Path) -> None:
    outcome = rq(*small_flags(ring, tmp_path), "--split", "valid")
    assert outcome.code == 0
    record = json.loads((tmp_path / "codes" / f"{RING}.json").read_text())
    assert "valid" in record and not [key for key in record if key.startswith("test")]
    assert "test from" not in outcome.out


def test_default_folders_lie_in_the_repository_and_given_ones_at_the_caller(
    rq: Command, ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, caller = tmp_path / "repository", tmp_path / "caller"
    caller.mkdir()
    monkeypatch.setattr(run_rq, "ROOT", repository)
    monkeypatch.chdir(caller)
    flags = small_flags(ring, tmp_path)
    for flag in ("--out_dir", "--checkpoint_dir"):
        at = flags.index(flag)
        del flags[at : at + 2]
    flags[flags.index("--dataset") + 1] = os.path.relpath(ring, caller)
    assert rq(*flags).code == 0
    assert (repository / "codes_new" / f"{RING}.pt").exists()
    assert (repository / "checkpoints" / f"{RING}.pt").exists()
    assert not list(caller.iterdir())
    assert rq(*flags, "--out_dir", "here", "--checkpoint_dir", "there", "--name", "mine").code == 0
    assert (caller / "here" / f"{RING}.pt").exists() and (caller / "there" / "mine.pt").exists()
    assert rq(*flags, "--out_dir", "here", "--checkpoint_dir", "there", "--name", "../up").code == 2
    assert rq(*flags, "--out_dir", "one", "--checkpoint_dir", "one").code == 0  # one folder for both: two names
    assert (caller / "one" / f"{RING}.pt").exists() and (caller / "one" / f"{RING}_checkpoint.pt").exists()


# ---------------------------------------------------------------- the integers alone


def by_hand_mrr(run: Run, kg: KnowledgeGraph, split: str) -> tuple[float, float, float]:
    """Filtered MRR from the dumped integers, in float64 numpy loops: (lowest, MRR, highest).

    DistMult over q_e = W_q [x_q1 ... x_qL]; entities of one code tie. Lowest and highest turn every comparison that
    float32 could decide either way against or for the target.
    """
    codes = torch.load(run.codes, weights_only=True).numpy()
    best = torch.load(run.checkpoint, weights_only=True)["best"]
    weights = {name: value.double().numpy() for name, value in best["model"].items() if name.startswith("scorer.")}
    books = [weights[f"scorer.rq_codebook.codebooks.{q}.weight"] for q in range(codes.shape[2])]
    x = np.zeros((*codes.shape[:2], books[0].shape[1]))
    for q, book in enumerate(books):
        x += book[codes[..., q]]
    W_q = weights.get("scorer.W_q.weight", np.eye(x[0].size))
    q_all = x.reshape(len(codes), -1) @ W_q.T
    relations = best["relations"].double().numpy()
    known = defaultdict(set)
    for name in ("train", "valid", "test"):
        for h, r, t in kg.split(name).tolist():
            known[h, r].add(t)
            known[t, r + kg.num_relations].add(h)
    reciprocal = []
    for h, r, t in kg.split(split).tolist():
        for head, relation, tail in ((h, r, t), (t, r + kg.num_relations, h)):
            scores = q_all @ (q_all[head] * relations[relation])
            others = np.array([e for e in range(len(codes)) if e == tail or e not in known[head, relation]])
            others = others[others != tail]
            ties = (codes[others] == codes[tail]).all(axis=(1, 2))
            gap = scores[others[~ties]] - scores[tail]
            slack = 1e-5 * np.abs(scores).max()
            place = 1 + ties.sum() / 2
            reciprocal.append([1 / (place + (gap > bar).sum()) for bar in (-slack, 0, slack)])
    return tuple(np.mean(reciprocal, axis=0).tolist())


def assert_equals_by_hand(run: Run, kg: KnowledgeGraph, split: str) -> None:
    low, mrr, high = by_hand_mrr(run, kg, split)
    found = run.record[split]["mrr"]
    assert low - 1e-6 <= found <= high + 1e-6
    assert found == pytest.approx(mrr, abs=1e-6 if high - low < 1e-6 else high - low)
    assert high - low < 2e-3


def test_the_integers_alone_carry_the_graph(
    ring_run: Run, ring_kg: KnowledgeGraph, family_run: Run, family: KnowledgeGraph
) -> None:
    for split in ("valid", "test"):
        assert_equals_by_hand(ring_run, ring_kg, split)
    assert family_run.record["test"]["mrr"] > 0.3
    assert_equals_by_hand(family_run, family, "test")


def test_no_two_entities_of_a_dump_share_their_code(family_run: Run, ring_run: Run) -> None:
    """Few codes for many entities collide in training; the pass at the dump makes codes distinct, and is recorded."""
    for run in (family_run, ring_run):
        codes = torch.load(run.codes, weights_only=True)
        assert len(torch.unique(codes.flatten(1), dim=0)) == len(codes)
        assert run.record["codes"]["collisions"] == 0
        assert run.record["codes"]["entropy_bits"] == pytest.approx(math.log2(len(codes)))
    before = family_run.record["mrr_before_collision_pass"]
    history = {row["epoch"]: row["valid"]["mrr"] for row in family_run.record["history"] if "valid" in row}
    assert before == history[family_run.record["best_epoch"]] != family_run.record["valid"]["mrr"]


@pytest.mark.parametrize(("quantizer", "name"), BASELINES.items())
def test_baselines_leave_a_record_and_no_codes(
    rq: Command, ring: Path, tmp_path: Path, quantizer: str, name: str
) -> None:
    found = rq(*small_flags(ring, tmp_path, quantizer=quantizer))
    assert found.code == 0, found.err
    (only,) = (tmp_path / "codes").iterdir()
    assert only.name.endswith(f"_{name}.json")
    record = json.loads(only.read_text())
    assert record["control"] == name and 0 < record["test"]["mrr"] <= 1 and record["epochs_codes_phase"] == 0


def test_one_entity_is_one_line(rq: Command, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("a\tlikes\ta\n")
    assert_refused(rq("--dataset", str(tmp_path), "--device", "cpu", "--out_dir", str(tmp_path / "out")))


def test_a_peak_is_that_of_the_process_alone() -> None:
    """Linux keeps ru_maxrss over exec: a small process started by a large one would have the large one's peak."""
    child = "from common.device import peak_memory_mb; print(peak_memory_mb())"
    parent = f"""
import subprocess, sys
block = bytearray(400 * 2**20)
block[::4096] = b"1" * len(block[::4096])
subprocess.run([sys.executable, "-c", {child!r}], check=True, close_fds=False)
from common.device import peak_memory_mb
print(peak_memory_mb())
"""
    found = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    small, large = map(float, found.split())
    assert small < 200 and 400 < large < 900


def test_entities_of_one_code_tie_to_the_last_bit(family_run: Run, family: KnowledgeGraph) -> None:
    """The stated tie rule is for equal scores: a matrix product must give equal rows equal scores."""
    scorer, relations, codes = load_scored_codes(family_run.checkpoint, family_run.codes, family, torch.device("cpu"))
    codes[:500:9] = codes[500:][: len(codes[:500:9])]  # the collision pass left none
    whole, inverse, counts = torch.unique(codes.flatten(1), dim=0, return_inverse=True, return_counts=True)
    first = torch.full((len(whole),), len(codes)).scatter_reduce_(0, inverse, torch.arange(len(codes)), "amin")[inverse]
    assert int((counts > 1).sum()) > 10
    with torch.no_grad():
        q_all = scorer.entity_vectors_from_codes(codes)
        assert torch.equal(q_all, q_all[first])
        triples = with_inverse(family.test, family.num_relations)
        for size in (len(triples), 257, 31, 1):
            heads, rels = torch.from_numpy(triples[:size, 0]), torch.from_numpy(triples[:size, 1])
            scores = scorer.scores(q_all[heads], relations[rels], q_all)
            assert torch.equal(scores, scores[:, first]), size


@pytest.mark.parametrize("split", ["valid", "test"])
def test_eval_codes_gives_the_recorded_metrics(rq: Command, family_run: Run, tmp_path: Path, split: str) -> None:
    assert ranked(rq, family_run, tmp_path / "new", "--split", split) == family_run.record[split]


def without_rows(value: Any, rows: int) -> tuple[Any, int]:
    """The same containers without tensors of ``rows`` rows, and how many were taken out."""
    if isinstance(value, dict):
        kept, gone = {}, 0
        for key, item in value.items():
            if isinstance(item, torch.Tensor) and item.dim() and len(item) == rows:
                gone += 1
            else:
                kept[key], inner = without_rows(item, rows)
                gone += inner
        return kept, gone
    if isinstance(value, list):
        pairs = [without_rows(item, rows) for item in value]
        return [item for item, _ in pairs], sum(n for _, n in pairs)
    return value, 0


def test_ranking_needs_nothing_that_is_indexed_by_entities(rq: Command, ring_run: Run, tmp_path: Path) -> None:
    stored, gone = without_rows(load_torch(ring_run.checkpoint, "checkpoint"), M)
    # entity_embedding of last and best, its two Adam moments, the codes of last and best
    assert gone == 6
    assert "codes" not in stored["best"] and "entity_embedding" not in stored["best"]["model"]
    torch.save(stored, tmp_path / "small.pt")
    assert ranked(rq, ring_run, tmp_path, checkpoint=tmp_path / "small.pt") == ring_run.record["test"]


def test_the_encoder_is_never_built_when_ranking_from_codes(
    rq: Command, ring_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: Any, **more: Any) -> None:
        raise AssertionError("the encoder was built")

    monkeypatch.setattr("model.RQGCN.RQGCN.__init__", refuse)
    monkeypatch.setattr("model.CompGCN.CompGCN.__init__", refuse)
    assert rq(*ring_run.scored()).code == 0


def mrr_of(rq: Command, run: Run, tmp_path: Path, codes: torch.Tensor | None = None, *more: str) -> float:
    """Test MRR of other codes than the run's, from a file of their own."""
    path = None
    if codes is not None:
        path = tmp_path / "other.pt"
        torch.save(codes, path)
    return float(ranked(rq, run, tmp_path / "ranked", *more, codes=path)["mrr"])


def test_wrong_codes_rank_like_chance(rq: Command, family_run: Run, tmp_path: Path) -> None:
    true = family_run.record["test"]["mrr"]
    codes = torch.load(family_run.codes, weights_only=True)
    chance = float((1 / torch.arange(1, len(codes) + 1)).mean())  # 0.0075: every rank equally likely
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(32, codes.shape, generator=generator)
    permuted = codes[torch.randperm(len(codes), generator=generator)]
    for mrr in (
        mrr_of(rq, family_run, tmp_path, random),
        mrr_of(rq, family_run, tmp_path, permuted),
        mrr_of(rq, family_run, tmp_path, None, "--shuffle_codes"),
        family_run.record["test_shuffled_codes"]["mrr"],
    ):
        assert mrr < 0.1 * true and mrr < 3 * chance
    assert mrr_of(rq, family_run, tmp_path, codes) == true
    again = mrr_of(rq, family_run, tmp_path, None, "--shuffle_codes")
    assert again == family_run.record["test_shuffled_codes"]["mrr"]


def test_constant_codes_tie_every_entity(rq: Command, ring_run: Run, tmp_path: Path, ring_kg: KnowledgeGraph) -> None:
    """All entities alike: every rank is the middle of the entities left by the filter, whatever the model."""
    answers = ring_kg.answers()
    triples = with_inverse(ring_kg.test, R)
    sizes = answers.indptr[1:] - answers.indptr[:-1]
    ranks = (M - sizes[answers.rows(triples[:, 0], triples[:, 1])] + 2) / 2
    found = mrr_of(rq, ring_run, tmp_path, torch.zeros(M, L, Q, dtype=torch.int64))
    assert found == pytest.approx((1 / ranks).mean(), abs=1e-12)


def test_one_changed_row_changes_the_ranking(rq: Command, ring_run: Run, tmp_path: Path) -> None:
    codes = torch.load(ring_run.codes, weights_only=True)
    head = int(KnowledgeGraph.load(ring_run.dataset).test[0, 0])
    codes[head] = (codes[head] + 1) % K
    assert mrr_of(rq, ring_run, tmp_path, codes) != ring_run.record["test"]["mrr"]


def test_predict_prints_the_best_tails_by_name(rq: Command, family_run: Run, family: KnowledgeGraph) -> None:
    head = int(family.test[0, 0])
    relation = int(family.test[0, 1])
    scorer, relations, codes = load_scored_codes(family_run.checkpoint, family_run.codes, family, torch.device("cpu"))
    q_all = scorer.entity_vectors_from_codes(codes)
    words = {
        relation: family.relations[relation],
        relation + family.num_relations: "~" + family.relations[relation],
    }
    for asked, word in words.items():
        scores = (q_all @ (q_all[head] * relations[asked])).tolist()
        outcome = rq(*family_run.scored(None, None, "--predict", family.labels[head], word, "--top", "5"))
        assert outcome.code == 0, outcome.err
        lines = re.findall(r"^ *(\d+)\. +(-?[\d.]+)  (.*) \[(.*?)\](?:  known \((\w+)\))?$", outcome.out, re.MULTILINE)
        assert [int(line[0]) for line in lines] == [1, 2, 3, 4, 5]
        tops = sorted(scores, reverse=True)[:5]
        known = {
            (h, r, t): split
            for split in ("test", "valid", "train")
            for h, r, t in with_inverse(family.split(split), family.num_relations).tolist()
        }
        for (_, shown, label, raw, mark), score in zip(lines, tops, strict=True):
            tail = family.entities.index(raw)
            assert family.labels[tail] == label
            assert float(shown) == pytest.approx(score, abs=2e-4) == pytest.approx(scores[tail], abs=2e-4)
            assert mark == known.get((head, asked, tail), "")


def test_predict_refuses_names_that_are_not_there(rq: Command, ring_run: Run) -> None:
    assert_refused(rq(*ring_run.scored(None, None, "--predict", "Nobody", "next")), "Nobody")
    assert_refused(rq(*ring_run.scored(None, None, "--predict", "e1", "beside")), "beside")
    assert rq(*ring_run.scored(None, None, "--predict", "Entity 1", "~next")).code == 0
    assert_refused(rq(*ring_run.scored(None, None, "--predict", "-x", "next")), "-x")  # a name, not a flag
    assert_refused(rq(*ring_run.scored(None, None, "--predict", "e1")), "--predict")


@pytest.mark.parametrize("more", [["m.txt"], ["m.json", "--predict", "e1", "next"]], ids=" ".join)
def test_metrics_go_to_a_json_file_alone(rq: Command, ring_run: Run, more: list[str]) -> None:
    assert_refused(rq(*ring_run.scored(None, None, "--metrics_out", *more)), "--metrics_out")


def test_lists_say_whether_codes_were_shuffled(rq: Command, ring_run: Run, tmp_path: Path) -> None:
    for more in ([], ["--shuffle_codes"]):
        out = tmp_path / "lists.npz"
        assert rq(*ring_run.scored(None, None, "--export_candidates", str(out), "--top", "3", *more)).code == 0
        info = json.loads(str(np.load(out)["info"]))
        assert info["shuffled_codes"] == bool(more)


# ---------------------------------------------------------------- continue, overwrite, refuse


def test_a_name_from_other_arguments_is_refused(rq: Command, ring: Path, tmp_path: Path) -> None:
    flags = small_flags(ring, tmp_path, epoch=2)
    assert rq(*flags).code == 0
    codes, checkpoint = tmp_path / "codes" / f"{RING}.pt", tmp_path / "checkpoints" / f"{RING}.pt"
    before = sha256(codes), sha256(checkpoint)
    for more in (["--seed", "1"], ["--restore", "--seed", "1"], ["--lbl_smooth", "0.3"]):
        assert_refused(rq(*flags, *more), more[-2].removeprefix("--"), more[-1])
    assert_refused(rq(*flags, "--name", "other"), "--overwrite")  # another name, the same codes file
    assert (sha256(codes), sha256(checkpoint)) == before
    again = rq(*flags)  # the same arguments: nothing is left to train, the same files
    assert again.code == 0 and "continuing" in again.out
    assert rq(*flags, "--name", RING, "--restore").code == 0  # the default name, spelled out
    assert_refused(rq(*flags, "--epoch", "3"), "epoch (there 2, here 3)", "--restore to go on")
    assert "to go on" not in rq(*flags, "--epoch", "3", "--seed", "1").err  # --restore would refuse the seed
    longer = rq(*flags, "--epoch", "3", "--restore")
    assert longer.code == 0 and "epoch    3" in longer.out and "epoch    2" not in longer.out
    anew = rq(*flags, "--seed", "1", "--overwrite")
    assert anew.code == 0 and "epoch    1" in anew.out
    assert json.loads(codes.with_suffix(".json").read_text())["seed"] == 1 and sha256(codes) != before[0]
    checkpoint.unlink()
    assert_refused(rq(*flags), codes.name, "--overwrite")
    assert_refused(rq(*flags, "--restore"), "--restore", checkpoint.name)


def test_one_run_twice_writes_the_same_bytes(rq: Command, ring: Path, tmp_path: Path) -> None:
    """Hashes stand in the records: equal codes must have equal ones."""
    files = []
    for place in ("a", "b"):
        assert rq(*small_flags(ring, tmp_path / place, epoch=2)).code == 0
        files.append(sorted(path for path in (tmp_path / place / "codes").iterdir() if path.suffix != ".json"))
    tensors = [[load_torch(path, "file") for path in paths if path.suffix == ".pt"] for paths in files]
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    assert [sha256(path) for path in files[0]] == [sha256(path) for path in files[1]]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["conve", "distmult", "complex"])
def test_two_threads_give_the_same_codes_each_time_and_after_a_kill(tmp_path: Path, decoder: str) -> None:
    """Rows are taken by index_select: the backward pass of x[i] is not deterministic with several threads."""
    sizes = {"decoder": decoder, "init_dim": 36, "gcn_dim": 36, "tf_layers": 0, "batch": 1024, "epoch": 4}

    def command(place: str, *more: str) -> list[str]:
        flags = small_flags(ROOT / "data" / "family", tmp_path / place, **sizes, num_workers=2)
        return [sys.executable, str(ROOT / "run_rq.py"), *flags, *more]

    def epoch_of(place: str) -> int:
        checkpoint = tmp_path / place / "checkpoints" / "family_3_8_2_rq.pt"
        return int(load_torch(checkpoint, "checkpoint")["last"]["epoch"]) if checkpoint.exists() else 0

    for place in ("a", "b"):
        subprocess.run(command(place), check=True, capture_output=True)
    with subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while epoch_of("killed") < 2 and process.poll() is None:
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL and 2 <= epoch_of("killed") < 4
    subprocess.run(command("killed", "--restore"), check=True, capture_output=True)
    codes = [load_torch(tmp_path / place / "codes" / "family_3_8_2_rq.pt", "codes") for place in ("a", "b", "killed")]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def test_codes_of_another_name_are_not_written_over(rq: Command, ring: Path, tmp_path: Path) -> None:
    """Run b, begun in a folder of its own, is continued into the folder that holds run a's codes."""
    a, b = (small_flags(ring, tmp_path / place, epoch=2) for place in ("a", "b"))
    assert rq(*a).code == 0
    codes = tmp_path / "a" / "codes" / f"{RING}.pt"
    before = sha256(codes)
    assert rq(*b, "--name", "b", "--seed", "1").code == 0
    b[b.index("--out_dir") + 1] = str(codes.parent)
    assert_refused(rq(*b, "--name", "b", "--seed", "1", "--restore"), "--overwrite")
    assert sha256(codes) == before


def test_a_changed_data_set_is_another_run(rq: Command, ring: Path, tmp_path: Path) -> None:
    copy = tmp_path / "ring"
    copy.mkdir()
    for path in ring.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    flags = small_flags(copy, tmp_path, epoch=2)
    assert rq(*flags).code == 0
    lines = (copy / "train.txt").read_text().splitlines(keepends=True)
    (copy / "train.txt").write_text("".join(lines[1:]))
    assert_refused(rq(*flags, "--restore"), "train.txt")


def test_a_second_run_of_a_name_is_refused_while_the_first_lives(rq: Command, ring: Path, tmp_path: Path) -> None:
    flags = small_flags(ring, tmp_path, epoch=2)
    with run_rq.exclusive_lock(tmp_path / "checkpoints" / f"{RING}.lock"):
        assert_refused(rq(*flags), "another run")
        assert_refused(rq(*flags, "--overwrite"), "another run")
        assert rq(*flags, "--name", "other").code == 0
    assert rq(*flags, "--overwrite").code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_what_is_saved_and_can_be_dumped(
    rq: Command, ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    save = Trainer.save

    def save_then_stop(self: Trainer) -> None:
        save(self)
        if self.epoch == 3:
            os.kill(os.getpid(), number)

    flags = small_flags(ring, tmp_path, epoch=6)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as it is in a job that a shell runs behind it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "save", save_then_stop)
            outcome = rq(*flags)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert outcome.code == code and "epoch 3 is saved" in outcome.err and "--restore" in outcome.err
    assert not list(tmp_path.glob("codes/*"))
    dumped = rq(*flags, "--restore", "--epoch", "3")
    assert dumped.code == 0, dumped.err
    assert json.loads((tmp_path / "codes" / f"{RING}.json").read_text())["epochs"] == 3


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--device", "nonsense"], ["--device", "nonsense"]),
        (["--device", "meta"], ["--device", "meta"]),
        (["--device", "hpu"], ["--device hpu", "--device cpu"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--decoder", "nothing"], ["nothing"]),
        (["--decoder", "complex", "--gcn_dim", "13"], ["13"]),
        (["--tf_layers", "1", "--att_head", "4"], ["--att_head 4"]),
        (["--seq_len", "0"], ["--seq_len 0"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--lr", "inf"], ["--lr inf"]),
        (["--seed", str(2**70)], ["--seed"]),
        (["--batch", "-1"], ["--batch", "-1"]),
        (["--lbl_smooth", "1"], ["--lbl_smooth"]),
        (["--weight_average", "1"], ["--weight_average"]),
        (["--tails_at_once", "-2"], ["--tails_at_once -2"]),
        (["--restore", "--overwrite"], ["--restore", "--overwrite"]),
        (["--inputs", "text"], ["--inputs text", "--text_emb"]),
        (["--ensemble", "2"], ["--ensemble 2", "--gcn_layers"]),
        (["--epoch", "many"], ["--epoch"]),
        (["--batch", str(10**21)], ["--batch"]),
        (["--lr", "1e300"], ["--lr"]),
        (["--shuffle_codes"], ["--eval_codes"]),
        (["--checkpoint", "x.pt"], ["--eval_codes"]),
        (["--metrics_out", "m.json"], ["--metrics_out", "--eval_codes"]),
        (["--opn", "corr"], ["--opn"]),
        (["--overwrit"], ["--overwrit"]),
    ],
    ids=" ".join,
)
def test_flags_out_of_range_are_refused(
    rq: Command, ring: Path, tmp_path: Path, more: list[str], words: list[str]
) -> None:
    flags = small_flags(ring, tmp_path)
    if "--device" in more:
        del flags[flags.index("--device") : flags.index("--device") + 2]
    assert_refused(rq(*flags, *more), *words)
    assert not list(tmp_path.glob("codes/*"))


def test_a_checkpoint_of_before_is_refused_with_a_reason(
    rq: Command, ring: Path, ring_run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoints" / f"{RING}.pt"
    path.parent.mkdir()
    stored = load_torch(ring_run.checkpoint, "checkpoint")
    save_torch(
        {"format": 1, "config": stored["model"], "comparable": {}, "last": stored["last"], "best": stored["best"]}, path
    )
    assert_refused(rq(*small_flags(ring, tmp_path), "--restore"), path.name, "older version", "train again")
    assert_refused(rq(*ring_run.scored(None, path)), path.name, "older version")


@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        (["--z_noise", "0.5", "--warmup_epochs", "0"], ["--z_noise"]),
        (["--text_weight", "0.5"], ["--text_weight"]),
        (["--text_weight", "0.5", "--text_emb", "e.npy"], []),
        (["--gcn_layers", "0", "--gcn_dim", "512", "--gcn_drop", "0.1"], ["--gcn_dim", "--gcn_drop"]),
        (["--gcn_layers", "1", "--gcn_dim", "512"], []),
        (["--tf_layers", "0", "--att_head", "2"], ["--att_head"]),
        (["--tails_at_once", "4", "--num_negatives", "9", "--loss", "bce"], ["--num_negatives", "--tails_at_once"]),
    ],
)
def test_unused_flags_are_reported(flags: list[str], unused: list[str]) -> None:
    lines = run_rq.parse_config(["--config", os.devnull, *flags]).unused()
    assert [line.split()[0] for line in lines] == unused


def test_a_gpu_that_is_not_there_is_refused_and_device_wins(rq: Command, ring: Path, tmp_path: Path) -> None:
    flags = small_flags(ring, tmp_path, epoch=2)
    at = flags.index("--device")
    without = flags[:at] + flags[at + 2 :]
    assert_refused(rq(*without, "--gpu", "99"), "--gpu", "99", "--device cpu")
    assert rq(*without, "--gpu", "-1").code == 0
    assert rq(*flags, "--gpu", "99", "--overwrite").code == 0


def test_a_missing_data_set_names_the_download(rq: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "ROOT", tmp_path)
    assert_refused(rq("--device", "cpu"), "python data/download.py FB15k-237")
    assert_refused(rq("--dataset", str(tmp_path / "WN18RR"), "--device", "cpu"), "python data/download.py WN18RR")


def test_text_embeddings_reach_the_loss(rq: Command, ring: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.npy"
    np.save(path, np.random.default_rng(0).normal(size=(M, 5)).astype(np.float16))
    assert rq(*small_flags(ring, tmp_path, epoch=3), "--text_emb", str(path)).code == 0
    record = json.loads((tmp_path / "codes" / f"{RING}.json").read_text())
    losses = [row["semantic"] for row in record["history"]]
    assert losses[0] > losses[-1] > 0 and record["inputs"]["text.npy"] == sha256(path)
    np.save(path, np.zeros((M, 5)))
    assert_refused(rq(*small_flags(ring, tmp_path, epoch=3), "--text_emb", str(path)), "text.npy")


def test_a_checkpoint_of_another_graph_is_refused(rq: Command, ring_run: Run, tmp_path: Path) -> None:
    other = tmp_path / "ring"
    other.mkdir()
    for path in ring_run.dataset.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "relations.dict").write_text("0\tnext\n1\tover\n2\thub\n3\tnew\n")
    assert_refused(rq(*Run(other, ring_run.folder, RING, []).scored()), "relations")


def test_a_checkpoint_trained_on_other_triples_is_refused(
    rq: Command, ring: Path, ring_run: Run, tmp_path: Path
) -> None:
    """The same graph with its test triples in training; the same triples in another form are no other ones."""
    leaky, same = tmp_path / "leaky" / ring.name, tmp_path / "copy" / ring.name
    for copy in (leaky, same):
        shutil.copytree(ring, copy)
    with open(leaky / "train.txt", "a") as file:
        file.write((ring / "test.txt").read_text())
    run = finished(leaky, tmp_path / "run", RING, epoch=2)
    assert_refused(rq(*ring_run.scored(run.codes, run.checkpoint)), "--checkpoint", "other triples")
    (same / "train.txt").write_bytes((ring / "train.txt").read_bytes().replace(b"\n", b"\r\n"))
    found = rq(*ring_run._replace(dataset=same).scored())
    assert found.code == 0 and "warning" not in found.err


def test_a_damaged_score_before_the_collision_pass_is_named(ring_run: Run) -> None:
    stored = load_torch(ring_run.checkpoint, "checkpoint")
    assert fault_of(stored) is None
    stored["best"]["valid_before_collision_pass"] = {"mrr": 7}
    assert fault_of(stored) == "best: its valid MRR is 7"


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("changes", "offered"),
    [({}, True), ({"loss": "bce"}, False), ({"num_negatives": 9}, False), ({"eval_codes": Path("c.pt")}, False)],
)
def test_out_of_memory_offers_negatives_only_with_the_exact_softmax(changes: dict[str, Any], offered: bool) -> None:
    with pytest.raises(InputError) as error, explain_oom(Config(**changes)):
        raise MemoryError
    assert ("--num_negatives" in str(error.value)) == offered


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_quantizers": 4}, ["--num_quantizers 2", "--gcn_dim 100", "--gcn_layers 1"]),
        ({"num_quantizers": 1, "gcn_layers": 1}, ["--gcn_dim 100"]),
        ({"num_quantizers": 1, "gcn_layers": 0}, ["--init_dim 100"]),
        ({"num_quantizers": 1, "gcn_layers": 1, "gcn_dim": 3}, []),
        ({"num_quantizers": 1, "gcn_layers": 0, "ensemble": 8}, ["--init_dim 96"]),  # each of the 8 has an even width
    ],
)
def test_out_of_memory_offers_a_smaller_model_that_is_valid(changes: dict[str, Any], words: list[str]) -> None:
    assert smaller_model(Config(**changes)) == words


@pytest.mark.parametrize("entities", [2, 14, 1000, 14_541, 40_943, 250_000, 5_000_000])
def test_sizes_fit_any_graph(entities: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_sizes(run_rq.parse_config([]), entities, 3, 6 * entities)
    assert config.num_code <= 1024 and config.code_dim * config.seq_len >= config.init_dim
    assert (config.num_negatives > 0) == (entities > 20_000) and config.epoch >= 5
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and f"--num_code {config.num_code}" in line
    given = with_sizes(run_rq.parse_config(["--epoch", "7", "--num_code", "32"]), entities, 3, 6 * entities)
    assert (given.epoch, given.num_code, given.batch) == (7, 32, config.batch)  # a given size changes no other one


def test_sizes_of_the_graphs_that_were_measured() -> None:
    graphs = ((14, 55, 1592), (104, 25, 8544), (1000, 12, 11_398), (14_541, 237, 272_115), (40_943, 11, 86_835))
    found = [sizes_for(*counts) for counts in graphs]
    assert [size["num_code"] for size in found] == [16, 128, 1024, 1024, 1024]
    assert [size["epoch"] for size in found] == [200, 122, 91, 40, 40]


@pytest.mark.parametrize(("flags", "optimizer", "every"), [
    ([], "adagrad", 1), (["--gcn_layers", "2", "--tf_layers", "1"], "adagrad", 8),
    (["--tf_layers", "1"], "adagrad", 8), (["--lr", "0.0005"], "adam", 1),
    (["--lr", "0.05"], "adagrad", 1), (["--lr", "0.0005", "--optimizer", "adagrad"], "adagrad", 1),
])  # fmt: skip
def test_a_low_rate_is_for_adam_and_graph_layers_pass_less_often(flags: list[str], optimizer: str, every: int) -> None:
    config = with_sizes(run_rq.parse_config(flags), 14_541, 237, 272_115)
    assert (config.optimizer, config.encoder_every, config.n3) == (optimizer, every, 0.0267)


@pytest.mark.parametrize("flags", [["--init_dim", "200"], ["--seq_len", "4", "--code_dim", "32"]])
def test_layers_that_change_the_width_are_trained_by_adam_at_every_step(flags: list[str]) -> None:
    config = with_sizes(run_rq.parse_config(["--gcn_layers", "2", *flags]), 14_541, 237, 272_115)
    assert (config.optimizer, config.lr, config.encoder_every, config.n3) == ("adam", 0.005, 1, 0)


# ---------------------------------------------------------------- the weight of N3, chosen on valid

BY_VALID = {"n3": "auto", "decoder": "complex", "init_dim": 24, "gcn_layers": 0, "tf_layers": 0, "epoch": 10,
            "seq_len": 3, "code_dim": 8, "warmup_epochs": 0.3, "optimizer": "adagrad", "lr": 0.1}  # fmt: skip


def test_the_weight_of_n3_is_the_best_on_valid_and_its_run_is_that_of_the_flag(
    rq: Command, ring: Path, tmp_path: Path
) -> None:
    chosen = rq(*small_flags(ring, tmp_path / "auto", **BY_VALID))
    assert chosen.code == 0, chosen.err
    record = json.loads(next(tmp_path.glob("auto/codes/*.json")).read_text())
    trials = record["history"][0]["n3_trials"]
    assert list(trials) == [str(n3) for n3 in N3_WEIGHTS]
    assert str(record["args"]["n3"]) == max(trials, key=trials.__getitem__)
    given = rq(*small_flags(ring, tmp_path / "given", **BY_VALID | {"n3": record["args"]["n3"]}))
    assert given.code == 0, given.err
    codes = [
        load_torch(next(tmp_path.glob(f"{name}/codes/{record['name']}.pt")), "codes") for name in ("auto", "given")
    ]
    assert torch.equal(*codes)
    assert len(list(tmp_path.glob("auto/checkpoints/*.pt"))) == 1
    again = rq(*small_flags(ring, tmp_path / "auto", **BY_VALID))  # dumps the finished run again
    assert again.code == 0 and "n3 0" not in again.out
    for limits in (["--epoch", "9"], ["--epoch", "11"], ["--max_minutes", "1"]):  # of which a new run would try none
        limited = rq(*small_flags(ring, tmp_path / "auto", **BY_VALID), *limits, "--restore")
        assert limited.code == 0, limited.err


def test_a_choice_of_n3_that_was_killed_goes_on(
    rq: Command, ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [small_flags(ring, tmp_path / name, **BY_VALID | {"epoch": 20}) for name in ("whole", "killed")]
    assert rq(*flags[0]).code == 0
    save, saved = Trainer.save, list[float]()

    def stop_in_the_second_trial(self: Trainer) -> None:
        save(self)
        saved.append(self.config.n3)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", stop_in_the_second_trial)
        outcome = rq(*flags[1])
    assert outcome.code == 130 and "the same command goes on" in outcome.err
    resumed = rq(*flags[1])
    assert resumed.code == 0, resumed.err
    whole, killed = (load_torch(next(tmp_path.glob(f"{name}/codes/*rq.pt")), "codes") for name in ("whole", "killed"))
    assert torch.equal(whole, killed)


@pytest.mark.parametrize(
    "flags",
    [["--n3", "0"], ["--max_minutes", "5"], ["--epoch", "9"], ["--quantizer", "random"], ["--decoder", "conve"]],
)
def test_n3_is_not_tried_where_it_is_given_or_a_run_is_short(flags: list[str]) -> None:
    graph = (14_541, 237, 272_115)
    assert with_sizes(run_rq.parse_config([]), *graph, n3_by_valid=True).n3 == AUTO
    assert with_sizes(run_rq.parse_config(flags), *graph, n3_by_valid=True).n3 != AUTO
    assert with_sizes(run_rq.parse_config([]), 14_541, 237, 9_000_000, n3_by_valid=True).n3 != AUTO


# ---------------------------------------------------------------- flags


def test_a_config_is_its_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "flags.txt"
    file.write_text("# a comment\n--seq_len 3 --lr 0.25\n--text_emb 'a b.npy'  # another\n")
    got = run_rq.parse_config(["--seed", "5", "--lr", "0.5", "--config", str(file)])
    assert got == Config(config=file, seed=5, seq_len=3, lr=0.5, text_emb=Path("a b.npy"))


def test_one_flag_changes_one_setting() -> None:
    default, changed = (run_rq.parse_config(words).as_plain() for words in ([], ["--lr", "0.004"]))
    assert {key for key in default if default[key] != changed[key]} == {"lr"}
    assert changed["lr"] == 0.004


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("--seq_lenn 3", "--seq_lenn"),
        ("--config x", "another"),
        ("--config=x", "another"),
        ("--name 'a", "quotation"),
        (None, "No such"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(rq: Command, tmp_path: Path, text: str | None, word: str) -> None:
    config = tmp_path / "flags.txt"
    if text is not None:
        config.write_text(text)
    assert_refused(rq("--config", str(config)), f"--config {config}", word)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.txt")), ids=lambda path: path.stem)
def test_the_configs_of_the_repository_parse(config: Path) -> None:
    assert run_rq.parse_config(["--config", str(config)]).unused() == []


def test_help_names_every_flag_of_the_original_trainer(rq: Command) -> None:
    outcome = rq("--help")
    assert outcome.code == 0
    original = (
        "name data opn act gpu l2 lbl_smooth num_workers seed restore init_dim gcn_dim att_head gcn_drop vq_weight"
    )
    for flag in original.split():
        assert f"--{flag}" in outcome.out
    from model.decoders import DECODERS

    action = next(action for action in build_parser()._actions if action.dest == "decoder")
    assert list(action.choices or []) == list(DECODERS)

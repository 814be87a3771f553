"""What linear maps read from codes: the measures against brute force, a planted fact, the command on a small run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from common.files import read_json
from tables import probe_codes
from tables.probe_codes import Parts, auc, best_threshold, name_states, one_hot, ridge, scaled
from tests.conftest import Run
from tests.test_train_lora import base  # noqa: F401


def test_one_hot_marks_positions_and_counts_tokens() -> None:
    codes = torch.tensor([[[0, 1], [2, 1]], [[1, 0], [1, 2]]])  # [M=2, L=2, Q=2], K=3
    assert one_hot(codes, 3, True).tolist() == [
        [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0],
        [0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1],
    ]
    assert one_hot(codes, 3, False).tolist() == [[1, 0, 1, 0, 2, 0], [0, 2, 0, 1, 0, 1]]


def test_auc_counts_pairs_in_the_right_order() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(30, 3, generator=generator), (torch.rand(30, 3, generator=generator) < 0.4).float()
    labels[:, 2] = 1  # without negatives: left out
    pairs = [
        (scores[labels[:, c] == 1, c][:, None] > scores[labels[:, c] == 0, c]).double().mean().item() for c in (0, 1)
    ]
    assert auc(scores, labels) == pytest.approx(sum(pairs) / 2)


def test_the_threshold_has_the_best_accuracy() -> None:
    generator = torch.Generator().manual_seed(1)
    for shift in (-9.0, 0.5, 9.0):  # everything False, mixed, everything True
        labels = torch.rand(40, generator=generator) < (0.5 if abs(shift) < 1 else float(shift > 0))
        scores = torch.randn(40, generator=generator) + labels * 0.5
        right = [float(((scores > c) == labels).float().mean()) for c in [*scores.tolist(), -1e9, 1e9]]
        found = best_threshold(scores, labels)
        assert float(((scores > found) == labels).float().mean()) == pytest.approx(max(right))


def test_a_fact_in_the_codes_is_read_and_one_in_others_codes_is_not() -> None:
    codes = torch.randint(0, 8, (600, 2, 2), generator=torch.Generator().manual_seed(0))
    facts = torch.stack([codes[:, 0, 0] < 4, codes[:, 1, 1] == 3], 1).float()
    parts = Parts(*torch.arange(600).split([400, 100, 100]))
    assert ridge(scaled(one_hot(codes, 8, True)), facts, parts).auc > 0.99
    assert abs(ridge(scaled(one_hot(codes.roll(1, 0), 8, True)), facts, parts).auc - 0.5) < 0.15


def test_states_of_names_do_not_depend_on_the_batch(base: Path) -> None:  # noqa: F811
    names = ["Ada", "Ada Ashley", "B", "a much longer name", "Ada"]
    alone, together = (name_states(str(base), names, batch) for batch in (1, 4))
    assert torch.allclose(alone, together, atol=0.1) and torch.equal(together[0], together[4])
    assert len(together) == 5 and (together[0] - together[1]).abs().max() > 0.01


def test_the_command_on_a_small_run(family_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", str(family_run.dataset), "--codes", str(family_run.codes)]
    flags += ["--checkpoint", str(family_run.checkpoint), "--json", str(tmp_path / "p.json")]
    probe_codes.main(flags)
    record = read_json(tmp_path / "p.json", "record")
    assert record["auc"].keys() == {"codes", "tokens", "vectors", "shuffled"} and record["triple_accuracy"] is None
    assert record["auc"]["codes"] > record["auc"]["shuffled"] + 0.1 and abs(record["auc"]["shuffled"] - 0.5) < 0.06
    assert f"AUC {record['auc']['codes']:.3f}" in capsys.readouterr().out
    with pytest.raises(InputError, match="--least 999"):
        probe_codes.main([*flags, "--least", "999"])


def test_triples_beside_an_llm(
    family_run: Run, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],  # noqa: F811
) -> None:  # fmt: skip
    graph = tmp_path / "family"
    shutil.copytree(family_run.dataset, graph)
    for split in ("valid", "test"):  # negatives: the tails of other triples
        lines = [line.split("\t") for line in (graph / f"{split}.txt").read_text().splitlines()]
        made = [f"{h}\t{r}\t{lines[i - 7][2]}\n" for i, (h, r, _) in enumerate(lines)]
        known = {tuple(line) for line in lines}
        (graph / f"{split}_neg.txt").write_text(
            "".join(one for one in made if tuple(one[:-1].split("\t")) not in known)
        )
    flags = ["--dataset", str(graph), "--codes", str(family_run.codes), "--checkpoint", str(family_run.checkpoint)]
    flags += ["--json", str(tmp_path / "p.json"), "--entities", "100", "--least", "20"]
    probe_codes.main([*flags, "--model_name", str(base), "--triples", "60"])
    record = read_json(tmp_path / "p.json", "record")
    rows = record["triples"]
    assert rows.keys() == {"names", "codes", "names + codes", "names + shuffled"}
    assert rows["names"]["minus_names"] == 0 and record["triple_accuracy"] > 0.6
    for row in rows.values():
        assert row["minus_names"] == pytest.approx(row["accuracy"] - rows["names"]["accuracy"])
    assert rows["codes"]["accuracy"] > rows["names + shuffled"]["accuracy"] and "names + codes" in record["auc"]
    assert "over names" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        probe_codes.main([*flags, "--triples", "60"])

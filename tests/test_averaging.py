"""The average of the last steps' weights: its closed form, what it leaves alone, and that it is what is dumped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.averaging import WeightAverage
from model.evaluation import evaluate_codes
from model.trainer import Trainer
from tests.conftest import TrainerMaker

RUN: dict[str, Any] = {"epoch": 6, "warmup_epochs": 1, "freeze_at": 0.5, "lr": 0.03, "frozen_noise": 0.2}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_it_is_the_weighted_sum_of_all_steps(decay: float) -> None:
    steps = torch.randn(7, 3, 2, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    average = WeightAverage([weight], decay)
    for step in steps:
        weight.data.copy_(step)
        average.update()
    shares = [decay**6] + [(1 - decay) * decay ** (6 - n) for n in range(1, 7)]
    assert sum(shares) == pytest.approx(1)
    assert average.values is not None
    torch.testing.assert_close(average.values[0], sum(share * step for share, step in zip(shares, steps, strict=True)))


def test_weights_come_back_and_stay_when_they_settle() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage([weight], 0.5)
    with average.in_place():
        assert weight.item() == 1, "no step yet"
    for value in (2.0, 4.0):
        weight.data.fill_(value)
        average.update()
    with pytest.raises(KeyError), average.in_place():
        assert weight.item() == 3
        raise KeyError
    assert weight.item() == 4
    average.settle()
    assert weight.item() == 3 and average.values is None
    for other in ([torch.zeros(2)], [torch.zeros(1).double()], []):
        with pytest.raises(ValueError):
            average.load(other)
    with pytest.raises(ValueError):
        average.load([torch.tensor([torch.nan])])
    with pytest.raises(ValueError):
        WeightAverage([weight], 1.0)


def trained(trainer_of: TrainerMaker, decay: float, **more: Any) -> Trainer:
    torch.manual_seed(0)
    trainer = trainer_of(more.pop("model", None), **(RUN | more), weight_average=decay)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("decoder", ["distmult", "conve"])
def test_the_average_is_scored_and_dumped_and_training_is_as_without(trainer_of: TrainerMaker, decoder: str) -> None:
    model = {"decoder": decoder} | ({"gcn_dim": 36, "init_dim": 36} if decoder == "conve" else {})
    plain, averaged = (trained(trainer_of, decay, model=model) for decay in (0.0, 0.9))
    assert [row["structure"] for row in plain.history] == [row["structure"] for row in averaged.history]
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, averaged.model.state_dict()[name]), name
    rows = [(ours["phase"], ours["valid"]["mrr"] == theirs["valid"]["mrr"])
            for ours, theirs in zip(plain.history, averaged.history, strict=True)]  # fmt: skip
    assert all(same for phase, same in rows if phase != "frozen") and not all(same for _, same in rows)

    average, best = averaged.average, averaged.best
    assert average is not None and average.values is not None and best is not None and averaged.codes is not None
    with average.in_place(), torch.no_grad():
        relations = averaged.model.relation_vectors()
        metrics = evaluate_codes(averaged.model.scorer, relations, averaged.codes, averaged.kg, "valid")
        state = {name: value.clone() for name, value in averaged.model.state_dict().items()}
    assert metrics["mrr"] == averaged.history[-1]["valid"]["mrr"]
    if best["epoch"] == RUN["epoch"]:
        assert all(torch.equal(value, best["model"][name]) for name, value in state.items())
    assert averaged.score_best("valid")["mrr"] == best["valid"]["mrr"]


def test_without_codes_all_weights_are_averaged(trainer_of: TrainerMaker) -> None:
    """Baselines are averaged too: from the epoch on in which codes would be frozen."""
    plain, averaged = (trained(trainer_of, decay, quantizer="none") for decay in (0.0, 0.9))
    same = [ours["valid"] == theirs["valid"] for ours, theirs in zip(plain.history, averaged.history, strict=True)]
    assert same[:3] == [True] * 3 and not any(same[3:])


@pytest.mark.parametrize(("quantizer", "averaged"), [("rq", False), ("none", False), ("random", True)])
def test_with_freeze_at_1_only_random_codes_have_an_average(
    trainer_of: TrainerMaker, quantizer: str, averaged: bool
) -> None:
    trainer = trained(trainer_of, 0.9, epoch=2, freeze_at=1.0, quantizer=quantizer)
    assert trainer.average is not None and (trainer.average.values is not None) == averaged

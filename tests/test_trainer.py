"""The trainer: what moves when, the straight-through gradient against one autograd graph, exact resumption, stops."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config import Config
from common.errors import InputError
from common.files import load_torch
from model import schedule as schedule_module
from model import trainer as trainer_module
from model.losses import LOSSES, gather_targets
from model.RQGCN import scorer_of
from model.schedule import CODES, FROZEN, WARM_UP, Phase
from model.trainer import Trainer
from tests.conftest import CODE_DIM, L, M, Q, TrainerMaker, books_of


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Bit-equality through containers; seconds are left out."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds"}:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def in_codes(trainer: Trainer) -> Trainer:
    """The trainer at the start of an epoch with codes: codebooks initialised, assignments found."""
    trainer.model.train()
    trainer._start_epoch(CODES)
    return trainer


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("weights", [{"vq_weight": 0.0}, {"vq_weight": 0.3}, {"vq_weight": 0.3, "text_weight": 2.0}])
@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("decoder", ["distmult", "conve"])
def test_gradients_are_those_of_the_joint_loss_in_one_graph(
    trainer_of: TrainerMaker, decoder: str, loss: str, weights: dict[str, float]
) -> None:
    """Eq. 9 written out: z_q = decode(codes) + z - sg[z], L = L_st + w L_se + v L_q, one backward, every parameter."""
    text = torch.randn(M, 7) if "text_weight" in weights else None
    shape = {"decoder": decoder, "gcn_drop": 0.0, "decoder_drop": 0.0, "gcn_layers": 2}
    if text is not None:
        shape["text_dim"] = 7
    trainer = in_codes(trainer_of(shape, text, loss=loss, **weights))
    model, settings = trainer.model, trainer.config
    batch = torch.arange(0, len(trainer.heads), 3)

    model.zero_grad()
    *_, gradient = trainer._scorer_step(batch, CODES)
    quantization = trainer._encoder_step(gradient, CODES, gradient)
    found = {name: p.grad for name, p in model.named_parameters()}

    model.zero_grad()
    assert trainer.codes is not None
    z = model.encode(trainer.graph).z
    books = books_of(model)
    decoded = torch.stack([book[trainer.codes[..., q]] for q, book in enumerate(books)]).sum(0)
    q_all = model.scorer.entity_vectors(decoded + z - z.detach())
    heads = trainer.heads[batch]
    query = model.scorer.decoder.query(q_all[heads], model.encode(trainer.graph).relations[trainer.rels[batch]])
    targets = gather_targets(trainer.indptr, trainer.targets, batch)
    joint = LOSSES[loss](query, q_all, targets, settings.lbl_smooth)
    if text is not None:
        assert model.W_s is not None
        joint = joint + settings.text_weight * (model.W_s(q_all[heads]) - text[heads]).square().sum(1).mean()
    residual, level_sum = z, torch.zeros(())
    for q, book in enumerate(books):  # Eq. 5 per level, beta = 0.25 on the commitment term
        chosen = book[trainer.codes[..., q]]
        codebook_term = (residual.detach() - chosen).square().mean()
        level_sum = level_sum + codebook_term + 0.25 * (residual - chosen.detach()).square().mean()
        residual = residual - chosen.detach()
    (joint + settings.vq_weight * level_sum).backward()

    assert quantization == pytest.approx(float(level_sum.detach()), rel=1e-5)
    assert found["entity_embedding"] is not None and float(found["entity_embedding"].abs().max()) > 1e-6
    for name, parameter in model.named_parameters():
        ours = found[name]
        if parameter.grad is None:
            assert ours is None or not ours.any(), name
            continue
        assert ours is not None, name
        scale = float(parameter.grad.norm()) + 1e-6  # a gradient that is zero by symmetry is rounding noise
        assert float((ours - parameter.grad).norm()) < 1e-4 * scale + 1e-6, name


def test_dead_end_the_codes_alone_carry_gradient(trainer_of: TrainerMaker) -> None:
    """With the codes' gradient set to zero and no quantization loss, nothing but the relations' way is left."""
    trainer = in_codes(trainer_of(vq_weight=0.0))
    trainer.model.zero_grad()
    nothing = torch.zeros(M, L, trainer.model.code_dim)
    trainer._encoder_step(nothing, CODES, nothing)
    gradient = trainer.model.entity_embedding.grad
    assert gradient is None or not gradient.any()


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_an_epoch_moves_encoder_codebooks_scorer_and_relations(trainer_of: TrainerMaker) -> None:
    trainer = trainer_of(epoch=3, warmup_epochs=1)
    trainer._train_epoch(trainer.phase())
    trainer.epoch = 1
    trainer._start_epoch(CODES)
    before = state_of(trainer)
    trainer._train_epoch(trainer.phase())
    learned = {name for name, _ in trainer.model.named_parameters()}
    assert learned <= moved(before, state_of(trainer))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_encoder_moves_once_per_encoder_every_steps(trainer_of: TrainerMaker, every: int) -> None:
    trainer = trainer_of(encoder_every=every, warmup_epochs=0, batch=16)
    snapshots: list[dict[str, Tensor]] = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *a: (snapshots.append(state_of(trainer)), step(*a))[1]  # type: ignore
    trainer._train_epoch(trainer.phase())
    snapshots.append(state_of(trainer))
    steps = len(snapshots) - 1
    assert steps >= 7
    for i in range(steps):
        changed = moved(snapshots[i], snapshots[i + 1])
        is_last = (i + 1) % every == 0 or i + 1 == steps
        assert ("entity_embedding" in changed) == is_last, i
        assert ("encoder.layers.0.w_in" in changed) == is_last, i
        assert {"scorer.W_q.weight", "scorer.rq_codebook.codebooks.0.weight", "relation_embedding"} <= changed


def test_averaged_encoder_gradient_is_the_mean_over_the_steps(trainer_of: TrainerMaker) -> None:
    """With a learning rate of nothing, encoder_every 3 hands the encoder the mean of the three steps' gradients."""
    trainer = in_codes(trainer_of({"decoder_drop": 0.0, "gcn_drop": 0.0}, encoder_every=3, batch=40, lr=1e-30))
    handed: list[Tensor] = []
    inner = trainer._encoder_step
    trainer._encoder_step = lambda gradient, *others: (handed.append(gradient.clone()), inner(gradient, *others))[1]  # type: ignore
    trainer.epoch = 1  # past the warm-up
    own: list[Tensor] = []
    step = trainer._scorer_step
    trainer._scorer_step = lambda batch, phase: (lambda out: (own.append(out[2].clone()), out)[1])(step(batch, phase))  # type: ignore
    trainer._train_epoch(trainer.phase())
    assert len(own) > 3
    for i, gradient in enumerate(handed):
        torch.testing.assert_close(gradient, torch.stack(own[3 * i : 3 * i + 3]).mean(0))


@pytest.mark.parametrize("mask", [0.0, 0.4])
def test_inputs_that_layers_add_to_take_every_step(trainer_of: TrainerMaker, mask: float) -> None:
    """With layers that stay the identity, rare passes give the run without layers; masks are drawn at each pass."""
    width = {"init_dim": L * CODE_DIM, "gcn_dim": L * CODE_DIM, "decoder_drop": 0.0, "gcn_drop": 0.0}
    settings: dict[str, Any] = {"batch": 8, "quantizer": "none", "optimizer": "adagrad", "lr": 0.1, "z_noise": 0.0}
    plain = trainer_of(width | {"gcn_layers": 0, "tf_layers": 0}, encoder_every=1, **settings)
    layered = trainer_of(width | {"gcn_layers": 2, "tf_layers": 1}, encoder_every=5, mask_inputs=mask, **settings)
    for name, parameter in layered.model.named_parameters():
        if name in ("entity_embedding", "relation_embedding"):
            parameter.data.copy_(plain.model.get_parameter(name).data)
        else:
            parameter.requires_grad_(False)
    assert len(plain.heads) > 5 * 8
    for trainer in (plain, layered):
        trainer._train_epoch(trainer.phase())
    wanted, found = (trainer.model.entity_embedding for trainer in (plain, layered))
    if mask:
        assert not torch.allclose(found, wanted, rtol=1e-2)
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert layered.z is not None
    torch.testing.assert_close(layered.z.flatten(1), found, rtol=1e-4, atol=1e-6)


def test_every_epoch_takes_every_query_once_in_an_order_of_its_own(trainer_of: TrainerMaker) -> None:
    trainer = trainer_of()
    seen: list[Tensor] = []
    step = trainer._scorer_step
    trainer._scorer_step = lambda batch, phase: (seen.append(batch), step(batch, phase))[1]  # type: ignore
    orders = []
    for epoch in range(2):
        trainer.epoch = epoch
        trainer._train_epoch(trainer.phase())
        orders.append(torch.cat(seen))
        seen.clear()
    everything = torch.arange(len(trainer.heads))
    for order in orders:
        assert torch.equal(order.sort().values, everything) and not torch.equal(order, everything)
    assert not torch.equal(*orders)


def test_the_queries_are_the_distinct_training_pairs_of_both_directions(trainer_of: TrainerMaker) -> None:
    trainer = trainer_of()
    known: dict[tuple[int, int], set[int]] = {}
    for h, r, t in trainer.kg.train.tolist():
        known.setdefault((h, r), set()).add(t)
        known.setdefault((t, r + trainer.kg.num_relations), set()).add(h)
    found = gather_targets(trainer.indptr, trainer.targets, torch.arange(len(trainer.heads)))
    pairs = list(zip(trainer.heads.tolist(), trainer.rels.tolist(), strict=True))
    assert set(pairs) == known.keys() and len(pairs) == len(known)
    triples = {(*pairs[row], tail) for row, tail in zip(found.rows.tolist(), found.columns.tolist(), strict=True)}
    assert triples == {(*pair, tail) for pair, tails in known.items() for tail in tails}


@pytest.mark.parametrize("phase", [WARM_UP, CODES])
def test_an_epoch_starts_with_one_pass_of_the_encoder(trainer_of: TrainerMaker, phase: Phase) -> None:
    trainer, passes = trainer_of(), []
    encode = trainer.model.encode
    trainer.model.encode = lambda *words: (passes.append(1), encode(*words))[1]  # type: ignore
    for count in (1, 2):  # codebooks begun, then revived
        trainer._start_epoch(phase)
        assert len(passes) == count


def test_the_encoder_has_a_rate_of_its_own(trainer_of: TrainerMaker) -> None:
    trainer = trainer_of(lr=0.001, encoder_every=4, epoch=1)
    before = state_of(trainer)
    trainer._set_lr(0.0)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx(
        [0.001] * 2 + [0.002] * 2
    )  # sqrt(4) times
    trainer.fit()
    moved = (state_of(trainer)["entity_embedding"] - before["entity_embedding"]).abs().max()
    assert 0 < float(moved) <= 0.002 * 1.01 * math.ceil(len(trainer._batches()) / 4)  # Adam: a step is at most its rate


# ---------------------------------------------------------------- phases


def test_frozen_codes_stay_while_their_vectors_move(trainer_of: TrainerMaker) -> None:
    trainer = trainer_of(epoch=8, freeze_at=0.5, warmup_epochs=1)
    rows: list[tuple[str, Tensor, dict[str, Tensor]]] = []
    train_epoch = trainer._train_epoch

    def watched(phase: Phase) -> dict[str, Any]:
        row = train_epoch(phase)
        rows.append((phase.name, torch.zeros(0) if trainer.codes is None else trainer.codes, state_of(trainer)))
        return row

    trainer._train_epoch = watched  # type: ignore[method-assign]
    trainer.fit()
    assert [name for name, *_ in rows] == ["warm-up"] + ["codes"] * 3 + ["frozen"] * 4
    at_freeze = rows[3]
    assert not torch.equal(rows[1][1], at_freeze[1])  # before, codes did change
    for _, codes, state in rows[4:]:
        assert torch.equal(codes, at_freeze[1])
        changed = moved(at_freeze[2], state)
        assert {f"scorer.rq_codebook.codebooks.{q}.weight" for q in range(Q)} <= changed
        assert "relation_embedding" in changed and "entity_embedding" not in changed
        assert not any(name.startswith(("ffn", "transformer", "position")) for name in changed)


def test_codes_kept_are_those_of_the_model_kept(trainer_of: TrainerMaker) -> None:
    """At every epoch with codes, the assignments in use are what the encoder's own path gives."""
    trainer = trainer_of(epoch=3, freeze_at=1.0)
    trainer.fit()
    assert trainer.codes is not None
    assert torch.equal(trainer.codes, trainer.model.cal_allent_codes(trainer.graph))


def test_noise_blurs_the_warm_up_alone_and_by_its_share(trainer_of: TrainerMaker) -> None:
    z = torch.randn(4000, L, 3) * torch.tensor([0.1, 1.0, 10.0]) + 2
    blur = trainer_module._with_noise(z, 0.5) - z
    torch.testing.assert_close(blur.std(0) / z.std(0), torch.full((L, 3), 0.5), rtol=0.05, atol=0)
    assert float((blur.mean(0) / z.std(0)).abs().max()) < 0.05
    assert trainer_module._with_noise(z, 0.0) is z
    runs = [trainer_of(epoch=3, warmup_epochs=2, freeze_at=1.0, z_noise=noise) for noise in (0.0, 0.5)]
    for run in runs:
        run.fit()
    ours, theirs = (run.history for run in runs)
    assert ours[0]["structure"] != theirs[0]["structure"]
    trainer = in_codes(trainer_of(z_noise=0.5))
    trainer.model.eval()  # no dropout
    assert len({float(trainer._scorer_step(torch.arange(5), CODES)[0]) for _ in range(2)}) == 1


def test_frozen_noise_blurs_the_frozen_codes_alone(trainer_of: TrainerMaker) -> None:
    """Other losses at every step of the frozen phase, the same before it; the codes' vectors still learn."""
    losses = []
    for noise in (0.0, 0.5):
        torch.manual_seed(0)
        run = trainer_of(epoch=4, warmup_epochs=1, freeze_at=0.5, frozen_noise=noise)
        run.fit()
        losses.append([row["structure"] for row in run.history])
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]
    trainer = in_codes(trainer_of(frozen_noise=0.5))
    trainer.model.eval()  # no dropout
    once, again = (float(trainer._scorer_step(torch.arange(5), FROZEN)[0]) for _ in range(2))
    assert once != again
    assert all(bool(book.grad.any()) for book in trainer.model.rq_codebook.parameters() if book.grad is not None)
    assert any(book.grad is not None for book in trainer.model.rq_codebook.parameters())


@pytest.mark.parametrize("phase", [WARM_UP, CODES])
def test_inputs_are_masked_in_training_and_not_in_what_is_kept(
    trainer_of: TrainerMaker, monkeypatch: pytest.MonkeyPatch, phase: Phase
) -> None:
    """A pass for the scorer and the encoder pass with its gradient have one mask; the epoch's last codes have none."""
    trainer = trainer_of(mask_inputs=0.5, encoder_every=1, batch=8)
    passes: list[torch.Tensor | None] = []
    encode = trainer.model.encode

    def recording(g: Any, text: Any = None, masked: torch.Tensor | None = None) -> Any:
        passes.append(masked)
        return encode(g, text, masked)

    monkeypatch.setattr(trainer.model, "encode", recording)
    trainer._train_epoch(phase)
    unmasked = [masked is None for masked in passes]
    assert unmasked[-1] and trainer.masked is None
    assert not any(unmasked[1:-1])  # the first one is for k-means
    parts = [float(masked.float().mean()) for masked in passes if masked is not None]
    assert 0.3 < sum(parts) / len(parts) < 0.7 and len(set(parts)) > 1
    masked, row = torch.arange(M) == 5, trainer.model.entity_embedding.data[5]
    before = [trainer.model.clean_z(trainer.graph, None, mask) for mask in (masked, None)]
    row += 1
    after = [trainer.model.clean_z(trainer.graph, None, mask) for mask in (masked, None)]
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False]


def test_warm_up_below_one_is_a_part_of_the_run(trainer_of: TrainerMaker) -> None:
    trainer = trainer_of(epoch=8, warmup_epochs=0.5, freeze_at=0.75)
    trainer.fit()
    assert [row["phase"] for row in trainer.history] == ["warm-up"] * 4 + ["codes"] * 2 + ["frozen"] * 2


@pytest.mark.parametrize("settings", [{"warmup_epochs": 3}, {"warmup_epochs": 0}, {"eval_every": 3}])
def test_best_has_the_highest_valid_mrr_of_the_epochs_with_codes(
    trainer_of: TrainerMaker, settings: dict[str, Any]
) -> None:
    trainer = trainer_of(epoch=8, lr=0.03, **settings)
    trainer.fit()
    scored = [row for row in trainer.history if "valid" in row]
    with_codes = [row for row in scored if row["phase"] != "warm-up"]
    assert trainer.best is not None
    top = max(row["valid"]["mrr"] for row in with_codes)
    first = next(row for row in with_codes if row["valid"]["mrr"] == top)
    assert trainer.best["epoch"] == first["epoch"] and trainer.best["valid"]["mrr"] == top
    assert scored[-1]["epoch"] == 8
    # what is kept scores what was recorded, from the codes
    from model.evaluation import evaluate_codes

    scorer, relations = scorer_of(trainer.model_args, trainer.best, "cpu")
    again = evaluate_codes(scorer, relations, trainer.best["codes"], trainer.kg, "valid")
    assert again["mrr"] == pytest.approx(top, abs=1e-9)


def test_best_is_never_from_the_warm_up(trainer_of: TrainerMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = trainer_module.evaluate_vectors  # what scores the warm-up: make it look perfect
    monkeypatch.setattr(trainer_module, "evaluate_vectors", lambda *words: evaluate(*words) | {"mrr": 1.0})
    trainer = trainer_of(epoch=5, warmup_epochs=4)
    trainer.fit()
    assert [row["valid"]["mrr"] for row in trainer.history[:4]] == [1.0] * 4
    assert trainer.best is not None and trainer.best["epoch"] == 5


def test_max_minutes_fits_the_schedule_to_the_clock(trainer_of: TrainerMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of a second per step, a limit of as many seconds as 10 epochs have steps: a run of 10 epochs."""
    now, settings = [100.0], {"eval_every": 3}
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    by_epochs = trainer_of(epoch=10, **settings)
    steps = -(-len(by_epochs.heads) // by_epochs.config.batch)
    by_clock = trainer_of(epoch=10**6, max_minutes=10 * steps / 60, **settings)
    step = by_clock._scorer_step

    def timed(batch: Tensor, phase: Phase) -> Any:
        now[0] += 1
        return step(batch, phase)

    by_clock._scorer_step = timed  # type: ignore[method-assign]
    by_clock.fit()
    by_epochs.fit()
    assert by_clock.seconds == 10 * steps
    assert [row["phase"] for row in by_clock.history] == ["warm-up"] + ["codes"] * 8 + ["frozen"]
    for ours, theirs in zip(by_clock.history, by_epochs.history, strict=True):
        assert ours["phase"] == theirs["phase"] and ("valid" in ours) == ("valid" in theirs)
        assert ours["lr"] == pytest.approx(theirs["lr"])
    assert "valid" in by_clock.history[-1]  # though no third epoch: it is the last


def test_time_that_ends_while_an_epoch_is_ranked_ends_the_run(
    trainer_of: TrainerMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No epoch begins when the time is over, and none is frozen where --freeze_at 1 says never."""
    now = [0.0]
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    trainer = trainer_of(epoch=10**6, max_minutes=10 / 60, freeze_at=1.0)
    validate, train = trainer._validate, trainer._train_epoch

    def slowly(phase: Phase) -> dict[str, Any]:
        now[0] += 4
        return validate(phase)

    def timed(phase: Phase) -> dict[str, Any]:
        now[0] += 2
        return train(phase)

    monkeypatch.setattr(trainer, "_validate", slowly)
    monkeypatch.setattr(trainer, "_train_epoch", timed)
    trainer.fit()
    assert trainer.seconds == 12 and len(trainer.history) == 2
    assert all(row["phase"] != "frozen" and "valid" in row for row in trainer.history)


@pytest.mark.parametrize("shape", [{"warmup_epochs": 0.5, "freeze_at": 0.5}, {"warmup_epochs": 0.5, "freeze_at": 0.75}])
def test_a_longer_run_that_warms_up_again_starts_its_codes_anew(
    trainer_of: TrainerMaker, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
) -> None:
    """4 epochs, restored as 12: by its share of the run the warm-up is back, and what it moves must reach the codes."""
    trainer_of(epoch=4, **shape).fit()
    longer = trainer_of(epoch=12, **shape)
    longer.restore(load_torch(longer.checkpoint, "checkpoint"))
    before, starts = longer.codes, []
    init = longer.model.rq_codebook.init_from_data

    def watched(*words: Any, **more: Any) -> None:
        starts.append(longer.epoch)
        init(*words, **more)

    monkeypatch.setattr(longer.model.rq_codebook, "init_from_data", watched)
    longer.fit()
    assert [row["phase"] for row in longer.history[4:7]] == ["warm-up", "warm-up", longer.history[6]["phase"]]
    assert longer.history[6]["phase"] != "warm-up" and starts == [6]
    assert before is not None and longer.codes is not None and not torch.equal(before, longer.codes)


def test_posthoc_codes_of_a_longer_run_are_of_its_last_vectors(trainer_of: TrainerMaker) -> None:
    trainer_of(epoch=2, quantizer="posthoc", lr=1e-3).fit()
    longer = trainer_of(epoch=20, quantizer="posthoc", lr=1e-3)
    longer.restore(load_torch(longer.checkpoint, "checkpoint"))
    assert longer.best is not None and longer.best["epoch"] == 2
    longer.fit()
    assert longer.epoch == longer.best["epoch"] == 20
    again = trainer_of(epoch=20, quantizer="posthoc", lr=1e-3)
    again.restore(load_torch(longer.checkpoint, "checkpoint"))
    again.fit()  # nothing is left to do
    assert_same(again.best, longer.best)


def test_what_the_collision_pass_costs_is_no_handicap_for_the_best(trainer_of: TrainerMaker) -> None:
    """Epochs compare by their codes as trained: beating the best only as it is after the pass is not enough."""
    trainer = trainer_of(epoch=3)
    trainer.fit()
    assert trainer.best is not None and trainer.codes is not None
    trainer.codes[:5] = trainer.codes[5]  # collisions
    trainer.best = None
    before = trainer._validate(CODES)["mrr"]
    best = trainer.best
    assert best is not None and trainer.resolve_collisions() >= 5
    assert best["valid_before_collision_pass"]["mrr"] == before != best["valid"]["mrr"]
    best["valid"]["mrr"] = before / 2  # a costly pass
    trainer._validate(CODES)  # the same codes again are no better
    assert trainer.best is best


def test_stopped_while_ranking_the_epoch_before_is_what_is_saved(trainer_of: TrainerMaker) -> None:
    trainer = trainer_of(epoch=5)
    validate = trainer._validate

    def stop_at_third(phase: Phase) -> dict[str, Any]:
        if trainer.epoch == 3:
            raise KeyboardInterrupt
        return validate(phase)

    trainer._validate = stop_at_third  # type: ignore[method-assign]
    assert trainer.saved_epoch == 0
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.saved_epoch == 2 == load_torch(trainer.checkpoint, "checkpoint")["last"]["epoch"]
    assert "epoch 2 is saved" in trainer._after_nan()
    fresh = trainer_of(epoch=5)
    fresh.restore(load_torch(trainer.checkpoint, "checkpoint"))
    assert fresh.saved_epoch == 2


# ---------------------------------------------------------------- repeatability


def test_one_seed_one_result(trainer_of: TrainerMaker) -> None:
    results = []
    for seed in (0, 0, 1):
        trainer = trainer_of(epoch=3, seed=seed)
        trainer.fit()
        results.append(trainer)
    assert results[0].codes is not None and results[2].codes is not None
    assert_same(results[0].best, results[1].best)
    assert_same(results[0].history, results[1].history)
    assert not torch.equal(results[0].codes, results[2].codes)


RESUMABLE: list[dict[str, Any]] = [
    {"epoch": 6, "freeze_at": 0.6, "warmup_epochs": 2},
    {"epoch": 5, "encoder_every": 3, "eval_every": 2},
    {"epoch": 4, "model": {"decoder": "conve", "tf_layers": 2}},
    {"epoch": 5, "freeze_at": 0.5, "warmup_epochs": 0.5, "encoder_every": 2, "frozen_noise": 0.2},
    {"epoch": 4, "num_negatives": 9, "inputs": "learned+text"},
    {"epoch": 4, "inputs": "neighbours+learned", "z_noise": 0.3},
    {"epoch": 5, "freeze_at": 0.5, "weight_average": 0.9},
    {"epoch": 5, "freeze_at": 0.6, "warmup_epochs": 2, "mask_inputs": 0.3, "eval_every": 2},
    {"epoch": 3, "quantizer": "none", "freeze_at": 0.3, "weight_average": 0.9},
    {"epoch": 3, "quantizer": "random"},
    {"epoch": 3, "quantizer": "posthoc"},
]


def stop_after(trainer: Trainer, epochs: int) -> None:
    """Have the trainer end as if it were stopped once ``epochs`` epochs of the run's are saved."""
    save = trainer.save

    def stopping() -> None:
        save()
        if trainer.epoch == epochs < trainer.config.epoch:
            raise KeyboardInterrupt

    trainer.save = stopping  # type: ignore[method-assign]


@pytest.mark.parametrize("settings", RESUMABLE, ids=str)
def test_resumed_after_every_epoch_is_bit_identical(trainer_of: TrainerMaker, settings: dict[str, Any]) -> None:
    text = torch.randn(M, 7, generator=torch.Generator().manual_seed(1))
    settings = dict(settings)
    model = settings.pop("model", {}) | {"text_dim": 7}
    straight = trainer_of(model, text, **settings)
    straight.fit()
    uninterrupted = load_torch(straight.checkpoint, "checkpoint")
    straight.checkpoint.unlink()

    for epoch in range(settings["epoch"]):
        trainer = trainer_of(model, text, **settings)  # built anew each time, as a new process would
        if epoch:
            torch.rand(7)  # whatever else the new process drew must not matter
            trainer.restore(load_torch(trainer.checkpoint, "checkpoint"))
        assert trainer.epoch == epoch
        with pytest.raises(KeyboardInterrupt) if epoch + 1 < settings["epoch"] else nullcontext():
            stop_after(trainer, epoch + 1)
            trainer.fit()
    resumed = load_torch(straight.checkpoint, "checkpoint")
    assert len(resumed["last"]["history"]) == settings["epoch"]
    assert_same(uninterrupted, resumed)


def test_a_run_that_stalls_ends_early_resumed_or_not(trainer_of: TrainerMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing moves at this rate, so the first ranking from codes (epoch 6 of 40) stays the best."""
    settings = {"epoch": 40, "lr": 1e-12, "warmup_epochs": 0.1, "freeze_at": 0.1, "eval_every": 2}
    straight = trainer_of(**settings)
    straight.fit()
    assert straight.best is not None and (straight.best["epoch"], straight.epoch) == (6, 26)
    uninterrupted = load_torch(straight.checkpoint, "checkpoint")

    straight.checkpoint.unlink()
    first = trainer_of(**settings)
    stop_after(first, 17)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    for _ in range(2):  # the second time nothing is left to do
        again = trainer_of(**settings)
        again.restore(load_torch(again.checkpoint, "checkpoint"))
        again.fit()
        assert_same(uninterrupted, load_torch(again.checkpoint, "checkpoint"))

    monkeypatch.setattr(schedule_module, "PATIENCE", 2.0)  # the control
    whole = trainer_of(**settings)
    whole.fit()
    assert whole.epoch == 40


def test_a_run_never_stalls_before_its_codes_are_fixed() -> None:
    schedule = schedule_module.schedule_of(Config(freeze_at=0.6))
    assert schedule.stalled(0.86, 0.1, worse=10)
    assert not (schedule.stalled(0.8, 0.1, 10) or schedule.stalled(0.9, 0.7, 10) or schedule.stalled(0.86, 0.1, 9))
    assert not schedule_module.schedule_of(Config(freeze_at=0.1, quantizer="posthoc")).stalled(0.9, 0.1, 10)


# ---------------------------------------------------------------- faults


def test_a_loss_that_is_not_a_number_names_epoch_and_step(trainer_of: TrainerMaker) -> None:
    trainer = trainer_of(epoch=5)
    step, steps, calls = trainer._scorer_step, -(-len(trainer.heads) // trainer.config.batch), []

    def poisoned(batch: Tensor, phase: Phase) -> Any:
        calls.append(phase)
        if len(calls) == 2 * steps + 3:
            with torch.no_grad():
                trainer.model.relation_embedding.fill_(float("nan"))
        return step(batch, phase)

    trainer._scorer_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(InputError, match="nan in epoch 3, step 3") as error:
        trainer.fit()
    assert "\n" not in str(error.value)
    stored = load_torch(trainer.checkpoint, "checkpoint")  # the last good epoch stays
    assert stored["last"]["epoch"] == 2
    assert all(bool(value.isfinite().all()) for value in stored["last"]["model"].values() if value.is_floating_point())


@pytest.mark.parametrize(("loss", "guess"), [("ce", math.log(M)), ("bce", math.inf)])
def test_a_loss_that_rises_above_a_uniform_guess_is_reported(trainer_of: TrainerMaker, loss: str, guess: float) -> None:
    lines: list[str] = []
    trainer = trainer_of(epoch=1, lr=1e-9, loss=loss)
    trainer.fit()
    if loss == "ce":
        assert trainer.history[0]["structure"] == pytest.approx(guess, rel=0.02)
    rows = [math.log(M) + more for more in (5, 4, 4.5, 4.6, -2, -1, 0.1)]
    trainer = trainer_of(epoch=len(rows), loss=loss)
    trainer._train_epoch = lambda phase: {  # type: ignore[method-assign]
        "structure": rows[trainer.epoch], "semantic": 0.0, "quantization": 0.0, "levels": [],
    }  # fmt: skip
    trainer._validate = lambda phase: {"mrr": 0.1, "hits@10": 0.1}  # type: ignore[method-assign]
    trainer._start_epoch = lambda phase: None  # type: ignore[method-assign]
    trainer.report = lines.append
    trainer.fit()
    found = [lines[i - 1].split()[1] for i, line in enumerate(lines) if line.startswith("warning")]
    assert found == (["3", "4", "7"] if loss == "ce" else [])  # not where it falls, nor below the guess


def test_a_parameter_spoilt_by_the_last_step_is_an_input_error_too(trainer_of: TrainerMaker) -> None:
    """The loss of an epoch's last step is taken before its update: what the update spoils shows in the ranking."""
    trainer = trainer_of(epoch=3)
    step, count = trainer.optimizer.step, []
    steps = -(-len(trainer.heads) // trainer.config.batch)

    def spoil(*words: Any) -> None:
        step(*words)
        count.append(1)
        if len(count) == steps:
            with torch.no_grad():
                trainer.model.relation_embedding.fill_(float("nan"))

    trainer.optimizer.step = spoil  # type: ignore
    with pytest.raises(InputError, match="epoch 1"):
        trainer.fit()


def test_a_last_batch_of_one_query_trains(trainer_of: TrainerMaker) -> None:
    """Batch norm needs two rows: a number of queries that leaves one over must not end the run."""
    trainer = trainer_of({"decoder": "conve"}, epoch=2)
    queries = len(trainer.heads)
    batch = next(size for size in range(2, queries) if queries % size == 1)
    trainer = trainer_of({"decoder": "conve"}, epoch=2, batch=batch)
    trainer.fit()
    assert trainer.epoch == 2


def test_integers_are_decided_in_full_precision(trainer_of: TrainerMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """model/precision.py: training's own precision is left behind where codes are assigned and epochs are ranked."""
    trainer = trainer_of(epoch=2)
    monkeypatch.setattr(trainer_module, "TRAINING_PRECISION", "medium")
    seen: list[str] = []
    codebook, assign, validate = trainer.model.rq_codebook, trainer.model.rq_codebook.cal_codes, trainer._validate

    def noted(function: Any) -> Any:
        def call(given: Any) -> Any:
            seen.append(torch.get_float32_matmul_precision())
            return function(given)

        return call

    monkeypatch.setattr(codebook, "cal_codes", noted(assign))
    monkeypatch.setattr(trainer, "_validate", noted(validate))
    trainer.fit()
    assert len(seen) > 2 and set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "highest"

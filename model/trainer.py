"""Training of RQGCN: epochs of 1-N queries, assignments, checkpoints that resume exactly, the best epoch.

One step (Eq. 9): the scorer sees only decoded codes; their gradient is handed, straight through, to the encoder,
together with the quantization loss. The encoder acts on the scores through its codes alone, so its pass over the
graph may be taken once per ``encoder_every`` scorer steps (gradients are averaged over them). Codes are assigned anew
at the first such pass after ``assign_every`` scorer steps, and at the end of an epoch.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import InputError
from common.files import save_torch
from data.knowledge_graph import KnowledgeGraph
from model.averaging import WeightAverage
from model.collisions import resolve_collisions
from model.data_parallel import World, share_batch_norms
from model.evaluation import evaluate_codes, evaluate_vectors
from model.losses import (
    LOSSES,
    Sample,
    draw_sample,
    gather_targets,
    sampled_softmax_cross_entropy,
)
from model.precision import matmul_precision, return_freed_memory
from model.quantizers import code_perplexity, code_usage
from model.queries import training_queries
from model.relational_graph import RelationalGraph
from model.RQGCN import RQGCN
from model.stored import check_fits, check_optimizer, settings_of


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the flags of run_rq.py under the same names."""

    epoch: int = 800
    lr: float = 5e-4
    encoder_lr: float | None = None
    l2: float = 1e-8
    batch: int = 1024
    loss: str = "ce"
    num_negatives: int = 0
    tails_at_once: int = 0
    lbl_smooth: float = 0.1
    vq_weight: float = 1.0
    text_weight: float = 1.0
    relation_weight: float = 0.0
    warmup_epochs: float = 1  # below 1: a part of the run
    z_noise: float = 0.0
    frozen_noise: float = 0.0
    weight_average: float | None = None
    freeze_at: float = 0.85
    encoder_every: int = 8
    assign_every: int = 8
    lr_schedule: str = "cosine"
    eval_every: int = 1
    patience: int = 0
    max_minutes: float = 0
    teacher_weight: float = 0.7
    control: str | None = None
    matmul_precision: str = "medium"
    seed: int = 0


class Phase(NamedTuple):
    """Where training stands: ``progress`` in [0, 1], and which path the scores take."""

    progress: float
    name: str  # "warm-up" (unquantized), "codes" or "frozen" (codes, or vectors, stand still: no encoder pass)


class Trainer:
    """Trains ``model`` on ``kg`` and keeps ``checkpoint`` (one file with ``last`` and ``best``).

    ``config``: the model's arguments; ``comparable``: what must agree for the run to be continued; both are stored.
    ``text``: [M, T] for Eq. 8 or None. ``report`` receives one line per epoch. ``world``: the processes that share the
    work, by default this one alone. ``codes`` [M, L, Q] are given ones, for which codebooks, relations and decoder are
    trained. Raises InputError for a batch of fewer queries than there are processes.
    """

    def __init__(
        self,
        kg: KnowledgeGraph,
        model: RQGCN,
        settings: TrainSettings,
        checkpoint: Path,
        config: dict[str, Any],
        comparable: dict[str, Any],
        text: Tensor | None = None,
        device: torch.device | str = "cpu",
        report: Callable[[str], None] = print,
        world: World | None = None,
        codes: Tensor | None = None,
    ) -> None:
        self.world = world = world or World()
        self.kg, self.model, self.settings, self.report = kg, model.to(device), settings, report
        self.checkpoint, self.config, self.comparable = checkpoint, config, comparable
        self.device = torch.device(device)
        self.text = None if text is None else text.to(self.device)
        self.graph = RelationalGraph.from_triples(kg.train, kg.num_entities, kg.num_relations).to(self.device)
        queries = training_queries(kg, settings.tails_at_once).to(self.device)
        self.heads, self.rels, self.indptr, self.targets = queries
        least = min(settings.batch, len(self.heads))
        if least < world.size:
            raise InputError(f"a batch has {least} queries for {world.size} processes; start fewer or raise --batch")
        share_batch_norms(model.scorer, world)
        world.copy_from_first(model.state_dict().values())
        self.optimizer = self._make_optimizer()
        self.average = self._make_average()
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.trained_on = kg.train_digest()
        self.codes_given = codes is not None
        self.unquantized = settings.control in ("unquantized", "frozen_vectors")
        self.codes: Tensor | None = None if codes is None else codes.to(self.device)  # [M, L, Q], those in use
        self.z: Tensor | None = None  # [M, L, code_dim], the vectors in use without codes
        self.epoch = 0
        self.saved_epoch = 0  # the last one in the checkpoint; 0: this run has none
        self.seconds = 0.0  # of training so far, resumed parts included
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self._clock = time.monotonic()

    def _make_optimizer(self) -> torch.optim.Adam:
        """Adam; what steps once per ``encoder_every`` scorer steps has ``encoder_lr``, by default its root times lr."""
        settings = self.settings
        encoder_lr = settings.encoder_lr or settings.lr * math.sqrt(settings.encoder_every)
        every_step = {id(p) for p in [*self.model.scorer.parameters(), *self.model.relation_parameters()]}
        if self.model.W_s is not None:
            every_step |= {id(p) for p in self.model.W_s.parameters()}
        groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for parameter in self.model.parameters():
            groups[id(parameter) in every_step].append(parameter)
        return torch.optim.Adam(
            [
                {"params": groups[True], "rate": 1.0},
                {"params": groups[False], "rate": encoder_lr / settings.lr},
            ],
            lr=settings.lr,
            weight_decay=settings.l2,
        )

    def _make_average(self) -> WeightAverage | None:
        """Of what trains on once codes are frozen; of all weights where a control leaves codes out."""
        if self.settings.weight_average is None:
            return None
        trained = self.model.parameters() if self._never_frozen() else self.optimizer.param_groups[0]["params"]
        statistics = [buffer for buffer in self.model.scorer.decoder.buffers() if buffer.is_floating_point()]
        return WeightAverage([*trained, *statistics], self.settings.weight_average)

    def _never_frozen(self) -> bool:
        return self.settings.control in ("unquantized", "posthoc")

    # ---------------------------------------------------------------- one epoch

    def _phase(self, epoch: float) -> Phase:
        """Progress by epochs or, with ``max_minutes``, by the clock, whichever is further."""
        progress = epoch / self.settings.epoch
        if self.settings.max_minutes:
            progress = max(progress, self._elapsed() / (60 * self.settings.max_minutes))
        if self.codes_given or self.settings.control == "random_codes":
            return Phase(progress, "frozen")
        until = self.settings.warmup_epochs
        if self._never_frozen() or (progress if until < 1 else epoch) < until:
            return Phase(progress, "warm-up")
        if progress >= self.settings.freeze_at < 1:
            return Phase(progress, "frozen")
        return Phase(progress, "warm-up" if self.unquantized else "codes")

    def _elapsed(self) -> float:
        return self.world.same(self.seconds + time.monotonic() - self._clock)

    def _set_lr(self, progress: float) -> None:
        scale = 1.0
        if self.settings.lr_schedule == "cosine":
            scale = 0.01 + 0.99 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * group["rate"] * scale

    def _structure_loss(self, q_all: Tensor, batch: Tensor, sample: Sample | None) -> tuple[Tensor, Tensor]:
        """L_st (Eq. 7) and L_se (Eq. 8) of a batch of queries; heads and tails are both rows of q_all [M, D], or of
        q_all [U, D] of a sample's entities.
        """
        heads, smoothing = self.heads[batch], self.settings.lbl_smooth
        q_head, relations = q_all[heads if sample is None else sample.heads], self.model.relation_vectors()
        query = self.model.scorer.decoder.query(q_head, relations[self.rels[batch]])
        if sample is None:
            targets = gather_targets(self.indptr, self.targets, batch)
            loss = partial(LOSSES[self.settings.loss], targets=targets, label_smoothing=smoothing)
        else:
            targets = sample.targets
            loss = partial(
                sampled_softmax_cross_entropy, sample=sample, num_entities=self.kg.num_entities,
                label_smoothing=smoothing,
            )  # fmt: skip
        structure = self._of_members(loss, query, q_all)
        if self.text is None:
            return structure, structure.new_zeros(())
        return structure, self.model.semantic_loss(q_head, self.text[heads])

    def _of_members(self, loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, q_all: Tensor) -> Tensor:
        """``loss`` of each member's own scores, their mean: what members learn apart, they get wrong apart."""
        members = self.model.members
        if members == 1:
            return loss(query, q_all)
        slices = zip(query.chunk(members, dim=1), q_all.chunk(members, dim=1), strict=True)
        return torch.stack([loss(q.contiguous(), e.contiguous()) for q, e in slices]).mean()

    def _draw(self, batch: Tensor) -> Sample | None:
        """With ``num_negatives``: a fresh set of negatives, and which entities the batch needs with it."""
        count = self.settings.num_negatives
        if not count:
            return None
        targets = gather_targets(self.indptr, self.targets, batch)
        return draw_sample(self.heads[batch], targets, self.kg.num_entities, count, self.generator)

    def _refresh(self, phase: Phase, z: Tensor | None = None) -> None:
        """What the scorer sees until the next encoder pass: vectors while warming up, codes from then on.

        ``z``: [M, L, code_dim] as ``clean_z`` gives it now, where the caller has it. A run that is made longer may warm
        up again: the codes that it had are those of other vectors by then.
        """
        z = self.model.clean_z(self.graph, self.text) if z is None else z
        if phase.name == "warm-up" or self.unquantized:
            self.z, self.codes = z, None
        else:
            own = self.model.rq_codebook.cal_codes(self.world.own(z))
            self.z, self.codes = None, self.world.gather(own, len(z))

    def _start_epoch(self, phase: Phase) -> None:
        """Codebooks by residual k-means of the warmed-up vectors at first; later, unused codes get a new place."""
        codebook = self.model.rq_codebook
        if phase.name == "frozen" and self.codes is not None:
            return
        if self.settings.control == "random_codes":
            codes = codebook.random_codes(self.kg.num_entities, self.model.seq_len, self.generator)
            self.codes = codes.to(self.device)
            return
        z = self.model.clean_z(self.graph, self.text)
        if phase.name != "warm-up" and not self.unquantized:
            self.world.copy_from_first([z])
            if self.codes is None:
                codebook.init_from_data(z, generator=self.generator)
            else:
                codebook.revive_dead_codes(z, self.codes, generator=self.generator)
            self.world.copy_from_first(codebook.state_dict().values())  # a GPU's sums differ in their last bits
        self._refresh(phase, z)

    def _scorer_step(self, batch: Tensor, phase: Phase) -> tuple[Tensor, Tensor, Tensor]:
        """Backward of L_st + L_se. Returns (L_st, L_se, their gradient with respect to z [M, L, code_dim]).

        Of several processes, each takes its part of the batch and returns its part of the sums that these are.
        With sampled negatives only the entities that the batch needs are decoded, and the gradient is sparse.
        """
        triples, queries = self._shares(batch)
        batch = self.world.own(batch)
        sample = self._draw(batch)
        with self.world.own_randomness():  # noise too: of a sample it has a size of its own in every process
            z_q, seen = self._decoded(phase, sample)
            structure, semantic = self._structure_loss(self.model.scorer.entity_vectors(seen), batch, sample)
        structure, semantic = structure * triples, semantic * queries
        (structure + self.settings.text_weight * semantic).backward()
        gradient = z_q.grad
        assert gradient is not None
        z_q.grad = None
        if sample is not None:
            shape = (self.kg.num_entities, *gradient.shape[1:])
            gradient = torch.sparse_coo_tensor(
                sample.entities[None], gradient, shape, is_coalesced=True, check_invariants=False
            )
        return structure.detach(), semantic.detach(), gradient

    def _decoded(self, phase: Phase, sample: Sample | None) -> tuple[Tensor, Tensor]:
        """z_q [M, L, code_dim] (or [U, L, code_dim] of a sample's entities), which gets the gradient of z, and what the
        scorer sees of it.
        """
        frozen = phase.name == "frozen"
        if phase.name == "warm-up" or self.unquantized:
            assert self.z is not None
            z_q = self.z if sample is None else self.z[sample.entities]
            noise = self.settings.frozen_noise if frozen else self.settings.z_noise
            z_q = _blurred(z_q.detach(), noise).requires_grad_()
            return z_q, z_q
        assert self.codes is not None
        z_q = self.model.rq_codebook.decode_from_codes(self.codes if sample is None else self.codes[sample.entities])
        z_q.requires_grad_().retain_grad()  # codes that follow averages (EMA) have none of their own
        return z_q, _blurred(z_q, self.settings.frozen_noise) if frozen else z_q

    def _shares(self, batch: Tensor) -> tuple[float, float]:
        """What this process's mean losses weigh in the batch's: its part of what L_st averages, and of the queries."""
        tails = self.indptr[batch + 1] - self.indptr[batch]
        return LOSSES[self.settings.loss].share(tails, self.world.own(tails)), self.world.share(len(batch))

    def _encoder_step(self, gradient: Tensor, phase: Phase) -> float:
        """Backward through the encoder: ``gradient`` of z, straight through the codes, and L_q. Returns L_q's value.

        Of several processes, each brings its part of ``gradient`` and takes its entities' part of L_q.
        """
        z = self.model.encode(self.graph, self.text).z
        surrogate, quantization = (z * gradient).sum(), 0.0
        if phase.name == "codes":
            assert self.codes is not None
            own = self.world.own
            total_loss = self.model.rq_codebook(own(z), codes=own(self.codes)).total_loss * self.world.share(len(z))
            surrogate = surrogate + self.settings.vq_weight * total_loss
            quantization = float(total_loss.detach())
        surrogate.backward()
        return quantization

    def _batches(self) -> list[Tensor]:
        """The queries in a new order, in batches; a last one of a single query joins the one before (batch norm), as
        does one that would leave a process without a query."""
        order = torch.randperm(len(self.heads), generator=self.generator).to(self.device)
        batches = list(order.split(self.settings.batch))
        if len(batches) > 1 and len(batches[-1]) < max(2, self.world.size):
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def _train_epoch(self) -> dict[str, Any]:
        settings = self.settings
        self.model.train()
        batches = self._batches()
        phase = self._phase(self.epoch)
        self._start_epoch(phase)
        averaging = self._averaging(phase)
        totals = {"structure": 0.0, "semantic": 0.0, "quantization": 0.0}
        gradient, waiting, encoder_steps = None, 0, 0  # gradient of z, summed over the steps since the encoder's pass
        unassigned = 0  # steps since codes were assigned
        title = f"epoch {self.epoch + 1} {phase.name}"
        for step, batch in enumerate(tqdm(batches, desc=title, leave=False, unit="step", disable=None)):
            self._set_lr(self._phase(self.epoch + step / len(batches)).progress)
            self.optimizer.zero_grad(set_to_none=True)
            with matmul_precision(settings.matmul_precision):
                structure, semantic, own = self._scorer_step(batch, phase)
            quantization = 0.0
            if phase.name != "frozen":
                gradient = own.to_dense() if gradient is None else gradient.add_(own)
                waiting += 1
            if waiting and (waiting == settings.encoder_every or step + 1 == len(batches)):
                assert gradient is not None
                with matmul_precision(settings.matmul_precision):
                    quantization = self._encoder_step(gradient / waiting, phase)
                gradient, waiting, encoder_steps = None, 0, encoder_steps + 1
            losses = [float(structure), float(semantic), quantization]
            losses = self.world.sum_gradients(self.model.parameters(), losses)
            self.optimizer.step()
            if averaging is not None:
                averaging.update()
            unassigned += 1
            due = phase.name == "warm-up" or unassigned >= settings.assign_every or step + 1 == len(batches)
            if phase.name != "frozen" and not waiting and due:
                self._refresh(phase)
                unassigned = 0
            self._check_finite(sum(losses), step)
            totals["structure"] += losses[0] / len(batches)
            totals["semantic"] += losses[1] / len(batches)
            totals["quantization"] += losses[2]
        totals["quantization"] /= max(1, encoder_steps)
        levels = []
        if phase.name == "codes":
            own_part = self.model.rq_codebook.level_losses * self.world.share(self.kg.num_entities)
            levels = self.world.sum(own_part).tolist()
        return {"phase": phase.name, **totals, "levels": levels, "lr": self.optimizer.param_groups[0]["lr"]}

    def _averaging(self, phase: Phase) -> WeightAverage | None:
        """The average, while codes are frozen (a control without codes: from when they would be), else None.

        A run that is made longer may warm up again, and then has no average any more.
        """
        if self.average is None:
            return None
        if phase.name == "frozen" or (self._never_frozen() and phase.progress >= self.settings.freeze_at):
            return self.average
        self.average.forget()
        return None

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            with self.world.together():
                where = f"epoch {self.epoch + 1}, step {step + 1}"
                raise InputError(f"the loss became {loss} in {where}; {self._after_nan()}")

    def _rises_above_guessing(self) -> bool:
        """L_st of the last epoch: some decoders begin above even scores and fall at once (ConvE), so one is no sign."""
        last = [row["structure"] for row in self.history[-2:]]
        return len(last) == 2 and last[1] > self._loss_of_guessing() and last[1] > last[0]

    def _loss_of_guessing(self) -> float:
        """L_st of even scores: log M (and log 2R for relations) of the softmax loss; nothing is asked of another."""
        if self.settings.loss != "ce":
            return math.inf
        return math.log(self.kg.num_entities)

    def _after_nan(self) -> str:
        kept = f"epoch {self.saved_epoch} is saved in {self.checkpoint}: " if self.saved_epoch else ""
        return f"{kept}try a lower --lr, a lower --vq_weight or --loss ce"

    # ---------------------------------------------------------------- all epochs

    def fit(self) -> None:
        """Train to the last epoch, the time limit or the end of patience; resumes where ``restore`` left it.

        A limit that ends the run while it warms up still gives it codes, scored as they are.
        """
        self._clock = time.monotonic()
        done = self._finished() or self._out_of_patience()
        while not done:
            row = {"epoch": self.epoch + 1, **self._train_epoch()}
            self.epoch += 1
            done = self._finished()
            if self.epoch % self.settings.eval_every == 0 or done:
                row["valid"] = self._validate(row["phase"])
            self._advance_clock()
            done = done or ("valid" in row and self._finished())  # the time may have ended while it was ranked
            row["seconds"] = self.seconds
            self.history.append(row)
            done = done or self._out_of_patience()
            self.report(format_epoch(row))
            if self._rises_above_guessing():
                guess = self._loss_of_guessing()
                self.report(f"warning: L_st is above {guess:.2f}, that of even scores, and rises: try a lower --lr")
            self.save()
            return_freed_memory()
        as_dumped = self.best is not None and (self.unquantized or self.codes is not None)
        if not as_dumped and self._finished():
            if self.settings.control == "posthoc":
                self.best = None  # of the run when it was shorter
                if self.average is not None:
                    self.average.settle()
            ends_as = "frozen" if self.unquantized else "codes"
            self._start_epoch(Phase(1.0, ends_as))
            self._validate(ends_as)
            self.save()

    def _finished(self) -> bool:
        return self.epoch >= self.settings.epoch or self._phase(self.epoch).progress >= 1.0

    def _advance_clock(self) -> None:
        self.seconds, self._clock = self._elapsed(), time.monotonic()

    def _validate(self, phase: str) -> dict[str, Any]:
        """Metrics on valid by the path of the phase; the best epoch is chosen among those scored from codes."""
        averaged = nullcontext() if self.average is None else self.average.in_place()
        try:
            with averaged:
                return self._validate_finite(phase)
        except ValueError as error:  # ranking refuses NaN scores
            raise InputError(f"epoch {self.epoch} cannot be ranked: {error}; {self._after_nan()}") from error

    def _validate_finite(self, phase: str) -> dict[str, Any]:
        model = self.model
        model.eval()
        with torch.no_grad():
            relations = model.relation_vectors()
            if phase == "warm-up" or self.unquantized:
                q_all = model.scorer.entity_vectors(model.clean_z(self.graph, self.text))
                metrics = evaluate_vectors(model.scorer, relations, q_all, self.kg, "valid", self.world)
            else:
                assert self.codes is not None
                metrics = self._scored_codes(relations, self.codes)
        scored_as_dumped = phase != "warm-up" or self.settings.control == "unquantized"
        if scored_as_dumped and (self.best is None or metrics["mrr"] > mrr_as_trained(self.best)):
            self.best = {
                "epoch": self.epoch,
                "valid": metrics,
                "codes": None if self.codes is None else self.codes.clone(),
                "codes_sha256": None if self.codes is None else codes_hash(self.codes),
                "relations": relations.clone(),
                "model": {name: value.clone() for name, value in model.state_dict().items()},
            }
        return metrics

    def _scored_codes(self, relations: Tensor, codes: Tensor) -> dict[str, Any]:
        metrics = evaluate_codes(self.model.scorer, relations, codes, self.kg, "valid", world=self.world)
        metrics["usage"] = code_usage(codes, self.model.rq_codebook.num_codes).tolist()
        metrics["perplexity"] = code_perplexity(codes, self.model.rq_codebook.num_codes).tolist()
        return metrics

    def _out_of_patience(self) -> bool:
        """Asked after an epoch; only one that was evaluated can end the run, only those that could be best count."""
        patience = self.settings.patience
        if not patience or self.best is None or "valid" not in self.history[-1]:
            return False
        all_count = self.settings.control == "unquantized"
        since = [row for row in self.history[self.best["epoch"] :] if all_count or row["phase"] != "warm-up"]
        return len(since) >= patience

    def score_best(self, split: str) -> dict[str, Any]:
        """Metrics of the best epoch on ``split``: from its codes, or from z itself without quantization."""
        best = self.best
        assert best is not None
        with self._best_parameters(), torch.no_grad():
            relations = best["relations"].to(self.device)
            if best["codes"] is not None:
                return evaluate_codes(self.model.scorer, relations, best["codes"].to(self.device), self.kg, split)
            q_all = self.model.scorer.entity_vectors(self.model.clean_z(self.graph, self.text))
            return evaluate_vectors(self.model.scorer, relations, q_all, self.kg, split)

    @contextmanager
    def _best_parameters(self) -> Iterator[None]:
        """The model as it was in the best epoch, in evaluation mode, for a while."""
        assert self.best is not None
        own, training = {name: value.clone() for name, value in self.model.state_dict().items()}, self.model.training
        self.model.load_state_dict(self.best["model"])
        try:
            self.model.eval()
            yield
        finally:
            self.model.load_state_dict(own)
            self.model.train(training)

    def resolve_collisions(self) -> int:
        """Give every entity of the best epoch a code of its own (model/collisions.py). How many codes were changed.

        What the codes scored before is kept as ``best["valid_before_collision_pass"]``. Raises TooFewCodes
        where no change of codes can do it.
        """
        best = self.best
        assert best is not None and best["codes"] is not None
        with self._best_parameters():
            z = self.model.clean_z(self.graph, self.text)
            codes, changed, _ = resolve_collisions(z, self.model.rq_codebook, best["codes"].to(self.device))
            if len(changed):
                best["valid_before_collision_pass"] = best["valid"]
                best["valid"] = self._scored_codes(best["relations"].to(self.device), codes)
                best["codes"], best["codes_sha256"] = codes, codes_hash(codes)
        if len(changed):
            self.save()
        return len(changed)

    # ---------------------------------------------------------------- checkpoint

    def save(self) -> None:
        """Write ``last`` (all that the next epoch depends on) and ``best`` (what is dumped), renamed into place."""
        last = {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "codes": self.codes,
            "average": None if self.average is None else self.average.values,
            "rng": {
                "order": self.generator.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": self._cuda_states(),
            },
            "history": self.history,
        }
        whole = {"format": 1, "config": self.config, "comparable": self.comparable, "trained_on": self.trained_on,
                 "last": last, "best": self.best}  # fmt: skip
        with self.world.together():
            if self.world.first:
                save_torch(whole, self.checkpoint)
        self.saved_epoch = self.epoch

    def _cuda_states(self) -> list[Tensor]:
        """Of the generators of all GPUs; where each process has one of them, of this process's (they are in step)."""
        if self.device.type != "cuda":
            return []
        return [torch.cuda.get_rng_state(self.device)] if self.world.size > 1 else torch.cuda.get_rng_state_all()

    def restore(self, stored: dict[str, Any]) -> None:
        """Continue from a loaded checkpoint, bit for bit on the CPU."""
        last, codebook = stored["last"], self.model.rq_codebook
        shape = (self.kg.num_entities, self.config["seq_len"], codebook.num_quantizers)
        check_fits(stored, self.model, shape, codebook.num_codes)
        settings = [settings_of(group) for group in self.optimizer.param_groups]
        self.model.load_state_dict(last["model"])
        self.optimizer.load_state_dict(last["optimizer"])
        check_optimizer(self.optimizer, settings)
        self.epoch, self.seconds, self.history = last["epoch"], last["seconds"], last["history"]
        self.saved_epoch = self.epoch
        self.codes = None if last["codes"] is None else last["codes"].to(self.device)
        values = last.get("average")  # checkpoints of before have no such entry
        if self.average is not None and values is not None:
            self.average.load(values)
        self.best = stored["best"]
        rng = last["rng"]
        self.generator.set_state(rng["order"].cpu())
        torch.set_rng_state(rng["torch"].cpu())
        if self.device.type == "cuda" and rng["cuda"] and self.world.size > 1:
            torch.cuda.set_rng_state(rng["cuda"][0].cpu(), self.device)
        elif self.device.type == "cuda" and rng["cuda"]:
            torch.cuda.set_rng_state_all([state.cpu() for state in rng["cuda"]])


def mrr_as_trained(best: dict[str, Any]) -> float:
    """Valid MRR of a best epoch before the collision pass, as other epochs are scored."""
    return float(best.get("valid_before_collision_pass", best["valid"])["mrr"])


def _blurred(z: Tensor, noise: float) -> Tensor:
    """z [., L, code_dim] with normal noise of ``noise`` of its standard deviations over entities.

    While z warms up the model so learns to do with what codes will keep of it; once codes are frozen, to do without
    telling entities of near codes apart.
    """
    if not noise:
        return z
    return torch.addcmul(z, z.detach().std(dim=0, keepdim=True), torch.randn_like(z), value=noise)


def codes_hash(codes: Tensor) -> str:
    """Hex digest of the integers [M, L, Q]: ties a checkpoint to the codes that it was scored with."""
    return hashlib.sha256(codes.cpu().contiguous().numpy().tobytes()).hexdigest()


def format_epoch(row: dict[str, Any]) -> str:
    """One line: epoch, phase, each loss term, per-level quantization loss, usage, MRR, seconds."""
    parts = [
        f"epoch {row['epoch']:4d}  {row['phase']:7s}",
        f"L_st {row['structure']:.4f}",
        f"L_se {row['semantic']:.4f}",
        f"L_q {row['quantization']:.4f}",
    ]
    if row["levels"]:
        parts.append("levels " + "/".join(f"{x:.3f}" for x in row["levels"]))
    valid = row.get("valid")
    if valid:
        if "usage" in valid:
            parts.append("usage " + "/".join(f"{x:.2f}" for x in valid["usage"]))
        parts.append(f"valid MRR {valid['mrr']:.4f} H@10 {valid['hits@10']:.4f}")
    parts.append(f"{row['seconds']:.0f} s")
    return "  ".join(parts)

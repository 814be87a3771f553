"""Training of RQGCN: epochs of 1-N queries, assignment of codes, checkpoints that resume exactly, the best epoch.

One step (Eq. 9): the scorer sees only decoded codes; their gradient is handed, straight through, to the encoder,
together with the quantization loss. The encoder changes the scores through its codes only, so its pass over the graph
may be taken once per ``encoder_every`` scorer steps (gradients are averaged over them). Where layers add to the
entities' inputs, the inputs take every step, and what the layers add is renewed by each pass. Codes are assigned again
at the first such pass after some scorer steps (``Schedule.assign_every``), and at the end of an epoch.

All exchange between processes is in this file: the quantizer, the losses and the scorer run as in one process.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common.config import Config
from common.errors import InputError
from common.files import save_torch
from data.knowledge_graph import KnowledgeGraph
from model.averaging import WeightAverage
from model.checkpoint import FORMAT, check_fits, check_optimizer, random_states, set_random_states, settings_of
from model.collisions import resolve_collisions
from model.data_parallel import World, share_batch_norms
from model.evaluation import evaluate_codes, evaluate_vectors
from model.losses import LOSSES, Sample, draw_sample, gather_targets, nuclear_3_norm
from model.precision import matmul_precision, return_freed_memory
from model.quantizers import code_perplexity
from model.queries import training_queries
from model.relational_graph import RelationalGraph
from model.RQGCN import RQGCN
from model.schedule import CODES, FROZEN, PATIENCE, WARM_UP, Phase, schedule_of
from model.sizes import EVERY_STEP_UP_TO

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}
MAP_RATE = 0.05  # learning rate of shared maps under Adagrad, relative to that of tables
TRAINING_PRECISION = "medium"  # of float32 products in training; ranking and assignment have the highest


class Losses(NamedTuple):
    """Values of the terms of Eq. 9 in one step."""

    structure: float
    semantic: float
    quantization: float


class ScorerStep(NamedTuple):
    """What the backward pass of the scorer leaves: L_st, L_se and the gradient with respect to z."""

    structure: Tensor
    semantic: Tensor
    gradient: Tensor  # [M, L, code_dim]; sparse with sampled negatives


class Trainer:
    """Trains ``model`` on ``kg`` by ``config`` and keeps ``checkpoint`` (one file with ``last`` and ``best``).

    ``model_args``: the arguments that the model was built with; ``inputs``: file -> sha256; both are stored with the
    settings. ``text``: [M, T] for Eq. 8 or None. ``report`` receives one line per epoch. ``world``: the processes that
    share the work, by default this one alone. Raises InputError for a batch of fewer queries than there are processes.
    """

    def __init__(
        self,
        kg: KnowledgeGraph,
        model: RQGCN,
        config: Config,
        checkpoint: Path,
        model_args: Mapping[str, Any],
        inputs: Mapping[str, str] | None = None,
        text: Tensor | None = None,
        device: torch.device | str = "cpu",
        report: Callable[[str], None] = print,
        world: World | None = None,
    ) -> None:
        self.world = world = world or World()
        self.kg, self.model, self.config, self.report = kg, model.to(device), config, report
        self.checkpoint, self.model_args, self.inputs = checkpoint, dict(model_args), dict(inputs or {})
        self.schedule = schedule_of(config)
        self.device = torch.device(device)
        self.text = None if text is None else text.to(self.device)
        self.graph = RelationalGraph.from_triples(kg.train, kg.num_entities, kg.num_relations).to(self.device)
        queries = training_queries(kg, config.tails_at_once).to(self.device)
        self.heads, self.rels, self.indptr, self.targets = queries
        least = min(config.batch, len(self.heads))
        if least < world.size:
            raise InputError(f"a batch has {least} queries for {world.size} processes; start fewer or raise --batch")
        share_batch_norms(model.scorer, world)
        world.copy_from_first(model.state_dict().values())
        rare_layers = config.encoder_every > 1 and len(model.encoder.layers) + len(model.transformer) > 0
        self.inputs_every_step = rare_layers and model.layers_add and kg.num_entities <= EVERY_STEP_UP_TO
        self.optimizer = self._make_optimizer()
        self.average = self._make_average()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.trained_on = kg.train_digest()
        # entities weigh in k-means by what depends on their vectors: training triples, plus one for those without
        ends = torch.from_numpy(kg.train[:, [0, 2]]).flatten()
        self.degrees = (1 + torch.bincount(ends, minlength=kg.num_entities)).to(self.device)
        self.codes: Tensor | None = None  # [M, L, Q], those in use
        self.z: Tensor | None = None  # [M, L, code_dim], the vectors in use without codes
        self.masked: Tensor | None = None  # bool [M], the entities whose learned input these were computed without
        self.epoch = 0
        self.saved_epoch = 0  # the last one in the checkpoint; 0: this run has none
        self.seconds = 0.0  # of training so far, resumed parts included
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.watchers: list[Callable[[dict[str, Any]], None]] = []  # each gets the row of every finished epoch
        self._clock = time.monotonic()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over four groups of parameters, each with a learning rate relative to ``lr``.

        What is stepped once per ``encoder_every`` scorer steps has sqrt(encoder_every) times the rate. Under Adagrad,
        whose usual rate suits tables, maps that all entities share have MAP_RATE times the rate.
        """
        every_step = {id(p) for p in [*self.model.scorer.parameters(), *self.model.relation_parameters()]}
        if self.model.W_s is not None:
            every_step |= {id(p) for p in self.model.W_s.parameters()}
        tables = {id(p) for p in self.model.tables()}
        encoder_rate = math.sqrt(self.config.encoder_every)
        map_rate = MAP_RATE if self.config.optimizer == "adagrad" else 1.0
        groups = []
        for in_scorer in (True, False):
            for is_table in (True, False):
                parameters = [p for p in self.model.parameters()
                              if (id(p) in every_step, id(p) in tables) == (in_scorer, is_table)]  # fmt: skip
                every = in_scorer or (is_table and self.inputs_every_step)
                rate = (1.0 if every else encoder_rate) * (1.0 if is_table else map_rate)
                groups.append({"params": parameters, "rate": rate})
        optimizer: Any = OPTIMIZERS[self.config.optimizer]
        made: torch.optim.Optimizer = optimizer(groups, lr=self.config.lr, weight_decay=self.config.l2)
        return made

    def _make_average(self) -> WeightAverage | None:
        """Of what trains once codes are frozen; of all weights where a baseline has no codes in training."""
        if not self.config.weight_average:
            return None
        some_train = self.schedule.trains_with_codes
        of_scorer = [p for group in self.optimizer.param_groups[:2] for p in group["params"]]
        trained = of_scorer if some_train else list(self.model.parameters())
        statistics = [buffer for buffer in self.model.scorer.decoder.buffers() if buffer.is_floating_point()]
        return WeightAverage([*trained, *statistics], self.config.weight_average)

    # ---------------------------------------------------------------- all epochs

    def fit(self, until: int | None = None) -> None:
        """Train to the last epoch, the time limit or until valid stalls; resumes where ``restore`` left it.

        A run that ends while it warms up still gets codes, scored as they are. ``until``: stop within the run, after
        that epoch, which is ranked; ``fit`` goes on from there.
        """
        self._clock = time.monotonic()
        done = self._finished() or self.epoch == until
        while not done:
            phase = self.phase()
            row = {"epoch": self.epoch + 1, "phase": phase.name, **self._train_epoch(phase)}
            self.epoch += 1
            done = self._finished() or self.epoch == until
            if self.epoch % self.config.eval_every == 0 or done:
                row["valid"] = self._validate(phase)
            self.seconds, self._clock = self._elapsed(), time.monotonic()
            row["seconds"] = self.seconds
            self.history.append(row)
            if "valid" in row:
                done = done or self._finished()  # the time may have ended while it was ranked
            self.report(format_epoch(row))
            self._warn_of_divergence()
            self.save()
            for watch in self.watchers:
                watch(row)
            return_freed_memory()
        if self.epoch == until:
            return
        if self.epoch < self.config.epoch and self._stalled(min(1.0, self._progress(self.epoch))):
            self.report(f"no better valid MRR in {PATIENCE:.0%} of the run: ended after epoch {self.epoch}")
        ends_as = CODES if self.schedule.makes_codes else WARM_UP
        if self.best is None or (self.schedule.makes_codes and self.codes is None):
            if not self.schedule.trains_with_codes:
                self.best = None  # of the run when it was shorter
                if self.average is not None:
                    self.average.settle()
            self._start_epoch(ends_as)
            self._validate(ends_as)
            self.save()

    def phase(self) -> Phase:
        """The phase of the next epoch."""
        return self.schedule.phase(self.epoch, self._limited_seconds())

    def _finished(self) -> bool:
        progress = self._progress(self.epoch)
        return self.epoch >= self.config.epoch or progress >= 1.0 or self._stalled(progress)

    def _stalled(self, progress: float) -> bool:
        """Early stopping; it follows from what a checkpoint holds, so that a resumed run ends in the same epoch."""
        if self.best is None or self.best["epoch"] > len(self.history):  # none, or the epoch that is being scored
            return False
        row, *later = self.history[self.best["epoch"] - 1 :]
        seconds = row["seconds"] if self.config.max_minutes else 0.0
        best = self.schedule.progress(row["epoch"], seconds)
        return self.schedule.stalled(progress, best, sum("valid" in worse for worse in later))

    def _progress(self, epoch: float) -> float:
        return self.schedule.progress(epoch, self._limited_seconds())

    def _limited_seconds(self) -> float:
        """Seconds so far where they limit the run, else 0: a run without a time limit never depends on the clock."""
        return self._elapsed() if self.config.max_minutes else 0.0

    def _elapsed(self) -> float:
        """Seconds of training so far, the same number in every process."""
        return self.world.same(self.seconds + time.monotonic() - self._clock)

    # ---------------------------------------------------------------- one epoch

    def _train_epoch(self, phase: Phase) -> dict[str, Any]:
        """One pass over the queries. Returns the mean loss terms and the last learning rate."""
        self.model.train()
        batches = self._batches()
        self._start_epoch(phase)
        averaging = self._averaging(phase)
        losses, assign_every = list[Losses](), self.schedule.assign_every(len(batches))
        gradient, waiting, unassigned = None, 0, 0  # gradient of z, summed over the steps since the encoder's pass
        title = f"epoch {self.epoch + 1} {phase.name}"
        for step, batch in enumerate(tqdm(batches, desc=title, leave=False, unit="step", disable=None)):
            last = step + 1 == len(batches)
            self._set_lr(self._progress(self.epoch + step / len(batches)))
            self.optimizer.zero_grad(set_to_none=True)
            with matmul_precision(TRAINING_PRECISION):
                scored = self._scorer_step(batch, phase)
                quantization = 0.0
                if phase.trains_encoder:
                    gradient = scored.gradient.to_dense() if gradient is None else gradient.add_(scored.gradient)
                    waiting, unassigned = waiting + 1, unassigned + 1
                    if waiting == self.config.encoder_every or last:
                        quantization = self._encoder_step(gradient / waiting, phase, scored.gradient)
                        gradient, waiting = None, 0
                    elif self.inputs_every_step:
                        now = scored.gradient.to_dense().clone()  # processes sum their gradients in place
                        self.model.without_layers(self.text, self.masked).backward(now)
            values = [float(scored.structure), float(scored.semantic), quantization]
            losses.append(Losses(*self.world.sum_gradients(self.model.parameters(), values)))
            before = self._inputs() if waiting and self.inputs_every_step and not phase.quantized else None
            self.optimizer.step()
            if before is not None:
                assert self.z is not None
                self.z = self.z + (self._inputs() - before)
            if averaging is not None:
                averaging.update()
            if phase.trains_encoder and not waiting and (unassigned >= assign_every or last or not phase.quantized):
                self._refresh(phase, masks=not last)  # an epoch is scored, and ends in a checkpoint, without masks
                unassigned = 0
            self._check_finite(sum(losses[-1]), step)
        return self._means(losses, phase) | {"lr": self.optimizer.param_groups[0]["lr"]}

    @torch.no_grad()
    def _inputs(self) -> Tensor:
        return self.model.without_layers(self.text, self.masked).clone()

    def _means(self, losses: list[Losses], phase: Phase) -> dict[str, Any]:
        """Mean of each loss term over the steps that have it; ``levels``: each level's quantization loss."""
        n, encoder_steps = len(losses), math.ceil(len(losses) / self.config.encoder_every)
        levels = []
        if phase == CODES:
            own_part = self.model.rq_codebook.level_losses * self.world.share(self.kg.num_entities)
            levels = self.world.sum(own_part).tolist()
        return {
            "structure": sum(loss.structure / n for loss in losses),
            "semantic": sum(loss.semantic / n for loss in losses),
            "quantization": sum(loss.quantization for loss in losses) / encoder_steps,
            "levels": levels,
        }

    def _batches(self) -> list[Tensor]:
        """The queries in a new order, in batches; a last one of a single query joins the one before (batch norm), as
        does one that would leave a process without a query."""
        order = torch.randperm(len(self.heads), generator=self.generator).to(self.device)
        batches = list(order.split(self.config.batch))
        if len(batches) > 1 and len(batches[-1]) < max(2, self.world.size):
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def _set_lr(self, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(progress) * group["rate"]

    def _averaging(self, phase: Phase) -> WeightAverage | None:
        """The average, in epochs whose steps enter it; a run that is made longer may warm up again and loses it."""
        if self.average is None:
            return None
        if self.schedule.averages(phase, self._progress(self.epoch)):
            return self.average
        self.average.forget()
        return None

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            with self.world.together():
                where = f"epoch {self.epoch + 1}, step {step + 1}"
                raise InputError(f"the loss became {loss} in {where}; {self._after_nan()}")

    def _after_nan(self) -> str:
        kept = f"epoch {self.saved_epoch} is saved in {self.checkpoint}: " if self.saved_epoch else ""
        return f"{kept}try a lower --lr, a lower --vq_weight or --loss ce"

    def _warn_of_divergence(self) -> None:
        """Say so where L_st is above log M, the loss of a uniform guess, and rises. Some decoders start above it and
        fall at once (ConvE), so one epoch above it is no sign."""
        last = [row["structure"] for row in self.history[-2:]]
        guess = math.log(self.kg.num_entities) if self.config.loss == "ce" else math.inf
        if len(last) == 2 and last[1] > guess and last[1] > last[0]:
            self.report(f"warning: L_st is above {guess:.2f}, the loss of a uniform guess, and rises; try a lower --lr")

    # ---------------------------------------------------------------- codes

    def _start_epoch(self, phase: Phase) -> None:
        """Codebooks by residual k-means at first; later, unused codes get a new place. Then codes are assigned."""
        if phase == FROZEN and self.codes is not None:
            return
        z = self.model.clean_z(self.graph, self.text)
        if phase.quantized:
            self._move_codebooks(z)
        self._refresh(phase, z, masks=phase.trains_encoder)

    def _move_codebooks(self, z: Tensor) -> None:
        """k-means or revival by the first process; the others receive its codebooks and the generator's state."""
        codebook, world = self.model.rq_codebook, self.world
        if world.first and self.codes is None:
            codebook.init_from_data(z, generator=self.generator, weights=self.degrees)
        elif world.first:
            assert self.codes is not None
            codebook.revive_dead_codes(z, self.codes, generator=self.generator)
        if world.size > 1:
            world.copy_from_first(codebook.state_dict().values())
            state = self.generator.get_state().to(world.device)
            world.copy_from_first([state])
            self.generator.set_state(state.cpu())

    def _refresh(self, phase: Phase, z: Tensor | None = None, masks: bool = False) -> None:
        """What the scorer sees until the next encoder pass: vectors in the warm-up, codes from then on.

        ``z``: [M, L, code_dim] as ``clean_z`` gives it now, where the caller has it; ``masks``: with --mask_inputs, of
        a random part of the entities without their learned input. A run that is made longer may warm up again: the
        codes that it had are those of other vectors by then.
        """
        self.masked = self._draw_masked() if masks else None
        if z is None or self.masked is not None:
            z = self.model.clean_z(self.graph, self.text, self.masked)
        self.z, self.codes = (None, self._assign(z)) if phase.quantized else (z, None)

    def _draw_masked(self) -> Tensor | None:
        """A random part of the entities, the same in all processes; None without --mask_inputs."""
        if not self.config.mask_inputs:
            return None
        drawn = torch.rand(self.kg.num_entities, generator=self.generator) < self.config.mask_inputs
        return drawn.to(self.device)

    def _assign(self, z: Tensor) -> Tensor:
        """Codes int64 [M, L, Q] of z [M, L, code_dim]; every process searches for its own entities."""
        codebook = self.model.rq_codebook
        if not codebook.codes_depend_on_z:
            return codebook.cal_codes(z)
        return self.world.gather(codebook.cal_codes(self.world.own(z)), len(z))

    # ---------------------------------------------------------------- one step

    def _scorer_step(self, batch: Tensor, phase: Phase) -> ScorerStep:
        """Backward of L_st + L_se, and of the N3 norm.

        Of several processes, each takes its part of the batch and returns its part of the sums that these are.
        With sampled negatives only the entities that the batch needs are decoded, and the gradient is sparse.
        """
        shares = self._shares(batch)
        batch = self.world.own(batch)
        sample = self._draw(batch)
        with self.world.own_randomness():  # noise too: of a sample it has a size of its own in every process
            z_q, seen = self._decoded(phase, sample)
            losses = self._scorer_losses(self.model.scorer.entity_vectors(seen), batch, sample)
        structure, semantic, norm = (loss * share for loss, share in zip(losses, shares, strict=True))
        (structure + self.config.text_weight * semantic + self.config.n3 * norm).backward()
        gradient = z_q.grad
        assert gradient is not None
        z_q.grad = None
        if sample is not None:
            shape = (self.kg.num_entities, *gradient.shape[1:])
            gradient = torch.sparse_coo_tensor(
                sample.entities[None], gradient, shape, is_coalesced=True, check_invariants=False
            )
        return ScorerStep(structure.detach(), semantic.detach(), gradient)

    def _scorer_losses(self, q_all: Tensor, batch: Tensor, sample: Sample | None) -> tuple[Tensor, Tensor, Tensor]:
        """L_st (Eq. 7), L_se (Eq. 8) and the N3 norm of a batch of queries; heads and tails are both rows of q_all
        [M, D], or of q_all [U, D] of a sample's entities.

        Rows are taken by ``index_select``: the backward pass of ``x[i]`` sums in another order in every run when there
        are several threads.
        """
        heads, loss = self.heads[batch], LOSSES[self.config.loss]
        function: Callable[[Tensor, Tensor], Tensor]
        q_head = q_all.index_select(0, heads if sample is None else sample.heads)
        relations = self.model.relation_vectors().index_select(0, self.rels[batch])
        query = self.model.scorer.decoder.query(q_head, relations)
        if sample is None:
            targets = gather_targets(self.indptr, self.targets, batch)
            function = partial(loss, targets=targets, label_smoothing=self.config.lbl_smooth)
        else:
            targets = sample.targets
            assert loss.sampled is not None
            function = partial(
                loss.sampled, sample=sample, num_entities=self.kg.num_entities, label_smoothing=self.config.lbl_smooth
            )
        structure, decoder = self._of_members(function, query, q_all), self.model.scorer.decoder
        semantic = norm = structure.new_zeros(())
        if self.text is not None:
            semantic = self.model.semantic_loss(q_head, self.text[heads])
        if self.config.n3:
            norm = nuclear_3_norm(decoder, q_head, relations, q_all, targets)
        return structure, semantic, norm

    def _of_members(self, loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, q_all: Tensor) -> Tensor:
        """The mean over ensemble members of ``loss`` of each one's own scores."""
        members = self.model.members
        if members == 1:
            return loss(query, q_all)
        slices = zip(query.chunk(members, dim=1), q_all.chunk(members, dim=1), strict=True)
        return torch.stack([loss(q.contiguous(), e.contiguous()) for q, e in slices]).mean()

    def _draw(self, batch: Tensor) -> Sample | None:
        """With ``num_negatives``: a fresh set of negatives, and which entities the batch needs with it."""
        if not self.config.num_negatives:
            return None
        targets = gather_targets(self.indptr, self.targets, batch)
        return draw_sample(self.heads[batch], targets, self.kg.num_entities, self.config.num_negatives, self.generator)

    def _decoded(self, phase: Phase, sample: Sample | None) -> tuple[Tensor, Tensor]:
        """z_q [M, L, code_dim] (or [U, L, code_dim] of a sample's entities), which gets the gradient of z, and what the
        scorer sees of it.
        """
        noise = self.schedule.noise(phase)
        if not phase.quantized:
            assert self.z is not None
            z_q = self.z if sample is None else self.z[sample.entities]
            z_q = _with_noise(z_q.detach(), noise).requires_grad_()
            return z_q, z_q
        assert self.codes is not None
        z_q = self.model.rq_codebook.decode_from_codes(self.codes if sample is None else self.codes[sample.entities])
        z_q.retain_grad()
        return z_q, _with_noise(z_q, noise)

    def _shares(self, batch: Tensor) -> tuple[float, float, float]:
        """What this process's means weigh in the batch's: its part of what L_st averages, of the queries (L_se) and of
        the triples (N3)."""
        if self.world.size == 1:
            return 1.0, 1.0, 1.0
        tails = self.indptr[batch + 1] - self.indptr[batch]
        of_loss, of_triples = (LOSSES[name].share(tails, self.world.own(tails)) for name in (self.config.loss, "ce"))
        return of_loss, self.world.share(len(batch)), of_triples

    def _encoder_step(self, gradient: Tensor, phase: Phase, now: Tensor) -> float:
        """Backward through the encoder: ``gradient`` of z, straight through the codes, and L_q. Returns L_q's value.

        ``gradient`` is the mean since the last pass; inputs that took those steps get that of this one, ``now``.
        Of several processes, each brings its part of both and takes its entities' part of L_q.
        """
        z = self.model.encode(self.graph, self.text, self.masked).z
        surrogate, quantization = (z * gradient).sum(), 0.0
        if self.inputs_every_step:
            rest = now.to_dense() - gradient
            surrogate = surrogate + (self.model.without_layers(self.text, self.masked) * rest).sum()
        if phase == CODES:
            assert self.codes is not None
            own = self.world.own
            total_loss = self.model.rq_codebook(own(z), codes=own(self.codes)).total_loss * self.world.share(len(z))
            surrogate = surrogate + self.config.vq_weight * total_loss
            quantization = float(total_loss.detach())
        surrogate.backward()
        return quantization

    # ---------------------------------------------------------------- scoring

    def _validate(self, phase: Phase) -> dict[str, Any]:
        """Metrics on valid by the path of the phase; the best epoch is the best of those that the run may report."""
        averaged = nullcontext() if self.average is None else self.average.in_place()
        try:
            with averaged:
                return self._score_epoch(phase)
        except ValueError as error:  # ranking refuses NaN scores
            raise InputError(f"epoch {self.epoch} cannot be ranked: {error}; {self._after_nan()}") from error

    def _score_epoch(self, phase: Phase) -> dict[str, Any]:
        model = self.model
        model.eval()
        with torch.no_grad():
            relations = model.relation_vectors()
            if phase.quantized:
                assert self.codes is not None
                metrics = self._score_codes(relations, self.codes)
            else:
                q_all = model.scorer.entity_vectors(model.clean_z(self.graph, self.text))
                metrics = evaluate_vectors(model.scorer, relations, q_all, self.kg, "valid", self.world)
        best = self.best
        if self.schedule.can_be_best(phase) and (best is None or metrics["mrr"] > mrr_as_trained(best)):
            self.best = {
                "epoch": self.epoch,
                "valid": metrics,
                "codes": None if self.codes is None else self.codes.clone(),
                "codes_sha256": None if self.codes is None else codes_hash(self.codes),
                "relations": relations.clone(),
                "model": {name: value.clone() for name, value in model.state_dict().items()},
            }
        return metrics

    def _score_codes(self, relations: Tensor, codes: Tensor) -> dict[str, Any]:
        metrics = evaluate_codes(self.model.scorer, relations, codes, self.kg, "valid", world=self.world)
        metrics["perplexity"] = code_perplexity(codes, self.model.rq_codebook.num_codes).tolist()
        return metrics

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
                best["valid"] = self._score_codes(best["relations"].to(self.device), codes)
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
            "rng": random_states(self.device, self.generator, one_gpu=self.world.size > 1),
            "history": self.history,
        }
        whole = {
            "format": FORMAT, "config": self.config.as_plain(), "inputs": self.inputs, "model": self.model_args,
            "trained_on": self.trained_on, "last": last, "best": self.best,
        }  # fmt: skip
        with self.world.together():
            if self.world.first:
                save_torch(whole, self.checkpoint)
        self.saved_epoch = self.epoch

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Continue from a loaded checkpoint, bit for bit on the CPU. ValueError or KeyError where it does not fit."""
        last, codebook = stored["last"], self.model.rq_codebook
        shape = (self.kg.num_entities, self.model.seq_len, codebook.num_quantizers)
        check_fits(stored, self.model, shape, codebook.num_codes)
        settings = [settings_of(group) for group in self.optimizer.param_groups]
        self.model.load_state_dict(last["model"])
        self.optimizer.load_state_dict(last["optimizer"])
        check_optimizer(self.optimizer, settings)
        self.epoch, self.seconds, self.history = last["epoch"], last["seconds"], last["history"]
        self.saved_epoch = self.epoch
        self.codes = None if last["codes"] is None else last["codes"].to(self.device)
        if self.average is not None and last["average"] is not None:
            self.average.load(last["average"])
        self.best = stored["best"]
        set_random_states(last["rng"], self.device, self.generator, one_gpu=self.world.size > 1)


def mrr_as_trained(best: Mapping[str, Any]) -> float:
    """Valid MRR of a best epoch before the collision pass, as other epochs are scored."""
    return float(best.get("valid_before_collision_pass", best["valid"])["mrr"])


def _with_noise(z: Tensor, noise: float) -> Tensor:
    """z [., L, code_dim] plus normal noise of ``noise`` of its standard deviations over entities.

    In the warm-up, the scorer learns to score from vectors as inexact as decoded codes will be; once codes are frozen,
    the noise keeps it from separating entities with similar codes (regularisation).
    """
    if not noise:
        return z
    return torch.addcmul(z, z.detach().std(dim=0, keepdim=True), torch.randn_like(z), value=noise)


def codes_hash(codes: Tensor) -> str:
    """Hex digest of the integers [M, L, Q]: ties a checkpoint to the codes that it was scored with."""
    return hashlib.sha256(codes.cpu().contiguous().numpy().tobytes()).hexdigest()


def format_epoch(row: Mapping[str, Any]) -> str:
    """One line: epoch, phase, each loss term, per-level quantization loss, perplexity, MRR, seconds."""
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
        if "perplexity" in valid:
            parts.append("perplexity " + "/".join(f"{x:.0f}" for x in valid["perplexity"]))
        parts.append(f"valid MRR {valid['mrr']:.4f} H@10 {valid['hits@10']:.4f}")
    parts.append(f"{row['seconds']:.0f} s")
    return "  ".join(parts)

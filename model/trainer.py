"""Training of RQGCN: epochs of 1-N queries, assignments, checkpoints that resume exactly, the best epoch.

One step (Eq. 9): the scorer sees only decoded codes; their gradient is handed, straight through, to the encoder,
together with the quantization loss. The encoder acts on the scores through its codes alone, so its pass over the
graph may be taken once per ``encoder_every`` scorer steps (gradients are averaged over them).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.knowledge_graph import KnowledgeGraph
from model.evaluation import evaluate_codes, evaluate_vectors
from model.losses import LOSSES, gather_targets
from model.message_passing import RelationalGraph
from model.RQCodebook import code_perplexity, code_usage
from model.RQGCN import RQGCN
from run_record import InputError, save_torch


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the flags of run_rq.py under the same names."""

    epoch: int = 800
    lr: float = 5e-4
    l2: float = 1e-8
    batch: int = 1024
    loss: str = "ce"
    lbl_smooth: float = 0.1
    vq_weight: float = 1.0
    text_weight: float = 1.0
    warmup_epochs: float = 1
    freeze_at: float = 0.85
    encoder_every: int = 1
    lr_schedule: str = "cosine"
    eval_every: int = 1
    patience: int = 0
    max_minutes: float = 0
    seed: int = 0


class Phase(NamedTuple):
    """Where training stands: ``progress`` in [0, 1], and which path the scores take."""

    progress: float
    name: str  # "warm-up" (unquantized), "codes" or "frozen" (codes fixed, no encoder pass)


class Trainer:
    """Trains ``model`` on ``kg`` and keeps ``checkpoint`` (one file with ``last`` and ``best``).

    ``config``: the model's arguments; ``comparable``: what must agree for the run to be continued; both are stored. ``text``: [M, T] for
    Eq. 8 or None. ``report`` receives one line per epoch.
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
    ) -> None:
        self.kg, self.model, self.settings, self.report = kg, model.to(device), settings, report
        self.checkpoint, self.config, self.comparable = checkpoint, config, comparable
        self.device = torch.device(device)
        self.text = None if text is None else text.to(self.device)
        self.graph = RelationalGraph.from_triples(kg.train, kg.num_entities, kg.num_relations).to(self.device)
        known = kg.answers("train")
        as_tensor = torch.from_numpy
        self.heads = as_tensor(known.keys // (2 * kg.num_relations)).to(self.device)
        self.rels = as_tensor(known.keys % (2 * kg.num_relations)).to(self.device)
        self.indptr, self.targets = as_tensor(known.indptr).to(self.device), as_tensor(known.targets).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr, weight_decay=settings.l2)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.codes: Tensor | None = None  # [M, L, Q], the assignments in use
        self.epoch = 0
        self.seconds = 0.0  # of training so far, resumed parts included
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self._clock = time.monotonic()

    # ---------------------------------------------------------------- one epoch

    def _phase(self, epoch: float) -> Phase:
        """Progress by epochs or, with ``max_minutes``, by the clock, whichever is further."""
        progress = epoch / self.settings.epoch
        if self.settings.max_minutes:
            progress = max(progress, self._elapsed() / (60 * self.settings.max_minutes))
        if not self.model.quantized or epoch < self.settings.warmup_epochs:
            return Phase(progress, "warm-up")
        return Phase(progress, "frozen" if progress >= self.settings.freeze_at and self.codes is not None else "codes")

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._clock

    def _set_lr(self, progress: float) -> None:
        scale = 1.0
        if self.settings.lr_schedule == "cosine":
            scale = 0.01 + 0.99 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * scale

    def _structure_loss(self, q_all: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """L_st (Eq. 7) and L_se (Eq. 8) of a batch of queries; heads and tails are both rows of q_all [M, D]."""
        heads = self.heads[batch]
        scores = self.model.scorer.scores(q_all[heads], self.model.relation_vectors()[self.rels[batch]], q_all)
        targets = gather_targets(self.indptr, self.targets, batch)
        structure = LOSSES[self.settings.loss](scores, targets, self.settings.lbl_smooth)
        if self.text is None:
            return structure, structure.new_zeros(())
        return structure, self.model.semantic_loss(q_all[heads], self.text[heads])

    def _start_quantizing(self) -> None:
        """Codebooks by residual k-means of the warmed-up vectors, then the first assignments."""
        codebook = self.model.rq_codebook
        if not bool(codebook.initialized.all()):
            codebook.init_from_data(self.model._clean_z(self.graph), generator=self.generator)
        self.codes = self.model.cal_allent_codes(self.graph)

    def _train_epoch(self) -> dict[str, Any]:
        model, settings = self.model, self.settings
        model.train()
        order = torch.randperm(len(self.heads), generator=self.generator).to(self.device)
        batches = order.split(settings.batch)
        totals = {"structure": 0.0, "semantic": 0.0, "quantization": 0.0}
        level_losses: Tensor | None = None
        encoder_steps = 0
        gradient: Tensor | None = None  # of z [M, L, code_dim], summed over the steps since the last encoder pass
        waiting = 0
        phase = self._phase(self.epoch)
        if phase.name == "codes":
            if self.codes is None:
                self._start_quantizing()
            else:
                z = model._clean_z(self.graph)
                model.rq_codebook.revive_dead_codes(z, self.codes, generator=self.generator)
            self.codes = model.cal_allent_codes(self.graph)
        bar = tqdm(batches, desc=f"epoch {self.epoch + 1} {phase.name}", leave=False, unit="step", dynamic_ncols=True, disable=None)
        for step, batch in enumerate(bar):
            self._set_lr(self._phase(self.epoch + step / len(batches)).progress)
            self.optimizer.zero_grad(set_to_none=True)
            if phase.name == "warm-up":
                z_q = model.encode(self.graph).z
            else:
                assert self.codes is not None
                z_q = model.rq_codebook.decode_from_codes(self.codes)
                z_q.retain_grad()
            structure, semantic = self._structure_loss(model.scorer.entity_vectors(z_q), batch)
            (structure + settings.text_weight * semantic).backward()
            quantization = 0.0
            if phase.name == "codes":
                assert z_q.grad is not None and self.codes is not None
                gradient = z_q.grad if gradient is None else gradient.add_(z_q.grad)
                waiting += 1
                if waiting == settings.encoder_every or step + 1 == len(batches):
                    z = model.encode(self.graph).z
                    quantized = model.rq_codebook(z, codes=self.codes)
                    ((z * gradient).sum() / waiting + settings.vq_weight * quantized.total_loss).backward()
                    quantization = float(quantized.total_loss.detach())
                    level_losses = model.rq_codebook.level_losses.clone()
                    encoder_steps += 1
                    gradient, waiting = None, 0
            self.optimizer.step()
            if phase.name == "codes" and waiting == 0:
                self.codes = model.cal_allent_codes(self.graph)
            self._check_finite(float(structure.detach()) + float(semantic.detach()) + quantization, step)
            totals["structure"] += float(structure.detach()) / len(batches)
            totals["semantic"] += float(semantic.detach()) / len(batches)
            totals["quantization"] += quantization
        totals["quantization"] /= max(1, encoder_steps)
        return {
            "phase": phase.name,
            **totals,
            "levels": [] if level_losses is None else [float(x) for x in level_losses],
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise InputError(
                f"the loss became {loss} in epoch {self.epoch + 1}, step {step + 1}; the last good epoch is in "
                f"{self.checkpoint}: try a lower --lr, a lower --vq_weight or --loss ce"
            )

    # ---------------------------------------------------------------- all epochs

    def fit(self) -> None:
        """Train to the last epoch, the time limit or the end of patience; resumes where ``restore`` left it."""
        settings = self.settings
        self._clock = time.monotonic()
        while self.epoch < settings.epoch and self._phase(self.epoch).progress < 1.0 and not self._out_of_patience():
            row = {"epoch": self.epoch + 1, **self._train_epoch()}
            self.epoch += 1
            last = self.epoch == settings.epoch or self._phase(self.epoch).progress >= 1.0
            if self.epoch % settings.eval_every == 0 or last:
                row["valid"] = self._validate(row["phase"])
            self._advance_clock()
            row["seconds"] = self.seconds
            self.history.append(row)
            self.report(format_epoch(row))
            self.save()

    def _advance_clock(self) -> None:
        self.seconds, self._clock = self._elapsed(), time.monotonic()

    def _validate(self, phase: str) -> dict[str, Any]:
        """Metrics on valid by the path of the phase; the best epoch is chosen among those scored from codes."""
        model = self.model
        model.eval()
        with torch.no_grad():
            relations = model.relation_vectors()
            if phase == "warm-up":
                q_all = model.scorer.entity_vectors(model.encode(self.graph).z)
                metrics = evaluate_vectors(model.scorer, relations, q_all, self.kg, "valid")
            else:
                assert self.codes is not None
                metrics = evaluate_codes(model.scorer, relations, self.codes, self.kg, "valid")
                metrics["usage"] = code_usage(self.codes, model.rq_codebook.num_codes).tolist()
                metrics["perplexity"] = code_perplexity(self.codes, model.rq_codebook.num_codes).tolist()
        scored_as_dumped = (phase != "warm-up") == model.quantized
        if scored_as_dumped and (self.best is None or metrics["mrr"] > self.best["valid"]["mrr"]):
            self.best = {
                "epoch": self.epoch,
                "valid": metrics,
                "codes": None if self.codes is None else self.codes.clone(),
                "relations": relations.clone(),
                "model": {name: value.clone() for name, value in model.state_dict().items()},
            }
        return metrics

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return bool(patience and self.best is not None and self.epoch - self.best["epoch"] >= patience)

    # ---------------------------------------------------------------- checkpoint

    def save(self) -> None:
        """Write ``last`` (everything that the next epoch depends on) and ``best`` (what is dumped), renamed into place."""
        last = {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "codes": self.codes,
            "rng": {
                "order": self.generator.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
                "numpy": list(np.random.get_state(legacy=True)[1].tolist())
                + [int(np.random.get_state(legacy=True)[2])],
                "python": list(random.getstate()[1]),
            },
            "history": self.history,
        }
        save_torch(
            {"format": 1, "config": self.config, "comparable": self.comparable, "last": last, "best": self.best},
            self.checkpoint,
        )

    def restore(self, stored: dict[str, Any]) -> None:
        """Continue from a loaded checkpoint, bit for bit on the CPU."""
        last = stored["last"]
        self.model.load_state_dict(last["model"])
        self.optimizer.load_state_dict(last["optimizer"])
        self.epoch, self.seconds, self.history = last["epoch"], last["seconds"], last["history"]
        self.codes = None if last["codes"] is None else last["codes"].to(self.device)
        self.best = stored["best"]
        rng = last["rng"]
        self.generator.set_state(rng["order"].cpu())
        torch.set_rng_state(rng["torch"].cpu())
        if self.device.type == "cuda" and rng["cuda"]:
            torch.cuda.set_rng_state_all([state.cpu() for state in rng["cuda"]])
        np.random.set_state(("MT19937", np.array(rng["numpy"][:-1], dtype=np.uint32), rng["numpy"][-1]))
        random.setstate((3, tuple(rng["python"]), None))


def _numpy_state() -> list[int]:
    _, keys, position, *_ = np.random.get_state(legacy=True)
    return [*(int(key) for key in keys), int(position)]


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

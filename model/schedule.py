"""When codes are learned: the phases of a run, and the baselines that leave phases out.

A run warms up (scores from z itself), then learns codes (scores from the codes, encoder and codebooks train), then
fixes them (scores from the codes, only their vectors, relations and decoder train).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from common.config import Config

ASSIGNMENTS = 16  # of codes per epoch, at least
FROZEN_RATE = 0.3  # of Adagrad's learning rate: at 1, the first steps undo the k-means (docs/LOG.md)
MOST_STEPS_APART = 8  # between two assignments
PATIENCE = 0.25  # part of the run without a better epoch on valid, once codes are fixed, after which it ends
FEWEST_RANKINGS = 10  # that were no better, before it ends


class Phase(NamedTuple):
    """What an epoch trains, and where its scores come from."""

    name: str
    quantized: bool  # scores come from codes, else from z
    trains_encoder: bool


WARM_UP = Phase("warm-up", quantized=False, trains_encoder=True)
CODES = Phase("codes", quantized=True, trains_encoder=True)
FROZEN = Phase("frozen", quantized=True, trains_encoder=False)


class Schedule:
    """Warm-up until ``warmup_epochs``, codes until ``freeze_at``, frozen codes until the end."""

    makes_codes = True  # whether the run ends with codes
    trains_with_codes = True  # whether any epoch has codes
    frozen_rate = FROZEN_RATE

    def __init__(self, config: Config) -> None:
        self.config = config

    def progress(self, epoch: float, seconds: float = 0.0) -> float:
        """Part of the run that is over, by epochs or, with ``max_minutes``, by the clock, whichever is further."""
        done = epoch / self.config.epoch
        return max(done, seconds / (60 * self.config.max_minutes)) if self.config.max_minutes else done

    def phase(self, epoch: float, seconds: float = 0.0) -> Phase:
        """The phase of the epoch that starts after ``epoch`` epochs."""
        progress, until = self.progress(epoch, seconds), self.config.warmup_epochs
        if (progress if until < 1 else epoch) < until:
            return WARM_UP
        return FROZEN if progress >= self.config.freeze_at < 1 else CODES

    def lr(self, progress: float) -> float:
        """The learning rate: a half cosine from ``lr`` down to 1 % of it. Adagrad's steps shrink by themselves: ``lr``,
        and less once codes are fixed, when its steps start anew for the codebooks."""
        if self.config.optimizer == "adagrad":
            return self.config.lr * (self.frozen_rate if progress >= self.config.freeze_at < 1 else 1.0)
        return self.config.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)

    def stalled(self, progress: float, best: float, worse: int) -> bool:
        """Early stopping: whether a run at ``progress`` ends, whose best epoch ended at ``best``; ``worse``: rankings
        since. Scores rise when codes are fixed, so only the part of the run after ``freeze_at`` counts.
        """
        return worse >= FEWEST_RANKINGS and progress - max(best, self.config.freeze_at) > PATIENCE - 1e-9

    def assign_every(self, steps: int) -> int:
        """Scorer steps between assignments of codes, in an epoch of ``steps``."""
        return max(1, min(MOST_STEPS_APART, steps // ASSIGNMENTS))

    def noise(self, phase: Phase) -> float:
        """Standard deviation of the noise on what the scorer sees, in those of its input."""
        return {WARM_UP: self.config.z_noise, FROZEN: self.config.frozen_noise}.get(phase, 0.0)

    def averages(self, phase: Phase, progress: float) -> bool:
        """Whether the steps of this epoch enter the average of the weights."""
        return phase == FROZEN

    def can_be_best(self, phase: Phase) -> bool:
        """Whether an epoch's score is one that the run may report: from codes, where it makes codes."""
        return phase.quantized


class Unquantized(Schedule):
    """Baseline: the same model, without codes to the end."""

    makes_codes = False
    trains_with_codes = False
    frozen_rate = 1.0

    def phase(self, epoch: float, seconds: float = 0.0) -> Phase:
        return WARM_UP

    def averages(self, phase: Phase, progress: float) -> bool:
        return progress >= self.config.freeze_at

    def can_be_best(self, phase: Phase) -> bool:
        return True


class PostHoc(Unquantized):
    """Baseline: trained without codes, quantized once at the end."""

    makes_codes = True

    def can_be_best(self, phase: Phase) -> bool:
        return phase.quantized

    def stalled(self, progress: float, best: float, worse: int) -> bool:
        return False  # only its end is scored from codes


class RandomCodes(Schedule):
    """Baseline: codes drawn at random before the first epoch and never changed (RandomEQ, Li et al. 2023)."""

    frozen_rate = 1.0

    def phase(self, epoch: float, seconds: float = 0.0) -> Phase:
        return FROZEN


SCHEDULES = {"random": RandomCodes, "posthoc": PostHoc, "none": Unquantized}  # every other quantizer: Schedule


def schedule_of(config: Config) -> Schedule:
    """The schedule of ``--quantizer``."""
    return SCHEDULES.get(config.quantizer, Schedule)(config)

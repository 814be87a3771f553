"""The rows of a tuning run as token ids: kept flat, in the order of an epoch, and as batches."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lora_training.prompts import IGNORED, Example, pad_batch

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

FAR = 50  # steps' worth of rows that are sorted by length together
NEAR = 8  # the same where rows have their time


class TokenRows:
    """Encoded rows in flat arrays: five bytes a token, and a few numbers per row. A torch data set."""

    def __init__(self) -> None:
        self.tokens, self.ends, self.supervised = array("i"), array("q", [0]), bytearray()
        self.pieces, self.piece_ends = array("i"), array("q", [0])

    def append(self, example: Example) -> None:
        self.tokens.extend(example.input_ids)
        self.supervised.extend(label != IGNORED for label in example.labels)
        self.ends.append(len(self.tokens))
        self.pieces.extend(example.pieces)
        self.piece_ends.append(len(self.pieces))

    def extend(self, others: TokenRows) -> None:
        for row in range(len(others)):
            self.append(others[row])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> Example:
        part = slice(self.ends[row], self.ends[row + 1])
        ids = self.tokens[part].tolist()
        labels = [token if said else IGNORED for token, said in zip(ids, self.supervised[part], strict=True)]
        return Example(ids, labels, tuple(self.pieces[self.piece_ends[row] : self.piece_ends[row + 1]]))

    @property
    def lengths(self) -> NDArray[np.int64]:
        ends = np.frombuffer(self.ends, dtype=np.int64)
        return ends[1:] - ends[:-1]

    @property
    def answers(self) -> NDArray[np.int64]:
        """Supervised tokens per row."""
        counts = np.concatenate([[0], np.frombuffer(self.supervised, dtype=np.uint8).cumsum(dtype=np.int64)])
        ends = np.frombuffer(self.ends, dtype=np.int64)
        found: NDArray[np.int64] = counts[ends[1:]] - counts[ends[:-1]]
        return found


class DrawnLists:
    """Joined rows of which each pass sees other parts: the judgements that say True and some of those that say False.

    What is drawn depends on seed, epoch and row alone, as the order of ``ByLength`` does, which sets the epoch. A torch
    data set.
    """

    def __init__(self, rows: TokenRows, count: int, true: int, seed: int) -> None:
        self.rows, self.count, self.true, self.seed, self.epoch = rows, count, true, seed, 0
        self.lengths = np.array([len(self[row].input_ids) for row in range(len(rows))], dtype=np.int64)
        """Tokens per row in the first pass."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Example:
        return drawn(self.rows[row], self.count, self.true, np.random.default_rng([self.seed, self.epoch, row]))


def drawn(example: Example, count: int, true: int, rng: np.random.Generator) -> Example:
    """A joined example with ``count`` of its judgements, in their order: those whose answer begins with the token
    ``true``, and random others. An example that has no more of them stays as it is."""
    shared, *rests = example.pieces or (0,)
    if len(rests) <= count:
        return example
    ends = np.cumsum([shared, *rests]).tolist()
    parts = [slice(start, end) for start, end in itertools.pairwise(ends)]
    first = [next(label for label in example.labels[part] if label != IGNORED) for part in parts]
    keys = rng.random(len(parts)) + [label != true for label in first]
    kept = np.sort(np.argsort(keys)[:count]).tolist()
    ids, labels = example.input_ids[:shared], example.labels[:shared]
    for i in kept:
        ids, labels = ids + example.input_ids[parts[i]], labels + example.labels[parts[i]]
    return Example(ids, labels, (shared, *(rests[i] for i in kept)))


class ByLength:
    """Row order of each epoch: rows of like length share a step, the steps come in random order.

    It depends on seed and epoch alone, not on the state of any generator: every process and every resumed run sees the
    same order.
    """

    lists: DrawnLists | None = None  # that are drawn anew in every epoch

    def __init__(self, lengths: NDArray[np.int64], step_rows: int, seed: int) -> None:
        self.lengths, self.step_rows, self.seed, self.epoch = lengths, step_rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if self.lists is not None:
            self.lists.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        yield from self._in_steps(rng.permutation(len(self.lengths)), FAR, rng)

    def _in_steps(self, order: NDArray[np.int64], steps: int, rng: np.random.Generator) -> Iterator[int]:
        """``order`` with rows sorted by length, so many ``steps`` at a time, and then all steps shuffled."""
        far = steps * self.step_rows
        order = np.concatenate([
            part[np.argsort(-self.lengths[part], kind="stable")]
            for part in (order[start : start + far] for start in range(0, len(order), far))
        ])  # fmt: skip
        whole = len(order) // self.step_rows * self.step_rows
        yield from rng.permutation(order[:whole].reshape(-1, self.step_rows)).ravel().tolist()
        yield from order[whole:].tolist()


class EasyFirst(ByLength):
    """Row order of a run that goes from easy rows to the others; the first ``easy`` rows are the easy ones.

    An epoch has as many rows as there are others. Each place is an easy row's with a probability that falls linearly,
    from 1 at the start of the run to 0 at the share ``until`` of its ``total`` rows.
    """

    def __init__(
        self, lengths: NDArray[np.int64], step_rows: int, seed: int, easy: int, until: float, total: float
    ) -> None:
        super().__init__(lengths, step_rows, seed)
        self.easy, self.until, self.total = easy, until, total

    def __len__(self) -> int:
        return len(self.lengths) - self.easy

    def __iter__(self) -> Iterator[int]:
        rng, count = np.random.default_rng([self.seed, self.epoch]), len(self)
        order = self.easy + rng.permutation(count)
        place = self.epoch * count + np.arange(count)
        is_easy = rng.random(count) < 1 - place / (self.until * self.total)
        order[is_easy] = np.resize(rng.permutation(self.easy), int(is_easy.sum()))
        window = NEAR * self.step_rows
        for start in range(0, count, window):
            yield from self._in_steps(order[start : start + window], NEAR, rng)


class Collate:
    """Examples -> input_ids, attention_mask, labels [B, T] and ``logits_to_keep`` bool [B, T]: where an answer token
    comes next. With rows that were joined the mask is bool [B, 1, T, T], and position_ids [B, T] are given."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        import torch

        ids, mask, labels = (torch.tensor(part) for part in pad_batch(examples, self.pad_id))
        keep = torch.zeros_like(labels, dtype=torch.bool)
        keep[:, :-1] = labels[:, 1:] != IGNORED
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "logits_to_keep": keep}
        if any(example.pieces for example in examples):
            batch["attention_mask"], batch["position_ids"] = piece_masks(examples, ids.shape[1])
        return batch


def piece_masks(examples: list[Example], T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token of joined rows sees, bool [B, 1, T, T], and its position [B, T]: as if its row stood alone."""
    import torch

    mask = torch.eye(T, dtype=torch.bool).repeat(len(examples), 1, 1)  # padding sees itself, or its softmax is empty
    position = torch.zeros(len(examples), T, dtype=torch.long)
    for row, example in enumerate(examples):
        shared, *rests = example.pieces or (0, len(example.input_ids))
        at = 0
        for length, before in ((shared, 0), *((rest, shared) for rest in rests)):
            part = slice(at, at + length)
            mask[row, part, :before] = True
            mask[row, part, part] = torch.ones(length, length, dtype=torch.bool).tril()
            position[row, part] = torch.arange(before, before + length)
            at += length
    return mask[:, None], position

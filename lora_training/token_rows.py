"""Rows of a training run as token ids: stored in flat arrays, in the order of an epoch, and as batches."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lora_training.prompts import IGNORED, Example, pad_batch

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

BLOCK = 50  # steps whose rows are sorted by length together


class TokenRows:
    """Encoded rows in flat arrays: five bytes a token, and a few numbers per row. A torch data set."""

    def __init__(self) -> None:
        self.tokens, self.ends, self.supervised = array("i"), array("q", [0]), bytearray()

    def append(self, example: Example) -> None:
        self.tokens.extend(example.input_ids)
        self.supervised.extend(label != IGNORED for label in example.labels)
        self.ends.append(len(self.tokens))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> Example:
        part = slice(self.ends[row], self.ends[row + 1])
        ids = self.tokens[part].tolist()
        labels = [token if used else IGNORED for token, used in zip(ids, self.supervised[part], strict=True)]
        return Example(ids, labels)

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


class ByLength:
    """Row order of each epoch: rows of similar length share a step; the order of the steps is random.

    It depends on seed and epoch only, not on the state of a generator, so it is the same on every process and in a
    resumed run.
    """

    def __init__(self, lengths: NDArray[np.int64], step_rows: int, seed: int) -> None:
        self.lengths, self.step_rows, self.seed, self.epoch = lengths, step_rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order, block = rng.permutation(len(self.lengths)), BLOCK * self.step_rows
        order = np.concatenate([
            part[np.argsort(-self.lengths[part], kind="stable")]
            for part in (order[start : start + block] for start in range(0, len(order), block))
        ])  # fmt: skip
        whole = len(order) // self.step_rows * self.step_rows
        yield from rng.permutation(order[:whole].reshape(-1, self.step_rows)).ravel().tolist()
        yield from order[whole:].tolist()


class Collate:
    """Examples -> input_ids, attention_mask, labels [B, T] and ``logits_to_keep`` bool [B, T]: positions before an
    answer token."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        import torch

        ids, mask, labels = (torch.tensor(part) for part in pad_batch(examples, self.pad_id))
        keep = torch.zeros_like(labels, dtype=torch.bool)
        keep[:, :-1] = labels[:, 1:] != IGNORED
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "logits_to_keep": keep}

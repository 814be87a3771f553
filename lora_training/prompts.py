"""From a row of instruction data to text and tokens; used by training, inference and scoring alike.

    <s>### Instruction:
    {instruction}

    ### Response:
    {output}</s>

A non-empty ``input`` follows the instruction under ``### Input:``. Prompt and answer are tokenized separately, so that
the tokens of a prompt never depend on its answer; the first token of every answer is the one that inference predicts
after ``encode_prompt``. Text is never parsed as a control token: a name that contains ``</s>`` stays text.

Nothing is truncated: a truncated prompt loses the question, a truncated answer is wrong. Rows that are too long raise
an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of tokens without a loss, torch's default
INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n", "### Input:\n", "### Response:\n"


class Example(NamedTuple):
    """One row as token ids."""

    input_ids: list[int]  # prompt, then answer
    labels: list[int]  # IGNORED on the prompt, then the answer's ids

    @property
    def prompt_length(self) -> int:
        return self.labels.count(IGNORED)


def prompt_text(row: Mapping[str, Any]) -> str:
    """The prompt: everything up to the answer."""
    given = f"{INPUT}{row['input']}\n\n" if row.get("input") else ""
    return f"{INSTRUCTION}{row['instruction']}\n\n{given}{RESPONSE}"


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of ``text`` without start and end token, also if the text contains their spelling."""
    return encode_texts([text], tokenizer)[0]


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """``encode_text`` of each text, faster than one by one."""
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]  # fmt: skip
    return ids


def encode_prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Start token (if the tokenizer has one) and the prompt."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + encode_text(prompt_text(row), tokenizer)


def encode_answer(text: str, tokenizer: PreTrainedTokenizerBase, end: bool = True) -> list[int]:
    """The answer and the end token; without ``end`` the beginning of a longer answer."""
    return encode_text(text, tokenizer) + ([tokenizer.eos_token_id] if end else [])


def decode_answer(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an answer up to its end token: the inverse of ``encode_answer``."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def encode_example(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int = 0) -> Example:
    """Ids and labels of a row, the prompt masked. InputError if longer than ``max_length`` tokens (0: any length)."""
    return next(encode_examples([row], tokenizer, max_length))


def encode_examples(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int = 0
) -> Iterator[Example]:
    """``encode_example`` of each row, tokenized a thousand at a time."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    stream = iter(rows)
    while block := list(itertools.islice(stream, 1000)):
        ids = encode_texts([text for row in block for text in (prompt_text(row), row["output"])], tokenizer)
        for row, prompt, answer in zip(block, ids[::2], ids[1::2], strict=True):
            yield _example(row, start + prompt, [*answer, tokenizer.eos_token_id], max_length)


def _example(row: Mapping[str, Any], prompt: list[int], answer: list[int], max_length: int) -> Example:
    if len(answer) == 1:
        raise InputError(f"row {row.get('id', '?')} has an empty output; remove the row, or give it an output")
    if max_length and len(prompt) + len(answer) > max_length:
        what = f"its answer alone has {len(answer)}" if len(answer) > max_length else f"{len(answer)} in the answer"
        raise InputError(
            f"row {row.get('id', '?')} has {len(prompt) + len(answer)} tokens ({what}), --max_length is {max_length}: "
            f"nothing is truncated; give --max_length {len(prompt) + len(answer)} or more"
        )
    return Example(prompt + answer, [IGNORED] * len(prompt) + answer)


def pad_batch(examples: Iterable[Example], pad_id: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Examples padded on the right to the longest: input_ids, attention_mask and labels, each [B, T]."""
    rows = list(examples)
    T = max(len(row.input_ids) for row in rows)
    return (
        [row.input_ids + [pad_id] * (T - len(row.input_ids)) for row in rows],
        [[1] * len(row.input_ids) + [0] * (T - len(row.input_ids)) for row in rows],
        [row.labels + [IGNORED] * (T - len(row.labels)) for row in rows],
    )

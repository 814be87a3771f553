"""From a row of instruction data to text and tokens: training, inference and scoring all go through these functions.

    <s>### Instruction:
    {instruction}

    ### Response:
    {output}</s>

An ``input``, where a row has one, stands between under ``### Input:``. Prompt and answer are tokenized apart, so that
the tokens of a prompt never depend on its answer; the first token of every answer is the one that inference predicts
after ``encode_prompt``. Text is never read as a control token: a name that spells ``</s>`` stays text.

Nothing here truncates. A cut prompt loses the question, a cut answer teaches a wrong one, so both are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that the loss leaves out, torch's default
INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n", "### Input:\n", "### Response:\n"


class Example(NamedTuple):
    """One row as token ids."""

    input_ids: list[int]  # prompt, then answer
    labels: list[int]  # IGNORED on the prompt, then the answer's ids

    @property
    def prompt_length(self) -> int:
        return self.labels.count(IGNORED)


def prompt_text(row: Mapping[str, Any]) -> str:
    """What the model reads: everything up to the answer."""
    given = f"{INPUT}{row['input']}\n\n" if row.get("input") else ""
    return f"{INSTRUCTION}{row['instruction']}\n\n{given}{RESPONSE}"


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of ``text`` alone: no start or end token, and none where the text merely spells one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


def encode_prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Start token (where the tokenizer has one) and the prompt."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + encode_text(prompt_text(row), tokenizer)


def encode_answer(text: str, tokenizer: PreTrainedTokenizerBase, end: bool = True) -> list[int]:
    """The answer and the end token; without ``end`` the beginning of an answer that goes on."""
    return encode_text(text, tokenizer) + ([tokenizer.eos_token_id] if end else [])


def decode_answer(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an answer up to its end token: the inverse of ``encode_answer``."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def encode_example(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int = 0) -> Example:
    """Ids and labels of a row, the prompt masked. InputError beyond ``max_length`` tokens (0: any length)."""
    return next(encode_examples([row], tokenizer, max_length))


def encode_examples(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int = 0
) -> Iterator[Example]:
    """``encode_example`` of each row, tokenized a thousand at a time."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    stream = iter(rows)
    while block := list(itertools.islice(stream, 1000)):
        texts = [text for row in block for text in (prompt_text(row), row["output"])]
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for row, prompt, answer in zip(block, ids[::2], ids[1::2], strict=True):
            yield _example(row, start + prompt, [*answer, tokenizer.eos_token_id], max_length)


def _example(row: Mapping[str, Any], prompt: list[int], answer: list[int], max_length: int) -> Example:
    if len(answer) == 1:
        raise InputError(f"row {row.get('id', '?')} has an empty output: there is nothing to learn from it")
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

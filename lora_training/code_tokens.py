"""Codes as tokens of a language model: which codes the data hold, the added tokens, and their rows.

Each token of ``Class.codes.code_tokens`` becomes ONE id after the base vocabulary, in that order. Its rows in embedding
and head start from the mean of the base's rows:

    row = mean + NOISE * spread * noise                       noise: normal, of expected length 1
    row = mean + DIRECTION * spread * vector                  with --code_init; vectors of mean length 1: codebooks of
                                                              stage 1, or the rows of word_rows.py

where spread is the root mean square distance of the base's rows from their mean. Rows of a pretrained model share a
strong mean direction; a row without it gets too much or too little probability after every word of plain text.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from Class.codes import CODE_FORMATS, MARKS, code_tokens
from Class.rows import STATS
from Class.source import codes_key
from common.errors import InputError
from common.files import command, load_torch, read_json
from lora_training.base_model import load_saved_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_TOKENS = 10_000_000  # added tokens at most
NOISE, DIRECTION = 0.1, 0.3


# ---------------------------------------------------------------- which codes


class CodeShape(NamedTuple):
    """What the added tokens depend on."""

    num_code: int  # K
    num_quantizers: int  # Q

    @property
    def tokens(self) -> list[str]:
        return code_tokens(*self)


def read_codes_info(data: str | Path) -> dict[str, Any]:
    """``codes`` of the dataset_stats.json beside an instruction-data file: file, sha256, num_code, num_quantizers ...

    ``{"file": None}`` for data made without codes. InputError if the file or the entry is missing.
    """
    path = Path(data).resolve().parent / STATS
    if not path.is_file():
        raise InputError(
            f"{data} has no {STATS} beside it, which names the codes of its rows; write both: "
            "python Class/gen_fb_data_rq.py"
        )
    stats = read_json(path, "statistics")
    info = stats.get("codes") if isinstance(stats, dict) else None
    if not isinstance(info, dict) or not is_codes_info(info):
        raise InputError(f"{path} does not name the codes of its rows; write it again: {command('Class/build_mix.py')}")
    return info


def is_codes_info(info: Any) -> bool:
    """Whether ``info`` describes codes: none, or file, sha256 and sizes that a vocabulary can have."""
    if not isinstance(info, dict) or not isinstance(info.get("record", ""), str):
        return False
    if info.get("file") is None:
        return True
    sizes: list[Any] = [info.get(key) for key in ("num_code", "num_quantizers")]
    if not all(type(size) is int and 0 < size <= MOST_TOKENS for size in sizes):
        return False
    words = [info["file"], info.get("sha256"), info.get("code_format", "spec")]
    known = all(isinstance(word, str) for word in words) and words[2] in CODE_FORMATS
    seed = info.get("shuffle_seed", 0)
    known = known and type(info.get("shuffled", False)) is bool and type(seed) is int and seed >= 0
    return known and bool(sizes[0] * sizes[1] <= MOST_TOKENS)


def code_shape(info: Mapping[str, Any]) -> CodeShape | None:
    """K and Q of ``read_codes_info``; None without codes."""
    return None if info.get("file") is None else CodeShape(int(info["num_code"]), int(info["num_quantizers"]))


def refuse_other_codes(ours: Mapping[str, Any], theirs: Mapping[str, Any], our_name: str, their_name: str) -> None:
    """InputError unless two ``codes`` entries are of the same codes file, shuffled in the same way.

    Example: ``ours`` of an adapter's record, ``theirs`` of the statistics of the rows to answer.
    """

    def shown(info: Mapping[str, Any]) -> str:
        if info.get("file") is None:
            return "no codes"
        shuffled = f", shuffled by seed {info.get('shuffle_seed', 0)}" if info.get("shuffled") else ""
        return f"{info['file']} (sha256 {str(info.get('sha256'))[:12]}{shuffled})"

    if codes_key(ours) != codes_key(theirs):
        raise InputError(
            f"{our_name} was made with {shown(ours)}, {their_name} with {shown(theirs)}: the same token means another "
            "code; use data and adapter of the same codes file"
        )


# ---------------------------------------------------------------- added tokens


def add_code_tokens(tokenizer: PreTrainedTokenizerBase, shape: CodeShape | None) -> list[int]:
    """Add the missing tokens of ``shape`` and return the ids of all of them, checked; [] without codes.

    A base that was tuned before has them already: training continues from its rows. InputError if the tokenizer has
    tokens of other codes, or has some of them as special tokens.
    """
    if shape is None:
        return []
    from transformers import AddedToken

    known = tokenizer.get_added_vocab()
    others = {token for token in known if re.fullmatch(r"Q\d+_\d+", token)} - set(shape.tokens)
    if others:
        raise InputError(
            f"the tokenizer already has {len(others)} tokens of other codes, such as {min(others)}; the data need "
            f"Q0_0..Q{shape.num_quantizers - 1}_{shape.num_code - 1}: start from the base model"
        )
    special = sorted(set(shape.tokens) & set(tokenizer.all_special_tokens))
    if special:
        raise InputError(
            f"the tokenizer already has {special[0]} as a special token, which is deleted from decoded answers; set "
            '"special": false for it in tokenizer.json and remove it from tokenizer_config.json, or give another base'
        )
    # normalized=False: matched in the raw text; special=False: not deleted by skip_special_tokens
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in shape.tokens])
    return token_ids(tokenizer, shape)


def token_ids(tokenizer: PreTrainedTokenizerBase, shape: CodeShape) -> list[int]:
    """The ids of ``shape.tokens``, in order. InputError unless each is one id and text is returned unchanged."""
    tokens = shape.tokens
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in tokens if token not in vocabulary]
    if absent:
        raise InputError(
            f"the tokenizer lacks {len(absent)} of {len(tokens)} code tokens, such as {absent[0]}: it belongs to "
            "another vocabulary; use the tokenizer that was saved with the adapter"
        )
    ids = [vocabulary[token] for token in tokens]
    text = "".join(tokens)
    if tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"] != ids:
        raise InputError("the tokenizer splits code tokens or puts pieces between them; use one with legacy=False")
    sample = f"<ENT>a b</ENT> <CODE>{tokens[-1]}:{tokens[len(MARKS)]}|{tokens[-1]}</CODE>\n2. x"
    coded = tokenizer(sample, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    if tokenizer.decode(coded, skip_special_tokens=True, clean_up_tokenization_spaces=False) != sample:
        raise InputError("the tokenizer does not return code text unchanged; use a tokenizer with legacy=False")
    return ids


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path, shape: CodeShape | None) -> None:
    """Save, reload and compare: RuntimeError if the saved tokenizer gives any code token another id."""
    tokenizer.save_pretrained(str(folder))
    if shape is None:
        return
    if token_ids(load_saved_tokenizer(folder), shape) != token_ids(tokenizer, shape):
        raise RuntimeError(f"the tokenizer saved in {folder} gives the code tokens other ids")


def reload_check(tokenizer: PreTrainedTokenizerBase, shape: CodeShape) -> None:
    """The check of ``save_tokenizer`` in a temporary folder: run before the weights are loaded."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, folder, shape)


# ---------------------------------------------------------------- rows


def token_matrices(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Weights of the embedding and, if they are separate, of the head: module name (last part) -> [V, D]."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    parts = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {names[id(part)]: part.weight for part in parts}


def trainable_rows(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]]:
    """LoraConfig's ``trainable_token_indices``: rows of the embedding and, where untied, of the head."""
    return {name: list(ids) for name in token_matrices(model)}


def resize_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, old_tokens: int | None = None,
    codebooks: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Grow embedding and head to the tokenizer and initialize the rows of new tokens; old rows keep their bits.

    ``old_tokens``: size of the tokenizer before tokens were added (default: rows of the embedding). Some bases have
    more rows than tokens; new tokens take these first. ``codebooks`` [Q, K, code_dim]: see the module's docstring. No
    row is added for alignment: it would take part in the softmax and be random again after every load.
    """
    import torch

    rows = len(next(model.get_input_embeddings().parameters()))
    old_tokens = rows if old_tokens is None else old_tokens
    if len(tokenizer) <= old_tokens:
        return
    with torch.random.fork_rng():  # the library draws random rows first; the caller's generator is not moved
        torch.manual_seed(seed)
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    directions = None if codebooks is None else _directions(model, codebooks, generator)
    with torch.no_grad():
        for matrix in token_matrices(model).values():
            mean, spread = row_statistics(matrix[:old_tokens])
            D = len(mean)
            new = NOISE * D**-0.5 * torch.randn(len(tokenizer) - old_tokens, D, generator=generator)
            if directions is not None and codebooks is not None:
                ids = token_ids(tokenizer, CodeShape(codebooks.shape[1], codebooks.shape[0]))[len(MARKS) :]
                new[torch.tensor(ids) - old_tokens] = DIRECTION * directions
            new = mean + spread * new.to(matrix.device)
            matrix[old_tokens : len(tokenizer)] = new.to(matrix.dtype)


def row_statistics(matrix: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean [D] of the rows [N, D] in float32, and the root mean square distance of the rows from it."""
    mean = sum(block.double().sum(0) for block in matrix.split(4096)) / len(matrix)  # no float copy of a large matrix
    square = sum(float((block.double() - mean).square().sum()) for block in matrix.split(4096)) / len(matrix)
    return mean.float(), square**0.5


def _directions(model: PreTrainedModel, codebooks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The codebooks as [Q * K, D] with mean length 1, in the order of the code tokens.

    One random orthogonal matrix maps them to the model's width D, so inner products between codes stay as stage 1
    learned them (if code_dim > D: in D random directions). Where code_dim is D, they are used as they are.
    """
    import torch

    Q, K, C = codebooks.shape
    D = next(iter(token_matrices(model).values())).shape[1]
    rows = codebooks.reshape(Q * K, C)
    if C != D:
        rows = rows @ torch.linalg.qr(torch.randn(max(C, D), max(C, D), generator=generator))[0][:C, :D]
    return rows / rows.norm(dim=1).mean()


def read_codebooks(path: str | Path, shape: CodeShape) -> torch.Tensor:
    """The codebooks [Q, K, code_dim] of the best epoch in stage 1's checkpoint, or the rows of word_rows.py; float32.

    InputError if the file is neither, or has other sizes than ``shape``.
    """
    from model.quantizers import codebooks_of

    K, Q = shape
    stored = load_torch(path, "checkpoint")
    if not isinstance(stored, Mapping):
        raise InputError(f"checkpoint {path} is a {type(stored).__name__}; give the one that run_rq.py wrote")
    try:
        rows = stored.get("codebooks")  # of word_rows.py
        codebooks = (codebooks_of(stored["best"]["model"]) if rows is None else rows).float()
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise InputError(f"checkpoint {path} has no codebooks; give the one that run_rq.py wrote") from error
    if codebooks.dim() != 3 or codebooks.shape[:2] != (Q, K) or not bool(codebooks.isfinite().all()):
        raise InputError(
            f"checkpoint {path} has codebooks {list(codebooks.shape)}, the rows have codes of {Q} levels of {K}: give "
            "the checkpoint of the run that made them"
        )
    return codebooks

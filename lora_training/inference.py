"""Answers of a tuned model to every row of the test tasks, and to the validation rows that thresholds need.

    cd lora_training && python inference.py --base_model meta-llama/Llama-2-7b-hf \
        --lora_adapter lora_outputs/lora_adapters --output inference_results.json
    cd lora_training && python inference.py --base_model lora_outputs/merged          a merged model: no adapter

--decode selects how link prediction is answered:
score       re-ranking: log P(first answer line | prompt with the list) for each candidate, exact
likelihood  likelihood scoring: log P(candidate | the query without a list), for models tuned on tail_prediction rows
free        greedy text, parsed as numbered lines
True/False tasks compare P(True) with P(False) (free: parse the text); all other tasks are answered by greedy text.

--permute K answers each test list in K more random orders, to measure how far the answers depend on the order.

Answers are appended to a file beside --output (answers.jsonl, or NAME.answers.jsonl for another NAME.json). After an
interruption the same command continues and writes the same bytes, because batches do not depend on where it stopped.
At the end --output gets the run record, the metrics of score_answers.py and all answers.

Candidates without codes are names of unequal length: each is scored through the token that ends it, and ``tokens``
stores the lengths, so that score_answers.py can choose between sum and per-token mean on validation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.prompts import FALSE, TRUE, link_prediction, numbered, prediction
from Class.rows import PREDICTED, STATS, Row, existing_split, longest_rows, need_fields, read_rows
from common.device import find_device
from common.errors import CommandParser, InputError, at_least, content_of, run_command
from common.files import command, exclusive_lock, output_file, read_json, sha256_file, write_json
from common.record import by_name, make_record
from lora_training.adapters import RECORD, WEIGHTS, Saved, check_base, load_adapted, read_saved
from lora_training.base_model import check_causal, check_model_name, load_base, load_config, load_tokenizer
from lora_training.code_tokens import read_codes_info, refuse_other_codes
from lora_training.memory import enough_memory
from lora_training.prompts import decode_answer, encode_answer, encode_prompt
from lora_training.score_answers import Answer, is_classification, is_ranking, print_report, read_answers, report

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "inference_results.json"
DECODES = ("score", "likelihood", "free")
DTYPES = ("auto", "bfloat16", "float16", "float32")
LISTED = ("candidates", "candidate_names", "candidate_codes")  # fields of a row in the order of its list
WINDOW = 256  # rows that are sorted by length and cut into batches together
BEST = 3  # answers in the output of link prediction


# ---------------------------------------------------------------- candidates of a row


class Listed(NamedTuple):
    """One candidate of a prompt."""

    name: str
    answer: str  # what link prediction answers with: its codes, or its name in data without codes


def listed_candidates(row: Row) -> list[Listed]:
    """The candidates of a row in the order of its prompt. InputError if the row lacks them."""
    names = need_fields(row, "candidate_names")["candidate_names"]
    return [Listed(*pair) for pair in zip(names, row.get("candidate_codes") or names, strict=True)]


def candidate_lines(listed: Sequence[Listed], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the first answer line for each candidate. Codes end with their own token, a name with its line."""
    lines = []
    for candidate in listed:
        name = candidate.name == candidate.answer
        line = numbered([candidate.answer]) + ("\n" if name and len(listed) > 1 else "")
        lines.append(encode_answer(line, tokenizer, end=name and len(listed) == 1))
    return lines


def query_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the query without its list: the prompt of tail_prediction rows."""
    return encode_prompt({"instruction": prediction(need_fields(row, "head", "relation"))}, tokenizer)


def permuted_rows(row: Row, orders: int, seed: int) -> Iterator[tuple[Row, list[int]]]:
    """``orders`` copies of a row with its list in a random order, seeded by its id, and each order [C]."""
    rng = np.random.default_rng([seed, zlib.crc32(str(row["id"]).encode())])
    for _ in range(orders):
        order = rng.permutation(len(row["candidates"])).tolist()
        other = row | {key: [row[key][i] for i in order] for key in LISTED if row.get(key)}
        yield other | {"instruction": link_prediction(other)}, order


def read_numbered(text: str, listed: Sequence[Listed]) -> list[float | None] | None:
    """Scores 0, -1, -2 of the candidates on lines 1 to 3 of ``text``, None for the others; None if line 1 is none.

    Other lines that are no candidate, or one again, are skipped. Candidates with equal codes get the same score.
    """
    scores: list[float | None] = [None] * len(listed)
    for number, line in enumerate(text.strip().split("\n")[:BEST]):
        answer = re.sub(r"^\d+\. ", "", line.strip())
        matches = [i for i, candidate in enumerate(listed) if candidate.answer == answer]
        if number == 0 and not matches:
            return None
        for i in matches:
            scores[i] = -float(number) if scores[i] is None else scores[i]
    return scores


# ---------------------------------------------------------------- the model


class Reader(NamedTuple):
    """The model that answers, checked before its weights are loaded."""

    base_model: str
    saved: Saved | None  # of the adapter or of the merged model; None: a base model alone
    merged: bool
    tokenizer: PreTrainedTokenizerBase

    @property
    def codes(self) -> dict[str, Any]:
        """Which codes the model was tuned on (see ``read_codes_info``)."""
        return self.saved.record["codes"] if self.saved else {"file": None}

    def identity(self) -> dict[str, str]:
        """Hashes of the record and, for an adapter, of the weights."""
        found = {"base_model": self.base_model}
        if self.saved:
            files = [RECORD] if self.merged else [RECORD, WEIGHTS]
            found |= {name: sha256_file(self.saved.folder / name) for name in files}
        return found


def check_model(base_model: str | None, lora_adapter: Path | None) -> Reader:
    """An adapter on its base, a merged model, or a base model. InputError if a part is missing or does not fit."""
    if lora_adapter is not None:
        saved = read_saved(lora_adapter)
        base_model = base_model or saved.base
        check_base(saved, base_model)
        return Reader(base_model, saved, False, saved.tokenizer)
    if base_model is None:
        raise InputError(
            "no model given: --lora_adapter lora_outputs/lora_adapters (by train_lora.py), or --base_model with a "
            "merged model (by merge_adapter.py)"
        )
    check_model_name(base_model)
    if (Path(base_model) / RECORD).is_file() and not (Path(base_model) / "adapter_config.json").is_file():
        record = read_json(Path(base_model) / RECORD, "record")
        if isinstance(record, dict) and "codes" in record:
            saved = read_saved(base_model, weights="config.json")
            check_causal(base_model)
            return Reader(base_model, saved, True, saved.tokenizer)
    check_causal(base_model)
    return Reader(base_model, None, False, load_tokenizer(base_model))


def memory_advice(device: torch.device) -> str:
    """Flags that reduce the memory of a model that answers."""
    return "give --dtype bfloat16" + ("" if device.type == "cpu" else ", --device cpu")


def load_model(reader: Reader, device: torch.device, dtype: str = "auto") -> PreTrainedModel:
    """The model in eval mode; an adapter is merged, since unmerged new rows copy embedding and head in each forward."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = getattr(torch, ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype)
    model: Any
    if reader.saved and not reader.merged:  # safe_merge: NaN is an error
        model = load_adapted(reader.saved, reader.base_model, kind).merge_and_unload(safe_merge=True)
    else:
        model = load_base(reader.base_model, kind)
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


# ---------------------------------------------------------------- answers


class Settings(NamedTuple):
    """How to answer."""

    decode: str = "score"
    batch_size: int = 8
    max_new_tokens: int = 512
    permute: int = 0
    seed: int = 0


def make_answer(row: Row, decode: str, **found: Any) -> Answer:
    """One line of answers.jsonl: fields of the row, and in ``found`` those of the answer."""
    return {
        "id": row["id"], "task_type": row["task_type"], "split": row["split"], "direction": row.get("direction"),
        "decode": decode, "candidates": row.get("candidates"), "scores": None, "tokens": None, "truth": row["truth"],
        "triple": row.get("triple") if is_classification(row) else None, "candidate_rank": row.get("candidate_rank"),
        "candidate_order": row.get("candidate_order"), "text": "", "expected": row["output"],
        "parsed": True, **found,
    }  # fmt: skip


@dataclass
class Answerer:
    """A loaded model and how it answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings

    def answer(self, rows: Sequence[Row]) -> list[Answer]:
        """Answers to rows of one ``kind_of``, in order; the batch is computed together."""
        kind = kind_of(rows[0], self.settings.decode)
        if kind == "rank":
            return [self._rank(row) for row in rows]
        return self._classify(rows) if kind == "classify" else self._generate(rows)

    def _classify(self, rows: Sequence[Row]) -> list[Answer]:
        from lora_training.candidate_scoring import score_choices

        prompts = [encode_prompt(row, self.tokenizer) for row in rows]
        labels = [encode_answer(text, self.tokenizer, end=False) for text in (TRUE, FALSE)]
        scores = score_choices(self.model, prompts, labels, int(self.tokenizer.pad_token_id)).tolist()
        return [
            make_answer(row, "score", candidates=[TRUE, FALSE], scores=pair, text=TRUE if pair[0] > pair[1] else FALSE)
            for row, pair in zip(rows, scores, strict=True)
        ]

    def _generate(self, rows: Sequence[Row]) -> list[Answer]:
        answers = [self._parse(row, text) for row, text in zip(rows, self._texts(rows), strict=True)]
        for row, answer in zip(rows, answers, strict=True):
            others = list(permuted_rows(row, self._orders(row), self.settings.seed))
            if others:
                texts = self._texts([other for other, _ in others])
                parsed = [self._parse(other, text) for (other, _), text in zip(others, texts, strict=True)]
                answer["permuted"] = [in_own_order(one["scores"], order)
                                      for one, (_, order) in zip(parsed, others, strict=True)]  # fmt: skip
        return answers

    def _texts(self, rows: Sequence[Row]) -> list[str]:
        """Greedy text for each row, one batch."""
        from lora_training.candidate_scoring import generate_freely

        prompts = [encode_prompt(row, self.tokenizer) for row in rows]
        end, pad = int(self.tokenizer.eos_token_id), int(self.tokenizer.pad_token_id)
        found = generate_freely(self.model, prompts, end, pad, self.settings.max_new_tokens)
        return [decode_answer(ids, self.tokenizer) for ids in found]

    def _parse(self, row: Row, text: str) -> Answer:
        """The answer in a free text."""
        if is_ranking(row):
            scores = read_numbered(text, listed_candidates(row))
            return make_answer(row, "free", scores=scores, text=text, parsed=scores is not None)
        if is_classification(row):
            pair = {TRUE: [0.0, -1.0], FALSE: [-1.0, 0.0]}.get(text.strip())
            parsed = pair is not None
            return make_answer(row, "free", candidates=[TRUE, FALSE], scores=pair, text=text, parsed=parsed)
        return make_answer(row, "free", text=text, parsed=bool(text.strip()))

    def _orders(self, row: Row) -> int:
        """How many other orders of the row's list are answered."""
        return self.settings.permute if is_ranking(row) and row["split"] == "test" else 0

    def _rank(self, row: Row) -> Answer:
        """Scores of the listed candidates, and of other orders of the list."""
        listed = listed_candidates(row)
        scores, lengths = self._score(row, listed)
        best = sorted(range(len(listed)), key=lambda i: -scores[i])[:BEST]
        permuted = [in_own_order(self._score(other, listed_candidates(other))[0], order)
                    for other, order in permuted_rows(row, self._orders(row), self.settings.seed)]  # fmt: skip
        return make_answer(
            row, self.settings.decode, scores=scores, text=numbered([listed[i].answer for i in best]),
            tokens=None if len(set(lengths)) == 1 else lengths, **({"permuted": permuted} if permuted else {}),
        )  # fmt: skip

    def _score(self, row: Row, listed: Sequence[Listed]) -> tuple[list[float], list[int]]:
        """Log-likelihood of each candidate [C], and its number of tokens [C] without what all candidates share.

        A name is scored through the token that ends it: without it, it would beat every longer name that it begins.
        """
        from lora_training.candidate_scoring import common_prefix, score_candidates

        if self.settings.decode == "likelihood":
            prompt = query_prompt(row, self.tokenizer)
            lines = [encode_answer(candidate.answer, self.tokenizer) for candidate in listed]
        else:
            prompt, lines = encode_prompt(row, self.tokenizer), candidate_lines(listed, self.tokenizer)
            shared = common_prefix(lines)
            prompt, lines = prompt + shared, [line[len(shared) :] for line in lines]
        return score_candidates(self.model, prompt, lines).tolist(), [len(line) for line in lines]


def in_own_order(scores: Sequence[float | None] | None, order: Sequence[int]) -> list[float | None] | None:
    """Scores [C] of a permuted list in the order of the row's own list; ``order[j]``: own place of its candidate j."""
    if scores is None:
        return None
    own: list[float | None] = [None] * len(order)
    for place, score in zip(order, scores, strict=True):
        own[place] = score
    return own


# ---------------------------------------------------------------- rows in order


def kind_of(row: Row, decode: str) -> str:
    """``rank``: by likelihoods or a search; ``classify``: True against False; ``generate``: greedy text."""
    if decode != "free" and is_ranking(row):
        return "rank"
    return "classify" if decode != "free" and is_classification(row) else "generate"


class Part(NamedTuple):
    """The rows of one file that are to be answered."""

    path: Path
    split: str
    limit: int  # at most so many rows, 0: all
    keep: Callable[[Row], bool] = lambda row: True

    def rows(self) -> Iterator[Row]:
        """The rows; those of link prediction with ``candidate_order``."""
        order = candidate_order(self.path, self.split)
        rows = filter(self.keep, read_rows(self.path))
        for row in itertools.islice(rows, self.limit or None):
            yield row | {"candidate_order": order} if is_ranking(row) else row

    def longest(self) -> Iterator[Row]:
        """The longest rows of each task type, or all where there is a limit."""
        return self.rows() if self.limit else filter(self.keep, longest_rows(self.path))


def candidate_order(data: Path, split: str) -> str | None:
    """Order of the lists in a file, ranked or shuffled; None if the statistics beside it do not contain it."""
    path = data.parent / STATS
    stats = read_json(path, "statistics")
    with content_of(path, "file of statistics", "run the script that wrote the data again"):
        orders = stats.get("candidate_order") or stats.get("candidate_orders", {}).get("link_prediction", {})
        found = orders.get(split)
    return str(found) if found else None


def decides(row: Row, with_codes: bool, decode: str) -> bool:
    """Whether a validation row is needed: for a threshold, or to choose between sum and mean for names, which differ in
    length."""
    return is_classification(row) or (is_ranking(row) and decode != "free" and not with_codes)


def batches(rows: Iterator[Row], settings: Settings) -> Iterator[list[Row]]:
    """Rows that are computed together: of one kind and similar length, independent of what was answered before."""
    while window := list(itertools.islice(rows, WINDOW)):
        for kind in ("rank", "classify", "generate"):
            of_kind = [row for row in window if kind_of(row, settings.decode) == kind]
            of_kind.sort(key=lambda row: len(row["instruction"]))
            size = 1 if kind == "rank" else settings.batch_size
            yield from (of_kind[i : i + size] for i in range(0, len(of_kind), size))


class Survey(NamedTuple):
    """Result of the first pass over the rows."""

    rows: int
    lists: int  # rows with a list of candidates
    longest: dict[str, Row]  # by kind, the row with the longest prompt in characters


def survey(parts: Sequence[Part], settings: Settings, sample: bool = False) -> Survey:
    """Count the rows and check each. InputError, with the row's id, if one lacks what its answer needs, or if a file is
    damaged or was cut off after the rows to answer. ``sample``: only the ``longest`` rows of each part."""
    count, lists, longest, seen = 0, 0, dict[str, Row](), set[tuple[str, str]]()
    for part in parts:
        if part.limit and not sample:
            deque(read_rows(part.path), maxlen=0)
        for row in part.longest() if sample else part.rows():
            count += 1
            if not row.get("truth") or "split" not in row:
                raise InputError(f"{part.path}: row {row['id']} has no truth or split; write the data again")
            key = (row["split"], row["id"])
            if key in seen:
                raise InputError(f"{part.path}: {row['id']} of {row['split']} is there twice; write the data again")
            seen.add(key)
            if is_ranking(row):
                lists += 1
                check_list(row, part.path, settings)
            kind = kind_of(row, settings.decode)
            if kind not in longest or len(row["instruction"]) >= len(longest[kind]["instruction"]):
                longest[kind] = row
    return Survey(count, lists, longest)


def check_list(row: Row, path: Path, settings: Settings) -> None:
    """InputError if the row has no candidates, or if the prompt to be permuted is not as the scripts write it."""
    if not listed_candidates(row):
        raise InputError(f"{path}: row {row['id']} has no candidates; write the data again")
    if settings.decode == "likelihood" or settings.permute:
        need_fields(row, "head", "relation")
    if settings.permute and link_prediction(row) != row["instruction"]:
        raise InputError(
            f"{path}: --permute: the prompt of row {row['id']} is not the one that Class/prompts.py makes from its "
            "fields; run Class/gen_lp_data_rq.py again"
        )


def check_rows(found: Survey, reader: Reader, settings: Settings, test_data: Path) -> None:
    """InputError if there are no rows, no lists where they are needed, or if the longest prompt and its answer do not
    fit the model; nothing is truncated."""
    if not found.rows:
        raise InputError(f"--test_data {test_data} has no rows to answer")
    if not found.lists and (settings.decode == "likelihood" or settings.permute):
        flag = f"--permute {settings.permute}" if settings.permute else "--decode likelihood"
        raise InputError(
            f"{flag} needs lists of candidates, and --test_data {test_data} has none; give the file in "
            f"link_prediction/ that gen_lp_data_rq.py wrote (beside {PREDICTED}/)"
        )
    limit = getattr(load_config(reader.base_model).get_text_config(), "max_position_embeddings", None)
    for kind, row in found.longest.items():
        query_alone = kind == "rank" and settings.decode == "likelihood"
        prompt = len((query_prompt if query_alone else encode_prompt)(row, reader.tokenizer))
        text = max((one.answer for one in listed_candidates(row)), key=len) if query_alone else row["output"]
        answer = settings.max_new_tokens if kind == "generate" else len(encode_answer(text, reader.tokenizer))
        if limit is not None and prompt + answer > limit:
            raise InputError(
                f"row {row['id']} has {prompt} tokens and its answer up to {answer}, the model reads {limit}: nothing "
                "is truncated; make shorter rows (--code_format compact), or lower --max_new_tokens"
            )


# ---------------------------------------------------------------- answers.jsonl


def answers_path(output: Path) -> Path:
    """answers.jsonl beside inference_results.json, else NAME.answers.jsonl, so that two runs may share a folder."""
    return output.with_name("answers.jsonl" if output.name == OUTPUT.name else f"{output.stem}.answers.jsonl")


def plan_path(path: Path) -> Path:
    """Beside answers.jsonl: the model, data and settings of its answers."""
    return path.with_name(path.name + ".plan.json")


def resume(path: Path, output: Path, plan: Mapping[str, Any], overwrite: bool) -> set[tuple[str, str]]:
    """(split, id) of the answers in answers.jsonl; an incomplete last line is cut off. InputError if they, or
    ``output``, are of another run."""
    if overwrite:
        return set()
    if not path.is_file():
        if output.is_file():
            raise InputError(f"--output {output} exists, without its {path.name}; give another file, or --overwrite")
        return set()
    beside = plan_path(path)
    before = read_json(beside, "plan") if beside.is_file() else {}
    before = {"permute": 0, "seed": 0} | (before if isinstance(before, dict) else {})  # plans of earlier versions
    differing = [f"{key} {before.get(key)!r} before, {plan[key]!r} now" for key in plan if before.get(key) != plan[key]]
    if differing:
        raise InputError(f"{path} has answers of another run ({differing[0]}); give another --output, or --overwrite")
    answers, end = read_answers(path)
    if end < path.stat().st_size:
        print(f"{path}: its last line is incomplete and is answered again")
        os.truncate(path, end)
    return {(answer["split"], answer["id"]) for answer in answers}


def answer_all(answerer: Answerer, parts: Sequence[Part], path: Path, done: set[tuple[str, str]], total: int) -> None:
    """Append the missing answers to ``path``, batch by batch."""
    from tqdm import tqdm

    try:
        with open(path, "ab") as file, tqdm(total=total, desc="answers", unit="row", smoothing=0.05) as progress:
            for part in parts:
                for rows in batches(part.rows(), answerer.settings):
                    missing = {row["id"] for row in rows if (row["split"], row["id"]) not in done}
                    if missing:
                        answers = [answer for answer in answerer.answer(rows) if answer["id"] in missing]
                        lines = (json.dumps(answer, ensure_ascii=False, allow_nan=False) for answer in answers)
                        file.write("".join(f"{line}\n" for line in lines).encode())
                        file.flush()
                    progress.update(len(rows))
    except OSError as error:  # by the write, or again when the file is closed
        raise InputError(f"cannot write {path}: {error.strerror}; free some space and repeat the command") from error


def in_file_order(path: Path, parts: Sequence[Part]) -> list[Answer]:
    """The answers in ``path``, test rows first, in the order of the data files."""
    by_key = {(answer["split"], answer["id"]): answer for answer in read_answers(path).answers}
    order = [(row["split"], row["id"]) for part in reversed(parts) for row in part.rows()]
    absent = [key for key in order if key not in by_key]
    if absent:
        raise InputError(f"{path} has no answer to {absent[0][1]} of {absent[0][0]}; give --overwrite")
    return [by_key[key] for key in order]


# ---------------------------------------------------------------- command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/inference.py", description=__doc__.split("\n")[0])
    group = parser.add_argument_group("model")
    add_model_flags(group)
    group = parser.add_argument_group("data")
    group.add_argument("--test_data", type=Path, default=HERE / "lora_data" / "test_tasks.json", help="rows to answer")
    group.add_argument(
        "--val_data", type=Path, metavar="FILE", help="for thresholds (default: the file beside the test data)"
    )
    group.add_argument("--limit", type=at_least(0), default=0, help="answer only the first N test rows (0: all)")
    group.add_argument(
        "--val_limit", type=at_least(0), default=0, help="answer only the first N validation rows (0: all)"
    )
    group = parser.add_argument_group("answers")
    group.add_argument("--output", type=output_file, default=OUTPUT, help="file for the record, metrics and answers")
    group.add_argument("--decode", choices=DECODES, default="score", help="how link prediction is answered")
    group.add_argument(
        "--permute", type=at_least(0), default=0, metavar="K", help="answer each test list in K more orders"
    )
    group.add_argument("--seed", type=at_least(0), default=0, help="of these orders")
    group.add_argument("--batch_size", type=at_least(1), default=8, help="True/False and free-text rows per batch")
    group.add_argument("--max_new_tokens", type=at_least(1), default=512, help="longest free text")
    group.add_argument("--overwrite", action="store_true", help="replace the answers of another or finished run")
    args = parser.parse_args(argv)
    if args.permute and args.decode == "likelihood":
        parser.error(f"--permute {args.permute}: with --decode likelihood the model does not see the list")
    return args


def add_model_flags(group: Any) -> None:
    """Flags of every command that answers."""
    group.add_argument(
        "--base_model", metavar="NAME", help="hub id, folder or merged model (default: the adapter's own)"
    )
    group.add_argument("--lora_adapter", type=Path, metavar="DIR", help="by train_lora.py; none for a merged model")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")


def check_data(args: argparse.Namespace) -> tuple[list[Part], dict[str, Any]]:
    """The files to answer, and whose codes they contain. InputError if a file is missing, or if they are of several
    codes."""
    if not args.test_data.is_file():
        raise InputError(f"--test_data {args.test_data} does not exist; write it: {command('Class/gen_fb_data_rq.py')}")
    if args.val_data is not None and not args.val_data.is_file():
        raise InputError(f"--val_data {args.val_data} does not exist; leave the flag out, or write the data again")
    info = read_codes_info(args.test_data)
    parts = [Part(args.test_data, "test", args.limit)]
    validation = args.val_data or existing_split(args.test_data.parent, "validation")
    if validation is not None:
        test = f"--test_data {args.test_data}"
        refuse_other_codes(info, read_codes_info(validation), test, f"--val_data {validation}")
        keep = partial(decides, with_codes=info.get("file") is not None, decode=args.decode)
        parts.insert(0, Part(validation, "validation", args.val_limit, keep))
    return parts, info


def check_codes(args: argparse.Namespace, reader: Reader, info: dict[str, Any]) -> None:
    """InputError if the rows contain other codes than the model was tuned on."""
    if reader.saved is None and info.get("file") is not None:
        raise InputError(
            f"--base_model {reader.base_model} was not tuned on codes, and {args.test_data} contains those of "
            f"{info['file']}; give --lora_adapter DIR, or a merged model"
        )
    if reader.saved is not None:
        model = f"--lora_adapter {args.lora_adapter}" if args.lora_adapter else f"--base_model {reader.base_model}"
        refuse_other_codes(reader.codes, info, model, f"--test_data {args.test_data}")


class Job(NamedTuple):
    """Everything that was checked before weights are loaded."""

    reader: Reader
    parts: list[Part]
    info: dict[str, Any]  # whose codes the rows contain
    settings: Settings
    rows: int
    device: torch.device
    hashes: dict[str, str]  # of the data
    plan: dict[str, Any]  # what answers depend on
    done: set[tuple[str, str]]  # (split, id) of the rows that are answered


def check_all(args: argparse.Namespace) -> Job:
    """Check files, model, device, the longest rows, earlier answers, and then all rows. InputError for the first
    problem."""
    parts, info = check_data(args)
    reader = check_model(args.base_model, args.lora_adapter)
    check_codes(args, reader, info)
    device = find_device(args.device)
    settings = Settings(args.decode, args.batch_size, args.max_new_tokens, args.permute, args.seed)
    check_rows(survey(parts, settings, sample=True), reader, settings, args.test_data)
    named = by_name({"" if part.split == "test" else part.split: part.path for part in parts})
    hashes = {name: sha256_file(file) for name, file in named.items()}
    plan = {
        **reader.identity(), **{f"{name}_sha256": value for name, value in hashes.items()}, **settings._asdict(),
        "limit": args.limit, "val_limit": args.val_limit, "device": device.type, "dtype": args.dtype,
    }  # fmt: skip
    done = resume(answers_path(args.output), args.output, plan, args.overwrite)
    found = survey(parts, settings)
    check_rows(found, reader, settings, args.test_data)
    return Job(reader, parts, info, settings, found.rows, device, hashes, plan, done)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exclusive_lock(answers_path(args.output).with_suffix(".lock"), "--output"):
        answer_rows(args)


def answer_rows(args: argparse.Namespace) -> None:
    """Check everything, answer what is missing, write record, metrics and answers."""
    started = time.monotonic()
    job = check_all(args)
    reader, parts, settings, done, path = job.reader, job.parts, job.settings, job.done, answers_path(args.output)
    print(
        f"{job.rows:,} rows to answer, {len(done):,} of them answered before; loading {reader.base_model} on "
        f"{job.device}"
    )
    if len(done) < job.rows:
        with enough_memory(f"{memory_advice(job.device)}, or --batch_size below {args.batch_size}"):
            model = load_model(reader, job.device, args.dtype)
            if not done:  # earlier answers are removed only after the model is loaded
                path.unlink(missing_ok=True)
                write_json(job.plan, plan_path(path))
            answer_all(Answerer(model, reader.tokenizer, settings), parts, path, done, job.rows)
    answers = in_file_order(path, parts)
    metrics = report(answers)
    orders = {part.split: candidate_order(part.path, part.split) for part in parts}
    record = make_record(
        vars(args), job.hashes, time.monotonic() - started, job.device, model=reader.identity(), codes=job.info,
        candidate_order=orders, answered_before=len(done), metrics=metrics, answers=answers,
    )  # fmt: skip
    write_json(record, args.output)
    print_report(metrics)
    print(f"wrote {args.output} and {path}")
    print(f"next: {command('lora_training/score_answers.py', '--answers', path)}")


if __name__ == "__main__":
    run_command(main)

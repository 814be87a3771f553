"""Answers of a tuned model to every row of the test tasks, and of the validation rows that thresholds need.

    cd lora_training && python inference.py --base_model meta-llama/Llama-2-7b-hf \
        --lora_adapter lora_outputs/lora_adapters --output inference_results.json
    cd lora_training && python inference.py --base_model lora_outputs/merged          a merged model: no adapter

--decode says how link prediction is answered:
score            the likelihood of each candidate's first answer line, exact, over one cache of the prompt
predict          the likelihood of each candidate's answer to the query alone, tuned on gen_lp_data_rq.py --predict
constrained      beam search over the candidates, --beams wide
constrained_all  beam search over ALL entities; their other known answers are left out
free             greedy text, read as numbered lines
True/False tasks compare P(True) with P(False) (free: the text), all other tasks are answered by greedy text.

Answers go line by line to a file beside --output (answers.jsonl, or NAME.answers.jsonl for another NAME.json); after
an interruption the same command goes on where it stopped and ends in the same bytes, since what is computed together
does not depend on where that was. At the end --output gets the run record, the metrics of score_answers.py and all
answers.

Candidates without codes are names of unequal length: each is scored through the token that ends it, and ``tokens``
keeps the lengths, so that score_answers.py can choose between sum and per-token mean on validation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.codes import CodeTextError, parse_codes, parse_entity
from Class.instructions import Row, Source, existing_split, open_source, read_rows
from Class.prompts import FALSE, TRUE, numbered, prediction, read_query
from common.device import find_device
from common.errors import CommandParser, InputError, run_command
from common.files import exclusive_lock, read_json, sha256_file, write_json
from common.record import by_name, make_record
from lora_training.adapters import RECORD, WEIGHTS, Saved, check_base, load_adapted, read_saved
from lora_training.base_model import check_model_name, load_base, load_config, load_tokenizer
from lora_training.code_tokens import read_codes_info, refuse_other_codes
from lora_training.memory import enough_memory
from lora_training.prompts import decode_answer, encode_answer, encode_prompt
from lora_training.score_answers import Answer, is_judgement, is_ranking, print_report, read_answers, report

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from data.knowledge_graph import Answers
    from lora_training.candidate_scoring import TokenTrie

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "inference_results.json"
DECODES = ("score", "predict", "constrained", "constrained_all", "free")
DTYPES = ("auto", "bfloat16", "float16", "float32")
WINDOW = 256  # rows that are sorted by length and cut into batches together
BEST = 3  # answers that a prompt of link prediction asks for


# ---------------------------------------------------------------- what a row asks


class Listed(NamedTuple):
    """One line of a prompt's candidates."""

    name: str
    answer: str  # what link prediction answers with: its codes, or its name where there are none


def listed_candidates(row: Row) -> list[Listed]:
    """The candidates of a row as its prompt lists them. InputError where they are not those of ``candidates``."""
    _, found, rest = row["instruction"].partition("Candidates:\n")
    lines = rest.split("\n")[:-1]  # the last line says what to do
    if not found or len(lines) != len(row.get("candidates") or ()):
        raise InputError(
            f"row {row['id']} has {len(row.get('candidates') or ())} candidates, its prompt lists {len(lines)}; write "
            "it anew: python Class/gen_lp_data_rq.py"
        )
    listed = []
    for line in lines:
        name, coded, codes = line.removeprefix("<ENT>").partition("</ENT> ")
        listed.append(Listed(name, codes if coded else line))
    return listed


def candidate_lines(listed: Sequence[Listed], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the first answer line, for each candidate. Codes end themselves, a name ends with its line."""
    lines = []
    for candidate in listed:
        name = candidate.name == candidate.answer
        line = numbered([candidate.answer]) + ("\n" if name and len(listed) > 1 else "")
        lines.append(encode_answer(line, tokenizer, end=name and len(listed) == 1))
    return lines


def question_of(row: Row) -> str:
    """What the prompt of a row of link prediction asks; InputError where it is no list."""
    question = read_query(row["instruction"])
    if question is None:
        raise InputError(f"row {row['id']} lists no candidates; write it anew: python Class/gen_lp_data_rq.py")
    return question


def predicted_texts(row: Row) -> tuple[str, str]:
    """The question that ``--predict`` asks about a row, and the longest answer that a candidate is."""
    return prediction(question_of(row)), max((one.answer for one in listed_candidates(row)), key=len)


def predicted_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the question that ``--predict`` asks about a row."""
    return encode_prompt({"instruction": prediction(question_of(row))}, tokenizer)


def read_numbered(text: str, listed: Sequence[Listed]) -> list[float] | None:
    """Scores 0, -1, -2 of the candidates on the lines of ``text`` and None of the others; None if line 1 names none.

    Later lines that name no candidate, or one again, are passed over. Candidates of equal codes are named together.
    """
    scores: list[float | None] = [None] * len(listed)
    for number, line in enumerate(text.strip().split("\n")[:BEST]):
        answer = re.sub(r"^\d+\. ", "", line.strip())
        named = [i for i, candidate in enumerate(listed) if candidate.answer == answer]
        if number == 0 and not named:
            return None
        for i in named:
            scores[i] = -float(number) if scores[i] is None else scores[i]
    return scores  # type: ignore[return-value]


_WORDS = (re.compile(r"Q\d+_\d+"), re.compile(r"\d+ of \d+"))


def reads_as(row: Row, text: str) -> bool:
    """Whether ``text`` has the form of the row's output: codes, entity, one code, a count, a listed name, or words."""
    expected, text = row["output"], text.strip()
    try:
        if expected.startswith("<CODE>"):
            return parse_codes(text, *parse_codes(expected).shape) is not None
        if expected.startswith("<ENT>"):
            return parse_entity(text, *parse_entity(expected).codes.shape) is not None
    except CodeTextError:
        return False
    if row.get("candidates"):
        return text in {candidate.name for candidate in listed_candidates(row)}
    form = next((word for word in _WORDS if word.fullmatch(expected)), None)
    return bool(text) if form is None else form.fullmatch(text) is not None


# ---------------------------------------------------------------- the model


class Reader(NamedTuple):
    """The model that is to answer, checked before its weights are loaded."""

    base_model: str
    saved: Saved | None  # of the adapter or of the merged model; None: a base model as it came
    merged: bool
    tokenizer: PreTrainedTokenizerBase

    @property
    def codes(self) -> dict[str, Any]:
        """Which codes the model knows, as ``read_codes_info`` says it."""
        return self.saved.record["codes"] if self.saved else {"file": None}

    def identity(self) -> dict[str, str]:
        """What tells this model from another: hashes of the record and, for an adapter, of the weights."""
        found = {"base_model": self.base_model}
        if self.saved:
            files = [RECORD] if self.merged else [RECORD, WEIGHTS]
            found |= {name: sha256_file(self.saved.folder / name) for name in files}
        return found


def check_model(base_model: str | None, lora_adapter: Path | None) -> Reader:
    """An adapter on its base, a merged model, or a base model alone; InputError where a part is missing or foreign."""
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
            return Reader(base_model, saved, True, saved.tokenizer)
    load_config(base_model)
    return Reader(base_model, None, False, load_tokenizer(base_model))


def smaller(device: torch.device) -> str:
    """What makes a model take less memory where it answers."""
    return "give --dtype bfloat16" + ("" if device.type == "cpu" else ", --device cpu")


def load_model(reader: Reader, device: torch.device, dtype: str = "auto") -> PreTrainedModel:
    """The model in eval mode, an adapter merged into its base: unmerged, each forward would copy both matrices."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype
    model: Any
    if reader.saved and not reader.merged:
        model = load_adapted(reader.saved, reader.base_model, getattr(torch, kind)).merge_and_unload(
            safe_merge=True
        )  # refuses NaN
    else:
        model = load_base(reader.base_model, getattr(torch, kind))
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


# ---------------------------------------------------------------- all entities


@dataclass
class Everything:
    """All entities as answers: their trie, and what is known of every query."""

    source: Source
    trie: TokenTrie
    known: Answers  # train and valid: not to be found again
    test: Answers  # other right answers, left out by whoever ranks

    def __post_init__(self) -> None:
        self.entity = {name: i for i, name in enumerate(self.source.kg.entities)}
        self.relation = {name: i for i, name in enumerate(self.source.kg.relations)}


def open_codes(info: dict[str, Any], codes: Path | None, dataset: Path | None) -> Source:
    """The data set and codes that ``info`` (``read_codes_info``) was made with; InputError where others are found."""
    recorded = Path(str(info.get("record", ""))).with_suffix(".pt") if info.get("record") else None
    source = open_source(
        argparse.Namespace(
            codes=codes or (recorded if recorded and recorded.is_file() else None), dataset=dataset,
            seed=info.get("shuffle_seed", 0), no_codes=info.get("file") is None,
            shuffle_codes=bool(info.get("shuffled")), code_format=info.get("code_format", "spec"),
        )
    )  # fmt: skip
    refuse_other_codes(info, source.codes_info, "the model", "--codes")
    return source


def trie_of(texts: Sequence[str], source: Source, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> TokenTrie:
    """The trie of one text per entity. ``ends``: each text once with each of these ids behind it; [] as it is."""
    from lora_training.candidate_scoring import TokenTrie

    if not ends and source.codes is not None and all("<ENT>" not in text for text in (texts[0], texts[-1])):
        K, Q = source.num_code, source.codes.shape[2]
        ids = np.array([tokenizer.convert_tokens_to_ids([f"Q{q}_{k}" for k in range(K)]) for q in range(Q)])
        trie = TokenTrie.from_codes(source.codes, encode_answer(texts[0], tokenizer, end=False), ids)
        row_of = np.empty(len(trie.owners), dtype=np.int64)
        row_of[trie.owners] = np.arange(len(trie.owners))
        for entity in np.linspace(0, len(texts) - 1, 16).astype(int).tolist():
            if trie.sequence(int(row_of[entity])) != encode_answer(texts[entity], tokenizer, end=False):
                raise InputError("the tokenizer reads the same separators differently from one entity to the next")
        return trie
    encoded = [encode_answer(text, tokenizer, end=False) for text in texts]
    endings = [[end] for end in ends] or [[]]
    return TokenTrie.from_sequences(
        [ids + end for end in endings for ids in encoded], np.tile(np.arange(len(texts)), len(endings))
    )


def open_everything(
    info: dict[str, Any], codes: Path | None, dataset: Path | None, tokenizer: PreTrainedTokenizerBase
) -> Everything:
    """All entities of the rows' data set, for ``--decode constrained_all``."""
    source = open_codes(info, codes, dataset)
    end = "" if source.with_codes else "\n"
    trie = trie_of([numbered([text]) + end for text in source.code_texts], source, tokenizer, [])
    return Everything(source, trie, source.kg.answers("train", "valid"), source.kg.answers("test"))


# ---------------------------------------------------------------- answers


class Settings(NamedTuple):
    """How to answer."""

    decode: str = "score"
    beams: int = 20
    batch_size: int = 8
    max_new_tokens: int = 512


def make_answer(row: Row, decode: str, **found: Any) -> Answer:
    """One line of answers.jsonl: the row's own fields, and ``found``: what the model says."""
    return {
        "id": row["id"], "task_type": row["task_type"], "split": row["split"], "direction": row.get("direction"),
        "decode": decode, "candidates": row.get("candidates"), "scores": None, "tokens": None, "truth": row["truth"],
        "triple": row.get("triple") if is_judgement(row) else None, "candidate_rank": row.get("candidate_rank"),
        "text": "", "expected": row["output"],
        "parsed": True, **found,
    }  # fmt: skip


def ranked(row: Row, decode: str, listed: Sequence[Listed], scores: Sequence[float | None], **found: Any) -> Answer:
    """The answer of a row of link prediction; None are the scores of candidates that a search did not reach."""
    order = sorted(range(len(listed)), key=lambda i: np.inf if (score := scores[i]) is None else -score)
    text = numbered([listed[i].answer for i in order[:BEST]])
    return make_answer(row, decode, scores=list(scores), text=text, **found)


@dataclass
class Answerer:
    """A loaded model and how it is to answer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    everything: Everything | None = None

    def answer(self, rows: Sequence[Row]) -> list[Answer]:
        """Answers to rows of one ``kind_of``, in order; the batch is computed together."""
        kind = kind_of(rows[0], self.settings.decode)
        if kind == "rank":
            return [self._rank(row) for row in rows]
        return self._judge(rows) if kind == "judge" else self._write(rows)

    def _judge(self, rows: Sequence[Row]) -> list[Answer]:
        from lora_training.candidate_scoring import score_choices

        prompts = [encode_prompt(row, self.tokenizer) for row in rows]
        verdicts = [encode_answer(text, self.tokenizer, end=False) for text in (TRUE, FALSE)]
        found = score_choices(self.model, prompts, verdicts, int(self.tokenizer.pad_token_id)).tolist()
        return [
            make_answer(
                row, "score", candidates=[TRUE, FALSE], scores=[true, false], text=TRUE if true > false else FALSE
            )
            for row, (true, false) in zip(rows, found, strict=True)
        ]

    def _write(self, rows: Sequence[Row]) -> list[Answer]:
        from lora_training.candidate_scoring import generate_freely

        prompts = [encode_prompt(row, self.tokenizer) for row in rows]
        found = generate_freely(
            self.model, prompts, int(self.tokenizer.eos_token_id), int(self.tokenizer.pad_token_id),
            self.settings.max_new_tokens,
        )  # fmt: skip
        return [self._read(row, decode_answer(ids, self.tokenizer)) for row, ids in zip(rows, found, strict=True)]

    def _read(self, row: Row, text: str) -> Answer:
        """The answer that a free text gives."""
        if is_ranking(row):
            scores = read_numbered(text, listed_candidates(row))
            return make_answer(row, "free", scores=scores, text=text, parsed=scores is not None)
        if is_judgement(row):
            said = text.strip()
            scores = {TRUE: [0.0, -1.0], FALSE: [-1.0, 0.0]}.get(said)
            return make_answer(
                row, "free", candidates=[TRUE, FALSE], scores=scores, text=text, parsed=scores is not None
            )
        return make_answer(row, "free", text=text, parsed=reads_as(row, text))

    def _rank(self, row: Row) -> Answer:
        from lora_training.candidate_scoring import TokenTrie, common_prefix, constrained_beams, score_candidates

        decode = self.settings.decode
        if decode == "predict":
            return self._predict(row)
        prompt = encode_prompt(row, self.tokenizer)
        if decode == "constrained_all":
            return self._search_all(row, prompt)
        listed = listed_candidates(row)
        lines = candidate_lines(listed, self.tokenizer)
        shared = common_prefix(lines)
        own = [line[len(shared) :] for line in lines]
        scores: list[float | None]
        if decode == "score":
            scores = score_candidates(self.model, prompt + shared, own).tolist()
        else:
            found = constrained_beams(self.model, prompt + shared, TokenTrie.from_sequences(own), self.settings.beams)
            scores = [None] * len(listed)
            for i, score in zip(found.owners.tolist(), found.scores.tolist(), strict=True):
                scores[i] = score
        lengths = [len(line) for line in own]
        tokens = None if len(set(lengths)) == 1 else lengths
        return ranked(row, decode, listed, scores, tokens=tokens)

    def _predict(self, row: Row) -> Answer:
        """Scores through the end token: without it, a name would beat every longer one that it begins."""
        from lora_training.candidate_scoring import score_candidates

        listed = listed_candidates(row)
        answers = [encode_answer(candidate.answer, self.tokenizer) for candidate in listed]
        scores = score_candidates(self.model, predicted_prompt(row, self.tokenizer), answers)
        lengths = [len(answer) for answer in answers]
        return ranked(row, "predict", listed, scores.tolist(), tokens=None if len(set(lengths)) == 1 else lengths)

    def _search_all(self, row: Row, prompt: Sequence[int]) -> Answer:
        from lora_training.candidate_scoring import constrained_beams

        assert self.everything is not None
        all_of, kg = self.everything, self.everything.source.kg
        found = constrained_beams(self.model, prompt, all_of.trie, self.settings.beams)
        head, relation, tail = row["triple"]
        r = all_of.relation[relation]
        h, truth, r = (
            (all_of.entity[head], tail, r)
            if row["direction"] == "tail"
            else (all_of.entity[tail], head, r + kg.num_relations)
        )
        old, test = (set(tails_of(answers, h, r)) - {all_of.entity[truth]} for answers in (all_of.known, all_of.test))
        kept = [(e, score) for e, score in zip(*(part.tolist() for part in found), strict=True) if e not in old]
        texts = all_of.source.code_texts
        return make_answer(
            row, "constrained_all", candidates=[kg.entities[e] for e, _ in kept], scores=[score for _, score in kept],
            truth=[truth, *(kg.entities[e] for e, _ in kept if e in test)],
            text=numbered([texts[e] for e, _ in kept[:BEST]]),
        )  # fmt: skip


def check_names(all_of: Everything, parts: Sequence[Part], with_codes: bool) -> None:
    """InputError where a row asks about what is not in the data set whose entities are to answer."""
    for part in parts:
        for row in part.rows(with_codes, "constrained_all"):
            if not is_ranking(row):
                continue
            head, relation, tail = row["triple"]
            known = {head: all_of.entity, relation: all_of.relation, tail: all_of.entity}
            absent = [name for name, names in known.items() if name not in names]
            if absent:
                raise InputError(
                    f"{part.path}: row {row['id']} asks about {absent[0]!r}, which {all_of.source.kg.name} does not "
                    "have; give --dataset DIR, the graph that the rows were made from"
                )


def tails_of(answers: Answers, h: int, r: int) -> list[int]:
    """The known tails of one query."""
    place = int(answers.rows([h], [r])[0])
    return [] if place < 0 else answers.targets[answers.indptr[place] : answers.indptr[place + 1]].tolist()


# ---------------------------------------------------------------- rows in order


def kind_of(row: Row, decode: str) -> str:
    """``rank``: by likelihoods or a search; ``judge``: True against False; ``write``: greedy text."""
    if decode != "free" and is_ranking(row):
        return "rank"
    return "judge" if decode != "free" and is_judgement(row) else "write"


class Part(NamedTuple):
    """The rows of one file that are to be answered."""

    path: Path
    limit: int  # at most so many rows, 0: all
    needed: bool  # only rows that a threshold or a choice rests on

    def rows(self, with_codes: bool, decode: str) -> Iterator[Row]:
        """The rows, each with a list as ``truth``."""
        rows = (row for row in read_rows(self.path) if not self.needed or decides(row, with_codes, decode))
        yield from itertools.islice(rows, self.limit or None)


def decides(row: Row, with_codes: bool, decode: str) -> bool:
    """Whether a validation row is needed: for a threshold, to choose between sum and mean of unequal lengths, or to
    weigh a prediction against the list's order."""
    return is_judgement(row) or (is_ranking(row) and (decode == "predict" or (decode == "score" and not with_codes)))


def batches(rows: Iterator[Row], settings: Settings) -> Iterator[list[Row]]:
    """Rows that are computed together: of one kind and like length, whatever was answered before."""
    while window := list(itertools.islice(rows, WINDOW)):
        for kind in ("rank", "judge", "write"):
            of_kind = [row for row in window if kind_of(row, settings.decode) == kind]
            of_kind.sort(key=lambda row: len(row["instruction"]))
            size = 1 if kind == "rank" else settings.batch_size
            yield from (of_kind[i : i + size] for i in range(0, len(of_kind), size))


class Survey(NamedTuple):
    """What a first look at the rows found."""

    rows: int
    longest: list[Row]  # by characters, one per kind


def survey(parts: Sequence[Part], with_codes: bool, decode: str) -> Survey:
    """Count the rows and check each. InputError, by id, where one lacks what its answer needs."""
    count, longest, sizes, seen = 0, dict[str, Row](), dict[str, int](), set[tuple[str, str]]()
    for part in parts:
        for row in part.rows(with_codes, decode):
            count += 1
            if not isinstance(row.get("truth"), list) or not row["truth"] or "split" not in row:
                raise InputError(f"{part.path}: row {row['id']} has no truth or split; write the data anew")
            if is_ranking(row):
                listed_candidates(row)
            key = (row["split"], row["id"])
            if key in seen:
                raise InputError(f"{part.path}: {row['id']} of {row['split']} comes twice; write the data anew")
            seen.add(key)
            kind = kind_of(row, decode)
            size = sum(
                map(len, predicted_texts(row) if kind == "rank" and decode == "predict" else [row["instruction"]])
            )
            if size >= sizes.get(kind, 0):
                longest[kind], sizes[kind] = row, size
    return Survey(count, list(longest.values()))


def check_window(reader: Reader, decode: str) -> None:
    """InputError where answers are to be scored behind a prompt that the model's sliding window forgets."""
    from transformers import DynamicCache

    if decode != "free" and any(DynamicCache(config=load_config(reader.base_model)).is_sliding):
        raise InputError(
            f"{reader.base_model} has a sliding window, so candidates cannot share a prompt: give --decode free, or "
            "another model"
        )


def check_lengths(found: Survey, reader: Reader, settings: Settings) -> None:
    """InputError where the longest prompt and its answer do not fit the model; nothing is cut."""
    check_window(reader, settings.decode)
    limit = getattr(load_config(reader.base_model).get_text_config(), "max_position_embeddings", None)
    for row in found.longest:
        kind = kind_of(row, settings.decode)
        predicts = kind == "rank" and settings.decode == "predict"
        prompt = len((predicted_prompt if predicts else encode_prompt)(row, reader.tokenizer))
        said = predicted_texts(row)[1] if predicts else row["output"]
        answer = settings.max_new_tokens if kind == "write" else len(encode_answer(said, reader.tokenizer))
        if limit is not None and prompt + answer > limit:
            raise InputError(
                f"row {row['id']} has {prompt} tokens and its answer up to {answer}, the model reads {limit}: nothing "
                "is truncated; make shorter rows (--code_format compact), or lower --max_new_tokens"
            )


# ---------------------------------------------------------------- command


def answers_path(output: Path) -> Path:
    """Where the answers go line by line: answers.jsonl beside inference_results.json, else the output's own name, so
    that two runs may share a folder."""
    return output.with_name("answers.jsonl" if output.name == OUTPUT.name else f"{output.stem}.answers.jsonl")


def plan_path(path: Path) -> Path:
    """Beside answers.jsonl: what its answers rest on."""
    return path.with_name(path.name + ".plan.json")


def resume(path: Path, plan: dict[str, Any], overwrite: bool) -> set[tuple[str, str]]:
    """What answers.jsonl holds already; a torn last line is cut off. InputError where it answers something else."""
    beside = plan_path(path)
    if overwrite or not path.is_file():
        return set()
    before = read_json(beside, "plan") if beside.is_file() else {}
    before = before if isinstance(before, dict) else {}
    differing = [f"{key} {before.get(key)!r} before, {plan[key]!r} now" for key in plan if before.get(key) != plan[key]]
    if differing:
        raise InputError(f"{path} holds answers of another run ({differing[0]}); give another --output, or --overwrite")
    answers, end = read_answers(path)
    if end < path.stat().st_size:
        print(f"{path}: its last line was torn and is answered again")
        os.truncate(path, end)
    return {(answer["split"], answer["id"]) for answer in answers}


def answer_all(
    answerer: Answerer, parts: Sequence[Part], with_codes: bool, path: Path, done: set[tuple[str, str]], total: int
) -> None:
    """Append the answers that are missing to ``path``, batch by batch."""
    from tqdm import tqdm

    try:
        with open(path, "ab") as file, tqdm(total=total, desc="answers", unit="row", smoothing=0.05) as progress:
            for part in parts:
                for rows in batches(part.rows(with_codes, answerer.settings.decode), answerer.settings):
                    missing = {row["id"] for row in rows if (row["split"], row["id"]) not in done}
                    if missing:
                        lines = [
                            json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n"
                            for answer in answerer.answer(rows)
                            if answer["id"] in missing
                        ]
                        file.write("".join(lines).encode())
                        file.flush()
                    progress.update(len(rows))
    except OSError as error:  # by the write, or once more when the file is closed
        raise InputError(f"cannot write {path}: {error.strerror}; make room, then go on") from error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/inference.py", description=__doc__.split("\n")[0])
    group = parser.add_argument_group("model")
    add_model_flags(group)
    group = parser.add_argument_group("data")
    group.add_argument("--test_data", type=Path, default=HERE / "lora_data" / "test_tasks.json", help="rows to answer")
    group.add_argument(
        "--val_data", type=Path, metavar="FILE", help="for thresholds (default: the one beside the test data)"
    )
    group.add_argument("--limit", type=int, default=0, help="answer the first so many test rows alone (0: all)")
    group.add_argument("--val_limit", type=int, default=0, help="the same of the validation rows")
    group = parser.add_argument_group("answers")
    group.add_argument("--output", type=Path, default=OUTPUT, help="record, metrics, answers")
    group.add_argument("--decode", choices=DECODES, default="score", help="how link prediction is answered")
    group.add_argument("--beams", type=int, default=20, help="width of the constrained searches (1: greedy)")
    group.add_argument("--batch_size", type=int, default=8, help="True/False and free-text rows at once")
    group.add_argument("--max_new_tokens", type=int, default=512, help="longest free text")
    group.add_argument("--overwrite", action="store_true", help="start anew over the answers of another run")
    add_codes_flags(parser.add_argument_group("all entities (--decode constrained_all)"))
    args = parser.parse_args(argv)
    for name, least in (("limit", 0), ("val_limit", 0), ("beams", 1), ("batch_size", 1), ("max_new_tokens", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(args, name)}")
    if not args.output.name or args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; name a file in it, like {args.output / OUTPUT.name}")
    if args.decode != "constrained_all" and (args.codes or args.dataset):
        parser.error("--codes and --dataset are read by --decode constrained_all alone: rows bring their own")
    return args


def add_model_flags(group: Any) -> None:
    """Flags of every command that answers."""
    group.add_argument(
        "--base_model", metavar="NAME", help="hub id, folder or merged model (default: the adapter's own)"
    )
    group.add_argument("--lora_adapter", type=Path, metavar="DIR", help="by train_lora.py; none for a merged model")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")


def add_codes_flags(group: Any) -> None:
    """Flags that name the entities which all answers come from."""
    group.add_argument("--codes", type=Path, metavar="FILE.pt", help="codes file (default: the one recorded)")
    group.add_argument("--dataset", type=Path, metavar="DIR", help="graph folder (default: what the codes belong to)")


def check_data(args: argparse.Namespace, reader: Reader) -> tuple[list[Part], dict[str, Any]]:
    """The files to answer, and whose codes they hold. InputError where a file is missing or of another run."""
    if not args.test_data.is_file():
        raise InputError(f"--test_data {args.test_data} does not exist; write it: python Class/gen_fb_data_rq.py")
    if args.val_data is not None and not args.val_data.is_file():
        raise InputError(f"--val_data {args.val_data} does not exist; leave the flag out, or write the data anew")
    info = read_codes_info(args.test_data)
    if reader.saved is None and info.get("file") is not None:
        raise InputError(
            f"--base_model {reader.base_model} knows no codes, and {args.test_data} holds those of {info['file']}; "
            "give --lora_adapter DIR, or a merged model"
        )
    model = f"--lora_adapter {args.lora_adapter}" if args.lora_adapter else f"--base_model {reader.base_model}"
    if reader.saved is not None:
        refuse_other_codes(reader.codes, info, model, f"--test_data {args.test_data}")
    parts = []
    validation = args.val_data or existing_split(args.test_data.parent, "validation")
    if validation is not None:
        refuse_other_codes(
            info, read_codes_info(validation), f"--test_data {args.test_data}", f"--val_data {validation}"
        )
        parts.append(Part(validation, args.val_limit, True))
    return [*parts, Part(args.test_data, args.limit, False)], info


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exclusive_lock(answers_path(args.output).with_suffix(".lock"), "--output"):
        answer_rows(args)


def answer_rows(args: argparse.Namespace) -> None:
    """Check everything, answer what is missing, write record, metrics and answers."""
    started = time.monotonic()
    reader = check_model(args.base_model, args.lora_adapter)
    parts, info = check_data(args, reader)
    settings = Settings(args.decode, args.beams, args.batch_size, args.max_new_tokens)
    with_codes = info.get("file") is not None
    found = survey(parts, with_codes, args.decode)
    if not found.rows:
        raise InputError(f"--test_data {args.test_data} has no rows to answer")
    if args.decode == "predict" and not any(is_ranking(row) for row in found.longest):
        raise InputError(
            f"--decode predict ranks lists, and --test_data {args.test_data} has none; give the one in "
            "link_prediction/ that gen_lp_data_rq.py --predict wrote beside it"
        )
    check_lengths(found, reader, settings)
    device = find_device(args.device)
    named = by_name({"validation" if part.needed else "": part.path for part in parts})
    hashes = {name: sha256_file(file) for name, file in named.items()}
    path = answers_path(args.output)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plan = {
        **reader.identity(), **{f"{name}_sha256": value for name, value in hashes.items()}, **settings._asdict(),
        "limit": args.limit, "val_limit": args.val_limit, "device": device.type, "dtype": args.dtype,
    }  # fmt: skip
    everything = None
    if args.decode == "constrained_all":
        everything = open_everything(info, args.codes, args.dataset, reader.tokenizer)
        check_names(everything, parts, with_codes)
        plan["graph"] = everything.source.kg.input_hashes
    done = resume(path, plan, args.overwrite)
    print(
        f"{found.rows:,} rows to answer, {len(done):,} of them answered before; loading {reader.base_model} on {device}"
    )
    if len(done) < found.rows:
        with enough_memory(f"{smaller(device)}, --batch_size below {args.batch_size}, or fewer --beams"):
            answerer = Answerer(load_model(reader, device, args.dtype), reader.tokenizer, settings, everything)
            if not done:  # other answers go only now that the model stands
                path.unlink(missing_ok=True)
                write_json(plan, plan_path(path))
            answer_all(answerer, parts, with_codes, path, done, found.rows)

    by_key = {(answer["split"], answer["id"]): answer for answer in read_answers(path).answers}
    order = [(row["split"], row["id"]) for part in reversed(parts) for row in part.rows(with_codes, args.decode)]
    absent = [key for key in order if key not in by_key]
    if absent:
        raise InputError(
            f"{path} has answers to other rows, none to {absent[0][1]} of {absent[0][0]}; give --overwrite"
        )
    answers = [by_key[key] for key in order]
    metrics = report(answers)
    record = make_record(
        vars(args), hashes, time.monotonic() - started, device, model=reader.identity(), codes=info,
        answered_before=len(done), metrics=metrics, answers=answers,
    )  # fmt: skip
    write_json(record, args.output)
    print_report(metrics)
    print(f"wrote {args.output} and {path}")
    print(f"next: python score_answers.py --answers {path}")


if __name__ == "__main__":
    run_command(main)

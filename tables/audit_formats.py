"""Readers of published results on link prediction and triple classification, into one structure for tables/audit.py.

Formats (docs/AUDIT.md shows an example of each):

ours      answers.jsonl of lora_training/inference.py; --lists: its rows (test_tasks.json), needed if the ids of the
          answers are not those of Class/gen_lp_data_rq.py
dift      prediction.json or test.json; --lists: test.json. Entities by id, the answer by name
gsquant   predictions.jsonl; --lists: test.jsonl, required. Candidates and the answer by name
ssqr      JSON rows with a prompt, answered by the codes of three entities in ``predict``; --lists: the rows alone
kopa      triples with True or False; ``predict`` in the same rows or in a file of its own (--lists: the triples)

Where a format gives names only, a name of several entities is read as the truth if the file says so, else as another
test answer of (h, r), else as the first entity of this name that is not in the list already.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError, content_of
from common.files import parse_json, read_text
from data.knowledge_graph import KnowledgeGraph, with_inverse
from lora_training.score_answers import SEARCHED, margin, per_token, rank_of, ranking_metrics, read_answers

JsonRow = dict[str, Any]
Query = tuple[int, int, int]  # h, r, t; the query is (h, r, ?), r + R for queries for the head
Pair = tuple[str, JsonRow, JsonRow | None]  # place in the file, row of the lists, row of the answers if there is one

NO_ENTITY = -1
CODES = re.compile(r"\[CODE\d+\]")
SSQR_QUERY = re.compile(r"The query triplet is \((.*), \?\)")
INVERSE = "inverse relation of "
NAME_FILES = ("entity2text.txt", "FB15k_mid2name.txt")  # other names than the labels; read where present


def is_true(value: Any) -> bool:
    """The truth of a flag that some writers store as the text "False"."""
    return value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)


@dataclass
class Row:
    """One query of link prediction with its list and its answer. Entities are ids of the graph."""

    place: str  # file and row
    query: Query | None  # None: no query of the test split fits
    candidates: list[int]  # in the order of the prompt; NO_ENTITY where the graph has no such entity
    shown: list[str]  # the same candidates as the file gives them
    ranked: list[int]  # the candidates in the candidate ranker's order
    rank: float | None  # filtered rank of the truth by the candidate ranker
    answered: bool = True
    answer: str = ""
    groups: list[list[int]] = field(default_factory=list)  # answered entities, best first; a group is one tie
    unknown: list[str] = field(default_factory=list)  # parts of the answer that name no entity
    text_hit: bool = False  # the project counts a hit because two texts agree: names, or codes
    own: float = math.inf  # rank of the truth under the rule of the project

    @property
    def scores_list(self) -> bool:
        """Whether the answer ranks the whole list, so that other right answers in it can be filtered."""
        return set(self.candidates) <= {entity for group in self.groups for entity in group}


@dataclass
class Triple:
    """One triple of triple classification."""

    place: str
    key: tuple[Any, ...]  # identifies the triple within the file
    ids: Query | None  # h, r, t in the graph, if they are known
    label: bool
    margin: float | None  # log P(True) - log P(False); NaN if the answer cannot be read; None for texts
    predicted: bool | None  # at threshold 0; None if the answer is neither True nor False
    own: bool  # what the project takes it for
    split: str = "test"


class Contents(NamedTuple):
    """What a file of answers contains."""

    format: str
    rows: list[Row]
    triples: list[Triple]


def name_key(name: str) -> str:
    """A name without case, punctuation and repeated spaces."""
    return " ".join(re.sub(r"[^a-z0-9\s]", "", name.lower()).split())


class Lookup:
    """Entities and relations of a graph by the names that files use."""

    def __init__(self, kg: KnowledgeGraph, folder: Path) -> None:
        self.kg = kg
        self.entity = {name: i for i, name in enumerate(kg.entities)}
        self.relation = {name: i for i, name in enumerate(kg.relations)}
        self.names: dict[str, dict[int, None]] = defaultdict(dict)  # name -> its entities, in order
        self.keys: dict[str, dict[int, None]] = defaultdict(dict)
        for i, label in enumerate(kg.labels):
            for name in dict.fromkeys([label, label.replace("_", " ")]):
                self.learn(name, i)
        for path in [folder / file for file in NAME_FILES if (folder / file).is_file()]:
            for line in read_text(path, "names").splitlines():
                raw, _, name = line.partition("\t")
                if raw in self.entity and name.strip():
                    self.learn(name.replace("_", " ").strip(), self.entity[raw])
        self.relation_texts: dict[str, list[int]] = defaultdict(list)
        for i, (raw, label) in enumerate(zip(kg.relations, kg.relation_labels, strict=True)):
            for text in {raw, raw.replace("_", " ").strip(), label}:
                self.relation_texts[text].append(i)
        self.test: dict[tuple[int, int], list[int]] = defaultdict(list)
        for h, r, t in with_inverse(kg.test, kg.num_relations).tolist():
            self.test[h, r].append(t)

    def learn(self, name: str, entity: int) -> None:
        """``name`` is a name of ``entity``."""
        self.names[name][entity] = None
        self.keys[name_key(name)][entity] = None

    def entities_named(self, name: str) -> list[int]:
        """All entities with this name; if there are none, those with this name in other case or punctuation."""
        return list(self.names.get(name) or (self.keys.get(name_key(name)) if name_key(name) else None) or ())

    def query(self, triplet: Any, inverse: bool, place: str) -> Query:
        """(known entity, relation, answer) by raw names. InputError if the graph has no such name."""
        if not (isinstance(triplet, list) and len(triplet) == 3 and all(isinstance(name, str) for name in triplet)):
            raise InputError(f"{place}: triplet is {str(triplet)[:80]}, expected [known entity, relation, answer]")
        h, r, t = triplet
        for name, known in ((h, self.entity), (r, self.relation), (t, self.entity)):
            if name not in known:
                raise InputError(f"{place}: {name!r} is not in {self.kg.name}; give the --dataset of these answers")
        return self.entity[h], self.relation[r] + inverse * self.kg.num_relations, self.entity[t]

    def test_query(
        self, heads: Iterable[int], relations: Iterable[int], accept: Callable[[int], bool], used: Counter[Query]
    ) -> Query | None:
        """A test query that fits, the least used one first; None if there is none."""
        fits = [(h, r, t) for h in heads for r in relations for t in self.test.get((h, r), ()) if accept(t)]
        found = min(fits, key=lambda query: used[query], default=None)
        if found is not None:
            used[found] += 1
        return found


# ---------------------------------------------------------------- files


def load_rows(path: Path) -> list[JsonRow]:
    """Rows of a JSON list, of one JSON object per line, or of an object with the list ``prediction``."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        rows = parse_json(text)
    except ValueError as error:
        if text.lstrip()[:1] != "{":
            raise InputError(f"{path} is no JSON ({str(error).splitlines()[0]}); formats: docs/AUDIT.md") from error
        rows = list(_json_lines(path, text))
    if isinstance(rows, dict):
        rows = rows.get("prediction", [rows])
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} contains no list of JSON objects; formats: docs/AUDIT.md")
    return rows


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: expected one JSON object per line ({error})") from error


def detect_format(path: Path) -> str | None:
    """The format by the fields of the first row; None if no format has them."""
    row: JsonRow = {}
    if path.suffix == ".jsonl" and path.is_file():  # its last line may be incomplete
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline()
        with suppress(ValueError):
            row = parse_json(first)
    row = row if isinstance(row, dict) and row else load_rows(path)[0]
    keys = row.keys()
    if {"task_type", "truth", "decode"} <= keys:
        return "ours"
    if "triplet" in keys:
        return "dift"
    if "metadata" in keys or keys == {"prompt", "output"}:
        return "gsquant"
    if "embedding_ids" in keys or keys == {"answer", "predict"} or row.get("completion") in ("True", "False"):
        return "kopa"
    return "ssqr" if SSQR_QUERY.search(prompt_of(row)) else None


def join(answers: Path, lists: Path | None, key: Callable[[JsonRow], Any] | None) -> list[Pair]:
    """Rows of the lists with their answers: by ``key``, rows with equal keys in order; by position if it is None."""
    given = load_rows(answers)
    if lists is None:
        return [(f"{answers.name} row {i}", row, row) for i, row in enumerate(given, 1)]
    rows = load_rows(lists)
    if key is None:
        if len(rows) != len(given):
            raise InputError(f"--answers {answers} has {len(given)} rows, expected {len(rows)} as in --lists {lists}")
        return [
            (f"{lists.name} row {i}", row, response)
            for i, (row, response) in enumerate(zip(rows, given, strict=True), 1)
        ]
    waiting: dict[Any, deque[JsonRow]] = defaultdict(deque)
    for response in given:
        waiting[key(response)].append(response)
    pairs: list[Pair] = []
    for i, row in enumerate(rows, 1):
        found = waiting[key(row)]
        pairs.append((f"{lists.name} row {i}", row, found.popleft() if found else None))
    left = next((response for queue in waiting.values() for response in queue), None)
    if left is not None:
        raise InputError(f"--answers {answers}: a row is not in --lists {lists}: {str(left)[:120]}")
    return pairs


def prompt_of(row: JsonRow) -> str:
    """The prompt, in the fields of either convention."""
    return str(row.get("prompt") or f"{row.get('instruction') or ''}{row.get('input') or ''}").strip()


def texts(row: JsonRow, name: str, place: str) -> list[str]:
    """A field that is a list of strings."""
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{place}: {name} is {str(value)[:60]}, expected a list of names")
    return value


def given_rank(row: JsonRow, place: str) -> float | None:
    """The candidate ranker's rank of the truth, if the row has it."""
    rank = row.get("rank")
    if rank is not None and (type(rank) not in (int, float) or not 1 <= rank < math.inf):
        raise InputError(f"{place}: rank is {str(rank)[:40]}, expected a number of at least 1")
    return None if rank is None else float(rank)


# ---------------------------------------------------------------- DIFT and GS-Quant


def read_dift(answers: Path, lists: Path | None, lookup: Lookup) -> Contents:
    """Entities by raw name in ``topk_ents``, names in ``topk_names``, the answer ``pred`` by name."""
    pairs = join(answers, lists, lambda row: (str(row.get("triplet")), is_true(row.get("inverse"))))
    rows, names = [], []
    for place, given, response in pairs:
        query = lookup.query(given.get("triplet"), is_true(given.get("inverse")), place)
        field_name = "topk_ents" if "topk_ents" in given else "rank_entities"
        raw, shown = texts(given, field_name, place), texts(given, "topk_names", place)
        if len(raw) != len(shown):
            raise InputError(f"{place}: {len(raw)} {field_name} and {len(shown)} topk_names, expected as many")
        ranked = [lookup.entity.get(name, NO_ENTITY) for name in raw]
        truth_name = str(given.get("target") or given.get("output") or lookup.kg.labels[query[2]])
        for name, entity in [*zip(shown, ranked, strict=True), (truth_name, query[2])]:
            if entity != NO_ENTITY:
                lookup.learn(name, entity)
        order = _prompt_order(given, shown)
        row = Row(place, query, [ranked[i] for i in order], [raw[i] for i in order], ranked, given_rank(given, place))
        row.answered = response is not None and "pred" in response
        row.answer = str((response or {}).get("pred") or "").strip()
        rows.append(row)
        names.append((shown, truth_name))
    for row, (shown, truth_name) in zip(rows, names, strict=True):  # after all names are learned
        _answer_by_name(row, shown, truth_name, lookup, lambda name: name)
    return Contents("dift", rows, [])


def _prompt_order(row: JsonRow, shown: Sequence[str]) -> list[int]:
    """Places of the names in the order of the prompt (``choices``); the given order if it is not a reordering."""
    choices = row.get("choices")
    if not isinstance(choices, list) or choices == shown or Counter(map(str, choices)) != Counter(shown):
        return list(range(len(shown)))
    places: dict[str, deque[int]] = defaultdict(deque)
    for place, name in enumerate(shown):
        places[name].append(place)
    return [places[name].popleft() for name in choices]


def read_gsquant(answers: Path, lists: Path | None, lookup: Lookup) -> Contents:
    """The query in ``metadata``, candidates by name in ``topk_names``; the answer is the first line of ``output``."""
    if lists is None and "metadata" not in load_rows(answers)[0]:
        raise InputError(f"--answers {answers} has no queries; add --lists test.jsonl, the file that was answered")
    rows = []
    for place, given, response in join(answers, lists, prompt_of):
        data = given.get("metadata")
        if not isinstance(data, dict):
            raise InputError(f"{place}: there is no metadata; give --lists test.jsonl of the same run")
        query = lookup.query(data.get("triplet"), is_true(data.get("inverse")), place)
        for part, file in ((given, lists or answers), (response or {}, answers)):
            if not isinstance(part.get("output", ""), str):
                raise InputError(f"{place}: output in {file.name} is {str(part['output'])[:40]}, expected a name")
        shown, truth_name = texts(given, "topk_names", place), given.get("output") or lookup.kg.labels[query[2]]
        lookup.learn(truth_name, query[2])
        rank = given_rank(given, place)
        same = [i for i, name in enumerate(shown) if name_key(name) == name_key(truth_name)]
        listed = rank is None or rank <= len(shown)  # else a candidate with the truth's name is another entity
        truth_at = [int(rank) - 1] if rank is not None and rank - 1 in same else same[:listed]
        ranked = distinct_entities(shown, query, truth_at, lookup)
        row = Row(place, query, ranked, shown, ranked, rank)
        lines = [line.strip() for line in str((response or {}).get("output") or "").splitlines() if line.strip()]
        row.answered = response is not None and "output" in response and response is not given  # there it is the truth
        row.answer = lines[0] if row.answered and lines else ""
        _answer_by_name(row, shown, truth_name, lookup, name_key)
        rows.append(row)
    return Contents("gsquant", rows, [])


def distinct_entities(names: Sequence[str], query: Query | None, truth_at: Sequence[int], lookup: Lookup) -> list[int]:
    """An entity for each candidate that is given by name: the truth at the places ``truth_at``, else an entity of this
    name that is not the truth and not in the list already, a test answer of (h, r) first; NO_ENTITY if none has it."""
    truth = NO_ENTITY if query is None else query[2]
    answers = () if query is None else lookup.test.get(query[:2], ())
    found: list[int] = []
    for place, name in enumerate(names):
        entities = lookup.entities_named(name)
        if place in truth_at and truth in entities:
            found.append(truth)
            continue
        others = [entity for entity in entities if entity != truth]
        others.sort(key=lambda entity: (entity in found, entity not in answers))
        found.append(others[0] if others else NO_ENTITY)
    return found


def _answer_by_name(
    row: Row, shown: Sequence[str], truth_name: str, lookup: Lookup, compared: Callable[[str], str]
) -> None:
    """Fill in an answer that is one name. ``shown``: names of ``row.ranked``; ``compared``: names as the project
    compares them. Its rule: 1 if the names agree, else the ranker's rank, plus 1 if the answer comes from behind."""
    name, base = row.answer, row.rank if row.rank is not None else math.inf
    if row.rank is None and row.query and row.query[2] in row.ranked:
        base = row.ranked.index(row.query[2]) + 1.0
    row.own = base + 1
    if name:
        listed = [compared(other) for other in shown]
        at = listed.index(compared(name)) if compared(name) in listed else math.inf
        row.own = 1.0 if compared(name) == compared(truth_name) else base + (at >= base)
        row.text_hit = row.own == 1 and compared(name) == compared(truth_name)
        for key in (str, name_key):
            pairs = zip(shown, row.ranked, strict=True)
            entities = [entity for other, entity in pairs if entity != NO_ENTITY and key(other) == key(name) != ""]
            if entities:
                break
        entities = entities or lookup.entities_named(name)
        row.groups = [entities] if entities else []
        row.unknown = [] if entities else [name]


# ---------------------------------------------------------------- SSQR


def codes_of(text: str) -> str:
    """The codes in a text, one space between two."""
    return " ".join(CODES.findall(text))


def read_ssqr(answers: Path, lists: Path | None, lookup: Lookup) -> Contents:
    """Query and candidates from the prompt, by name; truth (``answer``, else the first line of the output) and answer
    (``predict``, three lines) by codes. Which entity a code belongs to is collected from all prompts of the file."""
    parsed = []
    owners: dict[str, dict[str, None]] = defaultdict(dict)  # codes -> names
    for place, given, response in join(answers, lists, prompt_of):
        prompt = prompt_of(given)
        query = SSQR_QUERY.search(prompt)
        if query is None:
            raise InputError(f"{place}: the prompt has no 'The query triplet is (head, relation, ?)'")
        body = prompt[query.end() :].split("as follows:", 1)[-1]
        lines = [line for line in body.splitlines() if CODES.search(line)]
        listed = [(line[: CODES.search(line).start()].rstrip(" ,"), codes_of(line)) for line in lines]  # type: ignore[union-attr]
        for name, codes in listed:
            owners[codes][name] = None
        output = str(given.get("completion") or given.get("output") or "")
        truth = codes_of(str(given.get("answer") or output.partition("\n")[0]))
        answer = None if response is None else response.get("predict")
        parsed.append((place, query[1], listed, truth, answer))
    used: Counter[Query] = Counter()
    rows = [_ssqr_row(*fields, owners=owners, lookup=lookup, used=used) for fields in parsed]
    return Contents("ssqr", rows, [])


def _ssqr_row(
    place: str, query_text: str, listed: list[tuple[str, str]], truth: str, answer: str | None,
    owners: dict[str, dict[str, None]], lookup: Lookup, used: Counter[Query],
) -> Row:  # fmt: skip
    names = [name for name, _ in listed]
    truths = {entity for name in owners.get(truth, ()) for entity in lookup.entities_named(name)}
    in_list = {entity for name in names for entity in lookup.entities_named(name)}
    query = None
    for cut in [match.start() for match in re.finditer(", ", query_text)]:  # names may contain ", "
        head, relation = query_text[:cut], query_text[cut + 2 :]
        shift = lookup.kg.num_relations if relation.startswith(INVERSE) else 0
        relations = [r + shift for r in lookup.relation_texts.get(relation.removeprefix(INVERSE), ())]
        fits = (lambda t: t in truths) if truths else (lambda t: t not in in_list)
        query = query or lookup.test_query(lookup.entities_named(head), relations, fits, used)
    ranked = distinct_entities(names, query, [i for i, (_, codes) in enumerate(listed) if codes == truth], lookup)
    row = Row(place, query, ranked, names, ranked, None, answer is not None, str(answer or "").strip())
    lines = [line.strip() for line in row.answer.splitlines() if line.strip()]
    response = [codes_of(line) for line in lines]
    for line, codes in zip(lines, response, strict=True):
        entities = [e for e, (_, own) in zip(ranked, listed, strict=True) if own == codes != "" and e != NO_ENTITY]
        entities = entities or [e for name in owners.get(codes, ()) for e in lookup.entities_named(name)]
        row.groups += [entities] if entities else []
        row.unknown += [] if entities else [line]
    for order in (response, [codes for _, codes in listed]):
        if truth and truth in order:
            row.own = order.index(truth) + 1.0
            break
    row.text_hit = bool(truth) and truth in response[:1]
    return row


# ---------------------------------------------------------------- triple classification of KoPA


def read_kopa(answers: Path, lists: Path | None, lookup: Lookup) -> Contents:
    """The label in ``output``, ``answer`` or ``completion``, the answer in ``predict``: the first True or False in it.
    The project's rule: True if the text contains "True", else False."""
    triples = []
    for place, given, response in join(answers, lists, None):
        label = next((str(given[name]) for name in ("output", "answer", "completion") if name in given), "")
        text = str((response or {}).get("predict") or "")
        if label.strip() not in ("True", "False"):
            raise InputError(f"{place}: the label is {label[:40]!r}, expected True or False in output or answer")
        ids, shown = given.get("embedding_ids"), str(given.get("input") or given.get("prompt") or "")
        key = tuple(ids) if isinstance(ids, list) else (shown or place,)
        words = re.findall("true|false", text.lower())
        triples.append(
            Triple(place, tuple(map(str, key)), _triple_of_text(shown, lookup), label.strip() == "True", None,
                   words[0] == "true" if words else None, "True" in text)
        )  # fmt: skip
    return Contents("kopa", [], triples)


def _triple_of_text(text: str, lookup: Lookup) -> Query | None:
    """The triple of ``( head, relation, tail )``; None unless exactly one reading is a triple of names of the graph."""
    match = re.search(r"\((.*)\)", text, re.DOTALL)
    parts = match[1].strip().split(", ") if match else []
    found = set()
    for i in range(1, len(parts) - 1):
        for j in range(i + 1, len(parts)):
            head, relation, tail = ", ".join(parts[:i]), ", ".join(parts[i:j]), ", ".join(parts[j:])
            for r in lookup.relation_texts.get(relation, ()):
                found |= {(h, r, t) for h in lookup.entities_named(head) for t in lookup.entities_named(tail)}
    return found.pop() if len(found) == 1 else None


# ---------------------------------------------------------------- ours


def read_ours(answers: Path, lists: Path | None, lookup: Lookup) -> Contents:
    """answers.jsonl of inference.py. Names of unequal length are ranked by sum or mean, whichever is better on
    validation, as score_answers.py does."""
    found = read_answers(answers).answers
    links = [answer for answer in found if answer["task_type"] == "link_prediction"]
    triples = [answer for answer in found if answer["task_type"] == "triple_classification"]
    rows = {str(row.get("id")): row for row in load_rows(lists)} if lists else {}
    validation = [answer for answer in links if answer["split"] == "validation"]
    if validation and any(answer["tokens"] for answer in links):
        by_sum, by_mean = (
            ranking_metrics([rank_of(answer) for answer in way])["mrr"]
            for way in (validation, [per_token(answer) for answer in validation])
        )
        links = [per_token(answer) for answer in links] if by_mean > by_sum else links
    test = [answer for answer in links if answer["split"] == "test"]
    both = with_inverse(lookup.kg.test, lookup.kg.num_relations).reshape(2, -1, 3)
    queries = both.swapaxes(0, 1).reshape(-1, 3).tolist()  # the ids count both queries of each triple in turn
    return Contents(
        "ours",
        [_our_row(answer, rows.get(str(answer["id"]), answer), answers, queries, lookup) for answer in test],
        [_our_triple(answer, answers, lookup) for answer in triples],
    )


def _our_row(answer: JsonRow, row: JsonRow, path: Path, queries: list[list[int]], lookup: Lookup) -> Row:
    place = f"{path.name} {answer['id']}"
    inverse, truth = answer["direction"] == "head", answer["truth"][0]
    if row.get("triple"):
        query = lookup.query(list(row["triple"])[:: -1 if inverse else 1], inverse, place)
    else:
        number = str(answer["id"]).rsplit("-", 1)[-1]
        at = int(number) if number.isascii() and number.isdigit() and int(number) < len(queries) else -1
        query = (queries[at][0], queries[at][1], queries[at][2])
        if at < 0 or lookup.kg.entities[query[2]] != truth or (query[1] >= lookup.kg.num_relations) != inverse:
            raise InputError(f"{place} is not that query of {lookup.kg.name}; give --lists FILE, the rows with triples")
    ids = [lookup.entity.get(name, NO_ENTITY) for name in answer["candidates"]]
    searched = answer["decode"] == SEARCHED
    listed = [] if searched else ids
    found = Row(place, query, listed, [] if searched else answer["candidates"], listed, answer["candidate_rank"])
    found.rank = None if searched else found.rank
    found.answer, found.own = answer["text"], rank_of(answer)
    if not answer["parsed"]:
        found.unknown = [answer["text"]] if answer["text"] else []
        return found
    by_score: dict[float, list[int]] = defaultdict(list)
    for entity, score in zip(ids, answer["scores"], strict=True):
        if score is not None:
            by_score[score].append(entity)
    found.groups = [by_score[score] for score in sorted(by_score, reverse=True)]
    found.groups += [[e] for e, score in zip(ids, answer["scores"], strict=True) if score is None]
    return found


def _our_triple(answer: JsonRow, path: Path, lookup: Lookup) -> Triple:
    names, value = answer.get("triple") or [], margin(answer)
    known = len(names) == 3 and {names[0], names[2]} <= lookup.entity.keys() and names[1] in lookup.relation
    ids = (lookup.entity[names[0]], lookup.relation[names[1]], lookup.entity[names[2]]) if known else None
    label, predicted = answer["truth"] == ["True"], None if math.isnan(value) else value > 0
    return Triple(
        f"{path.name} {answer['id']}", tuple(names or [answer["id"]]), ids, label,
        None if answer["decode"] == "free" else value, predicted,
        not label if predicted is None else predicted, answer["split"],
    )  # fmt: skip


READERS = {"ours": read_ours, "dift": read_dift, "ssqr": read_ssqr, "kopa": read_kopa, "gsquant": read_gsquant}


def read_contents(answers: Path, lists: Path | None, format: str, kg: KnowledgeGraph, folder: Path) -> Contents:
    """Read a file in one of the formats ("auto": by its fields). InputError if it does not fit."""
    if format == "auto":
        found = detect_format(answers) or (detect_format(lists) if lists else None)
        if found is None:
            fields = ", ".join(sorted(load_rows(answers)[0]))[:120]
            raise InputError(f"--answers {answers}: no format has the fields {fields} of row 1; see docs/AUDIT.md")
        format = found
    with content_of(answers, f"file of answers in the format {format!r}", "see docs/AUDIT.md"):
        return READERS[format](answers, lists, Lookup(kg, folder))

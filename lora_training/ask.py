"""Ask a tuned model one question, or one after another: ranked answers with their log-likelihoods.

    cd lora_training && python ask.py --head "Ada Ashley" --relation mother              of lora_outputs/lora_adapters
    cd lora_training && python ask.py --base_model lora_outputs/merged --question "Who is the mother of Ada Ashley?"
    cd lora_training && python ask.py                                                    interactive

A relation may be asked backwards: --relation "inverse of mother". With --candidates (files of run_rq.py
--export_candidates) a query that has a list there is asked as in link prediction, and its candidates are scored. All
else is answered from ALL entities, by a beam search over their names (and codes): the first --beams. The prompts are
those of the instruction data: knowledge reasoning for --head and --relation, question answering for --question, where
an entity's name gets its codes. A model answers well what it was tuned on: one by gen_lp_data_rq.py --predict is asked
with --predict.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class import prompts
from Class.candidates import Candidates, read_candidates
from Class.instructions import Source
from common.device import find_device
from common.errors import CommandParser, InputError, run_command
from data.knowledge_graph import find_name, show_names
from lora_training.adapters import ADAPTER
from lora_training.inference import (
    Listed,
    Reader,
    add_codes_flags,
    add_model_flags,
    candidate_lines,
    check_model,
    check_window,
    load_model,
    open_codes,
    smaller,
    tails_of,
    trie_of,
)
from lora_training.memory import enough_memory
from lora_training.prompts import encode_answer, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_training.candidate_scoring import TokenTrie

INVERSE = prompts.relation_text("", "head")  # what stands before the label of an inverse relation
LISTED = 20  # candidates that a prompt lists


# ---------------------------------------------------------------- names


class Query(NamedTuple):
    """(h, r, ?), r + R for an inverse relation."""

    head: int
    relation: int


def find_query(head: str, relation: str, source: Source) -> Query:
    """The query of two names; InputError where one is unknown or ambiguous."""
    kg = source.kg
    h = find_name(head, kg.entities, [source.names.names, kg.labels], "entity")
    backwards = relation.startswith(INVERSE)
    r = find_name(relation.removeprefix(INVERSE), kg.relations, [source.relations, kg.relation_labels], "relation")
    return Query(h, r + kg.num_relations * backwards)


def mark_entity(text: str, source: Source) -> tuple[str, int | None]:
    """``text`` with the longest entity name in it replaced by name and codes, and that entity; None without any.

    InputError lists the matches where several entities bear the name.
    """
    places: dict[tuple[int, int], set[int]] = {}
    for names in (source.names.names, source.kg.labels):
        for e, name in enumerate(names):
            if name and name in text:
                found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)
                if found:
                    places.setdefault(found.span(), set()).add(e)
    if not places:
        return text, None
    start, end = max(places, key=lambda span: (span[1] - span[0], -span[0]))
    entities = sorted(places[start, end])
    if len(entities) > 1:
        shown = show_names(entities, source.names.names, source.kg.entities)
        raise InputError(f"entity {text[start:end]!r} is ambiguous, {len(entities)} match: {shown}; give one in full")
    return text[:start] + source.entity_texts[entities[0]] + text[end:], entities[0]


# ---------------------------------------------------------------- answers


class Found(NamedTuple):
    """One answer."""

    entity: int
    score: float  # log P of its text
    known: str  # the split that holds it, "" where none does


@dataclass
class Asker:
    """A loaded model, the entities that it may answer with, and candidate lists where there are some."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    candidates: Candidates | None = None
    beams: int = 20
    predicts: bool = False  # ask as tail_prediction's rows do
    tries: dict[str, TokenTrie] = field(default_factory=dict)

    def query(self, query: Query) -> tuple[str, list[Found]]:
        """How (h, r, ?) was asked, and its answers, best first."""
        listed = self._list_of(query)
        if listed is not None:
            return f"{len(listed)} candidates scored", self._known(query, self._score(query, listed))
        source, R = self.source, self.source.kg.num_relations
        h, relation, coded = query.head, source.relations[query.relation % R], source.with_codes
        texts = source.entity_texts
        if self.predicts:
            prompt, texts = self._predicted(query), source.code_texts
        elif query.relation < R:
            prompt = prompts.predict_tail(source.shown[h], relation, source.entity_texts[h], coded)
        else:
            prompt = prompts.complete_head(relation, source.shown[h], source.entity_texts[h], coded)
        end = int(self.tokenizer.eos_token_id)
        found = self._search(prompt, "entity", texts, [end])
        return f"all {source.kg.num_entities:,} entities searched, {self.beams} beams", self._known(query, found)

    def question(self, text: str) -> tuple[str, list[Found]]:
        """How a question in words was asked, and the entities that its answer begins with, best first."""
        marked, entity = mark_entity(text, self.source)
        newline = encode_answer("\n", self.tokenizer, end=False)[-1]
        # a name ends the answer, or another line follows
        found = self._search(
            prompts.asked(marked), "name", self.source.shown, [int(self.tokenizer.eos_token_id), newline]
        )
        about = "no entity recognised" if entity is None else f"about {self.source.names.names[entity]}"
        how = f"{about}; all {self.source.kg.num_entities:,} entities searched, {self.beams} beams"
        return how, [Found(e, score, "") for e, score in found]

    def _list_of(self, query: Query) -> list[int] | None:
        """The candidates of a query, best first; None where there is no list of it."""
        if self.candidates is None:
            return None
        rows = np.flatnonzero((self.candidates.queries == np.array(query)).all(axis=1))
        if not len(rows):
            return None
        ids = self.candidates.ids[rows[0]]
        return ids[ids >= 0][:LISTED].tolist() or None

    def _listing(self, query: Query, listed: Sequence[int]) -> str:
        """The prompt of link prediction."""
        source, R = self.source, self.source.kg.num_relations
        relation = prompts.relation_text(source.relations[query.relation % R], "tail" if query.relation < R else "head")
        return prompts.link_prediction(
            source.shown[query.head], relation, source.entity_texts[query.head],
            [source.entity_texts[e] for e in listed], source.with_codes,
        )  # fmt: skip

    def _predicted(self, query: Query) -> str:
        """The prompt of tail_prediction."""
        question = prompts.read_query(self._listing(query, []))
        assert question is not None
        return prompts.prediction(question)

    def _score(self, query: Query, listed: list[int]) -> list[tuple[int, float]]:
        from lora_training.candidate_scoring import score_candidates

        source = self.source
        if self.predicts:
            prompt = self._predicted(query)
            lines = [encode_answer(source.code_texts[e], self.tokenizer) for e in listed]
        else:
            prompt = self._listing(query, listed)
            lines = candidate_lines([Listed(source.shown[e], source.code_texts[e]) for e in listed], self.tokenizer)
        scores = score_candidates(self.model, encode_prompt({"instruction": prompt}, self.tokenizer), lines).tolist()
        return sorted(zip(listed, scores, strict=True), key=lambda pair: -pair[1])

    def _search(self, prompt: str, kind: str, texts: Sequence[str], ends: list[int]) -> list[tuple[int, float]]:
        from lora_training.candidate_scoring import constrained_beams

        if kind not in self.tries:
            self.tries[kind] = trie_of(texts, self.source, self.tokenizer, ends)
        ids = encode_prompt({"instruction": prompt}, self.tokenizer)
        found = constrained_beams(self.model, ids, self.tries[kind], self.beams)
        return list(zip(found.owners.tolist(), found.scores.tolist(), strict=True))

    def _known(self, query: Query, found: Iterable[tuple[int, float]]) -> list[Found]:
        kg = self.source.kg
        split_of: dict[int, str] = {}
        for split in ("test", "valid", "train"):
            split_of |= dict.fromkeys(tails_of(kg.answers(split), *query), split)
        return [Found(e, score, split_of.get(e, "")) for e, score in found]


def print_answers(source: Source, title: str, how: str, found: Sequence[Found], top: int) -> None:
    """Place, log-likelihood, share among what was found, name and whether the data set holds it."""
    print(f"{title}  ({how})")
    scores = np.array([answer.score for answer in found])
    shares = np.exp(scores - np.logaddexp.reduce(scores))
    for place, (answer, share) in enumerate(zip(found[:top], shares.tolist(), strict=False), 1):
        mark = f"  known ({answer.known})" if answer.known else ""
        name = f"{source.names.names[answer.entity]} [{source.kg.entities[answer.entity]}]"
        print(f"{place:3d}. {answer.score:9.3f} {share:6.1%}  {name}{mark}")


# ---------------------------------------------------------------- command


def ask(asker: Asker, top: int, head: str | None, relation: str | None, question: str | None) -> None:
    """Answer one query or question. InputError where a name is unknown or ambiguous."""
    source = asker.source
    if question is not None and asker.predicts:
        raise InputError("--predict asks HEAD | RELATION: leave it out for a question in words")
    if question is not None:
        print_answers(source, question, *asker.question(question), top)
        return
    assert head is not None and relation is not None
    query = find_query(head, relation, source)
    R = source.kg.num_relations
    words = prompts.relation_text(source.relations[query.relation % R], "tail" if query.relation < R else "head")
    print_answers(source, f"({source.names.names[query.head]} | {words} | ?)", *asker.query(query), top)


def interact(asker: Asker, top: int, read: Callable[[str], str] = input) -> None:
    """Lines ``HEAD | RELATION`` or questions, until an empty one; what cannot be asked is said and passed over."""
    print('ask "HEAD | RELATION", or a question in words; an empty line ends')
    while True:
        try:
            line = read("? ").strip()
        except EOFError:
            return
        if not line:
            return
        head, bar, relation = (part.strip() for part in line.partition("|"))
        try:
            ask(asker, top, *((head, relation, None) if bar else (None, None, line)))
        except InputError as error:
            print(f"error: {error}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/ask.py", description=__doc__.split("\n")[0])
    add_model_flags(parser.add_argument_group("model"))
    group = parser.add_argument_group("question (none: interactive)")
    group.add_argument("--head", metavar="NAME", help="entity, by name or raw name")
    group.add_argument("--relation", metavar="NAME", help=f'relation, by name or raw name; "{INVERSE}NAME" backwards')
    group.add_argument("--question", metavar="TEXT", help="a question in words")
    group.add_argument("--predict", action="store_true", help="ask as gen_lp_data_rq.py --predict tunes: an entity's "
                       "codes are the answer (its name where it has none)")  # fmt: skip
    group.add_argument("--top", type=int, default=10, help="answers to print")
    group.add_argument("--beams", type=int, default=20, help="width of the search over all entities")
    group = parser.add_argument_group("entities")
    add_codes_flags(group)
    group.add_argument("--candidates", nargs="+", metavar="FILE", help="lists to ask link prediction with")
    args = parser.parse_args(argv)
    if (args.head is None) != (args.relation is None):
        parser.error("--head and --relation go together")
    if args.question is not None and args.head is not None:
        parser.error("give --head and --relation, or --question, not both")
    if args.question is not None and args.predict:
        parser.error("--predict asks for head and relation: leave it out for a --question in words")
    if args.top < 1 or args.beams < 1:
        parser.error(f"--top and --beams must be 1 or more, got {args.top} and {args.beams}")
    return args


def open_source_of(reader: Reader, args: argparse.Namespace) -> Source:
    """The entities that the model was tuned on; InputError where they are not at hand."""
    if reader.saved is None:
        raise InputError(
            f"--base_model {reader.base_model} is neither an adapter nor merged: no codes or data set belong to it; "
            "give --lora_adapter DIR, or a model by merge_adapter.py"
        )
    if args.dataset is None and reader.codes.get("file") is None:
        raise InputError("the model was tuned without codes: say which entities it may answer with, --dataset DIR")
    return open_codes(reader.codes, args.codes, args.dataset)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.base_model is None and args.lora_adapter is None and ADAPTER.is_dir():
        args.lora_adapter = ADAPTER
    reader = check_model(args.base_model, args.lora_adapter)
    check_window(reader, "score")
    source = open_source_of(reader, args)
    candidates = read_candidates(args.candidates, source.kg) if args.candidates else None
    if args.head is not None:  # names are looked up before the weights are loaded
        find_query(args.head, args.relation, source)
    if args.question is not None:
        mark_entity(args.question, source)
    device = find_device(args.device)
    with enough_memory(f"{smaller(device)}, or fewer --beams than {args.beams}"):
        model: Any = load_model(reader, device, args.dtype)
        asker = Asker(model, reader.tokenizer, source, candidates, args.beams, args.predict)
        if args.head is None and args.question is None:
            interact(asker, args.top)
        else:
            ask(asker, args.top, args.head, args.relation, args.question)


if __name__ == "__main__":
    run_command(main)

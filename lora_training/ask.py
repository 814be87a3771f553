"""Ask a tuned model one question: all entities ranked by the log-likelihood of their names or codes.

    cd lora_training && python ask.py --head "Ada Ashley" --relation mother              of lora_outputs/lora_adapters
    cd lora_training && python ask.py --base_model lora_outputs/merged --question "Who is the mother of Ada Ashley?"

--head and --relation make the prompt of tail_prediction rows (gen_lp_data_rq.py --without_lists); "inverse of mother"
queries the heads. --question makes the prompt of question_answering rows, with codes after the entity's name. Answers
come from constrained decoding: a beam search over the names or codes of all entities.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class import prompts
from Class.source import Source, open_source
from common.device import find_device
from common.errors import CommandParser, InputError, at_least, run_command
from data.knowledge_graph import find_name, show_names
from lora_training.adapters import ADAPTER
from lora_training.base_model import load_config
from lora_training.code_tokens import refuse_other_codes
from lora_training.inference import Reader, add_model_flags, check_model, load_model, memory_advice
from lora_training.memory import enough_memory
from lora_training.prompts import encode_answer, encode_prompt, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_training.candidate_scoring import TokenTrie

INVERSE = prompts.relation_text("", "head")  # prefix of the label of an inverse relation


# ---------------------------------------------------------------- names


class Query(NamedTuple):
    """(h, r, ?), r + R for an inverse relation."""

    head: int
    relation: int


def find_query(head: str, relation: str, source: Source) -> Query:
    """The query of two names; InputError if one is unknown or ambiguous."""
    kg = source.kg
    h = find_name(head, kg.entities, [source.names.names, kg.labels], "entity")
    return Query(h, find_relation(relation, source))


def find_relation(relation: str, source: Source) -> int:
    """The relation of a name, r + R for an inverse one; InputError if it is unknown or ambiguous."""
    kg, inverse = source.kg, relation.startswith(INVERSE)
    r = find_name(relation.removeprefix(INVERSE), kg.relations, [source.relations, kg.relation_labels], "relation")
    return r + kg.num_relations * inverse


def mark_entity(text: str, source: Source) -> tuple[str, int | None]:
    """``text`` with codes after the longest entity name in it, and that entity; None if it contains no entity name.

    InputError lists the matches if several entities have the name.
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


# ---------------------------------------------------------------- entities


def open_codes(info: dict[str, Any], codes: Path | None, dataset: Path | None) -> Source:
    """The data set and codes that ``info`` (``read_codes_info``) names; InputError if they are not found."""
    if dataset is None and info.get("file") is None:
        raise InputError("the model was tuned without codes; give --dataset DIR, the entities that it may answer with")
    recorded = Path(str(info.get("record", ""))).with_suffix(".pt") if info.get("record") else None
    source = open_source(
        argparse.Namespace(
            codes=codes or (recorded if recorded and recorded.is_file() else None), dataset=dataset,
            seed=info.get("shuffle_seed", 0), no_codes=info.get("file") is None,
            shuffle_codes=bool(info.get("shuffled")), keep_names=True, code_format=info.get("code_format", "spec"),
        )
    )  # fmt: skip
    refuse_other_codes(info, source.codes_info, "the model", "--codes")
    return source


# ---------------------------------------------------------------- answers


class Found(NamedTuple):
    """One answer."""

    entity: int
    score: float  # log P of its text
    known: str  # the split that contains it, or ""


class Task(NamedTuple):
    """A query or a question, ready to be scored."""

    prompt: list[int]  # token ids
    by_name: bool  # a question is answered by names, a query by codes (by names in data without codes)
    listed: tuple[int, ...] | None  # the entities to score; None: search all
    known: dict[int, str]  # known answers and their split

    @property
    def kind(self) -> tuple[bool, bool]:
        """Tasks of one kind can be computed together."""
        return self.by_name, self.listed is None


@dataclass
class Asker:
    """A loaded model and the entities that it may answer with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    beams: int = 20
    _answers: dict[bool, list[list[list[int]]]] = field(default_factory=dict, init=False)
    _tries: dict[bool, TokenTrie] = field(default_factory=dict, init=False)

    def query(self, query: Query) -> list[Found]:
        """The answers to (h, r, ?), best first."""
        return self.rank([self.query_task(query)])[0]

    def question(self, text: str) -> list[Found]:
        """The entities that the answer to a question may start with, best first."""
        return self.rank([self.question_task(text)])[0]

    def query_task(self, query: Query, listed: tuple[int, ...] | None = None) -> Task:
        """(h, r, ?) with the prompt of tail_prediction rows."""
        kg, R = self.source.kg, self.source.kg.num_relations
        given, answer = (0, 2) if query.relation < R else (2, 0)
        split_of: dict[int, str] = {}
        for split in ("test", "valid", "train"):
            triples = kg.split(split)
            same = (triples[:, given] == query.head) & (triples[:, 1] == query.relation % R)
            split_of |= dict.fromkeys(triples[same, answer].tolist(), split)
        return Task(self._encode(prompts.prediction(self.source.query_fields(*query)), False), False, listed, split_of)

    def question_task(self, text: str, listed: tuple[int, ...] | None = None) -> Task:
        """A question with the prompt of question_answering rows."""
        return Task(self._encode(prompts.asked(mark_entity(text, self.source)[0]), True), True, listed, {})

    def _encode(self, prompt: str, by_name: bool) -> list[int]:
        """Token ids of a prompt; InputError if prompt and answer do not fit the model."""
        ids = encode_prompt({"instruction": prompt}, self.tokenizer)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = self.trie(by_name).rows.shape[1]
        if limit is not None and len(ids) + longest > limit:
            raise InputError(f"the prompt has {len(ids)} tokens and an answer up to {longest}, the model reads {limit}")
        return ids

    def answers(self, by_name: bool) -> list[list[list[int]]]:
        """Token ids of each entity's answer [M], once with each token that may end it."""
        if by_name not in self._answers:
            ends = [int(self.tokenizer.eos_token_id)]
            if by_name:  # a name ends the answer or its line
                ends.append(encode_answer("\n", self.tokenizer, end=False)[-1])
            encoded = encode_texts(self.source.shown if by_name else self.source.code_texts, self.tokenizer)
            self._answers[by_name] = [[[*ids, end] for end in ends] for ids in encoded]
        return self._answers[by_name]

    def trie(self, by_name: bool) -> TokenTrie:
        """All of ``answers``, owned by their entities."""
        from lora_training.candidate_scoring import TokenTrie

        if by_name not in self._tries:
            answers = self.answers(by_name)
            owners = np.repeat(np.arange(len(answers)), len(answers[0]))
            self._tries[by_name] = TokenTrie.from_sequences([ids for own in answers for ids in own], owners)
        return self._tries[by_name]

    def rank(self, tasks: Sequence[Task]) -> list[list[Found]]:
        """The answers to tasks of one kind, best first, ties by entity. Computed in one batch.

        Of all entities a beam search finds the most likely ones: ``beams`` of them, or a few more.
        """
        from lora_training.candidate_scoring import constrained_beams, score_lists

        by_name, everything = tasks[0].kind
        given = [task.prompt for task in tasks]
        lists = [list(task.listed or ()) for task in tasks]
        if everything:
            width = self.beams * len(self.answers(by_name)[0])  # an entity may take a beam for each of its ends
            found = constrained_beams(self.model, given, self.trie(by_name), width)
            lists = [one.owners.tolist() for one in found]
            scores = [one.scores for one in found]
        if by_name or not everything:  # a search may have found only one of the two ends of a name
            answers = self.answers(by_name)
            wanted = [[ids for e in listed for ids in answers[e]] for listed in lists]
            scores = [
                np.logaddexp.reduce(one.numpy().reshape(len(listed), -1), axis=1)
                for one, listed in zip(score_lists(self.model, given, wanted), lists, strict=True)
            ]
        return [
            sorted(
                (Found(e, score, task.known.get(e, "")) for e, score in zip(listed, some.tolist(), strict=True)),
                key=lambda answer: (-answer.score, answer.entity),
            )
            for task, listed, some in zip(tasks, lists, scores, strict=True)
        ]


def print_answers(source: Source, title: str, found: Sequence[Found], top: int) -> None:
    """Place, log-likelihood, share of the probability of all answers found, name, and the split that contains it."""
    print(title)
    scores = np.array([answer.score for answer in found])
    shares = np.exp(scores - np.logaddexp.reduce(scores))
    for place, (answer, share) in enumerate(zip(found[:top], shares.tolist(), strict=False), 1):
        mark = f"  known ({answer.known})" if answer.known else ""
        name = f"{source.names.names[answer.entity]} [{source.kg.entities[answer.entity]}]"
        print(f"{place:3d}. {answer.score:9.3f} {share:6.1%}  {name}{mark}")


# ---------------------------------------------------------------- command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/ask.py", description=__doc__.split("\n")[0])
    add_model_flags(parser.add_argument_group("model"))
    group = parser.add_argument_group("question")
    group.add_argument("--head", metavar="NAME", help='entity, by label or raw name (starts with "-": --head=NAME)')
    group.add_argument("--relation", metavar="NAME", help=f'relation, by label or raw name; "{INVERSE}NAME" for heads')
    group.add_argument("--question", metavar="TEXT", help="a question in words")
    group.add_argument("--top", type=at_least(1), default=10, help="answers to print")
    group.add_argument("--beams", type=at_least(1), default=20, help="width of the search over all entities")
    add_entity_flags(parser.add_argument_group("entities"))
    args = parser.parse_args(argv)
    if (args.head is None) != (args.relation is None):
        parser.error("--head and --relation go together")
    if (args.question is None) == (args.head is None):
        parser.error("give --head and --relation, or --question")
    return args


def add_entity_flags(group: Any) -> None:
    """Flags of every command that ranks all entities."""
    group.add_argument("--codes", type=Path, metavar="FILE.pt", help="codes file (default: the one recorded)")
    group.add_argument("--dataset", type=Path, metavar="DIR", help="graph folder (default: the codes' own)")


def open_model(args: argparse.Namespace) -> tuple[Reader, Source]:
    """The checked model of the flags (default: what training left) and its entities; no weights are loaded."""
    from transformers import DynamicCache

    if args.base_model is None and args.lora_adapter is None and ADAPTER.is_dir():
        args.lora_adapter = ADAPTER
    reader = check_model(args.base_model, args.lora_adapter)
    if reader.saved is None:
        raise InputError(
            f"--base_model {reader.base_model} is neither an adapter nor a merged model, so its entities are unknown; "
            "give --lora_adapter DIR, or a model by merge_adapter.py"
        )
    if any(DynamicCache(config=load_config(reader.base_model)).is_sliding):  # the prompt's cache would lose its start
        raise InputError(f"{reader.base_model} has a sliding window, which this search does not support")
    return reader, open_codes(reader.codes, args.codes, args.dataset)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    reader, source = open_model(args)
    query = None if args.head is None else find_query(args.head, args.relation, source)
    about = None if args.question is None else mark_entity(args.question, source)[1]
    device = find_device(args.device)
    with enough_memory(f"{memory_advice(device)}, or fewer --beams than {args.beams}"):
        model: Any = load_model(reader, device, args.dtype)
        asker = Asker(model, reader.tokenizer, source, args.beams)
        names = source.names.names
        if query is None:
            recognised = "no entity recognised" if about is None else f"about {names[about]}"
            print_answers(source, f"{args.question}  ({recognised})", asker.question(args.question), args.top)
        else:
            relation = source.query_fields(*query)["relation"]
            print_answers(source, f"({names[query.head]} | {relation} | ?)", asker.query(query), args.top)


if __name__ == "__main__":
    run_command(main)

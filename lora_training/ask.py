"""Ask a tuned model single questions: ranked answers with their log-likelihoods.

    cd lora_training && python ask.py --head "Ada Ashley" --relation mother              of lora_outputs/lora_adapters
    cd lora_training && python ask.py --base_model lora_outputs/merged --question "Who is the mother of Ada Ashley?"
    cd lora_training && python ask.py                                                    interactive

--relation "inverse of mother" queries the heads. With --candidates (files of run_rq.py --export_candidates), a query
that has a list there is answered by re-ranking its list, which is shuffled unless --candidate_order ranked is given.
All other queries and questions are answered by constrained decoding over ALL entities (beam search over their names and
codes). The prompts are those of the instruction data: knowledge reasoning for --head and --relation, question answering
for --question, where codes are added to the entity's name. --likelihood uses the prompt and the answers of
tail_prediction rows, for models tuned on them.
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
from Class.source import Source, open_source
from common.device import find_device
from common.errors import CommandParser, InputError, run_command
from data.knowledge_graph import find_name, show_names
from lora_training.adapters import ADAPTER
from lora_training.base_model import load_config
from lora_training.code_tokens import refuse_other_codes
from lora_training.inference import (
    Reader,
    add_model_flags,
    candidate_lines,
    check_model,
    listed_candidates,
    load_model,
    memory_advice,
)
from lora_training.memory import enough_memory
from lora_training.prompts import encode_answer, encode_prompt, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_training.candidate_scoring import TokenTrie

INVERSE = prompts.relation_text("", "head")  # prefix of the label of an inverse relation
LISTED = 20  # candidates in a prompt


# ---------------------------------------------------------------- names


class Query(NamedTuple):
    """(h, r, ?), r + R for an inverse relation."""

    head: int
    relation: int


def find_query(head: str, relation: str, source: Source) -> Query:
    """The query of two names; InputError if one is unknown or ambiguous."""
    kg = source.kg
    h = find_name(head, kg.entities, [source.names.names, kg.labels], "entity")
    inverse = relation.startswith(INVERSE)
    r = find_name(relation.removeprefix(INVERSE), kg.relations, [source.relations, kg.relation_labels], "relation")
    return Query(h, r + kg.num_relations * inverse)


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


def entity_trie(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> TokenTrie:
    """The trie of one text per entity, each followed by each of the token ids ``ends``."""
    from lora_training.candidate_scoring import TokenTrie

    encoded = encode_texts(texts, tokenizer)
    owners = np.tile(np.arange(len(texts)), len(ends))
    return TokenTrie.from_sequences([[*ids, end] for end in ends for ids in encoded], owners)


# ---------------------------------------------------------------- answers


class Found(NamedTuple):
    """One answer."""

    entity: int
    score: float  # log P of its text
    known: str  # the split that contains it, or ""


@dataclass
class Asker:
    """A loaded model, the entities that it may answer with, and optional candidate lists."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    candidates: Candidates | None = None
    beams: int = 20
    likelihood: bool = False  # prompts and answers of tail_prediction rows
    shuffle: bool = True  # lists, seeded by the query
    tries: dict[str, TokenTrie] = field(default_factory=dict)

    def query(self, query: Query) -> tuple[str, list[Found]]:
        """How (h, r, ?) was answered, and the answers, best first."""
        source, fields = self.source, self.source.query_fields(*query)
        h, R = query.head, source.kg.num_relations
        listed = self._list_of(query)
        if listed is not None:
            order = "" if self.likelihood else f" ({'shuffled' if self.shuffle else 'ranked'} list)"
            return f"{len(listed)} candidates scored{order}", self._mark_known(query, self._rerank(query, listed))
        texts = source.entity_texts
        if self.likelihood:
            prompt, texts = prompts.prediction(fields), source.code_texts
        elif query.relation < R:
            prompt = prompts.predict_tail(
                source.shown[h], fields["relation"], source.entity_texts[h], source.with_codes
            )  # fmt: skip
        else:
            prompt = prompts.complete_head(
                source.relations[query.relation - R], source.shown[h], source.entity_texts[h], source.with_codes
            )
        found = self._search(prompt, "entity", texts, [int(self.tokenizer.eos_token_id)])
        return self._searched(), self._mark_known(query, found)

    def question(self, text: str) -> tuple[str, list[Found]]:
        """How a question was answered, and the entities that the answer may start with, best first."""
        marked, entity = mark_entity(text, self.source)
        newline = encode_answer("\n", self.tokenizer, end=False)[-1]
        ends = [int(self.tokenizer.eos_token_id), newline]  # a name ends the answer or its line
        found = self._search(prompts.asked(marked), "name", self.source.shown, ends)
        about = "no entity recognised" if entity is None else f"about {self.source.names.names[entity]}"
        return f"{about}; {self._searched()}", [Found(e, score, "") for e, score in found]

    def _searched(self) -> str:
        return f"all {self.source.kg.num_entities:,} entities searched, {self.beams} beams"

    def _list_of(self, query: Query) -> list[int] | None:
        """The candidates of a query in the order of the prompt; None if it has no list."""
        if self.candidates is None:
            return None
        rows = np.flatnonzero((self.candidates.queries == np.array(query)).all(axis=1))
        if not len(rows):
            return None
        ids = self.candidates.ids[rows[0]]
        ids = ids[ids >= 0][:LISTED]
        if self.shuffle:
            ids = np.random.default_rng([query.head, query.relation]).permutation(ids)
        return ids.tolist() or None

    def _rerank(self, query: Query, listed: list[int]) -> list[tuple[int, float]]:
        """Candidates with their log-likelihoods, best first."""
        from lora_training.candidate_scoring import score_candidates

        fields = self.source.query_fields(*query, listed)
        if self.likelihood:
            prompt, end = prompts.prediction(fields), self.tokenizer.eos_token_id
            texts = encode_texts([self.source.code_texts[e] for e in listed], self.tokenizer)
            lines = [[*ids, end] for ids in texts]
        else:
            prompt, lines = prompts.link_prediction(fields), candidate_lines(listed_candidates(fields), self.tokenizer)
        scores = score_candidates(self.model, encode_prompt({"instruction": prompt}, self.tokenizer), lines).tolist()
        return sorted(zip(listed, scores, strict=True), key=lambda pair: -pair[1])

    def _search(self, prompt: str, kind: str, texts: Sequence[str], ends: Sequence[int]) -> list[tuple[int, float]]:
        """The most likely entities of a beam search; ``kind``: key of their trie."""
        from lora_training.candidate_scoring import constrained_beams

        if kind not in self.tries:
            self.tries[kind] = entity_trie(texts, self.tokenizer, ends)
        ids = encode_prompt({"instruction": prompt}, self.tokenizer)
        found = constrained_beams(self.model, ids, self.tries[kind], self.beams)
        return list(zip(found.owners.tolist(), found.scores.tolist(), strict=True))

    def _mark_known(self, query: Query, found: Iterable[tuple[int, float]]) -> list[Found]:
        """Answers with the split that contains them."""
        kg, R = self.source.kg, self.source.kg.num_relations
        given, answer = (0, 2) if query.relation < R else (2, 0)
        split_of: dict[int, str] = {}
        for split in ("test", "valid", "train"):
            triples = kg.split(split)
            same = (triples[:, given] == query.head) & (triples[:, 1] == query.relation % R)
            split_of |= dict.fromkeys(triples[same, answer].tolist(), split)
        return [Found(e, score, split_of.get(e, "")) for e, score in found]


def print_answers(source: Source, title: str, how: str, found: Sequence[Found], top: int) -> None:
    """Place, log-likelihood, share of the probability of all answers found, name, and the split that contains it."""
    print(f"{title}  ({how})")
    scores = np.array([answer.score for answer in found])
    shares = np.exp(scores - np.logaddexp.reduce(scores))
    for place, (answer, share) in enumerate(zip(found[:top], shares.tolist(), strict=False), 1):
        mark = f"  known ({answer.known})" if answer.known else ""
        name = f"{source.names.names[answer.entity]} [{source.kg.entities[answer.entity]}]"
        print(f"{place:3d}. {answer.score:9.3f} {share:6.1%}  {name}{mark}")


# ---------------------------------------------------------------- command


def ask(asker: Asker, top: int, head: str | None, relation: str | None, question: str | None) -> None:
    """Answer one query or question. InputError if a name is unknown or ambiguous."""
    source = asker.source
    if question is not None and asker.likelihood:
        raise InputError("--likelihood needs HEAD | RELATION; leave it out for a question in words")
    if question is not None:
        print_answers(source, question, *asker.question(question), top)
        return
    assert head is not None and relation is not None
    query = find_query(head, relation, source)
    relation = source.query_fields(*query)["relation"]
    print_answers(source, f"({source.names.names[query.head]} | {relation} | ?)", *asker.query(query), top)


def interact(asker: Asker, top: int, read: Callable[[str], str] = input) -> None:
    """Answer lines ``HEAD | RELATION`` or questions until an empty one; errors are printed."""
    print('enter "HEAD | RELATION" or a question in words; an empty line ends')
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
    group.add_argument("--head", metavar="NAME", help='entity, by label or raw name (starts with "-": --head=NAME)')
    group.add_argument("--relation", metavar="NAME", help=f'relation, by label or raw name; "{INVERSE}NAME" for heads')
    group.add_argument("--question", metavar="TEXT", help="a question in words")
    group.add_argument("--likelihood", action="store_true",
                       help="for models tuned on tail_prediction rows: score codes as the answer to the query "
                       "alone")  # fmt: skip
    group.add_argument("--top", type=int, default=10, help="answers to print")
    group.add_argument("--beams", type=int, default=20, help="width of the search over all entities")
    group = parser.add_argument_group("entities")
    group.add_argument("--codes", type=Path, metavar="FILE.pt", help="codes file (default: the one recorded)")
    group.add_argument("--dataset", type=Path, metavar="DIR", help="graph folder (default: the codes' own)")
    group.add_argument("--candidates", nargs="+", metavar="FILE", help="lists to re-rank (.npz or .json)")
    group.add_argument("--candidate_order", choices=("shuffled", "ranked"), default="shuffled", help="of these lists")
    args = parser.parse_args(argv)
    if (args.head is None) != (args.relation is None):
        parser.error("--head and --relation go together")
    if args.question is not None and args.head is not None:
        parser.error("give --head and --relation, or --question, not both")
    if args.question is not None and args.likelihood:
        parser.error("--likelihood needs --head and --relation; leave it out for a --question")
    if args.top < 1 or args.beams < 1:
        parser.error(f"--top and --beams must be 1 or more, got {args.top} and {args.beams}")
    return args


def check_window(base_model: str) -> None:
    """InputError for a model with a sliding window: all beams share the prompt's cache, which it drops."""
    from transformers import DynamicCache

    if any(DynamicCache(config=load_config(base_model)).is_sliding):
        raise InputError(f"{base_model} has a sliding window, which this search does not support; use inference.py")


def open_source_of(reader: Reader, args: argparse.Namespace) -> Source:
    """The entities that the model was tuned on; InputError if they are not found."""
    if reader.saved is None:
        raise InputError(
            f"--base_model {reader.base_model} is neither an adapter nor a merged model, so its entities are unknown; "
            "give --lora_adapter DIR, or a model by merge_adapter.py"
        )
    if args.dataset is None and reader.codes.get("file") is None:
        raise InputError("the model was tuned without codes; give --dataset DIR, the entities that it may answer with")
    return open_codes(reader.codes, args.codes, args.dataset)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.base_model is None and args.lora_adapter is None and ADAPTER.is_dir():
        args.lora_adapter = ADAPTER
    reader = check_model(args.base_model, args.lora_adapter)
    check_window(reader.base_model)
    source = open_source_of(reader, args)
    candidates = read_candidates(args.candidates, source.kg) if args.candidates else None
    if args.head is not None:  # unknown names are reported before weights are loaded
        find_query(args.head, args.relation, source)
    if args.question is not None:
        mark_entity(args.question, source)
    device = find_device(args.device)
    with enough_memory(f"{memory_advice(device)}, or fewer --beams than {args.beams}"):
        model: Any = load_model(reader, device, args.dtype)
        shuffle = args.candidate_order == "shuffled"
        asker = Asker(model, reader.tokenizer, source, candidates, args.beams, args.likelihood, shuffle)
        if args.head is None and args.question is None:
            interact(asker, args.top)
        else:
            ask(asker, args.top, args.head, args.relation, args.question)


if __name__ == "__main__":
    run_command(main)

"""Ask a tuned model one query: all entities ranked by the log-likelihood of their codes.

    cd lora_training && python ask.py --head "Ada Ashley" --relation mother              of lora_outputs/lora_adapters
    cd lora_training && python ask.py --base_model lora_outputs/merged --head Ada --relation "inverse of mother"

The prompt is that of tail_prediction rows (gen_lp_data_rq.py --without_lists); "inverse of mother" queries the heads.
Answers come from constrained decoding: a beam search over the codes of all entities (names in data without codes).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class import prompts
from Class.source import Source, open_source
from common.device import find_device
from common.errors import CommandParser, InputError, at_least, run_command
from data.knowledge_graph import find_name
from lora_training.adapters import ADAPTER
from lora_training.base_model import load_config
from lora_training.code_tokens import refuse_other_codes
from lora_training.inference import Reader, add_model_flags, check_model, load_model, memory_advice
from lora_training.memory import enough_memory
from lora_training.prompts import encode_prompt, encode_texts

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
    """A query, ready to be scored."""

    prompt: list[int]  # token ids
    listed: tuple[int, ...] | None  # the entities to score; None: search all
    known: dict[int, str]  # known answers and their split


@dataclass
class Asker:
    """A loaded model and the entities that it may answer with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    beams: int = 20

    def query(self, query: Query) -> list[Found]:
        """The answers to (h, r, ?), best first."""
        return self.rank([self.query_task(query)])[0]

    def query_task(self, query: Query, listed: tuple[int, ...] | None = None) -> Task:
        """(h, r, ?) with the prompt of tail_prediction rows."""
        kg, R = self.source.kg, self.source.kg.num_relations
        given, answer = (0, 2) if query.relation < R else (2, 0)
        split_of: dict[int, str] = {}
        for split in ("test", "valid", "train"):
            triples = kg.split(split)
            same = (triples[:, given] == query.head) & (triples[:, 1] == query.relation % R)
            split_of |= dict.fromkeys(triples[same, answer].tolist(), split)
        return Task(self._encode(prompts.prediction(self.source.query_fields(*query))), listed, split_of)

    def _encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt; InputError if prompt and answer do not fit the model."""
        ids = encode_prompt({"instruction": prompt}, self.tokenizer)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = self.trie.rows.shape[1]
        if limit is not None and len(ids) + longest > limit:
            raise InputError(f"the prompt has {len(ids)} tokens and an answer up to {longest}, the model reads {limit}")
        return ids

    @cached_property
    def answers(self) -> list[list[int]]:
        """Token ids of each entity's codes, with the end token [M]."""
        return [
            [*ids, int(self.tokenizer.eos_token_id)] for ids in encode_texts(self.source.code_texts, self.tokenizer)
        ]

    @cached_property
    def trie(self) -> TokenTrie:
        """All of ``answers``."""
        from lora_training.candidate_scoring import TokenTrie

        return TokenTrie.from_sequences(self.answers)

    def rank(self, tasks: Sequence[Task]) -> list[list[Found]]:
        """The answers to tasks, best first, ties by entity; computed in one batch, so all have lists or none has.

        Of all entities a beam search finds the ``beams`` most likely ones, or a few more that share their codes.
        """
        from lora_training.candidate_scoring import constrained_beams, score_lists

        given = [task.prompt for task in tasks]
        if tasks[0].listed is None:
            ranked = constrained_beams(self.model, given, self.trie, self.beams)
            pairs = [zip(one.entities.tolist(), one.scores.tolist(), strict=True) for one in ranked]
        else:
            lists = [list(task.listed or ()) for task in tasks]
            scores = score_lists(self.model, given, [[self.answers[e] for e in listed] for listed in lists])
            pairs = [zip(listed, one.tolist(), strict=True) for listed, one in zip(lists, scores, strict=True)]
        return [
            sorted(
                (Found(e, score, task.known.get(e, "")) for e, score in some),
                key=lambda answer: (-answer.score, answer.entity),
            )
            for task, some in zip(tasks, pairs, strict=True)
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
    group = parser.add_argument_group("query")
    group.add_argument(
        "--head", metavar="NAME", required=True, help='entity, by label or raw name (starts with "-": --head=NAME)'
    )
    group.add_argument(
        "--relation", metavar="NAME", required=True, help=f'relation, by label or raw name; "{INVERSE}NAME" for heads'
    )
    group.add_argument("--top", type=at_least(1), default=10, help="answers to print")
    group.add_argument("--beams", type=at_least(1), default=20, help="width of the search over all entities")
    add_entity_flags(parser.add_argument_group("entities"))
    return parser.parse_args(argv)


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
    query = find_query(args.head, args.relation, source)
    device = find_device(args.device)
    with enough_memory(f"{memory_advice(device)}, or fewer --beams than {args.beams}"):
        model: Any = load_model(reader, device, args.dtype)
        asker = Asker(model, reader.tokenizer, source, args.beams)
        relation = source.query_fields(*query)["relation"]
        print_answers(source, f"({source.names.names[query.head]} | {relation} | ?)", asker.query(query), args.top)


if __name__ == "__main__":
    run_command(main)

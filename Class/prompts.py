"""Every prompt of the instruction data: training, inference and scoring use the rows made here.

Arguments named ``..._text`` are of ``Source.entity_texts``: ``<ENT>name</ENT> <CODE>...</CODE>``, or the bare name
without codes; ``code_text`` is of ``Source.code_texts``. Names come escaped (``Source.shown``). All text goes to
``instruction``; ``input`` stays empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TRUE, FALSE = "True", "False"
ANSWERS = 3  # in the output of link prediction, as in the paper


def relation_text(label: str, direction: str = "tail") -> str:
    """The relation as prompts show it; queries for the head are queries for the tail of the inverse relation."""
    return label if direction == "tail" else f"inverse of {label}"


def classification(head: str, relation: str, tail: str, head_text: str, tail_text: str, with_codes: bool) -> str:
    """The paper's Table 7: is a triple true, by itself and by the codes of its two entities?"""
    triple = f"Triple: ({head} | {relation} | {tail})\n"
    if not with_codes:
        return (
            "Triple classification: judge whether the following triple of a knowledge graph holds.\n"
            f"{triple}Answer with True or False."
        )
    return (
        "Triple classification: judge whether the following triple of a knowledge graph holds, from the triple itself "
        "and from the quantized codes of its head and its tail.\n"
        f"{triple}Head: {head_text}\nTail: {tail_text}\nAnswer with True or False."
    )


JUDGE = "True or False?\n"


def short_classification(relation: str, head_text: str, tail_text: str) -> str:
    """``classification`` in half the tokens: names and codes of each entity once."""
    return f"{JUDGE}{head_text} | {relation} | {tail_text}"


def entity_with_codes(name: str, codes: str | None) -> str:
    """``<ENT>name</ENT> <CODE>...</CODE>`` of an escaped name and a code text; without codes (None) the bare name."""
    return name if codes is None else f"<ENT>{name}</ENT> {codes}"


def link_prediction(row: Mapping[str, Any]) -> str:
    """The paper's Table 1: complete (h, r, ?) from a list of candidates, best first.

    Built from the row's ``head``, ``relation``, ``head_codes``, ``candidate_names`` and ``candidate_codes``.
    """
    with_codes = row["head_codes"] is not None
    names = row["candidate_names"]
    candidates = map(entity_with_codes, names, row["candidate_codes"] or [None] * len(names))
    return (
        "Knowledge graph completion: predict the tail of an incomplete triple by choosing among the candidates below, "
        f"each given {'with its quantized codes' if with_codes else 'by its name'}.\n"
        f"Query: ({row['head']} | {row['relation']} | ?)\n"
        + (f"Head: {entity_with_codes(row['head'], row['head_codes'])}\n" if with_codes else "")
        + "Candidates:\n"
        + "\n".join(candidates)
        + f"\nGive the {'codes' if with_codes else 'names'} of the {ANSWERS} most plausible candidates, best first, "
        "one numbered line each."
    )


PREDICT = "What completes this?\n"


def prediction(row: Mapping[str, Any]) -> str:
    """The query of a link prediction row without its candidates; built from ``head``, ``relation``, ``head_codes``."""
    return f"{PREDICT}{entity_with_codes(row['head'], row['head_codes'])} {row['relation']}"


def numbered(answers: Sequence[str]) -> str:
    """Numbered lines, the output of link prediction: ``1. <CODE>...</CODE>``."""
    return "\n".join(f"{number}. {answer}" for number, answer in enumerate(answers, 1))


# ---------------------------------------------------------------- entity representation


def name_to_codes(name: str) -> str:
    """Name -> codes."""
    return f"Give the quantized representation of entity '{name}'."


def codes_to_name(code_text: str) -> str:
    """Codes -> name."""
    return f"Name the entity with this quantized representation:\n{code_text}"


def explain_codes(name: str, entity_text: str) -> str:
    """Name and codes -> description."""
    return f"Explain the quantized representation of entity '{name}':\n{entity_text}"


# ---------------------------------------------------------------- knowledge reasoning


def predict_tail(head: str, relation: str, head_text: str, with_codes: bool) -> str:
    """(h, r, ?) -> the tail."""
    head_line = f"Head: {head_text}\n" if with_codes else ""
    return (
        f"Knowledge reasoning: predict the missing tail.\nTriple: ({head} | {relation} | ?)\n{head_line}"
        f"Give the tail{' with its quantized codes' if with_codes else ''}."
    )


def complete_head(relation: str, tail: str, tail_text: str, with_codes: bool) -> str:
    """(?, r, t) -> the head."""
    tail_line = f"Tail: {tail_text}\n" if with_codes else ""
    return (
        f"Knowledge reasoning: complete the triple.\nTriple: (? | {relation} | {tail})\n{tail_line}"
        f"Give the head{' with its quantized codes' if with_codes else ''}."
    )


def complete_relation(head: str, tail: str, head_text: str, tail_text: str, with_codes: bool) -> str:
    """(h, ?, t) -> the relation."""
    lines = f"Head: {head_text}\nTail: {tail_text}\n" if with_codes else ""
    return (
        f"Knowledge reasoning: complete the triple.\nTriple: ({head} | ? | {tail})\n{lines}"
        "Give the relation from the head to the tail."
    )


def validate_triple(head: str, relation: str, tail: str, head_text: str, tail_text: str, with_codes: bool) -> str:
    """(h, r, t) -> True or False."""
    lines = f"Head: {head_text}\nTail: {tail_text}\n" if with_codes else ""
    return (
        f"Knowledge reasoning: validate the triple.\nTriple: ({head} | {relation} | {tail})\n{lines}"
        "Is it correct? Answer with True or False."
    )


# ---------------------------------------------------------------- code understanding


def shared_prefix(first_text: str, second_text: str, position: int) -> str:
    """How many levels two entities share at a position, from level 0 on."""
    return (
        "Code understanding: count the levels that two entities share at one position, from level 0 on up to the first "
        f"level where they differ.\nEntity: {first_text}\nEntity: {second_text}\nPosition, counted from 0: {position}\n"
        "Answer with the count out of the number of levels."
    )


def hidden_level(masked_text: str) -> str:
    """The code behind the question mark."""
    return (
        "Code understanding: one code of the entity is hidden behind a question mark.\n"
        f"Entity: {masked_text}\nGive the hidden code."
    )


# ---------------------------------------------------------------- question answering

QUESTIONS = (
    'What is {entity} linked to by "{relation}"?',
    'Starting at {entity} and following "{relation}", where do we arrive?',
    'Whom or what does "{relation}" give for {entity}?',
)


def question(entity_text: str, relation: str, wording: int) -> str:
    """A question over one relation (``relation_text``), in one of three wordings."""
    return asked(QUESTIONS[wording].format(entity=entity_text, relation=relation))


def asked(words: str) -> str:
    """A question in words."""
    return f"Question: {words}\nName all answers, one per line."

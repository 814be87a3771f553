"""Every prompt of the instruction data, in one place: training, inference and scoring read the rows made from here.

Arguments named ``..._text`` are ``Source.entity(i)``: ``<ENT>name</ENT> <CODE>...</CODE>``, or the bare name without
codes. Names come escaped (``Source.shown``). All text goes to ``instruction``; ``input`` stays empty.
"""

from __future__ import annotations

from collections.abc import Sequence

TRUE, FALSE = "True", "False"


def relation_text(label: str, direction: str = "tail") -> str:
    """The relation as a prompt names it; queries for the head ask for the tail of the inverse relation."""
    return label if direction == "tail" else f"inverse of {label}"


def classification(head: str, relation: str, tail: str, head_text: str, tail_text: str, with_codes: bool) -> str:
    """The paper's Table 7: judge a triple from itself and from the codes of its two entities."""
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


def link_prediction(
    head: str, relation: str, head_text: str, candidate_texts: Sequence[str], with_codes: bool, answers: int = 3
) -> str:
    """The paper's Table 1: complete (h, r, ?) from a list of candidates, best ``answers`` first."""
    codes = " with its quantized codes" if with_codes else ""
    return (
        "Knowledge graph completion: predict the tail of an incomplete triple by choosing among the candidates below, "
        f"each given{codes or ' by its name'}.\n"
        f"Query: ({head} | {relation} | ?)\n"
        + (f"Head: {head_text}\n" if with_codes else "")
        + "Candidates:\n"
        + "\n".join(candidate_texts)
        + f"\nGive the {'codes' if with_codes else 'names'} of the {answers} most plausible candidates, best first, "
        "one numbered line each."
    )


def numbered(answers: Sequence[str]) -> str:
    """Numbered lines, the output of link prediction: ``1. <CODE>...</CODE>``."""
    return "\n".join(f"{number}. {answer}" for number, answer in enumerate(answers, 1))

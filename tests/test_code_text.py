"""Codes <-> text <-> tokens: exact inverses, malformed text, names that hold tokens."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from Class.codes import (
    CODE_FORMATS,
    MARKS,
    code_tokens,
    entity_text,
    escape_name,
    load_entities,
    parse_codes,
    print_codes,
    render_codes,
    unique_names,
)
from data.knowledge_graph import KnowledgeGraph

SHAPES = [(1, 1, 1), (1, 4, 7), (5, 1, 3), (4, 4, 1024), (16, 4, 1024), (32, 8, 2048), (3, 12, 10**9)]
HARD_NAMES = [
    "Schleswig-Holstein",
    'Dwayne "The Rock" Johnson',
    "tab\there",
    "two\nlines\u2028and\x85more",
    "a|b:c",
    "1 < 2 > 0",
    "<b>&amp;</b>",
    "東京 Łódź Пермь عربى 👩‍👩‍👧",
    "",
    " ",
    "back\\slash\\",
    "</ENT",
    "<",
    "Q",
    *MARKS,
    "</ENT> <CODE>Q0_1</CODE>",
    "Q0_590",
    "Q1_2024 report",
    "SQ12_5",
    "Q0\\_5",
    "</ENT\\>",
    "</ENT\\\\>",
]


def test_the_text_of_the_specification() -> None:
    codes = [[590, 939, 773, 885], [1, 2, 3, 4]]
    assert entity_text("Schleswig-Holstein", codes) == (
        "<ENT>Schleswig-Holstein</ENT> <CODE>Q0_590:Q1_939:Q2_773:Q3_885|Q0_1:Q1_2:Q2_3:Q3_4</CODE>"
    )
    assert print_codes(codes, "compact") == "<CODE>Q0_590Q1_939Q2_773Q3_885Q0_1Q1_2Q2_3Q3_4</CODE>"
    assert entity_text("Schleswig-Holstein", None) == "Schleswig-Holstein"


@pytest.mark.parametrize("code_format", CODE_FORMATS)
@pytest.mark.parametrize("L, Q, K", SHAPES)
def test_parse_inverts_print(L: int, Q: int, K: int, code_format: str) -> None:
    codes = np.random.default_rng(L * Q).integers(0, K, (20, L, Q))
    codes[0], codes[1] = 0, K - 1
    for row, text in zip(codes, render_codes(codes, code_format), strict=True):
        assert text == print_codes(row, code_format)
        assert np.array_equal(parse_codes(text), row)
        assert len(re.findall(r"Q[0-9]+_[0-9]+", text)) == L * Q


@pytest.mark.parametrize("code_format", CODE_FORMATS)
def test_vq_codes_read_back_as_one_level(code_format: str) -> None:
    codes = np.random.default_rng(0).integers(0, 2048, (9, 32))
    for row, text in zip(codes, render_codes(codes, code_format), strict=True):
        assert np.array_equal(parse_codes(text), row[:, None])
        assert text == print_codes(row[:, None], code_format)


@pytest.mark.parametrize("code_format", CODE_FORMATS)
def test_the_text_is_made_of_listed_tokens_alone(code_format: str) -> None:
    tokens = code_tokens(7, 3)
    assert len(tokens) == len(set(tokens)) == 4 + 21
    assert tokens[:4] == ["<ENT>", "</ENT>", "<CODE>", "</CODE>"] and tokens[4 + 2 * 7 + 5] == "Q2_5"
    for text in render_codes(np.random.default_rng(1).integers(0, 7, (30, 4, 3)), code_format):
        pieces = re.findall(r"</?[A-Z]+>|Q[0-9]+_[0-9]+|[:|]", text)
        assert "".join(pieces) == text
        assert {piece for piece in pieces if piece not in ":|"} <= set(tokens)
        assert len(pieces) == (4 * 3 + 2 if code_format == "compact" else 2 * 4 * 3 - 1 + 2)


@pytest.mark.parametrize(
    "text",
    [
        *(f"<CODE>{inside}</CODE>" for inside in (
            "", "Q0_1:Q1_2|", "Q0_1:Q1_2|Q0_3", "Q0_1|Q0_3:Q1_2", "Q0_1:Q2_2", "Q1_1:Q1_2", "Q0_1:Q1_2|Q1_3",
            "Q0_1:Q1_2Q0_3Q1_4", "Q0_1Q1_2|Q0_3Q1_4", "Q0_1Q1_2Q0_3", "Q0_1 :Q1_2", "Q0_01", "Q0_1x", "Q0_9999999999",
            "Q0_\u0661",
        )),
        "", "Q0_1", "<CODE>Q0_1:Q1_2", "<CODE>Q0_1</CODE> and", " <CODE>Q0_1</CODE>",
    ],
)  # fmt: skip
def test_malformed_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_codes(text)


def test_every_cut_of_a_text_is_refused() -> None:
    """No prefix reads as a shorter entity."""
    for code_format in CODE_FORMATS:
        text = print_codes(np.random.default_rng(2).integers(0, 50, (3, 3)), code_format)
        for end in range(len(text)):
            with pytest.raises(ValueError):
                parse_codes(text[:end])


def test_changed_text_is_refused_or_prints_as_it_stands() -> None:
    """Whatever the parser accepts prints back to the very same characters."""
    rng = random.Random(0)
    accepted = 0
    for _ in range(4000):
        code_format = rng.choice(CODE_FORMATS)
        text = list(print_codes([[1, 22], [3, 4]], code_format))
        text[rng.randrange(len(text))] = rng.choice("Q01_:|<>CODE/ ")
        changed = "".join(text)
        try:
            codes = parse_codes(changed)
        except ValueError:
            continue
        accepted += 1
        assert changed in (print_codes(codes, "spec"), print_codes(codes, "compact"))
    assert accepted > 100


@pytest.mark.parametrize("code_format", CODE_FORMATS)
@pytest.mark.parametrize("name", HARD_NAMES)
def test_names_survive(name: str, code_format: str) -> None:
    codes = [[5, 6], [7, 8]]
    text = entity_text(name, codes, code_format)
    assert parse_codes(text[text.rindex("</ENT> ") + len("</ENT> ") :]).tolist() == codes
    inside = text[len("<ENT>") : text.index("</ENT> <CODE>")]
    assert not re.search(r"</?(ENT|CODE)>|Q[0-9]+_[0-9]", inside), "a name must not hold one of the tokens"


def test_escaping_is_a_bijection_on_random_names() -> None:
    rng = random.Random(3)
    pieces = ["<", "/", "ENT", "CODE", ">", "\\", "Q", "1", "_", "a"]
    names = {"".join(rng.choices(pieces, k=rng.randrange(9))) for _ in range(20_000)}
    escaped = {name: escape_name(name) for name in names}
    assert len(set(escaped.values())) == len(names)
    assert sum(text != name for name, text in escaped.items()) > 50


def make_graph(labels: list[str | None], descriptions: list[str]) -> KnowledgeGraph:
    entities = [f"e{i}" for i in range(len(labels))]
    triple = np.array([[0, 0, 1]])
    return KnowledgeGraph(
        name="g", entities=entities, relations=["r"], train=triple, valid=triple, test=triple,
        labels=[label or raw for label, raw in zip(labels, entities, strict=True)],
        has_label=np.array([label is not None for label in labels]), descriptions=descriptions, relation_labels=["r"],
    )  # fmt: skip


def test_shared_and_missing_names() -> None:
    graph = make_graph(
        ["Ann", "Springfield", "Springfield", "Paris", "Paris", "Paris", None, "Bo", "Bo", "Bo (e7)"],
        ["", "city", "", "city", "city", "film", "", "", "", ""],
    )
    names = unique_names(graph)
    assert names.names[:7] == [
        "Ann", "Springfield (city)", "Springfield (e2)", "Paris (e3)", "Paris (e4)", "Paris (film)", "e6",
    ]  # fmt: skip
    assert len(set(names.names)) == 10
    assert (names.missing, names.shared, names.described) == (1, 7, 2)


def test_entity_files_keep_names_with_odd_line_ends(tmp_path: Path) -> None:
    from Class.codes import code_files, save_codes

    torch = pytest.importorskip("torch")
    names = ["a\u2028b", "c\x85d", "e\x0cf", "g\rh", " i "]
    files = code_files(tmp_path, "x")
    save_codes(files, torch.zeros(5, 1, 1, dtype=torch.int64), names, None)
    assert load_entities(files.entities) == names

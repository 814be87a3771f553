"""Neighbours and shared facts against plain loops, and the command as a user sees it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from data.knowledge_graph import KnowledgeGraph, find_name, with_inverse
from tables import inspect_codes
from tables.inspect_codes import nearest_by_prefix, shared_facts, shared_levels
from tests.test_code_quality import stage1
from tests.test_instructions import write_codes, write_graph


@pytest.fixture(scope="module")
def codes_file(ring: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage1(ring, tmp_path_factory.mktemp("inspect"))


def test_shared_levels_end_at_the_first_difference() -> None:
    codes = np.array([[[1, 2, 3], [4, 5, 6]], [[1, 2, 0], [0, 5, 6]], [[1, 2, 3], [4, 0, 6]], [[9, 9, 9], [9, 9, 9]]])
    assert shared_levels(codes, 0).tolist() == [[3, 3], [2, 0], [3, 1], [0, 0]]
    near = nearest_by_prefix(codes, 0, 5)
    assert near.entities.tolist() == [2, 1] and near.values.tolist() == [4, 2], "e3 shares nothing"


def test_prefix_neighbours_are_those_of_plain_loops() -> None:
    codes = torch.randint(0, 3, (40, 4, 3), generator=torch.Generator().manual_seed(0)).numpy()

    def shared(a: int, b: int) -> int:
        total = 0
        for one, other in zip(codes[a], codes[b], strict=True):
            for x, y in zip(one, other, strict=True):
                if x != y:
                    break
                total += 1
        return total

    for entity in (0, 7, 39):
        order = sorted(
            (e for e in range(40) if e != entity and shared(entity, e)), key=lambda e: (-shared(entity, e), e)
        )
        near = nearest_by_prefix(codes, entity, 6)
        assert near.entities.tolist() == order[:6]
        assert near.values.tolist() == [shared(entity, e) for e in order[:6]]


def test_shared_facts_are_counted_over_group_and_graph(ring_kg: KnowledgeGraph) -> None:
    edges = {tuple(edge) for edge in with_inverse(ring_kg.train, ring_kg.num_relations).tolist()}
    hub, one = ring_kg.relations.index("hub"), ring_kg.entities.index("e1")
    *like, entity = sorted(h for h, r, t in edges if (r, t) == (hub, one))
    neighbours = np.array([*like[:3], 3])
    found = shared_facts(ring_kg, entity, neighbours)
    expected = Counter(
        (r, t) for e in neighbours.tolist() for h, r, t in edges if h == e and (entity, r, t) in edges
    )  # fmt: skip
    assert {(fact.relation, fact.tail): fact.having for fact in found} == {key: n + 1 for key, n in expected.items()}
    for fact in found:
        overall = sum((h, fact.relation, fact.tail) in edges for h in range(ring_kg.num_entities))
        assert (fact.overall, fact.group) == (overall, 5)
        assert fact.lift == pytest.approx(fact.having / 5 / (overall / ring_kg.num_entities))
    assert (found[0].relation, found[0].tail) == (hub, one), "the class of all but e3"


def test_over_representation_beats_frequency(tmp_path: Path) -> None:
    common = [f"x{i} kind thing" for i in range(12)]
    rare = ["x0 club a", "x1 club a", "x2 club a"]
    kg = KnowledgeGraph.load(write_graph(tmp_path / "g", train=common + rare, valid=["x0 club a"], test=["x1 club a"]))
    row = {name: i for i, name in enumerate(kg.entities)}
    found = shared_facts(kg, row["x0"], np.array([row["x1"], row["x2"]]))
    assert [kg.relations[fact.relation] for fact in found] == ["club", "kind"]
    assert found[0].lift == pytest.approx(kg.num_entities / 3)


def test_the_command_shows_codes_neighbours_and_facts(
    ring: Path, codes_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect_codes.main(["--entity", "entity 21", "--codes", str(codes_file), "--dataset", str(ring), "--top", "4"])
    shown = capsys.readouterr().out
    codes = torch.load(codes_file, weights_only=True)
    row = codes[21]  # ids are e0..e42
    assert "Entity 21 [e21]" in shown and f"Q0_{row[0, 0]}Q1_{row[0, 1]}Q0_{row[1, 0]}" in shown
    same = int((codes[:, 0, 0] == row[0, 0]).sum()) - 1
    assert f"Q0_{row[0, 0]} ({same})" in shown
    near = nearest_by_prefix(codes.numpy(), 21, 4)
    for other in near.entities:
        assert f"Entity {other} [e{other}]" in shown
    assert "nearest by distance" in shown and "facts that it shares with these" in shown


def test_codes_of_another_order_are_mapped_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["b r c", "c r a", "a r b"]
    graph = write_graph(tmp_path / "data" / "g", train=train, valid=["b r a"], test=["c r b"])
    codes_file = write_codes(graph, tmp_path / "codes")
    other = write_graph(tmp_path / "data" / "h", train=train, valid=["b r a"], test=["c r b"])
    (other / "entities.dict").write_text("0\tc\n1\tb\n2\ta\n")
    inspect_codes.main(["--entity", "a", "--codes", str(codes_file), "--dataset", str(other)])
    shown = capsys.readouterr().out
    row = torch.load(codes_file, weights_only=True)[0]
    assert f"<CODE>Q0_{row[0, 0]}Q1_{row[0, 1]}" in shown
    assert "_emd.pt" in shown, "no decoded vectors beside the codes"


def test_unknown_and_ambiguous_names_are_refused(ring: Path, codes_file: Path, tmp_path: Path) -> None:
    words = ["--codes", str(codes_file), "--dataset", str(ring), "--entity"]
    raw, names = ["m1", "m2", "m3"], [["Mercury (a planet)", "Mercury (m2)", "Venus"], ["Mercury", "Mercury", "Venus"]]
    for call, word in ((lambda: inspect_codes.main([*words, "Nobody"]), "Nobody"),
                      (lambda: find_name("mercury", raw, names, "entity", "--entity"), "[m1]")):  # fmt: skip
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value).startswith("--entity") and word in str(error.value)
    assert find_name("Mercury (m2)", raw, names, "entity") == 1

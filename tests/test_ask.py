"""Questions to a tiny model: answers are likelihoods by hand, names are found or their matches listed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from Class import prompts
from Class.codes import unique_names
from Class.source import Source
from common.errors import InputError
from data.knowledge_graph import KnowledgeGraph, find_name
from lora_training import ask
from lora_training.adapters import load_adapted, read_saved
from lora_training.ask import Asker, Query, find_query, mark_entity, open_codes
from tests.test_inference import World, likelihoods, world  # noqa: F401
from tests.test_instructions import write_graph


@pytest.fixture(scope="module")
def asker(world: World, ring: Path) -> Asker:  # noqa: F811
    saved = read_saved(world.adapter)
    model = load_adapted(saved, str(world.base), torch.float32).merge_and_unload()
    source = open_codes(saved.record["codes"], world.codes, ring)
    return Asker(model, saved.tokenizer, source, beams=source.kg.num_entities * 2)


@pytest.fixture
def namesakes(tmp_path: Path) -> Source:
    graph = write_graph(tmp_path / "g", train=["m1 r a", "m2 r b", "c s a"], valid=["m1 s b"], test=["m2 s a"])
    (graph / "entity2label.txt").write_text("m1\tMercury\nm2\tMercury\na\tMercury Prize\nb\tVenus (b)\nc\tO'Neill\n")
    (graph / "entity2text.txt").write_text("m1\ta planet\nm2\ta metal\n")
    kg = KnowledgeGraph.load(graph)
    return Source(kg, unique_names(kg))


# ---------------------------------------------------------------- names


def test_names_are_found_or_their_matches_listed(namesakes: Source) -> None:
    kg, names = namesakes.kg, namesakes.names.names
    columns = [names, kg.labels]

    def found(word: str) -> str:
        return kg.entities[find_name(word, kg.entities, columns, "entity")]

    assert [found(word) for word in ("m2", "Mercury Prize", "mercury prize", "Venus (b)")] == ["m2", "a", "a", "b"]
    full = [name for name in names if name.startswith("Mercury (")]
    assert len(full) == 2 and {found(name) for name in full} == {"m1", "m2"}
    with pytest.raises(InputError) as error:
        found("mercury")
    assert all(name in str(error.value) for name in (*full, "[m1]", "[m2]", "entity 'mercury' is ambiguous, 2 match"))
    with pytest.raises(InputError, match=r"no entity is called 'prize'; near: Mercury Prize \[a\]$"):
        found("prize")
    r = kg.relations.index("s")
    assert find_query("m1", "s", namesakes) == (kg.entities.index("m1"), r)
    assert find_query("m1", "inverse of s", namesakes) == (kg.entities.index("m1"), r + kg.num_relations)
    with pytest.raises(InputError, match="no relation is called 'likes'"):
        find_query("m1", "likes", namesakes)


def test_the_longest_name_in_a_question_gets_its_codes(namesakes: Source, asker: Asker) -> None:
    text, entity = mark_entity("Who won the Mercury Prize?", namesakes)
    assert entity == namesakes.kg.entities.index("a") and text == "Who won the Mercury Prize?", "no codes, no change"
    assert mark_entity("What did O'Neill write?", namesakes)[1] == namesakes.kg.entities.index("c")
    assert mark_entity("What is mercurial?", namesakes) == ("What is mercurial?", None)
    with pytest.raises(InputError, match="entity 'Mercury' is ambiguous, 2 match"):
        mark_entity("How hot is Mercury?", namesakes)
    source = asker.source
    text, entity = mark_entity("What comes after Entity 12, and why?", source)
    assert entity == source.kg.labels.index("Entity 12"), "not Entity 1"
    assert text == f"What comes after {source.entity_texts[entity]}, and why?" and "<CODE>" in text


# ---------------------------------------------------------------- answers


def test_a_query_ranks_all_entities_by_their_likelihood(asker: Asker) -> None:
    """log P of each entity's codes after the prompt of tail_prediction rows; known answers are marked."""
    source, R = asker.source, asker.source.kg.num_relations
    h, r, t = source.kg.train[0].tolist()
    for query, other in ((Query(h, r), t), (Query(t, r + R), h)):
        found = asker.query(query)
        row = {"instruction": prompts.prediction(source.query_fields(*query))}
        expected = likelihoods(asker.model, asker.tokenizer, row, source.code_texts, end=True)
        assert [answer.entity for answer in sorted(found)] == list(range(source.kg.num_entities))
        assert np.allclose([answer.score for answer in sorted(found)], expected, atol=1e-3)
        scores = [answer.score for answer in found]
        assert scores == sorted(scores, reverse=True)
        known = {answer.entity: answer.known for answer in found}
        assert known[other] == "train" and sum(map(bool, known.values())) < 6


def test_a_question_adds_both_ends_of_a_name(asker: Asker) -> None:
    found = asker.question("What is next to Entity 3?")
    assert len(found) == asker.source.kg.num_entities
    text = f"Question: What is next to {asker.source.entity_texts[asker.source.kg.labels.index('Entity 3')]}?"
    row = {"instruction": f"{text}\nName all answers, one per line."}
    lines, ended = (
        likelihoods(asker.model, asker.tokenizer, row, texts, end=end)
        for texts, end in (([f"{name}\n" for name in asker.source.shown], False), (asker.source.shown, True))
    )
    assert np.allclose([answer.score for answer in sorted(found)], np.logaddexp(lines, ended), atol=1e-3)
    assert [answer.score for answer in found] == sorted((answer.score for answer in found), reverse=True)


# ---------------------------------------------------------------- the command


def test_the_command_prints_ranked_answers(
    world: World, ring: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    base = ["--lora_adapter", world.adapter, "--dataset", ring, "--codes", world.codes, "--device", "cpu", "--top", 3]
    ask.main([str(word) for word in (*base, "--head", "Entity 7", "--relation", "next")])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("(Entity 7 | next | ?)"))
    assert [line.split(".")[0].strip() for line in lines[start + 1 :]] == ["1", "2", "3"]
    ask.main([str(word) for word in (*base, "--question", "What is next to Entity 7?")])
    out = capsys.readouterr().out.splitlines()
    assert out[-4] == "What is next to Entity 7?  (about Entity 7)" and out[-3:] != lines[start + 1 :]
    for words, message in (
        (["--head", "Entity 7"], "go together"), ([], "or --question"),
        (["--question", "x", "--head", "a", "--relation", "b"], "or --question"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            ask.main([str(word) for word in (*base, *words)])
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_without_a_model_it_is_the_one_that_training_left(world: World, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    question = ["--head", "Entity 77", "--relation", "next"]
    monkeypatch.setattr(ask, "ADAPTER", world.folder / "nothing")
    with pytest.raises(InputError, match="no model given"):
        ask.main(question)
    monkeypatch.setattr(ask, "ADAPTER", world.named_adapter)
    with pytest.raises(InputError, match="without codes; give --dataset"):
        ask.main(question)


def test_names_are_checked_before_the_weights(
    world: World, ring: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(ask, "load_model", lambda *_: pytest.fail("weights were loaded"))
    base = ["--lora_adapter", world.adapter, "--dataset", ring, "--codes", world.codes]
    for words, message in (
        ([*base, "--head", "Entity 77", "--relation", "next"], "no entity is called 'Entity 77'"),
        ([*base, "--head", "entity 7", "--relation", "beside"], "no relation is called 'beside'"),
        (["--base_model", world.base, "--head", "a", "--relation", "b"], "neither an adapter nor a merged model"),
        (["--lora_adapter", world.named_adapter, "--head", "a", "--relation", "b"], "without codes; give --dataset"),
    ):
        with pytest.raises(InputError, match=message):
            ask.main([str(word) for word in words])

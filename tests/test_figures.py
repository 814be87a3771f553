"""Figures: their numbers are computed correctly, each is drawn from the inputs that exist, missing inputs are named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from Class.codes import print_codes
from common.errors import InputError
from data.knowledge_graph import KnowledgeGraph
from tables import make_figures
from tables.code_quality import CodeSet
from tables.figures import answers, embeddings, graph, quality, runs, similarity, style
from tables.figures.inputs import Inputs, Missing
from tables.figures.style import new_figure, save
from tests.test_code_quality import stage1
from tests.test_instructions import write_graph


@pytest.fixture(scope="module")
def swept(ring: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of two sizes and both quantizers on the ring."""
    folder = tmp_path_factory.mktemp("swept")
    for more in ({"seq_len": 3}, {"seq_len": 2}, {"seq_len": 2, "quantizer": "vq", "num_quantizers": 1}):
        stage1(ring, folder, **more)
    return folder / "codes"


@pytest.fixture
def inputs(swept: Path, ring: Path) -> Inputs:
    codes = sorted(path for path in swept.glob("*.pt") if not path.stem.endswith("_emd"))
    return Inputs(codes=codes, records=[swept], data=ring.parent, datasets=[ring], models=[])


def is_image(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")


# ---------------------------------------------------------------- drawing


def test_all_figures_with_inputs_are_drawn_and_the_others_named(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = make_figures.draw_all(inputs, tmp_path, list(make_figures.FIGURES))
    assert set(drawn) == {"2", "5", "10", "levels", "pareto", "4", "12"} - lacking(inputs)
    assert all(is_image(path) for paths in drawn.values() for path in paths)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(make_figures.FIGURES), "one line each"
    for line in lines:
        assert "wrote" in line or ("skipped" in line and "python" in line), line
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".pt"], "baselines are never saved"


def lacking(inputs: Inputs) -> set[str]:
    """The heat maps, where the ring has too few relations with enough heads for a sample."""
    try:
        similarity.sample_groups(inputs.graphs[0], 0)
    except Missing:
        return {"4", "12"}
    return set()


EVERY = [
    "levels",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("2", "5", "10", "pareto")),
]


@pytest.mark.parametrize("name", EVERY)
def test_equal_inputs_give_equal_bytes(name: str, inputs: Inputs, tmp_path: Path) -> None:
    first, second = (make_figures.FIGURES[name].draw(inputs, tmp_path / str(turn)) for turn in range(2))
    assert [path.suffix for path in first] == [".png", ".pdf"] and all(is_image(path) for path in first)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["7"], "--records"), (["11"], "--records"), (["9", "--dataset", "RING"], "data/download.py")],
)
def test_a_named_figure_without_inputs_is_an_error(
    flags: list[str], word: str, swept: Path, ring: Path, tmp_path: Path
) -> None:
    words = ["--records", str(swept), "--data", str(ring.parent), "--out", str(tmp_path)]
    with pytest.raises(InputError) as error:
        make_figures.main(["--figure", *(str(ring) if flag == "RING" else flag for flag in flags), *words])
    assert word in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--sample", "--seed"])
def test_numbers_out_of_range_are_one_line(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        make_figures.main([flag, "-1"])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and flag in printed and printed.count("\n") == 1


def test_lines_differ_in_grey_and_heat_maps_rise_in_lightness() -> None:
    import matplotlib

    lines = [style.line(number) for number in range(7)]
    assert len({line["marker"] for line in lines}) == len({line["color"] for line in lines}) == 7
    assert all(a["linestyle"] != b["linestyle"] for a, b in pairwise(lines))
    shades = matplotlib.colormaps[style.MAP](np.linspace(0, 1, 50))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(shades) > 0).all()


def test_dollar_signs_in_names_are_no_formulas(swept: Path, inputs: Inputs, tmp_path: Path) -> None:
    figure, axes = style.new_figure(1, 1, 3, 3)
    names = ["Ke$ha \\frac $", "A$AP $x_{$", "<b>&"]
    style.heat_map(axes[0][0], np.eye(3), names, names, text=".1f")
    axes[0][0].set_title("$x_{$")
    assert all(is_image(path) for path in style.save(figure, tmp_path, "dollars"))
    (tmp_path / "runs").mkdir()
    for path in swept.glob("ring_*_rq.json"):
        record = json.loads(path.read_text()) | {"dataset": "a $x_{$ b"}
        (tmp_path / "runs" / path.name).write_text(json.dumps(record))
    odd = Inputs(records=[tmp_path / "runs"], data=inputs.data)
    for name in ("5", "10", "levels", "pareto"):
        assert all(is_image(path) for path in make_figures.FIGURES[name].draw(odd, tmp_path))


# ---------------------------------------------------------------- 2, 9


@pytest.mark.parametrize(("title", "said"), [("知识图谱", True), ("graph", False)])
def test_characters_without_a_font_are_reported(
    title: str, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure, axes = new_figure(1, 1, 2.0, 2.0)
    axes[0][0].set_title(title, fontfamily="DejaVu Sans")
    save(figure, tmp_path, "names")
    assert ("fonts-noto-cjk" in capsys.readouterr().out) == said


def test_neighbourhoods_are_those_of_a_walk(ring_kg: KnowledgeGraph) -> None:
    tokens = np.arange(1, len(ring_kg.train) + 1)
    cost = graph.neighbourhood_cost(ring_kg, np.arange(43), tokens)
    near: dict[int, set[int]] = {e: {e} for e in range(43)}
    for h, _, t in ring_kg.train.tolist():
        near[h].add(t)
        near[t].add(h)
    for e in range(43):
        two = set().union(*(near[other] for other in near[e]))
        assert cost.neighbours[e] == len(two) - 1
        touched = [n for n, (h, _, t) in zip(tokens, ring_kg.train.tolist(), strict=True) if {h, t} & near[e]]
        assert cost.tokens[e] == sum(touched)


def test_tokens_are_counted_as_said() -> None:
    assert [graph.proxy_tokens(text) for text in ("", "Ada", "grandmother", "a | b\n", "1984!")] == [0, 1, 3, 3, 2]
    for shape in ((1, 1), (4, 4), (3, 2)):
        for code_format, count in graph.code_token_counts(*shape).items():
            text = print_codes(np.zeros(shape, dtype=np.int64), code_format)
            assert len(re.findall(r"</?CODE>|Q\d+_\d+|[:|]", text)) == count


def test_triples_cost_their_three_names(tmp_path: Path) -> None:
    train, loop = ["abcd likes e", "e likes fghijklmn"], ["e likes e"]
    kg = KnowledgeGraph.load(write_graph(tmp_path / "g", train=train, valid=loop, test=loop))
    # two bars; ceil(letters / 4) of each name
    assert graph.triple_tokens(kg, graph.proxy_tokens).tolist() == [1 + 2 + 1 + 2, 1 + 2 + 3 + 2]


# ---------------------------------------------------------------- 4, 12


def test_samples_share_their_facts_and_cosines_are_cosines(inputs: Inputs, tmp_path: Path) -> None:
    kg = KnowledgeGraph.load(Path(__file__).parent.parent / "data" / "family")
    sample = similarity.sample_groups(kg, 3)
    triples = {tuple(triple) for triple in kg.train.tolist()}
    assert len(set(sample.entities.tolist())) == similarity.GROUPS * similarity.SIZE
    for place, entity in enumerate(sample.entities.tolist()):
        relation, tail = sample.facts[place // similarity.SIZE]
        assert (entity, relation, tail) in triples
    assert similarity.sample_groups(kg, 3).entities.tolist() == sample.entities.tolist()
    assert similarity.sample_groups(kg, 4).entities.tolist() != sample.entities.tolist()
    codes = inputs.code_sets[0]
    found = similarity.cosines(codes, [5, 2, 9])
    expected = torch.nn.functional.cosine_similarity(codes.flat_vectors()[5], codes.flat_vectors()[9], dim=0)
    assert np.allclose(np.diag(found), 1) and found[0, 2] == pytest.approx(float(expected), abs=1e-6)
    vectors = torch.randn(kg.num_entities, 2, 3, generator=torch.Generator().manual_seed(0))
    drawn = CodeSet(Path("x.pt"), {}, kg.entities, torch.zeros(kg.num_entities, 2, 1).long(), 8, vectors)
    fake: Any = SimpleNamespace(graphs=[kg], code_names=["x"], code_sets=[drawn], seed=0)
    assert all(is_image(path) for path in similarity.draw(fake, tmp_path, 4))


# ---------------------------------------------------------------- 5, 10, levels


def row(L: int, K: int, mrr: float, **more: Any) -> Any:
    args = {"seq_len": L, "num_code": K, "num_quantizers": 2, "decoder": "conve"} | more.pop("args", {})
    record = {"args": args, "history": [], "parameters": {"behind_codes": 1000 * K}} | more
    label = f"RQ {L} x 2 of {K:,}"
    return SimpleNamespace(
        task="codes", variant="", dataset="ring", seed=0, finished="2026", valid={"mrr": mrr}, metrics={"mrr": mrr},
        setting=label, flags=(), record=record, path=Path("run.json"),
    )  # fmt: skip


def test_curves_average_seeds_and_keep_settings_apart() -> None:
    rows = [row(2, 8, 0.2), row(2, 8, 0.4), row(4, 8, 0.5), row(4, 8, 0.9, args={"decoder": "distmult"})]
    found = runs.curves(rows, 0)
    rest = "k-means, 1 members"
    assert found == {
        (8, "RQ", 2, f"ConvE, {rest}"): {2: pytest.approx(0.3), 4: 0.5},
        (8, "RQ", 2, f"DistMult, {rest}"): {4: 0.9},
    }
    assert runs.varied(rows) == rows[:3], "DistMult has no second size"
    assert runs.size(row(4, 1024, 0.5, args={"quantizer": "vq"})) == (4, 1024, 1)


def test_legends_name_the_record_and_its_sizes() -> None:
    first, second = row(2, 8, 0.2), row(2, 16, 0.3)
    second.path = Path("other.json")
    assert runs.run_labels([first, second]) == ["run (0.01M, 12 bits)", "other (0.02M, 16 bits)"]
    first.path, second.path = Path("a/run.json"), Path("b/run.json")
    assert runs.run_labels([first, second])[0].startswith("a/run (")


def drawn_by(draw: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure that ``draw`` would save for these rows."""
    drawn: list[Any] = []
    monkeypatch.setattr(runs, "save", lambda figure, *_: drawn.append(figure))
    draw(SimpleNamespace(rows=rows), tmp_path)
    return drawn[0]


def test_training_curves_keep_the_warm_up_apart_and_count_a_seed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = ("warm-up", "warm-up", "codes", "frozen")
    history = [{"epoch": n, "phase": phase, "structure": 9.0 - n, "valid": {"mrr": n / 10}}
               for n, phase in enumerate(phases, 1)]  # fmt: skip
    runs_made = [row(2, 8, 0.4, history=history), row(2, 8, 0.4, history=history[:1])]
    runs_made[1].finished = "2025"
    losses, scores = drawn_by(runs.draw_training, runs_made, tmp_path, monkeypatch).axes
    assert [list(line.get_xdata()) for line in losses.lines] == [[1, 2, 3, 4]], "the later of two runs with one seed"
    warm, codes, frozen = scores.lines
    assert (list(warm.get_xdata()), list(codes.get_xdata())) == ([1, 2], [3, 4]) and frozen.get_xdata()[0] == 4
    assert warm.get_markerfacecolor() == "white" != codes.get_markerfacecolor()


def test_figure_5_needs_two_sizes(inputs: Inputs, swept: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    one = Inputs(records=[swept / "ring_3_8_2_rq.json"], data=inputs.data)
    none = Inputs(records=[tmp_path / "empty"], data=inputs.data)
    for draw, given in ((runs.draw_sizes, one), (runs.draw_training, none), (runs.draw_pareto, none)):
        with pytest.raises(Missing):
            draw(given, tmp_path)


def test_pareto_has_one_point_per_setting_and_the_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = row(4, 16, 0.3)
    again = row(4, 16, 0.5)
    again.seed = 1
    control = row(4, 8, 0.9)
    control.variant = "control: unquantized"
    shuffled = row(4, 8, 0.01)
    shuffled.variant = "control: codes shuffled"
    rows = [row(4, 8, 0.2), other, again, control, shuffled]
    for made in rows:
        made.dataset = "FB15k-237"
    (panel,) = drawn_by(runs.draw_pareto, rows, tmp_path, monkeypatch).axes
    points = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in panel.lines}
    assert points["RQ, k-means, no text"] == [(0.008, 0.2), (0.016, pytest.approx(0.4))], "mean over the seeds"
    assert points["unquantized"] == [(0.008, 0.9)] and not any(
        mrr == 0.01 for found in points.values() for _, mrr in found
    )
    assert {text.get_text() for text in panel.texts} == {"NodePiece", "EARL", "RotatE"}


# ---------------------------------------------------------------- 6


def test_baselines_have_the_shape_of_the_codes_and_kmeans_is_near(inputs: Inputs) -> None:
    found = next(codes for codes in inputs.code_sets if codes.codes.shape[1:] == (3, 2))
    assert found.vectors is not None
    random, clusters = quality.baselines(found, 0).values()
    assert random.shape == found.codes.shape and clusters.shape == (43, 3, 1)
    assert int(random.max()) < found.num_code and not torch.equal(random, found.codes)
    same = (clusters[:, None, :, 0] == clusters[None, :, :, 0])[:, :, 0]
    distances = torch.cdist(found.vectors[:, 0], found.vectors[:, 0])
    assert distances[same].mean() < 0.7 * distances[~same].mean()


# ---------------------------------------------------------------- 7, 11


def test_grids_of_answers_are_means_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(L: int, K: int, accuracy: float, base: str = "tiny", seed: int = 0, Q: int = 2) -> Any:
        codes = {"seq_len": L, "num_code": K, "num_quantizers": Q}
        setting = f"{base}, LoRA r 8, {K} rows, lr 0.1, codes {L} x {Q} of {K:,}, 20 test rows at most"
        return SimpleNamespace(task="triple_classification", dataset="family", variant="", codes="with", seed=seed,
                               metrics={"accuracy": accuracy, "f1": 0.5}, record={"codes": codes}, setting=setting,
                               finished="2026")  # fmt: skip

    rows = [answered(4, 8, 0.5), answered(4, 8, 0.7, seed=1), answered(2, 16, 0.9)]
    lengths, sizes, values = answers.grid(rows, "accuracy")
    assert (lengths, sizes) == ([2, 4], [8, 16])
    assert np.array_equal(values, [[np.nan, 0.9], [0.6, np.nan]], equal_nan=True)
    assert answers.grid(rows, "recall")[2].size == 0
    assert answers.others(rows[0]) == answers.others(rows[2]) == "tiny, LoRA r 8, lr 0.1, 20 test rows at most"
    seen: list[list[float]] = []

    def grid(rows: list[Any], metric: str) -> Any:
        if metric == "accuracy":
            seen.append([row.metrics[metric] for row in rows])
        return grid_of(rows, metric)

    grid_of = answers.grid
    monkeypatch.setattr(answers, "grid", grid)
    again = answered(4, 8, 0.1)
    again.finished = "2025"  # the same seed, before the one that counts
    more = [*rows, again, answered(4, 8, 0.3, base="large"), answered(4, 8, 0.2, Q=1)]
    assert all(is_image(path) for path in answers.draw(SimpleNamespace(rows=more), tmp_path, 11))  # type: ignore[arg-type]
    assert seen == [[0.5, 0.7, 0.9], [0.3], [0.2]], "other bases and other Q are not averaged in, a seed counts once"


# ---------------------------------------------------------------- 8, 13


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    """A tiny base, an adapter on it with codes 2 of 8, and both merged."""
    from lora_training.adapters import load_adapted, read_saved
    from lora_training.code_tokens import save_tokenizer
    from tests.test_inference import save_adapter, save_base

    folder = tmp_path_factory.mktemp("models")
    base = save_base(folder / "base", ["the mother of Ada is Anna", "codes are tokens"] * 4, 300)
    (folder / "train.json").write_text("[]")
    info = {"file": "x.pt", "sha256": "0", "num_code": 8, "num_quantizers": 2}
    (folder / "dataset_stats.json").write_text(json.dumps({"codes": info}))
    adapter = save_adapter(base, folder, folder / "adapter")
    saved = read_saved(adapter)
    merged = load_adapted(saved, str(base), torch.float32).merge_and_unload()
    merged.save_pretrained(str(folder / "merged"))
    save_tokenizer(saved.tokenizer, folder / "merged", saved.shape)
    (folder / "merged" / "run_record.json").write_bytes((adapter / "run_record.json").read_bytes())
    yield base, adapter, folder / "merged"


@pytest.mark.slow
def test_tokens_of_an_adapter_are_those_of_the_merged_model(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = models
    one, same, plain = (embeddings.tokens_of(folder, 0) for folder in (adapter, merged, base))
    assert [level.shape for level in one.codes] == [(8, 32), (8, 32)] and plain.codes == []
    assert all(np.array_equal(a, b) for a, b in zip(one.codes, same.codes, strict=True))
    assert np.array_equal(one.words, same.words) and len(one.words) == len(plain.words)
    for number in (8, 13):
        found = Inputs(models=[adapter, base])
        assert all(is_image(path) for path in embeddings.draw(found, tmp_path, number))


def distances(points: NDArray[np.floating]) -> NDArray[np.floating]:
    """[n, D] -> [n, n]."""
    return np.asarray(np.linalg.norm(points[:, None] - points[None], axis=2))


@pytest.mark.slow
def test_tsne_keeps_clusters_apart_and_is_the_same_twice() -> None:
    rng = np.random.default_rng(0)
    apart = np.concatenate([rng.normal(size=(20, 6)), rng.normal(size=(20, 6)) + 50]).astype(np.float32)
    spread = embeddings.project(apart, 0)
    assert np.array_equal(spread, embeddings.project(apart, 0))
    inside = max(distances(spread[:20]).max(), distances(spread[20:]).max())
    assert np.linalg.norm(spread[:20].mean(0) - spread[20:].mean(0)) > inside / 2

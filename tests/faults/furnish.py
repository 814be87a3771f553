"""What the scripts around the stages read: unfinished runs, a comparison of LLMs, pages, files to copy."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

import run_rq
from common.errors import InputError
from common.files import read_json, write_json
from data import embed_text
from data.knowledge_graph import KnowledgeGraph
from lora_training import compare_llm, lora_trainer, train_lora
from lora_training.steps import Step
from tables import run_ablations, run_llm_grid
from tests.conftest import arguments

SOURCE = {"train.txt": "a\tr\tb\n" * 40, "valid.txt": "b\tr\tc\n" * 5}
RECIPE = {"stage1": {"epoch": 3}}
FLAGS = """# a small run
--seq_len 3 --num_code 8 --num_quantizers 2 --code_dim 4
--init_dim 12 --gcn_dim 12 --gcn_layers 1 --att_head 2
--decoder distmult --batch 32 --lr 0.01 --device cpu
"""
PAGE = "# A page\n\nText.\n\n<!-- {} -->\n<!-- end -->\n\n" + 20 * "More text, so that no disk is too small.\n"


def told_graph(ring: Path, folder: Path) -> None:
    """The ring with every other file that a graph may have."""
    shutil.copytree(ring, folder)
    kg = KnowledgeGraph.load(ring)
    for name in ("entity2text.txt", "entity2definition.txt", "FB15k_mid2name.txt"):
        (folder / name).write_text("".join(f"{entity}\tthe {entity} of {name}\n" for entity in kg.entities))
    (folder / "relation2text.txt").write_text("".join(f"{relation}\tgoes {relation}\n" for relation in kg.relations))
    for split in ("valid", "test"):
        rows = kg.split(split).tolist()
        names = [(kg.entities[t], kg.relations[(r + 1) % 3], kg.entities[h]) for h, r, t in rows]
        (folder / f"{split}_neg.txt").write_text("".join("\t".join(row) + "\n" for row in names))


def half_embedded(folder: Path) -> None:
    """Two batches of embeddings by a tiny BERT, then an end."""
    from tests.test_embed_text import save_bert

    save_bert(folder / "bert")
    words = ["--dataset", folder / "data" / "ring", "--out", folder / "rows.npy", "--model", folder / "bert"]
    encode, calls = embed_text.ModelEncoder.encode, []

    def ending(self: embed_text.ModelEncoder, rows: list[int]) -> embed_text.Array:
        calls.append(rows)
        if len(calls) > 2:
            raise InputError("the end")
        return encode(self, rows)

    with (
        patch.object(embed_text.ModelEncoder, "encode", ending),
        arguments([*map(str, words), "--batch", "8", "--device", "cpu"]),
        pytest.raises(InputError, match="the end"),
    ):
        embed_text.main()


def half_tuned(folder: Path, words: list[str]) -> None:
    """A tuning of two steps that was killed while it wrote the second one's checkpoint."""
    write = lora_trainer.write_record

    def dying(value: object, path: Path) -> None:
        if path.parent.name == "checkpoint-2":
            raise KeyboardInterrupt
        write(value, path)

    with patch.object(lora_trainer, "write_record", dying), pytest.raises(KeyboardInterrupt):
        train_lora.main([*words, "--max_steps", "2"])
    shutil.rmtree(folder / "half" / "checkpoints" / "checkpoint-2")


def leave(steps: list[Step], marks: Path) -> None:
    """Marks and (empty) files of steps, as if each had ended well."""
    for step in steps:
        for path in step.made:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        write_json({"command": step.words, "seconds": 1.0}, marks / f"{step.name}.json")


def compared(folder: Path) -> None:
    """What every step of a comparison with one seed leaves, as far as its rows need it."""
    from tests.test_compare_llm import fill

    dataset, out = folder / "data" / "ring", folder / "comparison"
    kg, places = KnowledgeGraph.load(dataset), compare_llm.Places(out / "seed_0")
    write_json(RECIPE, folder / "recipe.json")
    recipe = compare_llm.read_recipe(folder / "recipe.json", quick=False)
    fill(kg, places)
    leave(compare_llm.seed_steps(kg, dataset, places.root / "ring_refit", places, recipe, 0), places.marks)
    compare_llm.main([
        "--dataset", str(dataset), "--out", str(out), "--seeds", "0", "--recipe", str(folder / "recipe.json"),
    ])  # fmt: skip


def gridded(folder: Path) -> None:
    """What every step of a grid with one cell leaves, as far as the command needs it."""
    dataset, out = folder / "data" / "ring", folder / "grid"
    chains = {
        out: [run_llm_grid.base_step(dataset, out, run_llm_grid.GRID, 0)],
        out / "2x8": run_llm_grid.cell_steps(dataset, out, 2, 8, run_llm_grid.TASKS, run_llm_grid.GRID, 0),
    }
    for place, steps in chains.items():
        leave(steps, place / "done")
    run_llm_grid.main(["--dataset", str(dataset), "--out", str(out), "--L", "2", "--K", "8"])


def ablated(out: Path, record: Path) -> None:
    """One finished run of the grid: the scores of ``record`` under the flags of that setting."""
    args = run_ablations.build_parser().parse_args([])
    words = run_ablations.command(args, run_ablations.grid(None)["4x4"], 0, out / "4x4_seed0")
    flags = run_rq.parse_config(words[1:]).as_plain()
    write_json(read_json(record, "record") | {"args": flags, "dataset": "FB15k-237"}, out / "4x4_seed0" / "run.json")


def furnish(folder: Path, codes: Path, tuning: list[str]) -> None:
    """Add all of it to the world. ``codes``: those of its stage 1. ``tuning``: flags of a LoRA into ``half``."""
    told_graph(folder / "data" / "ring", folder / "data" / "told")
    half_embedded(folder)
    half_tuned(folder, tuning)
    compared(folder)
    gridded(folder)
    ablated(folder / "ablations", codes.with_suffix(".json"))
    for name, mark in (("tables", "table 2"), ("levels", "levels")):
        (folder / f"{name}.md").write_text(PAGE.format(mark))
    (folder / "flags.txt").write_text(FLAGS)
    for where, content in (("source", "{}"), ("fetched/toy", "of an earlier day\n")):
        (folder / where).mkdir(parents=True)
        for name, text in SOURCE.items():
            (folder / where / name).write_text(content.format(text) if where == "source" else content)

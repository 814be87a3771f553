"""A grid of LLM runs over L and K on one graph, for figures 7 and 11 and Tables 8 to 10; resumed where it stopped.

    python tables/run_llm_grid.py --L 2 4 --K 64 256 --out lora_training/lora_outputs/grid
    python tables/run_llm_grid.py --L 2 --K 64 --out lora_training/lora_outputs/quick_grid --quick

Each cell is a chain of the stages' own commands: codes of that size, candidates, instruction data, LoRA on queries (or
triples) of the training split, answers to the test split. One small base model serves all cells, so that they differ in
the codes alone. Each step leaves a mark: the same command does only what is missing, and takes further sizes.

OUT/4x256/link_prediction holds inference_results.json and answers.jsonl of the cell L = 4, K = 256.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.instructions import split_path
from common.errors import CommandParser, run_command
from common.files import ROOT, exclusive_lock
from data.knowledge_graph import KnowledgeGraph
from lora_training.compare_llm import (
    RECIPE,
    RESULTS,
    Recipe,
    check_plan,
    export_step,
    flags,
    kg_splits,
    stage1_steps,
)
from lora_training.steps import Step, run_steps
from tables.rows import LINKS, TRIPLES

TASKS = (LINKS, TRIPLES)
MAKERS = {LINKS: "Class/gen_lp_data_rq.py", TRIPLES: "Class/gen_fb_data_rq.py"}
# flags of each stage; the sizes of the codes are the cell's
GRID: Recipe = {
    "stage1": RECIPE["stage1"] | {"epoch": 20},
    "base": RECIPE["base"] | {"prompt_words": 1},
    LINKS: {"from": "train", "num_candidates": 4, "limit": 1000},
    TRIPLES: {"neg_ratio": 1, "code_format": "compact", "limit": 1000},
    "tuning": {"learning_rate": 1e-3, "lora_r": 64, "lora_alpha": 64, "lora_dropout": 0, "epochs": 1, "batch_size": 8},
}
# it shows that every step runs, and its figures mean nothing
QUICK: Recipe = GRID | {
    "stage1": GRID["stage1"] | {"epoch": 4, "eval_every": 4},
    "base": GRID["base"] | {"width": 32, "layers": 2, "heads": 2, "epochs": 0.1},
    LINKS: GRID[LINKS] | {"limit": 48},
    TRIPLES: GRID[TRIPLES] | {"limit": 48},
}


def cell_folder(out: Path, length: int, size: int) -> Path:
    """Where the cell of L = ``length``, K = ``size`` has its files and marks."""
    return out / f"{length}x{size}"


def base_step(dataset: Path, out: Path, recipe: Recipe, seed: int) -> Step:
    """The one base model of all cells."""
    base = out / "tiny_base"
    words = ["lora_training/make_tiny_base.py", "--dataset", str(dataset), "--out", str(base), *flags(recipe["base"])]
    return Step("base", [*words, "--seed", str(seed)], [base / "config.json"])


def cell_steps(
    dataset: Path, out: Path, length: int, size: int, tasks: Sequence[str], recipe: Recipe, seed: int
) -> list[Step]:
    """Everything of one cell but the base, in order."""
    folder, sizes = cell_folder(out, length, size), {"seq_len": length, "num_code": size}
    train, ranking = stage1_steps("stage1", dataset, folder / "codes", recipe["stage1"] | sizes, seed)
    lists = {split: folder / "candidates" / f"{split}.npz" for split in kg_splits()}
    exports = [export_step(f"candidates_{split}", ranking, split, path) for split, path in lists.items()]
    codes, _, checkpoint = train.made
    steps = [train, *(exports if LINKS in tasks else [])]
    for task in tasks:
        place = folder / task
        rows = place / "data" / task
        data = [MAKERS[task], "--dataset", str(dataset), "--codes", str(codes), "--out_dir", str(place / "data")]
        data += [*flags(recipe[task]), "--seed", str(seed)]
        data += ["--candidates", *map(str, lists.values())] if task == LINKS else ["--task_only"]
        tune = ["lora_training/train_lora.py", "--model_name", str(out / "tiny_base"), "--output_dir", str(place)]
        tune += ["--train_data", str(split_path(rows, "train")), "--val_data", str(split_path(rows, "validation"))]
        tune += [*flags(recipe["tuning"]), "--seed", str(seed), "--code_init", str(checkpoint)]
        answer = ["lora_training/inference.py", "--lora_adapter", str(place / "lora_adapters"), "--overwrite"]
        answer += ["--test_data", str(split_path(rows, "test")), "--output", str(place / RESULTS)]
        steps += [
            Step(f"{task}_data", data, [split_path(rows, "train"), split_path(rows, "test")]),
            Step(f"{task}_tuning", tune, [place / "lora_adapters" / "run_record.json"], place / "checkpoints"),
            Step(f"{task}_answers", answer, [place / RESULTS]),
        ]
    return steps


# ---------------------------------------------------------------- the command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/run_llm_grid.py", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", type=Path, default=ROOT / "data" / "family", metavar="DIR", help="graph folder")
    parser.add_argument("--L", type=int, nargs="+", default=[2, 4], metavar="N", help="code positions per entity")
    parser.add_argument("--K", type=int, nargs="+", default=[64, 256], metavar="N", help="codes per codebook")
    parser.add_argument(
        "--task", nargs="+", choices=TASKS, default=list(TASKS), help="figure 7's, figure 11's, or both"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets everything; goes on where it is")
    parser.add_argument("--seed", type=int, default=0, help="of every step")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that every step runs")
    args = parser.parse_args(argv)
    for name, values, least in (("L", args.L, 1), ("K", args.K, 2), ("seed", [args.seed], 0)):
        if min(values) < least or len(set(values)) < len(values):
            parser.error(f"--{name} must be different numbers, {least} or more, got {' '.join(map(str, values))}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    recipe = QUICK if args.quick else GRID
    dataset, out = args.dataset.resolve(), args.out.resolve()
    plan: dict[str, Any] = {"data set": KnowledgeGraph.load(dataset).input_hashes, "recipe": recipe, "seed": args.seed}
    tasks = [task for task in TASKS if task in args.task]
    with exclusive_lock(out.with_name(f"{out.name}.lock"), "--out"):
        check_plan(out, plan)
        run_steps([base_step(dataset, out, recipe, args.seed)], out / "done", "all cells")
        for length in args.L:
            for size in args.K:
                steps = cell_steps(dataset, out, length, size, tasks, recipe, args.seed)
                run_steps(steps, cell_folder(out, length, size) / "done", f"L {length}, K {size}")
    numbers = " ".join(number for number, task in (("7", LINKS), ("11", TRIPLES)) if task in tasks)
    print(f"next: python tables/make_figures.py --figure {numbers} --records {args.out}")
    answers = cell_folder(args.out, max(args.L), max(args.K)) / tasks[0] / "answers.jsonl"
    print(f"next: python tables/case_studies.py --answers {answers}")


if __name__ == "__main__":
    run_command(main)

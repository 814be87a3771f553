"""Every stage on the bundled graph, through the stages' own commands: `python demo_complete.py`.

Trains and dumps codes, ranks from the dumped integers alone, shuffles them and ranks again (the control), turns the
codes into instruction data, tunes a small LLM on them, lets it answer test queries, and draws figures. Each step prints
its command and its files; the table at the end and PROJECT_SUMMARY.md are made from the records of the steps.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import CommandParser, run_command
from common.files import ROOT, read_json, write_json, write_text
from common.record import make_record
from common.steps import Step, run_steps

GRAPH = "data/family"
STEM = "family_4_256_4_rq"
TASK, PREDICTED = "link_prediction", "tail_prediction"
SUMMARY, RECORD = "PROJECT_SUMMARY.md", "demo.json"
RANKED, SHUFFLED = "ranked.json", "ranked_shuffled.json"
COLUMNS = {"mrr": "MRR", "hits@1": "Hits@1", "hits@3": "Hits@3", "hits@10": "Hits@10"}
CANDIDATES = 8  # per query of the LLM


class Size(NamedTuple):
    """The flags in which the demo and its quick form differ."""

    stage1: str
    rows: int  # of the LLM's training data
    base: str
    tuning: str
    figures: str


FULL = Size(
    stage1="--epoch 40 --eval_every 5",
    rows=24_000,
    base="--epochs 1",
    tuning="--epochs 1",
    figures="2 4 6 8 10 levels",
)
QUICK = FULL._replace(
    stage1="--epoch 8 --eval_every 8 --encoder_every 8", rows=320, base="--epochs 0.3", figures="6 10 levels"
)
STAGE1 = (
    "--config /dev/null --seq_len 4 --num_code 256 --num_quantizers 4 --decoder distmult --lr 0.005 --batch 256 "
    "--encoder_every 2"
)
BASE = "--width 64 --layers 2 --heads 4 --vocab_size 1600 --block 192 --batch 16 --lr 0.003"
LORA = (
    "--batch_size 32 --learning_rate 0.002 --rows_lr 0.006 --adam_beta2 0.99 --lora_r 64 --lora_alpha 64 "
    "--lora_dropout 0 --logging_steps 100 --eval_batch_size 128 --overwrite"
)


def steps(out: Path, size: Size) -> list[Step]:
    """Everything in order; every file goes below ``out``."""
    codes, checkpoint = out / f"{STEM}.pt", out / "checkpoints" / f"{STEM}.pt"
    rows, predicted = out / "lora_data" / TASK, out / "lora_data" / PREDICTED
    base, tuned = out / "tiny_base", out / "lora_outputs"
    adapter, answers, figures = tuned / "lora_adapters", out / "inference_results.json", out / "figures"

    def step(name: str, script: str, *parts: str | Path, made: Sequence[Path] = ()) -> Step:
        words = [word for part in parts for word in (shlex.split(part) if isinstance(part, str) else [str(part)])]
        return Step(name, [script, *words], [ROOT / path for path in made])

    stage1 = ("run_rq.py", f"--dataset {GRAPH}")
    ranking = (*stage1, "--eval_codes", codes, "--checkpoint", checkpoint)
    lists = {split: out / "candidates" / f"{split}.npz" for split in ("train", "valid", "test")}
    exports = [
        step(f"export stage 1's candidates for the queries of {split}",
             *ranking, f"--split {split} --export_candidates", path, made=[path])
        for split, path in lists.items()
    ]  # fmt: skip
    return [
        step("train RQGCN on the family graph, dump the codes of its 1,000 people and rank from the dump",
             *stage1, STAGE1, size.stage1, "--out_dir", out, "--checkpoint_dir", checkpoint.parent, "--overwrite",
             made=[codes, codes.with_suffix(".json"), checkpoint]),
        step("rank the test split from the dumped integers alone, without an encoder",
             *ranking, "--metrics_out", out / RANKED, made=[out / RANKED]),
        step("control: give every entity the codes of another one and rank again",
             *ranking, "--shuffle_codes --metrics_out", out / SHUFFLED, made=[out / SHUFFLED]),
        step("predict one tail from the codes", *ranking, "--predict ada_ashley mother --top 3"),
        *exports,
        step(f"write instruction data: queries with {CANDIDATES} candidates in random order, and queries without",
             "Class/gen_lp_data_rq.py", "--codes", codes, f"--dataset {GRAPH} --candidates", *lists.values(),
             "--from train --code_format compact", f"--num_candidates {CANDIDATES}",
             f"--without_lists --limit {size.rows} --out_dir", out / "lora_data",
             made=[predicted / "train.json", predicted / "validation.json", rows / "test_tasks.json"]),
        step("check the instruction data for leaks", "Class/check_leaks.py", out / "lora_data"),
        step("pretrain a small LLM on the training split in words (on a GPU: LLaMA2 instead)",
             "lora_training/make_tiny_base.py", f"--dataset {GRAPH} --out", base, BASE, size.base, made=[base]),
        step("LoRA: train the codes' tokens and the answer to a query, which is the codes of its tail",
             "lora_training/train_lora.py", "--model_name", base, "--train_data", predicted / "train.json",
             "--val_data", predicted / "validation.json", "--output_dir", tuned, "--code_init", checkpoint, LORA,
             size.tuning, made=[adapter]),
        step("let it answer the test queries",
             "lora_training/inference.py", "--decode likelihood --lora_adapter", adapter, "--test_data",
             rows / "test_tasks.json", "--output", answers, "--overwrite", made=[answers, out / "answers.jsonl"]),
        step("score its answers",
             "lora_training/score_answers.py", "--answers", out / "answers.jsonl", "--output", out / "answered.json",
             made=[out / "answered.json"]),
        step("draw figures of the codes and of the training",
             "tables/make_figures.py", "--codes", codes, "--records", out, f"--dataset {GRAPH} --model", adapter,
             "--out", figures, f"--figure {size.figures}", made=[figures]),
    ]  # fmt: skip


# ---------------------------------------------------------------- the table


class Line(NamedTuple):
    """One line of the table: metrics and the file below the output folder that they come from."""

    label: str
    metrics: dict[str, Any]
    path: str


def table(out: Path) -> list[Line]:
    """The lines of the table, from the files that the steps wrote below ``out``."""
    answered = read_json(out / "answered.json", "metrics")["metrics"][TASK]["test"]
    return [
        Line("stage 1, recorded at the dump", read_json(out / f"{STEM}.json", "record")["test"], f"{STEM}.json"),
        Line("the dumped integers alone", read_json(out / RANKED, "metrics"), RANKED),
        Line("shuffled codes (control)", read_json(out / SHUFFLED, "metrics"), SHUFFLED),
        Line(f"the LLM, among {CANDIDATES} candidates", answered, "answered.json"),
        Line(f"the {CANDIDATES} candidates in their random order", answered["as_listed"], "answered.json"),
    ]


def fault(lines: Sequence[Line]) -> str | None:
    """Why the results are wrong: the integers must give the recorded score, shuffled ones must not."""
    recorded, again, shuffled = (line.metrics for line in lines[:3])
    if any(abs(recorded[name] - again[name]) > 1e-6 for name in COLUMNS):
        return f"the dumped integers give MRR {again['mrr']:.4f}, {recorded['mrr']:.4f} was recorded"
    if shuffled["mrr"] > 0.1 * recorded["mrr"]:
        return f"shuffled codes still give MRR {shuffled['mrr']:.4f}: the score does not come from the codes"
    return None


def cells(line: Line) -> list[str]:
    """The line's numbers as text."""
    return [f"{line.metrics[name]:.3f}" for name in COLUMNS]


def printed(lines: Sequence[Line]) -> str:
    """The table for a terminal."""
    heads = f"{'test split of the family graph':46}" + "".join(f"{name:>10}" for name in COLUMNS.values())
    return "\n".join([heads, *(f"{line.label:46}" + "".join(f"{cell:>10}" for cell in cells(line)) for line in lines)])


def summary(lines: Sequence[Line], plan: Sequence[Step], record: dict[str, Any]) -> str:
    """PROJECT_SUMMARY.md: the table, the steps with their seconds and files, all commands."""
    rows = [f"| {line.label} | {' | '.join(cells(line))} | `{line.path}` |" for line in lines]
    taken = [
        f"| {step.name} | {record['seconds'][step.name]:.0f} | {', '.join(f'`{path.name}`' for path in step.outputs)} |"
        for step in plan
    ]
    commands = [f"    python {shlex.join(step.words)}" for step in plan]
    return "\n".join([
        "# Codes of the family graph, and a small LLM that reads them", "",
        f"Written by `{record['command']}` on {record['finished']}: commit {record['git_commit']}, {record['device']}, "
        f"{record['wall_seconds']:.0f} s. Every number comes from the file beside it.", "",
        f"| test split | {' | '.join(COLUMNS.values())} | from |", "|---|---:|---:|---:|---:|---|", *rows, "",
        f"Filtered ranks, both directions, over all entities; the LLM ranks {CANDIDATES} candidates by the likelihood "
        "of their codes.", "",
        "| step | seconds | wrote |", "|---|---:|---|", *taken, "",
        "The commands, from the repository root:", "", *commands, "",
        "The LLM is a LLaMA of a few hundred thousand parameters: it shows that every step runs, not what a large LLM "
        "gains from codes. README.md has the commands for your own graph and for LLaMA2.",
        "",
    ])  # fmt: skip


def main() -> int:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out_dir", type=Path, default=Path("demo_output"), help="folder for all files of the demo")
    parser.add_argument("--quick", action="store_true", help="fewer epochs, rows and figures: shows that all steps run")
    args = parser.parse_args()
    out = args.out_dir.resolve()
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out  # the steps run in the repository
    started = time.monotonic()
    plan = steps(out, QUICK if args.quick else FULL)
    seconds = run_steps(plan)
    lines = table(ROOT / out)
    record = make_record(vars(args) | {"seed": 0}, {}, time.monotonic() - started, seconds=seconds)
    write_json(record, ROOT / out / RECORD)
    write_text(summary(lines, plan, record), ROOT / out / SUMMARY)
    print(f"\n{printed(lines)}")
    problem = fault(lines)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print(f"the integers alone give the recorded score ({record['wall_seconds']:.0f} s)")
    print(f"wrote {out / SUMMARY}, figures in {out / 'figures'}, all other files in {out}")
    print("next: python data/download.py FB15k-237 && python run_rq.py --dataset data/FB15k-237")
    return 0


if __name__ == "__main__":
    run_command(main)

"""Every stage on the bundled graph, through the stages' own commands: `python demo_complete.py`.

Trains, dumps the codes, ranks from the dumped integers alone, shuffles them and ranks again (the control), turns the
codes into instruction data, teaches them to a small LLM made on the spot, has it predict the answers of test queries,
and draws figures. Each step prints what it did, what it wrote and the command that does the same alone; the table at
the end and PROJECT_SUMMARY.md are read off what the steps recorded.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import CommandParser, InputError, run_command
from common.files import ROOT, read_json, write_json, write_text
from common.record import make_record

GRAPH = "data/family"
STEM = "family_4_256_4_rq"
TASK, PREDICTED = "link_prediction", "tail_prediction"
SUMMARY, RECORD = "PROJECT_SUMMARY.md", "demo.json"
COLUMNS = {"mrr": "MRR", "hits@1": "Hits@1", "hits@3": "Hits@3", "hits@10": "Hits@10"}
CANDIDATES = 8  # among which the answer is to be found


class Size(NamedTuple):
    """The flags in which the demo and its quick form differ."""

    stage1: str
    rows: int  # that the LLM learns from
    base: str
    tuning: str
    figures: str


FULL = Size(
    stage1="--epoch 40 --eval_every 5",
    rows=24_000,
    base="--epochs 1",
    tuning="--epochs 1",
    figures="2 4 6 8 10 levels tokens usage",
)
QUICK = FULL._replace(stage1="--epoch 12 --eval_every 6", rows=320, base="--epochs 0.3", figures="6 10 levels usage")
STAGE1 = (
    "--config /dev/null --seq_len 4 --num_code 256 --num_quantizers 4 --decoder distmult --lr 0.005 --batch 256 "
    "--encoder_every 2"
)
BASE = (
    "--width 64 --layers 2 --heads 4 --vocab_size 1600 --block 192 --batch 16 --lr 0.003 --prompt_tokens "
    "--init_std 0.125 --attention_std 0.0125"
)
LORA = (
    "--batch_size 32 --learning_rate 0.002 --adam_beta2 0.99 --lora_r 64 --lora_alpha 64 --lora_dropout 0 "
    "--logging_steps 100 --eval_batch_size 128 --overwrite"
)


class Step(NamedTuple):
    """A command of another script."""

    does: str
    words: list[str]  # the script, then its flags
    made: list[Path]  # what it leaves


def steps(out: Path, size: Size) -> list[Step]:
    """Everything in order; every file goes below ``out``."""
    codes, checkpoint = out / f"{STEM}.pt", out / "checkpoints" / f"{STEM}.pt"
    data, asked = out / "lora_data" / TASK, out / "lora_data" / PREDICTED
    base, tuned = out / "tiny_base", out / "lora_outputs"
    adapter, answers, figures = tuned / "lora_adapters", out / "inference_results.json", out / "figures"

    def step(does: str, script: str, *parts: str | Path, made: Sequence[Path] = ()) -> Step:
        words = [word for part in parts for word in (shlex.split(part) if isinstance(part, str) else [str(part)])]
        return Step(does, [script, *words], list(made))

    stage1 = ("run_rq.py", f"--dataset {GRAPH}")
    ranking = (*stage1, "--eval_codes", codes, "--checkpoint", checkpoint)
    lists = {split: out / "candidates" / f"{split}.npz" for split in ("train", "valid", "test")}
    exports = [
        step(f"list stage 1's candidates for the queries of {split}",
             *ranking, f"--split {split} --export_candidates", path, made=[path])
        for split, path in lists.items()
    ]  # fmt: skip
    return [
        step("train RQGCN on the family graph, dump the codes of its 1,000 people and score the dump",
             *stage1, STAGE1, size.stage1, "--out_dir", out, "--checkpoint_dir", checkpoint.parent, "--overwrite",
             made=[codes, codes.with_suffix(".json"), checkpoint]),
        step("rank the test split from the dumped integers alone: no encoder is built",
             *ranking, "--out_dir", out / "ranked", made=[out / "ranked" / f"{STEM}_test.json"]),
        step("the control: give every entity the codes of another one and rank again",
             *ranking, "--shuffle_codes --out_dir", out / "ranked",
             made=[out / "ranked" / f"{STEM}_test_shuffled.json"]),
        step("ask a question of the codes", *ranking, "--predict ada_ashley mother --top 3"),
        *exports,
        step(f"turn codes and candidates into questions: whose codes complete it, of {CANDIDATES} listed at random?",
             "Class/gen_lp_data_rq.py", "--codes", codes, f"--dataset {GRAPH} --candidates", *lists.values(),
             "--from train --candidate_order shuffled --code_format compact", f"--num_candidates {CANDIDATES}",
             f"--predict --limit {size.rows} --out_dir", out / "lora_data",
             made=[asked / "train.json", asked / "validation.json", data / "test_tasks.json"]),
        step("look for leaks in it", "Class/check_leaks.py", out / "lora_data"),
        step("make a small LLM from what the training split says in words (LLaMA2 takes its place on a GPU)",
             "lora_training/make_tiny_base.py", f"--dataset {GRAPH} --out", base, BASE, size.base, made=[base]),
        step("LoRA: teach it the codes as tokens, and to answer a query with those of its tail",
             "lora_training/train_lora.py", "--model_name", base, "--train_data", asked / "train.json", "--val_data",
             asked / "validation.json", "--output_dir", tuned, "--code_init", checkpoint, LORA, size.tuning,
             made=[adapter]),
        step("have it predict the answers of the test queries",
             "lora_training/inference.py", "--decode likelihood --lora_adapter", adapter, "--test_data",
             data / "test_tasks.json", "--output", answers, "--overwrite", made=[answers, out / "answers.jsonl"]),
        step("score its answers, from the answers alone",
             "lora_training/score_answers.py", "--answers", out / "answers.jsonl", "--output", out / "answered.json",
             made=[out / "answered.json"]),
        step("draw figures of the codes and of the training",
             "tables/make_figures.py", "--codes", codes, "--records", out, f"--dataset {GRAPH} --model", adapter,
             "--out", figures, f"--figure {size.figures}", made=[figures]),
    ]  # fmt: skip


def run(step: Step, place: str) -> float:
    """Run a step in a process of its own; returns its seconds. InputError where it fails."""
    print(f"\n[{place}] {step.does}\n$ python {shlex.join(step.words)}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, *step.words], cwd=ROOT, check=False).returncode
    if code:
        raise InputError(f"step {place} ended with exit code {code}; see above, and run its command alone")
    seconds = time.monotonic() - started
    wrote = ", ".join(map(str, step.made))
    print(f"[{place}] done in {seconds:.0f} s{': wrote ' if wrote else ''}{wrote}", flush=True)
    return seconds


# ---------------------------------------------------------------- what came out


class Line(NamedTuple):
    """One line of the table: what was measured, and the file below the output folder that says so."""

    label: str
    metrics: dict[str, Any]
    path: str


def table(out: Path) -> list[Line]:
    """The lines of the table, from the files that the steps left below ``out``."""
    answered = read_json(out / "answered.json", "metrics")["metrics"][TASK]["test"]
    return [
        Line("stage 1, recorded at the dump", read_json(out / f"{STEM}.json", "record")["test"], f"{STEM}.json"),
        Line("the dumped integers alone", read_json(out / "from_codes.json", "metrics"), "from_codes.json"),
        Line("shuffled codes (control)", read_json(out / "shuffled.json", "metrics"), "shuffled.json"),
        Line(f"the LLM, by its prediction, among {CANDIDATES}", answered, "answered.json"),
        Line(f"those {CANDIDATES} as listed, at random (control)", answered["as_listed"], "answered.json"),
    ]


def fault(lines: Sequence[Line]) -> str | None:
    """Why the table does not show what it should: the integers carry the score, and other integers do not."""
    recorded, again, shuffled = (line.metrics for line in lines[:3])
    if any(abs(recorded[name] - again[name]) > 1e-6 for name in ("mrr", "hits@1", "hits@3", "hits@10")):
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


def summary(lines: Sequence[Line], done: Sequence[tuple[Step, float]], record: dict[str, Any]) -> str:
    """PROJECT_SUMMARY.md: the table, the steps with their commands, seconds and files, where to go from here."""
    rows = [f"| {line.label} | {' | '.join(cells(line))} | `{line.path}` |" for line in lines]
    taken = [
        f"| {step.does} | {seconds:.0f} | {', '.join(f'`{path.name}`' for path in step.made)} |"
        for step, seconds in done
    ]
    commands = [f"    python {shlex.join(step.words)}" for step, _ in done]
    return "\n".join([
        "# Codes of the family graph, and a small LLM that reads them", "",
        f"Written by `{record['command']}` on {record['finished']}: commit {record['git_commit']}, {record['device']}, "
        f"{record['wall_seconds']:.0f} s. Every number is read off the file beside it.", "",
        f"| test split | {' | '.join(COLUMNS.values())} | from |", "|---|---:|---:|---:|---:|---|", *rows, "",
        f"Filtered ranks, both directions, over all entities; the LLM's are of {CANDIDATES} candidates, by how likely "
        "their codes are as its answer.", "",
        "| step | seconds | wrote |", "|---|---:|---|", *taken, "",
        "Each step alone, from the repository root:", "", *commands, "",
        "The LLM is a LLaMA of a few hundred thousand parameters: it shows that every step runs, not what codes bring "
        'a large one. Next in README.md: "Stage 1" for a graph of your own, "Instruction data -> LoRA -> answers" for '
        "LLaMA2.",
        "",
    ])  # fmt: skip


def main() -> int:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out_dir", type=Path, default=Path("demo_output"), help="folder for everything the demo writes"
    )
    parser.add_argument("--quick", action="store_true", help="fewer epochs, rows and figures: shows that all steps run")
    args = parser.parse_args()
    out = args.out_dir.resolve()
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out  # the steps run in the repository
    started, done = time.monotonic(), []
    plan = steps(out, QUICK if args.quick else FULL)
    for number, step in enumerate(plan, start=1):
        done.append((step, run(step, f"{number}/{len(plan)}")))
    lines = table(ROOT / out)
    record = make_record(
        vars(args) | {"seed": 0}, {}, time.monotonic() - started,
        seconds={step.does: round(seconds, 1) for step, seconds in done},
    )  # fmt: skip
    write_json(record, ROOT / out / RECORD)
    write_text(summary(lines, done, record), ROOT / out / SUMMARY)
    print(f"\n{printed(lines)}")
    problem = fault(lines)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print(f"the integers alone carry the graph ({record['wall_seconds']:.0f} s)")
    print(f"wrote {out / SUMMARY}, figures in {out / 'figures'}, everything else in {out}")
    print("next: python data/download.py FB15k-237 && python run_rq.py --dataset data/FB15k-237")
    return 0


if __name__ == "__main__":
    run_command(main)

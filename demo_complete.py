"""Every stage on the bundled graph, through the stages' own commands: `python demo_complete.py`.

Trains and dumps codes, ranks from the dumped integers alone, shuffles them and ranks again (the control), turns codes
into instruction data, tunes a small LLM on them, lets it answer test queries, and draws figures. The LLM is tuned
twice: with the codes, and with every entity given the codes of another one (the control). Each step prints its command
and its files; the table at the end is made from the records of the steps.

The LLM has shorter codes, from a stage-1 run of their own: a model of this size learns 2 codes per entity in a minute,
16 take much longer. Candidates come from the first run, as in the paper.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import CommandParser, run_command
from common.files import ROOT, read_json, write_json
from common.record import make_record
from common.steps import Step, run_steps

GRAPH = "data/family"
STEM = "family_4_256_4_rq"
TASK, PREDICTED = "link_prediction", "tail_prediction"
RECORD = "demo.json"
RANKED, SHUFFLED, ANSWERED = "ranked.json", "ranked_shuffled.json", "answered.json"
RESULTS = "inference_results.json"
COLUMNS = {"mrr": "MRR", "hits@1": "Hits@1", "hits@3": "Hits@3", "hits@10": "Hits@10"}
LLM_STEM = "family_1_128_2_rq"
CANDIDATES = 20  # per query of the LLM


class Size(NamedTuple):
    """The flags in which the demo and its quick form differ."""

    stage1: str
    llm_codes: str
    rows: int  # of the LLM's training data
    test_rows: int  # queries that each LLM answers
    base: str
    tuning: str
    figures: str


FULL = Size(
    stage1="--epoch 40 --eval_every 5",
    llm_codes="--epoch 24 --eval_every 24",
    rows=24_000,
    test_rows=500,
    base="--epochs 0.3",
    tuning="--epochs 2",
    figures="2 4 6 8 10 levels",
)
QUICK = FULL._replace(
    stage1="--epoch 8 --eval_every 8 --encoder_every 8", llm_codes="--epoch 2 --eval_every 2 --freeze_at 1", rows=320,
    test_rows=100, figures="6 10 levels",
)  # fmt: skip
STAGE1 = "--config /dev/null --decoder distmult --lr 0.005 --batch 256"
CODES = "--seq_len 4 --num_code 256 --num_quantizers 4 --encoder_every 2"
LLM_CODES = "--seq_len 1 --num_code 128 --num_quantizers 2 --code_dim 128 --encoder_every 2"
BASE = "--overwrite --width 64 --layers 2 --heads 4 --vocab_size 1600 --block 192 --batch 16 --lr 0.003"
LORA = (
    "--batch_size 64 --learning_rate 0.004 --rows_lr 0.012 --adam_beta2 0.99 --lora_r 64 --lora_alpha 64 "
    "--lora_dropout 0 --logging_steps 100 --eval_batch_size 128 --overwrite"
)
WITH, OTHER = "with_codes", "shuffled_codes"  # variants of the LLM, and their folders
VARIANTS = {WITH: "", OTHER: "--shuffle_codes"}  # flag of their data


def step(name: str, script: str, *parts: str | Path, made: Sequence[Path] = ()) -> Step:
    """A step whose words are those of ``parts``; a path is one word."""
    words = [word for part in parts for word in (shlex.split(part) if isinstance(part, str) else [str(part)])]
    return Step(name, [script, *words], [ROOT / path for path in made])


def steps(out: Path, size: Size) -> list[Step]:
    """Everything in order; every file goes below ``out``."""
    codes, checkpoint, figures = out / f"{STEM}.pt", out / "checkpoints" / f"{STEM}.pt", out / "figures"
    stage1 = ("run_rq.py", f"--dataset {GRAPH}")
    ranking = (*stage1, "--eval_codes", codes, "--checkpoint", checkpoint)
    lists = [out / "candidates" / f"{split}.npz" for split in ("train", "valid", "test")]
    return [
        step("train RQGCN on the family graph, dump the codes of its 1,000 people and rank from the dump",
             *stage1, STAGE1, CODES, size.stage1, "--out_dir", out, "--checkpoint_dir", checkpoint.parent,
             "--overwrite", made=[codes, codes.with_suffix(".json"), checkpoint]),
        step("rank the test split from the dumped integers alone, without an encoder",
             *ranking, "--metrics_out", out / RANKED, made=[out / RANKED]),
        step("control: give every entity the codes of another one and rank again",
             *ranking, "--shuffle_codes --metrics_out", out / SHUFFLED, made=[out / SHUFFLED]),
        step("predict one tail from the codes", *ranking, "--predict ada_ashley mother --top 3"),
        *(step(f"export stage 1's candidates for the queries of {path.stem}",
               *ranking, f"--split {path.stem} --export_candidates", path, made=[path]) for path in lists),
        *llm_steps(out, size, lists),
        step("draw figures of the codes and of the training",
             "tables/make_figures.py", "--codes", codes, "--records", out, f"--dataset {GRAPH} --model",
             out / WITH / "lora_outputs" / "lora_adapters", "--out", figures, f"--figure {size.figures}",
             made=[figures]),
    ]  # fmt: skip


def llm_steps(out: Path, size: Size, lists: Sequence[Path]) -> list[Step]:
    """Codes and base model of the LLM, then data, tuning and answers of each variant. ``lists``: candidates."""
    stage1, base = out / "llm_codes", out / "tiny_base"  # a folder of their own: "the newest codes" stay the first
    codes, checkpoint = stage1 / f"{LLM_STEM}.pt", stage1 / "checkpoints" / f"{LLM_STEM}.pt"

    def data(name: str) -> Step:
        folder = out / name / "lora_data"
        return step(f"write instruction data, {name}: queries with {CANDIDATES} candidates, and queries alone",
                    "Class/gen_lp_data_rq.py", "--codes", codes, f"--dataset {GRAPH} --candidates", *lists,
                    f"--from train --num_candidates {CANDIDATES} --without_lists --limit {size.rows}",
                    VARIANTS[name], "--out_dir", folder,
                    made=[folder / PREDICTED / "train.json", folder / TASK / "test_tasks.json"])  # fmt: skip

    def tuning(name: str) -> list[Step]:
        folder, adapter = out / name / "lora_data", out / name / "lora_outputs" / "lora_adapters"
        return [
            step(f"LoRA, {name}: train the codes' tokens and the answer to a query, which is the codes of its tail",
                 "lora_training/train_lora.py", "--model_name", base, "--train_data", folder / PREDICTED / "train.json",
                 "--val_data", folder / PREDICTED / "validation.json", "--output_dir", adapter.parent, "--code_init",
                 checkpoint, LORA, size.tuning, made=[adapter]),
            step(f"let it answer test queries, {name}",
                 "lora_training/inference.py", "--decode likelihood --lora_adapter", adapter, "--test_data",
                 folder / TASK / "test_tasks.json", f"--limit {size.test_rows} --output", out / name / RESULTS,
                 "--overwrite", made=[out / name / RESULTS, out / name / "answers.jsonl"]),
        ]  # fmt: skip

    return [
        step("learn shorter codes for the LLM: 1 x 2 of 128",
             "run_rq.py", f"--dataset {GRAPH}", STAGE1, LLM_CODES, size.llm_codes, "--out_dir", stage1,
             "--checkpoint_dir", checkpoint.parent, "--overwrite", made=[codes, checkpoint]),
        *map(data, VARIANTS),
        step("check the instruction data for leaks", "Class/check_leaks.py", out / WITH / "lora_data"),
        step("pretrain a small LLM on the training split in words (on a GPU: LLaMA2 instead)",
             "lora_training/make_tiny_base.py", f"--dataset {GRAPH} --out", base, BASE, size.base, made=[base]),
        *(one for name in VARIANTS for one in tuning(name)),
        step("score both, and the difference that the codes make",
             "lora_training/score_answers.py", "--answers", out / WITH / "answers.jsonl", "--against",
             out / OTHER / "answers.jsonl", "--output", out / ANSWERED, made=[out / ANSWERED]),
    ]  # fmt: skip


# ---------------------------------------------------------------- the table


class Line(NamedTuple):
    """One line of the table."""

    label: str
    metrics: dict[str, Any]


def table(out: Path) -> list[Line]:
    """The lines of the table, from the files that the steps wrote below ``out``."""
    found = {name: read_json(out / name / RESULTS, "answers' record")["metrics"][TASK]["test"] for name in VARIANTS}
    return [
        Line("stage 1, recorded at the dump", read_json(out / f"{STEM}.json", "record")["test"]),
        Line("the dumped integers alone", read_json(out / RANKED, "metrics")),
        Line("shuffled codes (control)", read_json(out / SHUFFLED, "metrics")),
        Line(f"LLM with codes, among {CANDIDATES} candidates", found[WITH]),
        Line("LLM with shuffled codes (control)", found[OTHER]),
        Line(f"the {CANDIDATES} candidates in their random order", found[WITH]["as_listed"]),
    ]


def gain(out: Path) -> str:
    """The difference of the two LLMs on the same queries, as score_answers.py computed it."""
    (compared,) = read_json(out / ANSWERED, "metrics")["against"].values()
    found = next(line for line in compared["differences"] if line["task_type"] == TASK and line["split"] == "test")
    return f"{found['mean']:+.3f} (standard error {found['error']:.3f}, {found['queries']} queries)"


def fault(lines: Sequence[Line]) -> str | None:
    """Why the results are wrong: the integers must give the recorded score, shuffled ones must not."""
    recorded, again, shuffled = (line.metrics for line in lines[:3])
    if any(abs(recorded[name] - again[name]) > 1e-6 for name in COLUMNS):
        return f"the dumped integers give MRR {again['mrr']:.4f}, {recorded['mrr']:.4f} was recorded"
    if shuffled["mrr"] > 0.1 * recorded["mrr"]:
        return f"shuffled codes still give MRR {shuffled['mrr']:.4f}: the score does not come from the codes"
    return None


def printed(lines: Sequence[Line]) -> str:
    """The table for a terminal."""
    heads = f"{'test split of the family graph':46}" + "".join(f"{name:>10}" for name in COLUMNS.values())
    rows = [f"{line.label:46}" + "".join(f"{line.metrics[name]:10.3f}" for name in COLUMNS) for line in lines]
    return "\n".join([heads, *rows])


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
    gained = gain(ROOT / out)
    print(f"\n{printed(lines)}")
    print(f"MRR of the LLM with codes minus that with shuffled codes: {gained}")
    problem = fault(lines)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print(f"the integers alone give the recorded score ({record['wall_seconds']:.0f} s)")
    print(f"figures are in {out / 'figures'}, all other files in {out}")
    print("next: python data/download.py FB15k-237 && python run_rq.py --dataset data/FB15k-237")
    return 0


if __name__ == "__main__":
    run_command(main)

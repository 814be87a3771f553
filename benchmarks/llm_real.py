"""Do codes help a pretrained LLM? With codes, without codes, shuffled codes: equal rows, steps and seeds.

    python benchmarks/llm_real.py --dataset data/FB15k-237N --codes C.pt --code_init ROWS.pt --model_name DIR --out OUT
    python benchmarks/llm_real.py --dataset data/FB15k-237 --codes C.pt --code_init ROWS.pt --model_name DIR --out OUT \
        --candidates train.npz valid.npz test.npz

ROWS.pt: lora_training/word_rows.py. Without --candidates: triple classification (accuracy), with the short prompt; with
them: link prediction over 20 listed candidates (MRR). Each step is a command of another script with a mark in OUT/done.
After --limit_s the running step is stopped with its checkpoint, and the same command continues: nine-minute parts suit
machines that end longer commands. All three variants take the same number of rows per step: as many as have
--step_tokens tokens with codes. bfloat16 on a GPU.

OUT/llm_real.json gets the metrics of each seed, the validation losses over tokens, and the paired differences of the
LLM with codes with their standard errors over test queries.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import os
import signal
import threading
import time
from functools import partial
from itertools import islice
from typing import Any

from Class import gen_fb_data_rq, gen_lp_data_rq
from Class.candidates import need_candidates
from Class.rows import read_rows, split_path
from common.errors import CommandParser, InputError, at_least, content_of, run_command
from common.files import exclusive_lock, output_folder, read_json, sha256_file, write_json
from common.record import make_record
from common.steps import Step, run_steps
from lora_training.adapters import RECORD
from lora_training.compare_llm import REPEAT, RESULTS, VARIANTS, WITH, WITHOUT, Variant, flags, resume_tuning
from lora_training.score_answers import by_task, paired, values_by_query

CURVE = ("tokens_per_row", "steps", "before_training", "history")  # of the adapter's record
METRIC = {gen_fb_data_rq.TASK: "accuracy", gen_lp_data_rq.TASK: "mrr"}


def task_of(args: argparse.Namespace) -> str:
    return gen_lp_data_rq.TASK if args.candidates else gen_fb_data_rq.TASK


def folder_of(args: argparse.Namespace, variant: Variant, seed: int) -> Path:
    """Where the steps of one variant and seed write."""
    return Path(args.out.resolve() / f"seed_{seed}" / variant.name)


def data_of(args: argparse.Namespace, variant: Variant, seed: int, split: str) -> Path:
    """A file of instruction data."""
    return split_path(folder_of(args, variant, seed) / "data" / task_of(args), split)


def data_step(args: argparse.Namespace, variant: Variant, seed: int) -> Step:
    """Instruction data of one variant."""
    words = ["Class/gen_fb_data_rq.py", "--short", *flags({"neg_ratio": args.neg_ratio})]
    if args.candidates:
        words = ["Class/gen_lp_data_rq.py", "--from", "valid", "--candidates", *map(str, args.candidates)]
    out = folder_of(args, variant, seed) / "data"
    words += flags(
        {"dataset": args.dataset, "code_format": "compact", "seed": seed, "limit": args.rows, "out_dir": out}
    )
    words += [*variant.flags, *([] if variant is WITHOUT else ["--codes", str(args.codes)])]
    made = [data_of(args, variant, seed, split) for split in ("train", "test")]
    return Step(f"seed_{seed}/{variant.name}_data", words, made)


def rows_per_step(args: argparse.Namespace) -> int:
    """Rows with about ``--step_tokens`` tokens: by the mean of 1,000 training rows with codes, answers included."""
    from lora_training.base_model import load_tokenizer
    from lora_training.code_tokens import add_code_tokens, code_shape, read_codes_info
    from lora_training.prompts import encode_examples

    path = data_of(args, WITH, args.seeds[0], "train")
    tokenizer = load_tokenizer(args.model_name)
    add_code_tokens(tokenizer, code_shape(read_codes_info(path)))
    lengths = [len(example.input_ids) for example in encode_examples(islice(read_rows(path), 1000), tokenizer)]
    return max(1, round(args.step_tokens * len(lengths) / sum(lengths)))


def llm_steps(args: argparse.Namespace, variant: Variant, seed: int, rows: int) -> list[Step]:
    """Tuning and answers of one variant with ``rows`` rows per step."""
    folder, name = folder_of(args, variant, seed), f"seed_{seed}/{variant.name}"
    train, validation, test = (data_of(args, variant, seed, split) for split in ("train", "validation", "test"))
    adapter = folder / "tuned" / "lora_adapters"
    words = ["lora_training/train_lora.py", *flags({
        "model_name": args.model_name, "output_dir": adapter.parent, "train_data": train, "val_data": validation,
        "val_limit": args.val_rows, "epochs": args.epochs, "batch_size": rows, "learning_rate": args.learning_rate,
        "rows_lr": args.rows_lr, "adam_beta2": 0.99, "lora_dropout": 0, "seed": seed, "eval_steps": args.eval_steps,
    })]  # fmt: skip
    words += [] if variant is WITHOUT else ["--code_init", str(args.code_init)]
    answer = ["lora_training/inference.py", *flags({
        "lora_adapter": adapter, "output": folder / RESULTS, "test_data": test, "limit": args.test_rows,
        "val_limit": args.val_rows,
    })]  # fmt: skip
    tuning = Step(f"{name}_tuning", words, [adapter / RECORD], partial(resume_tuning, adapter.parent / "checkpoints"))
    return [tuning, Step(f"{name}_answers", answer, [folder / RESULTS])]


def summary(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of the table, one per variant, and the differences of WITH to the others over all seeds."""
    rows: list[dict[str, Any]] = []
    values: dict[Variant, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    task = task_of(args)
    for variant in VARIANTS:
        seeds, curves = {}, {}
        for seed in args.seeds:
            folder = folder_of(args, variant, seed)
            answers = read_json(folder / RESULTS, "answers' record")
            tuned = read_json(folder / "tuned" / "lora_adapters" / RECORD, "record")
            with content_of(folder / RESULTS, "answers' record", REPEAT):
                seeds[str(seed)] = answers["metrics"][task]["test"]
                values[variant].append(values_by_query(by_task(answers["answers"])[task])["test"])
                curves[str(seed)] = {key: tuned[key] for key in CURVE}
        mean = sum(metrics[METRIC[task]] for metrics in seeds.values()) / len(seeds)
        rows.append({"row": variant.row, "mean": mean, "seeds": seeds, "tuning": curves})
    compared = [{"row": WITH.row, "minus": other.row} | paired(values[WITH], values[other])._asdict()
                for other in VARIANTS if other is not WITH]  # fmt: skip
    return {"task": task, "metric": METRIC[task], "rows": rows, "differences": compared}


def stop_part(limit_s: float) -> None:
    """End this process as SIGTERM does: the running step saves its state first."""
    print(f"{limit_s:.0f} s are over (--limit_s): the same command continues", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="benchmarks/llm_real.py", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="graph folder")
    parser.add_argument("--codes", type=Path, required=True, metavar="C.pt", help="codes that the LLM reads")
    parser.add_argument("--code_init", type=Path, required=True, metavar="FILE.pt", help="start of the code rows: of "
                        "lora_training/word_rows.py, or stage 1's checkpoint")  # fmt: skip
    parser.add_argument("--candidates", type=Path, nargs="+", metavar="FILE", help="lists: link prediction instead")
    parser.add_argument("--model_name", required=True, help="hub id or local folder")
    parser.add_argument("--out", type=output_folder, required=True, metavar="OUT", help="folder for everything")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0], help="one comparison each (default: 0)")
    parser.add_argument("--rows", type=at_least(0), default=0, help="rows per file of data (0: all)")
    parser.add_argument("--val_rows", type=at_least(0), default=2000, help="validation rows (0: all)")
    parser.add_argument("--test_rows", type=at_least(0), default=0, help="test rows (0: all)")
    parser.add_argument("--neg_ratio", type=at_least(1), default=1, help="sampled negatives per training triple")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the rows")
    parser.add_argument("--step_tokens", type=at_least(1), default=16_384, help="tokens per step, with codes")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="of LoRA")
    parser.add_argument("--rows_lr", type=float, default=1e-3, help="of the new token rows")
    parser.add_argument("--eval_steps", type=at_least(1), default=200, help="steps between validations")
    parser.add_argument("--limit_s", type=float, default=530, help="seconds of this part (0: no limit)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, started = parse_args(argv), time.monotonic()
    for flag in ("dataset", "codes", "code_init"):
        path = getattr(args, flag).resolve()
        if not path.exists():
            raise InputError(f"--{flag} {path} does not exist; make it: python run_rq.py --dataset DIR")
        setattr(args, flag, path)
    from lora_training.base_model import check_causal, load_tokenizer

    for path in args.candidates or ():
        need_candidates(path)
    check_causal(args.model_name)  # else found after the data are made
    load_tokenizer(args.model_name)
    timer = threading.Timer(args.limit_s, stop_part, [args.limit_s])
    timer.daemon = True
    if args.limit_s:
        timer.start()
    args.out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(args.out / "llm_real.lock", "--out"):
        cells = [(variant, seed) for seed in args.seeds for variant in reversed(VARIANTS)]
        run_steps([data_step(args, variant, seed) for variant, seed in cells], args.out / "done")
        rows = rows_per_step(args)
        steps = [step for variant, seed in cells for step in llm_steps(args, variant, seed, rows)]
        seconds = run_steps(steps, args.out / "done")
        timer.cancel()
        found = summary(args)
        hashes = {name: sha256_file(getattr(args, name)) for name in ("codes", "code_init")}
        record = make_record(vars(args) | {"seed": None}, hashes, time.monotonic() - started, model=args.model_name,
                             rows_per_step=rows, seconds=seconds, **found)  # fmt: skip
        write_json(record, args.out / "llm_real.json")
    for row in found["rows"]:
        print(f"{row['row']:26} {found['metric']} {row['mean']:.4f}")
    for line in found["differences"]:
        print(f"codes minus {line['minus']}: {line['mean']:+.4f} (standard error {line['error']:.4f})")
    print(f"wrote {args.out / 'llm_real.json'}")


if __name__ == "__main__":
    run_command(main)

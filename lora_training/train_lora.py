"""LoRA on a language model with the codes as tokens of their own.

    cd lora_training && python train_lora.py --model_name meta-llama/Llama-2-7b-hf --train_data lora_data/train.json \
        --val_data lora_data/validation.json --output_dir lora_outputs --epochs 3 --batch_size 4 \
        --learning_rate 2e-4 --lora_r 16 --lora_alpha 32
    torchrun --nproc_per_node 2 train_lora.py ...                               two GPUs
    accelerate launch --config_file configs/fsdp2.yaml train_lora.py ...        or another of configs/

Trained: a LoRA pair on every linear layer, and the rows of the code tokens in embedding and head (--train_rows all:
the rows of all tokens); all other weights keep their bits. The loss is the mean over all answer tokens of an
optimization step, over all processes and passes, so it does not depend on how a step is divided. Logits are computed at
answer positions only.

An optimization step has batch_size * gradient_accumulation * processes rows. Before training and every --eval_steps the
loss of the validation answers and of a few plain sentences is computed (is the language model damaged?), and a
checkpoint is written; the best one becomes OUTPUT_DIR/lora_adapters, with the tokenizer and the run record. The saved
adapter is read back and must give bit-equal logits, or the script fails.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.rows import answer_command
from common.device import memory_wanted
from common.errors import CommandParser, InputError, is_disk_full, run_command
from common.files import command, exclusive_lock, output_folder, sha256_file
from common.files import write_json as write_record
from common.record import by_name, make_record
from lora_training.adapters import RECORD, WEIGHTS, put_adapter
from lora_training.base_model import load_base, quiet_libraries
from lora_training.checkpoints import (
    ADAPTERS,
    CHECKPOINTS,
    OTHER_CHECKPOINT,
    PLAN,
    SECONDS,
    check_checkpoint,
    run_plan,
)
from lora_training.code_tokens import resize_model, save_tokenizer
from lora_training.memory import lora_parameters, print_once, row_parameters, sharding
from lora_training.plan import Base, Plan, check_device, prepare, targets
from lora_training.prompts import Example
from lora_training.token_rows import Collate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainerState, TrainingArguments

    from lora_training.lora_trainer import CodeTrainer, LoraSettings

HERE = Path(__file__).resolve().parent
DATA = HERE / "lora_data"


# ---------------------------------------------------------------- model and trainer


def lora_settings(args: argparse.Namespace) -> LoraSettings:
    from lora_training.lora_trainer import LoraSettings

    return LoraSettings(args.lora_r, args.lora_alpha, args.lora_dropout, targets(args), args.seed, args.init_adapter)


def grown_base(args: argparse.Namespace, base: Base, dtype: torch.dtype, local_rank: int) -> PreTrainedModel:
    """The base model with rows for the code tokens: the same on every process and in every run of one seed."""
    quantization = None
    if args.load_in_4bit:
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = load_base(args.model_name, dtype, quantization, {"": local_rank})
    resize_model(model, base.tokenizer, args.seed, base.old_tokens, base.codebooks)
    model.config.use_cache = False
    return model


def training_arguments(args: argparse.Namespace, plan: Plan, device: torch.device) -> TrainingArguments:
    from transformers import TrainingArguments

    passes = args.batch_size // plan.micro_batch * args.gradient_accumulation
    when: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    if args.eval_steps:
        when = {"eval_strategy": "steps", "save_strategy": "steps"}
        when |= {"eval_steps": args.eval_steps, "save_steps": args.eval_steps}
    return TrainingArguments(
        output_dir=str(args.output_dir / CHECKPOINTS), num_train_epochs=args.epochs, max_steps=args.max_steps or -1,
        per_device_train_batch_size=plan.micro_batch, gradient_accumulation_steps=passes,
        per_device_eval_batch_size=args.eval_batch_size or plan.micro_batch, learning_rate=args.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=args.warmup_ratio, weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch", adam_beta2=args.adam_beta2, bf16=args.bf16, fp16=args.fp16, use_cpu=device.type == "cpu",
        activation_checkpointing=args.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False, logging_steps=args.logging_steps, logging_nan_inf_filter=False,
        eval_on_start=plan.checkpoint is None, save_total_limit=2, load_best_model_at_end=True,
        greater_is_better=False, metric_for_best_model="eval_loss", seed=args.seed, remove_unused_columns=False,
        dataloader_num_workers=0, disable_tqdm=True, report_to=args.report_to, average_tokens_across_devices=True,
        **when,
    )  # fmt: skip


@contextmanager
def explained(args: argparse.Namespace, plan: Plan, folder: Path) -> Iterator[None]:
    """Turn a full disk, an out-of-memory error and damaged checkpoint files into one line; complete files stay."""
    from lora_training.lora_trainer import Stopped

    try:
        yield
    except (InputError, KeyboardInterrupt, Stopped):
        raise
    except Exception as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:160]
        if is_disk_full(error):
            raise InputError(
                f"cannot write to {folder}: {reason}; make room, then go on with --resume_from_checkpoint last"
            ) from error
        if memory_wanted(error) is not None:
            smaller = max((n for n in range(1, plan.micro_batch) if args.batch_size % n == 0), default=0)
            longest = int(plan.train.lengths.max())
            way = f"give --micro_batch_size {smaller} in place of {plan.micro_batch} (the result is the same)"
            if not smaller:
                way = f"{'' if args.gradient_checkpointing else 'give --gradient_checkpointing, '}--load_in_4bit, or "
                way += f"--skip_long with --max_length {longest // 2} (the longest row has {longest} tokens)"
            raise InputError(f"out of memory ({reason}); {way}, then --resume_from_checkpoint last") from error
        if plan.checkpoint is None:
            raise
        raise InputError(f"cannot go on from {plan.checkpoint}: {reason}; {OTHER_CHECKPOINT}") from error


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with ExitStack() as locks:
        if int(os.environ.get("RANK", "0")) == 0:
            locks.enter_context(exclusive_lock(Path(f"{args.output_dir.resolve()}.lock"), "--output_dir"))
        tune(args)


def tune(args: argparse.Namespace) -> None:
    """Check everything, train, save the best adapter, read it back and write its record."""
    started = time.monotonic()
    device = check_device(args)
    plan = prepare(args, device)
    import torch
    from transformers.trainer_utils import set_seed

    from lora_training import lora_trainer

    quiet_libraries()
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    set_seed(args.seed)
    arguments = training_arguments(args, plan, device)  # opens the process group
    base = grown_base(args, plan.base, dtype, device.index or 0)
    model = lora_trainer.add_adapter(base, lora_settings(args), plan.base.row_ids, plan.base.shape)
    if arguments.process_index == 0:
        prepare_folder(args, plan)
    if plan.checkpoint is not None:
        started -= check_checkpoint(plan.checkpoint)
    stop, collate = lora_trainer.Stop(), Collate(plan.base.tokenizer.pad_token_id)
    plain = lora_trainer.PlainText(plan.plain, plan.base.old_tokens)
    trainer = lora_trainer.make_trainer(
        model, arguments, plan.train, plan.validation, collate, started, plain, args.rows_lr, stop
    )
    print_once(
        f"{arguments.world_size} process(es), each {arguments.gradient_accumulation_steps} x {plan.micro_batch} rows a "
        f"step; {device}, {str(dtype).removeprefix('torch.')}"
    )
    run(args, plan, trainer, stop)
    if not trainer.is_fsdp_enabled:
        lora_trainer.check_ranks(model)
    best = trainer.evaluate(metric_key_prefix="best")
    folder, expected = save(args, plan, trainer)
    state, seconds = trainer.state, time.monotonic() - started
    del base, model, trainer  # room for the base that is loaded again
    if arguments.process_index == 0:
        difference = check_reload(args, plan, folder, expected, dtype, device)
        record = training_record(args, plan, state, best, difference, device, arguments.world_size, seconds)
        finish(args, folder, record)


def prepare_folder(args: argparse.Namespace, plan: Plan) -> None:
    """Remove an earlier unfinished run (a new run) or an incomplete checkpoint (a resumed one)."""
    checkpoints = args.output_dir / CHECKPOINTS
    if plan.checkpoint is None:
        shutil.rmtree(checkpoints, ignore_errors=True)
        write_record(run_plan(args), checkpoints / PLAN)
    for incomplete in checkpoints.glob("checkpoint-*"):  # killed while it was saved
        if not (incomplete / SECONDS).is_file():
            shutil.rmtree(incomplete, ignore_errors=True)


def run(args: argparse.Namespace, plan: Plan, trainer: CodeTrainer, stop: Any) -> None:
    """Train to the end, or exit with 128 + signal after the step that a signal interrupted is saved."""
    from lora_training.lora_trainer import Stopped

    checkpoints = args.output_dir / CHECKPOINTS
    try:
        with stop, explained(args, plan, checkpoints):
            trainer.train(resume_from_checkpoint=None if plan.checkpoint is None else str(plan.checkpoint))
    except KeyboardInterrupt:
        print_once("go on from the last checkpoint with --resume_from_checkpoint last")
        raise
    except Stopped as end:
        if trainer.args.process_index == 0:
            line = f"stopped: step {end.args[0]} is saved in {checkpoints}; go on with --resume_from_checkpoint last"
            print(line, file=sys.stderr)
        sys.exit(128 + stop.signal)


def save(args: argparse.Namespace, plan: Plan, trainer: CodeTrainer) -> tuple[Path, torch.Tensor | None]:
    """Write adapter and tokenizer to a temporary folder; also returns logits to compare with (None if sharded)."""
    from lora_training.lora_trainer import probe_logits

    folder = args.output_dir / f".{ADAPTERS}.part"
    main_process = trainer.args.process_index == 0
    if main_process:
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    with explained(args, plan, folder):
        trainer.save_model(str(folder))
        if not main_process:
            return folder, None
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; all of it is in the record
        save_tokenizer(plan.base.tokenizer, folder, plan.code_shape)
    if trainer.is_fsdp_enabled:
        return folder, None
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return folder, probe_logits(model, probes(plan), trainer.collate)


def probes(plan: Plan) -> list[Example]:
    """A few validation rows, on which the saved adapter is compared with the trained one."""
    return [plan.validation[row] for row in range(min(4, len(plan.validation)))]


def check_reload(
    args: argparse.Namespace, plan: Plan, folder: Path, expected: torch.Tensor | None, dtype: torch.dtype,
    device: torch.device,
) -> float | None:  # fmt: skip
    """The largest difference between ``expected`` logits and those of the saved adapter on a base loaded again: 0.

    InputError otherwise.
    """
    if expected is None:
        return None
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    found = saved_logits(args, plan.base, folder, dtype, device, probes(plan))
    difference = float((expected - found).abs().max())
    if not torch.equal(expected, found):
        raise InputError(
            f"the adapter in {folder} does not reload: its logits differ by {difference:.2e}; do not use it"
        )
    return difference


def saved_logits(
    args: argparse.Namespace, base: Base, folder: Path, dtype: torch.dtype, device: torch.device,
    examples: list[Example],
) -> torch.Tensor:  # fmt: skip
    """Logits [N, V] of the base model, loaded again, with the adapter that was saved in ``folder``."""
    from lora_training.lora_trainer import probe_logits

    model: Any = put_adapter(grown_base(args, base, dtype, device.index or 0), folder)
    if not args.load_in_4bit:
        model = model.to(device)
    return probe_logits(model, examples, Collate(base.tokenizer.pad_token_id))


def training_record(
    args: argparse.Namespace, plan: Plan, state: TrainerState, best: dict[str, float], difference: float | None,
    device: torch.device, processes: int, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """The run record beside the adapter."""
    history = [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
    before = next((entry for entry in history if entry["step"] == 0), {})
    return make_record(
        vars(args), {name: sha256_file(path) for name, path in inputs(args).items()}, seconds, device,
        base_model=args.model_name, base_vocabulary=plan.base.shape.vocabulary, vocabulary=len(plan.base.tokenizer),
        codes=plan.codes, processes=processes, sharding=sharding(),
        trained_parameters={
            "lora": lora_parameters(plan.base.shape, args.lora_r, targets(args)),
            "rows": row_parameters(plan.base.shape, len(plan.base.row_ids)),
        },
        rows={"train": len(plan.train), "validation": len(plan.validation)},
        tokens_per_row=round(float(plan.train.lengths.mean()), 1), steps=state.global_step,
        before_training={key: round(before[key], 6) for key in before if key.startswith("eval_")},
        validation={key: round(value, 6) for key, value in best.items()},
        best_step=best_step(history), reload_difference=difference,
        resumed_from=args.resume_from_checkpoint, history=history,
    )  # fmt: skip


def finish(args: argparse.Namespace, folder: Path, record: dict[str, Any]) -> None:
    """Write the record, move the finished folder into place, remove the checkpoints, and print the next commands."""
    write_record(record, folder / RECORD)
    final, best = args.output_dir / ADAPTERS, record["validation"]
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    shutil.rmtree(args.output_dir / CHECKPOINTS, ignore_errors=True)
    print_once(
        f"validation loss {best['best_loss']:.4f}, exact {best['best_exact']:.3f}, plain text "
        f"{best['best_plain_loss']:.3f} (step {record['best_step']})"
    )
    print_once(f"wrote {final}" + ("" if record["reload_difference"] is None else ": reloaded, logits are bit-equal"))
    print_once(f"next: {answer_command('--lora_adapter', final, args.train_data)}")
    print_once(f"weights for other software: {command('lora_training/merge_adapter.py', '--lora_adapter', final)}")


def inputs(args: argparse.Namespace) -> dict[str, Path]:
    """The files that a run reads in addition to its base."""
    adapter = None if args.init_adapter is None else args.init_adapter / WEIGHTS
    files = {"train": args.train_data, "validation": args.val_data, "code_init": args.code_init}
    return by_name({**files, "init_adapter": adapter, "plain_text": args.plain_text})


def best_step(history: list[dict[str, Any]]) -> int | None:
    """The step after training began with the lowest validation loss."""
    found = [(entry["eval_loss"], entry["step"]) for entry in history if "eval_loss" in entry and entry["step"]]
    return min(found)[1] if found else None


def build_parser() -> CommandParser:
    parser = CommandParser(prog="lora_training/train_lora.py", description=__doc__.split("\n")[0])
    flag = parser.add_argument_group("model and data").add_argument
    flag("--model_name", default="meta-llama/Llama-2-7b-hf", help="hub id or local folder")
    flag("--train_data", type=Path, default=DATA / "train.json", help="Alpaca rows")
    flag("--val_data", type=Path, default=DATA / "validation.json", help="Alpaca rows")
    flag("--val_limit", type=int, default=0, help="use only the first N validation rows (0: all)")
    flag("--plain_text", type=Path, default=HERE / "plain_text.txt", help="sentences, one per line, whose loss shows "
         "whether the language model is damaged")  # fmt: skip
    flag("--output_dir", type=output_folder, default=HERE / "lora_outputs", help="gets lora_adapters/")
    flag("--overwrite", action="store_true", help="replace a finished adapter or an unfinished run")
    flag("--resume_from_checkpoint", metavar="DIR|last", help="continue an unfinished run")
    flag(
        "--init_adapter", type=Path, metavar="DIR", help="continue training a finished adapter, with its LoRA settings"
    )
    flag = parser.add_argument_group("training").add_argument
    flag("--epochs", type=float, default=3.0, help="passes over the training rows")
    flag("--max_steps", type=int, default=0, help="stop after so many steps instead (0: by epochs)")
    flag("--batch_size", type=int, default=4, help="rows per process and step")
    flag("--gradient_accumulation", type=int, default=1, help="multiplies batch_size without more memory")
    flag("--micro_batch_size", type=int, default=0, help="rows at once (0: as many as are expected to fit)")
    flag("--eval_batch_size", type=int, default=0, help="rows at once in validation (0: as in training)")
    flag("--learning_rate", type=float, default=2e-4, help="peak; cosine decay to 0")
    flag("--rows_lr", type=float, metavar="LR", help="peak for the token rows, if not --learning_rate")
    flag("--adam_beta2", type=float, default=0.999, help="decay rate of Adam's second moment")
    flag("--warmup_ratio", type=float, default=0.03, help="share of the steps with rising learning rate")
    flag("--max_length", type=int, default=2048, help="tokens per row; longer rows are an error, not cut")
    flag("--skip_long", action="store_true", help="leave longer rows out instead")
    flag("--eval_steps", type=int, default=0, help="steps between validations and checkpoints (0: every epoch)")
    flag("--logging_steps", type=int, default=10, help="steps per printed line")
    flag("--seed", type=int, default=0, help="seed of everything random")
    flag("--report_to", default="none", help="none, or a logger of transformers: tensorboard ...")
    flag = parser.add_argument_group("LoRA").add_argument
    flag("--lora_r", type=int, default=16, help="rank")
    flag("--lora_alpha", type=int, default=32, help="scale times rank")
    flag("--lora_dropout", type=float, default=0.05, help="on the inputs of the LoRA pairs")
    flag("--lora_target", default="all-linear", help="all-linear, or names: q_proj,v_proj")
    flag("--train_rows", choices=["code", "all"], default="code", help="trained rows of embedding and head: of code "
         "tokens, or of all tokens (for small vocabularies)")  # fmt: skip
    flag("--code_init", type=Path, metavar="CK.pt", help="stage 1's checkpoint: the code rows start from the mean row "
         "plus codebook directions, instead of plus noise")  # fmt: skip
    group = parser.add_argument_group("precision and memory")
    flag = group.add_argument
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 (unset: if the GPU supports it)")
    kind.add_argument("--fp16", action="store_true", help="float16, for GPUs without bfloat16")
    flag("--load_in_4bit", action="store_true", help="QLoRA: frozen weights in nf4")
    flag("--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="recompute layers (unset: on a GPU)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    ranges: dict[str, tuple[Callable[[float], bool], list[str]]] = {
        "1 or more": (lambda value: value >= 1, ["batch_size", "gradient_accumulation", "lora_r", "lora_alpha",
                                                 "max_length", "logging_steps"]),
        "0 or more": (lambda value: value >= 0, ["max_steps", "micro_batch_size", "eval_batch_size", "eval_steps",
                                                 "val_limit"]),
        "in [0, 1)": (lambda value: 0 <= value < 1, ["warmup_ratio", "lora_dropout", "adam_beta2"]),
        "above 0 and finite": (lambda value: 0 < value < math.inf, ["epochs", "learning_rate", "rows_lr"]),
        "from 0 to 2**32 - 1": (lambda value: 0 <= value < 2**32, ["seed"]),
    }  # fmt: skip
    for words, (holds, names) in ranges.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not holds(value):
                parser.error(f"--{name} must be {words}, got {value}")
    if args.micro_batch_size and args.batch_size % args.micro_batch_size:
        parser.error(f"--micro_batch_size {args.micro_batch_size} does not divide --batch_size {args.batch_size}")
    return args


if __name__ == "__main__":
    run_command(main)

"""LoRA on a LLaMA with the codes as tokens of their own.

    cd lora_training && python train_lora.py --model_name meta-llama/Llama-2-7b-hf --train_data lora_data/train.json \
        --val_data lora_data/validation.json --output_dir lora_outputs --epochs 3 --batch_size 4 \
        --learning_rate 2e-4 --lora_r 16 --lora_alpha 32
    torchrun --nproc_per_node 2 train_lora.py ...                               two GPUs
    accelerate launch --config_file configs/fsdp2.yaml train_lora.py ...        or another of configs/

Trained: a LoRA pair on every linear layer, and the rows of the code tokens in embedding and head (--train_rows all:
every token's); all else keeps its bits. The loss is the mean over all answer tokens of an optimisation step, over all
processes and passes alike, so that how a step is cut into pieces does not change it. Logits are computed at answer
positions alone.

An optimisation step has batch_size * gradient_accumulation * processes rows. Every --eval_steps the validation loss is
taken and a checkpoint written; the best one becomes OUTPUT_DIR/lora_adapters, together with the tokenizer and the run
record. The saved adapter is read back and must give bit-equal logits, or the script fails.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.instructions import answer_command, read_rows
from common.device import memory_wanted
from common.errors import CommandParser, InputError, is_disk_full, run_command
from common.files import exclusive_lock, read_json, sha256_file
from common.files import write_json as write_record
from common.record import by_name, make_record, seed_everything
from lora_training.checkpoints import (
    CHECKPOINTS,
    OTHER_CHECKPOINT,
    PLAN,
    SECONDS,
    check_checkpoint,
    check_plan,
    find_checkpoint,
    run_plan,
    saved_sums,
)
from lora_training.code_tokens import (
    RECORD,
    CodeShape,
    add_code_tokens,
    code_shape,
    is_codes_info,
    load_base,
    load_config,
    load_tokenizer,
    quiet_libraries,
    read_codebooks,
    read_codes_info,
    refuse_other_codes,
    reload_check,
    resize_model,
    save_tokenizer,
    set_code_rows,
    trainable_rows,
)
from lora_training.memory import (
    GIB,
    Shape,
    expected_memory,
    lora_parameters,
    model_shape,
    row_parameters,
    sharding,
)
from lora_training.prompts import IGNORED, Example, encode_examples
from lora_training.token_rows import ByLength, Collate, TokenRows

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

ADAPTERS = "lora_adapters"
OLDEST = (5, 23)  # of transformers
FAST = "medium"  # of --matmul_precision, as run_rq.py has it


def say(text: str) -> None:
    """Print on the first process alone."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


# ---------------------------------------------------------------- data


def encode_file(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, skip_long: bool) -> TokenRows:
    """All rows of an instruction-data file as tokens. InputError where it is missing, empty or holds too long a row."""
    rows, skipped = TokenRows(), 0
    for example in encode_examples(read_rows(path, plain=True), tokenizer, 0 if skip_long else max_length):
        if skip_long and len(example.input_ids) > max_length:
            skipped += 1
        else:
            rows.append(example)
    if not len(rows):
        why = f"its {skipped} rows are all longer than --max_length {max_length}" if skipped else "it has no rows"
        raise InputError(f"{path} trains nothing: {why}; write it: python Class/gen_fb_data_rq.py")
    lengths, answers = rows.lengths, rows.answers
    say(
        f"{path}: {len(rows):,} rows; tokens per row: mean {lengths.mean():.0f}, longest {lengths.max()}; of these "
        f"answers: mean {answers.mean():.1f}, longest {answers.max()}" + (f"; {skipped:,} too long" if skipped else "")
    )
    return rows


# ---------------------------------------------------------------- the trainer


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [N] of the answer tokens; logits [N, V] as ``logits_to_keep`` selects them, labels [B, T]."""
    import torch

    return torch.nn.functional.cross_entropy(logits.float(), labels[labels != IGNORED], reduction="none")


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Sum over this pass's answer tokens by the number of them in the whole step (all passes, all processes)."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    losses = token_losses(logits, labels)
    return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)


class Stopped(Exception):
    """Training ended early, with a checkpoint; its argument is the step."""


class Stop:
    """SIGTERM and Ctrl-C: the first asks for an end after the step, the second is what it was before."""

    def __init__(self) -> None:
        self.signal, self.agreed = 0, False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number: int, frame: object) -> None:
        self.signal = number
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def agree(self) -> bool:
        """Whether any process was asked, the same on all: they save together or not at all."""
        import torch

        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            asked: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(asked, self.signal)
            self.signal = max(asked)
        self.agreed = bool(self.signal)
        return self.agreed


def make_trainer(
    model: PeftModel, arguments: TrainingArguments, train: TokenRows, validation: TokenRows, collate: Collate,
    seed: int, began: float, asked: Stop | None = None,
) -> Trainer:  # fmt: skip
    """transformers' Trainer with our row order, loss (``mean_loss``) and validation, and one printed line per report.

    ``began``: the monotonic time at which the run began, the time before an interruption counted. ``asked``: to stop;
    the step that runs is then ended and saved, and ``Stopped`` is raised.
    """
    stop = asked or Stop()
    import torch
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

    class Lora(Trainer):
        def train(self, *words: Any, **more: Any) -> Any:
            with half_precision_inputs(model, self.args):
                return super().train(*words, **more)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            return ByLength(train.lengths, rows, seed)

        def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
            """Loss as in training and share of rows whose every token is the likeliest, over all processes."""
            started, found = time.monotonic(), []
            self.model_wrapped.eval()
            for batch in self.get_eval_dataloader():
                batch = self._prepare_inputs(batch)
                labels = batch.pop("labels")
                with torch.no_grad(), self.compute_loss_context_manager():
                    logits = self.model_wrapped(**batch).logits
                supervised = labels != IGNORED
                losses, right = torch.zeros_like(labels, dtype=torch.float32), torch.ones_like(labels, dtype=torch.bool)
                losses[supervised] = token_losses(logits, labels)
                right[supervised] = logits.argmax(-1) == labels[supervised]
                rows = torch.stack([losses.sum(1), supervised.sum(1).float(), right.all(1).float()], 1)  # [B, 3]
                found.append(self.accelerator.gather_for_metrics(rows).double().cpu())
            self.model_wrapped.train()
            loss, tokens, right_rows = torch.cat(found).sum(0).tolist()
            metrics = {
                f"{metric_key_prefix}_loss": loss / tokens,
                f"{metric_key_prefix}_exact": right_rows / sum(len(part) for part in found),
                f"{metric_key_prefix}_seconds": round(time.monotonic() - started, 1),
            }
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    class Report(TrainerCallback):
        """One line per report, with tokens per second and the time that is left."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started, self.first = time.monotonic(), state.global_step

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                write_record({"seconds": time.monotonic() - began, "sha256": saved_sums(folder)}, folder / SECONDS)
            if stop.agreed:
                raise Stopped(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop.agree():
                control.should_save = True

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            logs = logs or {}
            done, seconds = state.global_step - self.first, time.monotonic() - self.started
            if not all(math.isfinite(logs[key]) for key in ("loss", "eval_loss") if key in logs):
                raise InputError(f"the loss is not finite at step {state.global_step}; lower --learning_rate")
            if "eval_loss" in logs:
                say(
                    f"step {state.global_step}: validation loss {logs['eval_loss']:.4f}, exact {logs['eval_exact']:.3f}"
                )
            elif "loss" in logs and done:
                tokens = (
                    train.lengths.mean() * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
                )
                left = (state.max_steps - state.global_step) * seconds / done / 60
                say(
                    f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, "
                    f"gradient {float(logs.get('grad_norm', math.nan)):.2f}, rate {logs['learning_rate']:.1e}, "
                    f"{tokens * done / seconds:,.0f} tokens/s, {left:.0f} min left"
                )

    trainer = Lora(
        model=model, args=arguments, train_dataset=train, eval_dataset=validation, data_collator=collate,
        compute_loss_func=mean_loss,
    )  # fmt: skip
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Report())
    return trainer


# ---------------------------------------------------------------- the model


def quantization(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """nf4 for --load_in_4bit, else None."""
    if not args.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def grown_base(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, local_rank: int,
    codebooks: torch.Tensor | None = None,
) -> PreTrainedModel:  # fmt: skip
    """The base model with rows for the code tokens: the same on every process and in every run of one seed.

    They are random, or ``codebooks`` [Q, K, code_dim] in the model's width.
    """
    model = load_base(args.model_name, dtype, quantization(args, dtype), {"": local_rank})
    resize_model(model, tokenizer, args.seed)
    if codebooks is not None:
        set_code_rows(model, tokenizer, codebooks, args.seed)
    model.config.use_cache = False
    return model


def targets(args: argparse.Namespace) -> tuple[str, ...]:
    """Names of the adapted modules; empty means every linear layer but the head."""
    return () if args.lora_target == "all-linear" else tuple(args.lora_target.split(","))


def add_adapter(model: PreTrainedModel, args: argparse.Namespace, row_ids: list[int]) -> PeftModel:
    """LoRA on the linear layers, and the rows ``row_ids`` of embedding and head.

    No prepare_model_for_kbit_training with 4-bit weights: it makes embedding, head and norms float32 for the training
    alone, and the saved adapter then gives other logits. What else it does is done here.
    """
    from peft import LoraConfig, get_peft_model

    seed_everything(args.seed)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, task_type="CAUSAL_LM",
            target_modules=list(targets(args)) or "all-linear",
            trainable_token_indices=trainable_rows(model, row_ids) if row_ids else None,
        ),
    )  # fmt: skip
    if recomputation()["use_reentrant"]:
        adapted.enable_input_require_grads()  # else the first layer has no gradient to pass on
    add_products_first(adapted, args.matmul_precision == FAST)
    save = adapted.save_pretrained

    def save_small(*words: Any, **more: Any) -> None:
        """The trained rows alone: the default also stores both full matrices."""
        save(*words, **{**more, "save_embedding_layers": False})

    adapted.save_pretrained = save_small
    return adapted


def add_products_first(model: PeftModel, fast: bool = False) -> int:
    """Let layers add a pair's product to their weight before they read their input: one product of it, not three.

    Those layers whose pair has more numbers than the weight, as with small bases, and no dropout or other precision
    comes between. ``fast``: their products are of bfloat16 while they train, where the device has instructions for it.
    Returns their number.
    """
    from peft.tuners.lora.layer import Linear
    from torch.nn import Identity
    from torch.nn.functional import linear

    from model.precision import has_bfloat16

    def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
        pair = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        weight = layer.base_layer.weight + layer.scaling["default"] * pair
        bias = layer.base_layer.bias
        if fast and layer.training and bias is None and has_bfloat16(x.device):
            return linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)
        return linear(x, weight, bias)

    count = 0
    for layer in (
        model.modules() if sharding() == "ddp" else ()
    ):  # sharded weights come only when their module is called
        if not isinstance(layer, Linear):
            continue
        weight, first, second = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        plain = weight.dtype == first.dtype and isinstance(layer.lora_dropout["default"], Identity)
        if plain and weight.numel() < first.numel() + second.numel():
            layer.forward = MethodType(forward, layer)
            count += 1
    return count


@contextmanager
def half_precision_inputs(model: PeftModel, arguments: TrainingArguments) -> Iterator[None]:
    """Let LoRA's pairs read a half-precision input as it is while autocast is on.

    PEFT widens it to float32, the type of the pair's weights, for autocast to narrow it again: the same products of
    more bytes. Under DeepSpeed and FSDP, whose engines cast by themselves, PEFT's way stays. (Its own
    ``disable_input_dtype_casting`` fails on models with trained token rows.)
    """
    from peft.tuners.lora import LoraLayer

    half = (arguments.bf16 or arguments.fp16) and sharding() == "ddp"
    layers: list[Any] = [module for module in model.modules() if half and isinstance(module, LoraLayer)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


def check_ranks(model: PeftModel) -> None:
    """RuntimeError unless all processes hold the same trained parameters, bit for bit (none of them sharded)."""
    import torch

    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, digest.hexdigest())
    if len(set(found)) > 1:
        raise RuntimeError("the processes hold different weights after training: a step did not reach all of them")
    say(f"{len(found)} processes hold the same weights")


def probe_logits(model: Any, examples: list[Example], collate: Collate) -> torch.Tensor:
    """Logits [N, V] at the answer tokens of a few rows, on the CPU, without dropout."""
    import torch

    batch = {key: value.to(model.device) for key, value in collate(examples).items() if key != "labels"}
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(**batch).logits
    return logits.cpu()


def saved_logits(
    args: argparse.Namespace, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype,
    device: torch.device, examples: list[Example], collate: Collate,
) -> torch.Tensor:  # fmt: skip
    """The same from the base model, loaded again, and the adapter as it lies on the disk."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(grown_base(args, tokenizer, dtype, device.index or 0), str(folder))
    add_products_first(model)
    if not args.load_in_4bit:
        model = model.to(device)
    return probe_logits(model, examples, collate)


# ---------------------------------------------------------------- before anything large is loaded


class Plan(NamedTuple):
    """What a run rests on, checked."""

    codes: dict[str, Any]
    shape: CodeShape | None
    model: Shape
    tokenizer: PreTrainedTokenizerBase
    row_ids: list[int]  # trained in embedding and head
    train: TokenRows
    validation: TokenRows
    micro_batch: int
    checkpoint: Path | None
    codebooks: torch.Tensor | None = None  # [Q, K, code_dim] that new rows start from


def check_version() -> None:
    """InputError where transformers is too old: before 5.23 no model takes a mask [B, T] as ``logits_to_keep``."""
    found = importlib.metadata.version("transformers")
    if tuple(int(number) for number in found.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise InputError(
            f"transformers {found} is installed, training needs {oldest} or later: "
            "python -m pip install -r requirements.txt"
        )


def check_device(args: argparse.Namespace) -> torch.device:
    """The device of this process; settles --bf16 and --gradient_checkpointing where they were not given."""
    check_version()
    import torch

    cuda = torch.cuda.is_available()
    if args.fp16 and not cuda:
        raise InputError("--fp16 needs a GPU, and none is visible; leave it out, or use --bf16")
    if args.load_in_4bit:
        import importlib.util

        if not cuda:
            raise InputError("--load_in_4bit needs a GPU, and none is visible; leave it out")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("--load_in_4bit needs bitsandbytes: python -m pip install bitsandbytes")
    if args.bf16 and cuda and not torch.cuda.is_bf16_supported():
        raise InputError(f"--bf16 is not known to {torch.cuda.get_device_name()}; use --fp16")
    if args.bf16 is None:
        args.bf16 = cuda and not args.fp16 and torch.cuda.is_bf16_supported()
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = cuda
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")


def first_codebooks(args: argparse.Namespace, shape: CodeShape | None, is_new: bool) -> torch.Tensor | None:
    """What --code_init names; InputError where there are no new rows to put it into."""
    if args.code_init is None:
        return None
    if shape is None:
        raise InputError(f"--code_init {args.code_init}: the rows hold no codes; leave the flag out")
    if not is_new:
        raise InputError(
            f"--code_init {args.code_init}: {args.model_name} has rows of these codes, which were trained; leave it out"
        )
    return read_codebooks(args.code_init, shape)


def check_report_to(name: str) -> None:
    """InputError for a logger that transformers does not know, or whose package is not there."""
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks([name] if name not in ("all", "none") else []):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"--report_to {name}: {' '.join(str(error).split())[:200]}; or leave it out") from error


def prepare(args: argparse.Namespace, device: torch.device) -> Plan:
    """Every check that needs no weights, and the tokens of all rows."""
    for flag, path in (("--train_data", args.train_data), ("--val_data", args.val_data)):
        if not path.is_file():
            raise InputError(f"{flag} {path} does not exist; write it: python Class/gen_fb_data_rq.py")
    codes = read_codes_info(args.train_data)
    refuse_other_codes(
        codes, read_codes_info(args.val_data), f"--train_data {args.train_data}", f"--val_data {args.val_data}"
    )
    before = Path(args.model_name) / RECORD
    if before.is_file():  # a merged model, tuned once more
        known = read_json(before, "record")
        if not isinstance(known, dict) or not is_codes_info(known.get("codes", {"file": None})):
            raise InputError(f"{before} does not say which codes {args.model_name} knows; merge it anew")
        if "codes" in known:
            model_words, data_words = f"--model_name {args.model_name}", f"--train_data {args.train_data}"
            refuse_other_codes(known["codes"], codes, model_words, data_words)
    check_report_to(args.report_to)
    checkpoint = find_checkpoint(args)
    if checkpoint is not None:
        check_plan(args, checkpoint)
        check_checkpoint(checkpoint)
    shape = code_shape(codes)
    config = load_config(args.model_name)
    model = model_shape(config)
    tokenizer = load_tokenizer(args.model_name)
    size = len(tokenizer)
    code_ids = add_code_tokens(tokenizer, shape)
    codebooks = first_codebooks(args, shape, len(tokenizer) > size)
    if shape is not None:
        reload_check(tokenizer, shape)
    wanted = targets(args)
    there = {name.rsplit(".", 1)[-1] for name, _, _ in model.layer_sizes}
    if not there.issuperset(wanted):
        raise InputError(f"--lora_target {args.lora_target}: {args.model_name} has {', '.join(sorted(there))}")
    train, validation = (
        encode_file(path, tokenizer, args.max_length, args.skip_long) for path in (args.train_data, args.val_data)
    )

    row_ids = list(range(len(tokenizer))) if args.train_rows == "all" else code_ids
    lora, rows = lora_parameters(model, args.lora_r, wanted), row_parameters(model, len(row_ids))
    say(
        f"{args.model_name}: {model.parameters:,} parameters; trained: {lora:,} of LoRA (r {args.lora_r}), {rows:,} in "
        f"{model.matrices} x {len(row_ids):,} rows of {args.train_rows} tokens ({(lora + rows) / model.parameters:.2%})"
    )
    longest, answer = int(train.lengths.max()), int(train.answers.max())
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    for path, rows_of_file in ((args.train_data, train), (args.val_data, validation)):
        most = int(rows_of_file.lengths.max(initial=0))
        if most > context:
            raise InputError(
                f"{path} has a row of {most} tokens, {args.model_name} reads {context}; leave such rows out: "
                f"--max_length {context} --skip_long"
            )
    added = max(0, len(tokenizer) - model.vocabulary)

    def need(batch: int) -> float:
        return expected_memory(
            model, lora, rows, added, batch, longest, answer, 2 if args.bf16 or args.fp16 else 4, args.load_in_4bit,
            args.gradient_checkpointing, int(os.environ.get("WORLD_SIZE", "1")), sharding(),
        ).total  # fmt: skip

    micro = args.micro_batch_size or args.batch_size
    if device.type == "cuda":
        import torch

        room = torch.cuda.get_device_properties(device).total_memory
        if not args.micro_batch_size:
            fits = [n for n in range(1, args.batch_size + 1) if args.batch_size % n == 0 and need(n) <= 0.92 * room]
            micro = max(fits, default=1)
        say(f"expected memory per GPU: {need(micro) / GIB:.1f} of {room / GIB:.1f} GiB at {micro} x {longest} tokens")
        if need(micro) > room:
            say("that is more than it has: configs/fsdp2.yaml, --load_in_4bit or a lower --max_length with --skip_long")
    else:
        say(f"expected memory: {need(micro) / GIB:.1f} GiB at {micro} x {longest} tokens, on the CPU")
    return Plan(codes, shape, model, tokenizer, row_ids, train, validation, micro, checkpoint, codebooks)


# ---------------------------------------------------------------- the command


def recomputation() -> dict[str, Any]:
    """Settings of torch's checkpoint. DeepSpeed up to 0.19.2 takes frozen weights away while a layer is computed again
    (its pull request 8148), which the non-reentrant form refuses and the reentrant one does not notice."""
    return {"use_reentrant": sharding() == "zero3"}


def training_arguments(args: argparse.Namespace, plan: Plan, device: torch.device) -> TrainingArguments:
    from transformers import TrainingArguments

    passes = args.batch_size // plan.micro_batch * args.gradient_accumulation
    every: dict[str, Any] = (
        {
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": args.eval_steps,
            "save_steps": args.eval_steps,
        }
        if args.eval_steps
        else {"eval_strategy": "epoch", "save_strategy": "epoch"}
    )
    return TrainingArguments(
        output_dir=str(args.output_dir / CHECKPOINTS), num_train_epochs=args.epochs, max_steps=args.max_steps or -1,
        per_device_train_batch_size=plan.micro_batch, gradient_accumulation_steps=passes,
        per_device_eval_batch_size=args.eval_batch_size or plan.micro_batch, learning_rate=args.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=args.warmup_ratio, weight_decay=args.weight_decay, max_grad_norm=1.0,
        optim="adamw_torch", adam_beta2=args.adam_beta2, bf16=args.bf16, fp16=args.fp16, use_cpu=device.type == "cpu",
        activation_checkpointing=args.gradient_checkpointing, activation_checkpointing_kwargs=recomputation(),
        ddp_find_unused_parameters=False, logging_steps=args.logging_steps, logging_nan_inf_filter=False,
        save_total_limit=2, load_best_model_at_end=True, greater_is_better=False, metric_for_best_model="eval_loss",
        seed=args.seed, remove_unused_columns=False, dataloader_num_workers=0, disable_tqdm=True,
        report_to=args.report_to, average_tokens_across_devices=True, **every,
    )  # fmt: skip


@contextmanager
def explained(args: argparse.Namespace, plan: Plan, folder: Path) -> Iterator[None]:
    """Turn a full disk, a lack of memory and damaged checkpoint files into one line; what is complete stays."""
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

    quiet_libraries()
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    set_seed(args.seed)
    arguments = training_arguments(args, plan, device)  # opens the process group
    main_process = arguments.process_index == 0
    checkpoints = args.output_dir / CHECKPOINTS
    model = add_adapter(grown_base(args, plan.tokenizer, dtype, device.index or 0, plan.codebooks), args, plan.row_ids)
    if main_process:
        if plan.checkpoint is None:
            shutil.rmtree(checkpoints, ignore_errors=True)
            write_record(run_plan(args), checkpoints / PLAN)
        for half in checkpoints.glob("checkpoint-*"):  # what a kill in the middle of saving left
            if not (half / SECONDS).is_file():
                shutil.rmtree(half, ignore_errors=True)
    collate = Collate(plan.tokenizer.pad_token_id)
    if plan.checkpoint is not None:
        started -= check_checkpoint(plan.checkpoint)
    stop = Stop()
    trainer = make_trainer(model, arguments, plan.train, plan.validation, collate, args.seed, started, stop)
    say(
        f"{arguments.world_size} process(es), each {arguments.gradient_accumulation_steps} x {plan.micro_batch} rows a "
        f"step; {device}, {str(dtype).removeprefix('torch.')}"
    )
    go_on = "go on with --resume_from_checkpoint last"
    try:
        with stop, explained(args, plan, checkpoints):
            trainer.train(resume_from_checkpoint=None if plan.checkpoint is None else str(plan.checkpoint))
    except KeyboardInterrupt:
        say("go on from the last checkpoint with --resume_from_checkpoint last")
        raise
    except Stopped as end:
        if main_process:
            print(f"stopped: step {end.args[0]} is saved in {checkpoints}; {go_on}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    history, state = trainer.state.log_history, trainer.state
    sharded = trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and sharding() == "zero3")
    if not sharded:
        check_ranks(model)
    best = trainer.evaluate(metric_key_prefix="best")

    # an adapter's folder is complete or as it was before
    folder, final = args.output_dir / f".{ADAPTERS}.part", args.output_dir / ADAPTERS
    if main_process:
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    with explained(args, plan, folder):
        trainer.save_model(str(folder))
        if not main_process:
            return
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all of it is in the record
        save_tokenizer(plan.tokenizer, folder, plan.shape)
    examples = [plan.validation[row] for row in range(min(4, len(plan.validation)))]
    difference = None
    if not sharded:
        trained = probe_logits(trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False), examples, collate)
        del trainer, model
        if device.type == "cuda":
            torch.cuda.empty_cache()
        loaded = saved_logits(args, folder, plan.tokenizer, dtype, device, examples, collate)
        difference = float((trained - loaded).abs().max())
        if not torch.equal(trained, loaded):
            raise InputError(
                f"the adapter in {folder} does not reload: its logits differ by {difference:.2e}; do not use it"
            )
    record = make_record(
        vars(args), {name: sha256_file(path) for name, path in inputs(args).items()},
        time.monotonic() - started, device, base_model=args.model_name, base_vocabulary=plan.model.vocabulary,
        vocabulary=len(plan.tokenizer), codes=plan.codes, processes=arguments.world_size, sharding=sharding(),
        trained_parameters={
            "lora": lora_parameters(plan.model, args.lora_r, targets(args)),
            "rows": row_parameters(plan.model, len(plan.row_ids)),
        },
        rows={"train": len(plan.train), "validation": len(plan.validation)},
        tokens_per_row=round(float(plan.train.lengths.mean()), 1), steps=state.global_step,
        validation={key: round(v, 6) for key, v in best.items()},
        best_step=best_step(history), reload_difference=difference,
        resumed_from=args.resume_from_checkpoint,
        history=[entry for entry in history if "loss" in entry or "eval_loss" in entry],
    )  # fmt: skip
    write_record(record, folder / RECORD)
    shutil.rmtree(final, ignore_errors=True)
    folder = folder.rename(final)
    shutil.rmtree(checkpoints, ignore_errors=True)
    say(f"validation loss {best['best_loss']:.4f}, exact {best['best_exact']:.3f} (step {record['best_step']})")
    say(f"wrote {folder}" + ("" if sharded else ": reloaded, logits equal to the bit"))
    say(f"next: {answer_command(f'--lora_adapter {folder}', args.train_data)}")
    say(f"for weights that need nothing of ours: python merge_adapter.py --lora_adapter {folder}")


def inputs(args: argparse.Namespace) -> dict[str, Path]:
    """The files that a run reads beside its base."""
    return by_name({"train": args.train_data, "validation": args.val_data, "code_init": args.code_init})


def best_step(history: list[dict[str, Any]]) -> int | None:
    """The step with the lowest validation loss."""
    found = [(entry["eval_loss"], entry["step"]) for entry in history if "eval_loss" in entry]
    return min(found)[1] if found else None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/train_lora.py", description=__doc__.split("\n")[0])
    group = parser.add_argument_group("model and data")
    group.add_argument("--model_name", default="meta-llama/Llama-2-7b-hf", help="hub id or local folder")
    group.add_argument("--train_data", type=Path, default=DATA / "train.json", help="Alpaca rows")
    group.add_argument("--val_data", type=Path, default=DATA / "validation.json", help="Alpaca rows")
    group.add_argument("--output_dir", type=Path, default=HERE / "lora_outputs", help="gets lora_adapters/")
    group.add_argument("--overwrite", action="store_true", help="start anew over an unfinished run")
    group.add_argument("--resume_from_checkpoint", metavar="DIR|last", help="go on from a checkpoint")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=float, default=3.0, help="passes over the training rows")
    group.add_argument("--max_steps", type=int, default=0, help="stop after so many steps instead (0: by epochs)")
    group.add_argument("--batch_size", type=int, default=4, help="rows per process and step")
    group.add_argument("--gradient_accumulation", type=int, default=1, help="multiplies batch_size, at no memory")
    group.add_argument(
        "--micro_batch_size", type=int, default=0, help="rows at once (0: as many as are expected to fit)"
    )
    group.add_argument("--eval_batch_size", type=int, default=0, help="rows at once in validation (0: as in training)")
    group.add_argument("--learning_rate", type=float, default=2e-4, help="peak; cosine decay to 0")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="how slowly Adam forgets past gradients' sizes")
    group.add_argument("--warmup_ratio", type=float, default=0.03, help="share of the steps that warm up")
    group.add_argument("--weight_decay", type=float, default=0.0, help="of everything trained")
    group.add_argument("--max_length", type=int, default=2048, help="tokens per row; longer ones are refused, not cut")
    group.add_argument("--skip_long", action="store_true", help="leave longer rows out instead")
    group.add_argument("--eval_steps", type=int, default=0, help="validate and save every so often (0: every epoch)")
    group.add_argument("--logging_steps", type=int, default=10, help="steps per printed line")
    group.add_argument("--seed", type=int, default=0, help="seed of everything random")
    group.add_argument("--report_to", default="none", help="none, or a logger that transformers knows: tensorboard ...")
    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora_r", type=int, default=16, help="rank")
    group.add_argument("--lora_alpha", type=int, default=32, help="scale times rank")
    group.add_argument("--lora_dropout", type=float, default=0.05, help="on the adapters' inputs")
    group.add_argument("--code_init", type=Path, metavar="CK.pt", help="stage 1's checkpoint: the code tokens' rows "
                       "start from its codebooks (default: random rows)")  # fmt: skip
    group.add_argument("--train_rows", choices=["code", "all"], default="code", help="rows of embedding and head that "
                       "train: the code tokens', or all, so that answers in words can learn theirs too (for small "
                       "vocabularies)")  # fmt: skip
    group.add_argument("--lora_target", default="all-linear", help="all-linear, or names: q_proj,v_proj")
    group = parser.add_argument_group("precision and memory")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 (default: where the GPU knows it)"
    )
    kind.add_argument("--fp16", action="store_true", help="float16, for GPUs without bfloat16")
    group.add_argument("--matmul_precision", choices=["highest", FAST], default="highest", help="medium: layers whose "
                       "LoRA pair has more numbers than their weight train with bfloat16 products")  # fmt: skip
    group.add_argument("--load_in_4bit", action="store_true", help="QLoRA: frozen weights in nf4")
    group.add_argument(
        "--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="recompute layers (default: on a GPU)"
    )
    args = parser.parse_args(argv)
    for name in ("batch_size", "gradient_accumulation", "lora_r", "lora_alpha", "max_length", "logging_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(args, name)}")
    for name in ("max_steps", "micro_batch_size", "eval_batch_size", "eval_steps", "seed", "weight_decay"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} must be 0 or more, got {getattr(args, name)}")
    for name in ("warmup_ratio", "lora_dropout", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} must be in [0, 1), got {getattr(args, name)}")
    if args.seed >= 2**32:
        parser.error(f"--seed {args.seed} is out of range, expected less than 2**32")
    for name in ("epochs", "learning_rate"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} must be above 0 and finite, got {getattr(args, name)}")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file, and adapters go to a folder; name another")
    if args.micro_batch_size and args.batch_size % args.micro_batch_size:
        parser.error(f"--micro_batch_size {args.micro_batch_size} does not divide --batch_size {args.batch_size}")
    return args


HERE = Path(__file__).resolve().parent
DATA = HERE / "lora_data"

if __name__ == "__main__":
    run_command(main)

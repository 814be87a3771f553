"""Checks of a training run before anything large is loaded: device, data, codes, base model, tokens, memory."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from Class.rows import longest_rows, read_rows
from common.errors import InputError
from common.files import command, read_json, read_text
from lora_training.adapters import RECORD, adapter_config, check_base, read_saved
from lora_training.base_model import attention_of, causal_model_class, check_causal, check_version, load_tokenizer
from lora_training.checkpoints import check_checkpoint, check_plan, find_checkpoint
from lora_training.code_tokens import (
    CodeShape,
    add_code_tokens,
    code_shape,
    is_codes_info,
    read_codebooks,
    read_codes_info,
    refuse_other_codes,
    reload_check,
)
from lora_training.memory import (
    GIB,
    Shape,
    expected_memory,
    lora_parameters,
    model_shape,
    print_once,
    row_parameters,
    sharding,
)
from lora_training.prompts import IGNORED, Example, encode_examples, encode_text
from lora_training.token_rows import TokenRows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class Base(NamedTuple):
    """A base model as far as it is known without its weights."""

    shape: Shape
    context: float  # tokens that it reads at most
    tokenizer: PreTrainedTokenizerBase  # with the code tokens
    old_tokens: int  # of the tokenizer before they were added
    row_ids: list[int]  # rows that are trained in embedding and head
    codebooks: torch.Tensor | None  # [Q, K, code_dim] that new rows start from


class Plan(NamedTuple):
    """The checked input of a run."""

    codes: dict[str, Any]
    code_shape: CodeShape | None
    base: Base
    train: TokenRows
    validation: TokenRows
    plain: list[Example]
    micro_batch: int
    checkpoint: Path | None


def check_device(args: argparse.Namespace) -> torch.device:
    """The device of this process; sets --bf16 and --gradient_checkpointing if they were not given."""
    check_version()
    import torch

    cuda = torch.cuda.is_available()
    if args.fp16 and not cuda:
        raise InputError("--fp16 needs a GPU, and none is visible; leave it out, or use --bf16")
    if args.load_in_4bit and not cuda:
        raise InputError("--load_in_4bit needs a GPU, and none is visible; leave it out")
    if args.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("--load_in_4bit needs bitsandbytes: python -m pip install bitsandbytes")
    if args.bf16 and cuda and not torch.cuda.is_bf16_supported():
        raise InputError(f"--bf16 is not supported by {torch.cuda.get_device_name()}; use --fp16")
    if args.bf16 is None:
        args.bf16 = cuda and not args.fp16 and torch.cuda.is_bf16_supported()
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = cuda
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")


def prepare(args: argparse.Namespace, device: torch.device) -> Plan:
    """Every check that needs no weights, then the tokens of all rows."""
    codes = check_data(args)
    check_report_to(args.report_to)
    checkpoint = find_checkpoint(args)
    if args.init_adapter is not None:
        use_adapter(args, codes)
    if checkpoint is not None:
        check_plan(args, checkpoint)
        check_checkpoint(checkpoint)
    base = check_model(args, code_shape(codes))
    plain = plain_examples(args.plain_text, base)
    validation, train = (  # the smaller file first: its faults are found at once
        encode_file(path, base.tokenizer, args.max_length, args.skip_long, base.context, limit)
        for path, limit in ((args.val_data, args.val_limit), (args.train_data, 0))
    )
    micro = micro_batch(args, base, train, device)
    return Plan(codes, code_shape(codes), base, train, validation, plain, micro, checkpoint)


def check_data(args: argparse.Namespace) -> dict[str, Any]:
    """The ``codes`` entry of the data. InputError if a file is missing, or data or base belong to other codes."""
    for flag, path in (("--train_data", args.train_data), ("--val_data", args.val_data)):
        if not path.is_file():
            raise InputError(f"{flag} {path} does not exist; write it: {command('Class/gen_fb_data_rq.py')}")
    codes = read_codes_info(args.train_data)
    train = f"--train_data {args.train_data}"
    refuse_other_codes(codes, read_codes_info(args.val_data), train, f"--val_data {args.val_data}")
    before = Path(args.model_name) / RECORD
    if before.is_file():  # a merged model, tuned again
        known = read_json(before, "record")
        if not isinstance(known, dict) or not is_codes_info(known.get("codes", {"file": None})):
            raise InputError(f"{before} does not name the codes of {args.model_name}; merge it again")
        if "codes" in known:
            refuse_other_codes(known["codes"], codes, f"--model_name {args.model_name}", train)
    return codes


def check_report_to(name: str) -> None:
    """InputError for a logger that transformers does not know, or whose package is not installed."""
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks([name] if name not in ("all", "none") else []):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"--report_to {name}: {' '.join(str(error).split())[:200]}; or leave it out") from error


def use_adapter(args: argparse.Namespace, codes: dict[str, Any]) -> None:
    """Check --init_adapter and take over its LoRA settings."""
    saved = read_saved(args.init_adapter)
    refuse_other_codes(
        saved.record["codes"], codes, f"--init_adapter {saved.folder}", f"--train_data {args.train_data}"
    )
    check_base(saved, args.model_name)
    config = adapter_config(saved.folder)
    args.lora_r, args.lora_alpha = config.r, config.lora_alpha
    args.lora_target = ",".join(sorted(config.target_modules or []))
    args.train_rows = saved.record.get("args", {}).get("train_rows", "code")
    print_once(f"continuing {saved.folder}: r {args.lora_r}, alpha {args.lora_alpha}, {args.lora_target}")


def check_model(args: argparse.Namespace, shape: CodeShape | None) -> Base:
    """Configuration and tokenizer of the base. InputError for what cannot be trained with these flags."""
    config = check_causal(args.model_name)
    kind = causal_model_class(config, args.model_name)
    sizes = model_shape(config)
    if attention_of(config, args.model_name) == "eager":
        print_once(f"{kind.__name__} has no SDPA attention: the slower eager attention is used")
    if sizes.experts:
        print_once(f"{kind.__name__} is a mixture of experts: experts and routers get no LoRA")
    names = {name.rsplit(".", 1)[-1] for name, _, _ in sizes.layer_sizes}
    absent = [name for name in targets(args) if not lora_parameters(sizes, 1, (name,))]
    if absent:
        raise InputError(f"--lora_target {args.lora_target}: {args.model_name} has {', '.join(sorted(names))}")
    tokenizer = load_tokenizer(args.model_name)
    size = len(tokenizer)
    code_ids = add_code_tokens(tokenizer, shape)
    codebooks = None
    if args.code_init is not None:
        if shape is None:
            raise InputError(f"--code_init {args.code_init}: the rows have no codes; leave the flag out")
        if len(tokenizer) == size or args.init_adapter is not None:
            model = args.init_adapter or args.model_name
            raise InputError(f"--code_init {args.code_init}: {model} has trained rows of these codes; leave it out")
        codebooks = read_codebooks(args.code_init, shape)
    if shape is not None:
        reload_check(tokenizer, shape)
    row_ids = list(range(len(tokenizer))) if args.train_rows == "all" else code_ids
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    return Base(sizes, context, tokenizer, size, row_ids, codebooks)


def targets(args: argparse.Namespace) -> tuple[str, ...]:
    """Names of the adapted modules; empty means every linear layer but the head."""
    return () if args.lora_target == "all-linear" else tuple(args.lora_target.split(","))


def plain_examples(path: Path, base: Base) -> list[Example]:
    """The sentences of a file, one per line, as examples without a prompt, cut to the base's context."""
    tokenizer = base.tokenizer
    found = []
    for line in filter(None, map(str.strip, read_text(path, "--plain_text").splitlines())):
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = [start, *encode_text(line, tokenizer)][: int(min(base.context, 512))]
        found.append(Example(ids, [IGNORED, *ids[1:]]))
    if not found:
        raise InputError(f"--plain_text {path} has no sentences; write one per line")
    return found


def encode_file(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, skip_long: bool, context: float = math.inf,
    limit: int = 0,
) -> TokenRows:  # fmt: skip
    """The rows of an instruction-data file (the first ``limit``, 0: all) as tokens. InputError if it is missing, empty
    or has a row that is too long."""
    rows, skipped, most = TokenRows(), 0, 0 if skip_long else max_length
    if not limit:  # a row that is too long is found at once, wherever it is
        sizes = (len(example.input_ids) for example in encode_examples(longest_rows(path, plain=True), tokenizer, most))
        check_context(path, max((size for size in sizes if size <= max_length), default=0), context)
    chosen = itertools.islice(read_rows(path, plain=True), limit or None)
    for example in encode_examples(chosen, tokenizer, most):
        if skip_long and len(example.input_ids) > max_length:
            skipped += 1
        else:
            rows.append(example)
    if not len(rows):
        why = f"its {skipped} rows are all longer than --max_length {max_length}" if skipped else "it has no rows"
        raise InputError(f"{path} cannot be used: {why}; write it: {command('Class/gen_fb_data_rq.py')}")
    lengths, answers = rows.lengths, rows.answers
    check_context(path, int(lengths.max()), context)
    print_once(
        f"{path}: {len(rows):,} rows; tokens per row: mean {lengths.mean():.0f}, longest {lengths.max()}; in the "
        f"answer: mean {answers.mean():.1f}, longest {answers.max()}" + (f"; {skipped:,} too long" if skipped else "")
    )
    return rows


def check_context(path: Path, longest: int, context: float) -> None:
    """InputError where the longest row of a file, in tokens, is more than the base model reads."""
    if longest > context:
        raise InputError(
            f"{path} has a row of {longest} tokens, the base model reads {context}; leave such rows out: "
            f"--max_length {context} --skip_long"
        )


def micro_batch(args: argparse.Namespace, base: Base, train: TokenRows, device: torch.device) -> int:
    """Rows at once: --micro_batch_size, or the largest divisor of --batch_size that is expected to fit the GPU."""
    sizes = base.shape
    lora, rows = lora_parameters(sizes, args.lora_r, targets(args)), row_parameters(sizes, len(base.row_ids))
    print_once(
        f"{args.model_name}: {sizes.parameters:,} parameters; trained: {lora:,} of LoRA (r {args.lora_r}), {rows:,} in "
        f"{sizes.matrices} x {len(base.row_ids):,} token rows ({(lora + rows) / sizes.parameters:.2%})"
    )
    longest, answer = int(train.lengths.max()), int(train.answers.max())
    added = max(0, len(base.tokenizer) - sizes.vocabulary)

    def need(batch: int) -> float:
        return expected_memory(
            sizes, lora, rows, added, batch, longest, answer, 2 if args.bf16 or args.fp16 else 4, args.load_in_4bit,
            args.gradient_checkpointing, int(os.environ.get("WORLD_SIZE", "1")), sharding(),
        ).total  # fmt: skip

    micro: int = args.micro_batch_size or args.batch_size
    if device.type != "cuda":
        print_once(f"expected memory: {need(micro) / GIB:.1f} GiB at {micro} x {longest} tokens, on the CPU")
        return micro
    import torch

    room = torch.cuda.get_device_properties(device).total_memory
    if not args.micro_batch_size:
        fits = [n for n in range(1, args.batch_size + 1) if args.batch_size % n == 0 and need(n) <= 0.92 * room]
        micro = max(fits, default=1)
    print_once(
        f"expected memory per GPU: {need(micro) / GIB:.1f} of {room / GIB:.1f} GiB at {micro} x {longest} tokens"
    )
    if need(micro) > room:
        print_once("this is more than there is: configs/fsdp2.yaml, --load_in_4bit, or --skip_long with --max_length")
    return micro

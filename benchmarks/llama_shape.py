"""LoRA training steps on LLaMA2-7B's shape with random weights: tokens/s, share of the product rate, memory.

    python3 benchmarks/llama_shape.py --json F            on a machine with a GPU, a few minutes
    python benchmarks/llama_shape.py --quick              the same code on a tiny shape, also on the CPU

Nothing is downloaded: configuration and tokenizer are built here, the weights are drawn on the device in bfloat16. The
rest is the code of lora_training/train_lora.py: code tokens, trained rows of embedding and head, LoRA r = 16 on every
linear layer, gradient checkpointing, collation, loss, optimizer, transformers' Trainer. One row per micro-batch.

FLOPs (``step_flops``) are those of the layers' frozen matrices and of the attention; adapters and head, 2 % more, are
not counted. ratio: FLOP/s over the rate of a bfloat16 product of two square matrices.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import gc
import tempfile
import time
from typing import TYPE_CHECKING, Any

from benchmarks.measure import benchmark_parser, finish, matmul_rate, print_table, write_rows
from common.errors import InputError, at_least, run_command
from lora_training.memory import Shape

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaTokenizer, PreTrainedTokenizerBase

    from lora_training.plan import Plan

SHAPES: dict[str, dict[str, Any]] = {
    "LLaMA2-7B": {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
                  "num_attention_heads": 32, "max_position_embeddings": 4096},
    "tiny": {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
             "num_attention_heads": 4, "max_position_embeddings": 4096},
}  # fmt: skip
CODES = {"LLaMA2-7B": (1024, 4), "tiny": (16, 2)}  # K, Q
COLUMNS = {"rows": "d", "tokens/s": ",.0f", "s/step": ".3f", "TFLOP/step": ".3g", "TFLOP/s": ".3g", "ratio": ".3f",
           "peak_GB": ".2f", "reserved_GB": ".2f", "expected_GB": ".2f", "note": "<"}  # fmt: skip


def step_flops(shape: Shape, rows: int, length: int) -> int:
    """FLOPs of the frozen matrices and of the attention in one step over ``rows`` rows of ``length`` tokens.

    A product of [m, k] and [k, n] is 2 m k n. Every layer runs forward twice (gradient checkpointing). Frozen matrices
    need the gradient of their input alone. Causal attention: length * (length + 1) / 2 pairs, two products forward,
    five backward (the scores are computed again).
    """
    pairs = rows * length * (length + 1) // 2
    return 2 * rows * length * shape.layer_matrices * 3 + 2 * pairs * shape.width * shape.layers * (2 * 2 + 5)


# ---------------------------------------------------------------- model and rows


def llama_config(shape: str) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPES[shape], bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)


def filled_tokenizer(size: int) -> LlamaTokenizer:
    """A LLaMA tokenizer of ``size`` tokens: control tokens, bytes, the space, and unused words."""
    from transformers import LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [f"▁filler{i}" for i in range(size - len(pieces))]
    return LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], legacy=False)


def make_plan(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, code_ids: list[int], rows: int) -> Plan:
    """The plan of train_lora.py for rows of ``args.sequence`` random tokens."""
    import numpy as np

    from lora_training.code_tokens import CodeShape
    from lora_training.memory import model_shape
    from lora_training.plan import Base, Plan
    from lora_training.prompts import IGNORED, Example
    from lora_training.token_rows import TokenRows

    rng, data = np.random.default_rng(0), TokenRows()
    for _ in range(rows * (args.warm + args.steps)):
        ids = rng.integers(3, len(tokenizer), args.sequence).tolist()
        prompt = args.sequence - args.answer
        data.append(Example(ids, [IGNORED] * prompt + ids[prompt:]))
    shape = model_shape(llama_config(args.shape))
    base = Base(shape, args.sequence, tokenizer, shape.vocabulary, code_ids, None)
    return Plan({"file": None}, CodeShape(*CODES[args.shape]), base, data, data, [], rows, None)


def lora_arguments(args: argparse.Namespace, rows: int, folder: Path) -> argparse.Namespace:
    """Flags of train_lora.py for such a step; the others keep their defaults."""
    from lora_training import train_lora

    return train_lora.parse_args(
        ["--model_name", f"{args.shape}, random weights", "--output_dir", str(folder), "--max_steps",
         str(args.warm + args.steps), "--batch_size", str(rows), "--micro_batch_size", str(rows), "--max_length",
         str(args.sequence), "--bf16", "--gradient_checkpointing"]
    )  # fmt: skip


def build_model(args: argparse.Namespace, lora: argparse.Namespace, plan: Plan, device: torch.device) -> Any:
    """The model of train_lora.py with random weights, drawn on the device in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora_training.code_tokens import resize_model
    from lora_training.lora_trainer import add_adapter
    from lora_training.train_lora import lora_settings

    torch.manual_seed(0)
    config: Any = llama_config(args.shape)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        resize_model(base, plan.base.tokenizer, lora.seed)
    base.config.use_cache = False
    return add_adapter(base, lora_settings(lora), plan.base.row_ids, plan.base.shape)


# ---------------------------------------------------------------- a measurement


def measure(args: argparse.Namespace, rows: int, tokenizer: Any, code_ids: list[int], rate: float) -> dict[str, Any]:
    """One row of the table: training steps of ``rows`` x ``args.sequence`` tokens with train_lora.py's trainer."""
    import torch
    from transformers import TrainerCallback

    from lora_training import lora_trainer, train_lora
    from lora_training.memory import expected_memory, lora_parameters, row_parameters
    from lora_training.plan import check_device
    from lora_training.token_rows import Collate

    first, last, times = args.warm, args.warm + args.steps, list[float]()
    with tempfile.TemporaryDirectory() as folder:
        lora = lora_arguments(args, rows, Path(folder))
        device = check_device(lora)
        plan = make_plan(args, tokenizer, code_ids, rows)
        arguments = train_lora.training_arguments(lora, plan, device)
        arguments.eval_strategy = arguments.save_strategy = "no"
        arguments.load_best_model_at_end = arguments.eval_on_start = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        class Steps(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step in (first, last):
                    finish(device)
                    times.append(time.perf_counter())

        collate = Collate(plan.base.tokenizer.pad_token_id)
        model = build_model(args, lora, plan, device)
        trainer = lora_trainer.make_trainer(model, arguments, plan.train, plan.validation, collate, 0.0)
        trainer.add_callback(Steps())
        trainer.train()
    shape = plan.base.shape
    trained, added = row_parameters(shape, len(code_ids)), len(tokenizer) - shape.vocabulary
    flops = step_flops(shape, rows, args.sequence)
    expected = expected_memory(
        shape, lora_parameters(shape, lora.lora_r), trained, added, rows, args.sequence, args.answer
    ).total
    per_step = (times[1] - times[0]) / args.steps
    row: dict[str, Any] = {
        "rows": rows, "tokens/s": rows * args.sequence / per_step, "s/step": per_step,
        "TFLOP/step": flops / 1e12, "TFLOP/s": flops / per_step / 1e12,
        "ratio": flops / per_step / rate, "expected_GB": expected / 1e9, "matmul_rate": rate,
    }  # fmt: skip
    if device.type == "cuda":
        row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
        row["reserved_GB"] = torch.cuda.max_memory_reserved() / 1e9
    return row


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    begun = time.perf_counter()
    import torch

    from lora_training.base_model import quiet_libraries
    from lora_training.code_tokens import CodeShape, add_code_tokens

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        raise InputError("there is no CUDA device; give --quick to test the script on the CPU")
    quiet_libraries()
    torch.set_num_threads(args.threads)
    rate = matmul_rate("highest", device, 256 if args.quick else 8192, dtype=torch.bfloat16)
    tokenizer = filled_tokenizer(SHAPES[args.shape]["vocab_size"])
    code_ids = add_code_tokens(tokenizer, CodeShape(*CODES[args.shape]))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, no meaningful times"
    print(
        f"{name}; torch {torch.__version__}; {args.shape}, bfloat16, {len(code_ids):,} code tokens, rows of "
        f"{args.sequence} tokens, {args.answer} supervised; bfloat16 products at {rate / 1e12:.2f} TFLOP/s", flush=True
    )  # fmt: skip
    rows = []
    for count in args.micro_batches:
        try:
            rows.append(measure(args, count, tokenizer, code_ids, rate))
        except torch.cuda.OutOfMemoryError as error:  # the other micro-batches may still fit
            rows.append({"rows": count, "note": f"FAILED: {str(error).splitlines()[0][:200]}"})
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    print_table(rows, COLUMNS)
    write_rows(args, rows, begun, device=device, matmul_rate=rate)
    return int(any("note" in row for row in rows))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "a tiny shape and short rows, also on the CPU")
    parser.add_argument("--micro_batches", type=at_least(1), nargs="+", default=[1, 2, 4], help="rows per step")
    parser.add_argument("--sequence", type=at_least(1), default=2048, help="tokens per row")
    parser.add_argument("--answer", type=at_least(1), default=256, help="supervised tokens per row")
    parser.add_argument("--warm", type=at_least(1), default=3, help="steps before the measurement")
    parser.add_argument("--steps", type=at_least(1), default=10, help="steps measured")
    args = parser.parse_args(argv)
    if args.quick:
        args.sequence, args.answer, args.warm, args.steps = 64, 16, 1, 2
    if args.answer >= args.sequence:
        parser.error(f"--answer {args.answer} must be below --sequence {args.sequence}")
    args.shape = "tiny" if args.quick else "LLaMA2-7B"
    return args


if __name__ == "__main__":
    run_command(main)

"""LoRA training steps on LLaMA2-7B's exact shape with random weights: tokens/s, share of the matmul rate, memory.

    OUT=DIR python3 benchmarks/llama_shape.py             on a machine with a GPU, in a few minutes
    python benchmarks/llama_shape.py --quick              the same code on a tiny shape, on the CPU too

Nothing is fetched: configuration and tokenizer are built here, the weights are drawn on the device in bfloat16. The
rest is lora_training/train_lora.py's own: code tokens, rows of embedding and head, LoRA r = 16 on every linear layer,
non-reentrant gradient checkpointing, collation, loss, optimizer, transformers' Trainer.

One measurement per micro-batch; each is kept in --work as it ends, and the same command goes on where it was stopped.
--out (or OUT) gets llama_shape.json and llama_shape.txt.

FLOPs are those of the matrix products that a step executes (``step_flops``): forward, the layers' recomputation, the
gradients of inputs and of what is trained. What the gradient of the whole head costs beyond the trained rows is not
counted: PEFT computes it, nobody needs it. The rate they are held against is that of a bfloat16 product of two square
matrices in the same process.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import gc
import os
import time
from contextlib import redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import CommandParser, InputError, is_disk_full, run_command
from common.files import ROOT, read_json, write_json, write_text
from common.record import make_record
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
GOAL_SHARE, GOAL_GB = 0.45, 22.0
COLUMNS = {"rows": "d", "tokens/s": ",.0f", "s/step": ".3f", "TFLOP/step": ".3g", "TFLOP/s": ".3g", "ratio": ".3f",
           "peak_GB": ".2f", "reserved_GB": ".2f", "expected_GB": ".2f", "note": "<"}  # fmt: skip


# ---------------------------------------------------------------- FLOPs, in closed form


class StepFlops(NamedTuple):
    """Floating-point operations of the matrix products of one forward and backward pass; a product of [m, k] and [k, n]
    is 2 m k n."""

    linears: int  # the frozen matrices of the layers
    adapters: int
    attention: int
    head: int
    head_unneeded: int  # the gradient of the head's frozen rows: executed, not counted

    @property
    def counted(self) -> int:
        return self.linears + self.adapters + self.attention + self.head


def step_flops(
    shape: Shape, rank: int, rows: int, length: int, answer: int, vocabulary: int, trained_rows: int,
    checkpointing: bool = True,
) -> StepFlops:  # fmt: skip
    """What LoRA on all linear layers executes for ``rows`` rows of ``length`` tokens, ``answer`` of them supervised.

    ``vocabulary`` counts the added tokens, ``trained_rows`` are the head's trained ones. Attention is causal: length *
    (length + 1) / 2 pairs, two products forward, five backward (the scores are computed again).
    """
    tokens, again = rows * length, 2 if checkpointing else 1
    D, supervised = shape.width, rows * answer
    both = sum(inner + outer for _, inner, outer in shape.layer_sizes)
    pairs = rows * length * (length + 1) // 2
    # recomputation stops at the last tensor that the gradient needs: a layer's last B has nothing behind it
    last = 2 * tokens * rank * D * shape.layers if checkpointing else 0
    return StepFlops(
        linears=2 * tokens * shape.layer_matrices * (again + 1),  # gradient of the input alone
        adapters=2 * tokens * rank * both * (again + 2) - last,  # of input and weight
        attention=2 * pairs * D * shape.layers * (2 * again + 5),
        head=2 * supervised * D * (2 * vocabulary + trained_rows),
        head_unneeded=2 * supervised * D * (vocabulary - trained_rows),
    )


# ---------------------------------------------------------------- model and rows


def llama_config(shape: str) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPES[shape], bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)


def filled_tokenizer(size: int) -> LlamaTokenizer:
    """A LLaMA tokenizer of ``size`` tokens: control tokens, bytes, the space, and words that no text reaches."""
    from transformers import LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [f"▁filler{i}" for i in range(size - len(pieces))]
    return LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], legacy=False)


def make_plan(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, code_ids: list[int], rows: int) -> Plan:
    """Rows of random tokens, all of ``args.sequence``, as train_lora.py plans its run."""
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


def lora_arguments(args: argparse.Namespace, rows: int, work: Path) -> argparse.Namespace:
    """Flags of train_lora.py: its defaults, so much as a step does not depend on."""
    from lora_training import train_lora

    return train_lora.parse_args(
        ["--model_name", f"{args.shape}, random weights", "--output_dir", str(work), "--max_steps",
         str(args.warm + args.steps), "--batch_size", str(rows), "--micro_batch_size", str(rows), "--max_length",
         str(args.sequence), "--bf16", "--gradient_checkpointing"]
    )  # fmt: skip


def build_model(args: argparse.Namespace, lora: argparse.Namespace, plan: Plan, device: torch.device) -> Any:
    """train_lora.py's model with random weights in place of a base's: drawn on the device, in bfloat16."""
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


class Clock:
    """Seconds of the steps behind the first ``warm``; the device is waited for at both ends alone."""

    def __init__(self, warm: int, device: torch.device) -> None:
        self.warm, self.device, self.times = warm, device, list[float]()

    def step_ends(self, step: int, last: int) -> None:
        from benchmarks.measure import finish

        if step in (self.warm, last):
            finish(self.device)
            self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return self.times[-1] - self.times[0]


def measure(args: argparse.Namespace, rows: int, tokenizer: Any, code_ids: list[int], rate: float) -> dict[str, Any]:
    """One row of the table: training steps of ``rows`` x ``args.sequence`` tokens by train_lora.py's own trainer."""
    import torch
    from transformers import TrainerCallback

    from lora_training import lora_trainer, train_lora
    from lora_training.memory import expected_memory, lora_parameters, row_parameters
    from lora_training.plan import check_device
    from lora_training.token_rows import Collate

    lora = lora_arguments(args, rows, args.work)
    device = check_device(lora)
    plan = make_plan(args, tokenizer, code_ids, rows)
    arguments = train_lora.training_arguments(lora, plan, device)
    arguments.eval_strategy = arguments.save_strategy = "no"
    arguments.load_best_model_at_end = arguments.eval_on_start = False
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = build_model(args, lora, plan, device)
    clock, last = Clock(args.warm, device), args.warm + args.steps

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.step_ends(state.global_step, last)

    collate = Collate(plan.base.tokenizer.pad_token_id)
    trainer = lora_trainer.make_trainer(model, arguments, plan.train, plan.validation, collate, 0.0)
    trainer.add_callback(Steps())
    trainer.train()
    trained, added = row_parameters(plan.base.shape, len(code_ids)), len(tokenizer) - plan.base.shape.vocabulary
    flops = step_flops(plan.base.shape, lora.lora_r, rows, args.sequence, args.answer, len(tokenizer), len(code_ids))
    expected = expected_memory(
        plan.base.shape, lora_parameters(plan.base.shape, lora.lora_r), trained, added, rows, args.sequence, args.answer
    ).total
    per_step = clock.seconds / args.steps
    row: dict[str, Any] = {
        "rows": rows, "tokens/s": rows * args.sequence / per_step, "s/step": per_step,
        "TFLOP/step": flops.counted / 1e12, "TFLOP/s": flops.counted / per_step / 1e12,
        "ratio": flops.counted / per_step / rate, "expected_GB": expected / 1e9, "matmul_rate": rate,
        "flops": flops._asdict(),
    }  # fmt: skip
    if device.type == "cuda":
        row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
        row["reserved_GB"] = torch.cuda.max_memory_reserved() / 1e9
    return row


def attempt(args: argparse.Namespace, rows: int, tokenizer: Any, code_ids: list[int], rate: float) -> dict[str, Any]:
    """The row, or one that says what kept it from being measured: other micro-batches still run."""
    try:
        return measure(args, rows, tokenizer, code_ids, rate)
    except Exception as error:
        if is_disk_full(error):
            raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        return {"rows": rows, "note": f"FAILED: {type(error).__name__}: {reason[:200]}"}


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The two goals, held against what was measured; nothing for what was not."""
    found = []
    ratios = [(row["ratio"], row["rows"]) for row in rows if "ratio" in row]
    if ratios:
        best, at = max(ratios)
        word = "met" if best >= GOAL_SHARE else "NOT met"
        found.append(f"share of the matmul rate at least {GOAL_SHARE}: {word}, best {best:.3f} at {at} rows")
    peaks = [row["reserved_GB"] for row in rows if row["rows"] == 1 and "reserved_GB" in row]
    if peaks:
        word = "met" if peaks[0] < GOAL_GB else "NOT met"
        found.append(f"memory at 1 row under {GOAL_GB:.0f} GB: {word}, {peaks[0]:.2f} GB held by the allocator")
    return found


# ---------------------------------------------------------------- the command


def kept_rows(path: Path, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier call with the same plan has measured; failed rows are measured again."""
    before = read_json(path, "measurements") if path.is_file() else {}
    if not isinstance(before, dict) or before.get("plan") != plan:
        return []
    return [row for row in before["rows"] if "FAILED" not in row.get("note", "")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="benchmarks/llama_shape.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny shape, short rows, on the CPU too; under 50 s")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2, 4], help="rows at once")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens per row")
    parser.add_argument("--answer", type=int, default=256, help="supervised ones among them")
    parser.add_argument("--warm", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=10, help="steps measured")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder of the results (or OUT)")
    parser.add_argument("--work", type=Path, default=os.environ.get("WORK"), help="kept between calls (or WORK)")
    args = parser.parse_args(argv)
    if args.quick:
        args.sequence, args.answer, args.warm, args.steps = 64, 16, 1, 2
    if min(*args.micro_batches, args.warm, args.steps, args.answer) < 1 or args.answer >= args.sequence:
        parser.error("--micro_batches, --warm, --steps and --answer must be 1 or more, --sequence above --answer")
    args.shape = "tiny" if args.quick else "LLaMA2-7B"
    args.work = args.work or ROOT / "checkpoints" / f"llama_shape{'_quick' * args.quick}"
    args.out = args.out or args.work / "out"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    begun = time.perf_counter()
    import torch

    from benchmarks.measure import matmul_rate, print_table
    from lora_training.base_model import quiet_libraries
    from lora_training.code_tokens import CodeShape, add_code_tokens

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        raise InputError("no CUDA device is there; give --quick to try the path on the CPU")
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    rate = matmul_rate("highest", device, 256 if args.quick else 8192, dtype=torch.bfloat16)
    tokenizer = filled_tokenizer(SHAPES[args.shape]["vocab_size"])
    code_ids = add_code_tokens(tokenizer, CodeShape(*CODES[args.shape]))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, no figure here counts"
    heading = (
        f"{name}; torch {torch.__version__}; {args.shape}, bfloat16, {len(code_ids):,} code tokens, rows of "
        f"{args.sequence} tokens, {args.answer} supervised; bfloat16 products at {rate / 1e12:.2f} TFLOP/s"
    )
    print(heading, flush=True)
    keys = ("shape", "sequence", "answer", "warm", "steps")
    plan = {"device": name, "torch": torch.__version__} | {key: getattr(args, key) for key in keys}
    kept = args.work / "measured.json"
    rows = kept_rows(kept, plan)
    for count in args.micro_batches:
        if all(row["rows"] != count for row in rows):
            rows.append(attempt(args, count, tokenizer, code_ids, rate))
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            write_json({"plan": plan, "rows": rows}, kept)
            print(f"{count} rows: {time.perf_counter() - begun:.0f} s", flush=True)
    rows.sort(key=lambda row: row["rows"])

    found = verdicts(rows) if device == "cuda" else []
    record = make_record(
        vars(args), {}, time.perf_counter() - begun, device, rows=rows, matmul_rate=rate, verdicts=found
    )
    write_json(record, args.out / "llama_shape.json")
    table = StringIO()
    with redirect_stdout(table):
        print(heading)
        print_table(rows, COLUMNS)
        for line in found:
            print(line)
    write_text(table.getvalue(), args.out / "llama_shape.txt")
    print(table.getvalue(), end="")
    return int(any("FAILED" in row.get("note", "") for row in rows))


if __name__ == "__main__":
    run_command(main)

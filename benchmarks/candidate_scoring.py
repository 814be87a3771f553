"""Likelihood scoring of 20 candidates by an LLM: the exact ways against a full pass per candidate.

    python benchmarks/candidate_scoring.py [--quick] [--json F]
    python benchmarks/candidate_scoring.py --model meta-llama/Llama-2-7b-hf --device cuda --dtype bfloat16

A LLaMA with random weights unless --model names one; random prompts and candidates with the lengths of the paper's link
prediction (L = 16 positions of Q = 4 levels: 66 tokens). The reference reads prompt and candidate again each time. The
ways alternate and each keeps its best time; error is the largest difference of a candidate's log-likelihood.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.measure import benchmark_parser, write_rows
from common.device import find_device
from common.errors import run_command
from lora_training.candidate_scoring import WAYS, score_candidates

REFERENCE = "full"


def random_llama(width: int, layers: int, vocabulary: int) -> Any:
    """A LLaMA of the given size with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def timed(way: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of one call, and what it returns."""
    start = time.perf_counter()
    result = way()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main() -> int:
    parser = benchmark_parser(__doc__, "prompts of 1,024 tokens alone, one turn, a smaller model")
    parser.set_defaults(threads=1)
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 1024, 2048], help="prompt lengths in tokens")
    parser.add_argument("--candidates", type=int, default=20, help="candidates per prompt")
    parser.add_argument("--tokens", type=int, default=66, help="tokens per candidate")
    parser.add_argument("--model", metavar="NAME", help="hub id or folder (default: random weights)")
    parser.add_argument("--width", type=int, default=512, help="D of the random model")
    parser.add_argument("--layers", type=int, default=6, help="of the random model")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the random model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    parser.add_argument("--turns", type=int, default=3, help="of each way, after one warm-up turn")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and candidates")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.turns, args.width, args.layers = [1024], 1, 384, 4
    torch.set_num_threads(args.threads)
    args.device = str(find_device(args.device))
    torch.manual_seed(args.seed)
    begun, rng = time.perf_counter(), np.random.default_rng(args.seed)
    if args.model:
        from lora_training.base_model import load_base

        model: Any = load_base(args.model, getattr(torch, args.dtype))
    else:
        model = random_llama(args.width, args.layers, args.vocabulary).to(getattr(torch, args.dtype))
    model = model.to(args.device).eval()
    V = model.config.vocab_size
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{args.model or 'random LLaMA'}: {size:,} parameters, {args.dtype}, {args.device}, {args.threads} threads; "
        f"{args.candidates} candidates of {args.tokens} tokens"
    )
    print(f"{'prompt':>7} {'way':12} {'ms':>9} {'ratio':>7} {'error':>9}")
    rows = []
    for P in args.prompts:
        prompt = rng.integers(3, V, P).tolist()
        candidates = rng.integers(3, V, (args.candidates, args.tokens)).tolist()
        ways = {way: partial(score_candidates, model, prompt, candidates, way) for way in WAYS}
        best: dict[str, float] = {}
        scores = {}
        for turn in range(args.turns + 1):
            for way, call in ways.items():
                if args.quick and turn == 0 and way == REFERENCE:
                    continue  # the other ways have warmed up the same operators
                seconds, scores[way] = timed(call, args.device)
                if turn:
                    best[way] = min(best.get(way, float("inf")), seconds)
        for way, seconds in best.items():
            error = float((scores[way] - scores[REFERENCE]).abs().max())
            row = {"prompt": P, "way": way, "ms": seconds * 1e3, "ratio": best[REFERENCE] / seconds, "error": error}
            print(f"{P:7d} {way:12} {row['ms']:9.1f} {row['ratio']:6.2f}x {error:9.1e}")
            rows.append(row)
    write_rows(args, rows, begun, device=args.device, parameters=size)
    return 0


if __name__ == "__main__":
    run_command(main)

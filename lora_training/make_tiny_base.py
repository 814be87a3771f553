"""A small LLaMA, tokenizer and model, trained from scratch on the training split of a graph written as text.

    python lora_training/make_tiny_base.py --dataset data/family --out lora_training/tiny_base
    python lora_training/make_tiny_base.py --dataset data/FB15k-237 --out big --width 640 --layers 12 --vocab_size 16000

The base of demo, tests and ablations, without a download; a Hugging Face folder that the other scripts load like any
LLaMA. It knows no language: get_base.py writes a small pretrained model.

One document per entity: its name, its description and its training triples in both directions, in random order. No
triple of valid or test is read. The tokenizer is like LLaMA's: BPE with byte fallback, no merges across words, single
digits; each fixed beginning and end of a prompt is one token, which makes rows shorter.
It has never seen the answers True and False, whose rows in the head are nearly equal: tune it on such tasks with
train_lora.py --train_rows all.

Initial weights have the standard deviation 1 / sqrt(width), from which small models learn faster than from .02; query
and key weights a tenth of it, so attention starts nearly uniform.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class import prompts
from Class.codes import escape_name, unique_names
from Class.source import Source
from common.device import find_device
from common.errors import CommandParser, InputError, at_least, run_command
from common.files import ROOT, check_replaceable, command, output_folder, replaced_folder, write_json
from common.record import make_record, seed_everything
from data.knowledge_graph import KnowledgeGraph, add_keep_names
from lora_training.adapters import RECORD
from lora_training.memory import enough_memory
from lora_training.prompts import INSTRUCTION, RESPONSE, encode_text, prompt_text

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import LlamaForCausalLM, LlamaTokenizer

# ---------------------------------------------------------------- corpus


def documents(kg: KnowledgeGraph, seed: int) -> Iterator[str]:
    """One text per entity, from names, descriptions and training triples only."""
    source, rng = Source(kg, unique_names(kg)), np.random.default_rng([seed, 11])
    shown, relations = source.shown, source.relations
    lines: list[list[str]] = [[] for _ in range(kg.num_entities)]
    for h, r, t in kg.train.tolist():
        lines[h].append(f"({shown[h]} | {relations[r]} | {shown[t]})")
        lines[t].append(f"({shown[t]} | {prompts.relation_text(relations[r], 'head')} | {shown[h]})")
    for e in rng.permutation(kg.num_entities).tolist():
        own = [lines[e][i] for i in rng.permutation(len(lines[e]))]
        description = escape_name(kg.descriptions[e].strip())
        yield "\n".join([f"{shown[e]}: {description}" if description else shown[e], *own])


def template_texts() -> list[str]:
    """The fixed words of the prompts, for the tokenizer only."""
    query = {"head": "", "relation": "", "head_codes": "", "candidate_names": [""], "candidate_codes": [""]}
    made = [
        prompts.classification("", "", "", "", "", True),
        prompts.prediction(query),
        prompts.link_prediction(query),
        prompts.predict_tail("", "", "", True),
        prompts.validate_triple("", "", "", "", "", True),
    ]
    return [prompt_text({"instruction": text}) + f"{prompts.TRUE}\n{prompts.FALSE}" for text in made]


# ---------------------------------------------------------------- tokenizer

PROMPT_TOKENS = (INSTRUCTION, f"\n\n{RESPONSE}", prompts.PREDICT)


def train_tokenizer(texts: list[str], vocab_size: int) -> LlamaTokenizer:
    """BPE of at most ``vocab_size`` tokens: <unk>, <s>, </s>, 256 bytes, then pieces of the texts.

    The texts PROMPT_TOKENS are added to them.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import AddedToken, LlamaTokenizer

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("\n+"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Metaspace(prepend_scheme="never", split=True),
        pre_tokenizers.Punctuation("contiguous"),
    ])  # fmt: skip
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=first, limit_alphabet=1000, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    made = LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], legacy=False)
    made.add_tokens([AddedToken(text, normalized=False, special=False) for text in PROMPT_TOKENS])
    return made


def token_stream(texts: list[str], tokenizer: LlamaTokenizer) -> NDArray[np.int32]:
    """All documents as one array of ids, each between start and end token."""
    parts = [
        np.array([tokenizer.bos_token_id, *encode_text(text, tokenizer), tokenizer.eos_token_id], dtype=np.int32)
        for text in texts
    ]
    return np.concatenate(parts)


# ---------------------------------------------------------------- model


def build_model(args: argparse.Namespace, vocab_size: int) -> LlamaForCausalLM:
    """A LLaMA with random weights, of the sizes in the flags."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    inner, std = 64 * math.ceil(args.width * 8 / 3 / 64), args.width**-0.5
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=args.width, intermediate_size=inner, num_hidden_layers=args.layers,
            num_attention_heads=args.heads, num_key_value_heads=args.heads, max_position_embeddings=4096,
            initializer_range=std, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, use_cache=True,
        )
    )  # fmt: skip
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(part.weight, std=std / 10)
    return model


def train(model: LlamaForCausalLM, stream: NDArray[np.int32], args: argparse.Namespace, device: str) -> list[float]:
    """Next-token training on blocks of the stream, at a new offset every epoch; returns the reported losses.

    InputError as soon as one of them is not finite.
    """
    import torch

    T, B = min(args.block, len(stream) - 1), args.batch
    blocks = max(1, (len(stream) - 1) // T)
    steps = args.steps or math.ceil(args.epochs * blocks / B)
    torch.nn.Module.to(model, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    rng, order, tokens = np.random.default_rng([args.seed, 12]), np.zeros(0, dtype=np.int64), torch.from_numpy(stream)
    started, report, losses = time.monotonic(), max(1, steps // 20), []
    for step in range(1, steps + 1):
        while len(order) < B:
            order = np.concatenate(
                [order, rng.permutation(blocks) * T + rng.integers(max(1, len(stream) - blocks * T))]
            )
        starts, order = order[:B], order[B:]
        batch = torch.stack([tokens[start : start + T] for start in starts.tolist()]).to(device, torch.int64)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % report == 0 or step == steps:
            losses.append(round(float(loss.detach()), 4))
            if not math.isfinite(losses[-1]):
                raise InputError(f"the loss is not finite at step {step}; lower --lr")
            seconds = time.monotonic() - started
            left = (steps - step) * seconds / step / 60
            speed = f"{step * B * T / seconds:,.0f} tokens/s"
            print(f"step {step}/{steps}: loss {losses[-1]:.3f}, {speed}, {left:.1f} min left", flush=True)
    return losses


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_replaceable(args.out, "--out", RECORD, args.overwrite)
    with replaced_folder(args.out, "--out") as part:
        make_base(args, part)
    print(f"wrote {args.out}")
    print(f"next: {command('lora_training/train_lora.py', '--model_name', args.out)}")


def make_base(args: argparse.Namespace, folder: Path) -> None:
    """Corpus, tokenizer, model and training; model, tokenizer and record go to ``folder``."""
    started = time.monotonic()
    device = str(find_device(args.device))
    kg = KnowledgeGraph.load(args.dataset, args.keep_names)
    import torch
    from transformers.utils import logging

    seed_everything(args.seed)
    texts = list(documents(kg, args.seed))
    # repeated so often that the words of the prompts become whole tokens
    tokenizer = train_tokenizer([*texts, *template_texts() * (1 + len(texts) // 10)], args.vocab_size)
    stream = token_stream(texts, tokenizer)
    model = build_model(args, len(tokenizer))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{kg.name}: {kg.num_entities:,} documents, {len(stream):,} tokens of {len(tokenizer):,}; {size:,} parameters"
    )
    with enough_memory(f"lower --batch {args.batch}, --block {args.block} or --width {args.width}"):
        losses = train(model, stream, args, device)
    torch.nn.Module.to(model, "cpu").eval()
    logging.disable_progress_bar()
    record = make_record(
        vars(args), kg.input_hashes, time.monotonic() - started, device,
        dataset=kg.name, parameters=size, tokens=len(stream), vocabulary=len(tokenizer), losses=losses,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(record, folder / RECORD)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/make_tiny_base.py", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", type=Path, default=ROOT / "data" / "family", help="graph folder or file")
    add_keep_names(parser)
    parser.add_argument(
        "--out", type=output_folder, default=ROOT / "lora_training" / "tiny_base", help="folder of the model"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this script wrote")
    parser.add_argument("--vocab_size", type=at_least(300), default=4000, help="at most so many tokens; 259 are taken")
    parser.add_argument("--width", type=at_least(1), default=256, help="D, hidden size")
    parser.add_argument("--layers", type=at_least(1), default=4, help="transformer layers")
    parser.add_argument("--heads", type=at_least(1), default=4, help="attention heads")
    parser.add_argument("--block", type=at_least(2), default=512, help="tokens per training row")
    parser.add_argument("--batch", type=at_least(1), default=8, help="rows per step")
    parser.add_argument("--epochs", type=float, default=4.0, help="passes over the corpus")
    parser.add_argument("--steps", type=at_least(0), default=0, help="stop after so many steps instead (0: by epochs)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of everything random")
    args = parser.parse_args(argv)
    for name in ("lr", "epochs"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} must be above 0 and finite, got {getattr(args, name)}")
    if args.width % (2 * args.heads):
        parser.error(f"--width {args.width} must be a multiple of twice --heads {args.heads}")
    if args.seed >= 2**63:
        parser.error("--seed must be less than 2**63")
    return args


if __name__ == "__main__":
    run_command(main)

"""Token rows for codes, in a language model's own words: a start for train_lora.py --code_init.

    python lora_training/word_rows.py --codes C.pt --dataset DIR --model_name MODEL --out rows.pt
    python lora_training/train_lora.py ... --code_init rows.pt

The words of an entity are the names of its neighbours in the training split: the mean of their token embeddings, minus
the mean over entities. The rows are the ridge regression of the words on the codes, so that the sum of an entity's rows
is close to its words: if most holders of a code were born in India, its row points to the embeddings of "India". A
model can compare such rows with names before any training. No triple of valid or test is used.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from Class.codes import unique_names
from Class.source import fit_codes
from common.errors import CommandParser, run_command
from common.files import command, output_file, save_torch, sha256_file, write_json
from common.record import make_record
from data.knowledge_graph import KnowledgeGraph
from lora_training.base_model import load_base, load_tokenizer, quiet_libraries
from lora_training.prompts import encode_texts

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 10.0
BLOCK = 4096  # entities at once


def name_vectors(model_name: str, names: list[str]) -> Tensor:
    """The mean embedding [M, D] of each name's tokens, as the name stands after a space."""
    tokenizer = load_tokenizer(model_name)
    model: Any = load_base(model_name, torch.float32)
    embedding = model.get_input_embeddings().weight.detach()
    ids = encode_texts([f" {name}" for name in names], tokenizer)
    flat = torch.tensor([token for name in ids for token in name])
    offsets = torch.tensor([0, *(len(name) for name in ids)]).cumsum(0)[:-1]
    return torch.nn.functional.embedding_bag(flat, embedding, offsets, mode="mean")


def words_of(vectors: Tensor, triples: Tensor) -> tuple[Tensor, Tensor]:
    """The mean vector [n, D] of the neighbours of each entity with triples, and these entities [n]; centred.

    ``vectors`` [M, D]; ``triples`` [N, 3].
    """
    heads, tails = triples[:, 0], triples[:, 2]
    sums = torch.zeros_like(vectors).index_add_(0, heads, vectors[tails]).index_add_(0, tails, vectors[heads])
    degree = torch.bincount(torch.cat([heads, tails]), minlength=len(vectors))
    seen = degree.nonzero().flatten()
    words = sums[seen] / degree[seen, None]
    return words - words.mean(0), seen


def code_rows(codes: Tensor, num_code: int, words: Tensor) -> Tensor:
    """Rows [Q, K, D] whose sum over an entity's codes is the best linear estimate of its words.

    ``codes`` [n, L, Q] and ``words`` [n, D] of the same entities.
    """
    Q, D = codes.shape[2], words.shape[1]
    tokens = (codes + num_code * torch.arange(Q)).flatten(1)
    products, sums = RIDGE * torch.eye(Q * num_code), torch.zeros(Q * num_code, D)
    for part, target in zip(tokens.split(BLOCK), words.split(BLOCK), strict=True):
        counts = torch.zeros(len(part), Q * num_code).scatter_add_(1, part, torch.ones(part.shape))
        products += counts.T @ counts
        sums += counts.T @ target
    return torch.linalg.solve(products, sums).reshape(Q, num_code, D)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/word_rows.py", description=__doc__.split("\n")[0])
    parser.add_argument("--codes", type=Path, required=True, metavar="C.pt", help="codes file")
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="the graph of these codes")
    parser.add_argument("--model_name", required=True, help="the base LLM: hub id or local folder")
    parser.add_argument("--out", type=output_file, required=True, metavar="FILE.pt", help="gets the rows")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, started = parse_args(argv), time.monotonic()
    kg = KnowledgeGraph.load(args.dataset)
    codes, num_code, _ = fit_codes(args.codes, kg, args.dataset)
    quiet_libraries()
    words, seen = words_of(name_vectors(args.model_name, unique_names(kg).names), torch.from_numpy(kg.train))
    own = torch.from_numpy(codes)
    own = own[seen] if own.dim() == 3 else own[seen, :, None]
    rows = code_rows(own, num_code, words)
    save_torch({"codebooks": rows}, args.out)
    hashes = {"codes": sha256_file(args.codes)}
    write_json(make_record(vars(args) | {"seed": None}, hashes, time.monotonic() - started, dataset=kg.name),
               args.out.with_suffix(".json"))  # fmt: skip
    print(f"wrote {args.out}: rows of {rows.shape[0]} x {rows.shape[1]} codes, width {rows.shape[2]}")
    print(f"next: {command('lora_training/train_lora.py', '--model_name', args.model_name, '--code_init', args.out)}")


if __name__ == "__main__":
    run_command(main)

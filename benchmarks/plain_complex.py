"""A plain ComplEx, the reference for stage 1: two embedding tables, softmax cross-entropy, Adagrad.

    python benchmarks/plain_complex.py --dataset data/family --rank 128 --epochs 50

Entities [M, D] and reciprocal relations [2R, D], D = 2 x rank, start at 1e-3; one true tail per example, a softmax over
all entities; dropout on the query or the nuclear 3-norm N3 (Lacroix et al., ICML 2018, arXiv 1806.07297) against
overfitting. Nothing else: no batch norm, no projection, no label smoothing, no weight decay. Ranks are filtered.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import CommandParser, at_least, run_command
from data.knowledge_graph import KnowledgeGraph, add_keep_names, with_inverse
from model.decoders import ComplEx
from model.ranking import filtered_ranks, summarize


class PlainComplEx(nn.Module):
    """Two tables and the ComplEx product; ``dim``: D, numbers per entity and relation."""

    def __init__(self, num_entities: int, num_relations: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.entities = nn.Parameter(torch.randn(num_entities, dim) * 1e-3)
        self.relations = nn.Parameter(torch.randn(2 * num_relations, dim) * 1e-3)
        self.decoder = ComplEx(dim, dropout)

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        """[B, D]: what is multiplied with a tail's vector to give its score."""
        return self.decoder.query(self.entities[heads], self.relations[relations])

    def loss(self, triples: Tensor, n3: float = 0.0) -> Tensor:
        """Mean over ``triples`` [B, 3]: cross-entropy of the tail plus ``n3`` times |h|^3 + |r|^3 + |t|^3, summed."""
        h, r, t = triples.T
        loss = F.cross_entropy(self.query(h, r) @ self.entities.T, t)
        return loss + n3 * n3_norm(self.entities[h], self.relations[r], self.entities[t]) if n3 else loss


def n3_norm(*factors: Tensor) -> Tensor:
    """Mean over rows of the sum of |x_i|^3 over the complex numbers x_i of all ``factors`` [B, D]."""
    cubes = [(a.square() + b.square() + 1e-12).pow(1.5).sum(1) for a, b in (x.chunk(2, dim=1) for x in factors)]
    return torch.stack(cubes).sum(0).mean()


@torch.no_grad()
def rank(model: PlainComplEx, kg: KnowledgeGraph, split: str) -> dict[str, Any]:
    """Filtered metrics of ``split``, both directions."""
    model.eval()
    triples = with_inverse(kg.split(split), kg.num_relations)
    ranks = filtered_ranks(
        lambda heads, relations: model.query(heads, relations) @ model.entities.T,
        triples, kg.answers(), kg.num_relations,
    )  # fmt: skip
    model.train()
    return summarize(ranks, triples[:, 1] >= kg.num_relations)


def main() -> None:
    parser = CommandParser(description="Train a plain ComplEx and print its filtered metrics.")
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="graph folder or file")
    add_keep_names(parser)
    parser.add_argument("--rank", type=at_least(1), default=128, help="complex numbers per entity (default: 128)")
    parser.add_argument("--epochs", type=at_least(1), default=50, help="passes over the triples (default: 50)")
    parser.add_argument("--batch", type=at_least(1), default=1000, help="triples per step (default: 1000)")
    parser.add_argument("--lr", type=float, default=0.1, help="of Adagrad (default: 0.1)")
    parser.add_argument("--dropout", type=float, default=0.4, help="on the query (default: 0.4)")
    parser.add_argument("--n3", type=float, default=0.0, help="weight of the N3 norm (default: 0)")
    parser.add_argument(
        "--eval_every", type=at_least(1), default=10, help="epochs from ranking to ranking (default: 10)"
    )
    parser.add_argument("--test", action="store_true", help="rank test by the best epoch on valid")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of initial weights and order (default: 0)")
    args = parser.parse_args()
    kg = KnowledgeGraph.load(args.dataset, args.keep_names)
    torch.manual_seed(args.seed)
    model = PlainComplEx(kg.num_entities, kg.num_relations, 2 * args.rank, args.dropout)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=args.lr)
    triples = torch.from_numpy(with_inverse(kg.train, kg.num_relations))
    start, best, weights = time.monotonic(), 0.0, model.state_dict()
    for epoch in range(1, args.epochs + 1):
        for batch in triples[torch.randperm(len(triples))].split(args.batch):
            optimizer.zero_grad()
            model.loss(batch, args.n3).backward()
            optimizer.step()
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            valid = rank(model, kg, "valid")
            print(f"epoch {epoch}  valid MRR {valid['mrr']:.4f}  {time.monotonic() - start:.0f} s", flush=True)
            if valid["mrr"] > best:
                best, weights = valid["mrr"], {name: value.clone() for name, value in model.state_dict().items()}
    if args.test:
        model.load_state_dict(weights)
        test = rank(model, kg, "test")
        print(f"best on valid {best:.4f}  test MRR {test['mrr']:.4f}  hits@10 {test['hits@10']:.4f}")


if __name__ == "__main__":
    run_command(main)

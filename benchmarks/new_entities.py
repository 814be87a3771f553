"""Codes for new entities, compared: fold-in, ERAvg, nearest by text, random codes, and retraining as the upper bound.

    python data/hold_out.py --dataset data/FB15k-237 --out HELD
    python run_rq.py --dataset HELD                  and, for the upper bound, --dataset HELD/HELD_with_new
    python benchmarks/new_entities.py --held_out HELD --codes CODES.pt --checkpoint CK.pt \\
        [--retrained_codes ALL.pt --retrained_checkpoint ALL_CK.pt] [--text_emb FILE.npy --text_dataset data/FB15k-237]

Filtered MRR of query.txt from codes alone: of both directions, with the new entity as the query's entity, and as the
answer among all entities. Each row of --text_emb is an entity of --text_dataset.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, run_command
from common.files import sha256_file, write_json
from common.record import make_record, seed_everything
from data.hold_out import SUPPORT
from data.knowledge_graph import SPLITS, Ints, KnowledgeGraph, with_inverse
from model.encode import batches_of, distinct, edges_of_new, read_new
from model.fold_in import FoldIn, Support
from model.from_codes import Scored, load_scored_codes
from model.inputs import load_text
from model.ranking import filtered_ranks

CPU = torch.device("cpu")


@torch.no_grad()
def rank_queries(scored: Scored, graph: KnowledgeGraph, triples: Ints, first_new: int) -> dict[str, float]:
    """MRR of triples [n, 3] in both directions, and by the role of the new entity (its id is ``first_new`` or more)."""
    scorer, relations, codes = scored
    q_all = scorer.eval().entity_vectors_from_codes(codes)

    def score(heads: Tensor, rels: Tensor) -> Tensor:
        return scorer.decoder.query(q_all[heads], relations[rels]) @ q_all.T

    both = with_inverse(triples, graph.num_relations)
    mrr = 1 / filtered_ranks(score, both, graph.answers(), graph.num_relations, batch=512)
    new_is_answer = both[:, 2] >= first_new
    return {
        "mrr": float(mrr.mean()),
        "new_entity_in_query": float(mrr[~new_is_answer].mean()),
        "new_entity_is_answer": float(mrr[new_is_answer].mean()),
    }


def support_of(edges: Ints) -> Support:
    """The edges of a batch, its entities numbered from 0."""
    row = np.unique(edges[:, 0], return_inverse=True)[1]
    return Support(*(torch.from_numpy(column.copy()) for column in (row, edges[:, 1], edges[:, 2])))


def codes_by(method: str, fold_in: FoldIn, edges: Ints) -> Tensor:
    """Codes [N, L, Q] of all new entities from their edges, by "fold_in" or "eravg"."""
    parts = []
    for batch in batches_of(edges):
        support = support_of(batch)
        mean = fold_in.shared_pairs(support) if method == "eravg" else None
        parts.append(fold_in.encode(support) if mean is None else fold_in.codebook.cal_codes(mean))
    return torch.cat(parts)


def nearest_by_text(text: Tensor, known: int) -> Tensor:
    """For each row of text [M + N, T] from ``known`` on, the known entity of the highest cosine."""
    unit = F.normalize(text, dim=1)
    return (unit[known:] @ unit[:known].T).argmax(1)


def reencoded(scored: Scored, graph: KnowledgeGraph, count: int, seed: int) -> dict[str, Any]:
    """Known entities encoded again from their own training triples: how many codes are the same, and MRR on valid.

    The graph without them plays the known part; triples of two of them are not used.
    """
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(np.flatnonzero(~graph.unseen), min(count, graph.num_entities // 10), replace=False))
    order = np.concatenate([np.setdiff1d(np.arange(graph.num_entities), chosen), chosen])  # those chosen come last
    place = np.argsort(order)
    M = len(order) - len(chosen)

    def moved(triples: Ints) -> Ints:
        return np.stack([place[triples[:, 0]], triples[:, 1], place[triples[:, 2]]], axis=1)

    parts: dict[str, Any] = {
        name: [getattr(graph, name)[i] for i in order] for name in ("entities", "labels", "descriptions")
    }
    parts |= {name: moved(graph.split(name)) for name in SPLITS}
    renamed = dataclasses.replace(graph, **parts)
    train = renamed.train
    new_ends = (train[:, [0, 2]] >= M).sum(1)
    rest = dataclasses.replace(renamed, entities=renamed.entities[:M], train=train[new_ends == 0])
    h, r, t = train[new_ends == 1].T
    is_head = h >= M
    edges = np.stack(
        [np.where(is_head, h, t) - M, np.where(is_head, r, r + graph.num_relations), np.where(is_head, t, h)], axis=1
    )
    edges = edges[np.lexsort(edges.T[::-1])]
    entities = np.unique(edges[:, 0])
    codes = scored.codes[order]
    found = codes_by("fold_in", FoldIn(scored.scorer, scored.relations, codes[:M], rest), edges)
    again = codes.clone()
    again[M + entities] = found
    valid = renamed.valid[np.isin(renamed.valid[:, [0, 2]], M + entities).sum(1) == 1]
    before = rank_queries(scored._replace(codes=codes), renamed, valid, M)
    after = rank_queries(scored._replace(codes=again), renamed, valid, M)
    same = found == codes[M + entities]
    return {
        "entities": len(entities), "same_codes": float(same.float().mean()),
        "same_by_level": same.float().mean((0, 1)).tolist(), "queries": 2 * len(valid),
        "mrr_as_trained": before["mrr"], "mrr_encoded_again": after["mrr"],
    }  # fmt: skip


def first_entities(graph: KnowledgeGraph, count: int) -> KnowledgeGraph:
    """The graph of the first entities and of the triples among them."""
    parts: dict[str, Any] = {
        name: getattr(graph, name)[:count] for name in ("entities", "labels", "descriptions", "has_label")
    }
    for name in SPLITS:
        triples = graph.split(name)
        parts[name] = triples[(triples[:, [0, 2]] < count).all(1)]
    return dataclasses.replace(graph, **parts)


def main() -> None:
    parser = CommandParser(prog="benchmarks/new_entities.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--held_out", type=Path, required=True, help="folder that data/hold_out.py wrote")
    parser.add_argument("--codes", type=Path, required=True, help="codes of the known entities")
    parser.add_argument("--checkpoint", type=Path, required=True, help="their checkpoint")
    parser.add_argument("--retrained_codes", type=Path, help="codes of all entities, trained with support_all")
    parser.add_argument("--retrained_checkpoint", type=Path, help="their checkpoint")
    parser.add_argument("--text_emb", type=Path, help="text embeddings, for nearest by text")
    parser.add_argument("--text_dataset", type=Path, help="graph folder whose entities are the rows of --text_emb")
    parser.add_argument("--entities", type=int, default=10**9, help="new entities to take, the first ones by name")
    parser.add_argument("--reencode", type=int, default=300, help="known entities to encode again")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    seed_everything(args.seed)
    part = KnowledgeGraph.load(args.held_out)
    whole = KnowledgeGraph.load(args.held_out / f"{args.held_out.resolve().name}_with_new")
    M, N = part.num_entities, min(args.entities, whole.num_entities - part.num_entities)
    base = load_scored_codes(args.checkpoint, args.codes, part, CPU)
    codebook = base.scorer.rq_codebook
    results: dict[str, Any] = {}

    def report(name: str, codes: Tensor, seconds: float = 0.0) -> None:
        """Rank with the codes [N, L, Q] of the new entities, made distinct."""
        new, _ = distinct(codebook, base.codes, codes)
        found = rank_queries(base._replace(codes=torch.cat([base.codes, new])), whole, whole.test, M)
        results[name] = found | {"cpu_seconds_per_entity": seconds / N}
        print(f"{name:24s} " + "  ".join(f"{key} {value:.4f}" for key, value in results[name].items()), flush=True)

    all_new, whole = whole, first_entities(whole, M + N)
    if args.retrained_codes and args.retrained_checkpoint:
        retrained = load_scored_codes(args.retrained_checkpoint, args.retrained_codes, all_new, CPU)
        retrained = retrained._replace(codes=retrained.codes[: M + N])
        results["retrained"] = rank_queries(retrained, whole, whole.test, M)
        print("retrained", results["retrained"], flush=True)
    report("random", codebook.random_codes(N, base.codes.shape[1], torch.Generator().manual_seed(args.seed)))
    if args.text_emb and args.text_dataset:
        owner = KnowledgeGraph.load(args.text_dataset)
        row = {name: i for i, name in enumerate(owner.entities)}
        text = load_text(args.text_emb, owner.num_entities, owner.entities)
        assert text is not None
        report("nearest_by_text", base.codes[nearest_by_text(text[[row[name] for name in whole.entities]], M)])
    fold_in = FoldIn(base.scorer, base.relations, base.codes, part)
    for size in ["all", *reversed(SUPPORT)]:
        edges = edges_of_new(read_new(args.held_out / f"support_{size}.txt", part), part)
        edges = edges[edges[:, 0] < N]
        for method in ("eravg", "fold_in"):
            start = time.process_time()
            codes = codes_by(method, fold_in, edges)
            report(f"{method}_{size}", codes, time.process_time() - start)
    results["encoded_again"] = reencoded(base, part, args.reencode, args.seed)
    print("encoded again:", results["encoded_again"])
    if args.out:
        inputs = {path.name: sha256_file(path) for path in (args.codes, args.checkpoint)}
        write_json(make_record(vars(args), inputs, time.monotonic() - began, results=results), args.out)


if __name__ == "__main__":
    run_command(main)

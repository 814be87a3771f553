"""Codes for new entities, compared: fold-in (also with texts), the graph encoder where the checkpoint has one, ERAvg,
nearest by text, random codes, and retraining as the upper bound.

    python data/hold_out.py --dataset data/FB15k-237 --out HELD
    python run_rq.py --dataset HELD                  and, for the upper bound, --dataset HELD/HELD_with_new
    python benchmarks/new_entities.py --held_out HELD --codes CODES.pt --checkpoint CK.pt \\
        [--retrained_codes ALL.pt --retrained_checkpoint ALL_CK.pt] [--text_emb FILE.npy --text_dataset data/FB15k-237]

Filtered MRR of query.txt from codes alone: of both directions, over queries and over new entities, with the new entity
as the query's entity, and as the answer among all entities. Each row of --text_emb is an entity of --text_dataset.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, at_least, run_command
from common.files import output_file, sha256_file, write_json
from common.record import make_record, seed_everything
from data.hold_out import SUPPORT
from data.knowledge_graph import SPLITS, Ints, KnowledgeGraph, with_inverse
from model.checkpoint import load_checkpoint
from model.encode import batches_of, distinct, edges_of_new, read_new, support_of
from model.fold_in import FoldIn, Support
from model.from_codes import Scored, load_scored_codes
from model.graph_encode import GraphEncoder
from model.inputs import load_text
from model.ranking import filtered_ranks
from model.RQGCN import RQGCN

CPU = torch.device("cpu")


@torch.no_grad()
def rank_queries(scored: Scored, graph: KnowledgeGraph, triples: Ints, first_new: int) -> dict[str, float]:
    """MRR of triples [n, 3] in both directions, also as the mean over new entities of each one's (one of them may have
    a quarter of the queries), and by the role of the new entity (its id is ``first_new`` or more)."""
    scorer, relations, codes = scored
    q_all = scorer.eval().entity_vectors_from_codes(codes)

    def score(heads: Tensor, rels: Tensor) -> Tensor:
        return scorer.decoder.query(q_all[heads], relations[rels]) @ q_all.T

    both = with_inverse(triples, graph.num_relations)
    mrr = 1 / filtered_ranks(score, both, graph.answers(), graph.num_relations, batch=512)
    new_is_answer = both[:, 2] >= first_new
    own = np.unique(np.where(new_is_answer, both[:, 2], both[:, 0]), return_inverse=True)[1]
    return {
        "mrr": float(mrr.mean()),
        "mrr_over_entities": float((np.bincount(own, mrr) / np.bincount(own)).mean()),
        "new_entity_in_query": float(mrr[~new_is_answer].mean()),
        "new_entity_is_answer": float(mrr[new_is_answer].mean()),
    }


def codes_by(method: str, encoder: FoldIn | GraphEncoder, edges: Ints, text: Tensor | None = None) -> Tensor:
    """Codes [N, L, Q] of the new entities 0..N-1 from their edges, and texts [N, T]; ``method``: the nearest codes of
    ERAvg ("eravg") or of the same at the mean length of known entities ("center"), else the method of ``encoder``."""
    parts = []
    for batch in batches_of(edges):
        entities = np.unique(batch[:, 0])
        support = support_of(batch, entities, None if text is None else text[entities])
        if method in ("eravg", "center"):
            assert isinstance(encoder, FoldIn)
            mean = encoder.mean_of_pairs(support) if method == "eravg" else encoder.center(support)
            parts.append(encoder.codebook.cal_codes(mean))
        else:
            parts.append(encoder.encode(support))
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


def with_entities(graph: KnowledgeGraph, keep: Ints) -> KnowledgeGraph:
    """The graph of the entities ``keep`` (ascending) and of the triples among them."""
    parts: dict[str, Any] = {
        name: [getattr(graph, name)[i] for i in keep] for name in ("entities", "labels", "descriptions")
    }
    parts["has_label"] = graph.has_label[keep]
    place = np.full(graph.num_entities, -1)
    place[keep] = np.arange(len(keep))
    for name in SPLITS:
        h, r, t = graph.split(name).T
        moved = np.stack([place[h], r, place[t]], axis=1)
        parts[name] = moved[(moved[:, [0, 2]] >= 0).all(1)]
    return dataclasses.replace(graph, **parts)


def text_of(args: argparse.Namespace, entities: Sequence[str]) -> Tensor | None:
    """The texts of ``entities`` [M + N, T]."""
    if not (args.text_emb and args.text_dataset):
        return None
    owner = KnowledgeGraph.load(args.text_dataset)
    row = {name: i for i, name in enumerate(owner.entities)}
    text = load_text(args.text_emb, owner.num_entities, owner.entities)
    assert text is not None
    return text[[row[name] for name in entities]]


def parse_args() -> argparse.Namespace:
    parser = CommandParser(prog="benchmarks/new_entities.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--held_out", type=Path, required=True, help="folder that data/hold_out.py wrote")
    parser.add_argument("--codes", type=Path, required=True, help="codes of the known entities")
    parser.add_argument("--checkpoint", type=Path, required=True, help="their checkpoint")
    parser.add_argument("--retrained_codes", type=Path, help="codes of all entities, trained with support_all")
    parser.add_argument("--retrained_checkpoint", type=Path, help="their checkpoint")
    parser.add_argument("--text_emb", type=Path, help="text embeddings, for nearest by text")
    parser.add_argument("--text_dataset", type=Path, help="graph folder whose entities are the rows of --text_emb")
    parser.add_argument("--skip", type=at_least(0), default=0, help="new entities to leave out, the first ones by name")
    parser.add_argument("--entities", type=at_least(1), default=10**9, help="new entities to take, the next by name")
    parser.add_argument("--reencode", type=at_least(0), default=300, help="known entities to encode again")
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed")
    parser.add_argument("--out", type=output_file, help="write the results as JSON")
    return parser.parse_args()


class Comparison:
    """All methods on one held-out split; ``results``: method -> metrics."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.part = args, KnowledgeGraph.load(args.held_out)
        all_new = KnowledgeGraph.load(args.held_out / f"{args.held_out.resolve().name}_with_new")
        M = self.M = self.part.num_entities
        self.chosen = np.arange(all_new.num_entities - M)[args.skip :][: args.entities]  # among the new entities
        self.keep = np.concatenate([np.arange(M), M + self.chosen])
        self.all_new, self.whole = all_new, with_entities(all_new, self.keep)
        self.base = load_scored_codes(args.checkpoint, args.codes, self.part, CPU)
        self.text = text_of(args, self.whole.entities)
        stored, known_text = load_checkpoint(args.checkpoint), None if self.text is None else self.text[:M]
        self.fold_in = FoldIn(*self.base, self.part, known_text)
        self.graph_encoder: GraphEncoder | None = None
        if stored["model"]["gcn_layers"] and stored["model"]["inputs"] == "learned":
            model = RQGCN(M, self.part.num_relations, **stored["model"])
            model.load_state_dict(stored["best"]["model"])
            self.graph_encoder = GraphEncoder(model, self.base.codes, self.part)
        self.results: dict[str, Any] = {}

    def edges(self, size: str) -> Ints:
        """The support of the chosen entities, which are numbered from 0."""
        edges = edges_of_new(read_new(self.args.held_out / f"support_{size}.txt", self.part), self.part)
        edges = edges[np.isin(edges[:, 0], self.chosen)]
        return np.concatenate([edges[:, :1] - self.args.skip, edges[:, 1:]], axis=1)

    def report(self, name: str, codes: Tensor, seconds: float = 0.0) -> None:
        """Rank with the codes [N, L, Q] of the new entities, made distinct."""
        new, _ = distinct(self.base.scorer.rq_codebook, self.base.codes, codes)
        found = rank_queries(
            self.base._replace(codes=torch.cat([self.base.codes, new])), self.whole, self.whole.test, self.M
        )
        self.results[name] = found | {"cpu_seconds_per_entity": seconds / len(codes)}
        print(f"{name:24s} " + "  ".join(f"{key} {value:.4f}" for key, value in self.results[name].items()), flush=True)

    def baselines(self) -> None:
        """Retraining, random codes, and texts without triples."""
        args, book, N = self.args, self.base.scorer.rq_codebook, len(self.chosen)
        if args.retrained_codes and args.retrained_checkpoint:
            retrained = load_scored_codes(args.retrained_checkpoint, args.retrained_codes, self.all_new, CPU)
            retrained = retrained._replace(codes=retrained.codes[self.keep])
            self.results["retrained"] = rank_queries(retrained, self.whole, self.whole.test, self.M)
            print("retrained", self.results["retrained"], flush=True)
        self.report("random", book.random_codes(N, self.base.codes.shape[1], torch.Generator().manual_seed(args.seed)))
        if self.text is not None:
            self.report("nearest_by_text", self.base.codes[nearest_by_text(self.text, self.M)])
            nothing = torch.zeros(0, dtype=torch.int64)
            self.report("text_alone", self.fold_in.encode(Support(nothing, nothing, nothing, N, self.text[self.M :])))

    def methods(self, size: str) -> None:
        """The methods that use triples, from ``support_{size}.txt``."""
        edges, text = self.edges(size), None if self.text is None else self.text[self.M :]
        runs: list[tuple[str, FoldIn | GraphEncoder, Tensor | None]] = [
            ("eravg", self.fold_in, None), ("center", self.fold_in, None), ("fold_in", self.fold_in, None),
        ]  # fmt: skip
        if text is not None:
            runs.append(("fold_in_text", self.fold_in, text))
        if self.graph_encoder is not None:
            runs.append(("encoder", self.graph_encoder, None))
        for method, encoder, own_text in runs:
            start = time.process_time()
            codes = codes_by(method, encoder, edges, own_text)
            self.report(f"{method}_{size}", codes, time.process_time() - start)


def main() -> None:
    args = parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    seed_everything(args.seed)
    compared = Comparison(args)
    print(f"{len(compared.chosen)} new entities, {2 * len(compared.whole.test)} queries")
    compared.baselines()
    for size in (*map(str, SUPPORT), "all"):
        compared.methods(size)
    compared.results["encoded_again"] = reencoded(compared.base, compared.part, args.reencode, args.seed)
    print("encoded again:", compared.results["encoded_again"])
    if args.out:
        inputs = {path.name: sha256_file(path) for path in (args.codes, args.checkpoint)}
        write_json(make_record(
            vars(args), inputs, time.monotonic() - began, new_entities=len(compared.chosen),
            queries=2 * len(compared.whole.test), results=compared.results,
        ), args.out)  # fmt: skip


if __name__ == "__main__":
    run_command(main)

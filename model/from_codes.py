"""Ranking from dumped integers: metrics, candidates and predictions; no encoder is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from Class.codes import load_codes
from common.config import Config
from common.errors import InputError
from common.files import command, write_json
from model.inputs import choose_device, load_graph, load_scorer, order_of_entities

if TYPE_CHECKING:
    import torch

    from data.knowledge_graph import KnowledgeGraph
    from model.RQGCN import CodeScorer


class Scored(NamedTuple):
    """All that ranking needs: the integers and what turns them into scores."""

    scorer: CodeScorer
    relations: torch.Tensor  # [2R, D]
    codes: torch.Tensor  # int64 [M, L, Q]


def format_metrics(metrics: dict[str, Any]) -> str:
    """MRR, MR and Hits on one line, head and tail queries apart."""
    line = "  ".join(f"{key} {metrics[key]:.4f}" for key in ("mrr", "hits@1", "hits@3", "hits@10"))
    return (
        f"{line}  mr {metrics['mr']:.1f}  (mrr of head {metrics['head']['mrr']:.4f}, tail {metrics['tail']['mrr']:.4f})"
    )


def load_scored_codes(
    checkpoint: Path, codes_file: Path, kg: KnowledgeGraph, device: torch.device, *, flag: str = "--eval_codes",
    own_codes: bool = False,
) -> Scored:  # fmt: skip
    """The scorer of a checkpoint and the codes to rank from; InputError where they or the graph do not fit.

    ``flag``: the one that names ``codes_file``; ``own_codes``: InputError, not a warning, where the (known) entities'
    codes are not those of the checkpoint's best epoch.
    """
    from model.trainer import codes_hash

    loaded = load_scorer(checkpoint, kg, device)
    codebook = loaded.scorer.rq_codebook
    order = order_of_entities(codes_file, kg)
    codes = load_codes(codes_file, kg.num_entities if order is None else None, codebook.num_codes)
    wanted = [loaded.seq_len, codebook.num_quantizers]
    if list(codes.shape[1:]) != wanted:
        raise InputError(
            f"{flag} {codes_file} has [L, Q] = {list(codes.shape[1:])}, the checkpoint {checkpoint.name} "
            f"expects {wanted}"
        )
    if order is not None:
        codes = codes[order]
    if kg.num_entities > loaded.num_entities:
        check_triples_of_new(codes_file, kg)
    if codes_hash(codes[: loaded.num_entities]) != loaded.codes_sha256:
        fault = f"{codes_file} are not the codes of the best epoch of {checkpoint}"
        if own_codes:
            raise InputError(f"{flag} {fault}; give both files of one finished run")
        print(f"warning: {fault}", file=sys.stderr)
    return Scored(loaded.scorer, loaded.relations, codes.to(device))


def check_triples_of_new(codes_file: Path, kg: KnowledgeGraph) -> None:
    """InputError where new entities were encoded (--encode) from triples that are test triples of ``kg``."""
    from Class.source import shared_triples
    from data.knowledge_graph import KnowledgeGraph, train_hash

    folder = codes_file.with_suffix("")
    if not folder.is_dir():
        return
    graph = KnowledgeGraph.load(folder, keep_names=True)
    if train_hash(graph.input_hashes) != train_hash(kg.input_hashes):
        shared = shared_triples(graph, kg)["test_triples"]
        if shared:
            raise InputError(
                f"--eval_codes {codes_file} was encoded from the training triples of {folder}, which hold {shared} of "
                f"the {len(kg.test)} test triples of {kg.name}; give --dataset {folder}"
            )


def eval_codes(config: Config) -> None:
    """Rank --split from the integers of --eval_codes alone, or print or write what is predicted from them."""
    from model.evaluation import evaluate_codes, shuffled

    assert config.eval_codes is not None and config.checkpoint is not None
    device = choose_device(config)
    kg = load_graph(config)
    scored = load_scored_codes(config.checkpoint, config.eval_codes, kg, device)
    if config.shuffle_codes:
        scored = scored._replace(codes=shuffled(scored.codes, config.seed))
    if config.predict:
        predict(config, kg, scored)
    if config.export_candidates:
        export_candidates(config, kg, scored)
    if config.predict or config.export_candidates:
        return
    metrics = evaluate_codes(*scored, kg, config.split)
    of_whom = f"shuffled codes of {config.eval_codes}" if config.shuffle_codes else config.eval_codes
    print(f"{config.split} from {of_whom}: {format_metrics(metrics)}")
    if "unseen" in metrics:
        print(
            f"  with an entity unseen in training ({metrics['unseen']['count']} queries): "
            f"{format_metrics(metrics['unseen'])}"
        )
    if config.metrics_out:
        write_json(metrics, config.metrics_out)
        print(f"wrote {config.metrics_out}")


def export_candidates(config: Config, kg: KnowledgeGraph, scored: Scored) -> None:
    """Write the --top candidates of every query of --split, both directions, for Class/gen_lp_data_rq.py.

    Other answers known from train and valid are left out of the lists; the rank of the true tail filters all splits.
    The file's header names checkpoint, codes and split, and says whether the codes were shuffled.
    """
    from Class.candidates import write_candidates
    from model.export import top_candidates

    assert config.export_candidates is not None and config.eval_codes is not None and config.checkpoint is not None
    path = config.export_candidates
    found = top_candidates(*scored, kg, config.split, count=config.top, filter_splits=("train", "valid"))
    write_candidates(
        path, found, kg, model=config.checkpoint.name, codes=config.eval_codes.name, split=config.split,
        shuffled_codes=config.shuffle_codes,
    )  # fmt: skip
    print(f"wrote {path}: {found.ids.shape[1]} candidates for each of {len(found.ids)} queries of {config.split}")
    print(
        "next, with one such file for valid and one for test: "
        f"{command('Class/gen_lp_data_rq.py', '--candidates', 'VALID', 'TEST', '--codes', config.eval_codes)}"
    )


def predict(config: Config, kg: KnowledgeGraph, scored: Scored) -> None:
    """Print the --top tails of (HEAD, RELATION), known answers marked with their split."""
    import torch

    from data.knowledge_graph import find_name

    assert config.predict is not None
    head_word, relation_word = config.predict
    head = find_name(head_word, kg.entities, [kg.labels], "entity", "--predict")
    inverse = relation_word.startswith("~")
    relation_name = relation_word.removeprefix("~")
    relation = find_name(relation_name, kg.relations, [kg.relation_labels], "relation", "--predict")
    relation += kg.num_relations * inverse
    with torch.no_grad():
        q_all = scored.scorer.eval().entity_vectors_from_codes(scored.codes)
        scores = scored.scorer.scores(q_all[[head]], scored.relations[[relation]], q_all)[0]
    known: dict[int, str] = {}
    for split in ("test", "valid", "train"):
        answers = kg.answers(split)
        row = int(answers.rows([head], [relation])[0])
        if row >= 0:
            known |= dict.fromkeys(answers.targets[answers.indptr[row] : answers.indptr[row + 1]].tolist(), split)
    top = scores.topk(min(config.top, len(scores)))
    print(f"{kg.labels[head]} -- {relation_word} -->")
    for place, (score, tail) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), start=1):
        mark = f"  known ({known[tail]})" if tail in known else ""
        print(f"{place:3d}. {score:9.4f}  {kg.labels[tail]} [{kg.entities[tail]}]{mark}")

"""Ranking from dumped integers: metrics, candidates and predictions, with no encoder in sight."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from Class.codes import load_codes
from common.errors import InputError
from common.files import write_json
from model.inputs import check_entities, check_trained_on, choose_device, load_graph, load_scorer

if TYPE_CHECKING:
    import torch

    from data.knowledge_graph import KnowledgeGraph
    from model.ensemble import JointScorer
    from model.RQGCN import CodeScorer


def format_metrics(metrics: dict[str, Any]) -> str:
    """MRR, MR and Hits on one line, head and tail queries apart."""
    line = "  ".join(f"{key} {metrics[key]:.4f}" for key in ("mrr", "hits@1", "hits@3", "hits@10"))
    return (
        f"{line}  mr {metrics['mr']:.1f}  (mrr of head {metrics['head']['mrr']:.4f}, tail {metrics['tail']['mrr']:.4f})"
    )


def load_scored_codes(
    args: argparse.Namespace, kg: KnowledgeGraph, device: torch.device
) -> tuple[CodeScorer | JointScorer, torch.Tensor, torch.Tensor]:
    """(scorer, relations [2R, D], codes [M, L, Q]) from --checkpoint and --eval_codes, checked against each other."""
    import torch

    from model.ensemble import JointScorer
    from model.evaluation import shuffled
    from model.trainer import codes_hash

    loaded = [load_scorer(path, kg, device) for path in args.checkpoint]
    codebook = loaded[0].scorer.rq_codebook
    codes = load_codes(args.eval_codes, kg.num_entities, codebook.num_codes)
    for path, one in zip(args.checkpoint, loaded, strict=True):
        there = one.scorer.rq_codebook
        wanted = [one.seq_len, there.num_quantizers]
        if list(codes.shape[1:]) != wanted:
            raise InputError(
                f"--eval_codes {args.eval_codes} has [L, Q] = {list(codes.shape[1:])}, the checkpoint {path.name} "
                f"expects {wanted}"
            )
        if there.num_codes != codebook.num_codes:
            raise InputError(
                f"--checkpoint {path} has {there.num_codes} codes a level, {args.checkpoint[0].name} has "
                f"{codebook.num_codes}; give checkpoints of the same codes"
            )
    check_entities(args.eval_codes, kg)
    for path, one in zip(args.checkpoint, loaded, strict=True):
        check_trained_on(f"--checkpoint {path}", *one.learned_from, kg)
        if codes_hash(codes) != one.codes_sha256:
            print(f"warning: {args.eval_codes} are not the codes of {path}'s best epoch", file=sys.stderr)
    if args.shuffle_codes:
        codes = shuffled(codes, args.seed)
    if len(loaded) == 1:
        return loaded[0].scorer, loaded[0].relations, codes.to(device)
    joint = JointScorer([one.scorer for one in loaded]).eval()
    return joint, torch.cat([one.relations for one in loaded], dim=1), codes.to(device)


def eval_codes(args: argparse.Namespace) -> None:
    """Rank --split from the integers of --eval_codes alone; no encoder is built."""
    from model.evaluation import evaluate_codes

    device = choose_device(args)
    kg = load_graph(args)
    scorer, relations, codes = load_scored_codes(args, kg, device)
    if args.predict:
        predict(args, kg, scorer, relations, codes)
        return
    if args.export_candidates:
        export_candidates(args, kg, scorer, relations, codes)
        return
    metrics = evaluate_codes(scorer, relations, codes, kg, args.split)
    print(
        f"{args.split} from {'shuffled codes of ' if args.shuffle_codes else ''}{args.eval_codes}: "
        f"{format_metrics(metrics)}"
    )
    if "unseen" in metrics:
        print(
            f"  with an entity unseen in training ({metrics['unseen']['count']} queries): "
            f"{format_metrics(metrics['unseen'])}"
        )
    if args.metrics_out:
        write_json(metrics, args.metrics_out)
        print(f"wrote {args.metrics_out}")


def export_candidates(
    args: argparse.Namespace, kg: KnowledgeGraph, scorer: CodeScorer | JointScorer,
    relations: torch.Tensor, codes: torch.Tensor,
) -> None:  # fmt: skip
    """Write the --top candidates of every query of --split, both directions, for Class/gen_lp_data_rq.py.

    Other answers known from train and valid are left out of the lists; the truth's own rank filters all splits.
    """
    from Class.candidates import check_ending, write_candidates
    from model.export import top_candidates

    check_ending(args.export_candidates)
    found = top_candidates(
        scorer,
        relations,
        codes,
        kg,
        args.split,
        count=args.top or 20,
        filter_splits=("train", "valid"),
        shuffled=args.shuffle_codes,
    )
    write_candidates(
        args.export_candidates,
        found,
        kg,
        model=" + ".join(path.name for path in args.checkpoint),
        codes=args.eval_codes.name,
        split=args.split,
    )
    print(
        f"wrote {args.export_candidates}: {found.ids.shape[1]} candidates for each of {len(found.ids)} queries "
        f"of {args.split}"
    )
    print(
        "next, with one such file for valid and one for test: "
        f"python Class/gen_lp_data_rq.py --candidates VALID TEST --codes {args.eval_codes}"
    )


def predict(
    args: argparse.Namespace, kg: KnowledgeGraph, scorer: CodeScorer | JointScorer,
    relations: torch.Tensor, codes: torch.Tensor,
) -> None:  # fmt: skip
    """Print the --top tails of (HEAD, RELATION), known answers marked with their split."""
    import torch

    from data.knowledge_graph import find_name

    head_word, relation_word = args.predict
    head = find_name(head_word, kg.entities, [kg.labels], "entity", "--predict")
    inverse = relation_word.startswith("~")
    relation_name = relation_word.removeprefix("~")
    relation = find_name(relation_name, kg.relations, [kg.relation_labels], "relation", "--predict")
    relation += kg.num_relations * inverse
    scorer.eval()
    with torch.no_grad():
        q_all = scorer.entity_vectors_from_codes(codes)
        scores = scorer.scores(q_all[[head]], relations[[relation]], q_all)[0]
    known: dict[int, str] = {}
    for split in ("test", "valid", "train"):
        answers = kg.answers(split)
        row = int(answers.rows([head], [relation])[0])
        if row >= 0:
            known |= dict.fromkeys(answers.targets[answers.indptr[row] : answers.indptr[row + 1]].tolist(), split)
    top = scores.topk(min(args.top or 10, len(scores)))
    print(f"{kg.labels[head]} -- {relation_word} -->")
    for place, (score, tail) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), start=1):
        mark = f"  known ({known[tail]})" if tail in known else ""
        print(f"{place:3d}. {score:9.4f}  {kg.labels[tail]} [{kg.entities[tail]}]{mark}")

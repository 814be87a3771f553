"""Link prediction over 20 candidates: rows of the paper's Table 1, answered by the codes of the three best.

    python run_rq.py --dataset D --eval_codes C.pt --checkpoint CK.pt --export_candidates valid.npz --split valid
    python run_rq.py --dataset D --eval_codes C.pt --checkpoint CK.pt --export_candidates test.npz --split test
    python Class/gen_lp_data_rq.py --codes C.pt --candidates valid.npz test.npz
    python Class/gen_lp_data_rq.py --codes C.pt --candidates train.npz valid.npz test.npz --from train --out_dir DIR
    python Class/gen_lp_data_rq.py --codes C.pt --candidates valid.npz test.npz --without_lists

The paper tunes twice: first on the queries of the training split (--from train, into a folder of its own), then on
nine tenths of the valid split (--from valid). The last tenth is the validation set and the test split the test set in
both cases. Triples of one pair of entities stay in one part. Queries for the head
are queries for the tail of the inverse relation. Lists may come from any other model: see Class/candidates.py.

A row's output is the truth, then the candidate model's two best others. ``candidate_rank`` is the truth's filtered rank
in the candidate model, also where the truth is not listed. Training may drop such queries; validation and test never
do. ``truth`` starts with the truth; other right answers follow that are listed because only the test split has them:
ranking ignores these.

Lists are shuffled, seeded by the query, so that a model cannot answer by the order. --candidate_order ranked keeps the
candidate model's order, with --from valid only: a model ranks the truth of its own training queries first.

--without_lists writes a second folder, tail_prediction/, to tune on: each query without its candidates, answered by the
codes of the truth (its name without codes). inference.py --decode likelihood ranks candidates by the likelihood of
their answer to such a query.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.candidates import Bools, Candidates, Floats, find_rows, need_candidates, other_answers, read_candidates
from Class.prompts import ANSWERS, link_prediction, numbered, prediction
from Class.rows import PREDICTED, STATS, Row, make_row, train_command, write_task
from Class.source import Ints, Source, add_flags, check_flags, open_source, triple_keys
from common.errors import CommandParser, InputError, at_least, run_command
from common.files import command
from data.knowledge_graph import KnowledgeGraph, TrueTails, with_inverse

TASK = "link_prediction"
ORDERS = ("ranked", "shuffled")
VALIDATION_PART = 0.1  # of the valid split, as in the paper
CHUNK = 1024
COUNTED = ("truth_listed", "dropped", "truth_first", "truth_shares_its_codes_with_a_candidate")


# ---------------------------------------------------------------- splits


class Parts(NamedTuple):
    """Triples [n, 3] that no other part holds."""

    train: Ints  # the training split
    tuning: Ints  # nine tenths of valid
    validation: Ints  # the last tenth
    test: Ints  # the test split, repeated triples and all


def disjoint_parts(kg: KnowledgeGraph, seed: int) -> Parts:
    """Split valid 9:1 by pairs of entities; test triples are removed from valid and train, valid ones from train."""
    held_out = triple_keys(kg.test, kg)
    valid = kg.valid[~np.isin(triple_keys(kg.valid, kg), held_out)]
    train = kg.train[~np.isin(triple_keys(kg.train, kg), np.concatenate([triple_keys(valid, kg), held_out]))]
    ends = np.sort(valid[:, [0, 2]], axis=1)
    _, pair, size = np.unique(ends[:, 0] * kg.num_entities + ends[:, 1], return_inverse=True, return_counts=True)
    order = np.random.default_rng([seed, 9]).permutation(len(size))
    count = int((np.cumsum(size[order]) <= round(VALIDATION_PART * len(valid))).sum())
    kept = np.isin(pair, order[: max(1, count)])
    return Parts(train, valid[~kept], valid[kept], kg.test)


def both_directions(triples: Ints, num_relations: int) -> Ints:
    """[n, 3] -> [2n, 3]: the tail query of each triple, then its head query (t, r + R, h)."""
    return with_inverse(triples, num_relations).reshape(2, -1, 3).swapaxes(0, 1).reshape(-1, 3)


# ---------------------------------------------------------------- lists


class Lists(NamedTuple):
    """The lists of a block of queries for prompts."""

    ids: Ints  # [n, count], best first, ending in -1
    others: Bools  # [n, count] right answers that only the test split has
    rank: Floats  # [n] the truth's filtered rank by the candidate model, NaN where unknown


def make_lists(
    candidates: Candidates,
    rows: Ints,
    queries: Ints,
    kg: KnowledgeGraph,
    tuning: TrueTails,
    known: TrueTails,
    count: int,
) -> Lists:
    """The ``count`` best of the lists ``rows`` [n] for queries [n, 3], other ``tuning`` answers left out.

    A rank that the file does not give comes from the list where the truth is in it, filtered by all ``known``.
    """
    ids = candidates.ids[rows]
    filtered = other_answers(ids, queries, known, kg)
    given = np.where(candidates.truth[rows] == queries[:, 2], candidates.rank[rows], np.nan)
    rank = np.where(np.isnan(given), _rank_in_list(candidates, rows, queries[:, 2], filtered), given)
    out = other_answers(ids, queries, tuning, kg) | (ids < 0)
    order = np.argsort(out, axis=1, kind="stable")[:, :count]
    ids = np.take_along_axis(np.where(out, -1, ids), order, axis=1)
    return Lists(ids, np.take_along_axis(filtered & ~out, order, axis=1), rank)


def _rank_in_list(candidates: Candidates, rows: Ints, truth: Ints, filtered: Bools) -> Floats:
    """Filtered rank [n] of the truth in its list, equal scores at their mean; NaN where it is not listed."""
    ids = candidates.ids[rows]
    at = (ids == truth[:, None]) & (ids >= 0)
    place = at.argmax(axis=1)[:, None]
    counted = ~filtered & ~at & (ids >= 0)
    if candidates.scores is None:
        rank = 1.0 + (counted & (np.arange(ids.shape[1]) < place)).sum(axis=1)
    else:
        scores = candidates.scores[rows]
        own = np.take_along_axis(scores, place, axis=1)
        rank = 1 + (counted & (scores > own)).sum(axis=1) + (counted & (scores == own)).sum(axis=1) / 2
    return np.where(at.any(axis=1), rank, np.nan)


# ---------------------------------------------------------------- rows


@dataclass
class Count:
    """Counts over one split's queries while its rows are written."""

    seen: Counter[str] = field(default_factory=Counter)
    ranks: list[float] = field(default_factory=list)  # of the truth in the candidate model, NaN where unknown

    def summary(self) -> dict[str, Any]:
        """Counts, and the candidate model's metrics; an unknown rank counts as infinite."""
        ranks = np.nan_to_num(np.array(self.ranks), nan=np.inf)
        found = {"mrr": 1 / ranks} | {f"hits@{k}": ranks <= k for k in (1, 3, 10)}
        return {
            "queries": len(ranks),
            **{key: self.seen[key] for key in COUNTED},
            "candidate_rank_unknown": int(np.isinf(ranks).sum()),
            "candidate_model": {name: round(float(values.mean()), 4) for name, values in found.items()},
        }


class Plan(NamedTuple):
    """One split: its queries and the rows of their lists."""

    split: str
    queries: Ints  # [n, 3]
    rows: Ints  # [n]
    drop_unlisted: bool


def rows_of(
    source: Source, candidates: Candidates, plan: Plan, answers: dict[str, TrueTails], num_candidates: int,
    count: Count, shuffle_seed: int | None,
) -> Iterator[Row]:  # fmt: skip
    """The split's rows, one by one; adds to ``count``. ``shuffle_seed``: of the lists' order; None: ranked."""
    kg, R = source.kg, source.kg.num_relations
    for start in range(0, len(plan.queries), CHUNK):
        queries, rows = plan.queries[start : start + CHUNK], plan.rows[start : start + CHUNK]
        lists = make_lists(candidates, rows, queries, kg, answers["tuning"], answers["known"], num_candidates)
        for (h, r, t), ids, others, rank in zip(queries.tolist(), *lists, strict=True):
            ranked = ids[ids >= 0].tolist()
            also_right = [ranked[i] for i in np.flatnonzero(others)] if plan.split == "test" else []
            count.ranks.append(rank)
            count.seen["truth_listed"] += t in ranked
            count.seen["truth_first"] += ranked[:1] == [t]
            count.seen[COUNTED[-1]] += any(source.code_texts[e] == source.code_texts[t] for e in ranked if e != t)
            if plan.drop_unlisted and t not in ranked:
                count.seen["dropped"] += 1
                continue
            triple = source.raw_triple(*((h, r, t) if r < R else (t, r - R, h)))
            if not ranked:
                raise InputError(
                    f"--candidates: the list of the {plan.split} query {triple} holds other right answers only; "
                    "give longer lists"
                )
            shown = ranked
            if shuffle_seed is not None:
                shown = np.random.default_rng([shuffle_seed, h, r, t]).permutation(ranked).tolist()
            best = [t, *(entity for entity in ranked if entity != t)][:ANSWERS]
            fields = source.query_fields(h, r, shown)
            yield make_row(
                link_prediction(fields),
                numbered([source.code_texts[entity] for entity in best]),
                id=f"{TASK}-{plan.split}-{len(count.ranks) - 1}",
                task_type=TASK,
                split=plan.split,
                triple=triple,
                truth=[kg.entities[entity] for entity in [t, *also_right]],
                candidate_rank=None if np.isnan(rank) else float(rank),
                **fields,
            )


def predicted(rows: Iterable[Row], source: Source) -> Iterator[Row]:
    """Rows of ``rows_of`` without their candidates, answered by the truth's codes (its name without codes)."""
    entity = {name: i for i, name in enumerate(source.kg.entities)}
    for row in rows:
        answer = source.code_texts[entity[row["truth"][0]]]
        yield make_row(
            prediction(row), answer, id=row["id"].replace(TASK, PREDICTED, 1), task_type=PREDICTED,
            split=row["split"], triple=row["triple"], direction=row["direction"], truth=row["truth"][:1],
            head=row["head"], relation=row["relation"], head_codes=row["head_codes"],
        )  # fmt: skip


# ---------------------------------------------------------------- command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="Class/gen_lp_data_rq.py", description=__doc__.split("\n")[0])
    add_flags(parser, code_format="compact")
    group = parser.add_argument_group("candidates")
    group.add_argument(
        "--candidates", nargs="+", required=True, metavar="FILE", help="lists (.npz or .json), all splits"
    )
    group.add_argument("--num_candidates", type=at_least(2), default=20, help="candidates that a prompt lists")
    group.add_argument("--from", dest="tune_from", choices=["train", "valid"], default="valid",
                       help="training rows: queries of the training split, or of nine tenths of valid")  # fmt: skip
    group.add_argument("--candidate_order", choices=ORDERS, default="shuffled", help="order of lists in prompts")
    group.add_argument("--drop_unlisted", action=argparse.BooleanOptionalAction, default=True,
                       help="leave out training queries whose truth is not listed")  # fmt: skip
    group.add_argument("--without_lists", action="store_true", help="also write tail_prediction/: the queries without "
                       "candidates, answered by the truth's codes (its name without codes)")  # fmt: skip
    args = parser.parse_args(argv)
    check_flags(args, parser)
    if args.candidate_order == "ranked" and args.tune_from == "train":
        parser.error(
            "--candidate_order ranked needs --from valid: a model ranks the queries of its training split with the "
            "truth first"
        )
    beside = args.out_dir / PREDICTED
    if not args.without_lists and (beside / STATS).is_file():
        parser.error(f"--out_dir holds {beside} of an earlier call; give --without_lists, or remove it")
    return args


def make_plans(args: argparse.Namespace, kg: KnowledgeGraph, candidates: Candidates) -> list[Plan]:
    """The splits' queries with their lists. InputError where a query has none."""
    parts = disjoint_parts(kg, args.seed)
    train = parts.train if args.tune_from == "train" else parts.tuning
    plans, missing = [], []
    for split, triples, name in (
        ("train", train, args.tune_from), ("validation", parts.validation, "valid"), ("test", parts.test, "test"),
    ):  # fmt: skip
        queries = both_directions(triples, kg.num_relations)
        if split == "train":
            queries = np.random.default_rng([args.seed, 0]).permutation(queries)
        rows = find_rows(candidates, queries, kg)
        if (rows < 0).any():
            missing.append(f"{int((rows < 0).sum()):,} of {len(queries):,} {name} queries ({split})")
            continue
        plans.append(Plan(split, queries, rows, args.drop_unlisted and split == "train"))
    if missing:
        raise InputError(
            f"--candidates {' '.join(map(str, args.candidates))} has no list for {' and '.join(missing)}; make them: "
            "python run_rq.py --dataset DIR --eval_codes CODES.pt --checkpoint CK.pt --export_candidates FILE.npz "
            "--split train|valid|test"
        )
    return plans


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for path in args.candidates:
        need_candidates(Path(path))
    source = open_source(args)
    kg = source.kg
    candidates = read_candidates(args.candidates, kg)
    plans = make_plans(args, kg, candidates)
    answers = {"tuning": kg.answers("train", "valid"), "known": kg.answers()}
    counts = {plan.split: Count() for plan in plans}
    orders = {plan.split: args.candidate_order for plan in plans}
    seed = args.seed if args.candidate_order == "shuffled" else None
    rows = {
        plan.split: rows_of(source, candidates, plan, answers, args.num_candidates, counts[plan.split], seed)
        for plan in plans
    }
    write_task(
        args.out_dir / TASK, TASK, args, source, rows,
        lambda: {
            "candidate_order": orders,
            "candidates": candidates.info,
            "queries": {split: count.summary() for split, count in counts.items()},
        },
    )  # fmt: skip
    if args.without_lists:
        alone = {
            plan.split: predicted(
                rows_of(source, candidates, plan._replace(drop_unlisted=False), answers, 2, Count(), None), source
            )
            for plan in plans
        }
        write_task(args.out_dir / PREDICTED, PREDICTED, args, source, alone)
        print(f"next, to tune on queries without candidates: {train_command(args.out_dir / PREDICTED)}")
    for split, count in counts.items():
        summary = count.summary()
        model = "  ".join(f"{key} {value:.4f}" for key, value in summary["candidate_model"].items())
        print(
            f"  {split:10} truth listed for {summary['truth_listed']:,} of {summary['queries']:,} queries, "
            f"{args.candidate_order}; {summary['dropped']:,} dropped; candidate model: {model}"
        )
        if summary["candidate_rank_unknown"]:
            unknown = summary["candidate_rank_unknown"]
            print(
                f"  {split:10} {unknown:,} truths are not listed and have no rank: they count as rank infinity, "
                "which understates the candidate model; give ranks or longer lists"
            )
    mix, check = command("Class/build_mix.py", "--out_dir", args.out_dir), command("Class/check_leaks.py", args.out_dir)
    print(f"next: {mix}, then {check}")


if __name__ == "__main__":
    run_command(main)

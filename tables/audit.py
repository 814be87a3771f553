"""Audit of LLM results on link prediction and triple classification: metrics by entity id, and what changes them.

    python tables/audit.py --dataset data/FB15k-237 --answers lora_training/answers.jsonl
    python tables/audit.py --dataset data/FB15k-237 --answers prediction.json --lists test.json --json audit.json
    python tables/audit.py --dataset data/WN18RR --answers a/answers.jsonl --against b/answers.jsonl

Reads answers of this toolkit, SSQR, DIFT, GS-Quant and KoPA (tables/audit_formats.py). docs/AUDIT.md explains each line
of the report.

Rank of a query (h, r, ?) with truth t: the answered entities come first, in their order, then all others in the
candidate ranker's order. Other known answers of train, valid and test are left out, ties get their mean rank:

    rank = 1 + #{answered before t} + #{tied with t} / 2                      if t is answered
    rank = the ranker's rank + #{answered that the ranker has behind t}       if not

A query without an answer keeps the ranker's rank, or the worst one if the ranker's is unknown.

Exit code 1: a finding changes MRR (or accuracy) by more than .005. Exit code 2: bad input.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, run_command
from common.files import output_file, write_json
from data.knowledge_graph import KnowledgeGraph, TrueTails, add_keep_names, with_inverse
from lora_training.score_answers import best_threshold, classification_metrics, ranking_metrics
from tables.audit_formats import NO_ENTITY, READERS, Contents, Query, Row, Triple, name_key, read_contents

LIMIT = 0.005  # of MRR or accuracy: a finding that changes more decides the exit code
EXAMPLES = 3
FEW = 10  # expected number of listed test-only answers from which a count of 0 is a finding
Z95 = 1.96
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One kind of fault: how often, examples, and what it changes."""

    name: str
    count: int
    of: int
    examples: list[str]
    change: float | None = None  # of MRR or accuracy by this fault: with it minus without it
    note: str = ""

    @property
    def decides(self) -> bool:
        return self.change is not None and abs(self.change) > LIMIT


class Audit:
    """Rows of link prediction beside the standard queries: both directions of each distinct test triple."""

    def __init__(self, kg: KnowledgeGraph, rows: Sequence[Row]) -> None:
        self.kg, self.rows = kg, rows
        queries = with_inverse(kg.test, kg.num_relations)
        self.queries: list[Query] = [(h, r, t) for h, r, t in dict.fromkeys(map(tuple, queries.tolist()))]
        standard = set(self.queries)
        pairs = list(dict.fromkeys(query[:2] for query in [*self.queries, *(row.query for row in rows if row.query)]))
        self.known = _answers_of(kg.answers(), pairs)  # of (h, r)
        before_test = _answers_of(kg.answers("train", "valid"), pairs)
        self.test_only = {pair: self.known[pair] - before_test[pair] for pair in pairs}
        self.first: dict[Query, Row] = {}  # the first row of each standard query
        self.repeated, self.foreign = [], []
        for row in rows:
            if row.query is None or row.query not in standard:
                self.foreign.append(row)
            elif row.query in self.first:
                self.repeated.append(row)
            else:
                self.first[row.query] = row
        self.ranks = {id(row): self.rank(row, row.groups) for row in rows if row.query is not None}

    def worst(self, query: Query) -> float:
        """Rank of the truth behind all entities that are no other known answers."""
        return float(self.kg.num_entities - len(self.known[query[:2]] - {query[2]}))

    def rank(self, row: Row, groups: Iterable[Sequence[int]]) -> float:
        """Rank of the truth if ``groups`` of entities are answered (see the top of this file)."""
        assert row.query is not None
        truth, others = row.query[2], self.known[row.query[:2]] - {row.query[2]}
        answered: set[int] = set()
        for group in groups:
            members = set(group) - others - answered - {NO_ENTITY}
            if truth in members:
                return 1 + len(answered) + (len(members) - 1) / 2
            answered |= members
        at = row.ranked.index(truth) if truth in row.ranked else len(row.ranked)
        ahead = set(row.ranked[:at]) - others - {NO_ENTITY}
        base = row.rank
        if base is None:
            base = 1.0 + len(ahead) if truth in row.ranked else self.worst(row.query)
        return min(base + len(answered - ahead), max(base, self.worst(row.query)))

    def metrics(self, rank_of: Callable[[Row], float] | None = None) -> Metrics:
        """Metrics over the standard queries, also by direction; a query without a row has the worst rank."""
        value = rank_of or (lambda row: self.ranks[id(row)])
        ranks = {
            query: value(self.first[query]) if query in self.first else self.worst(query) for query in self.queries
        }
        found = ranking_metrics(list(ranks.values())) | {"count": len(ranks)}
        for side, inverse in (("head", True), ("tail", False)):
            part = [rank for (_, r, _), rank in ranks.items() if (r >= self.kg.num_relations) == inverse]
            found[side] = ranking_metrics(part)
        return found

    def text(self, query: Query | None) -> str:
        """A query and its truth by names."""
        if query is None:
            return "no test query fits"
        h, r, t = query
        R, labels, entities = self.kg.num_relations, self.kg.labels, self.kg.entities
        pair = f"?, {self.kg.relation_labels[r - R]}, {labels[h]}" if r >= R else (
            f"{labels[h]}, {self.kg.relation_labels[r]}, ?")  # fmt: skip
        return f"({pair}) truth {labels[t]} [{entities[t]}]"

    def finding(
        self, name: str, rows: Sequence[Row], of: int, more: Callable[[Row], str], change: float | None = None,
        note: str = "",
    ) -> Finding:  # fmt: skip
        """A finding about rows; its examples end with what ``more`` adds."""
        examples = [f"{row.place}: {self.text(row.query)}; {more(row)}" for row in rows[:EXAMPLES]]
        return Finding(name, len(rows), of, examples, change, note)


def _answers_of(answers: TrueTails, pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], set[int]]:
    """The known answers of each (h, r)."""
    array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    indptr, ids = answers.of(array[:, 0], array[:, 1])
    flat = ids.tolist()
    return {pair: set(flat[indptr[i] : indptr[i + 1]]) for i, pair in enumerate(pairs)}


def _mrr(ranks: Sequence[float]) -> float:
    return float(np.mean([1 / rank for rank in ranks])) if len(ranks) else 0.0


# ---------------------------------------------------------------- findings of link prediction


def query_findings(audit: Audit) -> list[Finding]:
    """Missing, repeated and other queries; the change compares the mean over the answered rows of the file."""
    missing = [query for query in audit.queries if query not in audit.first or not audit.first[query].answered]
    answered = [row for row in audit.first.values() if row.answered]
    usable = [row for row in audit.foreign if row.query is not None]
    once, with_repeated, with_foreign = (
        _mrr([audit.ranks[id(row)] for row in [*answered, *more]]) for more in ([], audit.repeated, usable)
    )
    change = once - audit.metrics()["mrr"] if answered else None
    examples, n = [audit.text(query) for query in missing[:EXAMPLES]], len(audit.rows)
    return [
        Finding("missing queries", len(missing), len(audit.queries), examples, change,
                "they keep the ranker's rank, or the worst one"),
        audit.finding("repeated queries", audit.repeated, n, lambda _: "repeated", with_repeated - once,
                      "only the first counts"),
        audit.finding("rows that are no query of the test split", audit.foreign, n, lambda _: "left out",
                      with_foreign - once),
    ]  # fmt: skip


class TestOnly(NamedTuple):
    """Other right answers of a query that only the test split knows, and the lists."""

    queries: int  # queries that have such answers
    listable: int  # pairs (query, such an answer) where the answer's own list contains it
    listed: int  # those of them whose answer is in the query's list as well
    removed: dict[int, set[int]]  # row (by id()) -> answers that were removed from its list


def test_only_answers(audit: Audit) -> TestOnly:
    """Lists of the same (h, r) come from one ranking. If the list of (h, r, t1) contains t1, but the list of
    (h, r, t2) does not, it was filtered with a test answer. If a file has no such pairs of rows, lists without any of
    these answers where at least ``FEW`` are expected from the recall count as filtered as well."""
    groups: dict[tuple[int, int], list[tuple[int, Row]]] = defaultdict(list)
    for query, row in audit.first.items():
        if row.candidates:
            groups[query[:2]].append((query[2], row))
    own = [truth in row.candidates for group in groups.values() for truth, row in group]
    recall = sum(own) / max(len(own), 1)
    listable, listed, expected, any_listed = 0, 0, 0.0, False
    removed: dict[int, set[int]] = {}
    guess: dict[int, set[int]] = {}
    for pair, group in groups.items():
        found = {truth for truth, row in group if truth in row.candidates} & audit.test_only[pair]
        for truth, row in group:
            candidates, others = set(row.candidates), audit.test_only[pair] - {truth}
            here = found & others
            listable += len(here)
            listed += len(here & candidates)
            if here - candidates:
                removed[id(row)] = here - candidates
            any_listed |= bool(others & candidates)
            expected += recall * min(len(others), len(candidates) - 1)
            if others and truth in candidates:
                guess[id(row)] = others
    if not listable and not any_listed and expected >= FEW:
        removed = guess
    queries = sum(bool(audit.test_only[query[:2]] - {query[2]}) for query in audit.queries)
    return TestOnly(queries, listable, listed, removed)


def filtered_lists(audit: Audit, removed: Mapping[int, set[int]]) -> Finding:
    """The change is an estimate: an answer that chooses one entity would choose each right one in the list with equal
    probability, and the truth then keeps the ranker's rank. Answers that rank the whole list do not change."""
    rows = [row for row in audit.first.values() if id(row) in removed]
    lost = 0.0
    for row in rows:
        if audit.ranks[id(row)] == 1 and not row.scores_list:
            k = len(removed[id(row)])
            lost += k / (k + 1) * (1 - 1 / audit.rank(row, []))

    def without(row: Row) -> str:
        return "without " + ", ".join(audit.kg.labels[entity] for entity in sorted(removed[id(row)])[:3])

    return audit.finding("lists without right answers that only the test split knows", rows, len(audit.first), without,
                         lost / len(audit.queries), "estimate, see docs/AUDIT.md")  # fmt: skip


def answer_findings(audit: Audit) -> list[Finding]:
    """Hits by text that are none by id, answers that are no entities, invalid and repeated candidates."""
    rows, entities = list(audit.first.values()), audit.kg.entities
    by_text = [row for row in rows if row.text_hit and audit.ranks[id(row)] > 1]
    gained = sum(1 - 1 / audit.ranks[id(row)] for row in by_text) / len(audit.queries)
    twice = {id(row): _repeats(row) for row in rows}

    def meant(row: Row) -> str:
        fits = ", ".join(entities[entity] for entity in row.groups[0][:4]) if row.groups else "no entity"
        return f"answer {row.answer.splitlines()[0][:60]!r} fits {fits}"

    n = len(rows)
    return [
        audit.finding("hits by name or code that are not certain by entity id", by_text, n, meant, gained),
        audit.finding("answers that are not entities", [row for row in rows if row.unknown], n,
                      lambda row: f"answer {row.unknown[0][:60]!r}"),
        audit.finding("lists with candidates that are not entities", [r for r in rows if NO_ENTITY in r.candidates], n,
                      lambda row: repr(row.shown[row.candidates.index(NO_ENTITY)])),
        audit.finding("lists with repeated candidates", [row for row in rows if twice[id(row)]], n,
                      lambda row: f"{twice[id(row)][0]!r} twice"),
    ]  # fmt: skip


def _repeats(row: Row) -> list[str]:
    """Candidates, as shown, whose entity comes earlier in the list."""
    seen: set[int] = set()
    found = []
    for entity, shown in zip(row.candidates, row.shown, strict=True):
        if entity in seen:
            found.append(shown)
        seen |= {entity} - {NO_ENTITY}
    return found


# ---------------------------------------------------------------- lists


def list_facts(audit: Audit) -> dict[str, Any]:
    """Recall, length, and the place of the truth against a uniform one."""
    rows = [row for row in audit.first.values() if row.candidates]
    places = [(row.candidates.index(row.query[2]), len(row.candidates)) for row in rows
              if row.query and row.query[2] in row.candidates]  # fmt: skip
    found, sizes = [place for place, _ in places], [len(row.candidates) for row in rows]
    chi2, p = uniform_test(places)
    return {
        "lists": len(rows),
        "recall": len(places) / len(rows) if rows else None,
        "candidates": float(np.mean(sizes)) if rows else None,
        "mean_place": float(np.mean(found)) + 1 if places else None,
        "truth_places": np.bincount(np.array(found, dtype=np.int64)).tolist(),
        "chi2": chi2,
        "p_uniform": p,
    }


def uniform_test(places: Sequence[tuple[int, int]]) -> tuple[float | None, float | None]:
    """Chi-squared and its p-value for (place of the truth from 0, length of the list) against a uniform place.

    The p-value is by the approximation of Wilson and Hilferty.
    """
    longest = max((size for _, size in places), default=0)
    if longest < 2:
        return None, None
    observed = np.bincount([place for place, _ in places], minlength=longest)
    expected = sum(np.where(np.arange(longest) < size, count / size, 0.0)
                   for size, count in Counter(size for _, size in places).items())  # fmt: skip
    chi2, df = float(((observed - expected) ** 2 / expected).sum()), longest - 1
    z = ((chi2 / df) ** (1 / 3) - 1 + 2 / (9 * df)) / math.sqrt(2 / (9 * df))
    return chi2, 0.5 * math.erfc(z / math.sqrt(2))


def baselines(audit: Audit) -> dict[str, Metrics]:
    """Metrics without the LLM: the candidate ranker, copying the list, and the upper bound that the lists set."""

    def copied(row: Row) -> float:
        truth = row.query[2] if row.query else NO_ENTITY
        return audit.rank(row, [[entity] for entity in row.candidates] if truth in row.candidates else [])

    def bound(row: Row) -> float:
        return 1.0 if row.query and row.query[2] in row.candidates else audit.rank(row, [])

    return {"candidate ranker": audit.metrics(lambda row: audit.rank(row, [])),
            "copy the first candidate": audit.metrics(copied),
            "upper bound of the lists": audit.metrics(bound)}  # fmt: skip


def audit_links(audit: Audit, format: str) -> dict[str, Any]:
    """The part of the report on link prediction."""
    metrics = audit.metrics()
    own = ranking_metrics([row.own for row in audit.rows if row.answered])
    change = None if own["mrr"] is None else own["mrr"] - metrics["mrr"]
    keys = Counter(map(name_key, audit.kg.labels))
    shared = np.array([keys[name_key(label)] > 1 for label in audit.kg.labels])
    test = test_only_answers(audit)
    findings = [*query_findings(audit), filtered_lists(audit, test.removed), *answer_findings(audit)]
    n = sum(row.answered for row in audit.rows)
    if change is not None and change > LIMIT:
        findings.append(Finding(f"the rule of {format} gives a higher result", n, n, [], change))
    return {
        "metrics": metrics, "own_rule": own | {"count": n, "change": change},
        "baselines": baselines(audit), "lists": list_facts(audit), "findings": findings,
        "test_only": {"queries": test.queries, "listable": test.listable, "listed": test.listed},
        "names": {"shared": int(shared.sum()), "entities": len(shared),
                  "truths_shared": float(shared[[t for _, _, t in audit.queries]].mean())},
    }  # fmt: skip


# ---------------------------------------------------------------- triple classification


def audit_triples(kg: KnowledgeGraph, triples: Sequence[Triple], format: str) -> dict[str, Any]:
    """The part of the report on triple classification."""
    test = [triple for triple in triples if triple.split == "test"]
    validation = [triple for triple in triples if triple.split == "validation" and triple.margin is not None]
    labels = [triple.label for triple in test]
    fixed = classification_metrics(_margins(test), labels, 0.0)
    own = classification_metrics([1.0 if triple.own else -1.0 for triple in test], labels, 0.0)
    by_key: dict[Any, list[Triple]] = defaultdict(list)
    for triple in test:
        by_key[triple.key].append(triple)
    repeated = [group[-1] for group in by_key.values() if len(group) > 1 and len({one.label for one in group}) == 1]
    contradictory = [one for group in by_key.values() if len({one.label for one in group}) > 1 for one in group]
    once = [group[0] for group in by_key.values() if len({one.label for one in group}) == 1]
    true = {tuple(row) for split in ("train", "valid", "test") for row in kg.split(split).tolist()}
    wrong = [triple for triple in test if triple.ids is not None and (triple.ids in true) != triple.label]
    unreadable = [triple for triple in test if triple.predicted is None]

    def finding(name: str, found: Sequence[Triple], change: float | None = None) -> Finding:
        examples = [f"{one.place}: {' | '.join(one.key)} labelled {one.label}" for one in found[:EXAMPLES]]
        return Finding(name, len(found), len(test), examples, change)

    def without(kept: Sequence[Triple]) -> float:
        metrics = classification_metrics(_margins(kept), [one.label for one in kept], 0.0)
        return fixed["accuracy"] - metrics["accuracy"] if kept else 0.0

    findings = [
        finding("repeated triples", repeated, without([*once, *contradictory]) if repeated else None),
        finding("triples with both labels", contradictory, without(once) if contradictory else None),
        finding("labels against the graph", wrong),
        finding("answers that are neither True nor False", unreadable, own["accuracy"] - fixed["accuracy"]),
    ]
    threshold = best_threshold(_margins(validation), [one.label for one in validation]) if validation else None
    return {
        "count": len(test), "positives": sum(labels), "label_balance": sum(labels) / len(test),
        "fixed_threshold": fixed, "threshold": threshold, "own_rule": own, "findings": findings,
        "validated_threshold": None if threshold is None else classification_metrics(_margins(test), labels, threshold),
    }  # fmt: skip


def _margins(triples: Sequence[Triple]) -> list[float]:
    """Margins; 1 or -1 for texts, NaN (counted as wrong) for answers that cannot be read."""
    texts = {True: 1.0, False: -1.0, None: math.nan}
    return [texts[triple.predicted] if triple.margin is None else triple.margin for triple in triples]


# ---------------------------------------------------------------- two files


def compare(name: str, first: Mapping[Any, float], second: Mapping[Any, float]) -> dict[str, Any]:
    """Paired difference of two means over the same queries with its 95 % interval; InputError for other queries."""
    if first.keys() != second.keys() or not first:
        alone = len(first.keys() ^ second.keys())
        raise InputError(f"--against: {alone} queries are in one of the files only; give answers to the same queries")
    values = np.array([value - second[key] for key, value in first.items()])
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    mean = float(values.mean())
    interval = None if error is None else [mean - Z95 * error, mean + Z95 * error]
    return {"of": name, "difference": mean, "standard_error": error, "interval_95": interval, "queries": len(values)}


def against(contents: Contents, audit: Audit, other: Contents) -> dict[str, Any]:
    """First minus second file: of MRR if there are rows of link prediction, else of accuracy."""
    if contents.rows:
        theirs = Audit(audit.kg, other.rows)
        sides = [{query: 1 / one.ranks[id(row)] for query, row in one.first.items()} for one in (audit, theirs)]
        return compare("MRR", *sides)
    return compare("accuracy", *(_correct(each.triples) for each in (contents, other)))


def _correct(triples: Sequence[Triple]) -> dict[Any, float]:
    return {(one.key, one.label): float(one.predicted == one.label) for one in triples if one.split == "test"}


# ---------------------------------------------------------------- report


def shown_metrics(metrics: Mapping[str, Any]) -> str:
    names = ("mrr", "hits@1", "hits@3", "hits@10", "accuracy", "precision", "recall", "f1")
    found = [(name, metrics[name]) for name in names if name in metrics]
    return "  ".join(f"{name} {'-' if value is None else format(value, '.4f')}" for name, value in found)


def finding_lines(findings: Sequence[Finding], measure: str) -> list[str]:
    """Each finding with its count, what it changes and its examples."""
    lines = []
    for one in findings:
        change = f"; {measure} {one.change:+.4f}" if one.change is not None and one.count else ""
        note = f" ({one.note})" if one.note and one.count else ""
        mark = "!" if one.decides else "-" if one.count else " "
        lines.append(f"  {mark} {one.name}: {one.count:,} of {one.of:,}{change}{note}")
        lines += [f"      {example}" for example in one.examples]
    return lines


def link_lines(report: Mapping[str, Any], format: str) -> list[str]:
    """The text of ``audit_links``."""
    metrics, own, lists, names, test = (report[key] for key in ("metrics", "own_rule", "lists", "names", "test_only"))
    rows = {"by entity id": metrics, "  head queries": metrics["head"], "  tail queries": metrics["tail"],
            f"rule of {format}": own, **report["baselines"]}  # fmt: skip
    lines = [f"link prediction, {metrics['count']:,} standard queries, {own['count']:,} rows"]
    lines += [f"  {name:26} {shown_metrics(values)}" for name, values in rows.items()]
    if lists["lists"]:
        p = "" if lists["p_uniform"] is None else f", uniform: p = {lists['p_uniform']:.2g}"
        place = "never listed" if lists["mean_place"] is None else f"at place {lists['mean_place']:.1f} on average{p}"
        lines.append(f"  lists: {lists['candidates']:.1f} candidates, recall {lists['recall']:.4f}, truth {place}")
    lines.append(
        f"  other answers that only the test split knows: {test['queries']:,} queries have some "
        f"({test['queries'] / metrics['count']:.1%}); {test['listed']:,} of {test['listable']:,} expected are listed"
    )
    lines.append(
        f"  names: {names['shared']:,} of {names['entities']:,} entities share theirs, the truths of "
        f"{names['truths_shared']:.1%} of the queries among them"
    )
    return [*lines, *finding_lines(report["findings"], "MRR")]


def triple_lines(report: Mapping[str, Any], format: str) -> list[str]:
    """The text of ``audit_triples``."""
    lines = [f"triple classification, {report['count']:,} triples, {report['label_balance']:.1%} labelled True"]
    lines.append(f"  {'threshold 0':26} {shown_metrics(report['fixed_threshold'])}")
    if report["validated_threshold"] is not None:
        name = f"threshold {report['threshold']:+.3f} (valid)"
        lines.append(f"  {name:26} {shown_metrics(report['validated_threshold'])}")
    lines.append(f"  {'rule of ' + format:26} {shown_metrics(report['own_rule'])}")
    return [*lines, *finding_lines(report["findings"], "accuracy")]


def plain(value: Any) -> Any:
    """Findings as dictionaries, for JSON."""
    if isinstance(value, Finding):
        return asdict(value) | {"above_limit": value.decides}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/audit.py", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True, metavar="DIR", help="graph folder or file, such as data/FB15k-237")
    add_keep_names(parser)
    parser.add_argument("--answers", type=Path, required=True, metavar="FILE", help="answers to audit")
    parser.add_argument("--lists", type=Path, metavar="FILE", help="rows that were answered, if in a file of their own")
    parser.add_argument("--format", choices=["auto", *READERS], default="auto", help="auto: by the fields of the file")
    parser.add_argument("--against", type=Path, metavar="FILE", help="other answers to the same queries")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the report there too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for flag, path in (("answers", args.answers), ("lists", args.lists), ("against", args.against)):
        if path is not None and not path.is_file():
            raise InputError(f"--{flag} {path} is no file; give a file of answers or lists, see docs/AUDIT.md")
    kg = KnowledgeGraph.load(args.dataset, args.keep_names)
    contents = read_contents(args.answers, args.lists, args.format, kg, Path(args.dataset))
    if not contents.rows and not any(triple.split == "test" for triple in contents.triples):
        raise InputError(f"--answers {args.answers} has no answers to test queries or triples")
    audit = Audit(kg, contents.rows)
    report: dict[str, Any] = {"answers": str(args.answers), "format": contents.format, "dataset": kg.name}
    lines = [f"{args.answers} ({contents.format}) on {kg.name}"]
    if contents.rows:
        report["link_prediction"] = audit_links(audit, contents.format)
        lines += link_lines(report["link_prediction"], contents.format)
        if not any(row.answered for row in contents.rows):
            lines.append("no row has an answer that could be read: these are the metrics of the lists alone")
    if any(triple.split == "test" for triple in contents.triples):
        report["triple_classification"] = audit_triples(kg, contents.triples, contents.format)
        lines += triple_lines(report["triple_classification"], contents.format)
    if args.against is not None:
        other = read_contents(args.against, args.lists, args.format, kg, Path(args.dataset))
        found = report["against"] = {"file": str(args.against)} | against(contents, audit, other)
        low_high = found["interval_95"] or (math.nan, math.nan)
        interval = "(95 % interval {:+.4f} to {:+.4f}), {:,} queries".format(*low_high, found["queries"])
        lines.append(f"{found['of']} minus {args.against}: {found['difference']:+.4f} {interval}")
    parts = [report[part] for part in ("link_prediction", "triple_classification") if part in report]
    code = int(any(finding.decides for part in parts for finding in part["findings"]))
    lines.append(f"{'a' if code else 'no'} finding changes MRR or accuracy by more than {LIMIT}")
    print("\n".join(lines))
    if args.json is not None:
        write_json(plain(report) | {"exit_code": code}, args.json)
    return code


if __name__ == "__main__":
    run_command(main)

"""Does the LLM gain from codes? Rows on the same test queries, over seeds, with mean and spread.

    python lora_training/compare_llm.py --dataset data/family --seeds 0 1 2 --out lora_training/lora_outputs/comparison
    python lora_training/compare_llm.py --dataset data/family --seeds 0 --out lora_training/lora_outputs/quick --quick

the candidate model          stage 1, trained on the training split; ranked by its own scores of all entities
the candidate model, refitted   the same flags, trained on the training split and nine tenths of valid, which the LLM
                             sees too: its lists are ranked, and it is the rival of the LLM without codes
copies the first candidate   the list as it stands
the codes, by stage 1's scorer  another run of stage 1 on those same facts, whose codes the LLMs read: its own decoder
                             ranks the same lists. With the order, it is the rival of the LLM with codes
the LLM without codes        names alone
the LLM with shuffled codes  every entity has another one's codes, the same in training and test
the LLM with codes           the result
each of these four, and the list's order   its score and the candidate's place together, by two weights that validation
                             gives (score_answers.py)

As in the paper, lists and codes come from two models: codes of the model that ordered the list say what the order
says already. The candidate model is a small one on purpose, for all rows alike: the full one of the bundled graph (the
demo's) has MRR .98, which leaves nothing to gain.
The code tokens' rows begin as stage 1's codebooks (--code_init), with shuffled codes too. Every row of embedding and
head trains, in all three: with the new rows alone, the LLM without codes could not learn what it answers with.

The LLMs predict: asked (h, r, ?), an LLM answers with the codes of the tail, or its name where it has no codes, and
candidates are ranked by how likely their answers are to the query alone (gen_lp_data_rq.py --predict, inference.py
--decode predict). So every training row weighs the truth against all other answers, not against those of a list, and a
base as small as RECIPE's need not learn to copy out of lists or to compare two entities of a prompt.

Every seed draws all of it anew: stage 1, the cut of valid, the base model (one for its three LLMs), the tuning. An LLM
is tuned once, on the queries of the training split and of nine tenths of valid, the facts that codes and lists rest on
too. Validation is the last tenth of valid.

Each step is another script's own command and leaves a mark under OUT/seed_N/done: the same command goes on where it was
stopped. OUT/comparison.json gets the rows, with the records that they come from (which tables/ reads: python
tables/make_tables.py --records OUT), and what codes bring, with its standard error over the queries (paired.py).
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.candidates import find_rows, read_candidates
from Class.codes import code_stem
from Class.gen_lp_data_rq import TASK, disjoint_parts
from Class.instructions import PREDICTED, Ints, Row, existing_split, read_rows, split_path
from common.errors import CommandParser, InputError, content_of, run_command
from common.files import ROOT, exclusive_lock, read_json, write_json, write_text
from common.metrics import RANKING, check_ranking
from common.record import make_record
from data.knowledge_graph import KnowledgeGraph
from lora_training.paired import paired
from lora_training.score_answers import (
    OWN,
    WITH_ORDER,
    Answer,
    Metrics,
    by_task,
    is_ranking,
    query_of,
    ranking_metrics,
    score_ranking,
    worths,
)
from lora_training.steps import REPEATED, Step, run_tasks, seconds_of, tasks_of
from tables.results import stat

Recipe = dict[str, dict[str, Any]]

# flags of each stage; "codes": of the model whose codes are read, on top of "stage1", the candidate model's
RECIPE: Recipe = {
    "stage1": {"seq_len": 2, "num_code": 64, "num_quantizers": 3, "code_dim": 64, "decoder": "distmult", "epoch": 50,
               "lr": 0.005, "batch": 256, "encoder_every": 2, "eval_every": 5},
    "codes": {"seq_len": 1, "num_code": 128, "num_quantizers": 4, "code_dim": 128},
    "base": {"width": 64, "layers": 2, "heads": 4, "vocab_size": 1600, "block": 192, "batch": 16, "epochs": 1,
             "lr": 3e-3, "prompt_tokens": True, "init_std": 0.125, "attention_std": 0.0125},
    "data": {"num_candidates": 20},
    "tuning": {"epochs": 9, "batch_size": 32, "learning_rate": 2e-3, "adam_beta2": 0.99, "lora_r": 64,
               "lora_alpha": 64, "lora_dropout": 0, "train_rows": "all",
               "eval_steps": 1000, "eval_batch_size": 128, "logging_steps": 100},
    "answers": {},
}  # fmt: skip
# the same chain in a few minutes: it shows that every step runs, and its figures mean nothing
QUICK: Recipe = RECIPE | {
    "stage1": RECIPE["stage1"] | {"epoch": 4, "eval_every": 4},
    "codes": RECIPE["codes"] | {"epoch": 4, "eval_every": 4},
    "base": RECIPE["base"] | {"width": 32, "layers": 2, "heads": 2, "epochs": 0.2},
    "data": RECIPE["data"] | {"limit": 240},
    "answers": {"limit": 200},
    "tuning": RECIPE["tuning"] | {"epochs": 4, "eval_steps": 4, "batch_size": 16, "logging_steps": 5},
}


class Variant(NamedTuple):
    """What an LLM reads of an entity."""

    name: str  # of its folder
    row: str  # in the comparison
    flags: tuple[str, ...]  # of the instruction data


WITHOUT = Variant("without_codes", "the LLM without codes", ("--no_codes",))
SHUFFLED = Variant("shuffled_codes", "the LLM with shuffled codes", ("--shuffle_codes",))
WITH = Variant("with_codes", "the LLM with codes", ())
VARIANTS = (WITHOUT, SHUFFLED, WITH)
CANDIDATE_MODEL = "the candidate model"
REFITTED = "the candidate model, refitted with nine tenths of valid"
COPIED = "copies the first candidate"
ORDERED = "{}, and the list's order"
CODES_ALONE = "the codes, by stage 1's scorer"
ROWS = (
    CANDIDATE_MODEL, REFITTED, COPIED, CODES_ALONE, *(variant.row for variant in VARIANTS),
    *(ORDERED.format(row) for row in (CODES_ALONE, *(variant.row for variant in VARIANTS))),
)  # fmt: skip
# of MRRs, by the same queries: what codes bring to the LLM, and the LLM to what there is without it
DIFFERENCES = (
    *((WITH.row, other) for other in (WITHOUT.row, SHUFFLED.row, CODES_ALONE)),
    *((ORDERED.format(WITH.row), other)
      for other in (CANDIDATE_MODEL, REFITTED, *map(ORDERED.format, (WITHOUT.row, SHUFFLED.row, CODES_ALONE)))),
)  # fmt: skip
RESCORED = 1000  # entities that the codes' own scorer lists: nearly all that a prompt may have
RESULTS = "inference_results.json"


# ---------------------------------------------------------------- steps


def flags(values: Mapping[str, Any]) -> list[str]:
    """``{"lr": 0.1, "on": True, "off": False}`` -> ``["--lr", "0.1", "--on"]``."""
    return [
        word
        for name, value in values.items()
        if value is not False
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


class Places(NamedTuple):
    """Where one seed's files are."""

    root: Path

    @property
    def marks(self) -> Path:
        return self.root / "done"

    def candidates(self, name: str) -> Path:
        return self.root / "candidates" / f"{name}.npz"

    def results(self, variant: Variant) -> Path:
        return self.root / variant.name / RESULTS

    def rows(self, variant: Variant) -> Path:
        """The folder of the instruction data that are answered."""
        return self.root / variant.name / "data" / TASK


def stem_of(dataset: str, sizes: Mapping[str, Any]) -> str:
    """The name of stage 1's files."""
    levels, quantizer = sizes.get("num_quantizers", 1), sizes.get("quantizer", "rq")
    return code_stem(dataset, sizes["seq_len"], sizes["num_code"], levels, quantizer)


def stage1_steps(
    name: str, dataset: Path, folder: Path, values: Mapping[str, Any], seed: int
) -> tuple[Step, list[str]]:
    """Training of stage 1 on ``dataset`` with the flags ``values``, and the words that rank from its codes."""
    stem = stem_of(dataset.name, values)
    codes, checkpoint = folder / f"{stem}.pt", folder / "checkpoints" / f"{stem}.pt"
    words = ["run_rq.py", "--config", os.devnull, "--dataset", str(dataset), *flags(values), "--seed", str(seed)]
    words += ["--out_dir", str(folder), "--checkpoint_dir", str(checkpoint.parent), "--overwrite"]
    ranking = ["run_rq.py", "--dataset", str(dataset), "--eval_codes", str(codes), "--checkpoint", str(checkpoint)]
    return Step(name, words, [codes, codes.with_suffix(".json"), checkpoint]), ranking


def export_step(name: str, ranking: list[str], split: str, path: Path) -> Step:
    """Candidates of a split, by the codes that ``ranking`` names."""
    return Step(name, [*ranking, "--export_candidates", str(path), "--split", split], [path])


def seed_steps(kg: KnowledgeGraph, dataset: Path, refit: Path, places: Places, recipe: Recipe, seed: int) -> list[Step]:
    """Everything that one seed takes, in order. ``refit``: the folder of ``write_refit``."""
    root = places.root
    model = recipe["stage1"]
    train, ranking = stage1_steps("stage1", dataset, root / "candidate_model", model, seed)
    train_again, ranking_again = stage1_steps("refit", refit, root / "refit", model, seed)
    coded, ranking_coded = stage1_steps("codes", refit, root / "codes", model | recipe["codes"], seed)
    base = root / "tiny_base"
    make_base = ["lora_training/make_tiny_base.py", "--dataset", str(dataset), "--out", str(base)]
    return [
        train,
        export_step("candidates_plain", ranking, "test", places.candidates("plain")),
        train_again,
        *(export_step(f"candidates_{split}", ranking_again, split, places.candidates(split)) for split in kg_splits()),
        coded,
        *(export_step(f"coded_{split}", [*ranking_coded, "--top", str(min(kg.num_entities, RESCORED))], split,
                      places.candidates(f"coded_{split}")) for split in ("valid", "test")),
        Step("base", [*make_base, *flags(recipe["base"]), "--seed", str(seed)], [base / "config.json"]),
        *(step for variant in VARIANTS
          for step in llm_steps(variant, dataset, coded, base, places, recipe, seed)),
    ]  # fmt: skip


def kg_splits() -> tuple[str, str, str]:
    """The splits that have candidates."""
    return "train", "valid", "test"


def llm_steps(
    variant: Variant, dataset: Path, stage1: Step, base: Path, places: Places, recipe: Recipe, seed: int
) -> list[Step]:
    """Data, tuning, and answers. ``stage1``: of ``stage1_steps``, whose codes are read."""
    codes, _, checkpoint = stage1.made
    folder, name = places.root / variant.name, variant.name
    lists = [str(places.candidates(split)) for split in kg_splits()]
    data = ["Class/gen_lp_data_rq.py", "--dataset", str(dataset), *variant.flags, "--predict", *flags(recipe["data"])]
    data += ["--seed", str(seed), *([] if variant is WITHOUT else ["--codes", str(codes)])]
    data += ["--candidates", *lists, "--from", "both", "--out_dir", str(folder / "data")]
    tuned, task = folder / "tuned", places.rows(variant)
    train, validation = (split_path(folder / "data" / PREDICTED, split) for split in ("train", "validation"))
    words = ["lora_training/train_lora.py", "--model_name", str(base), "--output_dir", str(tuned)]
    words += ["--train_data", str(train), "--val_data", str(validation)]
    words += [*flags(recipe["tuning"]), "--seed", str(seed)]
    words += [] if variant is WITHOUT else ["--code_init", str(checkpoint)]
    answer = ["lora_training/inference.py", "--decode", "predict", "--lora_adapter", str(tuned / "lora_adapters")]
    answer += ["--test_data", str(split_path(task, "test")), "--output", str(places.results(variant))]
    answer += flags(recipe["answers"])
    return [
        Step(f"{name}_data", data, [train, validation, *(split_path(task, split) for split in ("validation", "test"))]),
        Step(f"{name}_tuning", words, [tuned / "lora_adapters" / "run_record.json"], tuned / "checkpoints"),
        Step(f"{name}_answers", answer, [places.results(variant)]),
    ]  # fmt: skip


# ---------------------------------------------------------------- the refitted candidate model


def write_refit(kg: KnowledgeGraph, folder: Path, seed: int) -> None:
    """The graph as the refitted model sees it: all of valid but the LLMs' validation part has moved to train.

    The cut that Class/gen_lp_data_rq.py makes under ``seed``; entities and relations keep their ids.
    """
    parts = disjoint_parts(kg, seed)
    splits = {"train": np.concatenate([kg.train, parts.tuning]), "valid": parts.validation, "test": kg.test}
    for split, triples in splits.items():
        lines = (f"{kg.entities[h]}\t{kg.relations[r]}\t{kg.entities[t]}\n" for h, r, t in triples.tolist())
        write_text("".join(lines), folder / f"{split}.txt")
    for name, values in (("entities", kg.entities), ("relations", kg.relations)):
        write_text("".join(f"{i}\t{value}\n" for i, value in enumerate(values)), folder / f"{name}.dict")


def queries_of(rows: Iterable[Row], kg: KnowledgeGraph) -> Ints:
    """[n, 3]: the queries of rows of link prediction, inverse relations for those that ask for the head."""
    entity = {name: i for i, name in enumerate(kg.entities)}
    relation = {name: i for i, name in enumerate(kg.relations)}
    queries = []
    for row in rows:
        h, r, t = entity[row["triple"][0]], relation[row["triple"][1]], entity[row["triple"][2]]
        queries.append((h, r, t) if row["direction"] == "tail" else (t, r + kg.num_relations, h))
    return np.array(queries, dtype=np.int64).reshape(-1, 3)


def ranks_of(candidates: Path, rows: Iterable[Row], kg: KnowledgeGraph) -> list[float]:
    """The truth's rank among all entities, as ``candidates`` has it, for the query of each row of link prediction.

    Raises InputError for a query that has no rank there.
    """
    found = read_candidates([candidates], kg)
    wanted = queries_of(rows, kg)
    at = find_rows(found, wanted, kg)
    ranks = np.where((at >= 0) & (found.truth[at] == wanted[:, 2]), found.rank[at], np.nan)
    if np.isnan(ranks).any():
        raise InputError(
            f"candidates file {candidates} has no rank for {int(np.isnan(ranks).sum())} of the test queries"
        )
    return [float(rank) for rank in ranks]


def rescored(answers: Sequence[Answer], rows: Mapping[str, Row], lists: Path, kg: KnowledgeGraph) -> list[Answer]:
    """Answers whose candidates have the scores that ``lists`` give them; ``rows``: by id, for the queries.

    A candidate that is not listed there is below all that are. Raises InputError where a query has no list.
    """
    found = read_candidates([lists], kg)
    at = find_rows(found, queries_of((rows[answer["id"]] for answer in answers), kg), kg)
    if found.scores is None:
        raise InputError(f"candidates file {lists} has no scores; write it anew: run_rq.py --export_candidates")
    if (at < 0).any():
        raise InputError(f"candidates file {lists} has no list for {int((at < 0).sum())} of the queries")
    made = []
    for answer, place in zip(answers, at.tolist(), strict=True):
        ids, scores = found.ids[place], found.scores[place]
        own = {kg.entities[e]: float(score) for e, score in zip(ids, scores, strict=True) if e >= 0}
        lowest = min(own.values()) - 1
        made.append(answer | {"scores": [own.get(name, lowest) for name in answer["candidates"]], "tokens": None})
    return made


# ---------------------------------------------------------------- rows


class Found(NamedTuple):
    """One row of one seed."""

    record: str  # that it comes from, relative to OUT
    metrics: Metrics  # MRR, Hits@1/3/10 and the number of queries
    worth: dict[str, float]  # each query's reciprocal rank


def asked(record: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What tells the test queries of an answers' record apart, sorted: whoever is compared has answered the same."""
    return sorted(
        (answer["id"], answer["truth"][0], answer["direction"], answer["candidate_rank"])
        for answer in record["answers"] if answer["split"] == "test"
    )  # fmt: skip


def seed_rows(
    places: Places, kg: KnowledgeGraph, out: Path, plain_record: Path, coded_record: Path
) -> dict[str, Found]:
    """All rows of one seed. InputError where the three LLMs were not asked the same queries.

    ``plain_record``, ``coded_record``: of the candidate model, and of the model whose codes are read.
    """
    queries, records = {}, {}
    for variant in VARIANTS:
        records[variant] = read_json(places.results(variant), "answers' record")
        with content_of(places.results(variant), "answers' record", REPEATED):
            queries[variant] = asked(records[variant])
    for variant in VARIANTS:
        if queries[variant] != queries[WITH]:
            raise InputError(
                f"{places.results(variant)} answers other queries than {places.results(WITH)}; remove "
                f"{places.results(variant).parent} and {places.results(WITH).parent}, and repeat the command"
            )
    splits = {split: existing_split(places.rows(WITH), split) for split in ("validation", "test")}
    if splits["test"] is None:
        raise InputError(
            f"{places.rows(WITH)} holds no test rows; remove {places.root / WITH.name} and repeat the command"
        )
    count, with_codes = len(queries[WITH]), places.results(WITH)
    with content_of(splits["test"], "file of the answered rows", REPEATED):
        answered = list(itertools.islice(read_rows(splits["test"]), count))
        ranks = ranks_of(places.candidates("plain"), answered, kg)
        if len(ranks) != count:
            raise ValueError(f"{len(ranks)} rows, {count} answers")
    worth = {query_of(row): 1 / rank for row, rank in zip(answered, ranks, strict=True)}
    if worth.keys() != {query_of(answer) for answer in records[WITH]["answers"] if answer["split"] == "test"}:
        raise InputError(f"{splits['test']} holds other queries than were answered; {REPEATED}")
    rows = {CANDIDATE_MODEL: (plain_record, ranking_metrics(ranks), worth)}
    with content_of(with_codes, "answers' record", REPEATED):
        answers = [answer for answer in records[WITH]["answers"] if is_ranking(answer)]
        tests = {variant.row: (places.results(variant), *scored_test(record["answers"]))
                 for variant, record in records.items()}  # fmt: skip
        _, own, by_row = tests[WITH.row]
        rows |= {row: (with_codes, own[rival], by_row[rival])
                 for row, rival in ((REFITTED, "candidate_model"), (COPIED, "as_listed"))}  # fmt: skip
        coded: list[Answer] = []
        for split, lists in (("validation", "coded_valid"), ("test", "coded_test")):
            path = splits[split]
            by_id = {} if path is None else {row["id"]: row for row in read_rows(path)}
            coded += rescored([one for one in answers if one["split"] == split], by_id, places.candidates(lists), kg)
    tests[CODES_ALONE] = (coded_record, *scored_test(coded))
    for name, (path, own, by_row) in tests.items():
        if WITH_ORDER not in own:
            raise InputError(
                f"{path}: no validation list holds its truth, so scores and the lists' order have no weights; "
                "give more num_candidates, or a larger valid split"
            )
        with content_of(path, "record", REPEATED):
            rows[name] = (path, own, by_row[OWN])
            rows[ORDERED.format(name)] = (path, own[WITH_ORDER], by_row[WITH_ORDER])
    found = {}
    for name in ROWS:
        path, metrics, worth = rows[name]
        with content_of(path, "answers' record", REPEATED):
            kept = {key: metrics[key] for key in RANKING} | {"count": count}
        check_ranking(path, name, kept)
        found[name] = Found(str(path.relative_to(out)), kept, worth)
    return found


def scored_test(answers: Iterable[Answer]) -> tuple[Metrics, dict[str, dict[str, float]]]:
    """Metrics of the test queries' answers, and by row of ``ranks_by_row`` each query's reciprocal rank."""
    splits = by_task(answers)[TASK]
    return score_ranking(splits)["test"], worths(splits)["test"]


def differences(by_seed: Mapping[int, Mapping[str, Found]]) -> list[dict[str, Any]]:
    """What DIFFERENCES say, over all seeds."""
    found = []
    for row, other in DIFFERENCES:
        ours, theirs = ([rows[name].worth for rows in by_seed.values()] for name in (row, other))
        difference = paired(ours, theirs)
        runs = dict(zip(map(str, by_seed), difference.runs, strict=True))
        found.append({"row": row, "minus": other} | difference._asdict() | {"runs": runs})
    return found


def summary(by_seed: Mapping[int, Mapping[str, Found]]) -> list[dict[str, Any]]:
    """Each row with its seeds' metrics and records, their mean and sample standard deviation (null for one seed)."""
    rows = []
    for name in ROWS:
        found = {seed: rows_of_seed[name] for seed, rows_of_seed in by_seed.items()}
        stats = {key: stat([one.metrics[key] for one in found.values()]) for key in RANKING}
        rows.append({
            "row": name,
            "records": {str(seed): one.record for seed, one in found.items()},
            "seeds": {str(seed): one.metrics for seed, one in found.items()},
            "mean": {key: value.mean for key, value in stats.items()},
            "std": {key: value.std for key, value in stats.items()},
        })  # fmt: skip
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row: mean, and the spread where there are several seeds."""
    print(f"\n{'test, filtered, both directions':60}" + "".join(f"{name:>16}" for name in RANKING))
    for row in rows:
        cells = []
        for name in RANKING:
            spread = row["std"][name]
            cells.append(f"{row['mean'][name]:.4f}" + ("" if spread is None else f" ± {spread:.4f}"))
        print(f"{row['row']:60}" + "".join(f"{cell:>16}" for cell in cells))


def print_differences(found: Sequence[Mapping[str, Any]]) -> None:
    """One line per difference."""
    print(f"\n{'differences of MRR over the same queries':112}{'mean':>8}{'error':>8}  by seed")
    for one in found:
        error = "" if one["error"] is None else f"{one['error']:.4f}"
        runs = " ".join(f"{value:+.4f}" for value in one["runs"].values())
        print(f"{one['row'] + ' - ' + one['minus']:112}{one['mean']:+8.4f}{error:>8}  {runs}")


# ---------------------------------------------------------------- the command


def check_plan(out: Path, plan: dict[str, Any]) -> None:
    """Write what the steps rest on, or compare: InputError where OUT was begun with something else."""
    path = out / "plan.json"
    if not path.is_file():
        write_json(plan, path)
        return
    before = read_json(path, "plan")
    differing = [key for key in plan if not isinstance(before, dict) or before.get(key) != plan[key]]
    if differing:
        raise InputError(f"--out {out} was begun with another {' and '.join(differing)}; give another folder")


def read_recipe(path: Path | None, quick: bool) -> Recipe:
    """The recipe, a file's flags in place of its own. InputError for a part that does not exist."""
    recipe = QUICK if quick else RECIPE
    if path is None:
        return recipe
    given = read_json(path, "recipe")
    if not isinstance(given, dict) or not all(isinstance(part, dict) for part in given.values()):
        raise InputError(f"--recipe {path} must hold flags by part: {', '.join(RECIPE)}")
    unknown = sorted(given.keys() - RECIPE.keys())
    if unknown:
        raise InputError(f"--recipe {path} has a part {unknown[0]!r}; there are {', '.join(RECIPE)}")
    merged = {part: values | given.get(part, {}) for part, values in recipe.items()}
    if merged["stage1"] | merged["codes"] == merged["stage1"]:
        raise InputError(f"--recipe {path}: codes has no flag that differs from stage1's, so the two models are one")
    return merged


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/compare_llm.py", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", type=Path, default=ROOT / "data" / "family", metavar="DIR", help="graph folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of everything per seed")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many steps side by side")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets everything; goes on where it is")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that every step runs")
    parser.add_argument("--recipe", type=Path, metavar="FILE.json", help='flags in place of RECIPE\'s: {"base": {...}}')
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {args.jobs}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds must be different numbers, 0 or more, got {' '.join(map(str, args.seeds))}")
    return args


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    args = parse_args(argv)
    recipe = read_recipe(args.recipe, args.quick)
    dataset, out = args.dataset.resolve(), args.out.resolve()
    kg = KnowledgeGraph.load(dataset)
    with exclusive_lock(out.with_name(f"{out.name}.lock"), "--out"):
        compare(args, kg, dataset, out, recipe, started)
    print(f"next: python tables/make_tables.py --records {args.out}")


def compare(
    args: argparse.Namespace, kg: KnowledgeGraph, dataset: Path, out: Path, recipe: Recipe, started: float
) -> None:
    """All steps of all seeds that are not done, and the rows that come of them. ``started``: monotonic seconds."""
    check_plan(out, {"data set": kg.input_hashes, "recipe": recipe})

    places = {seed: Places(out / f"seed_{seed}") for seed in args.seeds}
    steps: dict[int, list[Step]] = {}
    for seed, place in places.items():
        refit = place.root / f"{kg.name}_refit"
        write_refit(kg, refit, seed)
        steps[seed] = seed_steps(kg, dataset, refit, place, recipe, seed)
    run_tasks(
        [task for seed in args.seeds for task in tasks_of(steps[seed], places[seed].marks, f"seed {seed}")], args.jobs
    )
    by_seed = {}
    for seed in args.seeds:
        plain, coded = (next(step for step in steps[seed] if step.name == name).made[1] for name in ("stage1", "codes"))
        by_seed[seed] = seed_rows(places[seed], kg, out, plain, coded)
    rows, compared = summary(by_seed), differences(by_seed)
    record = make_record(
        vars(args) | {"seed": None}, kg.input_hashes, time.monotonic() - started, dataset=kg.name, recipe=recipe,
        seconds={str(seed): seconds_of(out / f"seed_{seed}" / "done") for seed in args.seeds}, rows=rows,
        differences=compared,
    )  # fmt: skip
    write_json(record, out / "comparison.json")
    print_rows(rows)
    print_differences(compared)
    print(f"wrote {out / 'comparison.json'}")


if __name__ == "__main__":
    run_command(main)

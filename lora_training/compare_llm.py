"""Do codes help the LLM? Rows on the same test queries, over seeds, with mean and standard deviation.

    python lora_training/compare_llm.py --dataset data/family --seeds 0 1 2 --out lora_training/lora_outputs/comparison

candidate ranker             stage 1 on the facts that the LLMs are tuned on; its lists are re-ranked, so this is also
                             the baseline that copies the first candidate
stage-1 decoder of the codes another stage-1 run on the same facts, whose codes the LLMs read: its own decoder ranks
                             all entities; the baseline of the LLM with codes
LLM without codes            names only
LLM with shuffled codes      control: every entity has the codes of another one, in training and test alike
LLM with codes               the result

As in the paper, lists and codes come from two models: codes of the ranker itself would repeat its order. The ranker is
small on purpose, for all rows alike: a full one has MRR .98 on the bundled graph, which leaves nothing to improve.
New code tokens start from stage 1's codebooks (--code_init), shuffled codes included. All rows of embedding and head
are trained in all three LLMs: with only the new tokens trained, the LLM without codes could not learn its answers.

The LLMs are tuned on tail_prediction rows and answer by likelihood scoring: given (h, r, ?), an LLM generates the codes
of the tail (its name in data without codes), and candidates are ranked by their log-likelihood as the answer to the
query alone. Lists are not part of the prompts, so their order has no effect.

Everything is drawn anew for each seed: stage 1, the split of valid, the base model (one for the three LLMs), the
tuning. The LLMs are tuned once, on train and 90 % of valid, the facts of codes and lists. Validation is the rest of
valid.

Every step is a command of another script with a mark in OUT/seed_N/done: the same command continues an interrupted run.
OUT/comparison.json gets the rows, with the records they come from (python tables/make_tables.py --records OUT), and the
differences of MRR with their standard errors over queries.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.candidates import find_rows, read_candidates
from Class.codes import code_stem
from Class.gen_lp_data_rq import TASK, disjoint_parts
from Class.rows import PREDICTED, Row, read_rows, split_path
from common.errors import CommandParser, InputError, at_least, content_of, run_command
from common.files import ROOT, command, exclusive_lock, read_json, write_json, write_text
from common.metrics import RANKING, check_ranking
from common.record import make_record
from common.steps import Step, run_steps
from data.knowledge_graph import KnowledgeGraph
from lora_training.checkpoints import SECONDS
from lora_training.score_answers import (
    Answer,
    Metrics,
    by_task,
    is_ranking,
    known_rank,
    paired,
    query_of,
    ranking_metrics,
    values_by_query,
)

Recipe = dict[str, dict[str, Any]]

# flags of each stage; "codes": in addition to "stage1", for the model whose codes the LLMs read
RECIPE: Recipe = {
    "stage1": {"seq_len": 2, "num_code": 64, "num_quantizers": 3, "code_dim": 64, "decoder": "distmult", "epoch": 50,
               "lr": 0.005, "batch": 256, "encoder_every": 2, "eval_every": 5},
    "codes": {"seq_len": 1, "num_code": 128, "num_quantizers": 4, "code_dim": 128},
    "base": {"width": 64, "layers": 2, "heads": 4, "vocab_size": 1600, "block": 192, "batch": 16, "epochs": 1,
             "lr": 3e-3},
    "data": {"num_candidates": 20},
    "tuning": {"epochs": 9, "batch_size": 32, "learning_rate": 2e-3, "adam_beta2": 0.99, "lora_r": 64,
               "lora_alpha": 64, "lora_dropout": 0, "train_rows": "all",
               "eval_steps": 1000, "eval_batch_size": 128, "logging_steps": 100},
    "answers": {},
}  # fmt: skip


class Variant(NamedTuple):
    """What an LLM is given of an entity."""

    name: str  # of its folder
    row: str  # in the comparison
    flags: tuple[str, ...]  # of the instruction data


WITHOUT = Variant("without_codes", "LLM without codes", ("--no_codes",))
SHUFFLED = Variant("shuffled_codes", "LLM with shuffled codes", ("--shuffle_codes",))
WITH = Variant("with_codes", "LLM with codes", ())
VARIANTS = (WITHOUT, SHUFFLED, WITH)
RANKER, DECODER = "candidate ranker", "stage-1 decoder of the codes"
ROWS = (RANKER, DECODER, *(variant.row for variant in VARIANTS))
COMPARED = (WITHOUT.row, SHUFFLED.row, DECODER, RANKER)  # MRR of the LLM with codes minus theirs, same queries
RESULTS = "inference_results.json"
REPEAT = "remove it and repeat the command: its step runs again"


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
    """Files of one seed."""

    root: Path

    def step(self, name: str, words: list[str], outputs: list[Path]) -> Step:
        return Step(f"{self.root.name}/done/{name}", words, outputs)

    def candidates(self, name: str) -> Path:
        return self.root / "candidates" / f"{name}.npz"

    def results(self, variant: Variant) -> Path:
        return self.root / variant.name / RESULTS

    def rows(self, variant: Variant) -> Path:
        """The folder of the rows that are answered."""
        return self.root / variant.name / "data" / TASK


def stem_of(dataset: str, sizes: Mapping[str, Any]) -> str:
    """The name of stage 1's files."""
    levels, quantizer = sizes.get("num_quantizers", 1), sizes.get("quantizer", "rq")
    return code_stem(dataset, sizes["seq_len"], sizes["num_code"], levels, quantizer)


class Stage1(NamedTuple):
    """A stage-1 run."""

    train: Step
    codes: Path
    checkpoint: Path
    ranking: list[str]  # words that rank from its codes

    def export(self, places: Places, name: str, split: str) -> Step:
        """Candidates of a split."""
        path = places.candidates(name)
        words = [*self.ranking, "--export_candidates", str(path), "--split", split]
        return places.step(f"lists_{name}", words, [path])


def stage1(places: Places, name: str, folder: str, dataset: Path, values: Mapping[str, Any], seed: int) -> Stage1:
    """Stage 1 on ``dataset`` with the flags ``values``."""
    out, stem = places.root / folder, stem_of(dataset.name, values)
    codes, checkpoint = out / f"{stem}.pt", out / "checkpoints" / f"{stem}.pt"
    words = ["run_rq.py", "--config", os.devnull, "--dataset", str(dataset), *flags(values), "--seed", str(seed)]
    words += ["--out_dir", str(out), "--checkpoint_dir", str(checkpoint.parent), "--overwrite"]
    ranking = ["run_rq.py", "--dataset", str(dataset), "--eval_codes", str(codes), "--checkpoint", str(checkpoint)]
    train = places.step(name, words, [codes, codes.with_suffix(".json"), checkpoint])
    return Stage1(train, codes, checkpoint, ranking)


def seed_steps(kg: KnowledgeGraph, dataset: Path, refit: Path, places: Places, recipe: Recipe, seed: int) -> list[Step]:
    """All steps of one seed, in order. ``refit``: the folder of ``write_refit``."""
    model, base = recipe["stage1"], places.root / "tiny_base"
    ranker = stage1(places, "refit", "refit", refit, model, seed)
    coded = stage1(places, "codes", "codes", refit, model | recipe["codes"], seed)
    make_base = ["lora_training/make_tiny_base.py", "--dataset", str(dataset), "--out", str(base)]
    return [
        ranker.train,
        *(ranker.export(places, split, split) for split in ("train", "valid", "test")),
        coded.train,
        coded.export(places, "coded_test", "test"),
        places.step("base", [*make_base, *flags(recipe["base"]), "--seed", str(seed)], [base / "config.json"]),
        *(step for variant in VARIANTS for step in llm_steps(variant, dataset, coded, base, places, recipe, seed)),
    ]


def llm_steps(
    variant: Variant, dataset: Path, coded: Stage1, base: Path, places: Places, recipe: Recipe, seed: int
) -> list[Step]:
    """Data, tuning and answers of one LLM, which reads the codes of ``coded``."""
    folder, name = places.root / variant.name, variant.name
    lists = [str(places.candidates(split)) for split in ("train", "valid", "test")]
    data = ["Class/gen_lp_data_rq.py", "--dataset", str(dataset), *variant.flags, *flags(recipe["data"])]
    data += ["--seed", str(seed), "--without_lists"]
    data += [] if variant is WITHOUT else ["--codes", str(coded.codes)]
    data += ["--candidates", *lists, "--from", "both", "--out_dir", str(folder / "data")]
    tuned, task = folder / "tuned", places.rows(variant)
    train, validation = (split_path(folder / "data" / PREDICTED, split) for split in ("train", "validation"))
    words = ["lora_training/train_lora.py", "--model_name", str(base), "--output_dir", str(tuned)]
    words += ["--train_data", str(train), "--val_data", str(validation)]
    words += [*flags(recipe["tuning"]), "--seed", str(seed)]
    words += [] if variant is WITHOUT else ["--code_init", str(coded.checkpoint)]
    answer = ["lora_training/inference.py", "--decode", "likelihood", "--lora_adapter", str(tuned / "lora_adapters")]
    answer += ["--test_data", str(split_path(task, "test")), "--output", str(places.results(variant))]
    answer += flags(recipe["answers"])
    answered = [split_path(task, split) for split in ("validation", "test")]
    return [
        places.step(f"{name}_data", data, [train, validation, *answered]),
        places.step(f"{name}_tuning", words, [tuned / "lora_adapters" / "run_record.json"])
        ._replace(more=partial(resume_tuning, tuned / "checkpoints")),
        places.step(f"{name}_answers", answer, [places.results(variant)]),
    ]  # fmt: skip


def resume_tuning(checkpoints: Path) -> list[str]:
    """Flags by which train_lora.py continues an interrupted run; complete checkpoints contain a file of seconds."""
    interrupted = any(checkpoints.glob(f"checkpoint-*/{SECONDS}"))
    return ["--resume_from_checkpoint", "last"] if interrupted else ["--overwrite"]


def write_refit(kg: KnowledgeGraph, folder: Path, seed: int) -> None:
    """Write the graph with 90 % of valid moved to train; valid keeps the LLMs' validation part.

    The split is that of Class/gen_lp_data_rq.py with this ``seed``; entities and relations keep their ids.
    """
    parts = disjoint_parts(kg, seed)
    splits = {"train": np.concatenate([kg.train, parts.tuning]), "valid": parts.validation, "test": kg.test}
    for split, triples in splits.items():
        lines = (f"{kg.entities[h]}\t{kg.relations[r]}\t{kg.entities[t]}\n" for h, r, t in triples.tolist())
        write_text("".join(lines), folder / f"{split}.txt")
    for name, values in (("entities", kg.entities), ("relations", kg.relations)):
        write_text("".join(f"{i}\t{value}\n" for i, value in enumerate(values)), folder / f"{name}.dict")


# ---------------------------------------------------------------- rows


def read_ranks(path: Path, rows: Sequence[Row], kg: KnowledgeGraph) -> dict[str, float]:
    """Filtered rank of the truth among all entities for each row's query, by the row's id. InputError if one lacks."""
    found, entity = read_candidates([path], kg), {name: i for i, name in enumerate(kg.entities)}
    relation = {name: i for i, name in enumerate(kg.relations)}
    queries = np.empty((len(rows), 3), dtype=np.int64)
    for i, row in enumerate(rows):
        h, r, t = entity[row["triple"][0]], relation[row["triple"][1]], entity[row["triple"][2]]
        queries[i] = (h, r, t) if row["direction"] == "tail" else (t, r + kg.num_relations, h)
    at = find_rows(found, queries, kg)
    ranks = np.where(at >= 0, found.rank[at], np.nan)
    if np.isnan(ranks).any():
        raise InputError(f"candidates file {path} lacks lists or ranks; write it again: run_rq.py --export_candidates")
    return dict(zip((row["id"] for row in rows), ranks.tolist(), strict=True))


class RowResult(NamedTuple):
    """One row of one seed."""

    record: str  # file it comes from, relative to OUT
    metrics: Metrics  # MRR, Hits@1/3/10 and the number of queries
    values: dict[str, float]  # reciprocal rank of each query


def read_links(places: Places) -> dict[Variant, list[Answer]]:
    """The link prediction answers of each LLM. InputError if they do not answer the same test queries."""
    found, queries = {}, {}
    for variant in VARIANTS:
        path = places.results(variant)
        record = read_json(path, "answers' record")
        with content_of(path, "answers' record", REPEAT):
            found[variant] = [answer for answer in record["answers"] if is_ranking(answer)]
            queries[variant] = sorted(query_of(answer) for answer in found[variant] if answer["split"] == "test")
            if not queries[variant]:
                raise ValueError("it has no test answers")
        if queries[variant] != queries[WITHOUT]:
            raise InputError(
                f"{path} answers other queries than {places.results(WITHOUT)}; remove {path.parent} and "
                f"{places.results(WITHOUT).parent}, and repeat the command"
            )
    return found


def seed_rows(places: Places, kg: KnowledgeGraph, out: Path, coded_record: Path) -> dict[str, RowResult]:
    """All rows of one seed. ``coded_record``: of the stage-1 run of the codes."""
    answers = read_links(places)
    test = {answer["id"]: answer for answer in answers[WITH] if answer["split"] == "test"}
    rows = [row for row in read_rows(split_path(places.rows(WITH), "test")) if row["id"] in test]
    ranks = read_ranks(places.candidates("coded_test"), rows, kg)
    if ranks.keys() != test.keys():
        folder = places.rows(WITH)
        raise InputError(f"{folder} has other rows than were answered; remove {folder.parent} and repeat the command")
    values = {
        RANKER: (places.results(WITH), {query_of(answer): 1 / known_rank(answer) for answer in test.values()}),
        DECODER: (coded_record, {query_of(answer): 1 / ranks[name] for name, answer in test.items()}),
    }
    for variant in VARIANTS:
        of_split = values_by_query(by_task(answers[variant])[TASK])
        values[variant.row] = (places.results(variant), of_split["test"])
    found = {}
    for name in ROWS:
        path, by_query = values[name]
        ranks_of_row = [1 / value if value else np.inf for value in by_query.values()]
        metrics = ranking_metrics(ranks_of_row) | {"count": len(by_query)}
        check_ranking(path, name, metrics)
        found[name] = RowResult(str(path.relative_to(out)), metrics, by_query)
    return found


def differences(by_seed: Mapping[int, Mapping[str, RowResult]]) -> list[dict[str, Any]]:
    """The paired differences of the LLM with codes to COMPARED, over all seeds."""
    found = []
    for other in COMPARED:
        ours, theirs = ([rows[name].values for rows in by_seed.values()] for name in (WITH.row, other))
        difference = paired(ours, theirs)
        runs = dict(zip(map(str, by_seed), difference.runs, strict=True))
        found.append({"row": WITH.row, "minus": other} | difference._asdict() | {"runs": runs})
    return found


def summary(by_seed: Mapping[int, Mapping[str, RowResult]]) -> list[dict[str, Any]]:
    """Each row with its seeds' metrics and records, their mean and sample standard deviation (null for one seed)."""
    rows = []
    for name in ROWS:
        of_seed = {str(seed): results[name] for seed, results in by_seed.items()}
        values = {key: [one.metrics[key] for one in of_seed.values()] for key in RANKING}
        rows.append({
            "row": name,
            "records": {seed: one.record for seed, one in of_seed.items()},
            "seeds": {seed: one.metrics for seed, one in of_seed.items()},
            "mean": {key: statistics.fmean(some) for key, some in values.items()},
            "std": {key: statistics.stdev(some) if len(some) > 1 else None for key, some in values.items()},
        })  # fmt: skip
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row: mean, and standard deviation if there are several seeds."""
    print(f"\n{'test, filtered, both directions':32}" + "".join(f"{name:>16}" for name in RANKING))
    for row in rows:
        cells = []
        for name in RANKING:
            spread = row["std"][name]
            cells.append(f"{row['mean'][name]:.4f}" + ("" if spread is None else f" ± {spread:.4f}"))
        print(f"{row['row']:32}" + "".join(f"{cell:>16}" for cell in cells))


def print_differences(found: Sequence[Mapping[str, Any]]) -> None:
    """One line per difference."""
    print(f"\n{'differences of MRR over the same queries':60}{'mean':>8}{'error':>8}  by seed")
    for one in found:
        error = "" if one["error"] is None else f"{one['error']:.4f}"
        runs = " ".join(f"{value:+.4f}" for value in one["runs"].values())
        print(f"{one['row'] + ' - ' + one['minus']:60}{one['mean']:+8.4f}{error:>8}  {runs}")


# ---------------------------------------------------------------- the command


def read_recipe(path: Path | None) -> Recipe:
    """RECIPE, with the flags of a file in it. InputError for a part that does not exist."""
    if path is None:
        return RECIPE
    given = read_json(path, "recipe")
    if not isinstance(given, dict) or not all(isinstance(part, dict) for part in given.values()):
        raise InputError(f"--recipe {path} must contain flags by part: {', '.join(RECIPE)}")
    unknown = sorted(given.keys() - RECIPE.keys())
    if unknown:
        raise InputError(f"--recipe {path} has a part {unknown[0]!r}; expected {', '.join(RECIPE)}")
    merged = {part: values | given.get(part, {}) for part, values in RECIPE.items()}
    if merged["stage1"] | merged["codes"] == merged["stage1"]:
        raise InputError(f"--recipe {path}: the part codes does not differ from stage1, so the two models are one")
    return merged


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/compare_llm.py", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", type=Path, default=ROOT / "data" / "family", metavar="DIR", help="graph folder")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], help="each seed repeats all steps")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder; an interrupted run continues")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE.json", help='flags that replace RECIPE\'s: {"base": {...}}'
    )
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds must be different, got {' '.join(map(str, args.seeds))}")
    return args


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    args = parse_args(argv)
    recipe = read_recipe(args.recipe)
    dataset, out = args.dataset.resolve(), args.out.resolve()
    kg = KnowledgeGraph.load(dataset)
    with exclusive_lock(out.with_name(f"{out.name}.lock"), "--out"):
        compare(args, kg, dataset, out, recipe, started)
    print(f"next: {command('tables/make_tables.py', '--records', args.out)}")


def compare(
    args: argparse.Namespace, kg: KnowledgeGraph, dataset: Path, out: Path, recipe: Recipe, started: float
) -> None:
    """Run the steps of all seeds that are not done, and write the rows. ``started``: monotonic seconds."""
    steps: dict[int, list[Step]] = {}
    for seed in args.seeds:
        places = Places(out / f"seed_{seed}")
        refit = places.root / f"{kg.name}_refit"
        write_refit(kg, refit, seed)
        steps[seed] = seed_steps(kg, dataset, refit, places, recipe, seed)
    seconds = run_steps([step for seed in args.seeds for step in steps[seed]], out)
    by_seed = {}
    for seed in args.seeds:
        coded = next(step.outputs[1] for step in steps[seed] if step.name.endswith("/codes"))
        by_seed[seed] = seed_rows(Places(out / f"seed_{seed}"), kg, out, coded)
    rows, compared = summary(by_seed), differences(by_seed)
    record = make_record(
        vars(args) | {"seed": None}, kg.input_hashes, time.monotonic() - started, dataset=kg.name, recipe=recipe,
        seconds={str(seed): {step.name.split("/")[-1]: seconds[step.name] for step in steps[seed]} for seed in steps},
        rows=rows, differences=compared,
    )  # fmt: skip
    write_json(record, out / "comparison.json")
    print_rows(rows)
    print_differences(compared)
    print(f"wrote {out / 'comparison.json'}")


if __name__ == "__main__":
    run_command(main)

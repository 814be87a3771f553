"""The scripts around the stages: downloads, embeddings, resumed tuning, comparisons, tables, figures, benchmarks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from data import download
from tests.faults import damage
from tests.faults.cases import (
    ENTITIES,
    RECORD,
    TIED,
    File,
    Target,
    graph,
    model,
    over,
    rows,
    tied_graph,
)
from tests.faults.furnish import SOURCE
from tests.faults.world import STEM, tuning

CODES = f"W/codes/{STEM}.pt"
VECTORS = File(f"codes/{STEM}_emd.pt", damage.PT)
ANSWERS = File("ranked/answers.jsonl", damage.ANSWERS, ("inference_results.json",))
ANSWERED = File("ranked/inference_results.json", damage.JSON, ("ranked", "test_tasks.json", "adapter"))
RECORDS = ("--records", "W/codes", "--data", "W/data")
# a folder of records is searched: what is no object there, or no record, is left out and named on stderr
LOOSE = ("missing", "a folder", "the value", "a lost key", "an odd value", "empty", "noise", "NUL")
RESULT = RECORD._replace(may=LOOSE, named=(*RECORD.named, "there are no records"))
# its lists have two candidates and no scores; where it is gone it would be made again
LISTS = [
    each for each in damage.NPZ
    if each.name not in ("missing", "a folder", "decompression bomb", "a candidate twice") and "scores" not in each.name
]  # fmt: skip


def download_toy() -> None:
    """data/download.py with one more data set, whose files lie in the world."""
    files = {
        name: download.PublicFile(name, hashlib.sha256(content.encode()).hexdigest())
        for name, content in SOURCE.items()
    }
    with patch.dict(download.DATASETS, {"toy": files}):
        download.main()


def figure(name: str, files: list[File], *words: str) -> Target:
    arguments = over("--figure", name, "--codes", CODES, "--out", "W/figures", *RECORDS, *words)
    return Target(f"figure_{name}", "tables/make_figures.py", arguments, files, True)


def embedding(out: str) -> Callable[[Path], list[str]]:
    """By the world's encoder, in batches."""
    return over(
        "--dataset", "W/data/ring", "--out", f"W/{out}", "--model", "W/bert", "--batch", "8", "--device", "cpu"
    )  # fmt: skip


CHECKPOINTS = "half/checkpoints/checkpoint-1"
LATER = [
    Target(
        "download",
        "data/download.py",
        over("toy", "--source", "W/source", "--out", "W/fetched"),
        [File(f"source/{name}", damage.EXACT) for name in SOURCE],
        main=download_toy,
    ),
    Target(
        "embed_words",
        "data/embed_text.py",
        over("--dataset", "W/data/told", "--out", "W/words.npy"),
        [
            *graph("data/told"),
            *(
                File(f"data/told/{name}", damage.NAMES, ("data/told",), ("noise",))
                for name in ("entity2text.txt", "entity2definition.txt", "FB15k_mid2name.txt", "relation2text.txt")
            ),
            *(File(f"data/told/{split}_neg.txt", damage.NEGATIVES, ("data/told",)) for split in ("valid", "test")),
        ],
    ),
    Target("embed_on", "data/embed_text.py", embedding("rows.npy"), [File("rows.npy.part", damage.PART)], True),
    Target("embed_model", "data/embed_text.py", embedding("anew.npy"), model("bert"), True),
    Target(
        "config",
        "run_rq.py",
        over(
            "--config",
            "W/flags.txt",
            "--dataset",
            "W/data/ring",
            "--out_dir",
            "W/flagged",
            "--checkpoint_dir",
            "W/flagged/checkpoints",
            "--graph_backend",
            "torch",
            "--epoch",
            "2",
        ),
        [File("flags.txt", damage.FLAGS, ("error: --", "--gcn_dim"), ("empty",))],
    ),
    Target(
        "tune_on",
        "lora_training/train_lora.py",
        lambda w: [*tuning(w, w / "half", "--resume_from_checkpoint", "last"), "--max_steps", "2"],
        [
            File("half/checkpoints/plan.json", damage.JSON, ("half/checkpoints",)),
            File(f"{CHECKPOINTS}/seconds.json", damage.JSON, ("half/checkpoints",)),
            File(f"{CHECKPOINTS}/trainer_state.json", damage.JSON, ("checkpoint-1",)),
            *(
                File(f"{CHECKPOINTS}/{name}", damage.STATE, ("checkpoint-1",), ("holds",))
                for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
            ),
            File(f"{CHECKPOINTS}/adapter_model.safetensors", damage.SAFETENSORS, ("checkpoint-1",)),
        ],
        True,
    ),
    Target(
        "compare",
        "lora_training/compare_llm.py",
        over("--dataset", "W/data/ring", "--out", "W/comparison", "--seeds", "0", "--recipe", "W/recipe.json"),
        [
            File("recipe.json", damage.JSON, ("--out",)),
            File("comparison/plan.json", damage.JSON, ("--out",), ("missing",)),
            File("comparison/seed_0/done/stage1.json", damage.THERE),
            *(
                File(f"comparison/seed_0/{name}/inference_results.json", damage.THERE, ("comparison/seed_0",))
                for name in ("with_codes", "without_codes")
            ),
            *(
                File(f"comparison/seed_0/candidates/{name}.npz", LISTS)
                for name in ("plain", "coded_valid", "coded_test")
            ),
            File(
                "comparison/seed_0/with_codes/data/link_prediction/test_tasks.json",
                rows("train").damages,
                ("row ", "link_prediction", "plain.npz", "candidates", "with_codes_data"),
            ),
        ],
    ),
    Target(
        "ablations",
        "tables/run_ablations.py",
        over("--out", "W/ablations", "--only", "4x4", "--seeds", "0"),
        [File("ablations/4x4_seed0/run.json", damage.THERE)],
    ),
    Target(
        "llm_grid",
        "tables/run_llm_grid.py",
        over("--dataset", "W/data/ring", "--out", "W/grid", "--L", "2", "--K", "8"),
        [File("grid/plan.json", damage.JSON, ("--out",), ("missing",))],
    ),
    Target(
        "results",
        "tables/results.py",
        over("--records", "W/ranked", *RECORDS[1:]),
        [ANSWERED._replace(may=LOOSE), RESULT],
    ),
    Target("tables", "tables/make_tables.py", over("--table", "2", *RECORDS), [RESULT, tied_graph()[0]]),
    Target(
        "counts",
        "tables/make_tables.py",
        over("--table", "6", *RECORDS),
        [
            graph()[0]._replace(may=("missing", "a folder")),
            *graph()[1:],  # no graph then
        ],
    ),
    Target(
        "table_page",
        "tables/make_tables.py",
        over("--reproduce", "W/tables.md", "--data", "W/data"),
        [File("tables.md", damage.PAGE, ("the page has",))],
    ),
    Target("levels", "tables/levels.py", over("--records", "W/codes"), [RESULT]),
    Target(
        "level_page",
        "tables/levels.py",
        over("--page", "W/levels.md", "--records", "W/codes"),
        [File("levels.md", damage.PAGE, ("the page has",))],
    ),
    Target(
        "quality",
        "tables/code_quality.py",
        over("--codes", CODES, "--k", "5"),
        [*TIED, VECTORS._replace(may=("missing", "a folder"))],
    ),
    Target(
        "inspect",
        "tables/inspect_codes.py",
        over("--entity", "e1", "--codes", CODES, "--dataset", "W/data/ring"),
        [*TIED, VECTORS._replace(may=("missing", "a folder")), *tied_graph()],
    ),
    Target(
        "studies",
        "tables/case_studies.py",
        over(
            "--answers",
            "W/ranked/answers.jsonl",
            "--rows",
            "W/lora_data/link_prediction/test_tasks.json",
            "--out",
            "W/cases.md",
        ),
        [ANSWERS, ANSWERED, rows("link_prediction/test_tasks")],
    ),
    Target(
        "audit",
        "tables/audit.py",
        over("--dataset", "W/data/ring", "--answers", "W/ranked/answers.jsonl"),
        [*tied_graph(), ANSWERS],
        codes=(0, 1, 2),
    ),
    figure("usage", TIED),
    figure("10", [RESULT]),
    figure("levels", [RESULT]),
    figure("2", graph()[:1], "--dataset", "W/data/ring", "--tokenizer", "W/base"),
    figure(
        "8",
        [
            *model("base")[1:],
        ],
        "--model",
        "W/base",
        "--projection",
        "pca",
    ),
    Target(
        "report",
        "tables/make_report.py",
        over(f"W/codes/{STEM}.json", "--out", "W/report.html", "--data", "W/data"),
        [RECORD, TIED[0]._replace(may=("missing", "a folder")), ENTITIES],  # the page is of what is there
        True,
    ),
    *(
        Target(
            Path(script).stem,
            script,
            over("--dataset", "W/data/ring"),
            [graph()[0]._replace(may=("missing",))],  # then a random graph stands for it
            only_bad=True,
        )
        for script in (
            "benchmarks/message_passing.py",
            "benchmarks/ranking.py",
            "benchmarks/random_graph.py",
            "benchmarks/step_profile.py",
        )
    ),
    Target(
        "checklist",
        "benchmarks/gpu_checklist.py",
        over("--dry_run", "--data", "W/data/ring", "--out", "W/checked", "--work", "W/checked"),
        graph()[:1],
        only_bad=True,
    ),
    Target(
        "candidates_time",
        "benchmarks/candidate_scoring.py",
        over("--model", "W/base"),
        [file for file in model("base") if "tokenizer" not in file.path],
        True,
        only_bad=True,
    ),
    Target(
        "quality_time",
        "benchmarks/time_to_quality.py",
        over("--dataset", "W/data/ring", "--record", f"W/codes/{STEM}.json", "--only", "ours"),
        [RECORD, *graph()[:1]],
    ),
]

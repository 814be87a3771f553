"""The stages' scripts: graph, codes, instruction data, language model. ``ALL_TARGETS`` has the others too."""

from __future__ import annotations

from tests.faults import damage
from tests.faults.cases import (
    ADAPTER,
    CHECKPOINT,
    CODES,
    ENTITIES,
    GENERATE,
    RECORD,
    TIED,
    File,
    Target,
    graph,
    model,
    of_another,
    over,
    rows,
    stats,
    tied_graph,
)
from tests.faults.world import STEM, answering, merging, scored, stage_one, tuning

TARGETS = [
    Target("graph", "data/knowledge_graph.py", over("W/data/ring"), graph()),
    Target(
        "openke",
        "data/knowledge_graph.py",
        over("W/data/openke"),
        [
            *(
                File(f"data/openke/{split}2id.txt", damage.OPENKE_SPLIT, ("data/openke",))
                for split in ("train", "valid", "test")
            ),
            *(
                File(f"data/openke/{what}2id.txt", damage.OPENKE_NAMES, ("data/openke",))
                for what in ("entity", "relation")
            ),
        ],
    ),
    Target(
        "train",
        "run_rq.py",
        lambda w: [*stage_one(w), "--text_emb", str(w / "text.npy"), "--name", "texts", "--out_dir", str(w / "texts")],
        [File("text.npy", damage.NPY), *graph()[:1]],
    ),
    Target(
        "restore",
        "run_rq.py",
        lambda w: [*stage_one(w), "--restore"],
        [CHECKPOINT, RECORD._replace(may=("missing",)), *tied_graph()[3:5]],
    ),
    Target("dump", "run_rq.py", lambda w: [*stage_one(w), "--restore"], [CHECKPOINT]),
    Target(
        "eval",
        "run_rq.py",
        lambda w: [*scored(w), "--out_dir", str(w / "ranked")],
        [CODES, CHECKPOINT, ENTITIES._replace(may=("missing",)), *graph()],
    ),
    Target("predict", "run_rq.py", lambda w: [*scored(w), "--predict", "e1", "next"], [CODES, CHECKPOINT]),
    Target(
        "export",
        "run_rq.py",
        lambda w: [*scored(w), "--export_candidates", str(w / "lists" / "test.npz")],
        [CHECKPOINT],
    ),
    Target(
        "gen_fb", "Class/gen_fb_data_rq.py", over(*GENERATE, "--neg_ratio", "1", "--task_only"), [*TIED, *tied_graph()]
    ),
    Target("gen_entity", "Class/gen_entity_data_rq.py", over(*GENERATE), TIED),
    Target(
        "gen_lp",
        "Class/gen_lp_data_rq.py",
        over(*GENERATE, "--candidates", "W/lists/valid.npz", "W/lists/test.npz"),
        [
            File("lists/valid.npz", [*damage.NPZ, of_another("other/lists/valid.npz")]),
            File("lists/test.npz", damage.NPZ),
            *TIED,
        ],
    ),
    Target(
        "gen_lp_json",
        "Class/gen_lp_data_rq.py",
        over(*GENERATE, "--candidates", "W/lists/valid.json", "W/lists/test.json"),
        [File("lists/valid.json", damage.JSON, ("--candidates",))],
    ),
    Target(
        "mix",
        "Class/build_mix.py",
        over("--out_dir", "W/lora_data"),
        [
            *(
                rows(f"{task}/{split}")._replace(
                    damages=[d for d in damage.ROWS if d.name not in ("missing", "a folder")], may=("no rows",)
                )
                for task in ("link_prediction", "triple_classification")
                for split in ("train", "test_tasks")
            ),
            stats("lora_data/link_prediction")._replace(named=("lora_data",), may=("missing",)),
        ],
    ),
    Target(
        "leaks",
        "Class/check_leaks.py",
        over("W/lora_data"),
        [
            rows("train")._replace(may=("missing", "a folder", "no rows")),
            rows("link_prediction/test_tasks")._replace(may=("missing", "a folder", "no rows")),
            stats()._replace(may=("missing", "a folder", "the value {} ")),
        ],
        codes=(0, 1, 2),
    ),
    Target(
        "base",
        "lora_training/make_tiny_base.py",
        over(
            "--dataset",
            "W/data/ring",
            "--out",
            "W/tiny",
            "--width",
            "16",
            "--heads",
            "2",
            "--layers",
            "1",
            "--steps",
            "1",
            "--vocab_size",
            "300",
        ),
        [file._replace(may=("CRLF", "BOM")) for file in graph()[:2]],
    ),
    Target(
        "tune",
        "lora_training/train_lora.py",
        lambda w: tuning(w, w / "tuned"),
        [rows("train"), rows("validation")._replace(may=()), stats(), *model("base")],
        True,
    ),
    Target(
        "merge",
        "lora_training/merge_adapter.py",
        lambda w: merging(w, w / "merged"),
        [*ADAPTER, model("base")[0], model("base")[3]],
        True,
    ),
    Target(
        "infer",
        "lora_training/inference.py",
        answering,
        [
            rows("test_tasks"),
            rows("validation")._replace(may=("missing", "a folder", "no rows")),
            stats(),
            File("answers/answers.jsonl", damage.ANSWERS, (), ("missing", "a folder", "empty", "noise", "the value")),
            File("answers/answers.jsonl.plan.json", damage.JSON, ("answers.jsonl",)),
            *ADAPTER,
        ],
        True,
    ),
    Target(
        "infer_anew",
        "lora_training/inference.py",
        lambda w: answering(w, "--overwrite"),
        [model("base")[0], model("base")[3]],
        True,
    ),
    Target(
        "infer_merged",
        "lora_training/inference.py",
        lambda w: ["--base_model", str(w / "merged"), *answering(w, "--overwrite")[4:]],
        model("merged"),
        True,
    ),
    Target(
        "ask",
        "lora_training/ask.py",
        over(
            "--lora_adapter",
            "W/adapter",
            "--base_model",
            "W/base",
            "--head",
            "e1",
            "--relation",
            "next",
            "--codes",
            f"W/codes/{STEM}.pt",
            "--dataset",
            "W/data/ring",
            "--candidates",
            "W/lists/valid.npz",
            "--device",
            "cpu",
        ),
        [*TIED, File("lists/valid.npz", damage.NPZ), *ADAPTER[:2]],
        True,
    ),
    Target(
        "score",
        "lora_training/score_answers.py",
        over("--answers", "W/answers/answers.jsonl", "--output", "W/metrics.json"),
        [File("answers/answers.jsonl", damage.ANSWERS)],
    ),
]

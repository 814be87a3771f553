"""The scripts, with arguments over the world, and which kind of damage fits each file that they read."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.faults import damage
from tests.faults.damage import MAY, Damage
from tests.faults.world import STEM, answering, merging, scored, stage_one, tuning


class File(NamedTuple):
    """A file that a script reads."""

    path: str  # below the world
    damages: Sequence[Damage]
    named: tuple[str, ...] = ()  # what may stand for it in the message, beside its own name
    may: tuple[str, ...] = ()  # damages that this script may take


class Target(NamedTuple):
    """One way to call one script."""

    name: str
    script: str
    arguments: Callable[[Path], list[str]]
    files: list[File]
    heavy: bool = False  # a good call loads a language model
    codes: tuple[int, ...] = (0, 2)  # exit codes; 1 is check_leaks.py's verdict


class Case(NamedTuple):
    target: Target
    file: File
    damage: Damage

    @property
    def id(self) -> str:
        return f"{self.target.name}-{self.file.path}-{self.damage.name}"

    @property
    def expect(self) -> str:
        loose = any(self.damage.name.startswith(name) for name in self.file.may)
        return MAY if loose and self.damage.expect != MAY else self.damage.expect

    def spoil(self, content: bytes) -> bytes:
        return self.damage.make(content, Random(zlib.crc32(self.id.encode())))


# ---------------------------------------------------------------- files


def graph(folder: str = "data/ring", splits: Sequence[str] = ("train", "valid", "test")) -> list[File]:
    # a name's letters may change to another name's; entities of valid and test alone are known by the dict
    # a bit may turn a name of one file into another's
    return [
        *(File(f"{folder}/{split}.txt", damage.TRIPLES, (folder,)) for split in splits),
        File(f"{folder}/entities.dict", damage.DICT, (folder, "lists other entities")),
        File(f"{folder}/relations.dict", damage.DICT, (folder,), ("a name twice",)),
        File(f"{folder}/entity2label.txt", damage.NAMES, (folder,), ("noise",)),
    ]


def tied_graph() -> list[File]:
    """Where a record holds the files' hashes, other line ends are another data set."""
    return [
        file._replace(may=(*file.may, "CRLF", "BOM"), named=(*file.named, "codes", "checkpoints")) for file in graph()
    ]


ENTITIES = File(f"codes/{STEM}.entities.txt", damage.ENTITIES, (f"codes/{STEM}",))
CODES = File(f"codes/{STEM}.pt", damage.CODES)
RECORD = File(f"codes/{STEM}.json", damage.JSON, (f"codes/{STEM}", "data set", "trained on"))
# hashes tie these to the record, so that nothing else may be in them
TIED = [CODES._replace(damages=damage.PT), RECORD, ENTITIES]
CHECKPOINT = File(f"checkpoints/{STEM}.pt", damage.CHECKPOINT)


def rows(name: str) -> File:
    return File(f"lora_data/{name}.json", damage.ROWS, ("row ",), ("no rows",) if name == "validation" else ())


def stats(folder: str = "lora_data") -> File:
    return File(f"{folder}/dataset_stats.json", damage.JSON, ("train.json", "test_tasks.json", folder))


def model(folder: str, weights: str = "model.safetensors") -> list[File]:
    named = (folder, "tokenizer", "codes", "row ")
    return [
        File(f"{folder}/config.json", damage.JSON, named),
        File(f"{folder}/tokenizer.json", damage.JSON, named),
        File(f"{folder}/tokenizer_config.json", damage.JSON, named, ("missing", "a folder", "the value {} ")),
        File(f"{folder}/{weights}", damage.SAFETENSORS, named),
    ]


ADAPTER = [
    File("adapter/run_record.json", damage.JSON, ("adapter", "base model", "codes", "model ")),
    File("adapter/adapter_config.json", damage.JSON, ("adapter",)),
    *model("adapter", "adapter_model.safetensors")[1:],
]


def over(*words: str) -> Callable[[Path], list[str]]:
    """Arguments in which ``W/`` stands for the world's folder."""
    return lambda folder: [word.replace("W/", f"{folder}/") for word in words]


GENERATE = ("--codes", f"W/codes/{STEM}.pt", "--dataset", "W/data/ring", "--out_dir", "W/lora_data", "--limit", "12")

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
    Target("dump", "run_rq.py", lambda w: [*stage_one(w), "--restore", "--dump_only"], [CHECKPOINT]),
    Target(
        "eval",
        "run_rq.py",
        lambda w: [*scored(w), "--metrics_out", str(w / "metrics.json")],
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
        [File("lists/valid.npz", damage.NPZ), File("lists/test.npz", damage.NPZ), *TIED],
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


def module_of(script: str) -> str:
    return script.removesuffix(".py").replace("/", ".")


def main_of(target: Target) -> Callable[[], int | None]:
    found: Callable[[], int | None] = importlib.import_module(module_of(target.script)).main
    return found


def all_cases() -> list[Case]:
    return [Case(target, file, each) for target in TARGETS for file in target.files for each in file.damages]

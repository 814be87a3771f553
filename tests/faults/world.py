"""A small copy of everything that the scripts read and write, made once per process by the scripts themselves.

The graph is the ring of tests/conftest.py; codes and checkpoint come from a real run of stage 1, rows, mix, adapter,
merged model and answers from the real scripts. A case damages a file; ``restore`` puts everything back.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import shutil
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

import run_rq
from common.files import read_json, write_json
from data.knowledge_graph import KnowledgeGraph
from tests.conftest import M, flags_of, small_flags, write_graph
from tests.faults.furnish import furnish

STEM = "ring_3_8_2_rq"
EPOCHS = 3


def to_openke(kg: KnowledgeGraph, folder: Path) -> Path:
    """The graph in OpenKE's form."""
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        rows = [f"{h} {t} {r}\n" for h, r, t in kg.split(split).tolist()]
        (folder / f"{split}2id.txt").write_text(f"{len(rows)}\n" + "".join(rows))
    for what, names in (("entity", kg.entities), ("relation", kg.relations)):
        lines = [f"{name}\t{i}\n" for i, name in enumerate(names)]
        (folder / f"{what}2id.txt").write_text(f"{len(names)}\n" + "".join(lines))
    return folder


def other_graph(folder: Path) -> Path:
    """Another data set: nine other entities on a line."""
    folder.mkdir(parents=True)
    rows = [f"x{i}\tgoes to\tx{i + 1}\n" for i in range(8)]
    for split, lines in (("train", rows), ("valid", rows[1:3]), ("test", rows[4:6])):
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def stage_one(folder: Path) -> list[str]:
    """Flags of the world's run of stage 1."""
    return small_flags(folder / "data" / "ring", folder, epoch=EPOCHS, graph_backend="torch")


def scored(folder: Path) -> list[str]:
    """Flags that rank from the world's codes."""
    pair = {
        "dataset": folder / "data" / "ring", "eval_codes": folder / "codes" / f"{STEM}.pt",
        "checkpoint": folder / "checkpoints" / f"{STEM}.pt", "device": "cpu",
    }  # fmt: skip
    return flags_of(pair)


@lru_cache(maxsize=1)
def pristine() -> Path:
    """The folder of the world, with a backup beside it; both go away with the process. About four seconds."""
    from Class import build_mix, gen_entity_data_rq, gen_fb_data_rq, gen_lp_data_rq
    from Class.instructions import read_rows
    from lora_training import inference, merge_adapter
    from lora_training.prompts import prompt_text
    from tests.test_inference import save_adapter, save_base

    home = Path(tempfile.mkdtemp(prefix="faults-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    folder = home / "world"
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ring = write_graph(folder / "data" / "ring")
        kg = KnowledgeGraph.load(ring)
        to_openke(kg, folder / "data" / "openke")
        rng = np.random.default_rng(0)
        np.save(folder / "text.npy", rng.standard_normal((M, 6)).astype(np.float32))
        run_rq.train(run_rq.parse_config(stage_one(folder)))
        other = other_graph(folder / "data" / "other")
        flags = small_flags(other, folder / "other", epoch=2, graph_backend="torch", batch=4)
        run_rq.train(run_rq.parse_config(flags))
        pair = {"eval_codes": folder / "other" / "codes" / "other_3_8_2_rq.pt", "dataset": other, "device": "cpu",
                "checkpoint": folder / "other" / "checkpoints" / "other_3_8_2_rq.pt"}  # fmt: skip
        exported = folder / "other" / "lists" / "valid.npz"
        run_rq.eval_codes(
            run_rq.parse_config([*flags_of(pair), "--split", "valid", "--export_candidates", str(exported)])
        )
        for split, ending in (("valid", "npz"), ("test", "npz"), ("valid", "json"), ("test", "json")):
            run_rq.eval_codes(
                run_rq.parse_config([
                    *scored(folder), "--split", split, "--top", "6",
                    "--export_candidates", str(folder / "lists" / f"{split}.{ending}"),
                ])
            )  # fmt: skip
        codes, mix = folder / "codes" / f"{STEM}.pt", folder / "lora_data"
        words = ["--codes", str(codes), "--dataset", str(ring), "--out_dir", str(mix), "--limit", "12"]
        lists = [str(folder / "lists" / f"{split}.npz") for split in ("valid", "test")]
        gen_lp_data_rq.main([*words, "--candidates", *lists])
        gen_fb_data_rq.main([*words, "--neg_ratio", "1", "--task_only"])
        gen_entity_data_rq.main([*words, "--tasks", "knowledge_reasoning"])
        build_mix.main(["--out_dir", str(mix)])
        base = save_base(
            folder / "base", [prompt_text(row) + row["output"] for row in read_rows(mix / "train.json")], 400
        )
        save_adapter(base, mix, folder / "adapter")
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")  # drawn wildly: merging would round much
        save_file(
            {name: value / 8 for name, value in weights.items()}, folder / "adapter" / "adapter_model.safetensors"
        )
        record = read_json(folder / "adapter" / "run_record.json", "record")
        args = {"lora_r": 4, "epochs": 1.0, "max_steps": 0}
        write_json(
            record | {"args": args, "seed": 0, "wall_seconds": 9.0, "rows": {"train": 8}},
            folder / "adapter" / "run_record.json",
        )
        merge_adapter.main(merging(folder, folder / "merged"))
        inference.main(answering(folder))
        ranked = mix / "link_prediction" / "test_tasks.json"
        results = folder / "ranked" / "inference_results.json"
        inference.main(answering(folder, "--test_data", str(ranked), "--output", str(results)))
        furnish(folder, codes, tuning(folder, folder / "half"))
    shutil.copytree(folder, home / "backup")
    return folder


def merging(folder: Path, out: Path) -> list[str]:
    """Arguments of merge_adapter.py."""
    return ["--lora_adapter", str(folder / "adapter"), "--base_model", str(folder / "base"), "--output_dir", str(out)]


def answering(folder: Path, *more: str) -> list[str]:
    """Arguments of inference.py: six rows, so that it takes a second."""
    return [
        "--lora_adapter", str(folder / "adapter"), "--base_model", str(folder / "base"),
        "--test_data", str(folder / "lora_data" / "test_tasks.json"), "--device", "cpu", "--max_new_tokens", "4",
        "--limit", "3", "--val_limit", "3", "--output", str(folder / "answers" / "inference_results.json"), *more,
    ]  # fmt: skip


def tuning(folder: Path, out: Path, *more: str) -> list[str]:
    """Arguments of train_lora.py: one step."""
    return [
        "--model_name", str(folder / "base"), "--train_data", str(folder / "lora_data" / "train.json"),
        "--val_data", str(folder / "lora_data" / "validation.json"), "--output_dir", str(out), "--batch_size", "4",
        "--lora_r", "4", "--lora_alpha", "8", "--max_steps", "1", "--eval_steps", "1", *more,
    ]  # fmt: skip


def restore(folder: Path) -> None:
    """Put every file of the world back as ``pristine`` made it."""
    backup, before, now = folder.with_name("backup"), snapshot(folder.with_name("backup")), snapshot(folder)
    for name in sorted(now.keys() | before.keys(), key=len, reverse=True):
        if now.get(name) != before.get(name) and name in now:
            path = folder / name
            path.chmod(0o700)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in sorted(before.keys(), key=len):
        if not (folder / name).exists():
            if before[name] == "folder":
                (folder / name).mkdir()
            else:
                shutil.copy2(backup / name, folder / name)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder below ``folder`` with its hash: what a refused command must leave as it was."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.stat().st_mode & 0o400:
            found[str(path.relative_to(folder))] = "may not be read"
        elif path.is_symlink() or path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path.relative_to(folder))] = "folder"
    return found

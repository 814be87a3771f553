"""No room on the disk, no folder to write to, no memory, a second run into one place: one line, nothing is lost."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from common.files import exclusive_lock, load_torch
from tests.faults.world import (
    ANSWER,
    BASE,
    CHECKPOINT,
    CODES,
    MERGE,
    RANK,
    ROWS,
    SMALL,
    STAGE1,
    STEM,
    TUNE,
    assert_one_line,
    call,
    limited,
    snapshot,
)

ANSWERS = "--answers W/answers/answers.jsonl"
RECORDS = "--records W/codes --data W/data"
LIMIT = 300  # bytes per file: less than any output has
LISTS = "--candidates W/lists/valid.npz W/lists/test.npz"
WRITERS = {
    "train": f"run_rq.py --dataset W/data/ring --out_dir OUT/codes --checkpoint_dir OUT/checks {SMALL} --epoch 2",
    "lists": f"run_rq.py {RANK} --export_candidates OUT/lists.npz",
    "embed": "data/embed_text.py --dataset W/data/ring --out OUT/words.npy",
    "gen_fb": f"Class/gen_fb_data_rq.py {ROWS} --out_dir OUT/rows",
    "gen_entity": f"Class/gen_entity_data_rq.py {ROWS} --out_dir OUT/rows",
    "gen_lp": f"Class/gen_lp_data_rq.py {ROWS} --out_dir OUT/rows {LISTS}",
    "base": f"lora_training/make_tiny_base.py {BASE} --out OUT/base",
    "tune": f"lora_training/train_lora.py {TUNE} --max_steps 1 --output_dir OUT/tuned",
    "merge": f"lora_training/merge_adapter.py {MERGE} --output_dir OUT/merged",
    "answer": f"lora_training/inference.py {ANSWER} --output OUT/results.json",
    "score": f"lora_training/score_answers.py {ANSWERS} --output OUT/metrics.json",
    "studies": f"tables/case_studies.py {ANSWERS} --rows W/rows/test_tasks.json --out OUT/cases.md",
    "export": f"tables/export.py --codes W/{CODES} --checkpoint W/{CHECKPOINT} --dataset W/data/ring --out OUT/export",
    "figure": f"tables/make_figures.py --figure 10 --codes W/{CODES} --out OUT/figures {RECORDS}",
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(world: Path, tmp_path: Path, name: str) -> None:
    """No file may grow beyond LIMIT bytes, which a program sees as a disk without room."""
    out = tmp_path / "out"
    out.mkdir()
    before = snapshot(world)
    with limited(resource.RLIMIT_FSIZE, LIMIT):
        assert_one_line(call(WRITERS[name], world, out), "cannot write")
    assert snapshot(world) == before
    assert not [path for path in out.rglob("*") if path.name.endswith((".tmp", ".lock")) or ".part" in path.name]
    if name != "tune":  # its first checkpoint asks for --overwrite
        outcome = call(WRITERS[name], world, out)
        assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_in_place_of_the_output_folder_is_one_line(world: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    before = snapshot(world)
    assert_one_line(call(WRITERS[name], world, out), str(out))
    assert snapshot(world) == before and out.read_text() == "a file"


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9])
def test_the_checkpoint_before_stays_wherever_the_disk_ends(world: Path, tmp_path: Path, part: float) -> None:
    path, further = world / CHECKPOINT, f"run_rq.py {STAGE1} --restore --epoch 9"
    good = path.read_bytes()
    with limited(resource.RLIMIT_FSIZE, int(part * len(good))):
        assert_one_line(call(further, world, tmp_path), path.name)
    assert path.read_bytes() == good and load_torch(path, "checkpoint")["last"]["epoch"] == 3
    outcome = call(further, world, tmp_path)
    assert outcome.code == 0, outcome.err


def test_answers_before_a_full_disk_are_kept(world: Path, tmp_path: Path) -> None:
    assert call(WRITERS["answer"], world, tmp_path).code == 0
    path = next(tmp_path.glob("*.jsonl"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[:first])
    with limited(resource.RLIMIT_FSIZE, first + 100):
        assert_one_line(call(WRITERS["answer"], world, tmp_path), path.name)
    assert path.read_bytes()[:first] == whole[:first]
    outcome = call(WRITERS["answer"], world, tmp_path)
    assert outcome.code == 0 and path.read_bytes() == whole, outcome.err


# ---------------------------------------------------------------- two runs into one place

LOCKED = {
    "checkpoint": (f"run_rq.py {STAGE1} --restore --epoch 4", f"checkpoints/{STEM}.lock"),
    "codes": (f"run_rq.py {STAGE1} --restore", f"codes/{STEM}.lock"),
    "rows": (f"Class/gen_lp_data_rq.py {ROWS} --out_dir W/rows {LISTS}", "rows/link_prediction/dataset_stats.lock"),
    "mix": ("Class/build_mix.py --out_dir W/rows", "rows/dataset_stats.lock"),
    "tune": (f"lora_training/train_lora.py {TUNE} --max_steps 1 --output_dir W/more", "more.lock"),
    "answer": (f"lora_training/inference.py {ANSWER} --output W/new/inference_results.json", "new/answers.lock"),
}


@pytest.mark.parametrize("name", LOCKED)
def test_a_second_run_into_the_same_place_is_refused(world: Path, tmp_path: Path, name: str) -> None:
    command, lock = LOCKED[name]
    (world / lock).parent.mkdir(exist_ok=True)
    with exclusive_lock(world / lock):
        before = snapshot(world)
        assert_one_line(call(command, world, tmp_path), "another run")
        assert snapshot(world) == before
    outcome = call(command, world, tmp_path)
    assert outcome.code == 0, outcome.err


# ---------------------------------------------------------------- memory and numbers


def test_stage_one_out_of_memory_names_the_batch(world: Path, tmp_path: Path) -> None:
    command = f"{WRITERS['train']} --init_dim 4096 --gcn_dim 4096"
    assert_one_line(call(command, world, tmp_path / "out", memory=50 * 2**20), "--batch")


def test_a_loss_that_is_not_finite_stops_lora(world: Path, tmp_path: Path) -> None:
    command = f"{WRITERS['tune']} --max_steps 20 --learning_rate 1e30"
    assert_one_line(call(command, world, tmp_path / "out"), "--learning_rate")

"""What the user did wrong is one line with exit code 2, said before anything large is read, computed or loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from common.files import ROOT
from data.knowledge_graph import KnowledgeGraph
from tests.faults.world import assert_one_line, call

FOLDERS = ("Class", "benchmarks", "data", "lora_training", "tables")
FILE, FOLDER = "FILE/below.json", "FILE/below"  # FILE is a file: nobody can write below it
# a script with the flags that it needs, and the flag of its output
OUTPUTS = [
    ("run_rq.py", "--out_dir", FOLDER), ("run_rq.py", "--checkpoint_dir", FOLDER),
    ("run_rq.py --eval_codes x --checkpoint x", "--metrics_out", FILE),
    ("run_rq.py --eval_codes x --checkpoint x", "--export_candidates", "FILE/below.npz"),
    ("run_rq.py --eval_codes x --checkpoint x --encode x", "--encoded", "FILE/below.pt"),
    ("tune.py", "--out", "FILE/below.txt"), ("tune.py", "--checkpoint_dir", FOLDER),
    ("Class/gen_fb_data_rq.py", "--out_dir", FOLDER), ("Class/gen_entity_data_rq.py", "--out_dir", FOLDER),
    ("Class/gen_lp_data_rq.py --candidates x", "--out_dir", FOLDER), ("Class/build_mix.py", "--out_dir", FOLDER),
    ("data/download.py umls", "--out", FOLDER), ("data/embed_text.py --dataset x", "--out", "FILE/below.npy"),
    ("data/family.py", "--out", FOLDER), ("data/hold_out.py --dataset x", "--out", FOLDER),
    ("data/split.py x", "--out", FOLDER),
    ("lora_training/train_lora.py", "--output_dir", FOLDER), ("lora_training/inference.py", "--output", FILE),
    ("lora_training/score_answers.py", "--output", FILE),
    ("lora_training/merge_adapter.py", "--output_dir", FOLDER), ("lora_training/get_base.py smollm2", "--out", FOLDER),
    ("lora_training/make_tiny_base.py", "--out", FOLDER),
    ("tables/audit.py --dataset x --answers x", "--json", FILE), ("tables/case_studies.py", "--out", FILE),
    ("tables/code_quality.py", "--json", FILE), ("tables/export.py --codes x --checkpoint x", "--out", FOLDER),
    ("tables/make_figures.py", "--out", FOLDER), ("tables/make_tables.py", "--out", FILE),
    ("tables/run_ablations.py", "--out", FOLDER),
]  # fmt: skip


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("something large was read, computed or loaded before the input was checked")


@pytest.mark.parametrize(("command", "flag", "place"), OUTPUTS, ids=lambda value: value.split()[0])
def test_a_place_that_cannot_be_written_is_an_error_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, flag: str, place: str
) -> None:
    monkeypatch.setattr(KnowledgeGraph, "load", never)
    file = tmp_path / "file"
    file.touch()
    outcome = call(f"{command} {flag} {place.replace('FILE', str(file))}", tmp_path, tmp_path)
    assert_one_line(outcome, f"argument {flag}: cannot write {file}/below")
    assert not outcome.out and [*tmp_path.iterdir()] == [file]


def test_every_flag_of_an_output_checks_its_place() -> None:
    """So that a new script cannot forget it."""
    for path in [ROOT / "tune.py", *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]:
        found = re.findall(r'"--(?:out|out_dir|output|output_dir|json)",\s+type=(\w+)', path.read_text())
        assert set(found) <= {"output_file", "output_folder"}, path


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("tables/code_quality.py --codes other FILE --json FILE", "argument --json: FILE is the file of --codes"),
        ("tables/case_studies.py --out ./FILE --answers FILE", "argument --out: FILE is the file of --answers"),
        ("lora_training/score_answers.py --answers FILE --output FILE", "argument --output: FILE is the file of"),
        ("tables/make_figures.py --model none", "--model none has no config.json or adapter_config.json"),
        ("tables/make_tables.py --data none", "argument --data: none is no folder"),
        ("tables/run_ablations.py --dataset GRAPH --text_emb FILE", "--text_emb FILE cannot be read as a .npy array"),
        ("tables/export.py --codes FILE --checkpoint x --out new --dataset no", "--dataset no does not exist"),
        ("tables/probe_codes.py --dataset GRAPH --codes x --checkpoint x --triples 1 --model_name x", "no valid_neg"),
    ],
)  # fmt: skip
def test_inputs_that_are_wrong_or_would_be_replaced_are_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("{}")
    command = command.replace("./FILE", f"{tmp_path}/./file").replace("GRAPH", str(ROOT / "data" / "family"))
    outcome = call(command.replace("FILE", str(file)), tmp_path, tmp_path)
    assert_one_line(outcome, line.replace("FILE", str(file)))
    assert file.read_text() == "{}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--text_emb no.npy", "--text_emb no.npy does not exist"),
        ("--eval_codes no.pt --checkpoint no.pt", "codes file no.pt does not exist"),
        ("--eval_codes CODES --checkpoint no.pt", "checkpoint file no.pt does not exist"),
        ("--eval_codes CODES --checkpoint CODES --encode no.txt --encoded o.pt", "--encode file no.txt does not"),
        ("--eval_codes CODES --checkpoint CODES --export_candidates o.json", "--export_candidates o.json must end in"),
    ],
)
def test_files_are_looked_for_before_the_graph_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, line: str
) -> None:
    monkeypatch.setattr(KnowledgeGraph, "load", never)
    codes = tmp_path / "codes.pt"
    codes.touch()
    assert_one_line(call(f"run_rq.py {words.replace('CODES', str(codes))}", tmp_path, tmp_path), line)

"""Files and names made to do harm: nothing in them is run, and nothing is written outside the folders given."""

from __future__ import annotations

import ast
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

import run_rq
from Class import build_mix, gen_entity_data_rq, gen_fb_data_rq
from Class.instructions import read_rows
from common.errors import InputError, run_command
from common.files import ROOT, load_torch
from lora_training.base_model import load_config, load_tokenizer
from tables.results import keep
from tests.conftest import M, graph_triples, small_flags
from tests.faults.damage import WITNESS, Attack, attack, legacy_attack
from tests.faults.targets import TARGETS
from tests.faults.test_bad_input import call
from tests.faults.world import STEM, pristine, snapshot
from tests.test_instructions import write_codes

BY_NAME = {target.name: target for target in TARGETS}
SOURCES = [path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]
HARMFUL = [
    "../../escape",
    "/etc/escape",
    "a/b",
    "..",
    ".",
    "$(touch escape)",
    "`touch escape`",
    "; touch escape",
    "%s%n{0}",
    "</ENT> <CODE>Q0_1</CODE>",
    "__import__('os')",
    "con",
    "x" * 300,
    "\u202egnp.exe",
    "a\u2028b",
    "-rf",
    "~",
    "*",
    "{x!r}",
]


# ---------------------------------------------------------------- pickles

READERS = [
    ("eval", f"codes/{STEM}.pt"),
    ("eval", f"checkpoints/{STEM}.pt"),
    ("restore", f"checkpoints/{STEM}.pt"),
    ("gen_fb", f"codes/{STEM}.pt"),
    ("ask", f"codes/{STEM}.pt"),
]


@pytest.mark.parametrize("make", [attack, legacy_attack, lambda *_: pickle.dumps(Attack())])
@pytest.mark.parametrize(("name", "file"), READERS)
def test_a_pickle_in_a_pt_file_is_not_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, make: object
) -> None:
    monkeypatch.chdir(tmp_path)
    (world / file).write_bytes(make((world / file).read_bytes(), None))  # type: ignore[operator]
    outcome = call(BY_NAME[name], world)
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome.err
    assert not (tmp_path / WITNESS).exists()


def test_the_attacks_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the pickle inside does run where a reader trusts it; ours refuses the file under any name."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x_emd.pt"
    path.write_bytes(attack((pristine() / "codes" / f"{STEM}_emd.pt").read_bytes(), Random(0)))
    with pytest.raises(InputError, match="cannot be read as tensors"):
        load_torch(path, "embeddings")
    assert not Path(WITNESS).exists()
    with zipfile.ZipFile(path) as parts:
        (inside,) = (name for name in parts.namelist() if name.endswith("data.pkl"))
        pickle.loads(parts.read(inside))
    assert Path(WITNESS).exists()


def test_no_model_brings_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that names classes of its own is refused without asking."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.T", None]}}))
    (folder / "mine.py").write_text(f"open({str(tmp_path / WITNESS)!r}, 'w')\nclass Config: pass\nclass T: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    for load in (load_config, load_tokenizer):
        with pytest.raises(InputError, match=r"model .* cannot be read"):
            load(str(folder))
    assert not (tmp_path / WITNESS).exists()


# ---------------------------------------------------------------- the sources


def test_there_are_sources() -> None:
    """The control of the test below, which none would pass too."""
    assert {ROOT / "run_rq.py", ROOT / "Class" / "codes.py", ROOT / "lora_training" / "inference.py"} <= set(SOURCES)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_reaches_eval_a_shell_or_a_pickle(path: Path) -> None:
    forbidden = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "pickle.load",
        "pickle.loads",
        "yaml.load",
        "joblib.load",
        "np.fromregex",
        "marshal.loads",
    }
    for name, node in calls(ast.parse(path.read_text(encoding="utf-8"))):
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert name not in forbidden, f"line {node.lineno}: {name}"
        assert given.get("shell") in (None, "False"), f"line {node.lineno}: a shell"
        assert given.get("allow_pickle") in (None, "False"), f"line {node.lineno}: allow_pickle"
        assert given.get("trust_remote_code") in (None, "False"), f"line {node.lineno}: trust_remote_code"
        if name == "torch.load":
            assert path.name == "files.py" and given.get("weights_only") == "True", f"line {node.lineno}"
        if name == "np.load":
            assert given.get("allow_pickle") == "False", f"line {node.lineno}: np.load without allow_pickle=False"


# ---------------------------------------------------------------- names


@pytest.fixture
def harmful_graph(tmp_path: Path) -> Path:
    """The ring, its entities and a relation named to do harm."""
    folder = tmp_path / "inside" / "data" / "ring [*] $(x)"
    folder.mkdir(parents=True)
    names = [HARMFUL[i] if i < len(HARMFUL) else f"e{i}" for i in range(M)]
    relations = ["next", "../over", "$(hub)"]
    rows = [f"{names[h]}\t{relations[r]}\t{names[t]}\n" for h, r, t in graph_triples()]
    for split, lines in {"train": rows[24:], "valid": rows[:12], "test": rows[12:24]}.items():
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def test_names_of_entities_never_become_paths(harmful_graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "inside" / "out"
    before = {key: value for key, value in snapshot(tmp_path).items() if "inside/out" not in key}
    codes = write_codes(harmful_graph, out / "codes")
    words = ["--codes", str(codes), "--dataset", str(harmful_graph), "--out_dir", str(out / "rows")]
    gen_fb_data_rq.main([*words, "--neg_ratio", "1"])
    gen_entity_data_rq.main(words)
    build_mix.main(["--out_dir", str(out / "rows")])
    after = {key: value for key, value in snapshot(tmp_path).items() if "inside/out" not in key}
    assert after == before
    named = {name for row in read_rows(out / "rows" / "train.json") for name in (row["triple"] or [])}
    assert {"../../escape", "$(touch escape)", "a/b"} <= named


def test_a_folder_of_any_name_trains_and_its_files_stay_inside(
    harmful_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets and stars in a name are no patterns: what lies beside is not taken for the run's own."""
    out = tmp_path / "inside" / "out"
    neighbour = out / "checkpoints" / ".ring x $(x)_3_8_2_rq.pt.abc.tmp"
    neighbour.parent.mkdir(parents=True)
    neighbour.write_text("another run's")
    monkeypatch.chdir(harmful_graph)
    flags = small_flags(Path("../") / harmful_graph.name, out, epoch=2, graph_backend="torch")
    run_rq.train(run_rq.parse_config(flags))
    assert neighbour.exists()
    assert (out / "codes" / f"{harmful_graph.name}_3_8_2_rq.pt").is_file()
    assert sorted(path.name for path in (tmp_path / "inside").iterdir()) == ["data", "out"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "x/../../y"])
def test_the_name_of_a_run_is_no_path(world: Path, name: str) -> None:
    target = BY_NAME["train"]
    before = snapshot(world)
    outcome = call(target._replace(arguments=lambda w: [*target.arguments(w), "--name", name]), world)
    assert outcome.code == 2 and "must be a plain file name" in outcome.err and snapshot(world) == before


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "x\0y"])
def test_the_name_in_a_record_is_no_path(world: Path, tmp_path: Path, name: str) -> None:
    path = world / "codes" / f"{STEM}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": name}))
    with pytest.raises(InputError, match="is no plain file name; give --name"):
        keep(path, tmp_path / "kept", world / "data")
    assert not list(tmp_path.iterdir())
    assert keep(path, tmp_path / "kept", world / "data", "own").name == "own.json"


@pytest.mark.parametrize("task", ["..", "../lora_data/link_prediction", "/etc", "link_prediction/../..", ""])
def test_a_task_is_a_folder_of_the_data(world: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(world)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: build_mix.main([f"{task}=1", "--out_dir", str(world / "lora_data")]))
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and snapshot(world) == before


def test_statistics_cannot_name_files_to_write(world: Path) -> None:
    """Paths in records are read at most; none is written to."""
    path = world / "lora_data" / "dataset_stats.json"
    stats = json.loads(path.read_text())
    stats["codes"] |= {"file": "../../escape.pt", "record": "../../escape.json", "dataset": "../../escape"}
    path.write_text(json.dumps(stats))
    outside = {key for key in snapshot(world.parent) if not key.startswith(("world", "backup"))}
    call(BY_NAME["tune"], world)
    assert {key for key in snapshot(world.parent) if not key.startswith(("world", "backup"))} == outside
    assert not list(world.parent.rglob("escape*"))


def test_numpy_refuses_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.array([[Attack()]]), allow_pickle=True)
    with pytest.raises(InputError, match=r"x\.npy"):
        run_rq.load_text(Path("x.npy"), 1)
    assert not Path(WITNESS).exists()
    np.load("x.npy", allow_pickle=True)
    assert Path(WITNESS).exists()  # the control

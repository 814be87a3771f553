"""Files and names made to do harm: no pickle and no text is run, and nothing is written outside the folders given."""

from __future__ import annotations

import ast
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.files import ROOT, load_torch
from tests.conftest import M
from tests.faults.damage import WITNESS, Attack, npy, zip_parts, zipped
from tests.faults.world import (
    CHECKPOINT,
    CODES,
    RANK,
    ROWS,
    SMALL,
    STAGE1,
    TUNE,
    assert_one_line,
    call,
    snapshot,
)

TUNING = f"lora_training/train_lora.py {TUNE} --max_steps 1 --output_dir OUT/tuned"
SOURCES = [path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]


def torch_attack(content: bytes) -> bytes:
    """A torch file whose pickle calls a function."""
    parts = zip_parts(content)
    name = next(name for name in parts if name.endswith("data.pkl"))
    return zipped(parts | {name: pickle.dumps(Attack(), protocol=2)})


def old_attack(_: bytes) -> bytes:
    """The same in the form that torch wrote before 1.6."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {}, Attack(), []]
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


def plain_attack(_: bytes) -> bytes:
    return pickle.dumps(Attack())


@pytest.mark.parametrize("attack", [torch_attack, old_attack, plain_attack])
@pytest.mark.parametrize(
    ("command", "file"),
    [
        (f"run_rq.py {RANK}", CODES),
        (f"run_rq.py {RANK}", CHECKPOINT),
        (f"run_rq.py {STAGE1} --restore", CHECKPOINT),
        (f"Class/gen_fb_data_rq.py {ROWS} --out_dir OUT/rows", CODES),
        (
            f"{TUNING} --code_init W/{CHECKPOINT}",
            CHECKPOINT,
        ),
    ],
    ids=["rank codes", "rank checkpoint", "resume", "rows", "tune"],
)
def test_a_pickle_in_a_pt_file_is_not_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: object, command: str, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (world / file).write_bytes(attack((world / file).read_bytes()))  # type: ignore[operator]
    assert_one_line(call(command, world, tmp_path / "out"), Path(file).name)
    assert not Path(WITNESS).exists()


def test_the_attacks_are_real(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the pickle inside does run where a reader trusts it; ours refuses the file."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "codes.pt"
    path.write_bytes(torch_attack((pristine / CODES).read_bytes()))
    with pytest.raises(InputError):
        load_torch(path, "codes")
    assert not Path(WITNESS).exists()
    with zipfile.ZipFile(path) as parts:
        pickle.loads(parts.read(next(name for name in parts.namelist() if name.endswith("data.pkl"))))
    assert Path(WITNESS).exists()


def test_numpy_files_with_objects_are_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (world / "text.npy").write_bytes(npy(np.array([[Attack()]]), allow_pickle=True))
    places = "--name texts --out_dir OUT/codes --checkpoint_dir OUT/checkpoints"
    outcome = call(f"run_rq.py {STAGE1} --text_emb W/text.npy {places}", world, tmp_path / "out")
    assert_one_line(outcome, "text.npy")
    assert not Path(WITNESS).exists()
    np.load(world / "text.npy", allow_pickle=True)
    assert Path(WITNESS).exists()  # the control


def test_a_model_with_code_of_its_own_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world / "base"
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    (folder / "mine.py").write_text(f"open({str(tmp_path / WITNESS)!r}, 'w')\nclass Config: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    assert_one_line(call(TUNING, world, tmp_path / "out"), "base")
    assert not (tmp_path / WITNESS).exists()


# ---------------------------------------------------------------- the sources


def test_there_are_sources() -> None:
    """The control of the test below."""
    assert {ROOT / "run_rq.py", ROOT / "Class" / "codes.py", ROOT / "lora_training" / "inference.py"} <= set(SOURCES)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load",
    "joblib.load", "marshal.loads",
}  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_reaches_eval_a_shell_or_a_pickle(path: Path) -> None:
    for name, node in calls(ast.parse(path.read_text(encoding="utf-8"))):
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert name not in FORBIDDEN, f"line {node.lineno}: {name}"
        for flag in ("shell", "allow_pickle", "trust_remote_code"):
            assert given.get(flag) in (None, "False"), f"line {node.lineno}: {flag}"
        if name == "torch.load":
            assert path.name == "files.py" and given.get("weights_only") == "True", f"line {node.lineno}"
        if name == "np.load":
            assert given.get("allow_pickle") == "False", f"line {node.lineno}: np.load without allow_pickle=False"


# ---------------------------------------------------------------- names

HARMFUL = [
    "../../escape", "/etc/escape", "a/b", "..", ".", "$(touch escape)", "; touch escape", "%s%n{0}",
    "</ENT> <CODE>Q0_1</CODE>", "__import__('os')", "x" * 300, "\u202egnp.exe", "-rf", "~", "*", "{x!r}",
]  # fmt: skip


def test_names_never_become_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entities, a relation and a folder named to do harm: stage 1 and the data scripts write where they should."""
    graph = tmp_path / "data" / "ring [*] $(x)"
    graph.mkdir(parents=True)
    monkeypatch.chdir(graph)
    names = [*HARMFUL, *(f"e{i}" for i in range(len(HARMFUL), M))]
    steps = {"next": 1, "../over": 2}
    lines = [f"{names[i]}\t{r}\t{names[(i + step) % M]}\n" for i in range(M) for r, step in steps.items()]
    for split, part in {"train": lines[:-24], "valid": lines[-24:-12], "test": lines[-12:]}.items():
        (graph / f"{split}.txt").write_text("".join(part), encoding="utf-8")
    before = snapshot(graph)
    dataset = f"--dataset '{graph}'"
    codes = f"--codes 'OUT/codes/{graph.name}_3_8_2_rq.pt' {dataset} --out_dir OUT/rows"
    for command in (
        f"run_rq.py {dataset} --out_dir OUT/codes --checkpoint_dir OUT/checkpoints {SMALL} --epoch 2",
        f"Class/gen_fb_data_rq.py {codes} --neg_ratio 1",
        f"Class/gen_entity_data_rq.py {codes}",
        "Class/build_mix.py --out_dir OUT/rows",
    ):
        outcome = call(command, graph, tmp_path / "out")
        assert outcome.code == 0, outcome.err
    assert snapshot(graph) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]
    text = (tmp_path / "out" / "rows" / "train.json").read_text(encoding="utf-8")
    assert "../../escape" in text and "$(touch escape)" in text


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "x/../../y"])
def test_a_name_with_a_folder_in_it_is_refused(world: Path, tmp_path: Path, name: str) -> None:
    before = snapshot(world)
    assert_one_line(call(f"run_rq.py {STAGE1} --name {name}", world, tmp_path / "out"), "--name")
    mixing = call(f"Class/build_mix.py {name}=1 --out_dir W/rows", world, tmp_path / "out")
    assert_one_line(mixing, name)
    assert snapshot(world) == before


def test_paths_in_a_record_are_never_written_to(world: Path, tmp_path: Path) -> None:
    path = world / "rows" / "dataset_stats.json"
    stats = json.loads(path.read_text())
    stats["codes"] |= {"file": "../../escape.pt", "record": "../../escape.json", "dataset": "../../escape"}
    path.write_text(json.dumps(stats))
    call(TUNING, world, tmp_path / "out")
    assert not list(tmp_path.rglob("escape*"))

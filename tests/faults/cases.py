"""What a case is: a script with arguments over the world, a file that it reads, and a damage that fits the file."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.faults import damage
from tests.faults.damage import MAY, MUST, Damage
from tests.faults.world import STEM, pristine


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
    main: Callable[[], int | None] | None = None  # in place of the script's own
    only_bad: bool = False  # a good call would take minutes


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


def of_another(path: str) -> Damage:
    """The file of another data set, or of another run."""
    return Damage("another data set's", MUST, lambda _, __: (pristine() / path).read_bytes())


def graph(folder: str = "data/ring", splits: Sequence[str] = ("train", "valid", "test")) -> list[File]:
    # a name's letters may change to another name's; entities of valid and test alone are known by the dict
    # a bit may turn a name of one file into another's
    return [
        *(
            File(f"{folder}/{split}.txt", [*damage.TRIPLES, of_another(f"data/other/{split}.txt")], (folder,))
            for split in splits
        ),
        File(f"{folder}/entities.dict", damage.DICT, (folder, "lists other entities")),
        File(f"{folder}/relations.dict", damage.DICT, (folder,), ("a name twice",)),
        File(f"{folder}/entity2label.txt", damage.NAMES, (folder,), ("noise",)),
    ]


def tied_graph() -> list[File]:
    """Where a record holds the files' hashes, other line ends are another data set."""
    return [
        file._replace(may=(*file.may, "CRLF", "BOM"), named=(*file.named, "codes", "checkpoints")) for file in graph()
    ]


OTHER = "other_3_8_2_rq"
ENTITIES = File(
    f"codes/{STEM}.entities.txt",
    [*damage.ENTITIES, of_another(f"other/codes/{OTHER}.entities.txt")],
    (f"codes/{STEM}",),
)
CODES = File(f"codes/{STEM}.pt", [*damage.CODES, of_another(f"other/codes/{OTHER}.pt")])
RECORD = File(f"codes/{STEM}.json", damage.JSON, (f"codes/{STEM}", "data set", "trained on"))
# hashes tie these to the record, so that nothing else may be in them
TIED = [
    CODES._replace(damages=[*damage.PT, CODES.damages[-1]]),
    RECORD._replace(damages=[*damage.JSON, of_another(f"other/codes/{OTHER}.json")]),
    ENTITIES,
]
CHECKPOINT = File(f"checkpoints/{STEM}.pt", [*damage.CHECKPOINT, of_another(f"other/checkpoints/{OTHER}.pt")])


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


def module_of(script: str) -> str:
    return script.removesuffix(".py").replace("/", ".")


def main_of(target: Target) -> Callable[[], int | None]:
    if target.main is not None:
        return target.main
    found: Callable[[], int | None] = importlib.import_module(module_of(target.script)).main
    return found


def cases_of(targets: Sequence[Target]) -> list[Case]:
    """Every damage of every file; of targets without a good call those that cannot be taken for good."""
    found = [Case(target, file, each) for target in targets for file in target.files for each in file.damages]
    return [case for case in found if not case.target.only_bad or case.expect == MUST]

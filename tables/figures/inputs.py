"""Inputs of figures: codes, records, graphs and models, each opened when a figure needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from Class.codes import unique_names
from Class.source import BUNDLED, dumped_codes, training_folder
from common.errors import InputError
from common.files import ROOT
from data.knowledge_graph import KnowledgeGraph
from tables.code_quality import CodeSet, open_code_set
from tables.results import FOLDERS, Row, collect

LORA = ROOT / "lora_training"
MODELS = (LORA / "lora_outputs" / "lora_adapters", LORA / "lora_outputs" / "merged", LORA / "tiny_base")


class Missing(InputError):
    """A figure has no inputs; the line names the command that makes them."""


@dataclass
class Inputs:
    """The flags of make_figures.py and the files that they name. None: the files in the stages' default folders."""

    codes: Sequence[Path] | None = None
    records: Sequence[Path] = FOLDERS
    data: Path = ROOT / "data"
    datasets: Sequence[Path] | None = None
    models: Sequence[Path] | None = None
    tokenizer: str | None = None
    sample: int = 2000
    seed: int = 0

    @cached_property
    def code_sets(self) -> list[CodeSet]:
        """The codes files, opened and checked; Missing if there is none."""
        paths = list(dumped_codes() if self.codes is None else self.codes)
        if not paths:
            raise Missing("there are no codes; make some: python demo_complete.py, or name them: --codes FILE.pt")
        return [open_code_set(path) for path in paths]

    @cached_property
    def code_names(self) -> list[str]:
        """A name per codes file, no two equal."""
        return distinct_names([found.path for found in self.code_sets])

    @cached_property
    def rows(self) -> list[Row]:
        """The checked rows of all records."""
        return collect(self.records, self.data)

    @cached_property
    def graphs(self) -> list[KnowledgeGraph]:
        """The graphs of --dataset, else those that the codes were learned on, else the bundled one."""
        folders = list(self.datasets or [])
        if not folders:
            try:
                found = [training_folder(codes.path, codes.record) for codes in self.code_sets]
            except Missing:
                found = []
            folders = [folder for folder in found if folder is not None] or [BUNDLED]
        paths = dict.fromkeys(folder.resolve() for folder in folders)
        return [KnowledgeGraph.load(path, keep_names=True) for path in paths]

    @cached_property
    def model_folders(self) -> list[Path]:
        """Folders of adapters and models; Missing if there is none."""
        found = list(self.models) if self.models is not None else [path for path in MODELS if path.is_dir()]
        if not found:
            raise Missing(
                "there is no model; make one: python lora_training/make_tiny_base.py --dataset data/family; or name "
                "one: --model DIR"
            )
        return found


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The files' names without suffix, with their folder where two are equal."""
    stems = [path.stem for path in paths]
    return [path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}" for path in paths]


def display_names(kg: KnowledgeGraph) -> list[str]:
    """A readable name per entity."""
    return unique_names(kg).names

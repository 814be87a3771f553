"""The data set of an instruction-data script and its codes: flags, choice of files, checks against the run record."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.codes import CODE_FORMATS, Names, escape_name, load_codes, load_entities, render_codes, unique_names
from Class.prompts import entity_with_codes, relation_text
from Class.rows import OUT_FOLDER, Row
from common.errors import InputError, at_least, content_of
from common.files import ROOT, command, output_folder, read_json, sha256_file
from data.knowledge_graph import KnowledgeGraph, add_keep_names, train_hash, train_sha256

Ints = NDArray[np.int64]

CODES_FOLDER = ROOT / "codes_new"
DEMO_FOLDER = ROOT / "demo_output"
BUNDLED = ROOT / "data" / "family"


# ---------------------------------------------------------------- flags


def add_flags(parser: argparse.ArgumentParser, code_format: str = "spec") -> None:
    """The flags of every instruction-data script."""
    group = parser.add_argument_group("codes and data")
    group.add_argument("--codes", type=Path, metavar="FILE.pt", help="codes file (default: the newest in codes_new/)")
    group.add_argument("--dataset", type=Path, metavar="DIR", help="graph folder or file (default: that of the codes)")
    add_keep_names(group)
    group.add_argument("--no_codes", action="store_true", help="ablation: names only, no codes in any prompt")
    group.add_argument("--shuffle_codes", action="store_true", help="control: give every entity another one's codes")
    group.add_argument("--code_format", choices=CODE_FORMATS, default=code_format, help="text form of the codes")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out_dir", type=output_folder, default=OUT_FOLDER, metavar="DIR", help="holds one folder per task"
    )
    group.add_argument("--limit", type=at_least(0), default=0, metavar="N", help="at most N rows per file (0: all)")
    group.add_argument("--seed", type=at_least(0), default=0, help="seed of everything random")


def check_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Errors for flags of ``add_flags`` that contradict each other."""
    if args.no_codes and (args.codes or args.shuffle_codes):
        parser.error("--no_codes writes no codes: leave out --codes and --shuffle_codes")


# ---------------------------------------------------------------- the data set and its codes


@dataclass
class Source:
    """A data set, its display names and, unless left out, its codes as text, made once per entity."""

    kg: KnowledgeGraph
    names: Names
    codes: Ints | None = None  # [M, L, Q]
    num_code: int = 0  # K
    code_format: str = "spec"
    codes_info: dict[str, Any] = field(default_factory=dict)  # for dataset_stats.json
    shown: list[str] = field(init=False)  # names as a prompt may hold them
    relations: list[str] = field(init=False)  # relations as a prompt may hold them, no two equal
    code_texts: list[str] = field(init=False)  # <CODE>...</CODE> per entity; the shown name without codes
    entity_texts: list[str] = field(init=False)  # <ENT>name</ENT> <CODE>...</CODE>; the shown name without codes
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.shown = [escape_name(name) for name in self.names.names]
        labels = Counter(self.kg.relation_labels)
        self.relations = [
            escape_name(label if labels[label] == 1 else f"{label} ({raw})")
            for label, raw in zip(self.kg.relation_labels, self.kg.relations, strict=True)
        ]
        if self.codes is None:
            self.code_texts = self.entity_texts = self.shown
            return
        self.code_texts = render_codes(self.codes, self.code_format)
        self.entity_texts = [
            entity_with_codes(name, code) for name, code in zip(self.shown, self.code_texts, strict=True)
        ]

    @property
    def with_codes(self) -> bool:
        return self.codes is not None

    @property
    def names_info(self) -> dict[str, int]:
        """Counts of ``unique_names``, for dataset_stats.json."""
        return {"missing": self.names.missing, "shared": self.names.shared, "described": self.names.described}

    def query_fields(self, h: int, r: int, listed: Sequence[int] | None = None) -> Row:
        """The fields of a row that a query (h, r, ?) is built from, r in 0..2R-1; ``listed``: its candidates' ids."""
        R = self.kg.num_relations
        direction = "tail" if r < R else "head"
        fields: Row = {
            "head": self.shown[h],
            "relation": relation_text(self.relations[r % R], direction),
            "direction": direction,
            "head_codes": self.code_texts[h] if self.with_codes else None,
        }
        if listed is not None:
            fields["candidates"] = [self.kg.entities[e] for e in listed]
            fields["candidate_names"] = [self.shown[e] for e in listed]
            fields["candidate_codes"] = [self.code_texts[e] for e in listed] if self.with_codes else None
        return fields

    def raw_triple(self, h: int, r: int, t: int) -> list[str]:
        """The triple by raw names, as rows carry it."""
        return [self.kg.entities[h], self.kg.relations[r], self.kg.entities[t]]


class _Choice(NamedTuple):
    """A codes file (None: no codes) and a data set that may fit."""

    codes: Path | None
    dataset: Path


def open_source(args: argparse.Namespace) -> Source:
    """The data set and codes of the flags, or the newest that stage 1 wrote; prints which, and checks them.

    Without ``--dataset``: the data set of the codes. Without ``--codes``: the newest of codes_new/ that fit, those
    trained on the data set first, the bundled graph's last.
    Raises InputError where nothing fits.
    """
    started = time.monotonic()
    choices = _choices(args)
    if not choices:
        raise InputError(
            f"{CODES_FOLDER} holds no codes; make some: "
            f"{command('run_rq.py', '--dataset', args.dataset or ROOT / 'data/FB15k-237')}, "
            "or make demo for the bundled graph (or give --codes FILE.pt, or --no_codes)"
        )
    graphs: dict[Path, KnowledgeGraph] = {}
    reasons = []
    for choice in choices:
        try:
            if choice.dataset not in graphs:
                graphs[choice.dataset] = KnowledgeGraph.load(choice.dataset, _keep_names(args, choice.codes))
            kg = graphs[choice.dataset]
            if choice.codes is None:
                source = Source(kg, unique_names(kg), codes_info={"file": None})
            else:
                codes, num_code, info = fit_codes(choice.codes, kg, choice.dataset)
                if args.shuffle_codes:
                    cycle = np.random.default_rng(args.seed).permutation(len(codes))
                    codes[cycle] = codes[np.roll(cycle, 1)]  # one cycle: no entity keeps its own
                info |= {"code_format": args.code_format, "shuffled": args.shuffle_codes}
                info |= {"shuffle_seed": args.seed} if args.shuffle_codes else {}
                source = Source(kg, unique_names(kg), codes, num_code, args.code_format, info)
        except InputError as error:
            reasons.append(str(error))
            continue
        source.started = started
        for reason in reasons:
            print(f"skipped: {reason}")
        _announce(source, choice)
        return source
    more = f" (and {len(reasons) - 1} other codes that do not fit)" if len(reasons) > 1 else ""
    raise InputError(reasons[0] + more)


def _keep_names(args: argparse.Namespace, codes: Path | None) -> bool:
    """--keep_names, or that the codes were trained with it."""
    return args.keep_names or (codes is not None and bool(read_record(codes)["args"].get("keep_names")))


def _announce(source: Source, choice: _Choice) -> None:
    kg, info = source.kg, source.codes_info
    print(
        f"data set {kg.name} ({choice.dataset}): {kg.num_entities:,} entities, {kg.num_relations} relations; "
        f"{source.names.missing} names missing, {source.names.shared} shared"
    )
    if source.codes is None:
        print("codes: none (--no_codes)")
    else:
        L, Q = source.codes.shape[1:]
        shuffled = ", SHUFFLED (control)" if info["shuffled"] else ""
        print(f"codes: {choice.codes} ({L} x {Q} of {source.num_code}), {info['origin']}{shuffled}")


def _choices(args: argparse.Namespace) -> list[_Choice]:
    """Codes and data sets that may fit, best first."""
    if args.no_codes and args.dataset:
        return [_Choice(None, args.dataset)]
    found = dumped_codes() if args.codes is None else [args.codes]
    records = {codes: read_record(codes) for codes in found}
    if args.dataset:  # codes that were trained on it first
        own = train_sha256(args.dataset)
        order = sorted(found, key=lambda codes: train_hash(records[codes]["inputs"]) != own)
        return [_Choice(codes, args.dataset) for codes in order]
    folders = {codes: training_folder(codes, record) for codes, record in records.items()}
    choices = [_Choice(None if args.no_codes else codes, folder) for codes, folder in folders.items() if folder]
    choices.sort(key=lambda choice: choice.dataset.resolve() == BUNDLED)
    if args.no_codes:
        choices.append(_Choice(None, BUNDLED))
    elif args.codes and not choices:
        raise InputError(f"the data set that {args.codes} was trained on was not found; give --dataset DIR")
    return choices


def dumped_codes() -> list[Path]:
    """Codes files with a record in codes_new/, newest first, else those of the demo; others are skipped."""
    return _codes_in(CODES_FOLDER) or _codes_in(DEMO_FOLDER)


def _codes_in(folder: Path) -> list[Path]:
    found = []
    for record in folder.glob("*.json"):
        codes = record.with_suffix(".pt")
        if codes.is_file():
            try:
                read_record(codes)
                found.append(codes)
            except InputError as error:
                print(f"skipped: {error}")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def read_record(codes: Path) -> dict[str, Any]:
    """The run record beside a codes file; InputError where it is missing or incomplete."""
    path = codes.with_suffix(".json")
    if not codes.is_file():
        what = "is a folder" if codes.is_dir() else "does not exist"
        raise InputError(f"codes file {codes} {what}; stage 1 writes it: {command('run_rq.py', '--dataset', 'DIR')}")
    if not path.is_file():
        raise InputError(f"codes file {codes} has no record {path.name} beside it, so its training data is unknown")
    record = read_json(path, "record")
    with content_of(path, "run record", "run run_rq.py again"):
        args = record["args"]
        sizes = [args["seq_len"], args["num_code"], args.get("num_quantizers") or 1]
        texts = [
            train_hash(record["inputs"]),
            record["outputs"][codes.name],
            record["dataset"],
            args.get("dataset") or "",
        ]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError("seq_len, num_code or num_quantizers")
        if not all(type(text) is str and "\0" not in text for text in texts):
            raise ValueError("inputs, outputs or dataset")
    return record


def training_folder(codes: Path, record: Mapping[str, Any], near: Path | None = None) -> Path | None:
    """The folder whose training file has the hash in the record: as recorded, in data/, or beside ``near``."""
    name = record["dataset"]
    recorded = Path(record["args"].get("dataset") or f"data/{name}")  # without the flag, stage 1 takes data/FB15k-237
    places = [recorded, ROOT / recorded, ROOT / "data" / name, codes.resolve().parent.parent / "data" / name]
    if near is not None:
        places += [near, near.resolve().parent / name]
    return next((place for place in places if train_sha256(place) == train_hash(record["inputs"])), None)


def check_recorded(file: Path, record: Mapping[str, Any]) -> None:
    """InputError unless ``file``, which stage 1 wrote, is there with the sha256 in its record."""
    expected = record["outputs"].get(file.name)
    if not file.is_file() or expected is None:
        problem = "not in its record" if file.is_file() else "missing"
        raise InputError(f"{file} is {problem}; run run_rq.py again")
    if sha256_file(file) != expected:
        raise InputError(f"{file} is not the file of its record (sha256 differs); run run_rq.py again")


def fit_codes(path: Path, kg: KnowledgeGraph, folder: Path) -> tuple[Ints, int, dict[str, Any]]:
    """(codes [M, L, Q] in the order of ``kg``'s ids, K, facts for the statistics), checked with record and graph.

    Codes of another data set are matched by entity name. Raises InputError: the file is not the recorded one; shape,
    dtype or range differ from the record; the graph has entities without codes; the codes were trained on a split that
    holds test triples of ``kg``, or on one that was not found.
    """
    record = read_record(path)
    names_path = path.with_suffix(".entities.txt")
    for file in (path, names_path):
        check_recorded(file, record)
    names = load_entities(names_path)
    num_code = int(record["args"]["num_code"])
    codes = load_codes(path, num_code=num_code).numpy()
    wanted = (len(names), int(record["args"]["seq_len"]), int(record["args"].get("num_quantizers") or codes.shape[2]))
    if codes.shape != wanted:
        raise InputError(f"codes file {path} is {list(codes.shape)}, its names and record say {list(wanted)}")
    own = train_hash(record["inputs"]) == train_hash(kg.input_hashes)
    info: dict[str, Any] = {
        "file": path.name, "sha256": record["outputs"][path.name], "record": str(path.with_suffix(".json")),
        "dataset": record["dataset"], "seq_len": wanted[1], "num_code": num_code, "num_quantizers": wanted[2],
        "origin": f"learned on {kg.name}'s own training split",
    }  # fmt: skip
    if "extends" in record:
        info["extends"] = str(record["extends"])
    if names != kg.entities:
        row = {name: i for i, name in enumerate(names)}
        absent = [name for name in kg.entities if name not in row]
        if absent:
            raise InputError(
                f"codes file {path} ({record['dataset']}, {len(names)} entities) has no row for {len(absent)} of "
                f"the {kg.num_entities} entities of {kg.name}, such as {absent[0]!r}; "
                f"run: {command('run_rq.py', '--dataset', folder)}"
            )
        codes = codes[[row[name] for name in kg.entities]]
    if not own:
        info |= _check_origin(path, record, kg, folder, len(names))
    return codes, num_code, info


def _check_origin(path: Path, record: Mapping[str, Any], kg: KnowledgeGraph, folder: Path, rows: int) -> dict[str, Any]:
    """Facts about codes trained on other triples than ``kg``'s; InputError where these hold test triples of ``kg``."""
    origin = training_folder(path, record, folder)
    if origin is None:
        raise InputError(
            f"codes file {path} was trained on {record['dataset']} ({record['args'].get('dataset')}), which was "
            f"not found with the recorded hash, so it may hold test triples of {kg.name}; put it in data/"
        )
    seen = shared_triples(KnowledgeGraph.load(origin, keep_names=True), kg)
    if seen["test_triples"]:
        raise InputError(
            f"codes file {path} was trained on the training split of {origin}, which holds {seen['test_triples']} of "
            f"the {len(kg.test)} test triples of {kg.name}; run: {command('run_rq.py', '--dataset', folder)}"
        )
    return {
        "origin": f"learned on {record['dataset']} ({rows:,} rows), mapped to {kg.name} ({kg.num_entities:,}) by name",
        "in_their_training_split": seen,
    }


def triple_keys(triples: Ints, kg: KnowledgeGraph) -> Ints:
    """One integer per triple [n, 3] -> [n]."""
    return (triples[:, 0] * kg.num_relations + triples[:, 1]) * kg.num_entities + triples[:, 2]


def shared_triples(other: KnowledgeGraph, kg: KnowledgeGraph) -> dict[str, int]:
    """How many of ``kg``'s valid and test triples are, by name, in the training split of ``other``."""
    entity = {name: i for i, name in enumerate(kg.entities)}
    relation = {name: i for i, name in enumerate(kg.relations)}
    e = np.array([entity.get(name, -1) for name in other.entities], dtype=np.int64)
    r = np.array([relation.get(name, -1) for name in other.relations], dtype=np.int64)
    found = np.stack([e[other.train[:, 0]], r[other.train[:, 1]], e[other.train[:, 2]]], axis=1)
    triples = triple_keys(found[(found >= 0).all(axis=1)], kg)
    return {
        f"{split}_triples": int(np.isin(triple_keys(kg.split(split), kg), triples).sum()) for split in ("valid", "test")
    }


def codes_key(info: Mapping[str, Any]) -> tuple[str | None, bool, int]:
    """What identifies the ``codes`` of statistics or records: the file's sha256 (of codes with entities that came
    later, that of the file they extend: a code means the same in both), and how it was shuffled."""
    shuffled = bool(info.get("shuffled"))
    return info.get("extends") or info.get("sha256"), shuffled, info.get("shuffle_seed", 0) if shuffled else 0

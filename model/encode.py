"""run_rq.py --encode: codes for entities that arrive after training, and a graph folder with them.

    python run_rq.py --dataset D --eval_codes CODES.pt --checkpoint CK.pt --encode NEW.txt --encoded OUT.pt \\
        [--text_emb TEXT.npy --new_text NEW.npy] [--encode_by auto|encoder|fold_in]

NEW.txt holds ``h TAB r TAB t`` lines; names that D does not have are the new entities (sorted, behind those of D). With
texts, those named in NEW.entities.txt need no triple.
Beside OUT.pt are written OUT.entities.txt, OUT_emd.pt, the record OUT.json and the folder OUT/, which is D with the
lines of NEW.txt added to train.txt. How codes are chosen: model/fold_in.py, model/graph_encode.py.
docs/NEW_ENTITIES.md shows an example.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from Class.codes import CodeFiles, code_files, load_entities, save_codes
from common.config import Config
from common.errors import InputError
from common.files import (
    ROOT,
    command,
    exclusive_lock,
    load_torch,
    read_json,
    read_text,
    save_torch,
    sha256_file,
    write_json,
)
from common.record import make_record
from data.hold_out import Triple, by_name, write_graph, write_texts
from data.knowledge_graph import SPLITS, Ints, KnowledgeGraph
from data.names import row_names
from model.checkpoint import load_checkpoint
from model.collisions import TooFewCodes, resolve_collisions
from model.dump import EMBEDDINGS_LIMIT_BYTES
from model.fold_in import FoldIn, Support
from model.from_codes import Scored, load_scored_codes
from model.graph_encode import GraphEncoder
from model.inputs import choose_device, load_graph, load_text
from model.quantizers import Quantizer
from model.RQGCN import RQGCN

SAVE_SECONDS = 60  # between saves of what is done
BATCH_EDGES = 4096
BATCH_TEXTS = 1024  # entities without edges


class NewEntities(NamedTuple):
    """What --encode and --new_text hold: M known entities, N new ones with ids M..M+N-1."""

    names: list[str]  # N, sorted
    triples: Ints  # [n, 3] in the order of the file, without repeats
    by_name: list[Triple]
    text: Tensor | None  # [N, T]; a row of NaN: no text

    def without_text(self) -> Ints:
        """The new entities 0..N-1 that have no text."""
        if self.text is None:
            return np.arange(len(self.names))
        return np.flatnonzero(self.text.isnan().any(1).numpy())


def read_new(path: Path | None, kg: KnowledgeGraph, text: Path | None = None, width: int = 0) -> NewEntities:
    """Read and check NEW.txt and NEW.npy, of which one may be None. InputError with ``file:line`` for an unknown
    relation, a triple without a new entity (its names exist already), another number of columns or a repeated line."""
    first = {} if path is None else read_triples(path, kg)
    known = {name: i for i, name in enumerate(kg.entities)}
    names = sorted({name for h, _, t in first for name in (h, t)} - known.keys())
    rows = None
    if text is not None:
        names, rows = read_new_text(text, known.keys(), names, width)
    row = known | {name: len(known) + i for i, name in enumerate(names)}
    relation = {name: i for i, name in enumerate(kg.relations)}
    triples = np.array([(row[h], relation[r], row[t]) for h, r, t in first], dtype=np.int64).reshape(-1, 3)
    return NewEntities(names, triples, list(first), rows)


def read_triples(path: Path, kg: KnowledgeGraph) -> dict[Triple, int]:
    """The triples of NEW.txt, by name, with their line numbers."""
    lines = read_text(path, "--encode file").removesuffix("\n").split("\n")
    relations, known = set(kg.relations), set(kg.entities)
    first: dict[Triple, int] = {}
    for number, line in enumerate(lines, 1):
        fields = line.removesuffix("\r").split("\t")
        if len(fields) != 3 or not all(fields):
            raise InputError(f"{path}:{number}: found {line[:80]!r}, expected head TAB relation TAB tail")
        h, r, t = fields
        if r not in relations:
            raise InputError(f"{path}:{number}: found the relation {r[:80]!r}, expected one of --dataset {kg.name}")
        if h in known and t in known:
            raise InputError(
                f"{path}:{number}: found {h[:60]!r} and {t[:60]!r}, which {kg.name} has already; expected a new entity"
            )
        if (h, r, t) in first:
            raise InputError(f"{path}:{number}: repeats line {first[h, r, t]}; remove it")
        first[h, r, t] = number
    return first


def read_new_text(path: Path, known: Set[str], with_triples: list[str], width: int) -> tuple[list[str], Tensor]:
    """Names of all new entities, sorted, and their texts [N, T], T = ``width``; a row of NaN for those without.

    NEW.entities.txt beside NEW.npy names the rows, else they are the new entities ``with_triples`` (sorted). Rows of
    ``known`` entities are not used.
    """
    named = row_names(path).is_file()
    of_file = [name for name in load_entities(row_names(path)) if name not in known] if named else with_triples
    if not of_file:
        raise InputError(
            f"--new_text {path} has no row of a new entity: "
            + ("its names exist already" if named else f"--encode has none, and no {row_names(path).name} names rows")
        )
    text = load_text(path, len(of_file), of_file, "--new_text")
    assert text is not None
    if text.shape[1] != width:
        raise InputError(f"--new_text {path} has width {text.shape[1]}, --text_emb {width}; use one model for both")
    names = sorted({*of_file, *with_triples})
    row = {name: i for i, name in enumerate(names)}
    found = torch.full((len(names), width), torch.nan)
    found[[row[name] for name in of_file]] = text
    return names, found


def edges_of_new(new: NewEntities, kg: KnowledgeGraph) -> Ints:
    """[n, 3]: (new entity 0..N-1, relation 0..2R-1, id of the other end), sorted; both ends of a triple of two new
    entities have one, and a triple of an entity with itself has none."""
    h, r, t = new.triples.T
    M, R = kg.num_entities, kg.num_relations
    outgoing, incoming = (h >= M) & (h != t), (t >= M) & (h != t)
    edges = np.concatenate([
        np.stack([h - M, r, t], axis=1)[outgoing], np.stack([t - M, r + R, h], axis=1)[incoming],
    ])  # fmt: skip
    return edges[np.lexsort(edges.T[::-1])]


def rounds_of(edges: Ints, new: NewEntities, M: int) -> list[Ints]:
    """The edges to encode from, round by round: entities with known neighbours come first and are encoded from these
    alone; their new neighbours without any follow. Those that no path links to a known one have no edges in any round
    and are encoded from their text; InputError for one without."""
    N = len(new.names)
    done, rounds = np.zeros(M + N, dtype=bool), []
    done[:M] = True
    while not done.all():
        usable = edges[done[edges[:, 2]] & ~done[M + edges[:, 0]]]
        if not len(usable):
            break
        rounds.append(usable)
        done[M + usable[:, 0]] = True
    left = np.intersect1d(np.flatnonzero(~done[M:]), new.without_text())
    if len(left):
        raise InputError(
            f"--encode: no triple links {new.names[left[0]]!r} to a known entity, and it has no text ({len(left)} such "
            "entities); add a triple, or a text (--new_text), or leave the entity out"
        )
    return rounds


class Method(Protocol):
    """A way to encode: FoldIn, GraphEncoder."""

    def encode(self, support: Support) -> Tensor:
        """Codes int64 [N, L, Q]."""


class Encoder:
    """Codes [N, L, Q] of new entities, batch by batch; what is done is kept in ``partial`` and taken from there.

    ``first``: how entities with known neighbours are encoded; others by ``fold_in``. ``text``: [N, T] or None.
    """

    def __init__(
        self, first: Method, fold_in: FoldIn, text: Tensor | None, total: int, partial: Path, key: str
    ) -> None:
        self.first, self.fold_in, self.text, self.partial, self.key = first, fold_in, text, partial, key
        shape = (total, *fold_in.codes.shape[1:])
        self.codes, self.done = torch.zeros(shape, dtype=torch.int64), torch.zeros(total, dtype=torch.bool)
        self.seconds = 0.0
        if partial.is_file():
            stored = load_torch(partial, "partial codes")
            if isinstance(stored, dict) and stored.get("key") == key:
                self.codes, self.done, self.seconds = stored["codes"], stored["done"], stored["seconds"]
                print(f"continuing {partial}: {int(self.done.sum())} of {total} entities are encoded")

    def run(self, rounds: Sequence[Ints]) -> None:
        """Encode what is not done yet; saved once a minute."""
        self.saved = self.began = time.monotonic()
        with_edges = np.unique(np.concatenate([edges[:, 0] for edges in rounds] or [np.zeros(0, dtype=np.int64)]))
        by_text = np.setdiff1d(np.arange(len(self.done)), with_edges)
        nothing = np.zeros((0, 3), dtype=np.int64)
        with tqdm(
            total=len(self.done), desc="encode", unit="entity", initial=int(self.done.sum()), disable=None
        ) as self.bar:
            for number, edges in enumerate(rounds):
                for batch in batches_of(edges[~self.done.numpy()[edges[:, 0]]]):
                    self.batch(self.fold_in if number else self.first, np.unique(batch[:, 0]), batch)
                self.fold_in.add(self.codes)  # neighbours of the next round; rows that are not done are not used
            left = by_text[~self.done.numpy()[by_text]]
            for start in range(0, len(left), BATCH_TEXTS):
                self.batch(self.fold_in, left[start : start + BATCH_TEXTS], nothing)
        self.seconds += time.monotonic() - self.began

    def batch(self, method: Method, entities: Ints, edges: Ints) -> None:
        """Encode ``entities`` (ascending) from ``edges`` [n, 3]."""
        text = None if self.text is None else self.text[entities]
        self.codes[entities] = method.encode(support_of(edges, entities, text))
        self.done[entities] = True
        self.bar.update(len(entities))
        if time.monotonic() - self.saved > SAVE_SECONDS:
            seconds = self.seconds + time.monotonic() - self.began
            save_torch({"key": self.key, "codes": self.codes, "done": self.done, "seconds": seconds}, self.partial)
            self.saved = time.monotonic()


def support_of(edges: Ints, entities: Ints, text: Tensor | None = None) -> Support:
    """What is known of ``entities`` (ascending): their edges [n, 3] and texts [N, T]."""
    row = np.searchsorted(entities, edges[:, 0])
    entity, relation, known = (torch.from_numpy(column.copy()) for column in (row, edges[:, 1], edges[:, 2]))
    return Support(entity, relation, known, len(entities), text)


def batches_of(edges: Ints) -> list[Ints]:
    """Runs of whole entities with about BATCH_EDGES edges each."""
    if not len(edges):
        return []
    starts = np.flatnonzero(np.diff(edges[:, 0], prepend=-1))
    cuts, begin = [], 0
    for start in starts[1:].tolist():
        if start - begin >= BATCH_EDGES:
            cuts.append(start)
            begin = start
    return np.split(edges, cuts)


def distinct(codebook: Quantizer, known: Tensor, codes: Tensor) -> tuple[Tensor, int]:
    """Distinct codes [N, L, Q] of new entities, and how many were changed; the ``known`` [M, L, Q] keep theirs.

    A change is to the last-level codes nearest to the entity's own. Raises InputError where there are too few codes.
    """
    before = known.flatten(1).unique(dim=0).view(-1, *known.shape[1:])  # entities that share a code are left so
    both = torch.cat([before, codes])
    try:
        found = resolve_collisions(codebook.decode_from_codes(both), codebook, both)
    except TooFewCodes as error:
        raise InputError(f"--encode: the new entities cannot have distinct codes: {error}") from error
    return found.codes[len(before) :], len(found.changed)


class Outputs(NamedTuple):
    """What --encoded names."""

    files: CodeFiles
    graph: Path  # the folder


def checked_outputs(config: Config) -> Outputs:
    """The files of --encoded. InputError where they exist, without --overwrite, or are files of another kind."""
    assert config.encoded is not None
    if config.encoded.suffix != ".pt":
        raise InputError(f"--encoded {config.encoded} is no file of codes, expected OUT.pt")
    out = Outputs(code_files(config.encoded.parent, config.encoded.stem), config.encoded.with_suffix(""))
    there = next((path for path in (*out.files, out.graph) if path.exists()), None)
    if there is not None and (not config.overwrite or config.encoded == config.eval_codes):
        raise InputError(f"--encoded: {there} exists; give another name or --overwrite")
    return out


def checked_base(config: Config, kg: KnowledgeGraph) -> Scored:
    """What --eval_codes and --checkpoint hold. InputError unless the rows are the entities of ``kg``, in order."""
    assert config.eval_codes is not None and config.checkpoint is not None
    names = config.eval_codes.with_suffix(".entities.txt")
    if load_entities(names) != kg.entities:
        raise InputError(
            f"{names} does not list the entities of --dataset {kg.name} in their order; give that data set"
        )
    return load_scored_codes(config.checkpoint, config.eval_codes, kg, torch.device("cpu"))


def load_graph_encoder(
    path: Path, stored: Mapping[str, Any], base: Scored, kg: KnowledgeGraph, text: Tensor | None, new: NewEntities
) -> GraphEncoder:
    """The graph encoder of the checkpoint ``stored`` in ``path``. InputError where it has none for these entities."""
    args = stored["model"]
    if not args["gcn_layers"]:
        raise InputError(
            f"--encode_by encoder: {path} has no graph layers; train with --gcn_layers 1 --mask_inputs 0.1, or give "
            "--encode_by fold_in"
        )
    if not stored["config"].get("mask_inputs"):
        print(f"warning: {path} was trained without --mask_inputs: its encoder never saw an unknown entity")
    try:
        model = RQGCN(kg.num_entities, kg.num_relations, **args)
        model.load_state_dict(stored["best"]["model"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            f"--encode_by encoder: {path} does not hold the encoder of the {kg.num_entities} entities of --dataset "
            f"{kg.name}, with which it was trained; give that data set, or --encode_by fold_in"
        ) from error
    if set(args["inputs"].replace(",", "+").split("+")) != {"learned"} and (text is None or len(new.without_text())):
        raise InputError(f"--encode_by encoder: the inputs of {path} are texts; give --text_emb and --new_text of all")
    return GraphEncoder(model, base.codes, kg, text)


def encode(config: Config) -> None:
    """Encode the entities of --encode and --new_text and write the files of --encoded."""
    assert config.eval_codes is not None and config.checkpoint is not None
    began = time.monotonic()
    out = checked_outputs(config)
    choose_device(config)  # encoding is float64 on the CPU; this sets the number of threads
    kg = load_graph(config)
    text = load_text(config.text_emb, kg.num_entities, kg.entities)
    new = read_new(config.encode, kg, config.new_text, 0 if text is None else text.shape[1])
    rounds = rounds_of(edges_of_new(new, kg), new, kg.num_entities)
    base = checked_base(config, kg)
    given = [name for name in ("encode", "new_text", "text_emb", "eval_codes", "checkpoint") if getattr(config, name)]
    hashes = {f"--{name}": sha256_file(getattr(config, name)) for name in given}
    with exclusive_lock(out.files.codes.with_suffix(".lock"), "--encoded"):
        stored = load_checkpoint(config.checkpoint)
        settings = stored["config"]
        fold_in = FoldIn(*base, kg, text)
        method = "encoder" if config.encode_by == "encoder" else "fold_in"  # auto: fold-in ranks better
        first: Method = fold_in
        if method == "encoder":
            first = load_graph_encoder(config.checkpoint, stored, base, kg, text, new)
        partial = out.files.codes.with_suffix(".part")
        encoder = Encoder(first, fold_in, new.text, len(new.names), partial, " ".join([method, *hashes.values()]))
        encoder.run(rounds)
        codes, changed = distinct(base.scorer.rq_codebook, base.codes, encoder.codes)
        outputs = write_encoded(config, kg, new, base, torch.cat([base.codes, codes]), out)
        about = {
            "method": method, "known_entities": kg.num_entities, "new_entities": len(new.names),
            "with_text": len(new.names) - len(new.without_text()), "triples": len(new.by_name),
            "edges_used": sum(map(len, rounds)), "rounds": len(rounds), "codes_changed_to_be_distinct": changed,
            "seconds_per_entity": encoder.seconds / len(new.names), "inputs": hashes,
        }  # fmt: skip
        write_record(config, settings, about, outputs, out, time.monotonic() - began)
        encoder.partial.unlink(missing_ok=True)
    eval_command = command("run_rq.py", "--dataset", out.graph, "--eval_codes", out.files.codes, "--checkpoint",
                           config.checkpoint)  # fmt: skip
    print(
        f"{len(new.names)} new entities from {about['edges_used']} edges, {about['seconds_per_entity']:.3f} s each; "
        f"wrote {out.files.codes} and {out.graph}\n"
        f"next: {eval_command} --predict {shlex.quote(new.names[0])} RELATION"
    )


def write_encoded(
    config: Config, kg: KnowledgeGraph, new: NewEntities, base: Scored, codes: Tensor, out: Outputs
) -> dict[str, str]:
    """The graph folder, then codes, names and embeddings of all entities; returns file name -> sha256 of these."""
    splits = {split: by_name(kg.split(split), kg) for split in SPLITS}
    splits |= {f"{split}_neg": by_name(triples, kg) for split, triples in kg.negative_splits.items()}
    splits["train"] += new.by_name
    entities = [*kg.entities, *new.names]
    write_graph(out.graph, config.dataset or ROOT / "data" / "FB15k-237", entities, kg.relations, splits)
    write_texts(out.graph, kg)
    assert config.eval_codes is not None
    embeddings: Tensor | None = None
    if codes.shape[0] * codes.shape[1] * base.scorer.rq_codebook.latent_dim * 4 <= EMBEDDINGS_LIMIT_BYTES:
        embeddings = base.scorer.rq_codebook.decode_from_codes(codes)
    shape = load_torch(config.eval_codes, "codes").shape[1:]  # of VQ: [M, L]
    return save_codes(out.files, codes.view(-1, *shape), entities, embeddings)


def write_record(
    config: Config,
    settings: Mapping[str, Any],
    about: dict[str, Any],
    outputs: dict[str, str],
    out: Outputs,
    seconds: float,
) -> None:
    """OUT.json: a record as stage 1 writes it, with the settings that the codes were learned with."""
    assert config.eval_codes is not None
    graph = KnowledgeGraph.load(out.graph, keep_names=True)
    before = config.eval_codes.with_suffix(".json")
    record = read_json(before, "record") if before.is_file() else {}
    args = {**settings, "dataset": str(out.graph), "encode": str(config.encode), "encoded": str(config.encoded)}
    write_json(make_record(
        args, graph.input_hashes, seconds, name=out.files.codes.stem, dataset=graph.name, outputs=outputs,
        extends=record.get("extends") or about["inputs"]["--eval_codes"], encoded=about,
        parameters=record.get("parameters"), bits_per_entity=record.get("bits_per_entity"),
    ), out.files.record)  # fmt: skip

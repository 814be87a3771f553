"""What run_rq.py reads: device, graph, texts, checkpoints, codes, each checked before anything rests on it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

from Class.codes import load_codes, load_entities
from common.device import find_device
from common.errors import InputError, content_of
from common.files import ROOT, load_torch, read_json
from data.knowledge_graph import TRAIN_FILES, train_hash

if TYPE_CHECKING:
    import torch

    from data.knowledge_graph import KnowledgeGraph
    from model.RQGCN import CodeScorer


def choose_device(args: argparse.Namespace) -> torch.device:
    """--device, else --gpu, else CUDA where there is one. Raises InputError when it is not there."""
    import torch

    word, flag = args.device, "--device"
    if word is None and args.gpu is not None:
        word, flag = "cpu" if args.gpu < 0 else f"cuda:{args.gpu}", "--gpu"
    device = find_device(word, flag)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"{flag} {word} is not supported, expected cpu, cuda or cuda:N")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that torchrun started on this machine
    if device.type == "cuda" and here > 1:
        if device.index is not None:
            raise InputError(f"{flag} {word} names one GPU for {here} processes; give --device cuda, which is one each")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise InputError(
                f"torchrun started {here} processes for {torch.cuda.device_count()} GPUs; give --device cpu, "
                "or --nproc_per_node as many as there are GPUs"
            )
    if args.num_workers:
        torch.set_num_threads(args.num_workers)
    return device


def load_graph(args: argparse.Namespace) -> KnowledgeGraph:
    """Read --dataset and say what was found."""
    from data.knowledge_graph import KnowledgeGraph

    kg = KnowledgeGraph.load(args.dataset or ROOT / "data" / "FB15k-237")
    print(
        f"{kg.name}: {kg.num_entities} entities ({int(kg.unseen.sum())} unseen in training), {kg.num_relations} "
        f"relations, {len(kg.train)} / {len(kg.valid)} / {len(kg.test)} triples in train / valid / test"
    )
    for key in ("repeated_triples", "shared_triples"):
        found = {where: count for where, count in kg.report[key].items() if count}
        if found:
            print(f"warning: {kg.name} has {key.replace('_', ' ')}: {found}", file=sys.stderr)
    return kg


def load_text(path: Path | None, num_entities: int) -> torch.Tensor | None:
    """Text embeddings [M, T] as float32; InputError for another row count, shape, or a value that is not finite."""
    import numpy as np
    import torch

    if path is None:
        return None
    if not path.exists():
        raise InputError(
            f"--text_emb {path} does not exist; write it: python data/embed_text.py --dataset DATASET --out {path} "
            "(for the recipes in configs/ with --model sentence-transformers/all-MiniLM-L6-v2)"
        )
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"--text_emb {path} cannot be read as a .npy array: {reason}") from error
    fits = isinstance(array, np.ndarray) and array.ndim == 2 and len(array) == num_entities and array.size
    if not fits or array.dtype.kind != "f":
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise InputError(f"--text_emb {path} holds {found}, expected floats [{num_entities}, T], row = entity id")
    text = torch.from_numpy(array.astype(np.float32))
    if not bool(torch.isfinite(text).all()):
        raise InputError(f"--text_emb {path} holds values that are not finite; write it again")
    return text


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this command; InputError when the file is something else."""
    from model.stored import fault_of

    stored = load_torch(path, "checkpoint")
    fault = fault_of(stored)
    if fault is not None:
        raise InputError(f"checkpoint file {path} is none of run_rq.py's, or damaged: {fault}")
    return stored


def check_trained_on(what: str, digest: Any, hashes: Mapping[str, Any], kg: KnowledgeGraph) -> None:
    """InputError where ``what`` learned from other training triples than ``kg``'s: facts of it may be test facts here.

    ``digest``: of the triples (``KnowledgeGraph.train_digest``); None: ``what`` is older than it, and ``hashes`` of its
    files, which may differ in form alone, give no more than a warning.
    """
    file = next((name for name in TRAIN_FILES if name in kg.input_hashes), TRAIN_FILES[0])
    other = f"{what} was trained on other triples than {kg.name} has ({file}, with entities.dict and relations.dict)"
    if digest is not None:
        if digest != kg.train_digest():
            raise InputError(f"{other}: what it knows may be test facts here; give the data set of its run")
        return
    found, own = train_hash(hashes), train_hash(kg.input_hashes)
    if None not in (found, own) and found != own:
        print(f"warning: {other}, or on another form of them (sha256 {str(found)[:12]})", file=sys.stderr)


def learned_from(stored: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(digest of the training triples, hashes of the files) of a checkpoint's run."""
    prefix = "file "
    files = {key.removeprefix(prefix): value for key, value in stored["comparable"].items() if key.startswith(prefix)}
    return stored.get("trained_on"), files


def load_given_codes(args: argparse.Namespace, kg: KnowledgeGraph) -> torch.Tensor:
    """The integers [M, L, Q] of --codes_from. Raises InputError where they are not of this graph or of these flags."""
    codes = load_codes(args.codes_from, kg.num_entities, args.num_code)
    if list(codes.shape[1:]) != [args.seq_len, args.num_quantizers]:
        raise InputError(
            f"--codes_from {args.codes_from} has [L, Q] = {list(codes.shape[1:])}, the flags say "
            f"{[args.seq_len, args.num_quantizers]}: give --seq_len {codes.shape[1]} --num_quantizers {codes.shape[2]}"
        )
    check_entities(args.codes_from, kg)
    record = args.codes_from.with_suffix(".json")
    if record.is_file():
        with content_of(record, "run record", "remove it, or give other codes"):
            said = read_json(record, "record")
            check_trained_on(f"--codes_from {args.codes_from}", said.get("trained_on"), said["inputs"], kg)
    return codes


def check_entities(codes: Path, kg: KnowledgeGraph) -> None:
    """InputError where the names beside the codes are not the graph's entities."""
    names = codes.with_suffix(".entities.txt")
    if names.exists() and load_entities(names) != kg.entities:
        raise InputError(
            f"{names} lists other entities than --dataset {kg.name}; take the data set of the codes' record"
        )


class LoadedScorer(NamedTuple):
    """What a checkpoint has to rank with."""

    scorer: CodeScorer
    relations: torch.Tensor
    seq_len: int
    codes_sha256: str | None  # of the codes that it was scored with
    learned_from: tuple[Any, dict[str, Any]]  # for ``check_trained_on``


def load_scorer(path: Path, kg: KnowledgeGraph, device: torch.device) -> LoadedScorer:
    """The scorer of a --checkpoint; InputError where it has none, or another graph's."""
    from model.RQGCN import scorer_of

    stored = load_checkpoint(path)
    if stored["best"] is None:
        raise InputError(f"checkpoint {path} has no epoch with codes yet; train on with --restore")
    try:
        scorer, relations = scorer_of(stored["config"], stored["best"], device)
        seq_len = int(stored["config"]["seq_len"])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"checkpoint {path} holds no complete scorer: {reason}") from error
    if relations.shape[1:] != (scorer.W_q.out_features,) or not bool(relations.isfinite().all()):
        raise InputError(f"--checkpoint {path} holds damaged relation vectors {list(relations.shape)}")
    if len(relations) != 2 * kg.num_relations:
        raise InputError(f"--checkpoint {path} knows {len(relations) // 2} relations, {kg.name} has {kg.num_relations}")
    return LoadedScorer(scorer, relations, seq_len, stored["best"].get("codes_sha256"), learned_from(stored))

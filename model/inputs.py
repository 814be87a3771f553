"""What run_rq.py reads: device, graph, text embeddings, checkpoint and codes to rank from, each checked on reading."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import BadZipFile

from Class.codes import load_entities
from common.config import Config
from common.device import find_device
from common.errors import InputError
from common.files import ROOT, need_file
from data.knowledge_graph import TRAIN_FILES
from data.names import ROW_ORDER, row_names, rows_by_name

if TYPE_CHECKING:
    import torch

    from data.knowledge_graph import KnowledgeGraph
    from model.RQGCN import CodeScorer


def choose_device(config: Config) -> torch.device:
    """--device, else --gpu, else CUDA where there is one. Raises InputError when it is not there."""
    import torch

    word, flag = config.device, "--device"
    if word is None and config.gpu is not None:
        word, flag = "cpu" if config.gpu < 0 else f"cuda:{config.gpu}", "--gpu"
    device = find_device(word, flag)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"{flag} {word} is not supported, expected cpu, cuda or cuda:N")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that torchrun started on this machine
    if device.type == "cuda" and here > 1:
        if device.index is not None:
            raise InputError(
                f"{flag} {word} names one GPU for {here} processes; give --device cuda: each process takes its own"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise InputError(
                f"torchrun started {here} processes for {torch.cuda.device_count()} GPUs; give --device cpu, "
                "or --nproc_per_node as many as there are GPUs"
            )
    if config.num_workers:
        torch.set_num_threads(config.num_workers)
    return device


def load_graph(config: Config, test: bool = True) -> KnowledgeGraph:
    """Read --dataset (``test``: with its test split) and print its sizes. InputError for a graph of one entity."""
    from data.knowledge_graph import KnowledgeGraph

    kg = KnowledgeGraph.load(config.dataset or ROOT / "data" / "FB15k-237", config.keep_names, test=test)
    if kg.num_entities < 2:
        raise InputError(f"--dataset {config.dataset} has 1 entity: ranking needs 2 or more")
    in_test = len(kg.test) if test else "unread"
    print(
        f"{kg.name}: {kg.num_entities} entities ({int(kg.unseen.sum())} unseen in training), {kg.num_relations} "
        f"relations, {len(kg.train)} / {len(kg.valid)} / {in_test} triples in train / valid / test"
    )
    for key in ("repeated_triples", "shared_triples"):
        found = {where: count for where, count in kg.report[key].items() if count}
        if found:
            print(f"warning: {kg.name} has {key.replace('_', ' ')}: {found}", file=sys.stderr)
    return kg


def check_files(config: Config) -> None:
    """InputError where a file of the settings does not exist: said before a graph is read, which may take minutes."""
    for path, what in ((config.eval_codes, "codes"), (config.checkpoint, "checkpoint"), (config.encode, "--encode")):
        if path is not None:
            need_file(path, what)
    for path, flag in ((config.text_emb, "--text_emb"), (config.new_text, "--new_text")):
        if path is not None:
            need_text(path, flag)


def need_text(path: Path, flag: str) -> None:
    """InputError where the file of text embeddings of ``flag`` does not exist."""
    if not path.exists():
        raise InputError(
            f"{flag} {path} does not exist; write it: python data/embed_text.py --dataset DATASET --out {path} "
            "(for the recipes in configs/ with --model sentence-transformers/all-MiniLM-L6-v2)"
        )


def load_text(
    path: Path | None, num_entities: int, entities: Sequence[str] | None = None, flag: str = "--text_emb"
) -> torch.Tensor | None:
    """Text embeddings [M, T] as float32; InputError for another row count, shape, or a value that is not finite.

    Rows are those of ``entities`` where NAME.entities.txt beside the file names its rows, else in the file's order.
    ``flag``: the one that names the file.
    """
    import numpy as np
    import torch

    if path is None:
        return None
    need_text(path, flag)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{flag} {path} cannot be read as a .npy array: {reason}") from error
    named = entities is not None and row_names(path).is_file()  # it may have rows for other entities too
    fits = isinstance(array, np.ndarray) and array.ndim == 2 and array.size and (named or len(array) == num_entities)
    if not fits or array.dtype.kind != "f":
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise InputError(f"{flag} {path} holds {found}, expected floats [{num_entities}, T], row = entity id")
    order = None if entities is None else rows_by_name(path, len(array), entities, flag)
    if order is not None:
        print(f"{flag} {path}: rows in the order of the names in {row_names(path).name}")
    elif entities:
        names, rule = ", ".join(entities[:2]), ROW_ORDER if flag == "--text_emb" else "new entities, sorted"
        print(f"{flag} {path}: no {row_names(path).name} beside it, so its rows are taken as {names}, ... ({rule})")
    text = torch.from_numpy((array if order is None else array[order]).astype(np.float32))
    if not bool(torch.isfinite(text).all()):
        raise InputError(f"{flag} {path} holds values that are not finite; write it again")
    return text


def order_of_entities(codes: Path, kg: KnowledgeGraph) -> list[int] | None:
    """The row of each entity of ``kg`` by the names beside the codes; None without names, or where these are the same.

    InputError where an entity of ``kg`` has no row.
    """
    file = codes.with_suffix(".entities.txt")
    names = load_entities(file) if file.exists() else kg.entities
    if names == kg.entities:
        return None
    row = {name: i for i, name in enumerate(names)}
    absent = [name for name in kg.entities if name not in row]
    if absent:
        raise InputError(
            f"{file} lists other entities than --dataset {kg.name} ({len(absent)} are missing, such as {absent[0]!r}); "
            "take the data set of the codes' record"
        )
    return [row[name] for name in kg.entities]


class LoadedScorer(NamedTuple):
    """What a checkpoint has to rank with."""

    scorer: CodeScorer
    relations: torch.Tensor  # [2R, D]
    seq_len: int
    num_entities: int  # M of its graph; a graph with more entities has those of it first
    codes_sha256: str | None  # of the codes that it was scored with


def load_scorer(path: Path, kg: KnowledgeGraph, device: torch.device) -> LoadedScorer:
    """The scorer of a --checkpoint; InputError where it has none, or was trained on another graph."""
    from model.checkpoint import load_checkpoint
    from model.RQGCN import scorer_of

    stored = load_checkpoint(path)
    if stored["best"] is None:
        raise InputError(f"checkpoint {path} has no epoch with codes yet; train on with --restore")
    try:
        scorer, relations = scorer_of(stored["model"], stored["best"], device)
        seq_len = int(stored["model"]["seq_len"])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"checkpoint {path} holds no complete scorer: {reason}") from error
    if relations.shape[1:] != (scorer.dim,) or not bool(relations.isfinite().all()):
        raise InputError(f"--checkpoint {path} holds damaged relation vectors {list(relations.shape)}")
    if len(relations) != 2 * kg.num_relations:
        raise InputError(f"--checkpoint {path} has {len(relations) // 2} relations, {kg.name} has {kg.num_relations}")
    codes = stored["best"].get("codes")
    known = kg.num_entities if codes is None else min(len(codes), kg.num_entities)
    if stored.get("trained_on") != kg.train_digest(known):
        file = next((name for name in TRAIN_FILES if name in kg.input_hashes), TRAIN_FILES[0])
        raise InputError(
            f"--checkpoint {path} was trained on other triples than {kg.name} has ({file}, with entities.dict and "
            "relations.dict), which may be test triples here; give the data set of its run"
        )
    return LoadedScorer(scorer, relations, seq_len, known, stored["best"].get("codes_sha256"))

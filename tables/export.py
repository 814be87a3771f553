"""Codes of stage 1 as one folder that others load without this toolkit: codes, vectors, scores, names and a card.

    python tables/export.py --codes codes_new/family_4_1024_4_rq.pt --checkpoint checkpoints/family_4_1024_4_rq.pt --out family_codes

The folder's load.py (tables/load.py) needs torch and safetensors only. Its scores are compared with the
checkpoint's before the folder gets its name. Nothing is uploaded. docs/EXPORT.md lists the files.
"""  # noqa: E501 (a command on one line)

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.codes import render_codes, unique_names
from Class.source import check_recorded, read_record, training_folder
from common.errors import CommandParser, InputError, content_of, run_command
from common.files import (
    check_replaceable,
    output_folder,
    read_json,
    replaced_folder,
    sha256_file,
    write_json,
    write_text,
)
from common.record import make_record
from data.knowledge_graph import KnowledgeGraph, with_inverse
from model.from_codes import Scored, load_scored_codes
from tables.card import Example, card_text

if TYPE_CHECKING:
    import torch

    from lora_training.adapters import Saved

LOADER = Path(__file__).resolve().parent / "load.py"
RECORD = "record.json"
BOUND = 1e-6  # largest difference of scores, relative to the largest score if that is above 1
PROBES = 64  # test queries whose scores are compared


class Contents(NamedTuple):
    """What goes into the folder, read and checked."""

    kg: KnowledgeGraph
    scored: Scored
    record: dict[str, Any]  # of the codes
    adapter: Saved | None


# ---------------------------------------------------------------- reading


def read_contents(args: argparse.Namespace) -> Contents:
    """Record, graph, checkpoint, codes and adapter. InputError where one is missing, unfinished or of another run."""
    import torch

    if args.dataset is not None and not args.dataset.exists():
        raise InputError(f"--dataset {args.dataset} does not exist; leave the flag out for the graph in the record")
    record = read_record(args.codes)
    for file in (args.codes, args.codes.with_suffix(".entities.txt")):
        check_recorded(file, record)
    folder = training_folder(args.codes, record, args.dataset)
    if folder is None:
        raise InputError(
            f"the graph that {args.codes} was trained on ({record['args'].get('dataset')}) was not found with the "
            "recorded hash; give it with --dataset DIR"
        )
    kg = KnowledgeGraph.load(folder, keep_names=True)  # checked when the codes were trained
    cpu = torch.device("cpu")
    scored = load_scored_codes(args.checkpoint, args.codes, kg, cpu, flag="--codes", own_codes=True)
    if "extends" in record:  # the record of --encode has no epochs of its own
        from model.checkpoint import load_checkpoint

        record["history"] = load_checkpoint(args.checkpoint)["last"]["history"]
    return Contents(kg, scored, record, read_adapter(args, record) if args.adapter else None)


def read_adapter(args: argparse.Namespace, record: dict[str, Any]) -> Saved:
    """What train_lora.py wrote. InputError unless its rows held these codes (or those that these extend)."""
    from lora_training.adapters import read_saved
    from lora_training.base_model import quiet_libraries
    from lora_training.code_tokens import refuse_other_codes

    quiet_libraries()
    saved = read_saved(args.adapter)
    ours = {"file": args.codes.name, "sha256": record["outputs"][args.codes.name], "extends": record.get("extends")}
    refuse_other_codes(saved.record["codes"], ours, f"--adapter {args.adapter}", "--codes")
    return saved


# ---------------------------------------------------------------- writing


def write_tensors(scored: Scored, folder: Path) -> None:
    """codes, codebooks and scorer as .safetensors, and config.json: what load.py needs for scores."""
    import torch
    from safetensors.torch import save

    from model.decoders import DECODERS, JointDecoder

    scorer, books = scored.scorer, scored.scorer.rq_codebook
    members: Any = scorer.decoder.decoders if isinstance(scorer.decoder, JointDecoder) else [scorer.decoder]
    tensors = {"relations": scored.relations}
    if not isinstance(scorer.W_q, torch.nn.Identity):
        weight = scorer.W_q.weight
        tensors["W_q"] = weight if weight.dim() == 3 else weight.unsqueeze(0)  # [members, D / members, in / members]
    for i, member in enumerate(members):
        tensors |= {f"{i}.{name}": value for name, value in member.state_dict().items()}
        if hasattr(member, "height"):  # rows of ConvE's image: its weights do not say
            tensors[f"{i}.height"] = torch.tensor(member.height)
    codebooks = torch.stack([books.codes_of_level(level) for level in range(books.num_quantizers)])
    for name, group in (("codes", {"codes": scored.codes}), ("codebooks", {"codebooks": codebooks}),
                        ("scorer", tensors)):  # fmt: skip
        plain = {key: value.detach().cpu().contiguous() for key, value in group.items()}
        (folder / f"{name}.safetensors").write_bytes(save(plain, {"format": "pt"}))
    M, L, Q = scored.codes.shape
    kind = next((name for name, decoder in DECODERS.items() if type(members[0]) is decoder), "?")
    write_json({
        "decoder": kind, "members": len(members), "entities": M, "relations": len(scored.relations) // 2,
        "seq_len": L, "num_quantizers": Q, "num_code": books.num_codes, "code_dim": books.latent_dim, "dim": scorer.dim,
    }, folder / "config.json")  # fmt: skip


def write_names(kg: KnowledgeGraph, names: list[str], folder: Path) -> None:
    """names.json: names by row, and rows by id or name (an id wins over a name); "~" stands for the inverse."""
    counts = Counter(kg.relation_labels)
    pairs = zip(kg.relations, kg.relation_labels, strict=True)
    labels = [label if counts[label] == 1 else f"{label} ({raw})" for raw, label in pairs]
    relations, raw = ([*words, *(f"~{word}" for word in words)] for words in (labels, kg.relations))

    def rows(*lists: list[str]) -> dict[str, int]:
        return {name: row for names in lists for row, name in reversed(list(enumerate(names)))}

    write_json({
        "entities": names, "relations": relations,
        "entity_rows": rows(names, kg.entities), "relation_rows": rows(relations, raw),
    }, folder / "names.json")  # fmt: skip


def write_parquet(kg: KnowledgeGraph, names: list[str], codes: torch.Tensor, form: str, path: Path) -> None:
    """A row per entity: its id, its name and the text of its codes as the LLM reads it."""
    from pyarrow import parquet, table

    parquet.write_table(table({"entity": kg.entities, "name": names, "codes": render_codes(codes, form)}), path)


def copy_adapter(saved: Saved, folder: Path) -> None:
    """The adapter's files, with its tokenizer and record."""
    folder.mkdir()
    for path in saved.folder.iterdir():
        if path.is_file() and not path.name.startswith(".") and path.name != "README.md":
            shutil.copyfile(path, folder / path.name)


def compare_scores(folder: Path, contents: Contents) -> float:
    """The largest difference between load.py's scores and the checkpoint's on test queries, relative to the largest
    score if that is above 1. InputError if it is above BOUND, or load.py has no such decoder."""
    import torch

    from tables.load import Codes

    scored, kg = contents.scored, contents.kg
    triples = torch.from_numpy(with_inverse(kg.test, kg.num_relations)[:: max(1, 2 * len(kg.test) // PROBES)])
    heads, relations, _ = triples.T
    loaded = Codes(folder)
    with torch.no_grad():
        q_all = scored.scorer.eval().entity_vectors_from_codes(scored.codes)
        ours = scored.scorer.scores(q_all[heads], scored.relations[relations], q_all)
        try:
            theirs = loaded.scores(heads, relations)
        except AttributeError as error:
            raise InputError(
                f"{LOADER} cannot compute this decoder ({error}); add it there, see docs/EXPORT.md"
            ) from error
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))
    if not difference <= BOUND:
        raise InputError(
            f"load.py's scores differ from the checkpoint's by {difference:.1e}, over {BOUND}: nothing was written; "
            f"does {LOADER} compute what model/decoders.py and model/quantizers.py do?"
        )
    return difference


def example_of(folder: Path, kg: KnowledgeGraph) -> Example:
    """The first test triple as a query, with the answers of load.py."""
    from tables.load import Codes

    h, r, _ = kg.test[0].tolist()
    loaded = Codes(folder)
    head, relation = loaded.names["entities"][h], loaded.names["relations"][r]
    return Example(head, relation, h, r, loaded.rank(head, relation, top=3))


def write_folder(args: argparse.Namespace, contents: Contents, folder: Path, started: float) -> float:
    """All files; returns the difference of ``compare_scores``."""
    kg, scored, record, adapter = contents
    folder.mkdir(parents=True)
    names = unique_names(kg).names
    form = "spec" if adapter is None else str(adapter.record["codes"].get("code_format", "spec"))
    write_tensors(scored, folder)
    write_names(kg, names, folder)
    write_parquet(kg, names, scored.codes, form, folder / "codes.parquet")
    shutil.copyfile(LOADER, folder / LOADER.name)
    if adapter is not None:
        copy_adapter(adapter, folder / "adapter")
    difference = compare_scores(folder, contents)
    with content_of(args.codes.with_suffix(".json"), "run record", "run run_rq.py again"):
        card = card_text(record, kg, example_of(folder, kg), adapter, args.data_licence)
    write_text(card, folder / "card.md")
    inputs = {path.name: sha256_file(path) for path in (args.codes, args.checkpoint)}
    outputs = {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    exported = make_record(vars(args), inputs, time.monotonic() - started, outputs=outputs, score_difference=difference)
    write_json(exported | {"run": record}, folder / RECORD)
    return difference


def check_out(out: Path, overwrite: bool) -> None:
    """InputError where --out is there and not empty, unless it is an export, nothing else, and --overwrite is given."""
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise InputError(f"--out {out} is not empty; give another folder, or --overwrite to replace an export")
    record = read_json(out / RECORD, "record") if (out / RECORD).is_file() else {}
    with content_of(out / RECORD, "record of an export", "give another --out"):
        written = {*record.get("outputs", ()), RECORD}
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    other = [path for path in files if str(path) not in written and path.parts[0] not in ("__pycache__", ".cache")]
    if other:
        raise InputError(f"--out {out} holds files that this script did not write, such as {other[0]}; choose another")


def repository_name(stem: str) -> str:
    """The name of a codes file as the Hugging Face hub allows it: ASCII letters, digits, ``_``, ``-`` and ``.``."""
    return re.sub(r"[^\w.]+", "-", stem, flags=re.ASCII).strip("-.") or "codes"


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    args = parse_args(argv)
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError("codes.parquet is written by pyarrow, which is not installed: python -m pip install pyarrow")
    check_out(args.out, args.overwrite)
    contents = read_contents(args)
    with replaced_folder(args.out, "--out") as part:
        difference = write_folder(args, contents, part, started)
    print(f"wrote {args.out}; the scores of its load.py differ by {difference:.1e} from the checkpoint's")
    card, repository = args.out / "card.md", f"hf upload USER/{repository_name(args.codes.stem)}"
    print(
        f"next: read {card}, which names your command and data, then upload (nothing was uploaded):\n"
        f"  {repository} {shlex.quote(str(args.out))} .\n"
        f"  {repository} {shlex.quote(str(card))} README.md    # the page that the hub shows"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/export.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--codes", type=Path, required=True, metavar="C.pt", help="codes, with their record beside them"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CK.pt", help="checkpoint of the same run")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="LoRA adapter trained on these codes")
    parser.add_argument("--out", type=output_folder, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="graph folder (default: the one in the record)")
    parser.add_argument("--data_licence", metavar="TEXT", help="terms of the data (default: those in data/README.md)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this script wrote")
    args = parser.parse_args(argv)
    check_replaceable(args.out, "--out")
    for flag in ("codes", "checkpoint", "adapter"):
        given = getattr(args, flag)
        if given is not None and given.resolve().is_relative_to(args.out.resolve()):
            parser.error(f"--{flag} {given} is in --out {args.out}; name another folder")
    return args


if __name__ == "__main__":
    run_command(main)

"""What a run of stage 1 is, read from its record: codes, size, graph encoder, quantizer, text, ensemble members.

Every table, figure and page describes runs by these facts alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

DECODERS = {"conve": "ConvE", "distmult": "DistMult", "complex": "ComplEx"}
CONTROLS = {
    "unquantized": "unquantized", "random_codes": "random codes", "posthoc": "codes made after training",
}  # fmt: skip
BASELINES = {"none": "unquantized", "random": "random_codes", "posthoc": "posthoc"}  # of --quantizer
# flags that change no result, or that the facts say in words
FOLDERS_AND_MACHINE = {
    "config", "dataset", "name", "out_dir", "checkpoint_dir", "overwrite", "restore", "no_test", "dump_only",
    "save_emb", "num_workers", "device", "gpu", "graph_backend", "recipe", "seed", "eval_codes", "checkpoint",
    "split", "metrics_out", "shuffle_codes", "predict", "export_candidates", "top", "eval_every", "report_to",
}  # fmt: skip
SAID_IN_WORDS = {
    "quantizer", "seq_len", "num_code", "num_quantizers", "decoder", "gcn_layers", "control", "ensemble", "text_emb",
    "text_init", "inputs", "text_weight",
}  # fmt: skip


class System(NamedTuple):
    """One run of stage 1."""

    codes: str  # "RQ 4 x 4 of 1,024"
    decoder: str
    graph_encoder: str  # "" without one
    quantizer: str  # "trained", "k-means", "random", or "" where there is none
    text: str  # how text embeddings are used; "" without them
    members: int  # of the ensemble
    parameters: int | None  # behind the codes; of an unquantized run: of the whole model
    bits: float | None  # per entity, L * Q * log2 K; None where nothing is quantized
    perplexity: list[float]  # by level; [] where the record does not say

    @property
    def label(self) -> str:
        """The facts that a table's row states, in one line."""
        words = [
            self.codes,
            self.decoder,
            self.graph_encoder or "no graph encoder",
            f"{self.quantizer} quantizer" if self.quantizer else "no quantizer",
            self.text or "no text",
            f"{self.members} members" if self.members > 1 else "1 member",
            short_count(self.parameters) + " behind the codes" * (self.bits is not None),
        ]
        return ", ".join([*words, f"{self.bits:,.0f} bits per entity"] if self.bits else words)


def short_count(parameters: int | None) -> str:
    """``0.45M parameters``: as peers print them."""
    return "parameters unknown" if parameters is None else f"{parameters / 1e6:.2f}M parameters"


def size_of(args: Mapping[str, Any]) -> tuple[int, int, int]:
    """(L, K, Q) of a run's flags; Q = 1 for VQ."""
    return args["seq_len"], args["num_code"], 1 if args.get("quantizer") == "vq" else args["num_quantizers"]


def control_name(args: Mapping[str, Any]) -> str | None:
    """The baseline that the flags name (--quantizer; --control in older records); None for a run with own codes."""
    return args.get("control") or BASELINES.get(str(args.get("quantizer", "rq")))


def system_of(record: Mapping[str, Any]) -> System:
    """The facts of a record of run_rq.py. KeyError, TypeError or ValueError where the record is damaged."""
    args = record["args"]
    L, K, Q = size_of(args)
    unquantized = control_name(args) == "unquantized"
    vq = args.get("quantizer") == "vq"
    size = f"VQ {L} of {K:,}" if vq else f"RQ {L} x {Q} of {K:,}"
    layers = args.get("gcn_layers")
    return System(
        codes=f"{L} vector{'s' * (L > 1)}" if unquantized else size,
        decoder=DECODERS.get(args.get("decoder"), str(args.get("decoder"))),
        graph_encoder=f"graph encoder of {layers} layers" if layers else "",
        quantizer="" if unquantized else quantizer_of(record),
        text=text_of(args),
        members=int(args.get("ensemble") or 1),
        parameters=parameters_of(record),
        bits=None if unquantized else L * Q * math.log2(K),
        perplexity=[float(value) for value in (record.get("codes") or {}).get("perplexity") or []],
    )


def quantizer_of(record: Mapping[str, Any]) -> str:
    """``trained`` where at least one epoch trained it through the codes, else ``k-means``: assigned once and frozen."""
    if control_name(record["args"]) == "random_codes":
        return "random"
    epochs = record.get("epochs_codes_phase")
    if epochs is None:
        epochs = sum(epoch.get("phase") == "codes" for epoch in record.get("history") or [])
    return "trained" if epochs else "k-means"


def text_of(args: Mapping[str, Any]) -> str:
    """How text embeddings are used: as input, as auxiliary loss (Eq. 8), or both."""
    if not args.get("text_emb"):
        return ""
    uses = []
    if args.get("text_init") or "text" in str(args.get("inputs") or "").replace(",", "+").split("+"):
        uses.append("input")
    if args.get("text_weight", 1.0):
        uses.append("loss")
    return f"text as {' and '.join(uses)}" if uses else "text"


def parameters_of(record: Mapping[str, Any]) -> int | None:
    """All numbers behind the codes: codebooks, projection W_q, decoder, relations. None where the record lacks them."""
    counted = record.get("parameters") or {}
    args = record["args"]
    if control_name(args) == "unquantized" and "model" in counted:
        _, K, Q = size_of(args)
        return int(counted["model"]) - Q * K * int(args["code_dim"])  # it does not use its codebooks
    return int(counted["behind_codes"]) if "behind_codes" in counted else None


def other_flags(record: Mapping[str, Any]) -> list[str]:
    """The flags that the label does not state and that may change a result, as "lr 0.005"; ones that are off are left
    out, so that a flag that is newer than the record changes nothing."""
    args = record["args"]
    words = []
    if args.get("text_emb"):  # two files of one name are two inputs
        file = Path(str(args["text_emb"]))
        words.append(f"text {file.stem} {str(record.get('inputs', {}).get(file.name, ''))[:6]}".rstrip())
        inputs = args.get("inputs") or ("learned+text" if args.get("text_init") else None)
        words += [f"inputs {inputs}"] if inputs else []
        words += [f"text_weight {args['text_weight']:g}"] if args.get("text_weight") else []
    words += [f"stopped after {record['epochs']}"] if stopped_early(record) else []
    return words + flag_words(args, FOLDERS_AND_MACHINE | SAID_IN_WORDS)


def flag_words(args: Mapping[str, Any], left_out: set[str]) -> list[str]:
    """Flags by name, in order, as "lr 0.005"; those that are off or in ``left_out`` are left out."""
    words = []
    for name, value in sorted(args.items()):
        if name in left_out or value is None or value is False or value == 0:
            continue
        words.append(name if value is True else f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return words


def stopped_early(record: Mapping[str, Any]) -> bool:
    """Whether a run was dumped (--dump_only) before its epochs were over, and neither clock nor patience ended it."""
    args = record["args"]
    return bool(
        args.get("epoch")
        and record.get("epochs", args["epoch"]) < args["epoch"]
        and not (args.get("max_minutes") or args.get("patience"))
    )

"""The settings of stage 1: one dataclass defines the flags of run_rq.py and what records and checkpoints store.

A field is a flag: its default, its help, its range, and whether it must agree when a run is continued. To add a flag,
add a field; nothing else changes. ``--config FILE`` (default: configs/default.txt) is a file of flags that
become the parser's defaults; flags on the command line win, and each changes its own setting only.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from common.errors import CommandParser
from common.files import ROOT, output_file, output_folder

AUTO = -1  # the flag's word is "auto": model/sizes.py puts a number that fits the graph in its place
DEFAULT_FILE = ROOT / "configs" / "default.txt"
SOFTMAX_ONLY = ("num_negatives", "tails_at_once")  # binary cross-entropy would take true tails for false ones
# --quantizer that leaves no codes -> the baseline's name in records and file names
BASELINES = {"none": "unquantized", "random": "random_codes", "posthoc": "posthoc"}
# What a flag does when a run is continued: it must agree; it may differ with --restore; it may always differ.
SAME, LIMIT, FREE = "same", "limit", "free"

DATA = "data and outputs (default folders lie in the repository)"
CODES = "codes"
MODEL = "encoder and decoder"
TRAINING = "training"
RUN = "run"
RANKING = "rank from codes, without training"


def flag(
    default: Any,
    group: str,
    help: str,
    *,
    low: float | None = None,
    high: float = 1e9,
    above: float | None = None,
    below: float | None = None,
    auto: bool = False,
    choices: Sequence[str] | None = None,
    metavar: str | tuple[str, ...] | None = None,
    names: Sequence[str] = (),
    resume: str = SAME,
    unset: str | None = None,
    unused_without: str | None = None,
    type: Callable[[str], Any] | None = None,
) -> Any:
    """A field of ``Config``. Range of a number: low <= value <= high, above < value < below; ``auto``: or "auto".

    ``names``: further names of the flag; ``resume``: SAME, LIMIT or FREE; ``unset``: what None means, for the help;
    ``unused_without``: the flag that must be set (not 0, not empty) for this one to have an effect; ``type``: reads the
    word, where the field's own type does not.
    """
    limits = {"low": low, "high": high, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={
        "group": group, "help": help, "limits": limits, "auto": auto, "choices": choices, "metavar": metavar,
        "names": names, "resume": resume, "unset": unset, "unused_without": unused_without, "type": type,
    })  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The flags of run_rq.py. Letters: M entities, D width, L positions, K codes, Q levels, B batch.

    The defaults here are the paper's where it has one; configs/default.txt has the recommended ones.
    """

    # ------------------------------------------------------------ data and outputs
    config: Path | None = flag(None, DATA, "file of flags that replace the defaults", unset="configs/default.txt",
                               metavar="FILE", resume=FREE)  # fmt: skip
    dataset: Path | None = flag(None, DATA, "graph: a folder or one file (.txt, .tsv, .csv, .nt, .ttl, also .gz)",
                                unset="data/FB15k-237", metavar="DIR", names=["--data"], resume=FREE)  # fmt: skip
    keep_names: bool = flag(False, DATA, "names in several spellings (white space, quotes, BOM, Unicode form) are "
                            "different entities, not an error", resume=FREE)  # fmt: skip
    name: str | None = flag(None, DATA, "name of the run and of its checkpoint", unset="the stem of the codes file")
    out_dir: Path | None = flag(None, DATA, "folder for codes and records", unset="codes_new", metavar="DIR",
                                resume=FREE, type=output_folder)  # fmt: skip
    checkpoint_dir: Path | None = flag(None, DATA, "folder for {name}.pt", unset="checkpoints", metavar="DIR",
                                       resume=FREE, type=output_folder)  # fmt: skip
    text_emb: Path | None = flag(None, DATA, "text embeddings [M, T], one row per entity id, for Eq. 8 and --inputs",
                                 metavar="FILE.npy", resume=FREE)  # fmt: skip
    # ------------------------------------------------------------ codes
    quantizer: str = flag("rq", CODES, "rq: residual levels; vq: one level, as in SSQR. Baselines that leave a record "
                          "and no codes: random (codes drawn once), posthoc (rq by k-means after training without "
                          "codes), none (no codes)", choices=["rq", "vq", "random", "posthoc", "none"])  # fmt: skip
    seq_len: int = flag(16, CODES, "L, code positions per entity", low=1, auto=True)
    num_code: int = flag(1024, CODES, "K, codes per codebook", low=1, auto=True)
    num_quantizers: int = flag(4, CODES, "Q, residual levels (vq has one)", low=1, high=1024, auto=True,
                               metavar="Q")  # fmt: skip
    code_dim: int = flag(32, CODES, "width of a code vector", low=1, auto=True)
    vq_weight: float = flag(1.0, CODES, "weight of the quantization loss in Eq. 9", low=0)
    # ------------------------------------------------------------ encoder and decoder
    init_dim: int = flag(200, MODEL, "width of the learned entity and relation inputs; D without graph layers", low=1,
                         auto=True)  # fmt: skip
    inputs: str = flag("learned", MODEL, "what the encoder starts from: learned, text, neighbours (the mean of what "
                       "the 10 nearest entities by text have learned), joined by +; with commas, one entry per "
                       "ensemble member", metavar="SOURCES")  # fmt: skip
    gcn_dim: int = flag(200, MODEL, "D, width of the graph layers and of q_e", low=1, auto=True,
                        unused_without="gcn_layers")  # fmt: skip
    gcn_layers: int = flag(2, MODEL, "graph layers; 0 leaves the graph encoder out", low=0)
    gcn_drop: float = flag(0.2, MODEL, "dropout of the graph layers", low=0, below=1, unused_without="gcn_layers")
    opn: str = flag("mult", MODEL, "composition of neighbour and relation", choices=["mult", "sub"],
                    unused_without="gcn_layers")  # fmt: skip
    act: str = flag("tanh", MODEL, "activation of the graph layers", choices=["tanh", "relu", "gelu", "identity"],
                    unused_without="gcn_layers")  # fmt: skip
    mask_inputs: float = flag(0.0, MODEL, "part of the entities whose learned input is masked in an encoder pass, so "
                              "that neighbours can represent an entity, for --encode_by encoder", low=0,
                              below=1)  # fmt: skip
    tf_layers: int = flag(1, MODEL, "transformer blocks over the L positions", low=0)
    att_head: int = flag(4, MODEL, "attention heads of those blocks", low=1, unused_without="tf_layers")
    decoder: str = flag("conve", MODEL, "score of head, relation and tail (Eq. 6)",
                        choices=["conve", "distmult", "complex"])  # fmt: skip
    decoder_drop: float | None = flag(None, MODEL, "dropout of the decoder", low=0, below=1, unset="the decoder's own")
    ensemble: int = flag(1, MODEL, "ensemble members that share positions and widths, train by their own losses and "
                         "add their scores (needs --gcn_layers 0)", low=1, metavar="N")  # fmt: skip
    graph_backend: str = flag("auto", MODEL, "message-passing implementation; all give the same result",
                              choices=["auto", "fused", "dgl", "torch"], resume=FREE)  # fmt: skip
    # ------------------------------------------------------------ training
    epoch: int = flag(800, TRAINING, "epochs", low=1, auto=True, resume=LIMIT)
    max_minutes: float = flag(0.0, TRAINING, "stop at the end of the epoch in which this time is over, with the "
                              "schedules fitted to it (0: off)", low=0, resume=LIMIT)  # fmt: skip
    batch: int = flag(1024, TRAINING, "B, distinct (h, r) queries per step", low=2, auto=True)
    optimizer: str = flag("adam", TRAINING, "adam with a cosine schedule, or adagrad at a constant rate",
                          choices=["adam", "adagrad", "auto"])  # fmt: skip
    lr: float = flag(0.0005, TRAINING, "learning rate", above=0, auto=True)
    l2: float = flag(1e-8, TRAINING, "weight decay", low=0)
    loss: str = flag("ce", TRAINING, "1-N loss: softmax or binary cross-entropy", choices=["ce", "bce"])
    num_negatives: int = flag(0, TRAINING, "entities drawn per step for a sampled softmax, on large graphs (0: exact)",
                              low=0, auto=True)  # fmt: skip
    tails_at_once: int = flag(0, TRAINING, "high-degree queries are split: at most N tails per batch entry (0: all)",
                              low=0, auto=True, metavar="N")  # fmt: skip
    n3: float = flag(0.0, TRAINING, "weight of the nuclear 3-norm (N3) of a triple's vectors; auto: of three, the best "
                     "on valid after a tenth of the run", low=0, auto=True)  # fmt: skip
    lbl_smooth: float = flag(0.1, TRAINING, "label smoothing", low=0, below=1)
    text_weight: float = flag(1.0, TRAINING, "weight of the semantic loss of Eq. 8", low=0, unused_without="text_emb")
    warmup_epochs: float = flag(1.0, TRAINING, "epochs before the codebooks are initialised; below 1: part of the run",
                                low=0, metavar="N")  # fmt: skip
    freeze_at: float = flag(0.85, TRAINING, "part of the run after which codes stay fixed and their vectors train on "
                            "(1: never)", above=0, high=1)  # fmt: skip
    z_noise: float = flag(0.0, TRAINING, "noise on the vectors of the warm-up, in their standard deviations",
                          low=0, metavar="S", unused_without="warmup_epochs")  # fmt: skip
    frozen_noise: float = flag(0.0, TRAINING, "noise on decoded codes once codes are fixed, in their standard "
                               "deviations", low=0, metavar="S")  # fmt: skip
    weight_average: float = flag(0.0, TRAINING, "once codes are fixed, score and dump an exponential average of the "
                                 "weights, of this decay per step (0: off)", low=0, below=1,
                                 metavar="D")  # fmt: skip
    encoder_every: int = flag(8, TRAINING, "scorer steps per pass of the encoder", low=1, auto=True)
    eval_every: int = flag(1, TRAINING, "epochs between rankings of valid", low=1)
    # ------------------------------------------------------------ run
    device: str | None = flag(None, RUN, "cpu, cuda, cuda:1, ...; wins over --gpu", unset="cuda where there is one",
                              resume=FREE)  # fmt: skip
    gpu: int | None = flag(None, RUN, "GPU number, -1 for the CPU", resume=FREE)
    num_workers: int = flag(0, RUN, "CPU threads (0: all)", low=0, resume=FREE)
    seed: int = flag(0, RUN, "seed of everything random", low=0, high=2**63 - 1)
    restore: bool = flag(False, RUN, "continue the run of this name; a finished one is dumped again", resume=FREE)
    overwrite: bool = flag(False, RUN, "replace a run of this name", resume=FREE)
    report_to: str = flag("none", RUN, "also log losses, metrics and embeddings", resume=FREE,
                          choices=["none", "tensorboard", "wandb"])  # fmt: skip
    split: str = flag("test", RUN, "split to rank; valid: no metric of test",
                      choices=["train", "valid", "test"], resume=FREE)  # fmt: skip
    # ------------------------------------------------------------ rank from codes
    eval_codes: Path | None = flag(None, RANKING, "rank --split from these codes, without the encoder",
                                   metavar="CODES.pt", resume=FREE)  # fmt: skip
    checkpoint: Path | None = flag(None, RANKING, "codebooks, relations and decoder for --eval_codes", metavar="CK.pt",
                                   resume=FREE)  # fmt: skip
    shuffle_codes: bool = flag(False, RANKING, "control: give every entity another one's codes", resume=FREE)
    metrics_out: Path | None = flag(None, RANKING, "also write the metrics to this file", metavar="FILE.json",
                                    resume=FREE, type=output_file)  # fmt: skip
    predict: tuple[str, str] | None = flag(None, RANKING, "print the top tails; '~RELATION', quoted: the top heads",
                                           metavar=("HEAD", "RELATION"), resume=FREE)  # fmt: skip
    export_candidates: Path | None = flag(None, RANKING, "write ranked candidates of --split",
                                          metavar="FILE.npz", resume=FREE, type=output_file)  # fmt: skip
    encode: Path | None = flag(None, RANKING, "triples of new entities, which get codes without training",
                               metavar="NEW.txt", resume=FREE)  # fmt: skip
    new_text: Path | None = flag(None, RANKING, "text embeddings of new entities, like those of --text_emb; with one, "
                                 "an entity needs no triple", metavar="NEW.npy", resume=FREE)  # fmt: skip
    encode_by: str = flag("auto", RANKING, "fold_in: optimize on the triples (auto); encoder: one pass of the graph "
                          "layers, for runs with --mask_inputs", choices=["auto", "encoder", "fold_in"],
                          resume=FREE)  # fmt: skip
    encoded: Path | None = flag(None, RANKING, "write the codes of --eval_codes and of the new entities",
                                metavar="OUT.pt", resume=FREE, type=output_file)  # fmt: skip
    top: int = flag(20, RANKING, "candidates of --predict and --export_candidates", low=1, resume=FREE)

    def as_plain(self) -> dict[str, Any]:
        """All settings as records and checkpoints store them: numbers, words, None; a path is a string."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def compared(self) -> dict[str, Any]:
        """The settings that must agree for a run to be continued."""
        plain = self.as_plain()
        return {field.name: plain[field.name] for field in dataclasses.fields(self) if field.metadata["resume"] != FREE}

    def unused(self) -> list[str]:
        """One line for every setting that has been changed but has no effect."""
        lines = []
        for field in dataclasses.fields(self):
            needs, value = field.metadata["unused_without"], getattr(self, field.name)
            if needs and not getattr(self, needs) and value not in (field.default, AUTO):
                state = "is not given" if getattr(self, needs) is None else "is 0"
                lines.append(f"--{field.name} {value} is unused: --{needs} {state}")
        for name in SOFTMAX_ONLY:
            if getattr(self, name) > 0 and self.loss != "ce":
                lines.append(f"--{name} {getattr(self, name)} is unused: --loss is {self.loss}")
        return lines


LIMITS = {field.name for field in dataclasses.fields(Config) if field.metadata["resume"] == LIMIT}
NOT_COMPARED = {field.name for field in dataclasses.fields(Config) if field.metadata["resume"] == FREE}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return " ".join(value)
    return str(value) if isinstance(value, Path) else value


# ---------------------------------------------------------------- the parser


def build_parser(
    defaults: Mapping[str, Any] | None = None, leave_out: Container[str] = (), parser: CommandParser | None = None
) -> CommandParser:
    """The flags of run_rq.py; ``defaults``: values that replace the fields' own, as a --config file gives them.

    ``parser``: of another script, which gets the flags that are not in ``leave_out``.
    """
    parser = parser or CommandParser(
        description="Stage 1: learn the codes of a knowledge graph, dump them, rank from them.",
        formatter_class=argparse.HelpFormatter,
    )
    hints, groups = get_type_hints(Config), dict[str, Any]()
    for field in dataclasses.fields(Config):
        if field.name in leave_out:
            continue
        about = field.metadata
        group = groups.setdefault(about["group"], None) or parser.add_argument_group(about["group"])
        groups[about["group"]] = group
        default = (defaults or {}).get(field.name, field.default)
        options: dict[str, Any] = {"help": about["help"] + _default_text(default, about["unset"]), "default": default}
        kind = _kind(hints[field.name])
        if kind is bool:
            options["action"] = "store_true"
        else:
            options |= {"choices": about["choices"], "metavar": about["metavar"]}
            options |= (
                {"nargs": 2}
                if kind is tuple
                else {"type": about["type"] or (_auto_or(kind) if about["auto"] else kind)}
            )
        group.add_argument(f"--{field.name}", *about["names"], **options)
    return parser


def _kind(hint: Any) -> type:
    """``int | None`` -> int, ``tuple[str, str] | None`` -> tuple."""
    kind = (
        next((part for part in get_args(hint) if part is not type(None)), hint)
        if type(None) in get_args(hint)
        else hint
    )
    return tuple if get_args(kind) else kind


def _default_text(default: Any, unset: str | None) -> str:
    if default is False or (default is None and unset is None):
        return ""
    return f" (default: {unset if default is None else 'auto' if default == AUTO else default})"


def _auto_or(kind: type) -> Any:
    def parse(word: str) -> Any:
        value = AUTO if word == "auto" else kind(word)
        if value == AUTO and word != "auto":
            raise argparse.ArgumentTypeError(f"{word} is out of range, expected a positive number or auto")
        return value

    parse.__name__ = f"{kind.__name__} or auto"  # argparse says it of a wrong word
    return parse


def read_flags(path: Path) -> dict[str, Any]:
    """The settings in a text file of flags; a fault ends with one line and exit code 2."""
    parser = build_parser()
    try:
        words = shlex.split(path.read_text(encoding="utf-8-sig"), comments=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        parser.error(f"--config {path} cannot be read as flags: {reason}; there are examples in configs/")
    parser.origin = f"--config {path}: "
    if any(word.split("=")[0] == "--config" for word in words):
        parser.error("a file of flags cannot name another --config; write its flags into the file")
    return given_flags(parser, words)


def given_flags(parser: CommandParser, words: Sequence[str]) -> dict[str, Any]:
    """Only what the words set, without defaults. The parser cannot be used again."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(words))


def file_defaults(words: Sequence[str]) -> dict[str, Any]:
    """The settings of the --config file that the words name, else of the default one."""
    first = CommandParser(add_help=False)
    first.add_argument("--config", type=Path)
    return read_flags(first.parse_known_args(words)[0].config or DEFAULT_FILE)


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """The settings of a command line (by default this process's); a fault ends with one line and exit code 2."""
    words, predict = _without_names(list(sys.argv[1:] if argv is None else argv))
    parser = build_parser(file_defaults(words))
    found = vars(parser.parse_args(words))
    found["predict"] = predict or (tuple(found["predict"]) if found["predict"] else None)
    return checked_config(parser, found)


def checked_config(parser: CommandParser, found: Mapping[str, Any]) -> Config:
    """The settings that a parser found, in range and without conflicts; a fault ends with one line and exit code 2."""
    config = Config(**found)
    if config.quantizer == "vq":
        config = dataclasses.replace(config, num_quantizers=1)
    problem = range_problem(config) or _conflict(config)
    if problem:
        parser.error(problem)
    return config


def _without_names(words: list[str]) -> tuple[list[str], tuple[str, str] | None]:
    """The words without ``--predict HEAD RELATION``, and the pair: an entity's name may start with "-"."""
    if "--predict" not in words:
        return words, None
    at = words.index("--predict")
    pair = words[at + 1 : at + 3]
    known = {name for action in build_parser()._actions for name in action.option_strings}
    if len(pair) < 2 or known & set(pair):
        return words, None  # the parser reports it
    return words[:at] + words[at + 3 :], (pair[0], pair[1])


def range_problem(config: Config) -> str | None:
    """The first setting outside its range, in words."""
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata["limits"]
        if type(value) not in (int, float) or field.name == "gpu" or (field.metadata["auto"] and value == AUTO):
            continue
        checks = {
            "low": (value >= (limits["low"] or 0), "{} or more"),
            "high": (value <= limits["high"], "{} or less"),
            "above": (limits["above"] is None or value > limits["above"], "more than {}"),
            "below": (limits["below"] is None or value < limits["below"], "less than {}"),
        }
        for name, (fits, words) in checks.items():
            if not fits:
                return f"--{field.name} {value} is out of range, expected {words.format(limits[name])}"
    return None


def _conflict(config: Config) -> str | None:
    """The first combination of settings that would give a wrong result or none, in words."""
    if config.ensemble > 1 and config.gcn_layers:
        return f"--ensemble {config.ensemble} needs --gcn_layers 0, found {config.gcn_layers}"
    if config.text_emb is None and {"text", "neighbours"} & set(config.inputs.replace(",", "+").split("+")):
        return f"--inputs {config.inputs} needs text embeddings: give --text_emb FILE.npy"
    if config.restore and config.overwrite:
        return "--restore continues a run and --overwrite replaces it: give one of them"
    if config.eval_codes and not config.checkpoint:
        return "--eval_codes needs --checkpoint CK.pt, the checkpoint of the run that dumped the codes"
    if bool(config.encode or config.new_text) != bool(config.encoded):
        return "--encode NEW.txt (or --new_text NEW.npy) and --encoded OUT.pt need each other"
    if config.new_text and not config.text_emb:
        return "--new_text needs --text_emb FILE.npy, the embeddings of the entities of --dataset by the same model"
    if config.mask_inputs and not config.gcn_layers:
        return f"--mask_inputs {config.mask_inputs} needs --gcn_layers 1 or more"
    for name in ("checkpoint", "metrics_out", "predict", "shuffle_codes", "export_candidates", "encoded"):
        if getattr(config, name) and not config.eval_codes:
            return f"--{name} needs --eval_codes CODES.pt and --checkpoint CK.pt"
    if config.metrics_out and (config.predict or config.export_candidates):
        return "--metrics_out writes what a ranking finds: leave --predict and --export_candidates out"
    for name, path, end in (
        ("metrics_out", config.metrics_out, ".json"),
        ("export_candidates", config.export_candidates, ".npz"),
    ):
        if path and path.suffix != end:
            return f"--{name} {path} must end in {end}"
    return None

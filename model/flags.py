"""The flags of run_rq.py: what they are called, what goes with what."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import CommandParser

AUTO = "auto"
UNQUANTIZED = ("unquantized", "frozen_vectors")  # controls that never have codes, by the names the trainer knows
MOST_LEVELS = 1024  # far beyond what pays; each is a codebook
PAPER = "paper"
# of the groups that hold a run's settings: what bounds or watches a run, or asks another question of the same settings
NO_SETTINGS = {
    "quantizer", "num_quantizers", "codes_from", "control", "teacher", "teacher_weight", "epoch", "max_minutes",
    "eval_every", "patience", "graph_backend", "matmul_precision",
}  # fmt: skip
SETTING_GROUPS = ("codes", "encoder and decoder", "training")


class FlagsFromFile(argparse.Action):
    """Reads flags from a text file, as if they stood in its place on the command line; those that follow win."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            words = shlex.split(values.read_text(encoding="utf-8-sig"), comments=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            parser.error(f"--config {values} cannot be read as flags: {reason}; there are examples in configs/")
        if any(word.split("=")[0] == "--config" for word in words):
            parser.error(f"--config {values} names another --config; write its flags into the file")
        known = {word for action in parser._actions for word in action.option_strings}
        unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
        if unknown:
            parser.error(f"--config {values} holds {unknown[0]}, which is no flag")
        inner = build_parser()
        inner.origin = f"--config {values}: "
        inner.parse_args(words, namespace)
        setattr(namespace, self.dest, values)


def build_parser() -> CommandParser:
    """The flags of stage 1; those of the original trainer keep their meaning."""
    parser = CommandParser(description="Stage 1: learn the codes of a knowledge graph, dump them, rank from them.")

    group = parser.add_argument_group("data and outputs (default folders lie in the repository)")
    group.add_argument("--config", type=Path, metavar="FILE", action=FlagsFromFile,
                       help="text file of flags (see configs/); flags after it win over it")  # fmt: skip
    group.add_argument("--recipe", choices=[AUTO, PAPER],
                       help="where settings come from that are not given: auto, a kept run on the graph nearest in "
                       "size; paper, the defaults below (default: auto where no setting is given at all)")  # fmt: skip
    group.add_argument("--dataset", "--data", type=Path, metavar="DIR", help="graph folder (default: data/FB15k-237)")
    group.add_argument("--name", help="name of the run and its checkpoint (default: the stem of the codes file)")
    group.add_argument("--out_dir", type=Path, metavar="DIR", help="folder for codes and records (default: codes_new)")
    group.add_argument("--checkpoint_dir", type=Path, metavar="DIR", help="folder for {name}.pt (default: checkpoints)")
    group.add_argument(
        "--text_emb", type=Path, metavar="FILE.npy", help="text embeddings [M, T], row = entity id: Eq. 8"
    )
    group.add_argument("--save_emb", action="store_true", help="write the embeddings even when they exceed 2 GiB")

    group = parser.add_argument_group("codes")
    group.add_argument("--quantizer", choices=["rq", "vq"], default="rq", help="residual levels, or SSQR's one level")
    group.add_argument("--seq_len", type=int, default=16, help="L, code positions per entity")
    group.add_argument("--num_code", type=int, default=1024, help="K, codes per codebook")
    group.add_argument("--num_quantizers", type=_levels, default=AUTO, metavar="Q",
                       help="residual levels; auto: by the graph's size and what kept runs measured")  # fmt: skip
    group.add_argument("--code_dim", type=int, default=32, help="width of a code vector")
    group.add_argument("--vq_weight", type=float, default=1.0, help="weight of the quantization loss in Eq. 9")
    group.add_argument("--codes_from", type=Path, metavar="CODES.pt",
                       help="learn no codes but a scorer of these: codebooks, relations, decoder")  # fmt: skip

    group = parser.add_argument_group("encoder and decoder")
    group.add_argument("--init_dim", type=int, default=200, help="width of the learned entity and relation inputs")
    group.add_argument(
        "--text_init", action="store_true", help="start the encoder from projected text embeddings too (--text_emb)"
    )
    group.add_argument("--inputs", metavar="SOURCES",
                       help="what the encoder starts from: learned, text, neighbours (what an entity's nearest by "
                       "text have learned), joined by +; with commas, each member of --ensemble its own")  # fmt: skip
    group.add_argument("--text_neighbours", type=int, metavar="N", help="neighbours that --inputs takes (default: 10)")
    group.add_argument(
        "--gcn_dim",
        type=int,
        default=200,
        help="D, width of the graph layers and of q_e (without graph layers D is --init_dim)",
    )
    group.add_argument("--gcn_layers", type=int, default=2, help="graph layers; 0 leaves the graph encoder out")
    group.add_argument("--gcn_drop", type=float, default=0.2, help="dropout of the graph layers")
    group.add_argument("--opn", choices=["mult", "sub"], default="mult", help="composition of neighbour and relation")
    group.add_argument("--act", choices=["tanh", "relu", "gelu", "identity"], default="tanh", help="activation")
    group.add_argument("--tf_layers", type=int, default=1, help="transformer blocks over the L positions")
    group.add_argument("--att_head", type=int, default=4, help="attention heads of those blocks")
    group.add_argument("--decoder", choices=["conve", "distmult", "complex", "tucker", "mlp"], default="conve",
                       help="how codes of head, relation and tail make a score (Eq. 6)")  # fmt: skip
    group.add_argument("--decoder_drop", type=float, help="dropout of the decoder (default: the decoder's own)")
    group.add_argument("--ensemble", type=int, default=1, metavar="N",
                       help="members that share positions and widths out, learn apart and add scores")  # fmt: skip
    group.add_argument("--graph_backend", choices=["auto", "fused", "dgl", "torch"], default="auto",
                       help="who sums over neighbours; all give the same result")  # fmt: skip

    group = parser.add_argument_group("training")
    group.add_argument("--epoch", type=int, default=800, help="epochs")
    group.add_argument(
        "--max_minutes", type=float, default=0, help="stop at the end of the epoch in which this time is over, "
        "schedules fitted to it (0: off)"
    )  # fmt: skip
    group.add_argument("--batch", type=int, default=1024, help="B, distinct (h, r) queries per step")
    group.add_argument("--lr", type=float, default=0.0005, help="learning rate of Adam")
    group.add_argument("--encoder_lr", type=float, metavar="LR",
                       help="rate of the encoder (default: --lr times the root of --encoder_every)")  # fmt: skip
    group.add_argument("--lr_schedule", choices=["cosine", "constant"], default="cosine", help="course of the rate")
    group.add_argument("--l2", type=float, default=1e-8, help="weight decay of Adam")
    group.add_argument("--loss", choices=["ce", "bce"], default="ce", help="1-N loss: softmax or binary cross-entropy")
    group.add_argument("--num_negatives", type=int, default=0,
                       help="entities drawn per step for a sampled softmax, on large graphs (0: exact)")  # fmt: skip
    group.add_argument("--tails_at_once", type=int, default=0, metavar="N",
                       help="true tails of one query in a batch; one with more comes in parts, so that hubs do not "
                       "dictate steps (0, the default: all)")  # fmt: skip
    group.add_argument("--lbl_smooth", type=float, default=0.1, help="label smoothing")
    group.add_argument("--text_weight", type=float, default=1.0, help="weight of the semantic loss (with --text_emb)")
    group.add_argument("--relation_weight", type=float, default=0.0, metavar="W",
                       help="weight of telling r from head and tail (--decoder distmult or complex)")  # fmt: skip
    group.add_argument("--teacher", type=Path, nargs="+", metavar="CK.pt",
                       help="trained runs: their answers to training queries are learned too")  # fmt: skip
    group.add_argument("--teacher_weight", type=float, default=0.7, metavar="W",
                       help="weight of the teacher's answers; the rest is the true tails'")  # fmt: skip
    group.add_argument("--warmup_epochs", type=float, default=1, metavar="N",
                       help="epochs before the codebooks are initialised; below 1: part of the run")  # fmt: skip
    group.add_argument("--z_noise", type=float, default=0.0, metavar="S",
                       help="noise on the vectors while they warm up, in their standard deviations")  # fmt: skip
    group.add_argument("--frozen_noise", type=float, default=0.0, metavar="S",
                       help="noise on decoded codes once they are frozen, in their standard deviations")  # fmt: skip
    group.add_argument("--weight_average", type=float, metavar="D",
                       help="once codes are frozen, score and dump an exponential average of the weights, of decay D "
                       "per step: .998 is one of 500 steps (default: the last step's)")  # fmt: skip
    group.add_argument("--freeze_at", type=float, default=0.85,
                       help="part of the training after which codes stay fixed and their vectors train on "
                       "(1: never)")  # fmt: skip
    group.add_argument("--encoder_every", type=int, default=8, help="scorer steps per pass of the encoder")
    group.add_argument("--assign_every", type=int, default=8, help="scorer steps between assignments of codes")
    group.add_argument("--control", choices=[*UNQUANTIZED, "random_codes", "posthoc"],
                       help="train a rival for comparison, which leaves a record and no codes: the same model without "
                       "codes, its vectors trained to the end, or frozen when codes are; with codes drawn at "
                       "random; or quantized by k-means after training")  # fmt: skip
    group.add_argument("--matmul_precision", choices=["highest", "high", "medium"], default="medium",
                       help="of float32 products in training; ranking always has the highest")  # fmt: skip
    group.add_argument("--eval_every", type=int, default=1, help="epochs between rankings of valid")
    group.add_argument(
        "--patience", type=int, default=0, help="stop after so many epochs without a better MRR (0: off)"
    )

    group = parser.add_argument_group("run")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one); wins over --gpu")
    group.add_argument("--gpu", type=int, help="GPU number, -1 for the CPU")
    group.add_argument("--num_workers", type=int, default=0, help="CPU threads (0: all)")
    group.add_argument("--seed", type=int, default=0, help="seed of everything random")
    group.add_argument("--restore", action="store_true", help="continue the run of this name")
    group.add_argument("--overwrite", action="store_true", help="start anew over a run of this name")
    group.add_argument(
        "--dump_only", action="store_true", help="with --restore: no training, dump the best epoch so far"
    )
    group.add_argument("--no_test", action="store_true", help="leave the test split alone (for searches)")

    group = parser.add_argument_group("from codes, without training")
    group.add_argument("--eval_codes", type=Path, metavar="CODES.pt", help="rank from these integers alone")
    group.add_argument(
        "--checkpoint", type=Path, nargs="+", metavar="CK.pt",
        help="codebooks, relations and decoder for --eval_codes; the scores of several are added",
    )  # fmt: skip
    group.add_argument("--split", choices=["train", "valid", "test"], default="test", help="split to rank")
    group.add_argument("--metrics_out", type=Path, metavar="FILE.json", help="write the metrics there")
    group.add_argument("--shuffle_codes", action="store_true", help="control: give every entity another one's codes")
    group.add_argument("--predict", nargs=2, metavar=("HEAD", "RELATION"),
                       help="print the top tails; '~RELATION', quoted, asks for heads instead")  # fmt: skip
    group.add_argument(
        "--export_candidates", type=Path, metavar="FILE", help="ranked candidates of --split: .json or .npz"
    )
    group.add_argument(
        "--top", type=int, help="answers of --predict (default: 10) or --export_candidates (default: 20)"
    )

    return parser


def _levels(word: str) -> int | str:
    if word == AUTO:
        return word
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of levels, expected an integer or {AUTO}") from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed and checked flags; a wrong one ends with one line and exit code 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.recipe == AUTO and args.config:
        parser.error(f"--recipe {AUTO} and --config {args.config} both say what the settings are: give one of them")
    _check_flags(args, parser)
    given = _given(argv)
    from_elsewhere = bool(args.config or args.codes_from or args.eval_codes)
    args.recipe = args.recipe or (PAPER if from_elsewhere or given & _settings(parser) else AUTO)
    if args.recipe == AUTO:
        also = {"eval_every"} | (set() if given & {"epoch", "max_minutes"} else {"epoch"})
        also |= set() if "num_quantizers" in given or args.quantizer == "vq" else {"num_quantizers"}
        args.left_open = sorted((_settings(parser) | also) - given)
    return args


def _settings(parser: CommandParser) -> set[str]:
    """The flags that say how codes are learned."""
    groups = [group for group in parser._action_groups if group.title in SETTING_GROUPS]
    return {action.dest for group in groups for action in group._group_actions} - NO_SETTINGS


def _given(argv: list[str] | None) -> set[str]:
    """The flags that the command line itself names."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def take_open_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that ``--recipe auto`` leaves open, with the paper's values, once: they are closed then."""
    return {name: getattr(args, name) for name in vars(args).pop("left_open", ())}


def set_settings(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Give flags these values; one that does not fit with the others ends with one line and exit code 2."""
    vars(args).update(settings)
    _check_flags(args, build_parser())


def with_defaults(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a run, at their defaults where it has none: those that came to be after it, whose defaults must
    stand for what was done before."""
    defaults = {action.dest: action.default for action in build_parser()._actions if action.dest != "help"}
    return defaults | {name: value for name, value in stored.items() if value is not None or defaults.get(name) is None}


def idle_flags(args: argparse.Namespace) -> list[str]:
    """What is asked for and never comes to act, one line each; no error, since a recipe cut short may hold it."""
    notes = []
    given = bool(args.codes_from) or args.control == "random_codes"  # frozen from the start
    uncoded = args.control in ("unquantized", "posthoc")  # one long warm-up
    last = (args.epoch - 1) / args.epoch  # where the last epoch begins
    still = args.control == "frozen_vectors"
    warm = (last if args.warmup_epochs < 1 else args.epoch - 1) < args.warmup_epochs
    never = not given and not args.max_minutes and (last < args.freeze_at or (warm and not uncoded))
    if still and never:
        notes.append(f"--control frozen_vectors freezes nothing: the last of {args.epoch} epochs begins at {last:.2f}, "
                     f"--freeze_at is {args.freeze_at}, --warmup_epochs {args.warmup_epochs}")  # fmt: skip
    for flag in ["frozen_noise", "weight_average"]:
        if getattr(args, flag) and (never or (uncoded and flag == "frozen_noise")):
            why = f"the last of {args.epoch} epochs begins at {last:.2f}, --freeze_at is {args.freeze_at}"
            why = f"--control {args.control} has no codes to freeze" if uncoded and flag == "frozen_noise" else why
            why = "the warm-up lasts to the end" if warm and not uncoded else why
            notes.append(f"--{flag} {getattr(args, flag)} does nothing: {why}")
    if args.z_noise and (given or not (args.warmup_epochs or uncoded or still)):
        notes.append(f"--z_noise {args.z_noise} does nothing: it is for the warm-up, and this run has none")
    if not args.gcn_layers:
        default = build_parser().get_default
        for flag in ["gcn_dim", "gcn_drop", "opn", "act"]:
            value = getattr(args, flag)
            if value != default(flag) and not (flag == "gcn_dim" and value == args.init_dim):
                why = (
                    f"without --gcn_layers D is --init_dim {args.init_dim}" if flag == "gcn_dim" else "no graph layers"
                )
                notes.append(f"--{flag} {value} does nothing: {why}")
    if args.patience and args.control == "posthoc":
        notes.append(f"--patience {args.patience} does nothing: --control posthoc has no codes until its end")
    if args.text_emb is None and args.text_weight != build_parser().get_default("text_weight"):
        notes.append(f"--text_weight {args.text_weight} does nothing without --text_emb")
    return notes


def _check_flags(args: argparse.Namespace, parser: CommandParser) -> None:
    if args.batch < 2:
        parser.error(f"--batch {args.batch} is too small, expected 2 or more (batch norm)")
    at_least_one = ["seq_len", "num_code", "code_dim", "init_dim", "gcn_dim", "att_head", "epoch", "encoder_every",
                    "assign_every", "eval_every", "ensemble"]  # fmt: skip
    for flag in at_least_one:
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)} is too small, expected 1 or more")
    for flag in [*at_least_one, "batch", "tails_at_once", "num_negatives", "gcn_layers", "tf_layers", "num_quantizers"]:
        if getattr(args, flag) != AUTO and getattr(args, flag) >= 2**31:
            parser.error(f"--{flag} {getattr(args, flag)} is out of range, expected less than 2**31")
    for flag in ["lr", "encoder_lr", "l2", "z_noise", "frozen_noise", "vq_weight", "text_weight", "relation_weight"]:
        if getattr(args, flag) is not None and getattr(args, flag) > 1e9:
            parser.error(f"--{flag} {getattr(args, flag)} is out of range, expected 1e9 at most")
    if args.num_quantizers != AUTO and args.num_quantizers > MOST_LEVELS:
        parser.error(f"--num_quantizers {args.num_quantizers} is out of range, expected {MOST_LEVELS} at most")
    if args.text_neighbours is not None and (args.text_neighbours < 1 or "neighbours" not in (args.inputs or "")):
        parser.error(
            f"--text_neighbours {args.text_neighbours} must be 1 or more, with a source neighbours in --inputs"
        )
    for flag in ["gcn_layers", "tf_layers", "max_minutes", "l2", "patience", "num_workers", "vq_weight", "text_weight",
                 "seed", "warmup_epochs", "num_negatives", "z_noise", "frozen_noise",
                 "relation_weight", "tails_at_once"]:  # fmt: skip
        if not 0 <= getattr(args, flag) < float("inf"):
            parser.error(f"--{flag} {getattr(args, flag)} is out of range, expected 0 or more")
    for flag in ["gcn_drop", "lbl_smooth", "decoder_drop", "weight_average"]:
        if getattr(args, flag) is not None and not 0 <= getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)} is out of range, expected 0 <= {flag} < 1")
    if args.relation_weight and args.loss != "ce":  # several processes share a batch out by what its loss averages
        parser.error(f"--relation_weight {args.relation_weight} averages over triples: it goes with --loss ce alone")
    if args.relation_weight and args.decoder not in ("distmult", "complex"):
        parser.error(f"--relation_weight {args.relation_weight} goes with --decoder distmult or complex, whose scores "
                     f"are linear in the relation; --decoder {args.decoder} is not")  # fmt: skip
    if args.relation_weight and args.ensemble > 1:
        parser.error(f"--relation_weight {args.relation_weight} goes with a single model: leave --ensemble out")
    if args.num_negatives and args.loss != "ce":
        parser.error(f"--num_negatives {args.num_negatives} samples the softmax: it goes with --loss ce alone")
    if args.tails_at_once and args.loss != "ce":
        parser.error(f"--tails_at_once {args.tails_at_once} goes with --loss ce alone: --loss {args.loss} would take a "
                     "query's other tails for false ones")  # fmt: skip
    if args.teacher and (args.loss != "ce" or args.num_negatives):
        parser.error("--teacher goes with the exact softmax: --loss ce without --num_negatives")
    for flag, partner in (("teacher_weight", "teacher"), ("split", "eval_codes")):
        if getattr(args, flag) != parser.get_default(flag) and not getattr(args, partner):
            parser.error(f"--{flag} {getattr(args, flag)} says nothing without --{partner}: give both, or neither")
    if not 0 <= args.teacher_weight <= 1:
        parser.error(f"--teacher_weight {args.teacher_weight} is out of range, expected 0 to 1")
    if args.codes_from and (args.control or args.eval_codes):
        parser.error(f"--codes_from trains on given codes: leave --{'control' if args.control else 'eval_codes'} out")
    for flag in ["lr", "encoder_lr"]:
        if getattr(args, flag) is not None and not 0 < getattr(args, flag) < float("inf"):
            parser.error(f"--{flag} {getattr(args, flag)} is out of range, expected more than 0")
    if args.seed >= 2**63:
        parser.error(f"--seed {args.seed} is out of range, expected less than 2**63")
    if not 0 < args.freeze_at <= 1:
        parser.error(f"--freeze_at {args.freeze_at} is out of range, expected 0 < freeze_at <= 1")
    if args.control == "frozen_vectors" and args.freeze_at == 1:
        parser.error("--control frozen_vectors with --freeze_at 1 never freezes them: give --freeze_at below 1, or "
                     "--control unquantized")  # fmt: skip
    frozen_at_once = args.codes_from or args.control == "random_codes"
    for flag in ["frozen_noise", "weight_average"]:
        if getattr(args, flag) and args.freeze_at == 1 and not frozen_at_once:
            parser.error(f"--{flag} {getattr(args, flag)} begins where codes freeze, and --freeze_at 1 never freezes "
                         f"them: give --freeze_at below 1, or --{flag} 0")  # fmt: skip
    if args.quantizer == "vq":
        if args.num_quantizers not in (AUTO, 1):
            parser.error(f"--quantizer vq has one level, but --num_quantizers {args.num_quantizers} was given")
        args.num_quantizers = 1
    if args.num_quantizers != AUTO and args.num_quantizers < 1:
        parser.error(f"--num_quantizers {args.num_quantizers} is too small, expected 1 or more")
    if args.tf_layers and args.code_dim % args.att_head:
        parser.error(f"--code_dim {args.code_dim} is no multiple of --att_head {args.att_head}")
    one_warmup = args.codes_from or args.control in ("unquantized", "posthoc")
    if args.warmup_epochs >= args.epoch and not one_warmup:
        parser.error(f"--warmup_epochs {args.warmup_epochs} leaves no epoch after it, --epoch is {args.epoch}")
    if args.text_init and args.inputs:
        parser.error(f"--text_init and --inputs {args.inputs} both say what the encoder starts from: give one of them")
    starts = "--text_init" if args.text_init else f"--inputs {args.inputs}"
    if not args.text_emb and (args.text_init or {"text", "neighbours"} & set(re.split("[+,]", args.inputs or ""))):
        parser.error(f"{starts} starts from text embeddings: give --text_emb FILE.npy")
    if args.restore and args.overwrite:
        parser.error("--restore continues a run and --overwrite starts it anew: give one of them")
    if args.dump_only and not args.restore:
        parser.error("--dump_only dumps an existing run: give --restore with it")
    if args.eval_codes and not args.checkpoint:
        parser.error("--eval_codes needs --checkpoint CK.pt, the checkpoint of the run that dumped the codes")
    if args.top is not None and not (args.predict or args.export_candidates):
        parser.error(f"--top {args.top} says nothing without --predict or --export_candidates: leave it out")
    if args.top is not None and args.top < 1:
        parser.error(f"--top {args.top} is too small, expected 1 or more")
    for flag in ["checkpoint", "predict", "shuffle_codes", "metrics_out", "export_candidates", "top"]:
        if getattr(args, flag) and not args.eval_codes:
            parser.error(f"--{flag} goes with --eval_codes CODES.pt --checkpoint CK.pt")
    wanted = [flag for flag in ("predict", "metrics_out", "export_candidates") if getattr(args, flag)]
    if len(wanted) > 1:
        parser.error(f"--{wanted[0]} and --{wanted[1]} are two different questions: give one of them")

"""Stage 1: learn the codes of a knowledge graph, dump them, rank from them.

    python run_rq.py --dataset data/FB15k-237            train, dump codes_new/FB15k-237_16_1024_4_rq.pt, score the dump
    python run_rq.py --dataset D --eval_codes C.pt --checkpoint CK.pt           rank from the dumped integers alone
    python run_rq.py --dataset D --eval_codes C.pt --checkpoint CK.pt --predict HEAD RELATION       top tails by name
    python run_rq.py --dataset D --codes_from C.pt --name OTHER            another scorer of the same integers

The encoder of Eq. 1-3 is in model/RQGCN.py, the quantizer of Eq. 3 and 5 in model/RQCodebook.py, one training step
of Eq. 9 in model/trainer.py.
"""

from __future__ import annotations

import argparse
import glob
import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

from Class.codes import CodeFiles, code_files, code_stem, load_codes, load_entities, save_codes
from run_record import (
    ROOT,
    CommandParser,
    InputError,
    load_torch,
    make_record,
    only_run,
    read_json,
    run_command,
    seed_everything,
    sha256_file,
    write_json,
)

if TYPE_CHECKING:
    import torch

    from data.knowledge_graph import KnowledgeGraph
    from model.ensemble import JointScorer
    from model.RQGCN import RQGCN, CodeScorer
    from model.teacher import Trained
    from model.trainer import Trainer

AUTO = "auto"
EMBEDDINGS_LIMIT_BYTES = 2 * 2**30
# flags that may differ when a run is continued: they say where to write and compute, not what is trained
LIMITS = {"epoch", "max_minutes", "patience"}  # when to stop: may differ with --restore
NOT_COMPARED = {
    "out_dir", "checkpoint_dir", "overwrite", "restore", "no_test", "dump_only",
    "save_emb", "num_workers", "dataset", "text_emb", "device", "gpu", "graph_backend", "config",
    "teacher", "codes_from",
}  # fmt: skip


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
    parser = CommandParser(description=__doc__.split("\n")[0])

    group = parser.add_argument_group("data and outputs (default folders lie in the repository)")
    group.add_argument("--config", type=Path, metavar="FILE", action=FlagsFromFile,
                       help="text file of flags (see configs/); flags after it win over it")  # fmt: skip
    group.add_argument("--dataset", "--data", type=Path, metavar="DIR", help="graph folder (default: data/FB15k-237)")
    group.add_argument("--name", help="name of the run and its checkpoint (default: the stem of the codes file)")
    group.add_argument("--out_dir", type=Path, metavar="DIR", help="folder for codes and records (default: codes_new)")
    group.add_argument("--checkpoint_dir", type=Path, metavar="DIR", help="folder for {name}.pt (default: checkpoints)")
    group.add_argument(
        "--text_emb", type=Path, metavar="FILE.npy", help="text embeddings [M, T], row = entity id: Eq. 8"
    )
    group.add_argument(
        "--text_init", action="store_true", help="start the encoder from projected text embeddings too (--text_emb)"
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
    group.add_argument("--gcn_dim", type=int, default=200, help="D, width of the graph layers and of q_e")
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
        "--max_minutes", type=float, default=0, help="stop after this time, schedules fitted to it (0: off)"
    )
    group.add_argument("--batch", type=int, default=1024, help="B, distinct (h, r) queries per step")
    group.add_argument("--lr", type=float, default=0.0005, help="learning rate of Adam")
    group.add_argument("--encoder_lr", type=float, metavar="LR",
                       help="rate of the encoder (default: --lr times the root of --encoder_every)")  # fmt: skip
    group.add_argument("--lr_schedule", choices=["cosine", "constant"], default="cosine", help="course of the rate")
    group.add_argument("--l2", type=float, default=1e-8, help="weight decay of Adam")
    group.add_argument("--loss", choices=["ce", "bce"], default="ce", help="1-N loss: softmax or binary cross-entropy")
    group.add_argument("--num_negatives", type=int, default=0,
                       help="entities drawn per step for a sampled softmax, on large graphs (0: exact)")  # fmt: skip
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
    group.add_argument("--freeze_at", type=float, default=0.85,
                       help="part of the training after which codes stay fixed and their vectors train on")  # fmt: skip
    group.add_argument("--encoder_every", type=int, default=8, help="scorer steps per pass of the encoder")
    group.add_argument("--assign_every", type=int, default=8, help="scorer steps between assignments of codes")
    group.add_argument("--control", choices=["unquantized", "random_codes", "posthoc"],
                       help="train a rival for comparison, which leaves a record and no codes: the same model without "
                       "codes, with codes drawn at random, or quantized by k-means after training")  # fmt: skip
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
                       help="print the top tails; ~RELATION asks for heads instead")  # fmt: skip
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
    _check_flags(args, parser)
    return args


def _check_flags(args: argparse.Namespace, parser: CommandParser) -> None:
    if args.batch < 2:
        parser.error(f"--batch {args.batch} is too small, expected 2 or more (batch norm)")
    at_least_one = ["seq_len", "num_code", "code_dim", "init_dim", "gcn_dim", "att_head", "epoch", "encoder_every",
                    "assign_every", "eval_every", "ensemble"]  # fmt: skip
    for flag in at_least_one:
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)} is too small, expected 1 or more")
    for flag in ["gcn_layers", "tf_layers", "max_minutes", "l2", "patience", "num_workers", "vq_weight", "text_weight",
                 "seed", "warmup_epochs", "num_negatives", "z_noise", "frozen_noise",
                 "relation_weight"]:  # fmt: skip
        if not 0 <= getattr(args, flag) < float("inf"):
            parser.error(f"--{flag} {getattr(args, flag)} is out of range, expected 0 or more")
    for flag in ["gcn_drop", "lbl_smooth", "decoder_drop"]:
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
    if args.teacher and (args.loss != "ce" or args.num_negatives):
        parser.error("--teacher goes with the exact softmax: --loss ce without --num_negatives")
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
    if args.quantizer == "vq":
        if args.num_quantizers not in (AUTO, 1):
            parser.error(f"--quantizer vq has one level, but --num_quantizers {args.num_quantizers} was given")
        args.num_quantizers = 1
    if args.num_quantizers != AUTO and args.num_quantizers < 1:
        parser.error(f"--num_quantizers {args.num_quantizers} is too small, expected 1 or more")
    if args.tf_layers and args.code_dim % args.att_head:
        parser.error(f"--code_dim {args.code_dim} is no multiple of --att_head {args.att_head}")
    if args.warmup_epochs >= args.epoch and not args.codes_from:
        parser.error(f"--warmup_epochs {args.warmup_epochs} leaves no epoch with codes, --epoch is {args.epoch}")
    if args.text_init and not args.text_emb:
        parser.error("--text_init starts from text embeddings: give --text_emb FILE.npy")
    if args.restore and args.overwrite:
        parser.error("--restore continues a run and --overwrite starts it anew: give one of them")
    if args.dump_only and not args.restore:
        parser.error("--dump_only dumps an existing run: give --restore with it")
    if args.eval_codes and not args.checkpoint:
        parser.error("--eval_codes needs --checkpoint CK.pt, the checkpoint of the run that dumped the codes")
    if args.top is not None and args.top < 1:
        parser.error(f"--top {args.top} is too small, expected 1 or more")
    for flag in ["checkpoint", "predict", "shuffle_codes", "metrics_out", "export_candidates"]:
        if getattr(args, flag) and not args.eval_codes:
            parser.error(f"--{flag} goes with --eval_codes CODES.pt --checkpoint CK.pt")
    wanted = [flag for flag in ("predict", "metrics_out", "export_candidates") if getattr(args, flag)]
    if len(wanted) > 1:
        parser.error(f"--{wanted[0]} and --{wanted[1]} are two different questions: give one of them")


# ---------------------------------------------------------------- what both ways need


def choose_device(args: argparse.Namespace) -> torch.device:
    """--device, else --gpu, else CUDA where there is one. Raises InputError when it is not there."""
    import torch

    word = args.device
    if word is None:
        word = ("cuda" if torch.cuda.is_available() else "cpu") if args.gpu is None else (
            "cpu" if args.gpu < 0 else f"cuda:{args.gpu}")  # fmt: skip
    flag = "--device" if args.device else "--gpu"
    try:
        device = torch.device(word)
    except RuntimeError as error:
        raise InputError(f"{flag} {word} is no device, expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"{flag} {word} is not supported, expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"{flag}: {word} is not there, torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
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


def format_metrics(metrics: dict[str, Any]) -> str:
    """MRR, MR and Hits on one line, head and tail queries apart."""
    line = "  ".join(f"{key} {metrics[key]:.4f}" for key in ("mrr", "hits@1", "hits@3", "hits@10"))
    return (
        f"{line}  mr {metrics['mr']:.1f}  (mrr of head {metrics['head']['mrr']:.4f}, tail {metrics['tail']['mrr']:.4f})"
    )


# ---------------------------------------------------------------- train and dump


def choose_levels(args: argparse.Namespace, kg: KnowledgeGraph) -> None:
    """Put a number in the place of ``--num_quantizers auto`` and say why; names and record get the number."""
    from model.recommended import measured, recommend

    if args.num_quantizers != AUTO:
        return
    args.num_quantizers, reasons = recommend(kg.num_entities, args.seq_len, args.num_code, measured())
    for reason in reasons:
        print(f"--num_quantizers {AUTO}: {reason}")


def model_arguments(args: argparse.Namespace, text: torch.Tensor | None) -> dict[str, Any]:
    """The flags that shape RQGCN."""
    names = ["init_dim", "gcn_dim", "gcn_layers", "gcn_drop", "act", "seq_len", "num_code", "num_quantizers",
             "code_dim", "tf_layers", "att_head", "decoder", "decoder_drop", "graph_backend", "ensemble"]  # fmt: skip
    return {name: getattr(args, name) for name in names} | {
        "composition": args.opn,
        "text_dim": None if text is None else text.shape[1],
        "text_init": args.text_init,
        "codebook": {},
    }


def comparable(args: dict[str, Any], inputs: dict[str, str]) -> dict[str, Any]:
    """What must agree for a run to be continued: every flag that shapes training, and the files' hashes."""
    unused = {
        "eval_codes",
        "checkpoint",
        "split",
        "metrics_out",
        "shuffle_codes",
        "predict",
        "export_candidates",
        "top",
    }
    return {key: value for key, value in args.items() if key not in NOT_COMPARED | unused} | {
        f"file {name}": value for name, value in inputs.items()
    }


def check_existing(
    args: argparse.Namespace, checkpoint: Path, files: CodeFiles, now: dict[str, Any]
) -> dict[str, Any] | None:
    """The stored run to continue, or None to start anew. Refuses to write over a run of another name or arguments."""
    if args.overwrite:
        return None
    if files.record.exists():
        record = read_json(files.record, "record")
        written_by = record.get("name") if isinstance(record, dict) else None
        if written_by != args.name:
            raise InputError(
                f"{files.codes} comes from run {written_by}, as {files.record.name} says, this is {args.name}; "
                "give --out_dir or --overwrite"
            )
    if not checkpoint.exists():
        if args.restore:
            raise InputError(f"--restore: there is no {checkpoint}; leave --restore out to start the run")
        if files.record.exists() or files.codes.exists():
            raise InputError(f"{files.codes} exists, but no {checkpoint}; give --out_dir DIR or --overwrite")
        return None
    stored = load_checkpoint(checkpoint)
    then = stored["comparable"]
    free = LIMITS if args.restore else set()
    differing = sorted(key for key in (now.keys() | then.keys()) - free if now.get(key) != then.get(key))
    if differing:
        shown = ", ".join(f"{key} (there {then.get(key)}, here {now.get(key)})" for key in differing[:3])
        hint = "give the same flags" if args.restore else "give another --name and --out_dir, or --overwrite"
        raise InputError(f"{checkpoint} comes from other arguments: {shown}; {hint}")
    return stored


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this command; InputError when the file is something else."""
    from model.stored import fault_of

    stored = load_torch(path, "checkpoint")
    fault = fault_of(stored)
    if fault is not None:
        raise InputError(f"checkpoint file {path} is none of run_rq.py's, or damaged: {fault}")
    return stored


class Prepared(NamedTuple):
    """What a run of stage 1 is made of."""

    kg: KnowledgeGraph
    text: torch.Tensor | None
    model: RQGCN
    files: CodeFiles
    checkpoint: Path
    inputs: dict[str, str]
    plain: dict[str, Any]
    codes: torch.Tensor | None  # those of --codes_from


def prepare(args: argparse.Namespace, device: torch.device) -> Prepared:
    """Read the inputs, name the outputs, build the model."""
    from model.message_passing import resolve_backend
    from model.precision import keep_freed_memory
    from model.RQGCN import RQGCN

    keep_freed_memory()
    kg = load_graph(args)
    text = load_text(args.text_emb, kg.num_entities)
    choose_levels(args, kg)
    stem = code_stem(kg.name, args.seq_len, args.num_code, args.num_quantizers, args.quantizer)
    if args.control or args.codes_from:
        stem = f"{stem}_{args.control or 'scorer'}"
    args.name = args.name or stem
    if args.codes_from:
        stem = args.name  # there may be several scorers of the same codes
    if Path(args.name).name != args.name:
        raise InputError(f"--name {args.name} must be a plain file name; folders go to --checkpoint_dir and --out_dir")
    files = code_files(args.out_dir or ROOT / "codes_new", stem)
    checkpoint = (args.checkpoint_dir or ROOT / "checkpoints") / f"{args.name}.pt"
    if checkpoint.resolve() == files.codes.resolve():
        raise InputError(
            f"codes and checkpoint would both be {checkpoint}; give --out_dir and --checkpoint_dir two folders"
        )
    inputs = dict(kg.input_hashes)
    if args.text_emb is not None:
        inputs[args.text_emb.name] = sha256_file(args.text_emb)
    for place, teacher in enumerate(args.teacher or (), start=1):
        inputs[f"teacher {place}"] = sha256_file(teacher)
    codes = None
    if args.codes_from is not None:
        codes = load_given_codes(args, kg)
        inputs["codes"] = sha256_file(args.codes_from)
    plain = {key: as_plain(value) for key, value in vars(args).items()}
    seed_everything(args.seed)
    try:
        model = RQGCN(kg.num_entities, kg.num_relations, **model_arguments(args, text))
    except ValueError as error:
        raise InputError(f"these flags do not fit together: {error}") from error
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, on {device}, "
        f"neighbours summed by {resolve_backend(args.graph_backend, device)}"
    )

    return Prepared(kg, text, model, files, checkpoint, inputs, plain, codes)


def as_plain(value: Any) -> Any:
    """A flag's value as records and checkpoints hold it."""
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return str(value) if isinstance(value, Path) else value


def load_given_codes(args: argparse.Namespace, kg: KnowledgeGraph) -> torch.Tensor:
    """The integers [M, L, Q] of --codes_from. Raises InputError where they are not of this graph or of these flags."""
    codes = load_codes(args.codes_from, kg.num_entities, args.num_code)
    if list(codes.shape[1:]) != [args.seq_len, args.num_quantizers]:
        raise InputError(
            f"--codes_from {args.codes_from} has [L, Q] = {list(codes.shape[1:])}, the flags say "
            f"{[args.seq_len, args.num_quantizers]}: give --seq_len {codes.shape[1]} --num_quantizers {codes.shape[2]}"
        )
    check_entities(args.codes_from, kg)
    return codes


def check_entities(codes: Path, kg: KnowledgeGraph) -> None:
    """InputError where the names beside the codes are not the graph's entities."""
    names = codes.with_suffix(".entities.txt")
    if names.exists() and load_entities(names) != kg.entities:
        raise InputError(
            f"{names} lists other entities than --dataset {kg.name}; take the data set of the codes' record"
        )


def load_teachers(
    args: argparse.Namespace, kg: KnowledgeGraph, text: torch.Tensor | None, device: torch.device
) -> list[Trained]:
    """The models of --teacher, each with its own codes."""
    from model.teacher import trained_model

    models = []
    for path in args.teacher or ():
        stored = load_checkpoint(path)
        if stored["best"] is None:
            raise InputError(f"--teacher {path} has no scored epoch yet; train on with --restore")
        try:
            models.append(trained_model(stored["config"], stored["best"], kg, text, device))
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"--teacher {path} cannot be asked: {reason}") from error
    return models


def train(args: argparse.Namespace) -> None:
    """Train RQGCN, dump codes, embeddings and names of the best epoch, rank from the dump, write the record.

    Under torchrun each process runs this; the first one alone prints and writes.
    """
    from model.data_parallel import World
    from model.trainer import Trainer, TrainSettings

    device = choose_device(args)
    world = World.start(device)
    with world.quiet(), ExitStack() as locks:
        with world.together():
            kg, text, model, files, checkpoint, inputs, plain, codes = prepare(args, device)
            teachers = load_teachers(args, kg, text, device)
            if world.first:
                locks.enter_context(only_run(checkpoint.with_suffix(".lock")))
                locks.enter_context(only_run(files.codes.with_suffix(".lock")))
                for path in (checkpoint, *files):
                    for killed in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                        killed.unlink(missing_ok=True)  # what a kill in the middle of writing left
            now = comparable(plain, inputs)
            stored = check_existing(args, checkpoint, files, now)
        settings = TrainSettings(**{key: getattr(args, key) for key in TrainSettings.__dataclass_fields__})
        trainer = Trainer(
            kg, model, settings, checkpoint, model_arguments(args, text), now, text, device, world=world, codes=codes,
            teachers=teachers,
        )  # fmt: skip
        if stored is not None:
            with world.together():
                continue_from(trainer, stored)
        if not args.dump_only:
            fit_until_stopped(trainer, checkpoint)
        world.close()
        if not world.first:
            return
        if trainer.best is None:
            wanted = "scored epoch" if args.control else "epoch with codes"
            raise InputError(f"{checkpoint.name} has no {wanted} yet; train on with --restore")
        if args.control:
            dump_control(args, kg, trainer, files, plain, inputs)
            return
        if codes is not None:
            dump_scorer(args, kg, trainer, files, plain, inputs, codes)
            return
        dump(args, kg, trainer, files, plain, inputs)
    print(
        f"next: python run_rq.py --dataset {args.dataset or 'data/FB15k-237'} --eval_codes {files.codes} "
        f"--checkpoint {checkpoint}\n"
        f"      python Class/gen_fb_data_rq.py --codes {files.codes}"
    )


def continue_from(trainer: Trainer, stored: dict[str, Any]) -> None:
    """Put the trainer where ``stored`` left it; InputError when that is another model's."""
    try:
        trainer.restore(stored)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"checkpoint {trainer.checkpoint} does not hold this model: {reason}; use --overwrite"
        ) from error
    print(f"continuing {trainer.checkpoint.name} after epoch {trainer.epoch}")


def fit_until_stopped(trainer: Trainer, checkpoint: Path) -> None:
    """Train; on Ctrl-C or SIGTERM say what is saved and how to go on, and leave with 130 or 143."""
    world = trainer.world
    handled = [signal.SIGTERM] if world.size == 1 else [signal.SIGTERM, signal.SIGINT]
    previous = {number: signal.signal(number, world.interrupt) for number in handled}
    try:
        trainer.fit()
        if world.stop_signal:
            world.stop()
    except (KeyboardInterrupt, SystemExit) as stop:
        if trainer.saved_epoch:
            where = (
                f"epoch {trainer.saved_epoch} is saved in {checkpoint}; --restore goes on, --restore --dump_only dumps"
            )
        else:
            where = "no epoch was finished, nothing is saved"
        print(f"stopped: {where}", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, SystemExit) else 130)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def dump(
    args: argparse.Namespace,
    kg: KnowledgeGraph,
    trainer: Trainer,
    files: CodeFiles,
    plain: dict[str, Any],
    inputs: dict[str, str],
) -> None:
    """Write the best epoch's codes and score what was written, from the file."""
    from model.collisions import TooFewCodes
    from model.RQCodebook import code_perplexity, code_usage, collisions, entropy_bits
    from model.RQGCN import scorer_of
    from model.trainer import mrr_as_trained

    assert trainer.best is not None
    start = time.monotonic()
    try:
        changed = trainer.resolve_collisions()
        print(f"collision pass: {changed} entities got a code of their own")
    except TooFewCodes as error:
        print(f"warning: some entities share their code: {error}", file=sys.stderr)
    best, device = trainer.best, trainer.device
    scorer, relations = scorer_of(trainer.config, best, device)
    codes = best["codes"].cpu()
    embeddings = None
    if args.save_emb or codes.shape[0] * codes.shape[1] * args.code_dim * 4 <= EMBEDDINGS_LIMIT_BYTES:
        embeddings = scorer.rq_codebook.decode_from_codes(codes.to(device)).detach()
    else:
        print(f"{files.embeddings.name} would exceed 2 GiB and is left out; --save_emb writes it")
    written = save_codes(files, codes.squeeze(-1) if args.quantizer == "vq" else codes, kg.entities, embeddings)
    codes = load_codes(files.codes, kg.num_entities, args.num_code).to(device)

    metrics = score_codes(args, kg, scorer, relations, codes)
    metrics["mrr_before_collision_pass"] = mrr_as_trained(best)
    record = stage_record(args, kg, trainer, plain, inputs, time.monotonic() - start) | metrics | {
        "shape": list(codes.shape),
        "outputs": written,
        "codes": {
            "usage": code_usage(codes, args.num_code).tolist(),
            "perplexity": code_perplexity(codes, args.num_code).tolist(),
            "collisions": collisions(codes),
            "entropy_bits": entropy_bits(codes),
        },
    }  # fmt: skip
    write_json(record, files.record)
    print(
        f"wrote {', '.join([*sorted(written), files.record.name])} to {files.codes.parent} "
        f"(best epoch {best['epoch']} of {trainer.epoch})"
    )
    print_scores(metrics)
    print(
        f"codes: usage {' '.join(f'{x:.3f}' for x in record['codes']['usage'])}, "
        f"{record['codes']['collisions']} entities share their code with another, "
        f"entropy {record['codes']['entropy_bits']:.2f} bits"
    )


def score_codes(
    args: argparse.Namespace, kg: KnowledgeGraph, scorer: CodeScorer, relations: torch.Tensor, codes: torch.Tensor
) -> dict[str, Any]:
    """What a record says of integers: valid, its MRR by levels decoded; without --no_test, test and its control."""
    from model.evaluation import evaluate_codes, shuffled

    def rank(split: str, **how: Any) -> dict[str, Any]:
        return evaluate_codes(scorer, relations, codes, kg, split, **how)

    metrics: dict[str, Any] = {"valid": rank("valid")}
    metrics["valid_mrr_by_levels"] = [rank("valid", levels=level)["mrr"] for level in range(1, args.num_quantizers)] + [
        metrics["valid"]["mrr"]
    ]
    if not args.no_test:
        metrics["test"] = rank("test")
        metrics["test_shuffled_codes"] = evaluate_codes(scorer, relations, shuffled(codes, args.seed), kg, "test")
    return metrics


def print_scores(metrics: dict[str, Any]) -> None:
    """What ``score_codes`` found."""
    print(f"valid from the dumped codes: {format_metrics(metrics['valid'])}")
    print("valid MRR by levels decoded: " + " ".join(f"{value:.4f}" for value in metrics["valid_mrr_by_levels"]))
    if "test" in metrics:
        print(f"test from the dumped codes:  {format_metrics(metrics['test'])}")
        print(f"control, shuffled codes:     {format_metrics(metrics['test_shuffled_codes'])}")


def dump_scorer(
    args: argparse.Namespace,
    kg: KnowledgeGraph,
    trainer: Trainer,
    files: CodeFiles,
    plain: dict[str, Any],
    inputs: dict[str, str],
    codes: torch.Tensor,
) -> None:
    """Score the integers of --codes_from with what was trained for them, and write the record; they have a file."""
    from model.RQGCN import scorer_of

    assert trainer.best is not None
    start = time.monotonic()
    scorer, relations = scorer_of(trainer.config, trainer.best, trainer.device)
    metrics = score_codes(args, kg, scorer, relations, codes.to(trainer.device))
    record = stage_record(args, kg, trainer, plain, inputs, time.monotonic() - start)
    write_json(record | metrics | {"shape": list(codes.shape)}, files.record)
    print(f"wrote {files.record} (best epoch {record['best_epoch']} of {trainer.epoch}), no codes: they were given")
    print_scores(metrics)
    print(
        f"next: python run_rq.py --dataset {args.dataset or 'data/FB15k-237'} --eval_codes {args.codes_from} "
        f"--checkpoint {trainer.checkpoint}"
    )


def stage_record(
    args: argparse.Namespace,
    kg: KnowledgeGraph,
    trainer: Trainer,
    plain: dict[str, Any],
    inputs: dict[str, str],
    more_seconds: float,
) -> dict[str, Any]:
    """What the record of every run of this command holds beside its metrics."""
    assert trainer.best is not None
    return make_record(
        plain, inputs, trainer.seconds + more_seconds, trainer.device, name=args.name, dataset=kg.name,
        best_epoch=trainer.best["epoch"], epochs=trainer.epoch, world_size=trainer.world.started,
        history=trainer.history,
        parameters={
            "model": sum(p.numel() for p in trainer.model.parameters()),
            "behind_codes": sum(p.numel() for p in trainer.model.scorer.parameters())
            + trainer.best["relations"].numel(),
        },
    )  # fmt: skip


def dump_control(
    args: argparse.Namespace,
    kg: KnowledgeGraph,
    trainer: Trainer,
    files: CodeFiles,
    plain: dict[str, Any],
    inputs: dict[str, str],
) -> None:
    """Score a rival's best epoch and write its record alone: what it has of codes is never saved as a graph's codes."""
    start = time.monotonic()
    metrics = {split: trainer.score_best(split) for split in ("valid",) + ("test",) * (not args.no_test)}
    record = stage_record(args, kg, trainer, plain, inputs, time.monotonic() - start)
    write_json(record | metrics | {"control": args.control}, files.record)
    print(f"wrote {files.record}: {args.control} (best epoch {record['best_epoch']} of {trainer.epoch}), no codes")
    for split, found in metrics.items():
        print(f"{split}: {format_metrics(found)}")


# ---------------------------------------------------------------- from codes


def load_scored_codes(
    args: argparse.Namespace, kg: KnowledgeGraph, device: torch.device
) -> tuple[CodeScorer | JointScorer, torch.Tensor, torch.Tensor]:
    """(scorer, relations [2R, D], codes [M, L, Q]) from --checkpoint and --eval_codes, checked against each other."""
    import torch

    from model.ensemble import JointScorer
    from model.evaluation import shuffled
    from model.trainer import codes_hash

    loaded = [load_scorer(path, kg, device) for path in args.checkpoint]
    codebook = loaded[0].scorer.rq_codebook
    codes = load_codes(args.eval_codes, kg.num_entities, codebook.num_codes)
    for path, one in zip(args.checkpoint, loaded, strict=True):
        there = one.scorer.rq_codebook
        wanted = [one.seq_len, there.num_quantizers]
        if list(codes.shape[1:]) != wanted:
            raise InputError(
                f"--eval_codes {args.eval_codes} has [L, Q] = {list(codes.shape[1:])}, the checkpoint {path.name} "
                f"expects {wanted}"
            )
        if there.num_codes != codebook.num_codes:
            raise InputError(
                f"--checkpoint {path} has {there.num_codes} codes a level, {args.checkpoint[0].name} has "
                f"{codebook.num_codes}; give checkpoints of the same codes"
            )
    check_entities(args.eval_codes, kg)
    for path, one in zip(args.checkpoint, loaded, strict=True):
        if codes_hash(codes) != one.codes_sha256:
            print(f"warning: {args.eval_codes} are not the codes of {path}'s best epoch", file=sys.stderr)
    if args.shuffle_codes:
        codes = shuffled(codes, args.seed)
    if len(loaded) == 1:
        return loaded[0].scorer, loaded[0].relations, codes.to(device)
    joint = JointScorer([one.scorer for one in loaded]).eval()
    return joint, torch.cat([one.relations for one in loaded], dim=1), codes.to(device)


class LoadedScorer(NamedTuple):
    """What a checkpoint has to rank with."""

    scorer: CodeScorer
    relations: torch.Tensor
    seq_len: int
    codes_sha256: str | None  # of the codes that it was scored with


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
    return LoadedScorer(scorer, relations, seq_len, stored["best"].get("codes_sha256"))


def eval_codes(args: argparse.Namespace) -> None:
    """Rank --split from the integers of --eval_codes alone; no encoder is built."""
    from model.evaluation import evaluate_codes

    device = choose_device(args)
    kg = load_graph(args)
    scorer, relations, codes = load_scored_codes(args, kg, device)
    if args.predict:
        predict(args, kg, scorer, relations, codes)
        return
    if args.export_candidates:
        export_candidates(args, kg, scorer, relations, codes)
        return
    metrics = evaluate_codes(scorer, relations, codes, kg, args.split)
    print(
        f"{args.split} from {'shuffled codes of ' if args.shuffle_codes else ''}{args.eval_codes}: "
        f"{format_metrics(metrics)}"
    )
    if "unseen" in metrics:
        print(
            f"  with an entity unseen in training ({metrics['unseen']['count']} queries): "
            f"{format_metrics(metrics['unseen'])}"
        )
    if args.metrics_out:
        write_json(metrics, args.metrics_out)
        print(f"wrote {args.metrics_out}")


def export_candidates(
    args: argparse.Namespace, kg: KnowledgeGraph, scorer: CodeScorer | JointScorer,
    relations: torch.Tensor, codes: torch.Tensor,
) -> None:  # fmt: skip
    """Write the --top candidates of every query of --split, both directions, for Class/gen_lp_data_rq.py.

    Other answers known from train and valid are left out of the lists; the truth's own rank filters all splits.
    """
    from Class.candidates import check_ending, top_candidates, write_candidates

    check_ending(args.export_candidates)
    found = top_candidates(
        scorer, relations, codes, kg, args.split, count=args.top or 20, filter_splits=("train", "valid")
    )
    write_candidates(
        args.export_candidates,
        found,
        kg,
        model=" + ".join(path.name for path in args.checkpoint),
        codes=args.eval_codes.name,
        split=args.split,
    )
    print(
        f"wrote {args.export_candidates}: {found.ids.shape[1]} candidates for each of {len(found.ids)} queries "
        f"of {args.split}"
    )
    print(
        "next, with one such file for valid and one for test: "
        f"python Class/gen_lp_data_rq.py --candidates VALID TEST --codes {args.eval_codes}"
    )


def predict(
    args: argparse.Namespace, kg: KnowledgeGraph, scorer: CodeScorer | JointScorer,
    relations: torch.Tensor, codes: torch.Tensor,
) -> None:  # fmt: skip
    """Print the --top tails of (HEAD, RELATION), known answers marked with their split."""
    import torch

    from data.knowledge_graph import find_name

    head_word, relation_word = args.predict
    head = find_name(head_word, kg.entities, [kg.labels], "entity", "--predict")
    inverse = relation_word.startswith("~")
    relation_name = relation_word.removeprefix("~")
    relation = find_name(relation_name, kg.relations, [kg.relation_labels], "relation", "--predict")
    relation += kg.num_relations * inverse
    scorer.eval()
    with torch.no_grad():
        q_all = scorer.entity_vectors_from_codes(codes)
        scores = scorer.scores(q_all[[head]], relations[[relation]], q_all)[0]
    known: dict[int, str] = {}
    for split in ("test", "valid", "train"):
        answers = kg.answers(split)
        row = int(answers.rows([head], [relation])[0])
        if row >= 0:
            known |= dict.fromkeys(answers.targets[answers.indptr[row] : answers.indptr[row + 1]].tolist(), split)
    top = scores.topk(min(args.top or 10, len(scores)))
    print(f"{kg.labels[head]} -- {relation_word} -->")
    for place, (score, tail) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), start=1):
        mark = f"  known ({known[tail]})" if tail in known else ""
        print(f"{place:3d}. {score:9.4f}  {kg.labels[tail]} [{kg.entities[tail]}]{mark}")


def main() -> None:
    from model.sizes import sizes_named

    args = parse_args()
    with sizes_named(args):
        if not args.eval_codes:
            train(args)
        elif os.environ.get("RANK", "0") == "0":  # ranking from codes is one process's work, under torchrun too
            eval_codes(args)


if __name__ == "__main__":
    run_command(main)

"""Stage 1: learn the codes of a knowledge graph, dump them, rank from them.

    python run_rq.py --dataset data/FB15k-237            train, dump codes_new/FB15k-237_4_1024_4_rq.pt, score the dump
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
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from Class.codes import CodeFiles, code_files, code_stem, load_codes, save_codes
from common.errors import InputError, run_command
from common.files import ROOT, exclusive_lock, read_json, sha256_file, write_json
from common.record import make_record, seed_everything
from model.flags import AUTO, idle_flags, parse_args, set_settings, take_open_settings, with_defaults
from model.from_codes import eval_codes, format_metrics
from model.inputs import choose_device, load_checkpoint, load_given_codes, load_graph, load_text

if TYPE_CHECKING:
    import torch

    from data.knowledge_graph import KnowledgeGraph
    from model.RQGCN import RQGCN, CodeScorer
    from model.trainer import Trainer

EMBEDDINGS_LIMIT_BYTES = 2 * 2**30
LIMITS = {"epoch", "max_minutes", "patience"}  # when to stop: may differ with --restore
# flags that may always differ when a run is continued: they say where to write and compute, not what is trained
NOT_COMPARED = {
    "out_dir", "checkpoint_dir", "overwrite", "restore", "no_test", "dump_only",
    "save_emb", "num_workers", "dataset", "text_emb", "device", "gpu", "graph_backend", "config",
    "teacher", "codes_from", "recipe",
}  # fmt: skip


# ---------------------------------------------------------------- train and dump


def choose_settings(args: argparse.Namespace, kg: KnowledgeGraph) -> None:
    """Put measured values in the place of the settings that ``--recipe auto`` leaves open, and say which and why."""
    from model.recommended import measured, recipe

    standing = take_open_settings(args)
    if not standing:
        if not args.config:
            print(f"--recipe {args.recipe}: settings that are not given are the paper's; {AUTO} takes measured ones")
        return
    if args.teacher:
        standing.pop("num_negatives", None)  # a teacher answers for all entities, however many there are
    found = recipe(kg.num_entities, args.text_emb is not None, standing, measured(), args.quantizer == "vq")
    for reason in found.reasons:
        print(f"--recipe {AUTO}: {reason}")
    set_settings(args, found.settings)


def choose_levels(args: argparse.Namespace, kg: KnowledgeGraph) -> None:
    """Put a number in the place of ``--num_quantizers auto`` and say why; names and record get the number."""
    from model.recommended import measured, recommend

    if args.num_quantizers != AUTO:
        return
    if args.codes_from is not None:
        args.num_quantizers = load_codes(args.codes_from).shape[2]
        return
    args.num_quantizers, reasons = recommend(kg.num_entities, args.seq_len, args.num_code, measured())
    for reason in reasons:
        print(f"--num_quantizers {AUTO}: {reason}")


def model_arguments(args: argparse.Namespace, text: torch.Tensor | None) -> dict[str, Any]:
    """The flags that shape RQGCN."""
    names = ["init_dim", "gcn_dim", "gcn_layers", "gcn_drop", "act", "seq_len", "num_code", "num_quantizers",
             "code_dim", "tf_layers", "att_head", "decoder", "decoder_drop", "graph_backend", "ensemble",
             "inputs", "text_neighbours"]  # fmt: skip
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
    meant = with_defaults(then)
    differing = sorted(key for key in (now.keys() | then.keys()) - free if now.get(key) != meant.get(key))
    if differing:
        shown = ", ".join(f"{key} (there {meant.get(key)}, here {now.get(key)})" for key in differing[:3])
        goes_on = "--restore to go on, " if set(differing) <= LIMITS else ""
        hint = "give the same flags" if args.restore else f"give {goes_on}another --name and --out_dir, or --overwrite"
        raise InputError(f"{checkpoint} comes from other arguments: {shown}; {hint}")
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

    kg = load_graph(args)
    choose_settings(args, kg)
    if args.control == "frozen_vectors" and args.gcn_layers:
        raise InputError(
            f"--control frozen_vectors goes without graph layers, --gcn_layers is {args.gcn_layers}: relations train "
            "on and would move its vectors; give --recipe auto --gcn_layers 0, or --control unquantized"
        )
    if not args.num_negatives:  # a sampled step has no block that is worth it, and sizes that splinter the heap
        keep_freed_memory()
    text = load_text(args.text_emb, kg.num_entities)
    choose_levels(args, kg)
    for note in idle_flags(args):
        print(f"note: {note}")
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
    if args.codes_from is not None and files.codes.exists():
        raise InputError(f"{files.codes} has a record, --codes_from would write over it; give another --name")
    if args.codes_from is not None and checkpoint.resolve() == args.codes_from.resolve():
        raise InputError(f"--codes_from {args.codes_from} is where this run's checkpoint goes; give another --name")
    if checkpoint.resolve() in [teacher.resolve() for teacher in args.teacher or ()]:
        raise InputError(f"--teacher {checkpoint} is the checkpoint that this run writes; give another --name")
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
            run = prepare(args, device)
            files, checkpoint = run.files, run.checkpoint
            if world.first:
                locks.enter_context(exclusive_lock(checkpoint.with_suffix(".lock")))
                locks.enter_context(exclusive_lock(files.codes.with_suffix(".lock")))
                for path in (checkpoint, *files):
                    for killed in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                        killed.unlink(missing_ok=True)  # what a kill in the middle of writing left
            now = comparable(run.plain, run.inputs)
            stored = check_existing(args, checkpoint, files, now)
        settings = TrainSettings(**{key: getattr(args, key) for key in TrainSettings.__dataclass_fields__})
        trainer = Trainer(
            run.kg, run.model, settings, checkpoint, model_arguments(args, run.text), now, run.text, device,
            world=world, codes=run.codes,
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
            dump_control(args, run, trainer)
            return
        if run.codes is not None:
            dump_scorer(args, run, trainer)
            return
        dump(args, run, trainer)
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
        reason = (str(error) or type(error).__name__).splitlines()[0]
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


def dump(args: argparse.Namespace, run: Prepared, trainer: Trainer) -> None:
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
    best, device, files = trainer.best, trainer.device, run.files
    scorer, relations = scorer_of(trainer.config, best, device)
    codes = best["codes"].cpu()
    embeddings = None
    if args.save_emb or codes.shape[0] * codes.shape[1] * args.code_dim * 4 <= EMBEDDINGS_LIMIT_BYTES:
        embeddings = scorer.rq_codebook.decode_from_codes(codes.to(device)).detach()
    else:
        print(f"{files.embeddings.name} would exceed 2 GiB and is left out; --save_emb writes it")
    written = save_codes(files, codes.squeeze(-1) if args.quantizer == "vq" else codes, run.kg.entities, embeddings)
    if embeddings is None:
        files.embeddings.unlink(missing_ok=True)  # those of the codes that were here before
    codes = load_codes(files.codes, run.kg.num_entities, args.num_code).to(device)

    metrics = score_codes(args, run.kg, scorer, relations, codes)
    metrics["mrr_before_collision_pass"] = mrr_as_trained(best)
    record = stage_record(args, run, trainer, time.monotonic() - start) | metrics | {
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


def dump_scorer(args: argparse.Namespace, run: Prepared, trainer: Trainer) -> None:
    """Score the integers of --codes_from with what was trained for them, and write the record; they have a file."""
    from model.RQGCN import scorer_of

    assert trainer.best is not None and run.codes is not None
    start = time.monotonic()
    scorer, relations = scorer_of(trainer.config, trainer.best, trainer.device)
    metrics = score_codes(args, run.kg, scorer, relations, run.codes.to(trainer.device))
    record = stage_record(args, run, trainer, time.monotonic() - start)
    write_json(record | metrics | {"shape": list(run.codes.shape)}, run.files.record)
    print(f"wrote {run.files.record} (best epoch {record['best_epoch']} of {trainer.epoch}), no codes: they were given")
    print_scores(metrics)
    print(
        f"next: python run_rq.py --dataset {args.dataset or 'data/FB15k-237'} --eval_codes {args.codes_from} "
        f"--checkpoint {trainer.checkpoint}"
    )


def stage_record(args: argparse.Namespace, run: Prepared, trainer: Trainer, more_seconds: float) -> dict[str, Any]:
    """What the record of every run of this command holds beside its metrics."""
    assert trainer.best is not None
    return make_record(
        run.plain, run.inputs, trainer.seconds + more_seconds, trainer.device,
        name=args.name, dataset=run.kg.name,
        best_epoch=trainer.best["epoch"], epochs=trainer.epoch, world_size=trainer.world.started,
        history=trainer.history, trained_on=trainer.trained_on,
        parameters={
            "model": sum(p.numel() for p in trainer.model.parameters()),
            "behind_codes": sum(p.numel() for p in trainer.model.scorer.parameters())
            + trainer.best["relations"].numel(),
        },
    )  # fmt: skip


def dump_control(args: argparse.Namespace, run: Prepared, trainer: Trainer) -> None:
    """Score a rival's best epoch and write its record alone: what it has of codes is never saved as a graph's codes."""
    start = time.monotonic()
    metrics = {split: trainer.score_best(split) for split in ("valid",) + ("test",) * (not args.no_test)}
    record = stage_record(args, run, trainer, time.monotonic() - start)
    write_json(record | metrics | {"control": args.control}, run.files.record)
    print(f"wrote {run.files.record}: {args.control} (best epoch {record['best_epoch']} of {trainer.epoch}), no codes")
    for split, found in metrics.items():
        print(f"{split}: {format_metrics(found)}")


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

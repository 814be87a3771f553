"""Stage 1: learn the codes of a knowledge graph, dump them, rank from them.

    python run_rq.py --dataset data/FB15k-237            train, dump codes_new/FB15k-237_4_1024_4_rq.pt, score the dump
    python run_rq.py --dataset D --eval_codes C.pt --checkpoint CK.pt           rank from the dumped integers alone
    python run_rq.py --dataset D --eval_codes C.pt --checkpoint CK.pt --predict HEAD RELATION       top tails by name
    python run_rq.py --dataset D --eval_codes C.pt --checkpoint CK.pt --encode NEW.txt --encoded OUT.pt    new entities

The flags are in common/config.py, the encoder of Eq. 1-3 in model/RQGCN.py, the quantizer of Eq. 3 and 5 in
model/RQCodebook.py, one training step of Eq. 9 in model/trainer.py.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import signal
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from Class.codes import CodeFiles, code_files, code_stem
from common.config import AUTO, BASELINES, Config, parse_config
from common.errors import InputError, run_command
from common.files import ROOT, command, exclusive_lock, load_torch, read_json, save_torch, sha256_file
from common.record import seed_everything
from model.from_codes import eval_codes
from model.inputs import check_files, choose_device, load_graph, load_text
from model.sizes import N3_TRIAL, N3_WEIGHTS, explain_oom, with_sizes

if TYPE_CHECKING:
    import torch

    from data.knowledge_graph import KnowledgeGraph
    from model.data_parallel import World
    from model.RQGCN import RQGCN
    from model.tracking import Log
    from model.trainer import Trainer


class Inputs(NamedTuple):
    """What a run reads and where it writes."""

    config: Config  # with its name and sizes; n3 is "auto" until valid has chosen it
    kg: KnowledgeGraph
    text: torch.Tensor | None  # [M, T]
    hashes: dict[str, str]  # file -> sha256
    model_args: dict[str, Any]  # of RQGCN
    files: CodeFiles
    checkpoint: Path


def read_inputs(config: Config) -> Inputs:
    """Read graph and texts, choose the sizes that are "auto", name the outputs."""
    kg = load_graph(config)
    for note in config.unused():
        print(f"note: {note}")
    config = with_sizes(config, kg.num_entities, kg.num_relations, len(kg.train), n3_by_valid=len(kg.valid) > 0)
    return inputs_of(config, kg, load_text(config.text_emb, kg.num_entities, kg.entities))


def inputs_of(config: Config, kg: KnowledgeGraph, text: torch.Tensor | None) -> Inputs:
    """The inputs of a run whose sizes are chosen, and the names of its outputs."""
    from model.RQGCN import model_arguments

    hashes = dict(kg.input_hashes)
    if config.text_emb is not None:
        hashes[config.text_emb.name] = sha256_file(config.text_emb)
    stem = code_stem(kg.name, config.seq_len, config.num_code, config.num_quantizers, config.quantizer)
    if config.quantizer in BASELINES:
        stem = f"{stem}_{BASELINES[config.quantizer]}"
    config = dataclasses.replace(config, name=config.name or stem)
    if Path(str(config.name)).name != config.name:
        raise InputError(f"--name {config.name} must be a plain file name; folders: --checkpoint_dir and --out_dir")
    files = code_files(config.out_dir or ROOT / "codes_new", stem)
    checkpoint = (config.checkpoint_dir or ROOT / "checkpoints") / f"{config.name}.pt"
    if checkpoint.resolve() == files.codes.resolve():  # one folder for both
        checkpoint = checkpoint.with_name(f"{config.name}_checkpoint.pt")
    model_args = model_arguments(config, None if text is None else text.shape[1])
    return Inputs(config, kg, text, hashes, model_args, files, checkpoint)


def build_model(inputs: Inputs, device: torch.device) -> RQGCN:
    """The model of the settings, seeded; InputError where sizes do not fit together."""
    from model.precision import keep_freed_memory
    from model.RQGCN import RQGCN

    config, kg = inputs.config, inputs.kg
    if not config.num_negatives:  # sampled steps allocate blocks of changing sizes, which would fragment kept memory
        keep_freed_memory()
    seed_everything(config.seed)
    try:
        model = RQGCN(kg.num_entities, kg.num_relations, **inputs.model_args)
    except ValueError as error:
        raise InputError(f"these flags do not fit together: {error}") from error
    return model


# ---------------------------------------------------------------- train and dump


def train(config: Config) -> None:
    """Train RQGCN, dump codes, embeddings and names of the best epoch, rank from the dump, write the record.

    Under torchrun each process runs this; only the first one prints and writes.
    """
    from model.data_parallel import World
    from model.tracking import check_logger

    check_logger(config.report_to)
    device = choose_device(config)
    world = World.start(device)
    with explain_oom(config), world.quiet(), ExitStack() as locks:
        with world.together():
            inputs = read_inputs(config)
            if world.first:
                lock_outputs(inputs, locks)
            stored = stored_run(inputs, keep_n3=config.n3 == AUTO)
        with explain_oom(inputs.config):
            if inputs.config.n3 == AUTO and stored is None:
                stored = choose_n3(inputs, device, world)
            if config.n3 == AUTO and stored is not None:
                inputs = with_n3(inputs, stored["config"]["n3"])
            train_and_dump(inputs, stored, device, world)


def make_trainer(inputs: Inputs, stored: dict[str, Any] | None, device: torch.device, world: World) -> Trainer:
    """The model and what trains it; ``stored``: the checkpoint to continue, None for a new run."""
    from model.trainer import Trainer

    with world.together():
        model = build_model(inputs, device)
    trainer = Trainer(
        inputs.kg, model, inputs.config, inputs.checkpoint, inputs.model_args, inputs.hashes, inputs.text, device,
        world=world,
    )  # fmt: skip
    if stored is not None:
        with world.together():
            continue_from(trainer, stored)
    return trainer


def choose_n3(inputs: Inputs, device: torch.device, world: World) -> dict[str, Any]:
    """Start the run with each weight of the N3 norm; the one with the best valid MRR becomes the run's checkpoint.

    The run goes on from it as if that weight had been given. A stopped choice goes on, too.
    """
    from model.checkpoint import check_same_run, load_checkpoint

    until = max(1, round(N3_TRIAL * inputs.config.epoch))
    print(f"--n3 auto: epochs 1 to {until} with each of {', '.join(map(str, N3_WEIGHTS))}; the best on valid goes on")
    mrr, seconds, trials = dict[float, float](), 0.0, [with_n3(inputs, n3, trial=True) for n3 in N3_WEIGHTS]
    for trial in trials:
        stored, path = None, trial.checkpoint
        with world.together():
            if path.exists() and not trial.config.overwrite:
                stored = load_checkpoint(path)
                check_same_run(stored, path, trial.config, trial.hashes)
        trainer = make_trainer(trial, stored, device, world)
        trainer.report = partial(print, f"--n3 {trial.config.n3}:")
        fit_until_stopped(trainer, until)
        mrr[trial.config.n3] = trainer.history[-1]["valid"]["mrr"]
        seconds += trainer.seconds
    best = max(mrr, key=mrr.__getitem__)
    print(f"--n3 {best}: valid MRR {' '.join(f'{value:.4f}' for value in mrr.values())}")
    with world.together():
        stored = load_checkpoint(trials[N3_WEIGHTS.index(best)].checkpoint)
        stored["last"]["history"][-1]["n3_trials"] = {str(n3): value for n3, value in mrr.items()}
        stored["last"]["seconds"] = seconds
    with world.together():
        if world.first:
            save_torch(stored, inputs.checkpoint)
            for trial in trials:
                trial.checkpoint.unlink()
    return stored


def with_n3(inputs: Inputs, n3: float, trial: bool = False) -> Inputs:
    """``inputs`` of a run with this weight of the N3 norm; a trial has a checkpoint of its own."""
    path = inputs.checkpoint
    if trial:
        path = path.with_name(f"{path.stem}_n3_{n3}.pt")
    return inputs._replace(config=dataclasses.replace(inputs.config, n3=n3), checkpoint=path)


def train_and_dump(inputs: Inputs, stored: dict[str, Any] | None, device: torch.device, world: World) -> None:
    """``train`` with its inputs read; ``stored``: the checkpoint to continue, None for a new run."""
    from model.message_passing import resolve_backend
    from model.tracking import open_log

    config = inputs.config
    trainer = make_trainer(inputs, stored, device, world)
    print(
        f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters, on {device}, "
        f"message passing by {resolve_backend(config.graph_backend, device)}"
    )
    log_folder = inputs.checkpoint.with_name(f"{inputs.checkpoint.stem}_log")
    with open_log(config, log_folder, trainer.epoch + 1, writes=world.first) as log:
        trainer.watchers.append(log.epoch)
        fit_until_stopped(trainer)
        world.close()
        if world.first:
            dump(inputs, trainer, log)


def dump(inputs: Inputs, trainer: Trainer, log: Log) -> None:
    """Write what the finished run is to leave, and say what to run next."""
    from model.dump import dump_codes, dump_control

    config = inputs.config
    if trainer.best is None:
        raise InputError(f"{inputs.checkpoint.name} has no scored epoch yet; train on with --restore")
    if config.quantizer in BASELINES:
        dump_control(config, trainer, inputs.files.record)
        return
    dump_codes(config, trainer, inputs.files)
    if inputs.files.embeddings.exists():  # not those of large graphs
        log.entities(load_torch(inputs.files.embeddings, "embeddings"), inputs.kg.labels)
    codes, dataset = inputs.files.codes, config.dataset or ROOT / "data/FB15k-237"
    rank = ["--dataset", dataset, "--eval_codes", codes, "--checkpoint", inputs.checkpoint]
    print(f"next: {command('run_rq.py', *rank)}\n      {command('Class/gen_fb_data_rq.py', '--codes', codes)}")


def lock_outputs(inputs: Inputs, locks: ExitStack) -> None:
    """Keep other runs from writing the same files, and remove what a killed one left half written."""
    locks.enter_context(exclusive_lock(inputs.checkpoint.with_suffix(".lock")))
    locks.enter_context(exclusive_lock(inputs.files.codes.with_suffix(".lock")))
    trials = [with_n3(inputs, n3, trial=True).checkpoint for n3 in N3_WEIGHTS]
    for path in (inputs.checkpoint, *trials, *inputs.files):
        for killed in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            killed.unlink(missing_ok=True)


def stored_run(inputs: Inputs, keep_n3: bool) -> dict[str, Any] | None:
    """The checkpoint to continue, or None for a new run; InputError where other results would be written over.

    ``keep_n3``: the run has the weight of N3 that it had, since none was given."""
    from model.checkpoint import check_same_run, load_checkpoint

    config, files, checkpoint = inputs.config, inputs.files, inputs.checkpoint
    if config.overwrite:
        return None
    if files.record.exists():
        record = read_json(files.record, "record")
        written_by = record.get("name") if isinstance(record, dict) else None
        if written_by != config.name:
            raise InputError(
                f"{files.codes} comes from run {written_by}, as {files.record.name} says, this is {config.name}; "
                "give --out_dir or --overwrite"
            )
    if not checkpoint.exists():
        if config.restore:
            raise InputError(f"--restore: there is no {checkpoint}; leave --restore out to start the run")
        if files.record.exists() or files.codes.exists():
            raise InputError(f"{files.codes} exists, but no {checkpoint}; give --out_dir DIR or --overwrite")
        return None
    stored = load_checkpoint(checkpoint)
    if keep_n3:
        config = dataclasses.replace(config, n3=stored["config"]["n3"])
    check_same_run(stored, checkpoint, config, inputs.hashes)
    return stored


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


def fit_until_stopped(trainer: Trainer, until: int | None = None) -> None:
    """Train, for a trial ``until`` an epoch; on Ctrl-C or SIGTERM say what is saved and how to go on, and leave with
    130 or 143."""
    world = trainer.world
    handled = [signal.SIGTERM] if world.size == 1 else [signal.SIGTERM, signal.SIGINT]
    previous = {number: signal.signal(number, world.interrupt) for number in handled}
    try:
        trainer.fit(until)
        if world.stop_signal:
            world.stop()
    except (KeyboardInterrupt, SystemExit) as stop:
        where = "no epoch was finished, nothing is saved"
        if until is not None:
            where = "finished epochs are saved; the same command goes on"
        elif trainer.saved_epoch:
            where = (
                f"epoch {trainer.saved_epoch} is saved in {trainer.checkpoint}; --restore goes on, "
                f"--restore --epoch {trainer.saved_epoch} dumps the best epoch so far"
            )
        print(f"stopped: {where}", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, SystemExit) else 130)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main() -> None:
    """Train, or rank from codes."""
    config = parse_config()
    check_files(config)
    if not config.eval_codes:
        train(config)
    elif os.environ.get("RANK", "0") == "0":  # ranking from codes is one process's work, under torchrun too
        with explain_oom(config):
            if config.encoded:
                from model.encode import encode

                encode(config)
            else:
                eval_codes(config)


if __name__ == "__main__":
    run_command(main)

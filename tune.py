"""Search hyper-parameters of stage 1 with Optuna. Trials are compared by valid MRR from codes; test is not read.

    python tune.py --dataset data/family --trials 30
    python tune.py --dataset data/family --trials 30 --seq_len 16        further flags of run_rq.py: fixed in the search
    python run_rq.py --dataset data/family --config configs/family_tuned.txt

The same command continues a stopped search; several processes that run it share the search. The first trial has the
settings of a run without the search, so the result is no worse than these on valid. See docs/TUNING.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import io
import json
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.config import (
    AUTO,
    NOT_COMPARED,
    SOFTMAX_ONLY,
    Config,
    build_parser,
    checked_config,
    file_defaults,
    given_flags,
)
from common.errors import CommandParser, InputError, run_command
from common.files import ROOT, command, output_file, read_json, sha256_file, write_json, write_text
from common.record import make_record
from model.inputs import check_files, choose_device, load_graph, load_text
from model.sizes import explain_oom, with_sizes
from run_rq import build_model, inputs_of

if TYPE_CHECKING:
    import optuna
    import torch

    from data.knowledge_graph import KnowledgeGraph
    from model.trainer import Trainer


class Between(NamedTuple):
    """Any number from ``low`` to ``high``; ``log``: drawn on a logarithmic scale."""

    low: float
    high: float
    log: bool = False


class Times(NamedTuple):
    """What a run without the search has, times one of these factors."""

    factors: Between | tuple[float, ...]


# The search space: flag of run_rq.py -> its values. Edit it as you like: another space is another search. The value of
# a run without the search is always added. Flags on the command line are left out, as are those without effect.
SPACE: dict[str, Between | Times | tuple[Any, ...]] = {
    "optimizer": ("adagrad", "adam"),
    "lr": Times(Between(0.2, 5.0, log=True)),  # of the optimizer's own rate
    "decoder": ("complex", "distmult"),
    "decoder_drop": Between(0.0, 0.7),
    "init_dim": (128, 256, 512),
    "batch": Times((0.25, 0.5, 1, 2, 4)),
    "tails_at_once": (1, 4, 16, 64),
    "lbl_smooth": Between(0.0, 0.3),
    "n3": (0.0, 0.005, 0.02, 0.05),
    "z_noise": Between(0.0, 1.0),
    "frozen_noise": Between(0.0, 1.0),
    "freeze_at": Between(0.1, 0.7),  # and --warmup_epochs, where a run without the search has the same value for both
    "epoch": Times((0.5, 1, 2)),
}
STARTUP_TRIALS = 8  # at random, before TPE
HEARTBEAT, GRACE = 5, 30  # seconds between a running trial's signs of life; without one for GRACE it is done again
OWN = ("trials", "max_minutes", "out", "overwrite")
LEFT_OUT = NOT_COMPARED - {
    "config", "dataset", "checkpoint_dir", "text_emb", "graph_backend", "device", "gpu", "num_workers",
} | {"name", "max_minutes"}  # fmt: skip


class Search(NamedTuple):
    """What all trials share."""

    study: optuna.Study
    base: Config  # a run without the search, with "auto" where it has it
    space: dict[str, Any]
    kg: KnowledgeGraph
    text: torch.Tensor | None
    device: torch.device
    trials: int
    out: Path
    command: str
    flags: dict[str, Any]  # of the file or the command line, as they were given


# ---------------------------------------------------------------- the space


def space_of(base: Config, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``SPACE`` that is to be searched: neither fixed nor without effect."""
    without_effect = set(fixed)
    if base.loss != "ce":
        without_effect |= set(SOFTMAX_ONLY)
    if base.gcn_layers or base.code_dim != AUTO:  # D is --gcn_dim, or L x code_dim would no longer be D
        without_effect.add("init_dim")
    if base.gcn_layers or base.tf_layers or base.decoder not in SPACE["decoder"]:  # as in model/sizes.py
        without_effect.add("n3")
    if base.lr != AUTO:  # a rate belongs to its optimizer
        without_effect.add("optimizer")
    without_effect |= {name for name in SPACE if getattr(base, name) is None}
    return {name: values for name, values in SPACE.items() if name not in without_effect}


def sized(config: Config, kg: KnowledgeGraph) -> Config:
    """``config`` with numbers for "auto", without a word."""
    with redirect_stdout(io.StringIO()):
        return with_sizes(config, kg.num_entities, kg.num_relations, len(kg.train))


def label(name: str, values: Any) -> str:
    """The parameter's name in the study."""
    return f"{name}, times the default" if isinstance(values, Times) else name


def default_values(search: Search) -> dict[str, Any]:
    """The point of the space that a run without the search has, by flag."""
    plain = sized(search.base, search.kg)
    return {name: 1 if isinstance(values, Times) else getattr(plain, name) for name, values in search.space.items()}


def suggest(trial: optuna.Trial, search: Search) -> dict[str, Any]:
    """The settings of a trial: flag -> value, as the file of flags will have them."""
    defaults, found = default_values(search), dict[str, Any]()
    for name, values in search.space.items():
        numbers = values.factors if isinstance(values, Times) else values
        found[name] = draw(trial, label(name, values), numbers, defaults[name])
    if "freeze_at" in found and search.base.warmup_epochs == search.base.freeze_at:
        found["warmup_epochs"] = found["freeze_at"]
    absolute = {name: value for name, value in found.items() if not isinstance(search.space.get(name), Times)}
    plain = sized(dataclasses.replace(search.base, **absolute), search.kg)
    for name in found.keys() - absolute.keys():
        value = getattr(plain, name) * found[name]
        found[name] = max(2, round(value)) if isinstance(getattr(plain, name), int) else float(f"{value:.4g}")
    return found


def draw(trial: optuna.Trial, name: str, values: Between | tuple[Any, ...], default: Any) -> Any:
    """One value of a trial; the range always includes ``default``."""
    if isinstance(values, Between):
        low, high = min(values.low, default), max(values.high, default)
        value = trial.suggest_float(name, low, high, log=values.log)
        return value if value == default else float(f"{value:.4g}")
    return trial.suggest_categorical(name, [*values, *([] if default in values else [default])])


# ---------------------------------------------------------------- one trial


def run_trial(trial: optuna.Trial, search: Search) -> float:
    """Valid MRR from the codes of a run with this trial's settings; nothing is written.

    Raises TrialPruned where it is behind other trials or its settings do not work.
    """
    import optuna

    try:
        return score_settings(trial, search)
    except InputError as error:
        if trial.user_attrs.get("default"):
            raise InputError(f"the default settings do not work here: {error}") from error
        trial.set_user_attr("error", " ".join(str(error).split())[:300])
        raise optuna.TrialPruned from error


def score_settings(trial: optuna.Trial, search: Search) -> float:
    """Train with a trial's settings -> valid MRR. Raises TrialPruned, and InputError where they do not work."""
    from model.collisions import TooFewCodes
    from model.trainer import Trainer

    class Unsaved(Trainer):
        def save(self) -> None:
            """A trial leaves its MRR only."""

    settings = suggest(trial, search)
    trial.set_user_attr("settings", settings)
    config = sized(dataclasses.replace(search.base, **settings), search.kg)
    with explain_oom(config):
        with redirect_stdout(io.StringIO()):
            inputs = inputs_of(config, search.kg, search.text)
            model = build_model(inputs, search.device)
        trainer = Unsaved(
            search.kg, model, config, inputs.checkpoint, inputs.model_args, {}, search.text, search.device,
            report=lambda line: None,
        )  # fmt: skip
        watch_trial(trainer, trial)
        trainer.fit()
        assert trainer.best is not None
        if trainer.best["codes"] is not None:
            with suppress(TooFewCodes):  # scored like the codes that run_rq.py writes
                trainer.resolve_collisions()
    return float(trainer.best["valid"]["mrr"])


def watch_trial(trainer: Trainer, trial: optuna.Trial) -> None:
    """After each epoch: is the trial, by its MRR from codes at each tenth of the run, far behind the others?"""
    import optuna

    reported, last_line = 0, time.monotonic()
    is_default = trial.user_attrs.get("default", False)

    def watch(row: dict[str, Any]) -> None:
        nonlocal reported, last_line
        if time.monotonic() - last_line > 60:
            last_line = time.monotonic()
            score = f", valid MRR {row['valid']['mrr']:.4f}" if "valid" in row else ""
            print(f"  trial {trial.number}: epoch {row['epoch']} of {trainer.config.epoch}{score}", flush=True)
        if "valid" not in row or trainer.best is None:
            return
        tenths = int(10 * trainer.schedule.progress(row["epoch"]) + 1e-9)
        for step in range(reported + 1, tenths + 1):  # rankings may be further apart
            trial.report(row["valid"]["mrr"], step)
        reported = max(reported, tenths)
        if not is_default and trial.should_prune():
            raise optuna.TrialPruned

    trainer.watchers.append(watch)


# ---------------------------------------------------------------- the search


def open_study(storage: Path, name: str) -> optuna.Study:
    """The study of this name in the SQLite file, new where there is none; InputError for another kind of file.

    A trial whose process was killed fails after GRACE seconds and is done again.
    """
    import optuna
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
    try:
        return optuna.create_study(
            storage=RDBStorage(
                f"sqlite:///{storage}", engine_kwargs={"connect_args": {"timeout": 60}},
                heartbeat_interval=HEARTBEAT, grace_period=GRACE,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
            ),
            sampler=optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
            study_name=name, direction="maximize", load_if_exists=True,
        )  # fmt: skip
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:160]
        raise InputError(f"{storage} cannot be read as a search ({reason}); remove it to start anew") from error


def enqueue_default(search: Search) -> None:
    """Let the next trial have the default settings, where none has them yet."""
    import optuna

    optuna.storages.fail_stale_trials(search.study)
    trials = search.study.get_trials(deepcopy=False)
    if not any(trial.user_attrs.get("default") and trial.state.name != "FAIL" for trial in trials):
        values = {label(name, search.space[name]): value for name, value in default_values(search).items()}
        search.study.enqueue_trial(values, user_attrs={"default": True})


def run_search(search: Search, max_minutes: float) -> None:
    """Trials until all processes have made enough, or the time is over; after each, the result so far is written."""
    from optuna.study import MaxTrialsCallback
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.PRUNED)

    def after_trial(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        count = len(study.get_trials(deepcopy=False, states=states))
        value = f"valid MRR {trial.value:.4f}" if trial.value is not None else trial.state.name.lower()
        settings = " ".join(f"--{name} {value}" for name, value in trial.user_attrs["settings"].items())
        error = f" ({trial.user_attrs['error']})" if "error" in trial.user_attrs else ""
        print(f"{count} of {search.trials}: {value}{error}, {seconds_of(trial):.0f} s; {settings}", flush=True)
        write_result(search)

    left = search.trials - len(search.study.get_trials(deepcopy=False, states=states))
    if left > 0:
        search.study.optimize(
            partial(run_trial, search=search), n_trials=left, timeout=60 * max_minutes or None,
            callbacks=[after_trial, MaxTrialsCallback(search.trials, states)],
        )  # fmt: skip


def seconds_of(trial: optuna.trial.FrozenTrial) -> float:
    return trial.duration.total_seconds() if trial.duration else 0.0


# ---------------------------------------------------------------- the result


class Best(NamedTuple):
    """What the search has found so far."""

    default: optuna.trial.FrozenTrial
    best: optuna.trial.FrozenTrial  # the earliest one


def best_of(search: Search) -> Best | None:
    """The default and the best trial; None before the default settings are scored."""
    finished = [trial for trial in search.study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    default = next((trial for trial in finished if trial.user_attrs.get("default")), None)
    return None if default is None else Best(default, max(finished, key=lambda trial: trial.value or 0.0))


def write_result(search: Search) -> None:
    """The flags of the best trial and, beside them, the record; nothing before the default settings are scored."""
    found = best_of(search)
    if found is None:
        return
    default, best = found
    trials = search.study.get_trials(deepcopy=False)
    record = make_record(
        search.base.as_plain(), search.kg.input_hashes, sum(map(seconds_of, trials)), search.device,
        study=search.study.study_name, dataset=search.kg.name, trained_on=search.kg.train_digest(),
        space={name: repr(values) for name, values in search.space.items()},
        valid_mrr={"default": default.value, "best": best.value}, best_trial=best.number,
        trials=[
            {"number": one.number, "state": one.state.name.lower(), "valid_mrr": one.value,
             "seconds": round(seconds_of(one), 1), **one.user_attrs} for one in trials
        ],
    )  # fmt: skip
    write_json(record, search.out.with_suffix(".json"))
    write_text(flags_text(search, best, default, len(trials)), search.out)


def flags_text(search: Search, best: optuna.trial.FrozenTrial, default: optuna.trial.FrozenTrial, trials: int) -> str:
    """The file of flags: those of the file or command line that the search started from, then those that it found."""
    lines = [
        f"# {search.kg.name}: valid MRR {best.value:.4f}, default settings {default.value:.4f}, {trials} trials",
        f"# {search.command}",
    ]
    found = best.user_attrs["settings"]
    for flags in ({name: value for name, value in search.flags.items() if name not in found}, found):
        words = [f"--{name} {'auto' if value == AUTO else shlex.quote(str(value))}" for name, value in flags.items()]
        lines += [" ".join(words[start : start + 6]) for start in range(0, len(words), 6)]
    return "\n".join(lines) + "\n"


def check_out(out: Path, study: str, overwrite: bool) -> None:
    """InputError where the file of flags comes from another search, or from a person."""
    record = out.with_suffix(".json")
    if overwrite or not out.exists():
        return
    found = read_json(record, "record") if record.exists() else None
    if not isinstance(found, dict) or found.get("study") != study:
        raise InputError(f"{out} comes from another search (other data, flags or space); give --out or --overwrite")


# ---------------------------------------------------------------- the command


def build_tune_parser(defaults: Mapping[str, Any] | None = None) -> CommandParser:
    """The flags of tune.py: its own, and those of run_rq.py that can be fixed."""
    parser = CommandParser(
        description="Search hyper-parameters of stage 1 on valid. Flags of run_rq.py that are given are fixed.",
        formatter_class=argparse.HelpFormatter,
    )
    group = parser.add_argument_group("the search")
    group.add_argument("--trials", type=int, default=30, help="trials in all, of all processes (default: 30)")
    group.add_argument(
        "--max_minutes", type=float, default=0.0, help="start no trial after this time (default: 0, off)"
    )
    group.add_argument("--out", type=output_file, help="file of flags to write (default: configs/DATASET_tuned.txt)")
    group.add_argument("--overwrite", action="store_true", help="replace that file where it is from another search")
    return build_parser(defaults, LEFT_OUT | {"overwrite"}, parser)


def parse(words: Sequence[str]) -> tuple[dict[str, Any], Config, dict[str, Any], dict[str, Any]]:
    """The search's own flags, the settings to start from, the flags to fix, and all flags that set something."""
    defaults = file_defaults(words)
    if defaults.get("max_minutes"):
        raise InputError(
            "--config has --max_minutes: trials that end by the clock cannot be compared; give --epoch alone"
        )
    parser = build_tune_parser(defaults)
    found = vars(parser.parse_args(words))
    own = {name: found.pop(name) for name in OWN}
    if own["trials"] < 1 or own["max_minutes"] < 0:
        parser.error(f"--trials {own['trials']} --max_minutes {own['max_minutes']}: expected 1 or more, 0 or more")
    base = checked_config(parser, found)
    fixed = {name: value for name, value in given_flags(build_tune_parser(), words).items() if name not in OWN}
    kept = {
        name: value for name, value in (defaults | fixed).items()
        if value is not None and (name not in NOT_COMPARED or name == "text_emb") and name not in LEFT_OUT
    }  # fmt: skip
    return own, base, fixed, kept


def study_name(base: Config, space: Mapping[str, Any], kg: KnowledgeGraph) -> str:
    """A name that differs where trials could not be compared: by triples, settings, text embeddings or space."""
    text = None if base.text_emb is None else sha256_file(base.text_emb)
    valid = hashlib.sha256(kg.valid.tobytes()).hexdigest()
    parts = [kg.train_digest(), valid, text, base.compared(), {name: repr(values) for name, values in space.items()}]
    return f"{kg.name}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]}"


def main() -> None:
    """Search, or continue a search."""
    own, base, fixed, kept = parse(sys.argv[1:])
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise InputError("tune.py needs Optuna; run: pip install -r requirements.txt") from error
    check_files(base)
    device = choose_device(base)
    kg = load_graph(base, test=False)
    text = load_text(base.text_emb, kg.num_entities, kg.entities)
    space = space_of(base, fixed)
    if not space:
        raise InputError("every flag of the search space is given, so nothing is left to search; see SPACE in tune.py")
    name = study_name(base, space, kg)
    out = own["out"] or ROOT / "configs" / f"{kg.name}_tuned.txt"
    check_out(out, name, own["overwrite"])
    storage = (base.checkpoint_dir or ROOT / "checkpoints") / f"{kg.name}_tune.db"
    storage.parent.mkdir(parents=True, exist_ok=True)
    words = f"python tune.py {shlex.join(sys.argv[1:])}"
    with open(storage.with_suffix(".lock"), "w") as lock:  # one process makes the file and the first trial
        fcntl.flock(lock, fcntl.LOCK_EX)
        search = Search(open_study(storage, name), base, space, kg, text, device, own["trials"], out, words, kept)
        enqueue_default(search)
    print(f"search {name} in {storage}, {own['trials']} trials in all; repeat the command to continue it")
    run_search(search, own["max_minutes"])
    report(search)


def report(search: Search) -> None:
    """The best settings and the next command; InputError where the default settings are not scored yet."""
    write_result(search)
    found = best_of(search)
    if found is None:
        if any(trial.state.name == "RUNNING" for trial in search.study.get_trials(deepcopy=False)):
            print("another process runs the default settings; it will write the result")
            return
        raise InputError("the default settings are not scored yet; repeat the command")
    run = ["--dataset", search.base.dataset or ROOT / "data/FB15k-237", "--config", search.out]
    print(
        f"wrote {search.out} and its record: valid MRR {found.best.value:.4f} (trial {found.best.number}), "
        f"default settings {found.default.value:.4f}\n"
        f"next: {command('run_rq.py', *run)}"
    )


if __name__ == "__main__":
    run_command(main)

"""A grid of stage-1 runs that differ from one recipe in a flag or two, resumed where it stopped, in one results file.

    python tables/run_ablations.py --list                                    the settings of the grid
    python tables/run_ablations.py                                           all of them: FB15k-237, 10 epochs, seed 0
    python tables/run_ablations.py --only 4x4 vq_16 unquantized --seeds 0 1 2

Each run is a command of its own (printed), with its own folder under --out; its record there is all that is read. A
setting with a record is not run again. Scores are of valid, from the dumped integers (controls: from what they hold).
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.config import AUTO, parse_config
from common.errors import CommandParser, InputError, content_of, run_command
from common.files import ROOT, exclusive_lock, read_json, write_json
from common.metrics import RANKING, check_ranking, number

SLOW = "--lr 0.001 --encoder_lr 0.001 --encoder_every 4"
Z_WIDTH = 256  # L * code_dim of every setting of equal budget: the codes differ, what they stand for does not


class Setting(NamedTuple):
    """One line of the grid."""

    group: str
    flags: str  # appended to the recipe's


def _budget(seq_len: int, levels: int) -> str:
    return f"--seq_len {seq_len} --num_quantizers {levels} --code_dim {Z_WIDTH // seq_len}"


def grid(text_emb: Path | None) -> dict[str, Setting]:
    """name -> setting. Those with text need the embeddings' file."""
    vq = "--quantizer vq --num_quantizers 1 --seq_len 16 --code_dim 16"
    found = {
        "4x4": Setting("recipe", _budget(4, 4)),
        # 16 tokens per entity, spent on positions or on levels
        "8x2": Setting("equal tokens", _budget(8, 2)),
        "2x8": Setting("equal tokens", _budget(2, 8)),
        "1x16": Setting("equal tokens", _budget(1, 16)),
        "vq_16": Setting("equal tokens", vq),
        "vq_16_k4096": Setting("equal tokens", f"{vq} --num_code 4096"),  # as many code vectors as 4 levels of 1,024
        # at equal positions
        "vq_4": Setting("equal positions", f"--quantizer vq --num_quantizers 1 --seq_len 4 --code_dim {Z_WIDTH // 4}"),
        "4x2": Setting("equal positions", "--num_quantizers 2"),
        # what the parts are worth
        "unquantized": Setting("controls", "--quantizer none"),
        "random_codes": Setting("controls", "--quantizer random"),
        "random_2x8": Setting("controls", f"{_budget(2, 8)} --quantizer random"),
        "random_1x16": Setting("controls", f"{_budget(1, 16)} --quantizer random"),
        "posthoc": Setting("controls", "--quantizer posthoc"),
        # a graph layer diverges at the recipe's rate: the two differ in the layer alone
        "gcn_1": Setting("parts", f"--gcn_layers 1 {SLOW}"),
        "gcn_0": Setting("parts", f"--gcn_layers 0 {SLOW}"),
        # Fig. 5
        "k_256": Setting("K", "--num_code 256"),
        "k_512": Setting("K", "--num_code 512"),
        "k_2048": Setting("K", "--num_code 2048"),
        "l_2": Setting("L", "--seq_len 2"),
        "l_8": Setting("L", "--seq_len 8"),
        "l_16": Setting("L", "--seq_len 16"),
    }
    if text_emb is not None:
        found["text_loss"] = Setting("parts", f"--text_emb {shlex.quote(str(text_emb))}")
        found["text_input"] = Setting(
            "parts", f"--text_emb {shlex.quote(str(text_emb))} --text_weight 0 --inputs learned+text"
        )
        found["text_both"] = Setting("parts", f"--text_emb {shlex.quote(str(text_emb))} --inputs learned+text")
    return found


def build_parser() -> CommandParser:
    """The flags."""
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the settings and stop")
    parser.add_argument("--config", type=Path, metavar="FILE", default=ROOT / "configs" / "FB15k-237_4x4_cpu.txt",
                        help="the recipe that the settings change; its time limit is left out")  # fmt: skip
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="graph folder (default: the recipe's)")
    parser.add_argument("--text_emb", type=Path, metavar="FILE.npy", help="adds the settings with text")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of every setting")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these settings alone")
    parser.add_argument("--out", type=Path, metavar="DIR", default=ROOT / "codes_new" / "ablations",
                        help="folder for the runs and ablations.json")  # fmt: skip
    parser.add_argument("--flags", default="", help="more flags of run_rq.py for every run, in quotes")
    return parser


def command(args: argparse.Namespace, setting: Setting, seed: int, folder: Path) -> list[str]:
    """The words after `python` of one run, which runs from the root: records name no folder above it."""
    words = ["run_rq.py", "--config", _from_root(args.config), "--max_minutes", "0", "--epoch", str(args.epochs)]
    words += ["--eval_every", "5", "--split", "valid", "--seed", str(seed), *shlex.split(setting.flags)]
    words += ["--dataset", str(args.dataset)] if args.dataset else []
    places = ["--out_dir", _from_root(folder), "--checkpoint_dir", _from_root(folder / "checkpoints")]
    return [*words, *shlex.split(args.flags), *places]


def _from_root(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def record_in(folder: Path) -> Path | None:
    """The run record of a finished run."""
    found = sorted(folder.glob("*.json"))
    return found[0] if found else None


def check_same(record_path: Path, words: list[str]) -> None:
    """InputError where the record is another run's than that of ``words``: its score would stand for theirs."""
    config = parse_config(words[1:])
    now = {key: value for key, value in config.compared().items() if key != "name" and value != AUTO}
    record = read_json(record_path, "record")
    with content_of(record_path, "run record", f"remove {record_path.parent}, then the same command"):
        then = record["args"] | {"dataset": record["dataset"]}
        now |= {"dataset": (config.dataset or Path("FB15k-237")).resolve().name}
        keys = sorted(key for key in then.keys() & now.keys() if then[key] != now[key])
        shown = ", ".join(f"{key} (there {then[key]}, here {now[key]})" for key in keys)
    if keys:
        raise InputError(f"{record_path} is of another run: {shown}; give another --out, or remove its folder")


def run(args: argparse.Namespace, name: str, setting: Setting, seed: int) -> Path:
    """Run one setting unless its record is there; go on from its checkpoint where there is one. Returns the record."""
    folder = args.out / f"{name}_seed{seed}"
    words, done = command(args, setting, seed, folder), record_in(folder)
    if done is not None:
        check_same(done, words)
        print(f"{name} seed {seed}: done before")
        return done
    if any((folder / "checkpoints").glob("*.pt")):
        words.append("--restore")
    print(f"{name} seed {seed}: python {shlex.join(words)}", flush=True)
    ended = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    done = record_in(folder)
    if ended or done is None:
        raise InputError(f"{name} seed {seed} ended with exit code {ended}: see above; then the same command goes on")
    return done


def row(name: str, setting: Setting, record_path: Path) -> dict[str, Any]:
    """What the results file says of one run; all of it from its record."""
    record = read_json(record_path, "record")
    with content_of(record_path, "run record", f"remove {record_path.parent}, then the same command"):
        args, metrics = record["args"], record["valid"]
        check_ranking(record_path, "valid", metrics)
        tokens = args["seq_len"] * args["num_quantizers"]
        coded = record.get("control") not in ("unquantized", "frozen_vectors")
        return {
            "name": name,
            "group": setting.group,
            "flags": setting.flags,
            "dataset": record["dataset"],
            "seed": int(record["seed"]),
            "epochs": record["epochs"],
            "best_epoch": record["best_epoch"],
            "tokens": tokens if coded else None,
            "bits": round(tokens * math.log2(args["num_code"]), 1) if coded else None,
            "parameters_behind_codes": record["parameters"]["behind_codes"],
            **{key: metrics[key] for key in RANKING},
            "mrr_by_levels": record.get("valid_mrr_by_levels"),
            "minutes": number(record_path, "wall_seconds", record["wall_seconds"]) / 60,
            "device": record["device"],
            "git_commit": record["git_commit"],
            "record": f"{record_path.parent.name}/{record_path.name}",
        }


def rows_in(out: Path, settings: dict[str, Setting]) -> list[dict[str, Any]]:
    """The rows of all finished runs below ``out``, in the grid's order, whichever call made them."""
    found = {folder.name: record_in(folder) for folder in out.glob("*_seed*")}
    rows = []
    for name, setting in settings.items():
        seeds = [folder.removeprefix(f"{name}_seed") for folder in found if folder.startswith(f"{name}_seed")]
        for seed in sorted(int(seed) for seed in seeds if seed.isdecimal()):
            record = found[f"{name}_seed{seed}"]
            rows += [] if record is None else [row(name, setting, record)]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The results as a table, best first within a group."""
    print(f"\n{'group':16s} {'name':14s} seed tokens  bits  valid MRR  Hits@10  minutes")
    for line in sorted(rows, key=lambda line: (line["group"], -line["mrr"])):
        tokens, bits = (("" if line[key] is None else f"{line[key]:.0f}") for key in ("tokens", "bits"))
        print(
            f"{line['group']:16s} {line['name']:14s} {line['seed']:4d} {tokens:>6s} {bits:>5s}  {line['mrr']:9.4f}  "
            f"{line['hits@10']:7.4f}  {line['minutes']:7.1f}"
        )


def main() -> None:
    args = build_parser().parse_args()
    settings = grid(args.text_emb)
    unknown = [name for name in args.only or [] if name not in settings]
    if unknown:
        hint = "" if args.text_emb else "; those with text need --text_emb"
        raise InputError(f"--only {unknown[0]}: no such setting, there are {', '.join(settings)}{hint}")
    if args.list:
        for name, setting in settings.items():
            print(f"{name:14s} {setting.group:16s} {setting.flags}")
        return
    try:
        shlex.split(args.flags)
    except ValueError as error:
        raise InputError(f"--flags {args.flags} cannot be read as flags: {error}") from error
    for path, flag in [(args.config, "--config"), (args.text_emb, "--text_emb")]:
        if path is not None and not path.is_file():
            raise InputError(f"{flag} {path} is not there; configs/ holds recipes, data/embed_text.py makes embeddings")
    args.out, args.config = args.out.resolve(), args.config.resolve()
    with exclusive_lock(args.out.with_name(f"{args.out.name}.lock"), "--out"):
        for name in args.only or settings:
            for seed in args.seeds:
                run(args, name, settings[name], seed)
                rows = rows_in(args.out, settings)
                write_json({"rows": rows}, args.out / "ablations.json")
    show(rows)
    print(f"wrote {args.out / 'ablations.json'}")


if __name__ == "__main__":
    run_command(main)

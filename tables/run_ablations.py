"""A grid of stage-1 runs that differ from one configuration in a flag or two; finished runs are not repeated.

    python tables/run_ablations.py --list                                    the settings of the grid
    python tables/run_ablations.py                                           all of them: FB15k-237, 10 epochs, seed 0
    python tables/run_ablations.py --only 4x4 vq_16 unquantized --seeds 0 1 2

Each run is a printed command with its own folder under --out; all results are read from its record there. Scores are
on valid, from the dumped integers (controls: from their own vectors or codes).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.config import parse_config
from common.errors import CommandParser, at_least, content_of, run_command
from common.files import ROOT, exclusive_lock, output_folder, read_json, write_json
from common.metrics import RANKING, check_ranking, number
from common.steps import Step, run_steps
from data.knowledge_graph import KnowledgeGraph
from model.inputs import load_text
from tables.system import system_of

SLOW = "--lr 0.001 --encoder_every 4"
Z_WIDTH = 256  # L * code_dim of every setting of equal budget: only the codes differ


class Setting(NamedTuple):
    """One row of the grid."""

    group: str
    flags: str  # appended to the configuration's


def _budget(seq_len: int, levels: int) -> str:
    return f"--seq_len {seq_len} --num_quantizers {levels} --code_dim {Z_WIDTH // seq_len}"


def grid(text_emb: Path | None) -> dict[str, Setting]:
    """name -> setting. Settings with text need the file of embeddings."""
    vq = "--quantizer vq --num_quantizers 1 --seq_len 16 --code_dim 16"
    found = {
        "4x4": Setting("full model", _budget(4, 4)),
        # 16 tokens per entity, as positions or as levels
        "8x2": Setting("equal tokens", _budget(8, 2)),
        "2x8": Setting("equal tokens", _budget(2, 8)),
        "1x16": Setting("equal tokens", _budget(1, 16)),
        "vq_16": Setting("equal tokens", vq),
        "vq_16_k4096": Setting("equal tokens", f"{vq} --num_code 4096"),  # as many code vectors as 4 levels of 1,024
        "vq_4": Setting("equal positions", f"--quantizer vq --num_quantizers 1 --seq_len 4 --code_dim {Z_WIDTH // 4}"),
        "4x2": Setting("equal positions", "--num_quantizers 2"),
        "unquantized": Setting("controls", "--quantizer none"),
        "random_codes": Setting("controls", "--quantizer random"),
        "random_2x8": Setting("controls", f"{_budget(2, 8)} --quantizer random"),
        "random_1x16": Setting("controls", f"{_budget(1, 16)} --quantizer random"),
        "posthoc": Setting("controls", "--quantizer posthoc"),
        # a graph layer diverges at the configuration's learning rate: these two differ only in the layer
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
        text = f"--text_emb {shlex.quote(_from_root(text_emb))}"
        found["text_loss"] = Setting("parts", text)
        found["text_input"] = Setting("parts", f"{text} --text_weight 0 --inputs learned+text")
        found["text_both"] = Setting("parts", f"{text} --inputs learned+text")
    return found


def _from_root(path: Path) -> str:
    """The path as runs name it, which are started in the repository: records name no folder above it."""
    full = path.resolve()
    return str(full.relative_to(ROOT) if full.is_relative_to(ROOT) else full)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The checked flags."""
    parser = CommandParser(prog="tables/run_ablations.py", description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the settings and stop")
    parser.add_argument("--config", type=Path, metavar="FILE", default=ROOT / "configs" / "FB15k-237_4x4_cpu.txt",
                        help="the flags that all settings share; its time limit is ignored")  # fmt: skip
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="graph folder (default: the configuration's)")
    parser.add_argument("--text_emb", type=Path, metavar="FILE.npy", help="adds the settings with text")
    parser.add_argument("--epochs", type=at_least(1), default=10, help="epochs of every run")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0], help="seeds of every setting (default: 0)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these settings")
    parser.add_argument("--out", type=output_folder, metavar="DIR", default=ROOT / "codes_new" / "ablations",
                        help="folder for the runs and ablations.json")  # fmt: skip
    args = parser.parse_args(argv)
    settings = grid(args.text_emb)
    for name in args.only or []:
        if name not in settings:
            more = "" if args.text_emb else " (settings with text need --text_emb)"
            parser.error(f"--only {name}: expected one of {', '.join(settings)}{more}")
    for path, flag in [(args.config, "--config"), (args.text_emb, "--text_emb")]:
        if path is not None and not path.is_file():
            parser.error(f"{flag} {path} does not exist; see configs/ and data/embed_text.py")
    return args


def step_of(args: argparse.Namespace, name: str, seed: int) -> Step:
    """The run of one setting and seed; an interrupted run continues from its checkpoint."""
    folder = args.out / f"{name}_seed{seed}"
    words = ["run_rq.py", "--config", _from_root(args.config), "--max_minutes", "0", "--epoch", str(args.epochs)]
    words += shlex.split(f"--eval_every 5 --split valid --seed {seed} {grid(args.text_emb)[name].flags}")
    words += ["--dataset", _from_root(args.dataset)] if args.dataset else []
    words += ["--out_dir", _from_root(folder)]
    words += ["--checkpoint_dir", _from_root(folder / "checkpoints")]

    def restore() -> list[str]:
        return ["--restore"] if any((folder / "checkpoints").glob("*.pt")) else []

    return Step(folder.name, words, [folder], restore)


def result(name: str, setting: Setting, path: Path) -> dict[str, Any]:
    """The results file's entry for one run, all from its record."""
    record = read_json(path, "record")
    with content_of(path, "run record", f"remove {path.parent} and repeat the command"):
        check_ranking(path, "valid", record["valid"])
        system, args = system_of(record), record["args"]
        return {
            "name": name, "group": setting.group, "flags": setting.flags, "dataset": record["dataset"],
            "seed": int(record["seed"]), "epochs": record["epochs"], "best_epoch": record["best_epoch"],
            "tokens": args["seq_len"] * args["num_quantizers"] if system.bits else None, "bits": system.bits,
            "parameters_behind_codes": system.parameters, "perplexity": system.perplexity,
            **{metric: record["valid"][metric] for metric in RANKING},
            "mrr_by_levels": record.get("valid_mrr_by_levels"),
            "minutes": number(path, "wall_seconds", record["wall_seconds"]) / 60, "device": record["device"],
            "git_commit": record["git_commit"], "record": f"{path.parent.name}/{path.name}",
        }  # fmt: skip


def results_in(out: Path, settings: dict[str, Setting]) -> list[dict[str, Any]]:
    """The entries of all finished runs in ``out``, in the order of the grid, also those of earlier calls."""
    found = []
    for name, setting in settings.items():
        entries = [result(name, setting, path) for path in out.glob(f"{name}_seed*/*.json")]
        found += sorted(entries, key=lambda entry: int(entry["seed"]))
    return found


def print_results(found: list[dict[str, Any]]) -> None:
    """The results as a table, best first within a group."""
    print(f"\n{'group':16s} {'name':14s} seed  parameters  valid MRR  Hits@10  minutes")
    for entry in sorted(found, key=lambda entry: (entry["group"], -entry["mrr"])):
        parameters = entry["parameters_behind_codes"] or 0
        print(
            f"{entry['group']:16s} {entry['name']:14s} {entry['seed']:4d}  {parameters:10,d}  "
            f"{entry['mrr']:9.4f}  {entry['hits@10']:7.4f}  {entry['minutes']:7.1f}"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings = grid(args.text_emb)
    if args.list:
        for name, setting in settings.items():
            print(f"{name:14s} {setting.group:16s} {setting.flags}")
        return
    if args.text_emb is not None:  # the settings with text come last
        config = parse_config(["--config", str(args.config)])
        kg = KnowledgeGraph.load(args.dataset or ROOT / str(config.dataset), config.keep_names)
        load_text(args.text_emb, kg.num_entities, kg.entities)
    args.out = args.out.resolve()
    with exclusive_lock(args.out.with_name(f"{args.out.name}.lock"), "--out"):
        for name in args.only or settings:
            for seed in args.seeds:
                run_steps([step_of(args, name, seed)], args.out / "done")
                write_json({"rows": results_in(args.out, settings)}, args.out / "ablations.json")
    print_results(results_in(args.out, settings))
    print(f"wrote {args.out / 'ablations.json'}")


if __name__ == "__main__":
    run_command(main)

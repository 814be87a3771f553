"""The paper's figures and more, as PNG and PDF, from codes, run records, graphs and models.

    python tables/make_figures.py                                       all figures whose inputs exist
    python tables/make_figures.py --figure 6 --codes codes_new/FB15k-237_4_1024_4_rq.pt
    python tables/make_figures.py --codes demo_output/family_4_256_4_rq.pt --records demo_output --dataset data/family

FIGURES below lists them. 9 and 13 show further data sets and models, 12 another sample.
A figure without inputs is skipped with a line that names the command for them; with --figure NAME that is an error.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, at_least, run_command
from common.files import ROOT, output_folder
from tables.figures import answers, embeddings, graph, quality, runs, similarity
from tables.figures.inputs import Inputs, Missing
from tables.results import add_record_flags


class Figure(NamedTuple):
    """One figure: its drawing function and its caption."""

    draw: Callable[[Inputs, Path], list[Path]]
    shows: str


FIGURES = {
    "2": Figure(functools.partial(graph.draw, number=2), "neighbours and prompt tokens of an entity"),
    "4": Figure(functools.partial(similarity.draw, number=4), "cosine similarity of entities' decoded codes"),
    "5": Figure(runs.draw_sizes, "MRR over L and K"),
    "6": Figure(quality.draw_jaccard, "mean Jaccard distance to the k nearest entities, with two baselines"),
    "7": Figure(functools.partial(answers.draw, number=7), "link prediction by the LLM over (L, K)"),
    "8": Figure(functools.partial(embeddings.draw, number=8), "word and code tokens of an input embedding"),
    "9": Figure(functools.partial(graph.draw, number=9), "as figure 2, further data sets"),
    "10": Figure(runs.draw_training, "training curves: loss and MRR by epoch"),
    "11": Figure(functools.partial(answers.draw, number=11), "triple classification by the LLM over (L, K)"),
    "12": Figure(functools.partial(similarity.draw, number=12), "as figure 4, another sample"),
    "13": Figure(functools.partial(embeddings.draw, number=13), "as figure 8, further models"),
    "levels": Figure(runs.draw_levels, "MRR when only the first levels are decoded"),
    "pareto": Figure(runs.draw_pareto, "test MRR over the parameters behind the codes, ours and published"),
}  # fmt: skip
OUT = ROOT / "tables" / "out"


def draw_all(inputs: Inputs, out: Path, names: list[str]) -> dict[str, list[Path]]:
    """Draw these figures; those without inputs are skipped with one line each. Figure -> its files."""
    drawn = {}
    for name in names:
        try:
            drawn[name] = FIGURES[name].draw(inputs, out)
            print(f"figure {name}: wrote {', '.join(path.name for path in drawn[name])}", flush=True)
        except Missing as reason:
            print(f"figure {name} skipped: {reason}", flush=True)
    return drawn


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/make_figures.py", description=__doc__.split("\n")[0])
    parser.add_argument("--figure", nargs="+", choices=[*FIGURES, "all"], default=["all"], metavar="NAME",
                        help=f"{', '.join(FIGURES)} or all (default: all)")  # fmt: skip
    parser.add_argument(
        "--out", type=output_folder, default=OUT, metavar="DIR", help="folder for the PNG and PDF files"
    )
    group = parser.add_argument_group("inputs")
    group.add_argument("--codes", type=Path, nargs="+", metavar="FILE.pt", help="codes files (default: all of stage 1)")
    group.add_argument("--dataset", type=Path, nargs="+", metavar="DIR", help="graphs (default: those of the codes)")
    group.add_argument("--model", type=Path, nargs="+", metavar="DIR", help="adapters, merged or base models")
    group.add_argument("--tokenizer", metavar="DIR", help="its tokens are counted in prompts (default: an estimate)")
    add_record_flags(parser)
    group = parser.add_argument_group("drawing")
    group.add_argument("--sample", type=at_least(1), default=2000, metavar="N", help="most entities in figures 2 and 9")
    group.add_argument("--seed", type=at_least(0), default=0, help="seed of samples, baselines and t-SNE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for folder in args.model or []:
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise InputError(f"--model {folder} has no config.json or adapter_config.json: it is no model")
    inputs = Inputs(
        codes=args.codes, records=args.records, data=args.data, datasets=args.dataset, models=args.model,
        tokenizer=args.tokenizer, sample=args.sample, seed=args.seed,
    )  # fmt: skip
    if "all" in args.figure:
        if not draw_all(inputs, args.out, list(FIGURES)):
            raise InputError("nothing could be drawn; the lines above name the commands for the inputs")
    else:
        for name in args.figure:
            files = FIGURES[name].draw(inputs, args.out)
            print(f"figure {name}: wrote {', '.join(path.name for path in files)}", flush=True)
    print(f"the files are in {args.out}")


if __name__ == "__main__":
    run_command(main)

"""Quality of codes, without any model: perplexity, collisions, entropy and Jaccard distances.

    python tables/code_quality.py --codes codes_new/FB15k-237_4_1024_4_rq.pt
    python tables/code_quality.py --codes demo_output/family_4_256_4_rq.pt --json quality.json

Definitions (M entities, codes [M, L, Q]):

bits per entity     L * Q * log2 K, the size of an entity's codes
perplexity          per level: exp of the entropy of the code frequencies; K if all codes are equally frequent
collisions          entities that share their whole code with another one
entropy             -sum p log2 p over whole-entity codes (Eq. 11), in bits; log2 M if no two entities are equal.
                    The paper's figures exceed log2 M, so they are not comparable
Jaccard distance    of two entities: 1 - |A & B| / |A | B|, with A the L*Q items (position, level, code) of an entity
                    (Eq. 12, 13). At k: the mean over all entities of the mean over their k nearest other entities by
                    squared distance of the decoded vectors [L * code_dim] in float32, ties by id. High: near entities
                    have different codes. All sets have L*Q items: s equal items give 1 - s / (2*L*Q - s)
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.codes import load_codes, load_entities
from Class.source import check_recorded, dumped_codes, read_record
from common.errors import CommandParser, InputError, at_least, run_command
from common.files import load_torch, output_file, write_json
from tables.system import parameters_of, short_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

KS = tuple(range(200, 1001, 100))  # the paper's k
CHUNK = 1024  # entities at a time: 24 * CHUNK * M bytes (``nearest_entities``)


class CodeSet(NamedTuple):
    """One run's codes as stage 1 wrote them, checked against its record."""

    path: Path
    record: dict[str, Any]
    entities: list[str]  # M raw names
    codes: Tensor  # int64 [M, L, Q]
    num_code: int  # K
    vectors: Tensor | None  # float32 [M, L, code_dim]; None if stage 1 did not save them

    @property
    def name(self) -> str:
        return self.path.stem

    def flat_vectors(self) -> Tensor:
        """The decoded vectors [M, L * code_dim]; InputError if the file does not exist."""
        if self.vectors is None:
            raise InputError(f"{self.path}: no decoded vectors (_emd.pt) beside it; run run_rq.py again with --restore")
        return self.vectors.flatten(1)


def open_code_set(path: str | Path) -> CodeSet:
    """Read codes, names and, if saved, vectors. InputError if a file is not the one of its record."""
    path = Path(path)
    record = read_record(path)
    names, vectors = path.with_suffix(".entities.txt"), path.with_name(f"{path.stem}_emd.pt")
    for file in (path, names, *([vectors] if vectors.is_file() else [])):
        check_recorded(file, record)
    entities, num_code = load_entities(names), int(record["args"]["num_code"])
    codes = load_codes(path, len(entities), num_code)
    found = load_torch(vectors, "embeddings") if vectors.is_file() else None
    if found is not None and (found.dim() != 3 or found.shape[:2] != codes.shape[:2]):
        raise InputError(
            f"{vectors} is {list(found.shape)}, expected {[*codes.shape[:2], 'code_dim']}; run run_rq.py again"
        )
    return CodeSet(path, record, entities, codes, num_code, found)


# ---------------------------------------------------------------- nearest entities, Jaccard


def nearest_entities(rows: Tensor, vectors: Tensor, k: int) -> Tensor:
    """Ids [n, k] of the k nearest other entities of each of ``rows`` [n], by squared distance of ``vectors`` [M, D].

    Nearest first, ties by id. Distances are computed in float64 and rounded to float32, so that equal vectors tie for
    any order of summation. Memory: 24 bytes * n * M.
    """
    import torch

    wide = vectors.double()
    norms = wide.square().sum(1)
    squares = torch.addmm(norms[rows, None] + norms, wide[rows], wide.t(), alpha=-2).clamp_min_(0)
    squares[torch.arange(len(rows)), rows] = torch.inf
    # the bits of a float32 >= 0 have the order of its values: above the id, they make one integer without ties
    keys = (squares.float() + 0.0).view(torch.int32).long() << 32
    keys |= torch.arange(len(vectors))
    return keys.topk(min(k, len(vectors) - 1), largest=False, sorted=True).values & 0xFFFFFFFF


def jaccard(codes: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """Jaccard distances float64 [n, k] of entities ``rows`` [n] to ``others`` [n, k], codes [M, L, Q]."""
    import torch

    cells = codes.flatten(1).int().numpy()  # [M, L*Q]; numpy: a row is too little work for torch's threads
    near = others.numpy()
    same = np.empty(near.shape)
    for place, row in enumerate(rows.tolist()):
        same[place] = np.count_nonzero(cells[near[place]] == cells[row], axis=1)
    return torch.from_numpy(1 - same / (2 * cells.shape[1] - same))


def jaccard_of(
    variants: Sequence[Tensor], vectors: Tensor, ks: Sequence[int] = KS, chunk: int = CHUNK
) -> list[dict[int, float]]:
    """For each of ``variants`` (codes [M, L, Q]): k -> mean Jaccard distance to the k nearest entities by ``vectors``.

    A k above M - 1 is left out. ``chunk`` entities at a time, which changes no result.
    """
    import torch

    M, wide = len(vectors), vectors.double()
    ks = sorted({k for k in ks if 1 <= k < M})
    if not ks:
        return [{} for _ in variants]
    last = torch.tensor(ks) - 1
    sums = torch.zeros(len(variants), len(ks), dtype=torch.float64)
    for rows in torch.arange(M).split(chunk):
        others = nearest_entities(rows, wide, ks[-1])
        for total, codes in zip(sums, variants, strict=True):
            total += jaccard(codes, rows, others).cumsum(1)[:, last].sum(0)
    means = sums / (torch.tensor(ks) * M)
    return [dict(zip(ks, row, strict=True)) for row in means.tolist()]


# ---------------------------------------------------------------- all numbers


def quality(found: CodeSet, ks: Sequence[int] = KS) -> dict[str, Any]:
    """All numbers of this file's docstring for one set of codes; ``jaccard`` is None without vectors."""
    from model.RQCodebook import code_perplexity, collisions, entropy_bits

    M, L, Q = found.codes.shape
    distances = None if found.vectors is None else jaccard_of([found.codes], found.flat_vectors(), ks)[0]
    return {
        "codes": found.path.name,
        "dataset": found.record["dataset"],
        "entities": M,
        "seq_len": L,
        "num_code": found.num_code,
        "num_quantizers": Q,
        "bits_per_entity": L * Q * math.log2(found.num_code),
        "parameters_behind_codes": parameters_of(found.record),
        "perplexity": code_perplexity(found.codes, found.num_code).tolist(),
        "collisions": collisions(found.codes),
        "entropy_bits": entropy_bits(found.codes),
        "entropy_bits_max": math.log2(M),
        "jaccard": None if distances is None else {str(k): value for k, value in distances.items()},
    }


def print_quality(row: dict[str, Any]) -> None:
    """One set of codes, as a table."""
    size = f"{row['seq_len']} x {row['num_quantizers']} of {row['num_code']:,}"
    print(
        f"{row['codes']}: {row['entities']:,} entities, {size}, {row['bits_per_entity']:,.0f} bits per entity, "
        f"{short_count(row['parameters_behind_codes'])} behind the codes"
    )
    print("  level       " + "".join(f"{level:>9}" for level in range(row["num_quantizers"])))
    print("  perplexity  " + "".join(f"{value:9.1f}" for value in row["perplexity"]))
    print(f"  collisions  {row['collisions']:,} entities share their whole code with another one")
    print(
        f"  entropy     {row['entropy_bits']:.3f} bits of at most {row['entropy_bits_max']:.3f} (log2 of the entities)"
    )
    if row["jaccard"] is None:
        print("  Jaccard     not measured: the decoded vectors (_emd.pt) are not beside the codes")
    elif row["jaccard"]:
        print("  k nearest   " + "".join(f"{k:>9}" for k in row["jaccard"]))
        print("  Jaccard     " + "".join(f"{value:9.4f}" for value in row["jaccard"].values()))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/code_quality.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--codes", type=Path, nargs="+", metavar="FILE.pt", help="codes files (default: all of stage 1)"
    )
    parser.add_argument("--k", type=at_least(1), nargs="+", default=list(KS), metavar="K",
                        help="numbers of nearest entities (default: 200 to 1000)")  # fmt: skip
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the numbers to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows = []
    paths = args.codes or dumped_codes()
    if not paths:
        raise InputError("--codes: codes_new/ and demo_output/ hold no codes; make some: python demo_complete.py")
    for path in paths:
        row = quality(open_code_set(path), args.k)
        print_quality(row)
        left_out = [k for k in args.k if k >= row["entities"]]
        if left_out:
            print(f"  left out    k = {', '.join(map(str, left_out))}: only {row['entities'] - 1} other entities")
        rows.append(row)
    if args.json:
        write_json(rows, args.json)
        print(f"wrote {args.json}")


if __name__ == "__main__":
    run_command(main)

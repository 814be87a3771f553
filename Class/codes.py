"""Codes files: how the integers of stage 1 are named, saved, loaded and checked.

{dataset}_{L}_{K}_{Q}_rq.pt       int64 [M, L, Q]     (VQ: {dataset}_{L}_{K}.pt, int64 [M, L])
..._rq_emd.pt                     float32 [M, L, code_dim], the vectors that the codes stand for
..._rq.entities.txt               one raw entity name per row, so that codes map to another data set's ids
..._rq.json                       the run record
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from run_record import InputError, load_torch, save_torch, sha256_file, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class CodeFiles(NamedTuple):
    """The files of one set of codes, all beside each other."""

    codes: Path
    embeddings: Path
    entities: Path
    record: Path


def code_stem(dataset: str, seq_len: int, num_code: int, num_quantizers: int, quantizer: str = "rq") -> str:
    """SPEC's name of a codes file without its ending; VQ codes are named without the level count."""
    if quantizer == "vq":
        return f"{dataset}_{seq_len}_{num_code}"
    return f"{dataset}_{seq_len}_{num_code}_{num_quantizers}_rq"


def code_files(folder: str | Path, stem: str) -> CodeFiles:
    """Paths of the four files of ``stem`` in ``folder``."""
    folder = Path(folder)
    return CodeFiles(
        folder / f"{stem}.pt", folder / f"{stem}_emd.pt", folder / f"{stem}.entities.txt", folder / f"{stem}.json"
    )


def save_codes(
    files: CodeFiles, codes: torch.Tensor, entities: Sequence[str], embeddings: torch.Tensor | None
) -> dict[str, str]:
    """Write codes [M, L, Q] (or VQ [M, L]), names and, where given, embeddings [M, L, code_dim].

    Returns file name -> sha256 of what was written, for the record.
    """
    import torch

    if codes.dtype != torch.int64 or len(codes) != len(entities):
        raise ValueError(f"codes must be int64 with one row per entity: {codes.dtype}, {len(codes)}, {len(entities)}")
    save_torch(codes.cpu().contiguous(), files.codes)
    write_text("".join(f"{name}\n" for name in entities), files.entities)
    written = [files.codes, files.entities]
    if embeddings is not None:
        save_torch(embeddings.detach().to("cpu", torch.float32).contiguous(), files.embeddings)
        written.append(files.embeddings)
    return {path.name: sha256_file(path) for path in written}


def load_codes(path: str | Path, num_entities: int | None = None, num_code: int | None = None) -> torch.Tensor:
    """Read and check a codes file; always returns int64 [M, L, Q] (VQ's [M, L] becomes [M, L, 1]).

    Raises InputError with both sides named when the shape, dtype, row count or index range is wrong.
    """
    import torch

    codes = load_torch(path, "codes")
    if not isinstance(codes, torch.Tensor):
        raise InputError(f"codes file {path} holds a {type(codes).__name__}, expected an int64 tensor [M, L, Q]")
    if codes.dtype != torch.int64 or codes.dim() not in (2, 3) or codes.numel() == 0:
        raise InputError(
            f"codes file {path} holds {codes.dtype} {list(codes.shape)}, expected torch.int64 [M, L, Q] (VQ: [M, L])"
        )
    if num_entities is not None and len(codes) != num_entities:
        raise InputError(f"codes file {path} has {len(codes)} rows, but the data set has {num_entities} entities")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or (num_code is not None and high >= num_code):
        limit = "" if num_code is None else f"..{num_code - 1}"
        raise InputError(f"codes file {path} holds indices {low}..{high}, expected 0{limit}")
    return codes if codes.dim() == 3 else codes.unsqueeze(-1)


def load_entities(path: str | Path) -> list[str]:
    """The raw entity names of ``{stem}.entities.txt``, row by row. Raises InputError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"entity names {path} cannot be read: {error}; run run_rq.py again to write them") from error

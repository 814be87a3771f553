"""A run that does not fit the memory: one line with the flags that make it smaller, and values that would fit."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from common.device import memory_wanted
from common.errors import InputError


def smaller_batch(batch: int, used: float, wanted: float, total: float, fixed: float) -> int:
    """The largest power of two below ``batch`` that fits, where all but ``fixed`` grows with the batch; at least 2.

    Bytes: ``used`` when ``wanted`` more were refused, ``total`` of the device (a tenth stays free).
    """
    part = max(0.0, 0.9 * total - fixed) / max(1.0, used + wanted - fixed)
    fits = min(int(batch * part), batch - 1)
    return max(2, 1 << max(1, fits.bit_length() - 1))


@contextmanager
def sizes_named(args: argparse.Namespace) -> Iterator[None]:
    """Turn a lack of memory within the block into an InputError. ``args``: the flags of run_rq.py."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        memory = memory_wanted(error)
        if memory is None:
            raise
        reason = " ".join(str(error).split(". ")[0].split()) or "no memory"
        if args.eval_codes:
            raise InputError(f"out of memory ({reason}); close other programs, or rank with --device cpu") from error
        # how much the encoder keeps, whatever the batch, is not known here: a quarter of what was used is assumed
        batch = smaller_batch(args.batch, memory.used, memory.wanted, memory.total, memory.used / 4)
        sampled = args.num_negatives or args.loss != "ce" or args.teacher
        negatives = "" if sampled else f" (or keep it and score --num_negatives {8 * batch} at a time)"
        others = ", ".join(smaller_model(args))
        raise InputError(
            f"out of memory ({reason}); --batch {args.batch} is too large here, try --batch {batch}{negatives}"
            f"{', else ' if others else ''}{others}; "
            "the last finished epoch is kept, and other flags are another run: --name and --out_dir"
        ) from error


def smaller_model(args: argparse.Namespace) -> list[str]:
    """The flags that make the model smaller, such as the others let stand: given codes have their levels, members share
    the width out, and ComplEx halves what each has of it."""
    found = []
    # no number where reading the graph itself was too much
    if isinstance(args.num_quantizers, int) and args.num_quantizers > 1 and not args.codes_from:
        found.append(f"--num_quantizers {args.num_quantizers // 2}")
    step, width = 2 * args.ensemble, "gcn_dim" if args.gcn_layers else "init_dim"
    half = getattr(args, width) // 2 // step * step
    if half:
        found.append(f"--{width} {half}")
    if args.gcn_layers > 1 and not args.codes_from:
        found.append("--gcn_layers 1")
    return found

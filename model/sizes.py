"""Sizes that fit a graph, for settings that are "auto", and what to reduce where they do not fit the memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common.config import AUTO, Config
from common.device import memory_wanted
from common.errors import InputError

EXACT_UP_TO = 20_000  # entities; above, a softmax over SAMPLED ones, drawn per step, is several times as fast
SAMPLED = 4096
EVERY_STEP_UP_TO = 100_000  # entities; above, the encoder's pass is dearer than many steps (benchmarks/growth.py)
GRAPH_PACE = 8  # scorer steps per pass of graph layers and transformer blocks
WIDTH = 256
FEWEST_CODES, MOST_CODES = 8, 1024
LARGE = 5_000  # entities, from which on other batches and codes were better (docs/DEFAULTS.md)
STEPS = 4000  # of a run on a small graph
FEWEST_EPOCHS, MOST_EPOCHS = 24, 200  # on a small graph
MOST_N3_SMALL, MOST_N3_LARGE = 0.03, 0.05  # weight of the N3 norm; less where an entity has many triples (docs/LOG.md)
N3_WEIGHTS = (0.005, 0.025, 0.05)  # of which valid chooses, where a run is long enough to try them
N3_TRIAL = 0.1  # part of the run that each is tried for
RATES = {"adagrad": 0.1, "adam": 0.005}
WIDTHS = ("init_dim", "gcn_dim", "seq_len")
LEAST_ADAGRAD_RATE = 0.02  # below, Adagrad hardly learns, and a given rate is meant for Adam


def sizes_for(entities: int, relations: int, triples: int) -> dict[str, Any]:
    """Settings for a graph of M entities, R relations and E training triples: flag -> value (docs/DEFAULTS.md)."""
    codes = min(MOST_CODES, max(FEWEST_CODES, 1 << max(0, entities - 1).bit_length()))
    n3 = round(min(MOST_N3_SMALL if entities < LARGE else MOST_N3_LARGE, entities / (2 * triples)), 4)
    found = {"n3": n3, "num_code": codes, "num_negatives": 0, "encoder_every": 1, "optimizer": "adagrad"}
    if entities > EXACT_UP_TO:
        found |= {"num_negatives": SAMPLED}
    if entities > EVERY_STEP_UP_TO:
        found |= {"encoder_every": encoder_pace(entities)}
    if entities < LARGE:  # many passes over few triples
        steps = max(1, triples // 256)  # per epoch: two tails per batch entry on average
        epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, math.ceil(STEPS / steps)))
        return found | {"init_dim": WIDTH, "gcn_dim": WIDTH, "seq_len": 4, "num_quantizers": 4,
                                     "batch": 256, "tails_at_once": 4, "epoch": epochs}  # fmt: skip
    epochs = max(5, min(40, 40 * 500_000 // triples))
    return found | {"init_dim": WIDTH, "gcn_dim": WIDTH, "seq_len": 2, "num_quantizers": 8,
                              "batch": 1024, "tails_at_once": 64, "epoch": epochs}  # fmt: skip


def adapted(found: dict[str, Any], config: Config) -> dict[str, Any]:
    """``sizes_for``, adapted to given settings: one level has 16 positions; layers that add to the inputs pass once per
    several steps, those that change the width are trained by Adam; N3 is for vectors that are multiplied as they are;
    each optimizer has its own rate, and a low --lr is one for Adam."""
    if config.quantizer == "vq":
        found = found | {"seq_len": found["seq_len"] * found["num_quantizers"]}
    if config.gcn_layers or config.tf_layers:
        sized = dataclasses.replace(config, **{name: found[name] for name in WIDTHS if getattr(config, name) == AUTO})
        width, codes = _width(sized), sized.seq_len * (_code_dim(sized) if sized.code_dim == AUTO else sized.code_dim)
        if sized.init_dim == width == codes:
            found = found | {"encoder_every": max(GRAPH_PACE, found["encoder_every"])}
        else:
            found = found | {"optimizer": "adam", "n3": 0.0}
    if AUTO != config.lr < LEAST_ADAGRAD_RATE:
        found = found | {"optimizer": "adam"}
    if config.decoder not in ("complex", "distmult"):
        found = found | {"n3": 0.0}
    return found | {"lr": RATES[found["optimizer"] if config.optimizer == "auto" else config.optimizer]}


def with_sizes(config: Config, entities: int, relations: int, triples: int, n3_by_valid: bool = False) -> Config:
    """``config`` with a value in place of every "auto"; one line says which.

    ``code_dim``, where it is "auto", shares D out among the L positions. ``n3_by_valid``: n3 stays "auto" where its
    weights are to be tried: not in runs of a few epochs or minutes, nor without a warm-up. Raises InputError where
    widths do not fit.
    """
    found = adapted(sizes_for(entities, relations, triples), config)
    epochs = found["epoch"] if config.epoch == AUTO else config.epoch
    enough = N3_TRIAL * epochs >= 1 and not config.max_minutes
    if n3_by_valid and enough and found["n3"] > 0 and config.quantizer != "random":
        found["n3"] = AUTO
    chosen: dict[str, Any] = {name: value for name, value in found.items() if getattr(config, name) in (AUTO, "auto")}
    sized = dataclasses.replace(config, **chosen)
    if config.loss != "ce":
        sized = dataclasses.replace(sized, num_negatives=0, tails_at_once=0)  # those of SOFTMAX_ONLY
    if config.code_dim == AUTO:
        chosen["code_dim"] = _code_dim(sized)
        sized = dataclasses.replace(sized, code_dim=chosen["code_dim"])
    if chosen:
        flags = " ".join(f"--{name} {value}" for name, value in chosen.items() if value != AUTO)
        print(f"sizes for {entities:,} entities, {relations} relations, {triples:,} triples: {flags}")
    if sized.tf_layers and sized.code_dim % sized.att_head:
        raise InputError(f"--code_dim {sized.code_dim} is no multiple of --att_head {sized.att_head}; change one")
    return sized


def _width(config: Config) -> int:
    """D."""
    return config.gcn_dim if config.gcn_layers else config.init_dim


def _code_dim(config: Config) -> int:
    """An equal part of D for each position."""
    step = config.att_head if config.tf_layers else 1
    return max(8, _width(config) // config.seq_len // step * step)


def encoder_pace(entities: int) -> int:
    """Scorer steps per pass of the encoder on a large graph: a pass reads the whole graph, a step does not."""
    return max(64, 64 * entities // EVERY_STEP_UP_TO)


# ---------------------------------------------------------------- out of memory


def smaller_batch(batch: int, used: float, wanted: float, total: float, fixed: float) -> int:
    """The largest power of two below ``batch`` that fits, where all but ``fixed`` grows with the batch; at least 2.

    Bytes: ``used`` when ``wanted`` more were refused, ``total`` of the device (a tenth stays free).
    """
    part = max(0.0, 0.9 * total - fixed) / max(1.0, used + wanted - fixed)
    fits = min(int(batch * part), batch - 1)
    return max(2, 1 << max(1, fits.bit_length() - 1))


@contextmanager
def explain_oom(config: Config) -> Iterator[None]:
    """Turn a lack of memory within the block into an InputError that names smaller sizes, once sizes are chosen."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        memory = memory_wanted(error)
        if memory is None:
            raise
        reason = " ".join(str(error).split(". ")[0].split()) or "no memory"
        if config.eval_codes or config.batch == AUTO:
            raise InputError(f"out of memory ({reason}); close other programs, or use --device cpu") from error
        # the encoder's part, which does not depend on the batch, is unknown here: a quarter of what was used is assumed
        batch = smaller_batch(config.batch, memory.used, memory.wanted, memory.total, memory.used / 4)
        exact = config.loss == "ce" and not config.num_negatives
        negatives = f" (or keep it and score --num_negatives {8 * batch} at a time)" if exact else ""
        others = ", ".join(smaller_model(config))
        raise InputError(
            f"out of memory ({reason}); --batch {config.batch} is too large here, try --batch {batch}{negatives}"
            f"{', else ' if others else ''}{others}; "
            "the last finished epoch is kept, and other flags are another run: --name and --out_dir"
        ) from error


def smaller_model(config: Config) -> list[str]:
    """Flags that make the model smaller and keep it valid: members share the width, ComplEx halves it."""
    found = []
    if config.num_quantizers > 1:
        found.append(f"--num_quantizers {config.num_quantizers // 2}")
    step, width = 2 * config.ensemble, "gcn_dim" if config.gcn_layers else "init_dim"
    half = getattr(config, width) // 2 // step * step
    if half > 0:
        found.append(f"--{width} {half}")
    if config.gcn_layers > 1:
        found.append("--gcn_layers 1")
    return found

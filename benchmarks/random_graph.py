"""Random graphs with the degree distribution and relation frequencies of FB15k-237, for benchmarks of any size.

Heads and tails are drawn with weights (rank - 1 + shift)^(-1 / (a - 1)), so that degrees have the tail P(d) ~ d^-a; the
shift sets the share of the largest degree. An entity has the same rank as a head and as a tail. Relations have weights
rank^-s (Zipf). Head, tail and relation of a triple are independent, so there is nothing to learn.

The constants were fitted to the training triples of FB15k-237 by maximum likelihood above the best cut (Clauset,
Shalizi and Newman 2009); the shifts give the largest degrees their share of the triples (heads .5 %, tails 2.3 %).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.knowledge_graph import KnowledgeGraph

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

HEADS, TAILS = (3.147, 0.404), (2.488, 0.498)  # a, shift
RELATIONS, RELATION_EXPONENT = 237, 0.871  # R, s


def random_triples(num_entities: int, count: int, seed: int) -> Ints:
    """``count`` distinct triples [count, 3] in a random order; entity ids are not sorted by degree.

    Raises ValueError if there are not that many distinct triples.
    """
    rng = np.random.default_rng(seed)
    ids = rng.permutation(num_entities)
    heads, tails = _weights(num_entities, *HEADS), _weights(num_entities, *TAILS)
    relations = np.arange(1, RELATIONS + 1) ** -RELATION_EXPONENT
    keys = np.empty(0, dtype=np.int64)
    for _ in range(50):
        missing = count - len(keys)
        if missing <= 0:
            break
        drawn = (_draws(rng, p, missing + missing // 20 + 10) for p in (heads, relations / relations.sum(), tails))
        h, r, t = drawn
        keys = np.concatenate([keys, (ids[h] * RELATIONS + r) * num_entities + ids[t]])
        keys.sort()  # np.unique would hash, which takes ten times as long here
        keys = keys[np.append(True, keys[1:] != keys[:-1])]
    if len(keys) < count:
        raise ValueError(f"{count} distinct triples over {num_entities} entities are too many")
    keys = rng.permutation(keys)[:count]
    return np.stack([keys // (RELATIONS * num_entities), keys // num_entities % RELATIONS, keys % num_entities], 1)


def _weights(size: int, exponent: float, shift: float) -> Floats:
    weights = (np.arange(size) + shift) ** (-1 / (exponent - 1))
    return weights / weights.sum()


def _draws(rng: np.random.Generator, p: Floats, count: int) -> Ints:
    """``count`` independent draws from ``p`` in linear time: the number of each, then a random order."""
    return rng.permutation(np.repeat(np.arange(len(p)), rng.multinomial(count, p)))


def random_kg(num_entities: int, count: int, seed: int, held_out: tuple[int, int] = (0, 0)) -> KnowledgeGraph:
    """A graph of ``count`` training triples and ``held_out`` (valid, test) more of the same distribution."""
    triples = random_triples(num_entities, count + sum(held_out), seed)
    train, valid, test = np.split(triples, np.cumsum([count, held_out[0]]))
    names, relations = [str(i) for i in range(num_entities)], [str(i) for i in range(RELATIONS)]
    return KnowledgeGraph(
        name=f"random graph of {num_entities:,} entities", entities=names, relations=relations, train=train,
        valid=valid, test=test, labels=names, has_label=np.zeros(num_entities, dtype=bool),
        descriptions=[""] * num_entities, relation_labels=relations,
    )  # fmt: skip

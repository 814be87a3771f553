"""What can be read from the codes by linear maps? Facts about an entity, and whether a triple holds. No LLM is used.

    python tables/probe_codes.py --dataset data/family --codes demo_output/family_4_256_4_rq.pt \
        --checkpoint demo_output/checkpoints/family_4_256_4_rq.pt

A fact: the entity is the head (or the tail) of some training triple of a relation. Facts that hold, or do not hold, for
fewer than --least entities are left out. A linear map (ridge regression) is fitted on three fifths of the entities, its
penalty chosen on one fifth; AUC on the last fifth, mean over the facts (.5: nothing can be read). Inputs:

codes          one-hot by position, level and index [L * Q * K]
tokens         the same without positions [Q * K]: how often an entity has each token that an LLM reads
vectors        q_e [D], decoded from the codes
shuffled       codes of another entity (control)
names          with --model_name: hidden states of an untuned LLM at the end of the name, at LAYERS of its depth
names + codes  both: what codes add to what the LLM knows of a name; and the same with shuffled codes

With given negatives (valid_neg.txt, test_neg.txt) also triple classification: test accuracy of the stage-1 decoder's
score, one threshold per relation chosen on validation. --triples N, with --model_name: accuracy on N test rows of
linear maps of the LLM's state after the prompt of triple classification without codes, alone and beside the decoder's
score minus its threshold (with codes and with shuffled codes), fitted on N validation rows that chose no threshold.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from Class.codes import unique_names
from Class.prompts import classification
from Class.source import fit_codes
from common.errors import CommandParser, InputError, at_least, run_command
from common.files import output_file, sha256_file, write_json
from common.record import make_record
from data.knowledge_graph import KnowledgeGraph
from lora_training.base_model import load_base, load_tokenizer
from lora_training.prompts import encode_texts, prompt_text
from model.inputs import LoadedScorer, load_scorer

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
LAYERS = (0.33, 0.67, 1.0)
LEAST = 20  # validation rows of a relation that gets a threshold of its own


class Parts(NamedTuple):
    """Entities of the three parts, as rows of the inputs."""

    train: Tensor  # three fifths
    validation: Tensor
    test: Tensor


def facts_of(kg: KnowledgeGraph, least: int) -> Tensor:
    """[M, T] 0/1: relations that an entity is the head of, then those that it is the tail of, rare ones left out."""
    found = np.zeros((kg.num_entities, 2 * kg.num_relations), dtype=np.float32)
    h, r, t = kg.train.T
    found[h, r] = found[t, r + kg.num_relations] = 1
    counts = found[~kg.unseen].sum(0)
    return torch.from_numpy(found[:, (counts >= least) & (counts <= (~kg.unseen).sum() - least)])


def one_hot(codes: Tensor, num_code: int, positions: bool) -> Tensor:
    """codes [N, L, Q] -> [N, L * Q * K], or without ``positions`` the counts [N, Q * K]."""
    found = torch.nn.functional.one_hot(codes, num_code).float()
    return (found if positions else found.sum(1)).flatten(1)


def auc(scores: Tensor, labels: Tensor) -> float:
    """Probability that a positive has a higher score than a negative, mean over the columns of [N, T] with both."""
    ranks = scores.argsort(0).argsort(0).double() + 1  # ties in the order of the rows
    positives = labels.sum(0).double()
    negatives = len(labels) - positives
    both = (positives > 0) & (negatives > 0)
    above = (ranks * labels).sum(0) - positives * (positives + 1) / 2
    return float((above / (positives * negatives))[both].mean())


def scaled(inputs: Tensor) -> Tensor:
    """The same [N, F] with a mean squared row norm of 1, so that one set of penalties suits all inputs."""
    return inputs * float(len(inputs) / inputs.square().sum()) ** 0.5


class Fitted(NamedTuple):
    """A ridge regression with the penalty that validation chose."""

    auc: float  # on the test part, mean over the facts
    scores: Tensor  # [test part, T]: near 1 where a fact holds, near 0 where not


def ridge(inputs: Tensor, facts: Tensor, parts: Parts) -> Fitted:
    """Ridge regressions of the facts [N, T] on the inputs [N, F]; the penalty with the best validation AUC.

    In the dual form, which costs the same for any F: alpha = (X X^T + 1 + penalty I)^-1 (Y - mean Y).
    """
    known, chosen, asked = (inputs[part] for part in parts)
    mean = facts[parts.train].mean(0)
    products, identity = known @ known.T + 1, torch.eye(len(known))
    best, found = -1.0, Fitted(0.0, torch.empty(0))
    for penalty in PENALTIES:
        alpha = torch.cholesky_solve(facts[parts.train] - mean, torch.linalg.cholesky(products + penalty * identity))
        validation, scores = ((part @ known.T + 1) @ alpha + mean for part in (chosen, asked))
        value = auc(validation, facts[parts.validation])
        if value > best:
            best, found = value, Fitted(auc(scores, facts[parts.test]), scores)
    return found


@torch.no_grad()
def name_states(model_name: str, names: list[str], batch: int = 32) -> Tensor:
    """Hidden states [N, len(LAYERS) * D] of a base LLM at the last token of each text, standardized; in bfloat16."""
    tokenizer = load_tokenizer(model_name)
    model = load_base(model_name, torch.bfloat16, None, {"": "cpu"}).eval()
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [start + name for name in encode_texts(names, tokenizer)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: dict[int, Tensor] = {}
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        width = max(len(ids[i]) for i in part)
        padded = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in part])  # causal: padding is never read
        states = model(input_ids=padded, output_hidden_states=True, logits_to_keep=1).hidden_states
        depth = len(states) - 1
        chosen = torch.cat([states[round(depth * share)] for share in LAYERS], -1)
        found |= {i: chosen[row, len(ids[i]) - 1] for row, i in enumerate(part)}
    return standardized(torch.stack([found[i] for i in range(len(ids))]).float())


def standardized(inputs: Tensor) -> Tensor:
    """Each column with mean 0 and standard deviation 1."""
    return (inputs - inputs.mean(0)) / inputs.std(0).clamp(min=1e-6)


def best_threshold(scores: Tensor, labels: Tensor) -> float:
    """The threshold above which "True" has the highest accuracy."""
    order = scores.argsort(descending=True)
    right = torch.cat([torch.zeros(1), torch.where(labels[order], 1.0, -1.0).cumsum(0)])
    place = int(right.argmax())
    ends = torch.cat([scores.max()[None] + 1, scores[order], scores.min()[None] - 1])
    return float((ends[place] + ends[place + 1]) / 2)


class Rows(NamedTuple):
    """Triples [n, 3] of a split, positives then given negatives, and whether they hold [n]."""

    triples: Tensor
    labels: Tensor


def labelled(kg: KnowledgeGraph, split: str) -> Rows | None:
    """The rows of ``split``; None if the graph has no given negatives."""
    negatives = kg.negatives(split)
    if negatives is None:
        return None
    positives = kg.split(split)
    triples = torch.from_numpy(np.concatenate([positives, negatives]))
    return Rows(triples, torch.arange(len(triples)) < len(positives))


@torch.no_grad()
def margins(loaded: LoadedScorer, vectors: Tensor, fit: Rows, rows: Sequence[Rows]) -> list[Tensor]:
    """The decoder's score minus its relation's threshold, for each of ``rows``; thresholds are chosen on ``fit``.

    ``vectors`` [M, D]. Relations with fewer than LEAST rows in ``fit`` share one threshold.
    """

    def scores(part: Rows) -> Tensor:
        h, r, t = part.triples.T
        return (loaded.scorer.decoder.query(vectors[h], loaded.relations[r]) * vectors[t]).sum(1)

    own, relation = scores(fit), fit.triples[:, 1]
    thresholds = torch.full((len(loaded.relations),), best_threshold(own, fit.labels))
    for r in range(len(thresholds) // 2):
        if int((relation == r).sum()) >= LEAST:
            thresholds[r] = best_threshold(own[relation == r], fit.labels[relation == r])
    return [scores(part) - thresholds[part.triples[:, 1]] for part in rows]


def beside_names(
    args: argparse.Namespace, kg: KnowledgeGraph, loaded: LoadedScorer, vectors: Tensor, generator: torch.Generator
) -> dict[str, Any]:
    """Accuracy on test triples of linear maps of the LLM's states, alone and beside the margins of the codes."""
    valid, test = (labelled(kg, split) for split in ("valid", "test"))
    assert valid is not None and test is not None  # checked at the start
    order = torch.randperm(len(valid.labels), generator=generator)
    fit, rest = (
        Rows(valid.triples[part], valid.labels[part]) for part in (order[: args.triples], order[args.triples :])
    )
    part = torch.randperm(len(test.labels), generator=generator)[: args.triples]
    test = Rows(test.triples[part], test.labels[part])
    names = unique_names(kg).names
    prompts = [
        prompt_text({"instruction": classification(names[h], kg.relation_labels[r], names[t], "", "", False)})
        for rows in (fit, test) for h, r, t in rows.triples.tolist()
    ]  # fmt: skip
    states = scaled(name_states(args.model_name, prompts))
    other = vectors[torch.randperm(len(vectors), generator=generator)]
    codes, shuffled = (
        scaled(standardized(torch.cat(margins(loaded, given, rest, (fit, test)))[:, None]))
        for given in (vectors, other)
    )
    labels = torch.cat([fit.labels, test.labels]).float()[:, None]
    n = len(fit.labels)
    parts = Parts(*torch.arange(len(labels)).split([n - n // 4, n // 4, len(test.labels)]))
    inputs = {"names": states, "codes": codes, "names + codes": torch.cat([states, codes], 1),
              "names + shuffled": torch.cat([states, shuffled], 1)}  # fmt: skip
    right = {name: (ridge(given, labels, parts).scores[:, 0] > 0.5) == test.labels for name, given in inputs.items()}
    found: dict[str, Any] = {}
    for name, correct in right.items():
        values = correct.double() - right["names"].double()
        found[name] = {"accuracy": float(correct.double().mean()), "minus_names": float(values.mean()),
                       "error": float(values.std() / len(values) ** 0.5)}  # fmt: skip
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="tables/probe_codes.py", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="graph folder")
    parser.add_argument("--codes", type=Path, required=True, metavar="C.pt", help="codes file")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CK.pt", help="the stage-1 checkpoint")
    parser.add_argument(
        "--least", type=at_least(1), default=100, help="entities a fact must hold for, and not hold for"
    )
    parser.add_argument("--entities", type=at_least(5), default=5000, metavar="N", help="at most N entities, at random")
    parser.add_argument("--model_name", metavar="DIR", help="also probe an untuned LLM that reads the names")
    parser.add_argument("--triples", type=at_least(0), default=0, metavar="N", help="N triples to fit and N to test on")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the entities' split and the shuffling")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the table and a run record")
    args = parser.parse_args(argv)
    if args.triples and not args.model_name:
        parser.error("--triples needs --model_name")
    return args


def main(argv: list[str] | None = None) -> None:
    args, started = parse_args(argv), time.monotonic()
    kg = KnowledgeGraph.load(args.dataset)
    if args.triples and not {"valid", "test"} <= kg.negative_splits.keys():
        raise InputError(f"--triples {args.triples}: {kg.name} has no valid_neg.txt and test_neg.txt")
    given_codes, num_code, _ = fit_codes(args.codes, kg, args.dataset)
    codes = torch.from_numpy(given_codes)
    loaded = load_scorer(args.checkpoint, kg, torch.device("cpu"))
    with torch.no_grad():
        vectors = loaded.scorer.eval().entity_vectors_from_codes(codes)
    facts = facts_of(kg, args.least)
    if not facts.shape[1]:
        raise InputError(f"no fact holds for --least {args.least} entities of {kg.name}; give a smaller number")
    generator = torch.Generator().manual_seed(args.seed)
    seen = torch.from_numpy(np.flatnonzero(~kg.unseen))
    seen = seen[torch.randperm(len(seen), generator=generator)][: args.entities]
    fifth = len(seen) // 5
    parts = Parts(*torch.arange(len(seen)).split([len(seen) - 2 * fifth, fifth, fifth]))
    own, facts = codes[seen], facts[seen]
    other = own.roll(1, 0)  # in random order: another entity's
    inputs = {
        "codes": one_hot(own, num_code, True), "tokens": one_hot(own, num_code, False),
        "vectors": standardized(vectors[seen]), "shuffled": one_hot(other, num_code, True),
    }  # fmt: skip
    inputs = {name: scaled(given) for name, given in inputs.items()}
    if args.model_name:
        shown = unique_names(kg).names
        inputs["names"] = scaled(name_states(args.model_name, [shown[e] for e in seen.tolist()]))
        for name in ("codes", "shuffled"):
            inputs[f"names + {name}"] = torch.cat([inputs["names"], inputs[name]], 1)
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in parts._asdict().items())
    print(f"{kg.name}: {facts.shape[1]} facts, entities: {sizes}")
    rows = {}
    for name, given in inputs.items():
        rows[name] = ridge(given, facts, parts).auc
        print(f"{name:16} {given.shape[1]:6,} inputs   AUC {rows[name]:.3f}", flush=True)
    fit, asked = (labelled(kg, split) for split in ("valid", "test"))
    accuracy, triples = None, None
    if fit is not None and asked is not None:
        (margin,) = margins(loaded, vectors, fit, [asked])
        accuracy = float(((margin > 0) == asked.labels).float().mean())
        print(f"triple classification by the decoder's score: test accuracy {accuracy:.4f}")
    if args.triples:
        triples = beside_names(args, kg, loaded, vectors, generator)
        for name, line in triples.items():
            difference = f"{line['minus_names']:+.3f} (standard error {line['error']:.3f}) over names"
            print(f"triples, {name:16} accuracy {line['accuracy']:.3f}   {difference}")
    if args.json:
        hashes = {"codes": sha256_file(args.codes), "checkpoint": sha256_file(args.checkpoint)}
        record = make_record(vars(args), hashes, time.monotonic() - started, dataset=kg.name, facts=facts.shape[1],
                             auc=rows, triple_accuracy=accuracy, triples=triples)  # fmt: skip
        write_json(record, args.json)
        print(f"wrote {args.json}")


if __name__ == "__main__":
    run_command(main)

"""What a finished run leaves: codes, decoded embeddings, names, and the record with metrics from the files."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

from Class.codes import CodeFiles, load_codes, save_codes
from common.config import BASELINES, Config
from common.files import write_json
from common.record import make_record
from model.collisions import TooFewCodes
from model.evaluation import evaluate_codes, shuffled
from model.from_codes import format_metrics
from model.RQCodebook import code_perplexity, collisions, entropy_bits
from model.RQGCN import scorer_of
from model.schedule import CODES
from model.trainer import mrr_as_trained

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from data.knowledge_graph import KnowledgeGraph
    from model.RQGCN import CodeScorer
    from model.trainer import Trainer

EMBEDDINGS_LIMIT_BYTES = 2 * 2**30


def dump_codes(config: Config, trainer: Trainer, files: CodeFiles) -> None:
    """Write the best epoch's codes, rank from what was written, and write the record."""
    assert trainer.best is not None
    start = time.monotonic()
    try:
        changed = trainer.resolve_collisions()
        print(f"collision pass: {changed} entities got a code of their own")
    except TooFewCodes as error:
        print(f"warning: some entities share their code: {error}", file=sys.stderr)
    best, device, kg = trainer.best, trainer.device, trainer.kg
    scorer, relations = scorer_of(trainer.model_args, best, device)
    codes = best["codes"].cpu()
    embeddings = None
    if codes.shape[0] * codes.shape[1] * config.code_dim * 4 <= EMBEDDINGS_LIMIT_BYTES:
        embeddings = scorer.rq_codebook.decode_from_codes(codes.to(device)).detach()
    else:
        print(f"{files.embeddings.name} would exceed 2 GiB and is left out")
        files.embeddings.unlink(missing_ok=True)  # those of the codes that were here before
    written = save_codes(files, codes.squeeze(-1) if config.quantizer == "vq" else codes, kg.entities, embeddings)
    codes = load_codes(files.codes, kg.num_entities, config.num_code).to(device)

    metrics = score_codes(config, kg, scorer, relations, codes)
    metrics["mrr_before_collision_pass"] = mrr_as_trained(best)
    quality: dict[str, Any] = {
        "perplexity": code_perplexity(codes, config.num_code).tolist(),
        "collisions": collisions(codes),
        "entropy_bits": entropy_bits(codes),
    }
    record = run_record(config, trainer, time.monotonic() - start) | metrics
    write_json(record | {"shape": list(codes.shape), "outputs": written, "codes": quality}, files.record)
    print(
        f"wrote {', '.join([*sorted(written), files.record.name])} to {files.codes.parent} "
        f"(best epoch {best['epoch']} of {trainer.epoch})"
    )
    print_scores(metrics)
    print(
        f"codes: perplexity {' '.join(f'{x:.0f}' for x in quality['perplexity'])} of {config.num_code}, "
        f"{quality['collisions']} entities share their code with another, "
        f"entropy {quality['entropy_bits']:.2f} bits"
    )


def score_codes(
    config: Config, kg: KnowledgeGraph, scorer: CodeScorer, relations: torch.Tensor, codes: torch.Tensor
) -> dict[str, Any]:
    """Metrics for the record: valid, its MRR by levels decoded and, where --split is test, test and its control."""

    def rank(split: str, **how: Any) -> dict[str, Any]:
        return evaluate_codes(scorer, relations, codes, kg, split, **how)

    metrics: dict[str, Any] = {"valid": rank("valid")}
    fewer = [rank("valid", levels=level)["mrr"] for level in range(1, config.num_quantizers)]
    metrics["valid_mrr_by_levels"] = [*fewer, metrics["valid"]["mrr"]]
    if config.split == "test":
        metrics["test"] = rank("test")
        metrics["test_shuffled_codes"] = evaluate_codes(scorer, relations, shuffled(codes, config.seed), kg, "test")
    return metrics


def print_scores(metrics: dict[str, Any]) -> None:
    """What ``score_codes`` found."""
    print(f"valid from the dumped codes: {format_metrics(metrics['valid'])}")
    print("valid MRR by levels decoded: " + " ".join(f"{value:.4f}" for value in metrics["valid_mrr_by_levels"]))
    if "test" in metrics:
        print(f"test from the dumped codes:  {format_metrics(metrics['test'])}")
        print(f"control, shuffled codes:     {format_metrics(metrics['test_shuffled_codes'])}")


def dump_control(config: Config, trainer: Trainer, record_file: Path) -> None:
    """Score a baseline's best epoch and write its record only: its codes, if any, are not saved."""
    start = time.monotonic()
    splits = ("valid", "test") if config.split == "test" else ("valid",)
    metrics: dict[str, Any] = {split: trainer.score_best(split) for split in splits}
    record = run_record(config, trainer, time.monotonic() - start) | metrics | {"control": BASELINES[config.quantizer]}
    write_json(record, record_file)
    print(f"wrote {record_file}: {record['control']} (best epoch {record['best_epoch']} of {trainer.epoch}), no codes")
    for split, found in metrics.items():
        print(f"{split}: {format_metrics(found)}")


def run_record(config: Config, trainer: Trainer, more_seconds: float) -> dict[str, Any]:
    """What the record of every run of this command holds beside its metrics.

    ``parameters.behind_codes``: those that turn codes into scores (codebooks, W_q, decoder, relations).
    """
    assert trainer.best is not None
    scorer = sum(p.numel() for p in trainer.model.scorer.parameters())
    bits = config.seq_len * config.num_quantizers * math.log2(config.num_code)
    return make_record(
        config.as_plain(), trainer.inputs, trainer.seconds + more_seconds, trainer.device,
        name=config.name, dataset=trainer.kg.name,
        best_epoch=trainer.best["epoch"], epochs=trainer.epoch, world_size=trainer.world.started,
        epochs_codes_phase=sum(row["phase"] == CODES.name for row in trainer.history),
        bits_per_entity=None if config.quantizer == "none" else round(bits, 3),
        history=trainer.history, trained_on=trainer.trained_on,
        parameters={
            "model": sum(p.numel() for p in trainer.model.parameters()),
            "behind_codes": scorer + trainer.best["relations"].numel(),
        },
    )  # fmt: skip

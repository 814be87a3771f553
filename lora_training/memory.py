"""What LoRA training needs of a GPU, computed from the model's configuration before any weights are loaded.

    weights      every parameter in the compute type; with 4-bit weights the layers' matrices at 4.127 bits (nf4: 4 bits
                 and one scale per 64, itself quantized), embedding and head in the compute type
    trained      LoRA pairs and rows that train: parameter, gradient and two Adam moments, all float32 (16 bytes); with
                 several processes one more gradient copy (DDP's buckets)
    row copies   PEFT writes these rows into a copy of the embedding and of the head on every forward; its gradient; and
                 what the rows were before
    activations  checkpointing: one [B, T, D] per layer, and one layer's inside while it is recomputed; else all of them
    logits       supervised positions alone: [N, V] in the compute type, in float32 and its gradient

Estimates, not bounds: the allocator's slack and the libraries' own memory are the one constant ``CONTEXT``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from common.device import memory_wanted
from common.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30
CONTEXT = 1.0 * GIB
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


@contextmanager
def enough_memory(way: str) -> Iterator[None]:
    """Turn a lack of memory, on a GPU or the CPU, into one line that ends in ``way``: what to do about it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if memory_wanted(error) is None:
            raise
        reason = " ".join((str(error) or type(error).__name__).split())[:160]
        raise InputError(f"out of memory ({reason}); {way}") from error


def sharding() -> str:
    """What `accelerate launch` asked for: ddp, fsdp, zero2 or zero3."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "zero3" if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else "zero2"
    return "ddp"


class Shape(NamedTuple):
    """Sizes of a model, read from an instance without weights."""

    parameters: int  # of the base model
    layer_matrices: int  # parameters of the linear layers, the head left out
    layer_sizes: tuple[tuple[str, int, int], ...]  # (module name, in, out) of each of them
    layers: int
    width: int  # D
    inner: int  # width of the feed-forward part
    vocabulary: int  # rows of the embedding
    matrices: int  # embedding and head: 2, or 1 where they are tied


class Need(NamedTuple):
    """Bytes on one GPU."""

    weights: float
    trained: float
    row_copies: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(self) + CONTEXT


def model_shape(config: PretrainedConfig) -> Shape:
    """The sizes of ``config``'s model, built without memory. InputError where it is no causal language model."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise InputError(
            f"a {config.model_type} model cannot be built as a causal language model (AutoModelForCausalLM): "
            f"{str(error).splitlines()[0][:100]}"
        ) from error
    head = model.get_output_embeddings()
    sizes = tuple(
        (name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    text = config.get_text_config()
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_matrices=sum(inner * outer for _, inner, outer in sizes),
        layer_sizes=sizes,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        matrices=1 if text.tie_word_embeddings else 2,
    )


def lora_parameters(shape: Shape, rank: int, targets: tuple[str, ...] = ()) -> int:
    """r * (in + out) of each adapted matrix: those whose last name is in ``targets``, all where it is empty."""
    return sum(
        rank * (inner + outer) for name, inner, outer in shape.layer_sizes
        if not targets or name.rsplit(".", 1)[-1] in targets
    )  # fmt: skip


def row_parameters(shape: Shape, new_tokens: int) -> int:
    """Trained rows of embedding and head."""
    return shape.matrices * new_tokens * shape.width


def expected_memory(
    shape: Shape,
    lora: int,
    rows: int,
    added_rows: int,
    batch: int,
    length: int,
    answer: int,
    bytes_per_weight: int = 2,
    four_bit: bool = False,
    checkpointing: bool = True,
    world_size: int = 1,
    sharding: str = "ddp",
) -> Need:
    """Bytes per GPU at ``batch`` rows of ``length`` tokens, ``answer`` of them supervised, on each.

    ``lora``, ``rows``: trained parameters, as counted above. ``added_rows``: rows that the embedding grows by.
    ``sharding``: ddp splits nothing, fsdp and zero3 weights and state, zero2 gradients and moments.
    """
    V, trained = shape.vocabulary + added_rows, lora + rows
    D, F, tokens = shape.width, shape.inner, batch * length
    grown = shape.matrices * added_rows * D
    rest = shape.parameters - shape.layer_matrices + grown
    weights = shape.layer_matrices * (NF4_BYTES if four_bit else bytes_per_weight) + rest * bytes_per_weight
    state = 16.0 * trained
    copies = 4.0 * trained if world_size > 1 else 0.0
    if sharding in ("fsdp", "zero3"):  # and one layer at a time, whole
        weights = weights / world_size + shape.layer_matrices / max(shape.layers, 1) * bytes_per_weight
        state /= world_size
    elif sharding == "zero2":
        state = 4.0 * trained + 12.0 * trained / world_size
    boundary = tokens * D * bytes_per_weight
    # inside one layer: residuals and attention in the compute type (8 D), the norms' float32 (4 D), the adapters'
    # float32 inputs with their dropped-out copies (12 D, 2 F); gate, up, activation, product and gradients (6 F)
    inside = tokens * (8 * D * bytes_per_weight + 16 * D * 4 + 6 * F * bytes_per_weight + 2 * F * 4)
    activations = shape.layers * boundary + inside if checkpointing else shape.layers * inside
    supervised = batch * answer
    return Need(
        weights=weights,
        trained=state + copies,
        row_copies=(2.0 * shape.matrices * V * D + rows) * bytes_per_weight if rows else 0.0,
        activations=activations,
        logits=supervised * V * (bytes_per_weight + 8),
    )

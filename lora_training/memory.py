"""Expected GPU memory of LoRA training, computed from the model's configuration before any weights are loaded.

    weights      every parameter in the compute type; with 4-bit weights the layers' matrices at 4.127 bits (nf4: 4 bits
                 and one scale per 64, itself quantized), embedding and head in the compute type
    trained      LoRA pairs and trained rows: parameter, gradient and two Adam moments, all float32 (16 bytes); with
                 several processes one more gradient copy (DDP's buckets)
    row copies   PEFT writes the trained rows into a copy of the embedding and of the head in every forward pass; its
                 gradient; and the rows' initial values
    activations  checkpointing: one [B, T, D] per layer, and one layer's activations while it is recomputed; else all
    logits       supervised positions only: [N, V] in the compute type, in float32 and its gradient

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
    """Turn an out-of-memory error, on a GPU or the CPU, into one line that ends in ``way``: what to do about it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if memory_wanted(error) is None:
            raise
        reason = " ".join((str(error) or type(error).__name__).split())[:160]
        raise InputError(f"out of memory ({reason}); {way}") from error


def print_once(text: str) -> None:
    """Print on the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def sharding() -> str:
    """How `accelerate launch` distributes the model: ddp or fsdp."""
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else "ddp"


class Shape(NamedTuple):
    """Sizes of a model, read from an instance without weights."""

    parameters: int  # of the base model
    layer_matrices: int  # parameters of the linear layers, the head left out
    layer_sizes: tuple[tuple[str, int, int], ...]  # (module name, in, out) of each of them
    layers: int
    width: int  # D
    inner: int  # width of the feed-forward part
    vocabulary: int  # rows of the embedding
    matrices: int  # embedding and head: 2, or 1 if they are tied
    experts: bool = False  # mixture of experts: routers and experts get no LoRA
    conv1d: bool = False  # GPT-2 stores its matrices transposed


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
    """The sizes of ``config``'s causal language model, built without allocating memory."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    experts = [name for name, kind in kinds.items() if "Expert" in kind or "Router" in kind]
    linears = {
        name: module for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }  # fmt: skip
    sizes = tuple(
        (name, *((module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)))
        for name, module in linears.items()
        if not (experts and is_expert(name, experts))
    )
    text = config.get_text_config()
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_matrices=sum(module.weight.numel() for module in linears.values()),
        layer_sizes=sizes,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        matrices=1 if text.tie_word_embeddings else 2,
        experts=bool(experts),
        conv1d=any(isinstance(module, Conv1D) for module in linears.values()),
    )


def is_expert(name: str, experts: list[str]) -> bool:
    """Whether a linear layer is inside one of the modules ``experts`` or is a gate between experts."""
    last = name.rsplit(".", 1)[-1]
    return last in ("gate", "router", "shared_expert_gate") or any(name.startswith(f"{module}.") for module in experts)


def adapted(shape: Shape, targets: tuple[str, ...] = ()) -> list[str]:
    """Full names of the layers that get LoRA: those with a name of ``targets``, or all if it is empty."""
    return [
        name for name, _, _ in shape.layer_sizes
        if not targets or any(name == target or name.endswith(f".{target}") for target in targets)
    ]  # fmt: skip


def lora_parameters(shape: Shape, rank: int, targets: tuple[str, ...] = ()) -> int:
    """r * (in + out) of each adapted matrix (see ``adapted``)."""
    names = set(adapted(shape, targets))
    return sum(rank * (inner + outer) for name, inner, outer in shape.layer_sizes if name in names)


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
    ``sharding``: ddp splits nothing, fsdp weights and state.
    """
    V, trained = shape.vocabulary + added_rows, lora + rows
    D, F, tokens = shape.width, shape.inner, batch * length
    grown = shape.matrices * added_rows * D
    rest = shape.parameters - shape.layer_matrices + grown
    weights = shape.layer_matrices * (NF4_BYTES if four_bit else bytes_per_weight) + rest * bytes_per_weight
    state = 16.0 * trained
    copies = 4.0 * trained if world_size > 1 else 0.0
    if sharding == "fsdp":  # plus one whole layer at a time
        weights = weights / world_size + shape.layer_matrices / max(shape.layers, 1) * bytes_per_weight
        state /= world_size
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

"""Figures 8 and 13: input embeddings of a language model's word and code tokens, projected to two dimensions.

Figure 8 shows the first model, figure 13 the others (such as the base next to the tuned one).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_training.base_model import quiet_libraries
from lora_training.inference import check_model, load_model
from tables.figures.inputs import Inputs, Missing
from tables.figures.style import COLOURS, MARKERS, new_figure, save, short

WORDS, PER_LEVEL = 800, 200  # tokens drawn at most
SMALL: dict[str, Any] = {"s": 9, "linewidths": 0.3}


class Tokens(NamedTuple):
    """Rows of an input embedding."""

    words: NDArray[np.float32]  # [n, D], a sample
    codes: list[NDArray[np.float32]]  # by level [n, D]; [] for a model without codes


def tokens_of(folder: Path, seed: int) -> Tokens:
    """A sample of the word and code tokens of an adapter, a merged model or a base model."""
    import torch

    from lora_training.code_tokens import token_ids

    quiet_libraries()
    is_adapter = (folder / "adapter_config.json").is_file()
    reader = check_model(None if is_adapter else str(folder), folder if is_adapter else None)
    weights: Any = load_model(reader, torch.device("cpu")).get_input_embeddings().weight.data  # [V, D]
    tokenizer, shape = reader.tokenizer, reader.saved.shape if reader.saved else None
    rng = np.random.default_rng(seed)
    ids = [] if shape is None else token_ids(tokenizer, shape)
    special = {*ids, *tokenizer.all_special_ids}
    words = [i for i in range(min(len(tokenizer), len(weights))) if i not in special]

    def rows(chosen: Any, count: int) -> NDArray[np.float32]:
        picked = rng.permutation(np.asarray(chosen))[:count]
        return np.asarray(weights[torch.from_numpy(np.sort(picked))].float().numpy())

    by_level = [] if shape is None else np.split(np.array(ids[4:]), shape.num_quantizers)  # after the 4 marks
    return Tokens(rows(words, WORDS), [rows(level, PER_LEVEL) for level in by_level])


def project(vectors: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    """vectors [n, D] -> [n, 2] by t-SNE, initialised with the two principal components."""
    from sklearn.manifold import TSNE

    centred = vectors.astype(np.float64) - vectors.mean(0)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(centred), np.float64)


def draw(inputs: Inputs, out: Path, number: int) -> list[Path]:
    """One panel per model."""
    folders = inputs.model_folders[:1] if number == 8 else inputs.model_folders[1:]
    if not folders:
        raise Missing(
            "needs a second model; merge the adapter: cd lora_training && python merge_adapter.py; or --model A B"
        )
    figure, axes = new_figure(1, len(folders), 4.6, 4.0)
    for panel, folder in zip(axes[0], folders, strict=True):
        found = tokens_of(folder, inputs.seed)
        parts = [found.words, *found.codes]
        plane = project(np.concatenate(parts), inputs.seed)
        labels = ["words", *(f"codes of level {level}" for level in range(len(found.codes)))]
        pieces = np.split(plane, np.cumsum([len(part) for part in parts])[:-1])
        for place, (points, label) in enumerate(zip(pieces, labels, strict=True)):
            colour = COLOURS[(place - 1) % len(COLOURS)] if place else "0.65"
            marker = MARKERS[(place - 1) % len(MARKERS)] if place else "."
            panel.scatter(*points.T, color=colour, marker=marker, label=f"{label} ({len(points)})", **SMALL)
        panel.set(xticks=[], yticks=[], title=f"{short(folder.name, 40)}: t-SNE")
        panel.legend(loc="best", fontsize=7, markerscale=1.5)
    return save(figure, out, f"figure_{number}")

"""Text embeddings of a graph's entities: one unit row per entity id, as `run_rq.py --text_emb` reads them (Eq. 8).

    python data/embed_text.py --dataset data/FB15k-237 --out ent_emd.npy                     # TF-IDF + SVD, offline
    python data/embed_text.py --dataset data/FB15k-237 --out ent_emd.npy --model FOLDER      # or a hub id

An entity's text is "label: description" (WN18RR: its line "name, gloss"), else the label or raw name alone.
OUT.entities.txt beside OUT.npy names the rows.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import sys
from collections import Counter
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.device import find_device
from common.errors import CommandParser, InputError, at_least, hub_answers, is_hub_id, run_command
from common.files import command, exclusive_lock, output_file, save_array, sha256_file, write_json, write_text
from common.record import make_record
from data.knowledge_graph import KnowledgeGraph, add_keep_names
from data.names import row_names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Floats = NDArray[np.float32]
Array = NDArray[Any]

TFIDF_DIM = 256
NAME_FILES = {"entity2label.txt", "FB15k_mid2name.txt", "entity2definition.txt"}  # beside entity2text.txt
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # of configuration, tokenizer and weights
# without any of them transformers invents an empty tokenizer
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


def entity_texts(kg: KnowledgeGraph) -> list[str]:
    """One text per entity, row = id: "label: description"; without a description the label (or raw name) alone.

    Where both are from one line of entity2text.txt (WN18RR's "name, gloss"), the text is that line.
    """
    split = "entity2text.txt" in kg.input_hashes and not NAME_FILES & kg.input_hashes.keys()
    mark = ", " if split else ": "
    return [f"{label}{mark}{text}" if text else label for label, text in zip(kg.labels, kg.descriptions, strict=True)]


def digest(texts: list[str]) -> str:
    """sha256 of the texts in their order."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def unit_rows(vectors: Array, texts: list[str]) -> Floats:
    """``[n, T]`` scaled to length 1; InputError names a text whose vector cannot be."""
    vectors = vectors.astype(np.float64)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = ~np.isfinite(length[:, 0]) | (length[:, 0] < 1e-12)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"the embedding of {texts[row][:60]!r} has length {length[row, 0]}, expected a finite one above 0; "
            "choose another --model"
        )
    return (vectors / length).astype(np.float32)


# ---------------------------------------------------------------- TF-IDF + SVD


WORD = re.compile(r"[^\W_]+")  # letters and digits; "_" separates the words of raw names
# scripts that write no spaces between words: Thai, Lao, Myanmar, Khmer, Chinese, Japanese
NO_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def features(text: str) -> list[str]:
    """The words of a text in lower case; of words in scripts without spaces, the characters and pairs of characters."""
    found = []
    for word in WORD.findall(text.lower()):
        if NO_SPACES.search(word):
            found += [*word, *(word[i : i + 2] for i in range(len(word) - 1))]
        else:
            found.append(word)
    return found


def sharing_nothing(texts: list[str]) -> int:
    """How many texts have no feature in common with another text."""
    own = [set(features(text)) for text in texts]
    count = Counter(feature for found in own for feature in found)
    return sum(all(count[feature] == 1 for feature in found) for found in own)


def embed_tfidf(texts: list[str], dim: int, seed: int) -> Floats:
    """Latent semantic analysis: TF-IDF of ``features``, truncated SVD to ``min(dim, features, M)`` columns, unit rows.

    A text without any word keeps a row of zeros. Equal seeds give equal bytes on one machine. Raises InputError.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        counts = TfidfVectorizer(sublinear_tf=True, analyzer=features).fit_transform(texts)
    except ValueError as error:
        raise InputError("--dataset: no entity's text holds a word; TF-IDF needs labels or descriptions") from error
    dim = min(dim, *counts.shape)
    vectors = TruncatedSVD(dim, random_state=seed).fit_transform(counts)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    # shorter rows are rounding noise: none of their words is in the directions that were kept
    return np.where(length > 1e-9, vectors / np.maximum(length, 1e-9), 0).astype(np.float32)


# ---------------------------------------------------------------- encoder


def model_folder(name: str) -> Path:
    """The local folder of a model: ``name`` itself, or the files of a hub id. InputError at once for a wrong path."""
    path = Path(name)
    if path.exists():
        if not (path / "config.json").is_file():
            raise InputError(f"--model {name} holds no config.json, expected a folder in Hugging Face form or a hub id")
        return path
    if not is_hub_id(name):
        raise InputError(f"--model {name} does not exist; expected a folder in Hugging Face form or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        offline = not hub_answers()
        return Path(
            snapshot_download(name, allow_patterns=list(MODEL_FILES), ignore_patterns=["*/*"], local_files_only=offline)
        )
    except RepositoryNotFoundError as error:  # also for private and gated models
        reason = "is no folder, and no model of the hub that is readable without a login (hf auth login)"
        raise InputError(f"--model {name} {reason}; check the name") from error
    except Exception as error:  # many kinds: no network, offline mode, gated, full disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise InputError(
            f"--model {name} is no folder and could not be fetched from the hub ({reason}); give a local folder"
        ) from error


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of hidden ``[B, N, T]`` over the positions of mask ``[B, N]``, special tokens included."""
    shown = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * shown).sum(dim=1) / shown.sum(dim=1)


class ModelEncoder:
    """A Hugging Face encoder with the mean pooling of sentence-transformers (Reimers and Gurevych 2019)."""

    def __init__(self, folder: Path, texts: list[str], max_length: int, device: str) -> None:
        self.texts = texts
        files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
        self.hashes = {path.name: sha256_file(path) for path in files}
        self.device = device
        self.model = _load_model(folder).to(device)  # type: ignore[arg-type]
        self.tokenizer = _load_tokenizer(folder)
        # RoBERTa and similar models count positions from 2
        positions = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        max_length = min(max_length, self.tokenizer.model_max_length, max(positions - 2, 1))
        try:
            full = self.tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
            self.tokens = self.tokenizer(texts, truncation=True, max_length=max_length, verbose=False)["input_ids"]
        except (TypeError, ValueError, OverflowError) as error:  # broken settings
            raise _unreadable(folder, error) from error
        self.cut_texts = sum(len(tokens) > max_length for tokens in full)
        rows = self.model.get_input_embeddings().num_embeddings
        largest = max(map(max, filter(None, [*self.tokens, [self.tokenizer.pad_token_id or 0]])))
        if largest >= rows:
            raise InputError(
                f"--model {folder}: its tokenizer gives token {largest}, the model has {rows}; fetch it again"
            )
        empty = [text for text, tokens in zip(texts, self.tokens, strict=True) if not tokens]
        if empty:
            raise InputError(f"the tokenizer of --model {folder} finds no token in the text {empty[0][:60]!r}")
        # longest first: little padding, and too large a batch fails at the start
        self.order = sorted(range(len(texts)), key=lambda row: (-len(self.tokens[row]), row))
        self.identity = {"model": digest([json.dumps(self.hashes)]), "max_length": max_length}

    def encode(self, rows: list[int]) -> Array:
        """The vectors ``[B, T]`` of these entities, of any length. InputError if memory does not suffice."""
        import torch

        batch = self.tokenizer.pad({"input_ids": [self.tokens[row] for row in rows]}, return_tensors="pt")
        inputs = {key: batch[key].to(self.device) for key in ("input_ids", "attention_mask")}
        try:
            with torch.inference_mode():
                hidden = self.model(**inputs).last_hidden_state  # [B, N, T]
                return mean_pool(hidden, inputs["attention_mask"]).cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise InputError(f"--batch {len(rows)} does not fit into the device's memory; lower it") from error

    def embed(self, batch: int) -> Floats:
        """Unit rows ``[M, T]`` in the order of ids, computed ``batch`` texts at a time."""
        from tqdm import tqdm

        M = len(self.texts)
        found: list[Floats] = []
        with tqdm(total=M, desc="embed", unit="text", disable=None) as progress:
            for start in range(0, M, batch):
                rows = self.order[start : start + batch]
                found.append(unit_rows(self.encode(rows), [self.texts[row] for row in rows]))
                progress.update(len(rows))
        return np.concatenate(found)[np.argsort(self.order)]


def _load_model(folder: Path) -> PreTrainedModel:
    """The encoder in float32, all weights from safetensors; never runs code that comes with the weights."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = AutoModel.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:
        raise _unreadable(folder, error) from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # unused by mean pooling
    if missing:
        raise InputError(f"--model {folder} lacks {len(missing)} of its weights, such as {missing[0]}; fetch it again")
    encoder: PreTrainedModel = model.get_encoder() if model.config.is_encoder_decoder else model
    return encoder.eval()


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any(path.is_file() for pattern in VOCABULARIES for path in folder.glob(pattern)):
        raise InputError(f"--model {folder} holds no tokenizer, such as tokenizer.json; fetch it again")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, padding_side="right"
        )
    except Exception as error:
        raise _unreadable(folder, error) from error
    if tokenizer.pad_token_id is None:  # padding is masked: any id will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _unreadable(folder: Path, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return InputError(
        f"--model {folder} cannot be read as an encoder ({reason}); "
        "expected config.json, a tokenizer and weights in safetensors, of a kind that transformers has"
    )


# ---------------------------------------------------------------- the command


def parse_args() -> argparse.Namespace:
    parser = CommandParser(prog="data/embed_text.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", type=Path, required=True, help="graph folder or file, such as data/FB15k-237")
    add_keep_names(parser)
    parser.add_argument("--out", type=output_file, required=True, metavar="FILE.npy", help="[M, T], row = entity id")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="type of the file's numbers")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.add_argument("--model", help="encoder: folder or hub id (default: TF-IDF + SVD)")
    parser.add_argument("--batch", type=at_least(1), default=64, help="texts at once (encoder)")
    parser.add_argument("--max_length", type=at_least(1), default=256, help="tokens of a text that are read (encoder)")
    parser.add_argument("--device", help="of the encoder: cpu, cuda, ... (default: a GPU where there is one)")
    parser.add_argument("--dim", type=at_least(1), help=f"width of TF-IDF + SVD (default: {TFIDF_DIM})")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the SVD")
    args = parser.parse_args()
    if args.dim and args.model:
        parser.error(f"--dim {args.dim}: the width of an encoder is its own; leave --dim out")
    if args.device and not args.model:
        parser.error(f"--device {args.device} is for an encoder; leave it out")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed} is out of range, expected 0 or more and less than 2**32")
    if args.out.suffix != ".npy":
        parser.error(f"--out {args.out}: expected a name that ends in .npy")
    return args


class Embedded(NamedTuple):
    """Embeddings of either way."""

    rows: Array  # [M, T] in --dtype
    facts: dict[str, Any]  # for the record
    inputs: dict[str, str]  # name -> sha256 of what was read besides the graph
    device: str = "cpu"


def by_tfidf(args: argparse.Namespace, texts: list[str]) -> Embedded:
    rows = embed_tfidf(texts, args.dim or TFIDF_DIM, args.seed).astype(args.dtype)
    alone = sharing_nothing(texts)
    if 2 * alone > len(texts):
        print(
            f"warning: {alone:,} of {len(texts):,} texts share no word with another, so their vectors are not similar "
            "to any; give the data set labels or descriptions, or use --model",
            file=sys.stderr,
        )
    facts = {
        "encoder": {"tfidf_svd": rows.shape[1], "scikit-learn": importlib.metadata.version("scikit-learn")},
        "zero_rows": int((~rows.any(axis=1)).sum()),
        "texts_without_shared_words": alone,
    }
    return Embedded(rows, facts, {})


def by_model(args: argparse.Namespace, texts: list[str], folder: Path) -> Embedded:
    device = str(find_device(args.device))
    encoder = ModelEncoder(folder, texts, args.max_length, device)
    rows = encoder.embed(args.batch).astype(args.dtype)
    inputs = {f"model/{name}": sha for name, sha in encoder.hashes.items()}
    return Embedded(rows, {"encoder": encoder.identity, "cut_texts": encoder.cut_texts}, inputs, device)


def main() -> None:
    args = parse_args()
    if args.out.exists() and not args.overwrite:
        raise InputError(f"--out {args.out} exists; give --overwrite to replace it, or another name")
    with exclusive_lock(args.out.with_suffix(".lock"), "--out"):
        embed(args)


def embed(args: argparse.Namespace) -> None:
    """Make --out and the record beside it."""
    started = monotonic()
    folder = model_folder(args.model) if args.model else None
    kg = KnowledgeGraph.load(args.dataset, args.keep_names)
    texts = entity_texts(kg)
    made = by_tfidf(args, texts) if folder is None else by_model(args, texts, folder)
    save_array(made.rows, args.out)
    write_text("".join(f"{name}\n" for name in kg.entities), row_names(args.out))
    wall = monotonic() - started
    facts = {
        "shape": list(made.rows.shape), "sha256": sha256_file(args.out), "texts_sha256": digest(texts),
        "with_description": sum(map(bool, kg.descriptions)), **made.facts,
    }  # fmt: skip
    record = make_record(vars(args), kg.input_hashes | made.inputs, wall, made.device, **facts)
    write_json(record, args.out.with_suffix(".json"))
    shape = f"{made.rows.dtype} {facts['shape']}"
    print(f"{args.out}: {shape}, row = entity id, in {wall:.1f} s; record beside it (.json)")
    print(f"next: {command('run_rq.py', '--dataset', args.dataset, '--text_emb', args.out)}")


if __name__ == "__main__":
    run_command(main)

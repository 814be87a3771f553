"""Load and check a base model and its tokenizer: a Hugging Face folder or a hub id of any causal language model.

All checks that need no weights come first: loading a 7B model takes minutes.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import unicodedata
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError, content_of, hub_answers, is_hub_id
from common.files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

OLDEST = (5, 23)  # transformers: earlier versions do not take a mask [B, T] as ``logits_to_keep``
MEMORY_ERRORS = ("MemoryError", "OutOfMemoryError")  # the files are not the cause
# settings of every tokenizer; legacy=False: the old behaviour of LLaMA puts a space after every added token
TOKENIZER: dict[str, Any] = {"legacy": False, "padding_side": "right", "trust_remote_code": False}
GATED_OWNERS = ("meta-llama",)  # need a token; reported at once instead of after the hub's retries
# text that a tokenizer must return unchanged: upper case, an accent (as one character), a ligature, a full-width letter
SAMPLE = unicodedata.normalize("NFC", "Ada École \ufb01 \uff21")


def quiet_libraries() -> None:
    """Turn off transformers' progress bars and the warnings about names that only peft can change."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def check_version() -> None:
    """InputError if transformers is older than ``OLDEST``."""
    found = importlib.metadata.version("transformers")
    if tuple(int(number) for number in found.split(".")[:2]) < OLDEST:
        raise InputError(
            f"transformers {found} is installed, training needs {'.'.join(map(str, OLDEST))} or later: "
            "python -m pip install -r requirements.txt"
        )


# ---------------------------------------------------------------- configuration


def check_model_name(name: str) -> None:
    """InputError for a path that does not exist; a hub id passes. Saves half a minute of the hub's retries."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {name} has no config.json: it is not a saved Hugging Face model")
        return
    if path.is_file():
        raise InputError(f"model {name} is a file, expected a Hugging Face folder or a hub id")
    if not is_hub_id(name):
        raise InputError(
            f"model folder {name} does not exist; give a folder, a hub id such as meta-llama/Llama-2-7b-hf, or make a "
            "small base: python lora_training/make_tiny_base.py"
        )


def load_error(name: str, error: Exception) -> InputError:
    """One line for an error of the hub or of a model's files."""
    kinds = set()
    cause: BaseException | None = error
    while cause is not None:
        kinds.add(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    if "GatedRepoError" in kinds or "gated repo" in text:
        return InputError(
            f"model {name} is gated: accept its licence on its hub page, then log in with a token "
            "(hf auth login, or the variable HF_TOKEN), or give a local folder"
        )
    if "RepositoryNotFoundError" in kinds:
        return InputError(f"model {name} is neither a folder nor a model of the hub; check the name")
    if kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "HfHubHTTPError"}:
        return InputError(f"model {name} is neither a folder nor cached, and the hub cannot be reached; give a folder")
    line = (text.strip() or type(error).__name__).splitlines()[0][:200]
    return InputError(f"model {name} cannot be read: {line}")


def load_config(name: str) -> PretrainedConfig:
    """The configuration, without the weights. InputError if it cannot be read."""
    check_model_name(name)
    from huggingface_hub import get_token, try_to_load_from_cache
    from transformers import AutoConfig

    if not Path(name).is_dir() and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        if name.split("/")[0] in GATED_OWNERS and not get_token():
            raise load_error(name, OSError("gated repo"))
        if not hub_answers():
            raise load_error(name, ConnectionError())
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise load_error(name, error) from error


def causal_model_class(config: PretrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class that AutoModelForCausalLM uses for ``config``.

    InputError if there is none, or if it computes logits at all positions only (``logits_to_keep`` is missing).
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    mapping: Any = AutoModelForCausalLM._model_mapping
    masked: Any = AutoModelForMaskedLM._model_mapping
    both_ways = type(config) in masked and not getattr(config, "is_decoder", False)  # BERT would read the answer
    if type(config) not in mapping or both_ways:
        raise InputError(f"model {name}: a {config.model_type} model is not a causal language model; give another base")
    found: type[PreTrainedModel] = mapping[type(config)]
    if "logits_to_keep" not in inspect.signature(found.forward).parameters:
        raise InputError(f"model {name}: {found.__name__} does not take logits_to_keep, which training needs")
    return found


def check_causal(name: str) -> PretrainedConfig:
    """The configuration of a causal language model whose weights are there; nothing of them is loaded.

    InputError for another kind of model, and for a folder whose weights are missing or were cut off.
    """
    config = load_config(name)
    causal_model_class(config, name)
    if Path(name).is_dir():  # of a hub id, the hub knows its files
        check_weights(Path(name))
    return config


def check_weights(folder: Path) -> None:
    """InputError unless a model's folder has the files of its weights; of safetensors files the header is read."""
    from safetensors import safe_open

    names: set[str] = set()
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if not names and (folder / single).is_file():
            names = {single}
        elif not names and index.is_file():
            with content_of(index, "index of weights", "fetch the model anew"):
                names = set(read_json(index, "index")["weight_map"].values())
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing or not names:
        raise InputError(f"model folder {folder} has no {(missing or ['model.safetensors'])[0]}; fetch the model anew")
    for name in sorted(names):
        if name.endswith(".safetensors"):
            try:
                with safe_open(str(folder / name), "pt"):
                    pass
            except Exception as error:
                raise load_error(str(folder / name), error) from error


def attention_of(config: PretrainedConfig, name: str) -> str:
    """``sdpa``, or ``eager`` for models without it (Gemma 2: its capped scores cannot be computed by SDPA)."""
    return "sdpa" if getattr(causal_model_class(config, name), "_supports_sdpa", False) else "eager"


# ---------------------------------------------------------------- tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder, checked (see ``check_tokenizer``)."""
    check_model_name(name)
    return read_tokenizer(name, name)


def load_saved_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer saved with an adapter, where there is no config.json of a model."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise InputError(f"{folder} has no tokenizer.json; train_lora.py saves it with the adapter")
    return read_tokenizer(str(folder), f"{folder}: its tokenizer")


def read_tokenizer(name: str, shown: str) -> PreTrainedTokenizerBase:
    """AutoTokenizer with the settings ``TOKENIZER``; code that comes with a tokenizer is never run."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **TOKENIZER)
    except Exception as error:
        raise load_error(shown, error) from error
    check_tokenizer(tokenizer, name)
    if tokenizer.pad_token_id is None:  # padding is masked, so any id serves; a new token would need a row
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """InputError if it has no end token, no words, invalid settings, or changes names (lower case, Unicode forms)."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no end token, so no answer could end; give another base")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without tokenizer.json
        raise InputError(f"{name} has no tokenizer (tokenizer.json): no words but special ones; download it again")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise InputError(f"the tokenizer of {name} has model_max_length {tokenizer.model_max_length!r}; fetch it anew")
    ids = tokenizer(SAMPLE, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    back = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip()
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
    if back != SAMPLE and not (unknown and back.startswith("Ada")):
        raise InputError(
            f"the tokenizer of {name} changes text ({SAMPLE!r} becomes {back!r}), so entity names would change; give a "
            "base whose tokenizer neither lowercases nor normalizes"
        )


# ---------------------------------------------------------------- weights


def load_base(name: str, dtype: torch.dtype, quantization: Any = None, device_map: Any = None) -> PreTrainedModel:
    """The model of a hub id or folder in ``dtype``; code that comes with the weights is never run."""
    attention = attention_of(load_config(name), name)
    from transformers import AutoModelForCausalLM

    more = {} if quantization is None else {"quantization_config": quantization, "device_map": device_map}
    loader: Any = AutoModelForCausalLM
    model: PreTrainedModel
    try:
        model, found = loader.from_pretrained(
            name, dtype=dtype, attn_implementation=attention, low_cpu_mem_usage=True, trust_remote_code=False,
            output_loading_info=True, **more,
        )  # fmt: skip
    except Exception as error:
        if type(error).__name__ in MEMORY_ERRORS:
            raise
        raise load_error(name, error) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(f"model {name} lacks {len(missing)} of its weights, such as {missing[0]}; fetch it anew")
    return model

"""Codes as tokens of a language model: load a tokenizer and a base model, add the tokens, know their rows.

Every token of ``Class.codes.code_tokens`` becomes ONE id behind the base vocabulary, in that order. The checks here run
before any weights are loaded, since a 7B model takes minutes.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from Class.codes import CODE_FORMATS, MARKS, code_tokens
from Class.instructions import STATS, codes_key
from common.errors import InputError, is_hub_id
from common.files import ROOT, load_torch, read_json

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = Path(__file__).resolve().parent / "lora_outputs" / "lora_adapters"  # where train_lora.py leaves it by default
RECORD = "run_record.json"  # beside an adapter and a merged model
MOST_TOKENS = 10_000_000  # codes that a vocabulary may be asked to hold
WEIGHTS = "adapter_model.safetensors"
PASSED_ON = ("MemoryError", "OutOfMemoryError")  # the file is not to blame
# what every tokenizer is read with; a tokenizer that brings its own code is refused
TOKENIZER: dict[str, Any] = {"legacy": False, "padding_side": "right", "trust_remote_code": False}
GATED_OWNERS = ("meta-llama",)  # known to refuse without a token: said at once rather than after the hub's retries


# ---------------------------------------------------------------- which codes


class CodeShape(NamedTuple):
    """What the added tokens depend on."""

    num_code: int  # K
    num_quantizers: int  # Q

    @property
    def tokens(self) -> list[str]:
        return code_tokens(*self)


def read_codes_info(data: str | Path) -> dict[str, Any]:
    """``codes`` of the dataset_stats.json beside an instruction-data file: file, sha256, num_code, num_quantizers ...

    ``{"file": None}`` where the data were made without codes. InputError where the file is missing or lacks it.
    """
    path = Path(data).resolve().parent / STATS
    if not path.is_file():
        raise InputError(
            f"{data} has no {STATS} beside it, which says whose codes it holds; write both: "
            "python Class/gen_fb_data_rq.py"
        )
    stats = read_json(path, "statistics")
    info = stats.get("codes") if isinstance(stats, dict) else None
    if not isinstance(info, dict) or not is_codes_info(info):
        raise InputError(f"{path} does not say which codes its rows hold; write it anew: python Class/build_mix.py")
    return info


def is_codes_info(info: Any) -> bool:
    """Whether ``info`` says which codes rows hold: none, or file, sha256 and sizes that a vocabulary can have."""
    if not isinstance(info, dict) or not isinstance(info.get("record", ""), str):
        return False
    if info.get("file") is None:
        return True
    sizes: list[Any] = [info.get(key) for key in ("num_code", "num_quantizers")]
    if not all(type(size) is int and 0 < size <= MOST_TOKENS for size in sizes):
        return False
    words = [info["file"], info.get("sha256"), info.get("code_format", "spec")]
    known = all(isinstance(word, str) for word in words) and words[2] in CODE_FORMATS
    seed = info.get("shuffle_seed", 0)
    known = known and type(info.get("shuffled", False)) is bool and type(seed) is int and seed >= 0
    return known and bool(sizes[0] * sizes[1] <= MOST_TOKENS)


def code_shape(info: Mapping[str, Any]) -> CodeShape | None:
    """K and Q of ``read_codes_info``; None without codes."""
    return None if info.get("file") is None else CodeShape(int(info["num_code"]), int(info["num_quantizers"]))


def refuse_other_codes(ours: Mapping[str, Any], theirs: Mapping[str, Any], our_name: str, their_name: str) -> None:
    """InputError unless two ``codes`` entries are of one run of stage 1, shuffled or not alike.

    ``ours`` is, for example, an adapter's record and ``theirs`` the statistics of the rows to answer.
    """

    def shown(info: Mapping[str, Any]) -> str:
        if info.get("file") is None:
            return "no codes"
        shuffled = f", shuffled by seed {info.get('shuffle_seed', 0)}" if info.get("shuffled") else ""
        return f"{info['file']} (sha256 {str(info.get('sha256'))[:12]}{shuffled})"

    if codes_key(ours) != codes_key(theirs):
        raise InputError(
            f"{our_name} was made with {shown(ours)}, {their_name} with {shown(theirs)}: the same token means another "
            "code; use data and adapter of one run"
        )


# ---------------------------------------------------------------- base models


def quiet_libraries() -> None:
    """No progress bars of transformers', and no warnings about names that only peft can change."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def check_model_name(name: str) -> None:
    """InputError for a path that is not there; a hub id passes. Spares half a minute of the hub's retries."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {name} has no config.json: it is not a saved Hugging Face model")
        return
    if path.is_file():
        raise InputError(f"model {name} is a file, expected a folder in Hugging Face form or a hub id")
    if not is_hub_id(name):
        raise InputError(
            f"model folder {name} does not exist; give a folder, a hub id such as meta-llama/Llama-2-7b-hf, or make a "
            "small base: python lora_training/make_tiny_base.py"
        )


def _explain(name: str, error: Exception) -> InputError:
    """One line for whatever the hub or the files answered."""
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
    """The configuration alone: whether a model can be had, before its weights are. InputError where it cannot."""
    check_model_name(name)
    from huggingface_hub import get_token, try_to_load_from_cache
    from transformers import AutoConfig

    gated = not Path(name).is_dir() and name.split("/")[0] in GATED_OWNERS
    if gated and not get_token() and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise _explain(name, OSError("gated repo"))
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise _explain(name, error) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder, padding on the right, with a pad token that is never learned from.

    ``legacy=False`` where it is a LLaMA tokenizer: the old behaviour puts a space behind every added token.
    """
    check_model_name(name)
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **TOKENIZER)
    except Exception as error:
        raise _explain(name, error) from error
    return usable(tokenizer, name)


def usable(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token; InputError where it has no end token or its settings are no settings."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no end token: no answer could ever end")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without tokenizer.json
        raise InputError(f"{name} holds no tokenizer, such as tokenizer.json: no words but special ones; fetch it anew")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise InputError(f"the tokenizer of {name} has model_max_length {tokenizer.model_max_length!r}; fetch it anew")
    if tokenizer.pad_token_id is None:  # padding is masked by position, so any id serves; a new one would cost a row
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_base(name: str, dtype: torch.dtype, quantization: Any = None, device_map: Any = None) -> PreTrainedModel:
    """AutoModelForCausalLM of a hub id or folder in ``dtype``; never runs code that comes with the weights."""
    load_config(name)
    from transformers import AutoModelForCausalLM

    more = {} if quantization is None else {"quantization_config": quantization, "device_map": device_map}
    loader: Any = AutoModelForCausalLM
    model: PreTrainedModel
    try:
        model, found = loader.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa", low_cpu_mem_usage=True, trust_remote_code=False,
            output_loading_info=True, **more,
        )  # fmt: skip
    except Exception as error:
        if type(error).__name__ in PASSED_ON:
            raise
        raise _explain(name, error) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(f"model {name} lacks {len(missing)} of its weights, such as {missing[0]}; fetch it anew")
    return model


# ---------------------------------------------------------------- added tokens


def add_code_tokens(tokenizer: PreTrainedTokenizerBase, shape: CodeShape | None) -> list[int]:
    """Add what is missing of the tokens of ``shape`` and return the ids of all of them, checked; [] without codes.

    A base that was tuned before has them already: its rows are trained on. InputError where it knows other codes.
    """
    if shape is None:
        return []
    from transformers import AddedToken

    known = tokenizer.get_added_vocab()
    others = {token for token in known if re.fullmatch(r"Q\d+_\d+", token)} - set(shape.tokens)
    if others:
        raise InputError(
            f"the tokenizer already has {len(others)} tokens of other codes, such as {min(others)}; the data want "
            f"Q0_0..Q{shape.num_quantizers - 1}_{shape.num_code - 1}: start from the base model"
        )
    # normalized=False: matched in the raw text; special=False: not deleted by skip_special_tokens
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in shape.tokens])
    return token_ids(tokenizer, shape)


def token_ids(tokenizer: PreTrainedTokenizerBase, shape: CodeShape) -> list[int]:
    """The ids of ``shape.tokens``, in order. InputError unless each is one id and text comes back as it went in."""
    tokens = shape.tokens
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in tokens if token not in vocabulary]
    if absent:
        raise InputError(
            f"the tokenizer lacks {len(absent)} of {len(tokens)} code tokens, such as {absent[0]}: it belongs to "
            "another vocabulary; use the tokenizer that was saved with the adapter"
        )
    ids = [vocabulary[token] for token in tokens]
    text = "".join(tokens)
    if tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"] != ids:
        raise InputError("the tokenizer splits code tokens or puts pieces between them; use one with legacy=False")
    sample = f"<ENT>a b</ENT> <CODE>{tokens[-1]}:{tokens[len(MARKS)]}|{tokens[-1]}</CODE>\n2. x"
    coded = tokenizer(sample, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    if tokenizer.decode(coded, skip_special_tokens=True, clean_up_tokenization_spaces=False) != sample:
        raise InputError("the tokenizer does not give code text back as it went in; use a tokenizer with legacy=False")
    return ids


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path, shape: CodeShape | None) -> None:
    """Save, reload and compare: RuntimeError if the saved tokenizer gives any code token another id."""
    tokenizer.save_pretrained(str(folder))
    if shape is None:
        return
    if token_ids(load_saved_tokenizer(folder), shape) != token_ids(tokenizer, shape):
        raise RuntimeError(f"the tokenizer saved in {folder} gives the code tokens other ids")


def load_saved_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer saved beside an adapter, where there is no config.json of a model."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise InputError(f"{folder} holds no tokenizer.json; train_lora.py saves it with the adapter")
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), **TOKENIZER)
    except Exception as error:
        raise _explain(f"{folder}: its tokenizer", error) from error
    return usable(tokenizer, str(folder))


def reload_check(tokenizer: PreTrainedTokenizerBase, shape: CodeShape) -> None:
    """The check of ``save_tokenizer`` in a folder that goes away: run before the weights are loaded."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, folder, shape)


def resize_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Grow embedding and head to the tokenizer; the new rows are drawn under ``seed``, the old ones keep their bits.

    No row is added for alignment: it would take part in the softmax and be drawn anew on every load.
    """
    import torch

    if len(tokenizer) > len(next(model.get_input_embeddings().parameters())):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def read_codebooks(path: str | Path, shape: CodeShape) -> torch.Tensor:
    """The vectors [Q, K, code_dim] that the codes stand for: float32, of the best epoch in stage 1's checkpoint.

    InputError where the file is no checkpoint of run_rq.py, or has codebooks of other sizes than ``shape``.
    """
    import torch

    K, Q = shape
    stored = load_torch(path, "checkpoint")
    if not isinstance(stored, Mapping):
        raise InputError(f"checkpoint {path} is a {type(stored).__name__}; give the one that run_rq.py wrote")
    try:
        weights = stored["best"]["model"]
        found = [weights[name] for q in range(Q + 1) if (name := f"scorer.rq_codebook.codebooks.{q}.weight") in weights]
        codebooks: torch.Tensor = torch.stack(found).float()
        sizes = list(codebooks.shape)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"checkpoint {path} holds no codebooks; give the one that run_rq.py wrote") from error
    if len(sizes) != 3 or sizes[:2] != [Q, K] or not bool(codebooks.isfinite().all()):
        raise InputError(
            f"checkpoint {path} has codebooks {sizes}{' and more' if len(found) > Q else ''}, the rows hold codes of "
            f"{Q} levels of {K}: give the checkpoint of the run that made them"
        )
    return codebooks


def set_code_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, codebooks: torch.Tensor, seed: int
) -> None:
    """Put codebooks [Q, K, code_dim] into the rows of their tokens in embedding and head.

    One random orthogonal matrix, drawn under ``seed``, turns all of them into the model's width D: their products stay
    what stage 1 learned (of code_dim above D, D random directions are kept). One factor per matrix gives them the mean
    length of its other rows. The rows of the marks and of the base's own tokens keep their bits.
    """
    import torch

    Q, K, C = codebooks.shape
    ids = torch.tensor(token_ids(tokenizer, CodeShape(K, Q)))[len(MARKS) :]
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = getattr(model.config, "tie_word_embeddings", False)
    D = parts[0].weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(max(C, D), max(C, D), generator=generator))[0][:C, :D]
    rows = codebooks.reshape(Q * K, C) @ turn
    rows = rows / rows.norm(dim=1).mean()
    with torch.no_grad():
        for matrix in [part.weight for part in parts[: 1 if tied else 2]]:
            others = torch.ones(len(matrix), dtype=torch.bool)
            others[ids] = False
            length = matrix[others.to(matrix.device)].float().norm(dim=1).mean()
            matrix[ids.to(matrix.device)] = (rows.to(matrix.device) * length).to(matrix.dtype)


def trainable_rows(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]]:
    """LoraConfig's ``trainable_token_indices``: rows of the embedding and, where untied, of the head."""
    found = {}
    tied = getattr(model.config, "tie_word_embeddings", False)
    for part in (model.get_input_embeddings(), None if tied else model.get_output_embeddings()):
        if part is not None:
            name = next(name for name, module in model.named_modules() if module is part)
            found[name.rsplit(".", 1)[-1]] = list(ids)
    return found


# ---------------------------------------------------------------- adapters and what they were made with


class Saved(NamedTuple):
    """What train_lora.py and merge_adapter.py leave in a folder, read without loading any weights."""

    folder: Path
    record: dict[str, Any]  # its ``codes`` is what ``refuse_other_codes`` compares
    shape: CodeShape | None
    tokenizer: PreTrainedTokenizerBase  # its own, checked

    @property
    def base(self) -> str:
        """The base model that the record names. Training named a folder from where it ran, which may have been the
        repository or this folder, and need not be where this runs."""
        name = str(self.record["base_model"])
        places = [Path(name), ROOT / name, Path(__file__).resolve().parent / name]
        return next((str(place) for place in places if place.is_dir()), name)


def read_saved(folder: str | Path, weights: str = "adapter_config.json") -> Saved:
    """Read an adapter's folder (``weights="config.json"``: a merged model's) and check its tokenizer.

    InputError where the folder, a file of it or a code token is missing.
    """
    folder = Path(folder)
    for name in (weights, RECORD, *([WEIGHTS] if weights == "adapter_config.json" else [])):
        if not (folder / name).is_file():
            what = "does not exist" if not folder.is_dir() else f"has no {name}"
            script = "merge_adapter.py" if weights == "config.json" else "train_lora.py"
            raise InputError(f"{folder} {what}; write it: cd lora_training && python {script}")
    record = read_json(folder / RECORD, "record")
    if (
        not isinstance(record, dict)
        or not is_codes_info(record.get("codes"))
        or not (
            isinstance(record.get("base_model"), str)
            and type(record.get("vocabulary")) is int
            and type(record.get("base_vocabulary", 0)) in (int, type(None))
            and isinstance(record.get("args", {}), dict)
        )
    ):
        raise InputError(f"{folder / RECORD} does not say which base model and codes belong to it; train again")
    if weights == "adapter_config.json":
        check_adapter(folder)
    tokenizer, shape = load_saved_tokenizer(folder), code_shape(record["codes"])
    if len(tokenizer) != record["vocabulary"]:
        raise InputError(
            f"the tokenizer in {folder} knows {len(tokenizer)} tokens, its record says {record['vocabulary']}: it was "
            "replaced by another vocabulary's"
        )
    if shape is not None:
        token_ids(tokenizer, shape)
    return Saved(folder, record, shape, tokenizer)


def check_base(saved: Saved, base_model: str) -> None:
    """InputError unless ``base_model`` can be had and has the vocabulary that the adapter was trained on."""
    size, expected = load_config(base_model).get_text_config().vocab_size, saved.record.get("base_vocabulary")
    if expected is not None and size != expected:
        raise InputError(
            f"base model {base_model} has {size} token rows, {saved.folder} was trained on {expected} "
            f"({saved.record['base_model']}): give that one"
        )


def load_adapted(saved: Saved, base_model: str, dtype: torch.dtype) -> PeftModel:
    """The base model, grown to the adapter's tokenizer, with the adapter on it (see merge_adapter.py for speed)."""
    check_base(saved, base_model)
    model = load_base(base_model, dtype)
    resize_model(model, saved.tokenizer, seed=0)  # whatever is drawn, the adapter brings all new rows
    return put_adapter(model, saved.folder).eval()


def check_adapter(folder: Path) -> None:
    """InputError where the adapter's own two files cannot be read; no weights are loaded."""
    from peft import LoraConfig, PeftConfig
    from safetensors import safe_open

    try:
        read_json(folder / "adapter_config.json", "adapter configuration")
        if not isinstance(PeftConfig.from_pretrained(str(folder)), LoraConfig):
            raise ValueError("adapter_config.json is of another kind than LORA")
        with safe_open(str(folder / WEIGHTS), "pt") as file:
            if not file.keys():
                raise ValueError(f"{WEIGHTS} holds nothing")
    except InputError:
        raise
    except Exception as error:
        raise _explain(f"{folder}: its adapter", error) from error


def put_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The adapter of ``folder`` on ``model``; InputError where it is damaged, of another shape, or not whole."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        adapted = PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
        with safe_open(str(Path(folder) / WEIGHTS), "pt") as file:
            stored = set(file.keys())
    except Exception as error:
        if type(error).__name__ in PASSED_ON:
            raise
        raise _explain(f"{folder}: its adapter", error) from error
    absent = sorted(get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - stored)
    if absent:
        raise InputError(f"adapter {folder} lacks {len(absent)} of its weights, such as {absent[0]}; train it anew")
    return adapted

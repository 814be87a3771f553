"""Adapters on the disk: what train_lora.py and merge_adapter.py leave in a folder, read, checked and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import InputError
from common.files import ROOT, command, read_json
from lora_training.base_model import MEMORY_ERRORS, check_causal, load_base, load_error, load_saved_tokenizer
from lora_training.code_tokens import CodeShape, code_shape, is_codes_info, resize_model, token_ids
from lora_training.memory import model_shape

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = Path(__file__).resolve().parent / "lora_outputs" / "lora_adapters"  # train_lora.py's default output
RECORD = "run_record.json"  # beside an adapter and a merged model
WEIGHTS = "adapter_model.safetensors"


class Saved(NamedTuple):
    """What train_lora.py and merge_adapter.py leave in a folder, read without loading any weights."""

    folder: Path
    record: dict[str, Any]  # its ``codes`` is what ``refuse_other_codes`` compares
    shape: CodeShape | None
    tokenizer: PreTrainedTokenizerBase  # its own, checked

    @property
    def base(self) -> str:
        """The base model that the record names. A relative path is looked for from here, from the repository and from
        this folder: training may have started in any of them."""
        name = str(self.record["base_model"])
        places = [Path(name), ROOT / name, Path(__file__).resolve().parent / name]
        return next((str(place) for place in places if place.is_dir()), name)


def read_saved(folder: str | Path, weights: str = "adapter_config.json") -> Saved:
    """Read an adapter's folder (``weights="config.json"``: a merged model's) and check its tokenizer.

    InputError if the folder, one of its files or a code token is missing.
    """
    folder = Path(folder)
    for name in (weights, RECORD, *([WEIGHTS] if weights == "adapter_config.json" else [])):
        if not (folder / name).is_file():
            what = "does not exist" if not folder.is_dir() else f"has no {name}"
            script = "merge_adapter.py" if weights == "config.json" else "train_lora.py"
            raise InputError(f"{folder} {what}; write it: {command(f'lora_training/{script}')}")
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
        raise InputError(f"{folder / RECORD} does not name the base model and the codes; train again")
    if weights == "adapter_config.json":
        adapter_config(folder)
    tokenizer, shape = load_saved_tokenizer(folder), code_shape(record["codes"])
    if len(tokenizer) != record["vocabulary"]:
        raise InputError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, its record says {record['vocabulary']}: it was "
            "replaced by another one"
        )
    if shape is not None:
        token_ids(tokenizer, shape)
    return Saved(folder, record, shape, tokenizer)


def adapter_config(folder: Path) -> LoraConfig:
    """The settings of a saved adapter. InputError if its two files cannot be read; no weights are loaded."""
    from peft import LoraConfig, PeftConfig
    from safetensors import safe_open

    try:
        read_json(folder / "adapter_config.json", "adapter configuration")
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise ValueError("adapter_config.json is of another kind than LORA")
        with safe_open(str(folder / WEIGHTS), "pt") as file:
            if not file.keys():
                raise ValueError(f"{WEIGHTS} is empty")
    except InputError:
        raise
    except Exception as error:
        raise load_error(f"{folder}: its adapter", error) from error
    return config


def check_base(saved: Saved, base_model: str) -> None:
    """InputError unless ``base_model`` exists and has the vocabulary and layers that the adapter was trained on.

    Nothing of the weights is loaded.
    """
    config = check_causal(base_model)
    size, expected = config.get_text_config().vocab_size, saved.record.get("base_vocabulary")
    if expected is not None and size != expected:
        raise InputError(
            f"base model {base_model} has {size} token rows, {saved.folder} was trained on {expected} "
            f"({saved.record['base_model']}): give that one"
        )
    layers = {name: (inner, outer) for name, inner, outer in model_shape(config).layer_sizes}
    for name, sizes in adapted_layers(saved.folder).items():
        if layers.get(name) != sizes:
            found = "none" if name not in layers else "{} x {}".format(*layers[name])
            raise InputError(
                f"base model {base_model} has other layers than {saved.folder} was trained on: {name} is "
                f"{'{} x {}'.format(*sizes)} there, {found} here; give {saved.record['base_model']}"
            )


def adapted_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """The (inputs, outputs) of each layer with a LoRA pair, by its name in the base model."""
    from safetensors import safe_open

    found: dict[str, tuple[int, int]] = {}
    with safe_open(str(folder / WEIGHTS), "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    for key, shape in shapes.items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_A.weight")
        other = shapes.get(key.replace("lora_A", "lora_B"))
        if name and not part and other is not None:
            found[name] = (shape[1], other[0])
    return found


def load_adapted(saved: Saved, base_model: str, dtype: torch.dtype) -> PeftModel:
    """The base model, grown to the adapter's tokenizer, with the adapter on it (see merge_adapter.py for speed)."""
    check_base(saved, base_model)
    model = load_base(base_model, dtype)
    resize_model(model, saved.tokenizer, seed=0)  # the adapter replaces all new rows
    return put_adapter(model, saved.folder).eval()


def put_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The adapter of ``folder`` on ``model``; InputError if it is damaged, of another shape, or incomplete."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        adapted = PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
        with safe_open(str(Path(folder) / WEIGHTS), "pt") as file:
            stored = set(file.keys())
    except Exception as error:
        if type(error).__name__ in MEMORY_ERRORS:
            raise
        raise load_error(f"{folder}: its adapter", error) from error
    absent = sorted(get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - stored)
    if absent:
        raise InputError(f"adapter {folder} lacks {len(absent)} of its weights, such as {absent[0]}; train it anew")
    return adapted

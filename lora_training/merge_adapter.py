"""Base model + adapter -> one model in Hugging Face form: W_after = W + (alpha / r) * B @ A, the trained rows in place.

    cd lora_training && python merge_adapter.py                     lora_outputs/lora_adapters -> lora_outputs/merged

AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load the folder without this toolkit, and so do
engines such as vLLM (`vllm serve lora_outputs/merged`), which cannot read adapters with rows of added tokens. Answering
is faster too: an adapter copies embedding and head in every forward pass. The merged model is read back from the disk
and its logits are compared with the adapter's: they differ by rounding errors only, or the script fails.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.rows import answer_command
from common.device import find_device
from common.errors import CommandParser, InputError, run_command
from common.files import check_replaceable, output_folder, replaced_folder, sha256_file, write_json
from common.record import make_record
from lora_training.adapters import ADAPTER, RECORD, WEIGHTS, Saved, check_base, load_adapted, read_saved
from lora_training.base_model import quiet_libraries
from lora_training.code_tokens import save_tokenizer, token_ids
from lora_training.memory import enough_memory

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).resolve().parent
DATA = HERE / "lora_data" / "train.json"
# largest difference of logits, relative to the largest logit: W + BA is rounded once (0.5 units in the last place) per
# layer; measured on small models: 8e-7 in float32 and 8e-3 in bfloat16
BOUNDS = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


def probe_ids(saved: Saved) -> torch.Tensor:
    """Token ids [2, 48] from a fixed seed, every second one a code token."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(saved.tokenizer), (2, 48), generator=generator)
    if saved.shape is not None:
        codes = torch.tensor(token_ids(saved.tokenizer, saved.shape))
        ids[:, ::2] = codes[torch.randint(0, len(codes), (2, 24), generator=generator)]
    return ids


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [2, 48, V] in float32 on the CPU."""
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids.to(model.device)).logits
    return logits.float().cpu()


def merge(saved: Saved, base_model: str, folder: Path, dtype: str, device: torch.device) -> float:
    """Write the merged model to a new ``folder``; returns the largest difference of logits relative to the largest.

    InputError if it is above ``BOUNDS``.
    """
    import torch
    from transformers import AutoModelForCausalLM

    adapted = load_adapted(saved, base_model, getattr(torch, dtype)).to(device)
    ids = probe_ids(saved)
    expected = logits_of(adapted, ids)
    merged = adapted.merge_and_unload(safe_merge=True)  # refuses NaN
    merged.config.use_cache = True
    merged.save_pretrained(str(folder))
    save_tokenizer(saved.tokenizer, folder, saved.shape)
    del adapted, merged
    gc.collect()
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(str(folder), dtype=getattr(torch, dtype))
    difference = float((logits_of(loaded.to(device), ids) - expected).abs().max() / expected.abs().max())
    if not difference <= BOUNDS[dtype]:
        raise InputError(
            f"the merged model's logits differ by {difference:.1e} of the largest, over {BOUNDS[dtype]}: nothing was "
            f"written; {'' if dtype == 'float32' else 'give --dtype float32, or '}answer with the adapter: "
            "inference.py --lora_adapter"
        )
    return difference


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    args = parse_args(argv)
    saved = read_saved(args.lora_adapter)
    base_model = args.base_model or saved.base
    check_base(saved, base_model)
    used = saved.record.get("args", {})
    dtype = args.dtype or ("bfloat16" if used.get("bf16") else "float16" if used.get("fp16") else "float32")
    check_replaceable(args.output_dir, "--output_dir", RECORD, args.overwrite)
    if args.output_dir.resolve() in (saved.folder.resolve(), Path(base_model).resolve()):
        raise InputError(f"--output_dir {args.output_dir} is the adapter or the base model itself; choose another")
    device = find_device(args.device)
    quiet_libraries()
    with (
        replaced_folder(args.output_dir, "--output_dir") as part,
        enough_memory("give --device cpu, or --dtype bfloat16"),
    ):
        difference = merge(saved, base_model, part, dtype, device)
        record = make_record(
            vars(args), {WEIGHTS: sha256_file(saved.folder / WEIGHTS)}, time.monotonic() - started, device,
            base_model=base_model, base_vocabulary=saved.record.get("base_vocabulary"),
            vocabulary=len(saved.tokenizer), codes=saved.record["codes"], dtype=dtype, logit_difference=difference,
        )  # fmt: skip
        write_json(record, part / RECORD)
    print(f"wrote {args.output_dir} ({dtype}); logits differ by {difference:.1e} of the largest from the adapter's")
    print(f"next: {answer_command('--base_model', args.output_dir, Path(str(used.get('train_data') or DATA)))}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/merge_adapter.py", description=__doc__.split("\n")[0])
    parser.add_argument("--lora_adapter", type=Path, default=ADAPTER, help="what train_lora.py wrote")
    parser.add_argument("--base_model", help="hub id or folder (default: the one in the adapter's record)")
    parser.add_argument(
        "--output_dir", type=output_folder, default=HERE / "lora_outputs" / "merged", help="merged model"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this script wrote")
    parser.add_argument("--dtype", choices=list(BOUNDS), help="of the weights (default: as trained)")
    parser.add_argument("--device", default="cpu", help="device that computes it: auto, cpu, cuda, cuda:1 ...")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

"""train_lora.py under FSDP2 on two CPU processes: torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py FLAGS.

Accelerate shards only if its distributed type is MULTI_GPU: this script changes MULTI_CPU to it, and nothing else. The
settings are read from lora_training/configs/fsdp2.yaml, as `accelerate launch` would set them.
STOP_AT=N in the environment: the first process gets SIGTERM at the end of step N.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accelerate.accelerator  # type: ignore[import-untyped]
import accelerate.state  # type: ignore[import-untyped]
import yaml  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from transformers import TrainerCallback

from common.errors import run_command
from common.files import ROOT
from lora_training import lora_trainer, train_lora
from lora_training.memory import print_once


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == int(os.environ["STOP_AT"]) and state.is_world_process_zero:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    settings = yaml.safe_load((ROOT / "lora_training" / "configs" / "fsdp2.yaml").read_text())["fsdp_config"]
    os.environ |= {key.upper(): str(value) for key, value in settings.items()} | {"ACCELERATE_USE_FSDP": "true"}
    plain, prepare, make = (
        accelerate.state.PartialState.__init__, accelerate.accelerator.fsdp2_prepare_model, lora_trainer.make_trainer,
    )  # fmt: skip

    def renamed(self: Any, *words: Any, **more: Any) -> None:
        plain(self, *words, **more)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    def counted(*words: Any) -> Any:
        model = prepare(*words)
        kinds = [type(parameter).__name__ for parameter in model.parameters()]
        print_once(f"{kinds.count('DTensor')} of {len(kinds)} parameters are sharded")
        return model

    def stopping(*words: Any) -> Any:
        trainer = make(*words)
        trainer.callback_handler.callbacks.insert(0, StopAt())  # before the callback that checks for a signal
        return trainer

    accelerate.state.PartialState.__init__ = renamed
    accelerate.accelerator.fsdp2_prepare_model = counted
    if "STOP_AT" in os.environ:
        lora_trainer.make_trainer = stopping  # type: ignore[assignment]
    train_lora.main(sys.argv[1:])


if __name__ == "__main__":
    run_command(main)

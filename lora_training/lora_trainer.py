"""The model with LoRA and trained token rows, and transformers' Trainer with our loss, row order and validation.

Importing this module imports transformers and peft (seconds), so train_lora.py does so after its checks.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from common.errors import InputError
from common.files import write_json as write_record
from common.record import seed_everything
from lora_training.adapters import WEIGHTS, adapter_config
from lora_training.checkpoints import SECONDS, saved_sums
from lora_training.code_tokens import trainable_rows
from lora_training.memory import Shape, adapted, print_once
from lora_training.prompts import IGNORED, Example
from lora_training.token_rows import ByLength, Collate, TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

PLAIN_RISE = 0.5  # nats by which the loss of plain text may rise without a warning


# ---------------------------------------------------------------- the model


class AdaptedModel(PeftModelForCausalLM):
    """PEFT's model, which saves its trained rows only: by default both full matrices would be stored too."""

    def save_pretrained(self, save_directory: str, *words: Any, **more: Any) -> None:
        super().save_pretrained(save_directory, *words, **{**more, "save_embedding_layers": False})


class LoraSettings(NamedTuple):
    """What an adapter is made with."""

    r: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]  # names of the adapted modules; empty: all linear layers but the head
    seed: int
    init_adapter: Path | None = None  # a saved adapter that training continues from


def add_adapter(model: PreTrainedModel, settings: LoraSettings, row_ids: Sequence[int], shape: Shape) -> AdaptedModel:
    """LoRA on the linear layers, and the rows ``row_ids`` of embedding and head as trained parameters.

    With 4-bit weights, PEFT's prepare_model_for_kbit_training is not used: it makes embedding, head and norms float32
    during training only, and the saved adapter then gives other logits.
    """
    seed_everything(settings.seed)
    if settings.init_adapter is not None:
        config = adapter_config(settings.init_adapter)
        config.inference_mode = False
        config.lora_dropout = settings.dropout
    else:
        every = "all-linear" if not shape.experts else adapted(shape)
        config = LoraConfig(
            r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, task_type="CAUSAL_LM",
            target_modules=list(settings.targets) or every, fan_in_fan_out=shape.conv1d,
            trainable_token_indices=trainable_rows(model, row_ids) if row_ids else None,
        )  # fmt: skip
    config.base_model_name_or_path = model.name_or_path or None
    made = AdaptedModel(model, config)
    if settings.init_adapter is not None:
        set_peft_model_state_dict(made, load_file(str(settings.init_adapter / WEIGHTS)))
    return made


def check_ranks(model: torch.nn.Module) -> None:
    """RuntimeError unless all processes have the same trained parameters, bit for bit (none of them sharded)."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, digest.hexdigest())
    if len(set(found)) > 1:
        raise RuntimeError("the processes have different weights after training: a step did not reach all of them")
    print_once(f"{len(found)} processes have the same weights")


def probe_logits(model: Any, examples: list[Example], collate: Collate) -> torch.Tensor:
    """Logits [N, V] at the answer tokens of a few rows, on the CPU, without dropout."""
    batch = {key: value.to(model.device) for key, value in collate(examples).items() if key != "labels"}
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(**batch).logits
    return logits.cpu()


# ---------------------------------------------------------------- loss


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [N] of the answer tokens; logits [N, V] as ``logits_to_keep`` selects them, labels [B, T]."""
    return torch.nn.functional.cross_entropy(logits.float(), labels[labels != IGNORED], reduction="none")


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Sum over this pass's answer tokens by the number of them in the whole step (all passes, all processes)."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    losses = token_losses(logits, labels)
    return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)


# ---------------------------------------------------------------- stopping


class Stopped(Exception):
    """Training ended early, with a checkpoint; its argument is the step."""


class Stop:
    """SIGTERM and Ctrl-C: the first one stops after the running step, the second one acts as it did before."""

    def __init__(self) -> None:
        self.signal, self.agreed = 0, False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self.request)
        return self

    def request(self, number: int, frame: object) -> None:
        self.signal = number
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def agree(self) -> bool:
        """Whether any process got a signal; the same on all, since they save together."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            found: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(found, self.signal)
            self.signal = max(found)
        self.agreed = bool(self.signal)
        return self.agreed


class Report(TrainerCallback):
    """Print one line per report, warn if plain text gets worse, mark complete checkpoints, and stop on request.

    ``began``: the monotonic time at which the run began; time before an interruption is included.
    """

    def __init__(self, stop: Stop, began: float, tokens_per_row: float) -> None:
        self.stop, self.began, self.tokens_per_row = stop, began, tokens_per_row
        self.started, self.first, self.warned = 0.0, -1, False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.first < 0:
            self.started, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stop.agree():
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_record({"seconds": time.monotonic() - self.began, "sha256": saved_sums(folder)}, folder / SECONDS)
        if self.stop.agreed:
            raise Stopped(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        done, seconds = state.global_step - self.first, time.monotonic() - self.started
        if not all(math.isfinite(logs[key]) for key in ("loss", "eval_loss") if key in logs):
            raise InputError(f"the loss is not finite at step {state.global_step}; lower --learning_rate")
        if "eval_loss" in logs:
            plain = f", plain text {logs['eval_plain_loss']:.3f}" if "eval_plain_loss" in logs else ""
            print_once(
                f"step {state.global_step}: validation loss {logs['eval_loss']:.4f} per answer token, exact "
                f"{logs['eval_exact']:.3f}{plain}"
            )
            self.check_plain_text(state.log_history)
        elif "loss" in logs and done:
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            left = (state.max_steps - state.global_step) * seconds / done / 60
            print_once(
                f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, "
                f"gradient {float(logs.get('grad_norm', math.nan)):.2f}, rate {logs['learning_rate']:.1e}, "
                f"{self.tokens_per_row * rows * done / seconds:,.0f} tokens/s, {left:.0f} min left"
            )

    def check_plain_text(self, history: list[dict[str, Any]]) -> None:
        """Warn once if the last loss of plain text is more than ``PLAIN_RISE`` above the base model's."""
        base = next((entry["eval_plain_base"] for entry in history if "eval_plain_base" in entry), math.inf)
        now = next((entry["eval_plain_loss"] for entry in reversed(history) if "eval_plain_loss" in entry), 0.0)
        if now > base + PLAIN_RISE and not self.warned:
            self.warned = True
            print_once(
                f"warning: the loss of plain text rose from {base:.2f} to {now:.2f} nats per token: the model is "
                "losing its language; lower --learning_rate"
            )


# ---------------------------------------------------------------- the trainer


class PlainText(NamedTuple):
    """Sentences whose loss shows whether the language model is damaged."""

    examples: list[Example]
    vocabulary: int  # tokens of the base


class CodeTrainer(Trainer):
    """transformers' Trainer with rows grouped by length, a rate of its own for token rows, and our validation."""

    def __init__(self, collate: Collate, plain: PlainText, rows_lr: float | None, **more: Any) -> None:
        super().__init__(data_collator=collate, compute_loss_func=mean_loss, **more)
        self.collate, self.plain, self.rows_lr = collate, plain, rows_lr

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's optimizer; with ``rows_lr`` the trained token rows are a group with this learning rate."""
        if self.rows_lr is not None and self.optimizer is None:
            whole: Any = model or self.model
            trained = [(name, parameter) for name, parameter in whole.named_parameters() if parameter.requires_grad]
            rows = [parameter for name, parameter in trained if "trainable_tokens" in name]
            others = [parameter for name, parameter in trained if "trainable_tokens" not in name]
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, whole)
            groups: list[dict[str, Any]] = [{"params": others}, {"params": rows, "lr": self.rows_lr}]
            self.optimizer = kind(groups, weight_decay=self.args.weight_decay, **settings)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        train: Any = self.train_dataset
        return ByLength(train.lengths, rows, self.args.seed)

    def logits(self, batch: dict[str, Any]) -> torch.Tensor:
        """Logits [N, V] at the supervised positions of a batch, without gradient."""
        with torch.no_grad(), self.compute_loss_context_manager():
            found: torch.Tensor = self.model_wrapped(**batch).logits
        return found

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Validation loss per answer token, share of rows whose every token is the most likely one (over all
        processes), and the loss of plain text; before the first step also that of the base alone."""
        started, found = time.monotonic(), []
        self.model_wrapped.eval()
        for batch in self.get_eval_dataloader():
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")
            logits = self.logits(batch)
            supervised = labels != IGNORED
            losses, right = torch.zeros_like(labels, dtype=torch.float32), torch.ones_like(labels, dtype=torch.bool)
            losses[supervised] = token_losses(logits, labels)
            right[supervised] = logits.argmax(-1) == labels[supervised]
            rows = torch.stack([losses.sum(1), supervised.sum(1).float(), right.all(1).float()], 1)  # [B, 3]
            found.append(self.accelerator.gather_for_metrics(rows).double().cpu())
        loss, tokens, right_rows = torch.cat(found).sum(0).tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss / tokens,
            f"{metric_key_prefix}_exact": right_rows / sum(len(part) for part in found),
            **{f"{metric_key_prefix}_{name}": value for name, value in self.plain_losses().items()},
            f"{metric_key_prefix}_seconds": round(time.monotonic() - started, 1),
        }
        self.model_wrapped.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def plain_losses(self) -> dict[str, float]:
        """Loss per token of the plain sentences. ``plain_base``, before the first step: with the base's tokens only,
        which is the loss of the base model, since a new adapter changes nothing else."""
        if not self.plain.examples:
            return {}
        batch: Any = self._prepare_inputs(self.collate(self.plain.examples))
        labels = batch.pop("labels")
        logits = self.logits(batch)
        found = {"plain_loss": float(token_losses(logits, labels).mean())}
        if self.state.global_step == 0:
            found["plain_base"] = float(token_losses(logits[:, : self.plain.vocabulary], labels).mean())
        return found


def make_trainer(
    model: AdaptedModel, arguments: TrainingArguments, train: TokenRows, validation: TokenRows, collate: Collate,
    began: float, plain: PlainText | None = None, rows_lr: float | None = None, stop: Stop | None = None,
) -> CodeTrainer:  # fmt: skip
    """The trainer with its callbacks; after a signal to ``stop`` the running step ends, is saved, and ``Stopped`` is
    raised."""
    trainer = CodeTrainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=validation, collate=collate,
        plain=plain or PlainText([], 0), rows_lr=rows_lr,
    )  # fmt: skip
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Report(stop or Stop(), began, float(train.lengths.mean())))
    return trainer

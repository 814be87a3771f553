"""Several processes train one model: who does what, and what is exchanged.

Every process holds the whole graph, model and optimizer, and takes the same batches in the same order. Of a batch's
queries, of the entities in the quantization loss, of the rows in the search for codes and of the triples to rank, each
process works on its own part; k-means and the revival of codes are done by the first process. What the others need is
exchanged, by model/trainer.py (batch norms aside):

    gradients of all parameters, with the losses     one sum per step, just before the optimizer's
    codes                                            gathered wherever they are assigned
    codebooks after k-means or revival               copied from the first process
    moments of the decoder's batch norms             ``SharedBatchNorm``, forward and backward

The pass over the graph is replicated: its batch norms see all entities, and its dropout is the same in every process,
so z is. As its backward is linear in the gradient of z, each process carries its own part of that through the encoder,
and only parameters' gradients are summed. DDP would sum them in hooks, once per backward; here a step has two
backwards, the second one only now and then, through different parts of the model, and one sum serves both.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import InputError


class World:
    """The processes of a run, seen from the one of number ``rank``. ``World()`` is a run of one process, where every
    method returns its input; so the caller needs no special case.

    Tensors that are exchanged lie on ``device``. Every process must make the same calls in the same order.
    Raises InputError where another process has ended.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.started = size  # their number at the start; ``size`` is 1 after ``close``
        self.stop_signal = 0  # a signal that this process got, to be acted on after a step, by all

    @classmethod
    def start(cls, device: torch.device) -> World:
        """The processes that ``torchrun`` started, joined over gloo (CPU) or NCCL (GPU); without it, this one alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(device=device)
        from accelerate import PartialState  # type: ignore[import-untyped]

        state = PartialState(cpu=device.type == "cpu")
        if state.num_processes != size:
            raise InputError(f"{size} processes were started, {state.num_processes} are joined; start them by torchrun")
        return cls(state.process_index, size, state.device)

    @property
    def first(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    # ------------------------------------------------------------ parts

    def part(self, n: int) -> slice:
        """This process's rows of n; the parts are disjoint and differ by one row at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def own(self, rows: Tensor) -> Tensor:
        """This process's part of rows [n, ...]."""
        return rows if self.size == 1 else rows[self.part(len(rows))]

    def share(self, n: int) -> float:
        """What part of n rows is this process's."""
        part = self.part(n)
        return (part.stop - part.start) / n

    # ------------------------------------------------------------ exchange

    @torch.no_grad()
    def sum(self, value: Tensor) -> Tensor:
        """The sum of all processes' ``value`` (no gradient)."""
        if self.size == 1:
            return value
        total = value.clone(memory_format=torch.contiguous_format)
        self._exchange(dist.all_reduce, total)
        return total

    @torch.no_grad()
    def gather(self, own: Tensor, n: int) -> Tensor:
        """All n rows, of which each process found those of ``part(n)``."""
        if self.size == 1:
            return own
        rows = own.new_zeros(n, *own.shape[1:])
        rows[self.part(n)] = own
        self._exchange(dist.all_reduce, rows)  # the parts need not be of one size
        return rows

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` by those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                self._exchange(dist.broadcast, tensor.detach(), src=0)

    def same(self, value: float) -> float:
        """The first process's ``value``."""
        if self.size == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.copy_from_first([held])
        return float(held)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter], values: list[float]) -> list[float]:
        """Replace every gradient by its sum over the processes, and return the sums of ``values``: one exchange.

        Afterwards all processes have equal gradients, bit for bit. Raises KeyboardInterrupt or SystemExit, in all of
        them, when any has received a signal to stop.
        """
        if self.size == 1:
            return values
        gradients = [p.grad for p in parameters if p.grad is not None]
        extra = gradients[0].new_tensor([*values, float(self.stop_signal > 0)])
        buffer = torch.cat([extra, *(gradient.flatten() for gradient in gradients)])
        self._exchange(dist.all_reduce, buffer)
        sums, *summed = buffer.split([len(extra), *(gradient.numel() for gradient in gradients)])
        for gradient, total in zip(gradients, summed, strict=True):
            gradient.copy_(total.view_as(gradient))
        *values, stops = sums.tolist()
        if stops:
            self.stop()
        return values

    def _exchange(self, collective: Callable[..., Any], tensor: Tensor, **how: Any) -> None:
        try:
            collective(tensor, **how)
        except RuntimeError as error:  # a peer's end closes the connection
            raise InputError(
                f"process {self.rank} of {self.size} lost another one, which ended by an error of its own; "
                "start all of them again with --restore"
            ) from error

    # ------------------------------------------------------------ rank-0 output, joint shutdown

    @contextmanager
    def together(self) -> Iterator[None]:
        """An exception inside, in whichever processes, ends all of them: it is raised in the first that has one, the
        others exit without a message."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = torch.zeros(self.size, device=self.device)
        failed[self.rank] = failure is not None
        failing = self.sum(failed).nonzero().flatten().tolist()
        if failure is not None and failing[0] == self.rank:
            raise failure
        if failing:
            sys.exit(2)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Only the first process prints."""
        with ExitStack() as stack:
            if not self.first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield

    def interrupt(self, signum: int, frame: object = None) -> None:
        """A signal's handler: end the run, with several processes after the current step, the same one in all."""
        self.stop_signal = signum
        if self.size == 1:
            self.stop()

    def stop(self) -> None:
        """Raise the signal's exception: KeyboardInterrupt for Ctrl-C, else SystemExit with code 143."""
        if self.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Inside, torch's global generators differ between processes; outside they stay in step (one draw further)."""
        if self.size == 1:
            yield
            return
        seed = int(torch.randint(2**48, ()))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed + self.rank)
            yield

    def close(self) -> None:
        """Leave the other processes; this one may go on alone, as the first does to write the results."""
        if self.size > 1:
            self.size = 1
            dist.destroy_process_group()


# ---------------------------------------------------------------- batch norm


class SharedBatchNorm(_BatchNorm):
    """Batch norm over the rows of all processes: BatchNorm1d or 2d of the whole batch, under the same names.

    torch's SyncBatchNorm does the same on GPUs alone.
    """

    def __init__(self, norm: _BatchNorm, world: World) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.world = world
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)
        self.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """x [B, C, ...], this process's rows -> the same shape, normalised by the moments of all rows."""
        if not self.training:
            return super().forward(input)
        out, mean, variance, count = _SharedNorm.apply(input, self.weight, self.bias, self.eps, self.world)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        normalised: Tensor = out
        return normalised

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # the norm that this one replaces was built for the right dimensions


class _SharedNorm(torch.autograd.Function):
    """y = weight (x - mean) / sqrt(variance + eps) + bias, moments over all processes' rows; with g = dL/dy,

        dL/dx = weight / sqrt(variance + eps) (g - mean of g - x_hat * mean of (g x_hat))

    Gradients of weight and bias are this process's part, as every parameter's are until ``sum_gradients``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        local = x.new_tensor([x.numel() / x.shape[1]])
        totals = world.sum(torch.cat([x.sum(dims), local]))
        count, mean = totals[-1], totals[:-1] / totals[-1]
        centred = x - mean.view(shape)
        # a second sum: the difference of two large ones, squares minus squared mean, would lose the variance's bits
        variance = world.sum(centred.square().sum(dims)) / count
        scale = (variance + eps).rsqrt()
        x_hat = centred.mul_(scale.view(shape))
        ctx.save_for_backward(x_hat, weight * scale, count)
        ctx.world, ctx.dims, ctx.shape = world, dims, shape
        ctx.mark_non_differentiable(mean, variance, count)
        return torch.addcmul(bias.view(shape), x_hat, weight.view(shape)), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_hat, scale, count = ctx.saved_tensors
        gradient = gradients[0]
        d_bias, d_weight = gradient.sum(ctx.dims), (gradient * x_hat).sum(ctx.dims)
        of_bias, of_weight = ctx.world.sum(torch.cat([d_bias, d_weight])).div_(count).view(2, *ctx.shape)
        d_x = (gradient - of_bias - x_hat * of_weight).mul_(scale.view(ctx.shape))
        return d_x, d_weight, d_bias, None, None


def share_batch_norms(module: nn.Module, world: World) -> None:
    """With several processes: replace the batch norms inside ``module`` by shared ones, parameters and buffers kept."""
    if world.size == 1:
        return
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, SharedBatchNorm(child, world))
        else:
            share_batch_norms(child, world)

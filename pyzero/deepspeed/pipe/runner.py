"""Run micro-batches through the stages of a pipeline, by torch.distributed.pipelining.

If a layer failed on one stage, the others would wait for its output. So that stage finishes the pass and sends zeros.
Then it reports the error, and all ranks are in step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyzero.deepspeed.engine import tensors
from pyzero.sharding.spans import repeats_elements

MicroBatch = tuple[Any, Any]  # inputs, labels
_ALONE_SHAPE = (1,) * 7  # an int8 tensor of this shape marks a tuple of one, which torch would pass on bare
_SENDS_INTEGERS = torch.__version__ >= "2.13"  # TorchVersion; before, all received tensors require gradients
_FAILED_SHAPE = (1,) * 8  # sent if a stage failed before it knew its output shapes


class _StageBefore(Exception):
    """An earlier stage failed."""


class Buffers:
    """A copy of a module's buffers at this moment."""

    def __init__(self, module: nn.Module) -> None:
        with torch.no_grad():
            self._kept: list[tuple[nn.Module, str, Tensor | None, Any]] = [
                (owner, name, buffer, buffer.clone() if buffer is not None and _can_be_written(buffer) else None)
                for owner in module.modules()
                for name, buffer in owner._buffers.items()
            ]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers' values, and the tensor objects."""
        for owner, name, buffer, before in self._kept:
            if buffer is not None and before is not None:
                buffer.copy_(before)
            setattr(owner, name, buffer)


def _can_be_written(buffer: Tensor) -> bool:
    return not buffer.is_inference() and not (buffer.layout == torch.strided and repeats_elements(buffer))


class Runner:
    """Runs passes of num_micro micro-batches: forward only, or 1F1B. Every rank of the pipeline makes an equal one.

    torch's schedules split tensors. Here they split the indices of the micro-batches, and the first and last stage look
    up inputs and labels by index. So these may be tuples of anything.

    Args:
        module: The layers of this stage.
        run: Called to run the module.
        loss_fn: Called with outputs and labels.
        scale: Turns the mean over micro-batches into the tensor that backward starts from.
        stage: Index of this stage.
        num_stages: Number of stages.
        num_micro: Number of micro-batches.
        device: This rank's device.
        group: The pipeline's process group.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Callable[[Any], Any],
        loss_fn: Callable[[Any, Any], Tensor],
        scale: Callable[[Tensor], Tensor],
        stage: int,
        num_stages: int,
        num_micro: int,
        device: torch.device,
        group: Any,
    ) -> None:
        # The import takes half a second.
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        if "scale_grads" not in inspect.signature(ScheduleGPipe).parameters:
            raise RuntimeError(
                f"expected a torch whose pipelines take scale_grads for more than one stage, got torch "
                f"{torch.__version__}; install torch 2.11 or newer, or take num_stages=1"
            )
        self._loss_fn, self._scale, self._num_micro = loss_fn, scale, num_micro
        self._micro: Sequence[MicroBatch] = ()
        self._losses: dict[int, Tensor] = {}
        is_last = stage == num_stages - 1
        self._layers = _StageLayers(module, run, self._inputs if stage == 0 else None, is_last, device)
        self._stage = PipelineStage(self._layers, stage, num_stages, device, group=group)
        schedule = Schedule1F1B if num_micro >= num_stages else ScheduleGPipe  # 1F1B needs num_stages of them
        self._schedule = schedule(self._stage, num_micro, loss_fn=self._loss, scale_grads=False)

    def free(self) -> None:
        """Free torch's buffers at once. They and this runner form a reference cycle."""
        del self._schedule, self._stage, self._layers

    def _inputs(self, number: Tensor) -> Any:
        return self._micro[int(number)][0]

    def _loss(self, outputs: Any, number: Tensor) -> Tensor:
        last, loss = self._layers.take_last(), None
        if self._layers.problem is None:
            try:
                loss = self._loss_fn(last, self._micro[int(number)][1])
            except Exception as error:  # any error, as in the layers
                self._layers.problem = error
        if loss is None:
            loss = _zero_of(tensors.find(outputs)).to(self._stage.device)
        self._losses[int(number)] = loss.detach()
        return self._scale(loss / self._num_micro)

    def take_problem(self) -> Exception | None:
        """Return and forget the error of this stage in the last pass; None if there was none, or another stage's."""
        problem, self._layers.problem = self._layers.problem, None
        return None if isinstance(problem, _StageBefore) else problem

    def train(self, micro: Sequence[MicroBatch]) -> Tensor | None:
        """Run forward and backward of all micro-batches. Return the mean loss on the last stage, else None.

        micro: Empty on stages that are neither first nor last.
        """
        return self._run(self._schedule.step, micro)

    @torch.no_grad()
    def evaluate(self, micro: Sequence[MicroBatch]) -> Tensor | None:
        """Run forward of all micro-batches. Return the mean loss on the last stage, else None."""
        return self._run(self._schedule.eval, micro)

    def _run(self, step: Callable[..., Any], micro: Sequence[MicroBatch]) -> Tensor | None:
        self._micro = micro
        numbers = torch.arange(self._num_micro, device="cpu")
        try:
            step(
                *((numbers,) if self._stage.is_first else ()),
                target=numbers if self._stage.is_last else None,
                return_outputs=False,
            )
            losses = [self._losses[number].float() for number in sorted(self._losses)]
        except RuntimeError:
            if self._layers.problem is None:
                raise
            raise self._layers.problem from None  # it could not send zeros instead
        finally:
            self._micro, self._losses = (), {}
        return torch.stack(losses).mean() if losses else None


class _StageLayers(nn.Module):
    """The module that PipelineStage calls.

    inputs: On the first stage, returns the inputs of an index. is_last: No stage follows.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Callable[[Any], Any],
        inputs: Callable[[Tensor], Any] | None,
        is_last: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._device = device
        self._module, self._run_module = module, run
        self._inputs, self._is_last = inputs, is_last
        # torch's first call is to learn shapes. On later stages its inputs are uninitialised. It may run backward.
        self._asks_shapes = True
        self._before: Buffers | None = None  # copies from before that call
        self._sent: Any = None  # shapes and dtypes of the first outputs, which all later ones must have
        self._last: Any = None
        self._like: list[tuple[Any, torch.dtype, bool]] = []  # (shape, dtype, has gradient) of each output
        self.problem: Exception | None = None  # this pass's error, here or on an earlier stage

    def forward(self, *received: Tensor) -> Any:
        """Return the module's outputs as a tuple of tensors. Return zeros after an error.

        On the last stage, where they may be nested, these are the tensors found in them.
        """
        if self.problem is None:
            try:
                sent = self._run(received)
                self._like = [(value.shape, value.dtype, value.requires_grad) for value in sent]
                return sent
            except Exception as error:  # any error: the other stages wait for this one
                self.problem = error
        zero = _zero_of([*map(_mine, received), *self._module.parameters()])
        like = self._like or [(_FAILED_SHAPE, torch.float32, torch.is_grad_enabled())]
        zeros = [(torch.zeros(shape, dtype=dtype, device=self._device), has_grad) for shape, dtype, has_grad in like]
        return tuple(value + zero.to(value) if has_grad else value for value, has_grad in zeros)

    def _run(self, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if any(tensor.shape == _FAILED_SHAPE for tensor in received):
            raise _StageBefore
        if self._asks_shapes:
            self._before = Buffers(self._module)
            with torch.no_grad():
                for tensor in received if self._inputs is None else ():
                    tensor.zero_()
        elif self._before is not None:
            self._before.restore()
            self._before = None
        outputs = self._run_module(self._received(received) if self._inputs is None else self._inputs(received[0]))
        if self._is_last:
            self._last = outputs
            sent = tuple(tensors.find(outputs))
        else:
            sent = self._sendable(outputs)
        self._asks_shapes = False
        return sent

    def take_last(self) -> Any:
        """Return and forget the last output of the last stage's module, of any type."""
        outputs, self._last = self._last, None
        return outputs

    def _received(self, received: tuple[Tensor, ...]) -> Any:
        mine = tuple(map(_mine, received))
        if len(mine) == 2 and mine[1].dtype == torch.int8 and mine[1].shape == _ALONE_SHAPE:
            return mine[:1]
        return mine[0] if len(mine) == 1 else mine

    def _sendable(self, outputs: Any) -> tuple[Tensor, ...]:
        several = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
        others = [type(value).__name__ for value in several if not isinstance(value, Tensor)]
        if others or not several:
            raise TypeError(
                f"expected a tensor, or a tuple of tensors, from the last layer of a stage, got "
                f"{', '.join(others) or 'an empty one'} in its place; leave it out of what is sent on, or "
                f"choose another partition_method"
            )
        found = [(tuple(value.shape), value.dtype) for value in several]
        if self._asks_shapes:
            self._sent = found
        elif self._sent != found:
            raise ValueError(
                f"expected a stage to send {self._sent} of each micro-batch, as of the first, got {found}; have layers "
                f"give the same shapes for inputs of the same shapes"
            )
        sent = tuple(value.contiguous() for value in several)
        if len(several) == 1 and not isinstance(outputs, Tensor):
            sent = (*sent, sent[0].new_zeros(_ALONE_SHAPE, dtype=torch.int8))
        if _SENDS_INTEGERS:
            return sent
        _check_floats(sent)
        return tuple(map(_with_gradient, sent)) if torch.is_grad_enabled() else sent


def _zero_of(values: Iterable[Tensor]) -> Tensor:
    """Return a 0-D zero that gives a zero gradient to each of these that requires one."""
    terms = [value.sum(dtype=torch.float32) * 0.0 for value in values if value.requires_grad]
    return torch.stack([term.nan_to_num() for term in terms]).sum() if terms else torch.zeros(())


def _check_floats(sent: Iterable[Tensor]) -> None:
    """Refuse tensors that an older torch cannot send."""
    integers = {str(tensor.dtype) for tensor in sent if not tensor.is_floating_point()}
    if integers:
        raise TypeError(
            f"expected floating-point tensors between stages, for torch {torch.__version__} sends no others, got "
            f"{', '.join(sorted(integers))} (a tuple of one tensor adds int8); install torch 2.13 or newer, "
            f"or have layers give masks as floats, and a tensor instead of a tuple of one"
        )


def _with_gradient(sent: Tensor) -> Tensor:
    return sent if sent.requires_grad else sent.detach().requires_grad_()


def _mine(received: Tensor) -> Tensor:
    """Return a copy if the tensor requires a gradient. Layers may edit it in place, and its gradient is contiguous."""
    if not received.requires_grad:
        return received
    copy = received.clone()
    copy.register_hook(Tensor.contiguous)
    return copy

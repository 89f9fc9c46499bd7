"""Micro-batches through the stages of a pipeline, by torch.distributed.pipelining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MicroBatch = tuple[Any, Any]  # inputs, labels


class Runner:
    """One pass of so many micro-batches, forward alone or 1F1B; every rank of the pipeline makes one alike.

    torch's schedule cuts tensors. Here it cuts the numbers of the micro-batches, and the first and the last stage look
    up what they are of: inputs and labels may be tuples of anything.

    Args:
        module: The layers of this stage.
        run: Calls them.
        loss_fn: Of outputs and labels.
        scale: Turns a mean over micro-batches into what backward starts from.
        stage: Number of this one.
        num_stages: How many.
        num_micro: Micro-batches.
        device: Of this rank.
        group: The process group of the pipeline.
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
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe  # half a second

        self._loss_fn, self._scale, self._num_micro = loss_fn, scale, num_micro
        self._micro: Sequence[MicroBatch] = ()
        self._losses: dict[int, Tensor] = {}
        layers = _StageLayers(module, run, self._inputs if stage == 0 else None)
        self._stage = PipelineStage(layers, stage, num_stages, device, group=group)
        schedule = Schedule1F1B if num_micro >= num_stages else ScheduleGPipe  # 1F1B takes no fewer
        self._schedule = schedule(self._stage, num_micro, loss_fn=self._loss, scale_grads=False)

    def _inputs(self, number: Tensor) -> Any:
        return self._micro[int(number)][0]

    def _loss(self, outputs: Any, number: Tensor) -> Tensor:
        loss = self._loss_fn(outputs, self._micro[int(number)][1])
        self._losses[int(number)] = loss.detach()
        return self._scale(loss / self._num_micro)

    def train(self, micro: Sequence[MicroBatch]) -> Tensor | None:
        """Forward and backward of all; the mean of the losses on the last stage. micro: empty on stages between."""
        return self._run(self._schedule.step, micro)

    @torch.no_grad()
    def evaluate(self, micro: Sequence[MicroBatch]) -> Tensor | None:
        """Forward alone."""
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
        finally:
            self._micro, self._losses = (), {}
        return torch.stack(losses).mean() if losses else None


class _StageLayers(nn.Module):
    """What PipelineStage calls. inputs: on the first stage, gives those of a number."""

    def __init__(self, module: nn.Module, run: Callable[[Any], Any], inputs: Callable[[Tensor], Any] | None) -> None:
        super().__init__()
        self._module, self._run_module = module, run
        self._inputs = inputs
        # torch's first call is to learn shapes, on later stages with uninitialised memory, and may run backward.
        self._asks_shapes = True
        self._before: list[tuple[Tensor, Tensor]] = []  # buffers as they were before it

    def forward(self, *received: Tensor) -> Any:
        """The module's."""
        with torch.no_grad():
            if self._asks_shapes:
                self._before = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
                for tensor in received if self._inputs is None else ():
                    tensor.zero_()
            else:
                for buffer, before in self._before:
                    buffer.copy_(before)
                self._before = []
        self._asks_shapes = False
        return self._call(received)

    def _call(self, received: tuple[Tensor, ...]) -> Any:
        if self._inputs is not None:
            return self._run_module(self._inputs(received[0]))
        return self._run_module(received[0] if len(received) == 1 else received)

"""The engine of a PipelineModule: train_batch() replaces forward, backward and step."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyzero.comm.group import Group
from pyzero.comm.work import CollectiveError
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.engine import tensors
from pyzero.deepspeed.engine.engine import Engine
from pyzero.deepspeed.parallel.mesh import Parallelism
from pyzero.deepspeed.pipe.module import PipelineError, PipelineModule
from pyzero.deepspeed.pipe.runner import Buffers, MicroBatch, Runner
from pyzero.optimizer import ZeroOptimizer


class PipelineEngine(Engine):
    """An Engine whose gradient_accumulation_steps is the number of micro-batches in the pipeline."""

    module: PipelineModule

    def __init__(
        self,
        module: PipelineModule,
        optimizer: ZeroOptimizer,
        lr_scheduler: Any,
        config: Config,
        parallel: Parallelism,
        made_group: bool,
    ) -> None:
        super().__init__(module, optimizer, lr_scheduler, config, parallel, made_group)
        self.grid = self.mpu = module.grid
        self.stage_id, self.num_stages = module.stage_id, module.num_stages
        self.is_pipe_parallel = self.num_stages > 1
        self.agg_train_loss: Tensor | None = None  # what train_batch() returned last
        self.data_iterator: Iterator[Any] | None = None
        self.batch_fn: Callable[[Any], Any] | None = None
        self._everyone = Group()
        # By number of micro-batches and whether it trains: the code of the input shapes, and the runner for them.
        self._runners: dict[tuple[int, bool], tuple[float, Runner]] = {}

    # ---- data ------------------------------------------------------------------------------------------------------

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches in a batch."""
        return self.batches.accumulation

    def is_first_stage(self) -> bool:
        """Return whether this rank reads inputs."""
        return self.stage_id == 0

    def is_last_stage(self) -> bool:
        """Return whether this rank reads labels."""
        return self.stage_id == self.num_stages - 1

    def get_pipeline_parallel_rank(self) -> int:
        """Return the number of this rank's stage."""
        return self.stage_id

    def set_has_attention_mask(self, value: bool) -> None:
        """Do nothing, because stages detect which of the tensors that they send have gradients."""

    def set_dataloader(self, loader: Iterable[Any]) -> None:
        """Set where train_batch() takes micro-batches from; see pyzero.deepspeed.utils.RepeatingLoader."""
        self.training_dataloader = loader
        self.data_iterator = iter(loader)

    def set_dataiterator(self, iterator: Iterator[Any] | None) -> None:
        """Set the iterator from which train_batch() takes micro-batches."""
        self.data_iterator = iterator

    def set_batch_fn(self, fn: Callable[[Any], Any] | None) -> None:
        """Set a function that turns each item of the loader into (inputs, labels)."""
        self.batch_fn = fn

    def reset_activation_shape(self) -> None:
        """Forget the shapes of inputs. train_batch() also notices new shapes by itself."""
        self._runners.clear()

    def _pull(self, data_iter: Iterator[Any] | None, num_micro: int) -> list[MicroBatch]:
        """Return micro-batches on this device if this is the first or the last stage; otherwise an empty list."""
        if not (self.is_first_stage() or self.is_last_stage()):
            return []
        if data_iter is None:
            raise ValueError(
                "expected data on the first and the last stage, got none; pass data_iter=, or call set_dataloader() or "
                "initialize(training_data=)"
            )
        micro: list[MicroBatch] = []
        for _ in range(num_micro):
            batch = next(data_iter)  # StopIteration is the caller's
            batch = batch if self.batch_fn is None else self.batch_fn(batch)
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise ValueError(
                    f"expected micro-batches as (inputs, labels), got {type(batch).__name__}; give such pairs, or call "
                    f"engine.set_batch_fn()"
                )
            inputs, labels = map(_as_tuple, batch)
            if self.is_first_stage():  # layers may edit inputs in place
                inputs = self._cast(tensors.to_device(inputs, self.device, copy=True))
            if self.is_last_stage():
                labels = tensors.to_device(labels, self.device)
            micro.append((inputs, labels))
        shapes = [_shapes(inputs) for inputs, _ in micro] if self.is_first_stage() and self.num_stages > 1 else []
        other = next((at for at, found in enumerate(shapes) if found != shapes[0]), None)
        if other is not None:
            raise ValueError(
                f"expected micro-batches of one shape in a batch, got inputs of {shapes[0]} in the first and "
                f"{shapes[other]} in number {other}; pad them, or have the loader leave out the last, smaller one "
                f"(dataloader_drop_last in the config, drop_last=True)"
            )
        return micro

    def _pull_on_all_ranks(self, data_iter: Iterator[Any] | None, num_micro: int) -> tuple[list[MicroBatch], float]:
        """Call `_pull`. Return its micro-batches and a code of the shapes of this pipeline's inputs. Collective.

        If the data end or fail on one rank, no rank begins the batch.
        """
        micro: list[MicroBatch] = []
        problem: Exception | None = None
        try:
            micro = self._pull(data_iter, num_micro)
        except Exception as error:  # any error: the other ranks wait for this one
            problem = error
        code = 0.0 if problem is None else 1.0 if isinstance(problem, StopIteration) else 2.0
        shapes = float(zlib.crc32(repr(_shapes(micro[0][0])).encode())) if micro else 0.0
        row = torch.tensor([code, shapes], dtype=torch.float64, device="cpu")
        try:
            rows = self._everyone.gather_rows(row, "the agreement on a batch").view(-1, 2)
            codes = rows[:, 0].tolist()
            if problem is not None:
                raise problem
        finally:
            problem = None  # its traceback holds this frame, and the callers'
        if 2.0 in codes:
            raise PipelineError(f"got an error in the data of ranks {_where(codes, 2.0)}; see their output")
        if 1.0 in codes:
            raise StopIteration(f"the data of ranks {_where(codes, 1.0)} ended")
        return micro, float(rows[self.grid.stage_to_global(0), 1])

    # ---- a batch ---------------------------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Take one optimizer step on gradient_accumulation_steps micro-batches of one shape. Every rank calls it.

        Args:
            data_iter: Yields (inputs, labels), the same on the first and the last stage; default: that of
                set_dataloader().

        Returns:
            0-D fp32 on every rank: the mean of the losses over micro-batches and replicas.

        Raises:
            TypeError: The schedule is torch's ReduceLROnPlateau. Nothing has changed.
            ValueError: There is no data, or it is not in pairs.
            StopIteration: The data ended on some rank. It is raised on all ranks.
                pyzero.deepspeed.utils.RepeatingLoader restarts the data.
            PipelineError: Another rank's data raised an error.
            RuntimeError: A layer's forward or the loss function failed on another rank, which raises the original
                error. No rank has stepped, and training may continue.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("expected gradients to be enabled, got train_batch() in no_grad(); call eval_batch()")
        self._check_watched(
            {},
            "train_batch() takes none: leave it out of initialize(), and call its step(loss) after train_batch(), with "
            "the same loss on every rank",
        )
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.module.train()
        num_micro = self.batches.accumulation
        self.tput_timer.start()
        micro, shapes = self._pull_on_all_ranks(self.data_iterator, num_micro)
        runner = None if self.num_stages == 1 else self._runner(True, shapes)
        buffers = None if runner is None else Buffers(self.module)
        with self.timers.phase("forward and backward"), self.optimizer.scaled_gradients():
            mean = self._train_alone(micro) if runner is None else runner.train(micro)
            loss = self.agg_train_loss = self._loss_of_all(mean)
        with self._leaving_out(buffers):
            problem = None if runner is None else runner.take_problem()
            try:
                if problem is not None:
                    self.optimizer._raise_on_all_ranks(problem, "sum_tied_grads" if self.module.has_ties else "step")
            finally:
                problem = None  # its traceback holds this frame, and those of the layers
            if self.module.has_ties:
                self.optimizer.sum_tied_grads(self.module.tied_params())
            self._stepped = True
            self.micro_steps += num_micro
            self._num_backwards = num_micro
            with self.timers.phase("step"):
                self._take_step({})
        self.tput_timer.stop(global_step=True)
        if self.monitor.enabled:
            self._loss_sum = loss
        self._report()
        return loss

    @torch.no_grad()
    def eval_batch(
        self,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Tensor:
        """Compute the mean loss without gradients. Every rank calls it.

        Args:
            data_iter: As for train_batch, whose own iterator does not advance.
            return_logits: True is not supported.
            compute_loss: False is not supported.
            reduce_output: Must be "avg".
            bcast_loss: Ignored; every rank gets the loss.
            num_micro_batches: Default: as many as train_batch takes.

        Returns:
            As train_batch.

        Raises:
            ValueError, StopIteration, PipelineError: As train_batch; ValueError of what is not supported.
        """
        if return_logits or not compute_loss or reduce_output != "avg":
            raise ValueError(
                "got return_logits, compute_loss=False or another reduce_output than 'avg', which are not supported; "
                "keep what is wanted of the outputs in loss_fn"
            )
        was_training = self.module.training
        self.module.eval()
        num_micro = self.batches.accumulation if num_micro_batches is None else num_micro_batches
        try:
            micro, shapes = self._pull_on_all_ranks(data_iter, num_micro)
            if self.num_stages > 1:
                mean = self._evaluate(self._runner(False, shapes, num_micro), micro)
            else:
                losses = [self._loss(self._layers(inputs), labels).float() for inputs, labels in micro]
                mean = torch.stack(losses).mean()
            loss = self._loss_of_all(mean)
        finally:
            self.module.train(was_training)
        if self.monitor.enabled:
            self.monitor.write_events([("Train/Samples/eval_loss", float(loss), self.global_samples)])
        return loss

    def _evaluate(self, runner: Runner, micro: list[MicroBatch]) -> Tensor | None:
        buffers = Buffers(self.module)
        mean = runner.evaluate(micro)
        problem = runner.take_problem()
        with self._leaving_out(buffers):
            try:
                if self._everyone.any_rank(problem is not None, "the agreement on an evaluation"):
                    raise problem or PipelineError("got an error in the layers of another rank; see its output")
            finally:
                problem = None
        return mean

    @contextmanager
    def _leaving_out(self, buffers: Buffers | None) -> Iterator[None]:
        """A context in which a batch that fails, which it does on all ranks, leaves no gradients and no runners.

        buffers: Copies from before the batch. After a failed stage, later stages have computed on its zeros and updated
        theirs.
        """
        try:
            yield
        except CollectiveError:
            raise
        except Exception:
            while self._runners:  # they may have failed before they knew the shapes to send
                self._runners.popitem()[1][1].free()
            self.optimizer.zero_grad()
            if buffers is not None:
                buffers.restore()
            raise

    def _runner(self, trains: bool, shapes: float, num_micro: int | None = None) -> Runner:
        key = num_micro or self.batches.accumulation, trains
        if key in self._runners and self._runners[key][0] != shapes:
            self._runners.pop(key)[1].free()
        if key not in self._runners:
            runner = Runner(
                self.module,
                run=self._layers,
                loss_fn=self._loss,
                scale=self.optimizer.scale if trains else lambda loss: loss,
                stage=self.stage_id,
                num_stages=self.num_stages,
                num_micro=key[0],
                device=self.device,
                group=self.grid.get_pipe_parallel_group(),
            )
            self._runners[key] = shapes, runner
        return self._runners[key][1]

    def _layers(self, inputs: Any) -> Any:
        with self._autocast():
            return self.module(inputs)

    def _loss(self, outputs: Any, labels: Any) -> Tensor:
        loss_fn = self.module.loss_fn
        loss: Any = outputs if loss_fn is None else loss_fn(outputs, labels)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise (ValueError if isinstance(loss, Tensor) else TypeError)(
                f"expected a tensor of one element as the loss from {'loss_fn' if loss_fn else 'the last layer'}, got "
                f"{got}; give the loss alone, as a mean, and keep what else is wanted elsewhere"
            )
        return loss.reshape(())

    def _train_alone(self, micro: list[MicroBatch]) -> Tensor:
        losses = []
        for inputs, labels in micro:
            loss = self._loss(self._layers(inputs), labels)
            self.optimizer.backward(loss / len(micro))
            losses.append(loss.detach().float())
        return torch.stack(losses).mean()

    def _loss_of_all(self, loss: Tensor | None) -> Tensor:
        """Return the mean over the last stages of all pipelines, on every rank."""
        mean = torch.zeros((), dtype=torch.float32, device=self.device) if loss is None else loss / self.dp_world_size
        self._everyone.sum(mean, "the sum of losses")
        return mean

    # ---- not supported ---------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse, because train_batch() runs forward, backward and step.

        Raises:
            PipelineError: Always.
        """
        raise PipelineError(
            "a pipeline runs forward, backward and step of its micro-batches in turn; call train_batch()"
        )

    backward = step = no_sync = forward

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse, because a rank has only its stage's weights.

        Raises:
            PipelineError: Always.
        """
        raise PipelineError(
            "a rank has the weights of its stage alone; call save_checkpoint(), and `python -m pyzero export FOLDER "
            "model.safetensors` on what it wrote"
        )

    save_fp16_model = save_16bit_model


def _as_tuple(part: Any) -> Any:
    """Turn a list into a tuple. Return others unchanged.

    torch's loaders make lists of tuples, but layers expect tuples.
    """
    return tuple(part) if type(part) is list else part


def _shapes(inputs: Any) -> list[tuple[Any, ...]]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors.find(inputs)]


def _where(codes: list[float], code: float) -> list[int]:
    return [rank for rank, found in enumerate(codes) if found == code]

"""deepspeed.checkpointing: torch's activation checkpointing, and random number streams like Megatron's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint as torch_checkpoint

from pyzero.deepspeed import launcher
from pyzero.deepspeed.parallel import groups

_PARTS = "model-parallel-rng"
_PARTS_OFFSET = 2718  # the same as in Megatron


def configure(*args: Any, **kwargs: Any) -> None:
    """Do nothing, because activations are neither partitioned nor moved."""


def is_configured() -> bool:
    """Return True."""
    return True


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Do nothing, because activations are not partitioned."""


def set_num_layers(nlayers: int) -> None:
    """Do nothing, because there are no buffers for activations."""


def reset() -> None:
    """Do nothing, because there are no buffers for activations."""


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args), and compute it again in backward, by torch.utils.checkpoint(use_reentrant=False).

    Streams of fork() give the same random numbers again.
    """
    # Without streams no context_fn is passed, because torch.compile takes none.
    options: dict[str, Any] = {"context_fn": _tracker.replay} if _tracker.states_ else {}
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, **options)


non_reentrant_checkpoint = checkpoint


class CudaRNGStatesTracker:
    """Named random number streams beside the device's own; on a machine without a GPU, the CPU's."""

    def __init__(self) -> None:
        self.states_: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Delete all streams."""
        self.states_ = {}

    def get_states(self) -> dict[str, Tensor]:
        """Return the state of each stream."""
        return dict(self.states_)

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Replace the states of all streams."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Add a stream that starts from a seed.

        Raises:
            ValueError: There is a stream of this name.
        """
        if name in self.states_:
            raise ValueError(f"got the stream {name!r} a second time, wanted another name; call reset() first")
        before = _state()
        _seed(seed)
        self.states_[name] = _state()
        _set_state(before)

    @contextmanager
    def fork(self, name: str = _PARTS) -> Iterator[None]:
        """A context that draws random numbers from this stream. The device's own stream continues after it.

        Raises:
            ValueError: There is no stream of this name.
        """
        if name not in self.states_:
            raise ValueError(
                f"expected a stream that was added, got {name!r}; call model_parallel_cuda_manual_seed(seed)"
            )
        before = _state()
        _set_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = _state()
            _set_state(before)

    def replay(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a checkpoint's first and second forward; the second starts from the present states."""
        states = self.get_states()

        @contextmanager
        def again() -> Iterator[None]:
            later = self.get_states()
            self.set_states(states)
            try:
                yield
            finally:
                self.set_states(later)

        return nullcontext(), again()


_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """Return the tracker of this process."""
    return _tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the device alike on the ranks that split a layer, and the stream of fork() differently on each.

    As in Megatron, random numbers for whole tensors are drawn outside fork(), and those for split tensors inside.
    """
    _tracker.reset()
    _seed(seed)
    _tracker.add(_PARTS, seed + _PARTS_OFFSET + groups.get_model_parallel_rank())


model_parallel_reconfigure_tp_seed = model_parallel_cuda_manual_seed


def _on_gpu() -> bool:
    return launcher.device().type == "cuda"


def _state() -> Tensor:
    return torch.cuda.get_rng_state() if _on_gpu() else torch.get_rng_state()


def _set_state(state: Tensor) -> None:
    (torch.cuda.set_rng_state if _on_gpu() else torch.set_rng_state)(state)


def _seed(seed: int) -> None:
    (torch.cuda.manual_seed if _on_gpu() else torch.manual_seed)(seed)

"""deepspeed.checkpointing: activation checkpoints, which are torch's, and streams of random numbers as Megatron has."""

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
_PARTS_OFFSET = 2718  # Megatron's


def configure(*args: Any, **kwargs: Any) -> None:
    """Nothing: activations are neither partitioned nor moved."""


def is_configured() -> bool:
    """True."""
    return True


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Nothing: activations stay where they are."""


def set_num_layers(nlayers: int) -> None:
    """Nothing: there are no buffers."""


def reset() -> None:
    """Nothing: there are no buffers."""


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), computed again in backward: torch.utils.checkpoint without a reentrant backward.

    What fork() draws in it is drawn again.
    """
    options: dict[str, Any] = {"context_fn": _tracker.replay} if _tracker.states_ else {}  # torch.compile takes none
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, **options)


non_reentrant_checkpoint = checkpoint


class CudaRNGStatesTracker:
    """Named streams of random numbers beside the device's own; of the CPU where there is no GPU."""

    def __init__(self) -> None:
        self.states_: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget all streams."""
        self.states_ = {}

    def get_states(self) -> dict[str, Tensor]:
        """Where each stream is."""
        return dict(self.states_)

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Put each stream where it was."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """A stream from a seed.

        Raises:
            ValueError: There is one of that name.
        """
        if name in self.states_:
            raise ValueError(f"got the stream {name!r} a second time, wanted another name; call reset() first")
        before = _state()
        _seed(seed)
        self.states_[name] = _state()
        _set_state(before)

    @contextmanager
    def fork(self, name: str = _PARTS) -> Iterator[None]:
        """Random numbers in here are that stream's, and the device's own go on after it.

        Raises:
            ValueError: There is none of that name.
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
        """Contexts of a checkpoint's forward, and of its second one, in which streams are where they are now."""
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
    """The one of this process."""
    return _tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the device alike on the ranks that split a layer, and the stream of fork() for each of them another.

    As Megatron: what is whole is drawn outside fork(), what is split inside.
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

"""What the command line asked for, and what a bench has to say beside its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pyzero.ops import registry

_NUMEL = {"cpu": (16_000_000, 50_000_000), "cuda": (1 << 26, 1 << 28)}  # of the ops' tensors: quick, full
# What a library raises that does not build, load, fit or agree here: reason enough to leave it out, not to stop.
_PEER_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, AssertionError)


@dataclass(frozen=True)
class Options:
    """One run's."""

    device: str = "cpu"
    quick: bool = False
    numel: int | None = None  # overrides each bench's size (tests)
    ranks: int = 2
    peers: frozenset[str] | None = None  # by key of peers.PEERS; None: all that are there
    notes: list[str] = field(default_factory=list)  # what was left out, and why

    @property
    def size(self) -> int:
        """Elements of an op's tensors."""
        quick, full = _NUMEL[self.device]
        return self.numel or (quick if self.quick else full)

    @property
    def backends(self) -> dict[str, str]:
        """Of the ops: what to add to a contender's name -> backend. On a GPU the one that auto takes, and Triton."""
        found = {"": "auto"}
        if self.device == "cuda" and all(_is_there(name) for name in ("cuda", "triton")):
            found[", triton"] = "triton"
        return found

    @property
    def repeats(self) -> int:
        return 3 if self.numel else 11 if self.quick else 31

    def wants(self, peer: str | None) -> bool:
        """Whether to time what is measured beside ours; None is ours."""
        return peer is None or self.peers is None or peer in self.peers

    @contextmanager
    def trying(self, label: str) -> Iterator[None]:
        """A peer that cannot run, or does not agree, is told of and left out."""
        try:
            yield
        except _PEER_ERRORS as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            self.notes.append(f"{label}: not timed, {type(error).__name__}: {reason[:200]}")


def _is_there(backend: str) -> bool:
    return registry.BACKENDS[backend].unavailable_reason("cuda") is None

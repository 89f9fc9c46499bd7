"""The options of the command line, and a bench's notes beside its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pyzero.ops import registry

_NUMEL = {"cpu": (16_000_000, 50_000_000), "cuda": (1 << 26, 1 << 28)}  # elements of the ops' tensors: quick, full
# Whatever a library raises that does not build, load, fit or agree here: it is left out, and the run goes on.
_PEER_ERRORS = (Exception, SystemExit)


@dataclass(frozen=True)
class Options:
    """The options of one run."""

    device: str = "cpu"
    quick: bool = False
    numel: int | None = None  # overrides each bench's size (tests)
    ranks: int = 2
    peers: frozenset[str] | None = None  # keys of peers.PEERS; None: all that are installed
    notes: list[str] = field(default_factory=list)  # which contenders were left out, and why

    @property
    def size(self) -> int:
        """Elements of an op's tensors."""
        quick, full = _NUMEL[self.device]
        return self.numel or (quick if self.quick else full)

    @property
    def backends(self) -> dict[str, str]:
        """The suffix of a contender's name -> the ops' backend. On a GPU: the one that auto takes, and Triton."""
        found = {"": "auto"}
        if self.device == "cuda" and all(_is_there(name) for name in ("cuda", "triton")):
            found[", triton"] = "triton"
        return found

    @property
    def repeats(self) -> int:
        return 3 if self.numel else 11 if self.quick else 31

    def wants(self, peer: str | None) -> bool:
        """Whether to time this peer. None is ours."""
        return peer is None or self.peers is None or peer in self.peers

    @contextmanager
    def trying(self, label: str) -> Iterator[None]:
        """If a peer cannot run or does not agree, note it and leave the peer out."""
        try:
            yield
        except _PEER_ERRORS as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            self.notes.append(f"{label}: not timed, {type(error).__name__}: {reason[:200]}")


def _is_there(backend: str) -> bool:
    return registry.BACKENDS[backend].unavailable_reason("cuda") is None

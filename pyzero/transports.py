"""Which transport a group of ranks uses, by name or by what its ranks share."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from pyzero.comm import CollectiveTransport, ExactTransport, Group, Transport
from pyzero.host import HostError
from pyzero.hosts import HostsTransport
from pyzero.peer import PeerTransport

log = logging.getLogger("pyzero")


def _through_memory(group: Group) -> Transport:
    group.share_memory()
    return PeerTransport(group) if len(group.hosts) == 1 else HostsTransport(group)


_TRANSPORTS: dict[str, Callable[[Group], Transport]] = {
    "exact": ExactTransport,
    "collective": CollectiveTransport,
    "peer": _through_memory,
}


def make_transport(name: str, group: Group, device: torch.device) -> Transport:
    """The transport of that name; "auto" is peer on CPUs of which some share a host, and exact elsewhere. Collective.

    Raises:
        ValueError: There is none of that name.
        HostError: "peer", and the ranks cannot share memory.
    """
    if name != "auto" and name not in _TRANSPORTS:
        raise ValueError(
            f"expected transport to be one of auto, {', '.join(_TRANSPORTS)}, got {name!r}; choose one of these"
        )
    if group.size == 1 or name not in ("auto", "peer"):
        return _TRANSPORTS["exact" if name in ("auto", "peer") else name](group)
    try:
        if device.type != "cpu":
            raise HostError(f"the parameters lie on {device}")
        return _through_memory(group)
    except HostError as error:
        if name == "peer":
            raise HostError(
                f"expected CPUs that share memory for transport='peer', got none: {error}; pass "
                f"transport='auto', which takes 'exact' here"
            ) from error
        log.info("the exact transport is used, for memory is not shared: %s", error)
        return ExactTransport(group)

"""Choose the transport of a group of ranks, by name or by the memory that the ranks share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch

from pyzero.comm.group import Group
from pyzero.comm.multi_host_transport import MultiHostTransport
from pyzero.comm.shared_memory import HostError
from pyzero.comm.shared_memory_transport import SharedMemoryTransport
from pyzero.comm.symmetric_memory_transport import SymmetricMemoryTransport
from pyzero.comm.transport import CollectiveTransport, ExactTransport, Transport

log = logging.getLogger("pyzero")


def _through_memory(group: Group, device: torch.device) -> Transport:
    if device.type == "cuda":
        return SymmetricMemoryTransport(group, device)
    if device.type != "cpu":
        raise HostError(f"the parameters lie on {device}")
    group.share_memory()
    _warn_of_threads(group)
    return SharedMemoryTransport(group) if len(group.hosts) == 1 else MultiHostTransport(group)


def _warn_of_threads(group: Group) -> None:
    """Warn once per host if its ranks have more threads than it has CPUs, because they wait for each other."""
    num_ranks = next(len(ranks) for ranks in group.hosts if group.rank in ranks)
    num_threads, num_cpus = torch.get_num_threads(), os.cpu_count() or 1
    is_first = any(ranks[0] == group.rank for ranks in group.hosts)
    if is_first and num_threads > 1 and num_ranks * num_threads > num_cpus:
        log.warning(
            "%d ranks of %d threads each share the %d CPUs of this host, and wait for threads that do not run; set "
            "OMP_NUM_THREADS=%d before they start",
            num_ranks,
            num_threads,
            num_cpus,
            max(num_cpus // num_ranks, 1),
        )


_BY_COLLECTIVES: dict[str, Callable[[Group], Transport]] = {
    "exact": ExactTransport,
    "collective": CollectiveTransport,
}
_NAMES = ("auto", *_BY_COLLECTIVES, "peer")


def check_transport(name: str) -> None:
    """Raise ValueError if there is no transport of that name."""
    if name not in _NAMES:
        raise ValueError(f"expected transport to be one of {', '.join(_NAMES)}, got {name!r}; choose one of these")


def make_transport(name: str, group: Group, device: torch.device) -> Transport:
    """Make the transport of that name. Collective. "auto" is "peer" if CPU ranks share a host, "exact" otherwise.

    On GPUs you must ask for "peer": it has run with two ranks on one GPU, but not over NVLink yet.

    Raises:
        ValueError: There is no transport of that name.
        HostError: The name is "peer", but the ranks cannot share memory.
    """
    check_transport(name)
    if group.size == 1 or name in _BY_COLLECTIVES:
        return _BY_COLLECTIVES.get(name, ExactTransport)(group)
    try:
        if name == "auto" and device.type != "cpu":
            raise HostError(f"the parameters lie on {device}; transport='peer' asks for memory of GPUs")
        return _through_memory(group, device)
    except HostError as error:
        if name == "peer":
            raise HostError(
                f"expected ranks that share memory for transport='peer', got none: {error}; pass "
                f"transport='auto', which takes 'exact' here"
            ) from error
        log.info("the exact transport is used, for memory is not shared: %s", error)
        return ExactTransport(group)

"""Finds tensors over the memory of parameters, such as `.data`, detach() and state_dict() give. They do not move along.

Memory does not know its tensors, so the search looks at all living objects. It runs only if a storage's use count shows
more tensors than the parameters. It misses tensors that no Python object holds, such as an autograd graph's.
"""

from __future__ import annotations

import gc
import logging
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pyzero.arguments.params import shared_memory_error
from pyzero.sharding import modules
from pyzero.sharding.local_param import LocalParam, is_dtensor
from pyzero.sharding.spans import extent, share_elements

log = logging.getLogger("pyzero")

_Pairs = list[tuple[Tensor, Tensor]]
_MOST_NAMED = 3
_count: Any = getattr(torch._C, "_storage_Use_Count", None)  # torch's own name, which a build may lack


def refuse_aliases(params: Sequence[Tensor], warns: bool) -> None:
    """Check for aliases before parameters move into buckets for the first time.

    warns: Warn of other aliases, such as the tensors of a state dict that somebody keeps.

    Raises:
        ValueError: A buffer or another parameter of the parameters' modules lies in the memory of a parameter.
    """
    found = _find_lasting(params)
    names = _names_by_module(found)
    labels = _labels(params, names)
    for param, alias in found:
        if id(alias) in names:
            raise shared_memory_error(labels[id(param)], names[id(alias)])
    if warns:
        _warn(found, labels)


def tell_of_aliases(params: Sequence[Tensor]) -> None:
    """Warn of aliases before parameters move from buckets to others."""
    found = _find_lasting(params)
    _warn(found, _labels(params, _names_by_module(found)))


def _names_by_module(found: _Pairs) -> dict[int, str]:
    """Return the names of all parameters and buffers, by id, of the modules that hold parameters with aliases."""
    roots = modules.find_roots({param for param, _ in found}) if found else []
    return {id(tensor): name for root in roots for name, tensor in modules.named_tensors(root).items()}


def _labels(params: Sequence[Tensor], names: dict[int, str]) -> dict[int, str]:
    return {id(param): names.get(id(param), f"parameter {number}") for number, param in enumerate(params)}


def _warn(found: _Pairs, labels: dict[int, str]) -> None:
    if not found:
        return
    told = list(dict.fromkeys(labels[id(param)] for param, _ in found))
    log.warning(
        "the memory of %s%s is that of other tensors too (.data, detach() and state_dict() make such, as do "
        "nn.Parameter(tensor), from_pretrained(tensor) and load_state_dict(assign=True)), which keep the present "
        "values, for the optimizer moves the parameters: make them afterwards, copy them (.clone()), or del them where "
        "nobody reads them again, as a loop's variable",
        ", ".join(told[:_MOST_NAMED]),
        f" and {len(told) - _MOST_NAMED} more" if len(told) > _MOST_NAMED else "",
    )


def _find_lasting(params: Sequence[Tensor]) -> _Pairs:
    """Return what `_find` finds, without garbage, tensors of ended collectives, and those that are replaced anyway.

    A module replaces the last kind before it reads them.
    """
    if not _find(params):
        return []
    gc.collect()
    found = _find(params)
    replaced = modules.replaced_in_forward() if found else set()
    return [(param, alias) for param, alias in found if id(alias) not in replaced]


def _find(params: Sequence[Tensor]) -> _Pairs:
    """Return (parameter, tensor that shares an element). Skip DTensors, because fully_shard holds their memory."""
    by_storage: dict[int, list[Tensor]] = {}
    for param in params:
        if _count is not None and param.numel() and not isinstance(param, LocalParam):
            by_storage.setdefault(param.untyped_storage()._cdata, []).append(param)
    shared = {storage: own for storage, own in by_storage.items() if _count(storage) > len(own)}
    if not shared:
        return []
    ours = {id(param) for own in shared.values() for param in own}
    found = []
    with torch._C.DisableTorchFunctionSubclass():
        spans_in = {storage: _Spans(own) for storage, own in shared.items()}
        for tensor in modules.living(Tensor):
            spans = None if id(tensor) in ours else spans_in.get(_storage_of(tensor))
            if spans is not None and tensor.numel():
                found += [(param, tensor) for param in spans.reached_by(tensor) if share_elements(param, tensor)]
    return found


class _Spans:
    """The spans of memory of the parameters in one storage, sorted, because there may be many."""

    def __init__(self, params: list[Tensor]) -> None:
        self._params = sorted(params, key=Tensor.data_ptr)
        spans = [_span(param) for param in self._params]
        self._begins = [begin for begin, _ in spans]
        self._reach = list(accumulate((end for _, end in spans), max))  # the last end so far, because spans may overlap

    def reached_by(self, tensor: Tensor) -> list[Tensor]:
        """Return the parameters whose span overlaps with this tensor's."""
        begin, end = _span(tensor)
        return [
            param
            for param in self._params[bisect_right(self._reach, begin) : bisect_left(self._begins, end)]
            if _span(param)[1] > begin
        ]


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return (begin, end), addresses in bytes. The tensor must not be empty."""
    begin = tensor.data_ptr()
    return begin, begin + extent(tensor) * tensor.element_size()


def _storage_of(tensor: Tensor) -> int:
    """Return a number for the tensor's storage; 0 for DTensors, sparse tensors and others without a storage."""
    try:
        return 0 if is_dtensor(tensor) else tensor.untyped_storage()._cdata
    except Exception:  # any error: the tensor may be of any subclass
        return 0

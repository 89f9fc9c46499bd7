"""Tensors over the memory of parameters, as `.data`, detach() and state_dict() give them: they stay when those move.

They are searched for among all living objects, as memory does not know its tensors; but only where their number tells
that there are more than the parameters. Those that nothing in Python holds, as an autograd graph's, are not found.
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
    """Called before parameters move into buckets for the first time.

    warns: Of tensors that are not the modules', such as those of a state dict that somebody keeps.

    Raises:
        ValueError: A buffer, or another parameter of the modules that hold these, lies in the memory of one.
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
    """Called before parameters move from buckets to others: warn of tensors that stay."""
    found = _find_lasting(params)
    _warn(found, _labels(params, _names_by_module(found)))


def _names_by_module(found: _Pairs) -> dict[int, str]:
    """By id: of all parameters and buffers of the modules that hold parameters with aliases."""
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
    """`_find`, without what goes by itself: garbage, and what a collective that has ended has not let go of yet.

    Nor what a module replaces before it reads it.
    """
    if not _find(params):
        return []
    gc.collect()
    found = _find(params)
    replaced = modules.replaced_in_forward() if found else set()
    return [(param, alias) for param, alias in found if id(alias) not in replaced]


def _find(params: Sequence[Tensor]) -> _Pairs:
    """(parameter, another tensor with an element in one place); not of DTensors, whose memory fully_shard holds."""
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
    """The spans of memory of parameters in one storage, which may be many."""

    def __init__(self, params: list[Tensor]) -> None:
        self._params = sorted(params, key=Tensor.data_ptr)
        spans = [_span(param) for param in self._params]
        self._begins = [begin for begin, _ in spans]
        self._reach = list(accumulate((end for _, end in spans), max))  # the last end up to here: spans may overlap

    def reached_by(self, tensor: Tensor) -> list[Tensor]:
        """The parameters whose span overlaps with this tensor's."""
        begin, end = _span(tensor)
        return [
            param
            for param in self._params[bisect_right(self._reach, begin) : bisect_left(self._begins, end)]
            if _span(param)[1] > begin
        ]


def _span(tensor: Tensor) -> tuple[int, int]:
    """(begin, end) in bytes of memory; not of an empty one."""
    begin = tensor.data_ptr()
    return begin, begin + extent(tensor) * tensor.element_size()


def _storage_of(tensor: Tensor) -> int:
    """Where torch has its storage; 0 of a DTensor, and of what has none, as sparse ones and those of a transform."""
    try:
        return 0 if is_dtensor(tensor) else tensor.untyped_storage()._cdata
    except Exception:  # of any kind: a stranger's class may answer as it likes
        return 0

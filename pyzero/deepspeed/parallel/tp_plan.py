"""The plan that says how layers are split over tensor-parallel ranks: the caller's, the config's or the model's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pyzero.deepspeed.config.tensor_parallel_section import PartitionSection, TensorParallelSection

# transformers' names of torch.distributed.tensor.parallel's styles, by the dimension of the weight that is split.
_ROWS = ("colwise", "colwise_rep", "colwise_gather_output", "embedding_rowwise")  # dimension 0
_COLUMNS = ("rowwise", "rowwise_rep", "rowwise_split_input", "embedding_colwise")  # dimension 1
_GRADS = "replicated_with_grad_allreduce"
_WHOLE = "replicate"
STYLES = (*_ROWS, *_COLUMNS, _GRADS, _WHOLE)

_STYLE_OF_SPEC = {"column": "colwise", "row": "rowwise", "skip": _WHOLE}


@dataclass(frozen=True)
class Cut:
    """A layer and its style: one of STYLES, or torch's ParallelStyle."""

    name: str
    module: nn.Module
    style: Any

    @property
    def dim(self) -> int | None:
        """The dimension of the weight that is split; None if it stays whole, or the style is torch's."""
        if not isinstance(self.style, str):
            return None
        return 0 if self.style in _ROWS else 1 if self.style in _COLUMNS else None


def plan_of(model: nn.Module, section: TensorParallelSection, given: Mapping[str, Any] | None) -> list[Cut]:
    """Return the layers to split, by the given plan, else the config's partition_config, else the model's own plan.

    If layers share a weight, they are split only if all are split in the same way. Otherwise all stay whole.

    Raises:
        ValueError: There is no plan, none of its layers is in the model, or a style is not one of STYLES.
    """
    if given is not None:
        cuts = _matched(model, ((_as_pattern(name), style) for name, style in given.items()))
        _check_all_used(model, given)
    elif section.partition_config is not None:
        cuts = _cuts_of_specs(model, section.partition_config, section.preset_model is not None)
    else:
        cuts = _cuts_of_model(model)
    cuts = [cut for cut in cuts if cut.style != _WHOLE]
    for cut in cuts:
        if isinstance(cut.style, str) and cut.style not in STYLES:
            raise ValueError(
                f"expected a style of {', '.join(STYLES)}, got {cut.style!r} for {cut.name}; pass "
                f"initialize(tp_plan=) without it, whose values may also be torch's ParallelStyle"
            )
    if not cuts:
        raise ValueError(
            f"expected a plan of how to split {type(model).__name__}, got none from the model, as transformers' "
            f"base_model_tp_plan is one; pass initialize(tp_plan={{'layers.*.up': 'colwise', 'layers.*.down': "
            f"'rowwise'}}), or set tensor_parallel.partition_config"
        )
    return _without_half_tied(model, cuts)


def check_sizes(model: nn.Module, cuts: list[Cut], size: int) -> None:
    """Check that this number of ranks divides the layers evenly.

    Raises:
        ValueError: The ranks do not divide a layer, or the heads of attention.
        TypeError: torch cannot split a layer.
    """
    for cut in cuts:
        if cut.dim is not None and not isinstance(cut.module, (nn.Linear, nn.Embedding)):
            raise TypeError(
                f"expected nn.Linear or nn.Embedding to split, got {type(cut.module).__name__} at {cut.name}; pass "
                f"initialize(tp_plan=) without it"
            )
        width = {"colwise": "out_features", "rowwise": "in_features"}.get(str(cut.style))
        found = getattr(cut.module, width, size) if width else size
        if found % size:
            raise ValueError(
                f"expected {width} of {cut.name} that {size} tensor-parallel ranks divide, got {found}; change "
                f"tensor_parallel.autotp_size"
            )
    for owner in _with_plans(model):
        config: Any = getattr(owner, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        sizes = {heads: getattr(config, heads, None) for heads in ("num_attention_heads", "num_key_value_heads")}
        for heads, found in sizes.items():
            if isinstance(found, int) and found % size:
                raise ValueError(
                    f"expected {heads} that {size} tensor-parallel ranks divide, got {found} of "
                    f"{type(owner).__name__}; change tensor_parallel.autotp_size"
                )
        _check_no_weights_of_heads(model, cuts, {*sizes.values()})


def _check_no_weights_of_heads(model: nn.Module, cuts: list[Cut], sizes: set[int | None]) -> None:
    """Refuse a layer with a row of weights for each head beside split projections.

    Cohere's use_qk_norm has such norms.
    """
    cut = {cut.module for cut in cuts}
    for name, attention in model.named_modules():
        beside = dict(attention.named_children())
        if cut.isdisjoint(beside.values()):
            continue
        for key, child in beside.items():
            own = child._parameters.items() if child not in cut and not isinstance(child, nn.Linear) else ()
            for of, weight in own:
                if weight is not None and weight.dim() > 1 and weight.shape[0] in sizes:
                    raise ValueError(
                        f"expected layers whose weights all heads share beside those that are split, got "
                        f"{name}.{key}.{of} of shape {tuple(weight.shape)}, which has a row for each head; leave "
                        f"{name} whole, by initialize(tp_plan=) of others, as {{'model.layers.*.mlp.up_proj': "
                        f"'colwise', ...}}"
                    )


def _matched(model: nn.Module, rules: Any) -> list[Cut]:
    """Return the layers that a rule matches. The first matching rule counts."""
    known = list(rules)
    found = []
    for name, module in model.named_modules():
        style = next((style for pattern, style in known if pattern(name)), None)
        if style is not None:
            found.append(Cut(name, module, style))
    return found


def _as_pattern(name: str) -> Callable[[str], Any]:
    """Compile a dotted name, in which * stands for one part."""
    return re.compile(re.escape(name).replace(r"\*", r"[^.]+")).fullmatch


def _check_all_used(model: nn.Module, given: Mapping[str, Any]) -> None:
    names = [name for name, _ in model.named_modules()]
    for name in given:
        if not any(map(_as_pattern(name), names)):
            raise ValueError(f"got {name!r} in tp_plan, which is no module of the model; see model.named_modules()")


def _cuts_of_specs(model: nn.Module, partition: PartitionSection, has_preset: bool) -> list[Cut]:
    """Return the layers that DeepSpeed's specs match. Their patterns are of parameter names."""
    kind = str(getattr(getattr(model, "config", None), "model_type", "")).lower()
    rules = []
    for spec in partition.layer_specs:
        style = _STYLE_OF_SPEC[spec.partition_type]
        style = "colwise_gather_output" if spec.gather_output and style == "colwise" else style
        if spec.model_types is None or kind in [name.lower() for name in spec.model_types]:
            rules += [(_weight_pattern(pattern), style) for pattern in spec.patterns]
    cuts = _matched(model, rules)
    cuts = [cut for cut in cuts if isinstance(getattr(cut.module, "weight", None), Tensor)]
    own = _cuts_of_model(model) if has_preset and partition.use_default_specs else []
    return [*cuts, *(cut for cut in own if cut.name not in {other.name for other in cuts})]


def _weight_pattern(pattern: str) -> Callable[[str], Any]:
    compiled = re.compile(pattern)
    return lambda name: compiled.match(f"{name}.weight")


def _cuts_of_model(model: nn.Module) -> list[Cut]:
    """Return the layers of transformers' plan of the model or, if it has none, of the models in it."""
    names = {module: name for name, module in model.named_modules()}
    found = []
    for owner in _with_plans(model):
        prefix = f"{names[owner]}." if names[owner] else ""
        plan = [(_as_pattern(f"{prefix}{name}"), style) for name, style in _plan_in(owner).items()]
        found += _matched(model, plan)
        _check_experts(owner)
    return found


def _check_experts(owner: nn.Module) -> None:
    """Refuse a plan that names stacked weights of experts, because these are not layers."""
    params = dict(owner.named_parameters())
    for name, style in _plan_in(owner).items():
        experts = next(filter(_as_pattern(name), params), None)
        if experts is not None and style != _WHOLE:
            raise ValueError(
                f"expected layers to split, got the stacked weights {experts} ({style}) in the plan of "
                f"{type(owner).__name__}: experts are not split here; pass initialize(tp_plan=) of its other layers"
            )


def _plan_in(module: nn.Module) -> dict[str, str]:
    plan = getattr(module, "tp_plan", None) or getattr(module, "_tp_plan", None)
    return plan if isinstance(plan, dict) else {}


def _with_plans(model: nn.Module) -> Iterator[Any]:
    """Yield the outermost modules that have a plan. A plan also covers the modules below."""
    if _plan_in(model):
        yield model
    else:
        for child in model.children():
            yield from _with_plans(child)


def _without_half_tied(model: nn.Module, cuts: list[Cut]) -> list[Cut]:
    """Drop layers that share a weight unless all of these are split in the same way."""
    of_module = {cut.module: cut for cut in cuts}
    whole: set[nn.Module] = set()
    for sharing in shared_by(model).values():
        dims = {None if of_module.get(module) is None else of_module[module].dim for module, _ in sharing}
        if dims == {None} or len(dims) > 1:
            whole.update(module for module, _ in sharing)
    return [cut for cut in cuts if cut.module not in whole]


def shared_by(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    """Return, for each parameter with several places, those places."""
    places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                places.setdefault(param, []).append((module, name))
    return {param: found for param, found in places.items() if len(found) > 1}

"""Ops of test_state_machine.py's programs on gradients: all kinds of backward, reads, clips, edits, zero_grad."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import torch
from program_model import LARGEST, ROUNDING, Config, Grad, Model, coefficient, unit_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyzero.optimizer import ZeroOptimizer


class Broken(Exception):
    """Raised in a backward."""


class _Break(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise Broken


def loss_of(params: list[nn.Parameter], grads: dict[int, Tensor], others: set[int], how: str) -> Any:
    """A loss whose gradients are `grads`, and 1 for parameters in `others`."""

    def term(index: int, grad: Tensor) -> Tensor:
        param = params[index]
        if how == "tied":
            return (param.float() * (grad / 2)).sum() + (grad / 2 * param.float()).sum()
        if how == "create_graph":  # a gradient with a graph of its own
            return (param.float() * grad).sum() + (0.0 * param.float().square()).sum()
        found = (param.float() * (grad / 2 if how == "hook" else grad)).sum()
        if how == "broken" and index == min(grads):  # backward reaches last what was made first
            found = _Break.apply(found)  # type: ignore[no-untyped-call]
        return found

    def checkpointed(index: int, grad: Tensor) -> Tensor:
        dummy = torch.zeros((), requires_grad=True)
        found: Tensor = checkpoint(lambda x: term(index, grad) + x, dummy, use_reentrant=True)
        return found

    terms = [(checkpointed if how == "reentrant" else term)(index, grad) for index, grad in grads.items()]
    terms += [params[index].float().sum() for index in sorted(others)]
    return sum(terms)


class GradOps:
    """A mixin of program_run.Run."""

    config: Config
    model: Model
    params: list[nn.Parameter]
    module: nn.ParameterList
    optimizer: ZeroOptimizer
    rank: int
    quiet: bool

    def compare_grad(self, index: int) -> Tensor | None:
        """See program_run.Run."""
        raise NotImplementedError

    def compare_norm(self, name: str, got: Any, wanted: tuple[float, float], unit: float = 0.0) -> None:
        """See program_run.Run."""
        raise NotImplementedError

    def gradients(self, number: int, mask: int, rank: int, bad: tuple[int, str] | None) -> dict[int, Tensor]:
        found = {i: coefficient(self.config, i, number, rank) for i in sorted(self.model.used(mask))}
        victim = next((grad for grad in found.values() if grad.numel()), None)
        if victim is not None and bad is not None and bad[0] % self.config.num_parts == rank:
            victim.view(-1)[-1] = float(bad[1])
        return found

    def too_large(self, index: int, more: float) -> bool:
        largest = more * self.model.scale * self.config.largest_sum
        return self.config.dtype(index) == torch.float16 and largest > LARGEST

    def do_backward(
        self,
        number: int,
        scaled: bool,
        sync: bool,
        masks: tuple[int, ...],
        bad: tuple[int, str] | None,
        how: str = "usual",
    ) -> None:
        by_rank, times = self.gradients_by_rank(number, masks, bad), 2 if how == "twice" else 1
        if self.are_too_large(by_rank, times):
            return
        mine = by_rank[self.rank % self.config.num_parts]
        hooks = [self.params[i].register_hook(lambda grad: grad * 2) for i in mine] if how == "hook" else []
        others = self.model.used(63) - mine.keys() if how == "inputs" else set()
        loss = loss_of(self.params, mine, others, how)
        for left in reversed(range(times)):
            self.begin_backward(by_rank, scaled, sync)
            if mine:
                with contextlib.nullcontext() if sync else self.optimizer.no_sync():
                    self.run_backward(loss, [self.params[i] for i in mine], scaled, how, retain_graph=left > 0)
            self.count_backward(by_rank, sync)
        for hook in hooks:
            hook.remove()

    def run_backward(self, loss: Any, inputs: list[Tensor], scaled: bool, how: str, retain_graph: bool) -> None:
        """Call backward in the way that `how` names."""
        options: dict[str, Any] = {"retain_graph": True} if retain_graph else {}
        if how == "autograd.grad":
            torch.autograd.grad(loss, inputs, retain_graph=True)
        if how == "inputs":
            options["inputs"] = inputs
        if how == "create_graph":
            options["create_graph"] = True
        if how == "scale" and scaled:
            self.optimizer.scale(loss).backward(**options)
        elif scaled:
            self.optimizer.backward(loss, **options)
        else:
            loss.backward(**options)

    def gradients_by_rank(
        self, number: int, masks: tuple[int, ...], bad: tuple[int, str] | None
    ) -> list[dict[int, Tensor]]:
        return [self.gradients(number, masks[rank], rank, bad) for rank in range(self.config.num_parts)]

    def are_too_large(self, by_rank: list[dict[int, Tensor]], times: int) -> bool:
        used = set().union(*by_rank)
        return any(self.too_large(i, self.model.grads[i].bound + 12 * times * unit_of(i)) for i in used)

    def begin_backward(self, by_rank: list[dict[int, Tensor]], scaled: bool, sync: bool) -> None:
        """Note in the model what may be refused."""
        self.model.kinds.add("scaled" if scaled else "plain")
        self.model.by_itself &= self.model.is_round(sync) and not set().union(*by_rank) & self.model.idle

    def count_backward(self, by_rank: list[dict[int, Tensor]], sync: bool) -> None:
        """Add the gradients to the model."""
        model, used = self.model, set().union(*by_rank)
        is_round = model.is_round(sync)
        for index in sorted(used):
            grads = [grads[index].double() for grads in by_rank if index in grads]
            model.add(index, torch.stack(grads).sum(0) / self.config.num_parts)
        model.local |= used
        everywhere = set.intersection(*map(set, by_rank))
        if not is_round and not model.alone:
            model.carried |= everywhere
            model.norms_apart |= model.has_norms and not all(by_rank)
        if is_round:
            model.reduce()
            model.carried |= everywhere - model.new

    def do_read(self, what: str, index: int) -> None:
        if self.quiet:
            return
        optimizer, model, param = self.optimizer, self.model, self.params[index]
        if what == "clip":
            norm = optimizer.clip_grad_norm_(1e9)
            model.clipped = model.alone
            self.compare_norm("clip_grad_norm_(1e9)", norm, model.norm(model.added))
            model.order_matters |= not math.isfinite(model.norm(model.added)[0])  # then torch's factor is 0 or NaN
            model.clip(model.added, 1e9)
        elif what == "full_grad":
            self.compare_grad(index)
        elif what == "grad_norm":
            last, got = model.last_norm, optimizer.grad_norm
            assert (last is None) == (got is None)
            if last is not None and model.is_norm_known:
                self.compare_norm("grad_norm", got, last)
        elif what == "state_dict":
            optimizer.state_dict()
        elif what == "full_state_dict":
            optimizer.full_state_dict(to=0)
            model.join()
        elif what == "model":
            copy.deepcopy(self.module).load_state_dict(self.module.state_dict())
        elif what == "full_master":
            got, wanted = optimizer.full_master(param), model.slots[index].master
            assert torch.equal(got, wanted), f"full_master of parameter {index}: got\n{got}\nnot\n{wanted}"
        elif what in ("norm", "isfinite"):
            self.read_grad(what, index)
        if what in ("clip", "full_grad"):
            model.reduce()

    def read_grad(self, what: str, index: int) -> None:
        """Read `.grad` itself, if every rank has one."""
        model, param = self.model, self.params[index]
        if model.alone and (self.config.loss_scale is not None or model.clipped):
            return  # `.grad` includes the loss scale, and lacks the clip factor
        known = model.grads[index].value is not None
        if not (known if model.alone else index in model.carried & model.placed) or model.norms_apart:
            return
        assert param.grad is not None, f"`.grad` of parameter {index} is None after a round"
        if what == "norm":
            unit = ROUNDING[param.dtype]
            self.compare_norm(f"`.grad`.norm() of parameter {index}", param.grad.norm(), model.norm([index]), unit)
            model.reduce()
            model.has_norms = True
        elif model.alone or index not in model.local:
            got, value = bool(torch.isfinite(param.grad).all()), model.grads[index].value
            wanted = value is None or bool(value.isfinite().all())
            assert got == wanted, f"`.grad` of parameter {index}: isfinite().all() is {got}"
            model.has_norms = True

    def do_clip(self, max_norm: float, norm_type: float) -> None:
        model = self.model
        wanted = model.norm(model.added, norm_type)
        got = self.optimizer.clip_grad_norm_(max_norm, norm_type)
        self.compare_norm(f"clip_grad_norm_({max_norm}, {norm_type})", got, wanted)
        model.clip(model.added, max_norm, norm_type)
        model.clipped, model.before_clip = model.alone, True
        model.reduce()

    def do_torch_clip(self, max_norm: float, foreach: bool | None, mask: int) -> None:
        """torch's clip of parameters with a `.grad` on all ranks. torch omits the others."""
        model = self.model
        known = {i for i, g in enumerate(model.grads) if g.value is not None}
        held = known if model.alone else model.carried & model.placed
        indices = [index for index in model.chosen(mask) if index in held]
        if not indices or model.norms_apart:
            return
        unit = max(ROUNDING[self.config.dtype(index)] for index in indices)
        wanted, after_clip = model.norm(indices), model.clipped
        if model.alone:
            model.edit(indices)
        got = nn.utils.clip_grad_norm_([self.params[index] for index in indices], max_norm, foreach=foreach)
        if not (model.alone and after_clip):
            self.compare_norm(f"torch's clip_grad_norm_({max_norm}) of {indices}", got, wanted, unit)
        model.clip(indices, max_norm, unit=unit)
        model.reduce()
        model.has_norms = True

    def do_assign(self, how: str, number: int, index: int) -> None:
        model, config = self.model, self.config
        model.edit([index])
        model.kinds.add("plain")
        values = [coefficient(config, index, number, rank) for rank in range(self.config.num_parts)]
        value = values[self.rank % self.config.num_parts].to(config.dtype(index))
        if how == "strided":
            value = value.mT.contiguous().mT if value.dim() == 2 else torch.stack([value, value], -1)[..., 0]
        self.params[index].grad = value
        edited, model.by_itself = model.half_edited - {index}, False
        model.put(index, torch.stack(values).double().mean(0))
        model.kinds.add("plain")
        model.half_edited = edited
        model.local.add(index)  # not in `carried`: a plain tensor has a norm of its own

    def do_set_full_grad(self, number: int, index: int) -> None:
        model = self.model
        value = coefficient(self.config, index, number, 0)
        model.edit([index] if model.alone else [])
        if self.too_large(index, 12 * unit_of(index)):
            return
        self.optimizer.set_full_grad(self.params[index], value)
        model.reduce()
        model.put(index, value.double())
        model.kinds.add("plain" if not model.kinds else "set")
        if model.clipped:
            model.grads[index].round(2 * ROUNDING[self.config.dtype(index)])
        if not model.alone:
            model.reduced.add(index)
            model.carried.add(index)

    def do_multiply(self, how: str, factor: float, mask: int) -> None:
        model, params = self.model, self.params
        indices = model.chosen(mask)
        if any(self.too_large(index, model.grads[index].bound * abs(factor)) for index in indices):
            return
        indices = [index for index in indices if model.grads[index].value is not None]
        model.edit(indices)
        held = [index for index in indices if params[index].grad is not None]
        if how == "foreach" and held:
            torch._foreach_mul_([params[index].grad for index in held], factor)
        for index in held:
            if how == "mul_":
                params[index].grad.mul_(factor)
            elif how == "div_":
                params[index].grad.div_(1 / factor)
            elif how == "*=":
                params[index].grad *= factor
        for index in indices:
            model.scale_by(index, factor, 0.0)

    def do_zero(self, mask: int) -> None:
        """Zero `.grad` of some parameters in place."""
        model = self.model
        indices = [index for index in model.chosen(mask) if model.grads[index].value is not None]
        model.edit(indices)
        for index in indices:
            grad, value = self.params[index].grad, model.grads[index].value
            if grad is not None:
                grad.zero_()
            assert value is not None
            model.grads[index] = Grad(torch.zeros_like(value))

    def do_broken(self, number: int, who: int, by: str, masks: tuple[int, ...]) -> None:
        """A backward that fails halfway, on one rank or on all. The loop then drops the gradients and goes on."""
        mine = self.gradients(number, masks[0], self.rank, None)
        if len(mine) < 2 or max(mine) not in self.model.placed:
            return  # before its first gradient, a rank does not know that the others send theirs
        scaled = self.config.loss_scale is not None
        self.begin_backward([mine], scaled, sync=True)
        fails = who == 3 or who % self.config.size == self.rank
        loss = loss_of(self.params, mine, set(), "broken" if fails else "usual")
        try:
            self.run_backward(loss, [], scaled, "usual", retain_graph=False)
        except Broken:
            pass
        self.do_zero_grad(by, True)

    def do_zero_grad(self, by: str, set_to_none: bool) -> None:
        model = self.model
        whole = by == "optimizer" or set_to_none
        if not whole:
            model.edit(index for index in model.added if model.grads[index].value is not None)
        (self.optimizer if by == "optimizer" else self.module).zero_grad(set_to_none)
        half, places = set(model.half_edited), (set(model.reduced), set(model.local), set(model.carried))
        for index in model.added:
            value = model.grads[index].value
            model.put(index, None if set_to_none or value is None else torch.zeros_like(value))
        if whole:
            model.forget()
        if not set_to_none:
            model.reduced, model.local, model.carried = places
            model.half_edited = set() if whole else half

    def do_drop(self, index: int) -> None:
        self.params[index].grad = None
        self.model.put(index, None)

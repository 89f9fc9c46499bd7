"""Parameters that are none of ours: frozen ones of other dtypes are left alone, FSDP's parts are refused by name."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyzero

FROZEN = (torch.uint8, torch.int64, torch.float64, torch.bool)


class Quantised(nn.Module):
    """One weight to train beside frozen ones of many dtypes."""

    def __init__(self, fill: int) -> None:
        super().__init__()
        self.frozen = nn.ParameterList(
            nn.Parameter(torch.full((3,), fill).to(dtype), requires_grad=False) for dtype in FROZEN
        )
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return (self.weight * self.frozen[0]).sum()


def train(group: Any, stage: int) -> tuple[list[Tensor], Tensor]:
    rank = group.rank()
    model = Quantised(1 - rank)  # rank 0's are everyone's
    optimizer = pyzero.FusedZeroAdam(model.parameters(), lr=0.25, eps=0.0, process_group=group, stage=stage)
    model().backward()
    optimizer.step()
    assert optimizer.full_state(model.frozen[0]) == {}
    optimizer.load_state_dict(optimizer.state_dict())
    return [param.detach() for param in model.frozen], model.weight.detach()


@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_frozen_parameters_of_other_dtypes_are_left_alone(ranks, size, stage):
    for frozen, weight in ranks.run(size, train, stage):
        assert [param.dtype for param in frozen] == list(FROZEN)
        assert all(param.tolist() == [1, 1, 1] for param in frozen)
        torch.testing.assert_close(weight, torch.full((3,), 0.75), rtol=0, atol=2.0**-24)


class Subclass(Tensor):
    """A tensor without memory of its own, as quantised weights of torchao are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


def test_frozen_ones_without_memory_of_their_own_share_none():
    frozen = [nn.Parameter(Subclass(torch.ones(3)), requires_grad=False) for _ in range(2)]
    pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3)), *frozen])


class OnGraph(nn.Module):
    """A frozen sparse parameter and a sparse buffer, a graph's edges, beside a trained weight and a frozen one."""

    def __init__(self, fill: float, to_sparse: Any) -> None:
        super().__init__()
        edges = to_sparse(fill * torch.eye(3))
        self.edges = nn.Parameter(edges, requires_grad=False)
        self.register_buffer("more_edges", edges)
        self.frozen = nn.Parameter(torch.full((3,), fill), requires_grad=False)
        self.weight = nn.Parameter(torch.ones(3, 1))


def train_on_graph(group: Any, stage: int, layout: str) -> tuple[list[Tensor], list[Tensor]]:
    model = OnGraph(1.0 + group.rank(), getattr(Tensor, layout))
    optimizer = pyzero.FusedZeroAdam(model.parameters(), lr=0.25, eps=0.0, process_group=group, stage=stage)
    (model.edges @ model.weight).sum().backward()
    optimizer.step()
    sparse, dense = [model.edges, model.more_edges], [model.frozen, model.weight]
    return [tensor.detach().to_dense() for tensor in sparse], [tensor.detach() for tensor in dense]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_frozen_sparse_parameters_are_left_alone(ranks, size, stage, layout):
    for rank, (sparse, dense) in enumerate(ranks.run(size, train_on_graph, stage, layout)):
        assert all(torch.equal(edges, (1 + rank) * torch.eye(3)) for edges in sparse)
        torch.testing.assert_close(dense, [torch.ones(3), torch.full((3, 1), 0.75)], rtol=0, atol=2.0**-24)


def train_beside_a_quantized_buffer(group: Any) -> Tensor:
    model = nn.Linear(3, 3)
    model.register_buffer("table", torch.quantize_per_tensor(torch.ones(3), 0.5 + group.rank(), 0, torch.qint8))
    optimizer = pyzero.FusedZeroAdam(model.parameters(), process_group=group)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model.weight.detach()


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_quantized_buffers_are_left_alone(ranks):
    first, second = ranks.run(2, train_beside_a_quantized_buffer)
    assert torch.equal(first, second)


def test_a_sparse_one_that_is_unfrozen_is_refused():
    edges, weight = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([weight, edges])
    edges.requires_grad_(True)
    with pytest.raises(TypeError, match="expected dense parameters, got parameter 1 in layout sparse_coo"):
        optimizer.step()


def test_a_trained_one_is_refused_at_once_and_when_it_is_unfrozen():
    double = nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="parameter 0 of the group in float64; convert it, freeze it"):
        pyzero.FusedZeroAdam([double])
    double.requires_grad_(False)
    weight = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([weight, double])
    double.requires_grad_(True)
    (weight.sum() + double.sum()).backward()
    with pytest.raises(TypeError, match="in float64; convert it, freeze it"):
        optimizer.step()


def over_fsdp(group: Any, use_orig_params: bool, reduce_grads: bool) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        nn.Linear(4, 4), process_group=group, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    try:
        pyzero.FusedZeroAdam(model.parameters(), process_group=group, reduce_grads=reduce_grads)
    except TypeError as error:
        return str(error)
    return "accepted"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduce_grads", [False, True])
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_parts_of_fsdp_are_refused_by_name(ranks, use_orig_params, reduce_grads):
    for message in ranks.run(2, over_fsdp, use_orig_params, reduce_grads):
        assert "of FullyShardedDataParallel; pass torch.optim.AdamW(fused=True) those" in message

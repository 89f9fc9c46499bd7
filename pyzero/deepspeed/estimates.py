"""deepspeed.runtime.zero's estimates of memory, computed for FusedZeroAdam on each rank."""

from __future__ import annotations

import torch
from torch import nn

from pyzero.estimate import estimate_numel
from pyzero.sharding.blocks import blocks_of

_GIB = 2**30


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """Return (bytes on a host, bytes on a GPU) in stage 2, for 16-bit weights, without activations.

    Args:
        total_params: Number of the model's parameters.
        num_gpus_per_node: GPUs on each host.
        num_nodes: Number of hosts.
        cpu_offload: Keep masters and moments on the host.
        additional_buffer_factor: Ignored, because buffers are counted.
    """
    num_ranks = num_gpus_per_node * num_nodes
    found = estimate_numel(total_params, torch.float16, num_ranks, 2, None, cpu_offload=cpu_offload, on_gpu=True)
    return found.host * num_gpus_per_node, found.peak


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = False,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """Return (bytes on a host, bytes on a GPU, bytes of the largest layer) in stage 3, without activations.

    Args:
        total_params: Number of the model's parameters.
        largest_layer_params: Number of parameters that fully_shard gathers at once.
        num_gpus_per_node: GPUs on each host.
        num_nodes: Number of hosts.
        cpu_offload: Keep masters and moments on the host.
        cpu_offload_params: Ignored; weights are counted on the GPU.
        zero_init: Ignored; memory while the model is built is not counted.
        additional_buffer_factor: Ignored, because buffers are counted.
    """
    found = estimate_numel(
        total_params,
        torch.float16,
        num_gpus_per_node * num_nodes,
        3,
        None,
        num_blocks=max(total_params // max(largest_layer_params, 1), 1),
        cpu_offload=cpu_offload,
        on_gpu=True,
    )
    return found.host * num_gpus_per_node, found.peak, torch.float16.itemsize * largest_layer_params


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the memory that each host and GPU needs in stage 2, with and without offload."""
    lines = _heading(total_params, num_gpus_per_node, num_nodes)
    for offload in (True, False):
        host, gpu = estimate_zero2_model_states_mem_needs(total_params, num_gpus_per_node, num_nodes, offload)
        lines.append(_row(host, gpu, offload))
    print("\n".join(lines))


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the memory that each host and GPU needs in stage 2 for this model, with and without offload."""
    estimate_zero2_model_states_mem_needs_all_cold(_num_params(model), num_gpus_per_node, num_nodes)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the memory that each host and GPU needs in stage 3, with and without offload."""
    lines = _heading(total_params, num_gpus_per_node, num_nodes, largest_layer_params)
    for offload in (True, False):
        host, gpu, _ = estimate_zero3_model_states_mem_needs(
            total_params, largest_layer_params, num_gpus_per_node, num_nodes, offload
        )
        lines.append(_row(host, gpu, offload))
    print("\n".join(lines))


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the memory that each host and GPU needs in stage 3 for this model, with and without offload."""
    total = _num_params(model)
    largest = max((_num_params(block) for block in blocks_of(model)), default=total)
    estimate_zero3_model_states_mem_needs_all_cold(total, largest, num_gpus_per_node, num_nodes)


def _num_params(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _heading(total_params: int, num_gpus: int, num_nodes: int, largest: int | None = None) -> list[str]:
    layer = "" if largest is None else f", {largest / 1e6:,.0f}M in the largest block"
    return [
        "Estimated memory needed for params, optim states and gradients, by pyzero, for a:",
        f"HW: Setup with {num_nodes} node(s), {num_gpus} GPU(s) per node.",
        f"SW: Model with {total_params / 1e6:,.0f}M total params{layer}.",
        "  per CPU  |  per GPU |   Options",
    ]


def _row(host: int, gpu: int, offload: bool) -> str:
    return f"{host / _GIB:9.2f}GB |{gpu / _GIB:7.2f}GB | offload_optimizer={'cpu' if offload else 'none'}"

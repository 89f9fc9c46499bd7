"""deepspeed.pipe: DeepSpeed's interface to pipeline parallelism, on torch.distributed.pipelining."""

from __future__ import annotations

from pyzero.deepspeed.pipe.layers import LayerSpec, TiedLayerSpec
from pyzero.deepspeed.pipe.module import PipelineModule
from pyzero.deepspeed.pipe.topology import (
    PipeDataParallelTopology,
    PipelineParallelGrid,
    PipeModelDataParallelTopology,
    ProcessTopology,
)

__all__ = [
    "LayerSpec",
    "PipeDataParallelTopology",
    "PipeModelDataParallelTopology",
    "PipelineModule",
    "PipelineParallelGrid",
    "ProcessTopology",
    "TiedLayerSpec",
]

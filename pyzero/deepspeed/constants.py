"""deepspeed.constants: the port that scripts write into MASTER_PORT."""

from __future__ import annotations

TORCH_DISTRIBUTED_DEFAULT_PORT = 29500  # torchrun's default too

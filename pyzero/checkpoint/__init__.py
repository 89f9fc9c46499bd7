"""Checkpoints: saved by any number of ranks, loaded by any other; DeepSpeed's folders in, safetensors files out."""

import pyzero

__getattr__ = pyzero.lazy_getattr(
    __name__, "CheckpointError", "async_save_checkpoint", "latest_checkpoint", "load_checkpoint", "save_checkpoint"
)

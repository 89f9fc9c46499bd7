"""DeepSpeed's optimizers by name, for scripts that build one and pass it to initialize()."""

from pyzero.deepspeed.ops import adam, lamb, lion, op_builder

__all__ = ["adam", "lamb", "lion", "op_builder"]

"""Checkpoints: saved by any number of ranks, loaded by any other; DeepSpeed's folders in, safetensors files out."""

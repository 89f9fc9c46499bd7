"""DeepSpeed's names, for its scripts: `import pyzero.deepspeed as deepspeed`."""

from pyzero.deepspeed.initialize import initialize

__all__ = ["initialize"]

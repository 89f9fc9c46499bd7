"""The figures of an estimate, and their table."""

from __future__ import annotations

from dataclasses import dataclass

_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Estimate:
    """Bytes on each rank."""

    weights: int  # in the dtype of the model
    state: int  # masters (fp32 weights have no extra ones), moments, step counts
    gradients: int  # held from the end of backward to zero_grad()
    shared: int  # held for gradients and weights that ranks exchange, if they share memory
    buckets: int  # needed in addition at the worst moment: gradients being sent, and in stage 3 whole blocks
    num_params: int
    host: int = 0  # masters and moments in host memory, with cpu_offload
    kept: int = 0  # of `gradients`, pages that a process on CPUs keeps for the next step's

    @property
    def idle(self) -> int:
        """Bytes of tensors after step() and zero_grad(). A process on CPUs also holds `kept`."""
        return self.weights + self.state + self.shared

    @property
    def peak(self) -> int:
        """The most bytes at any moment of backward and step."""
        return self.idle + self.gradients + self.buckets


def table(found: Estimate, where: str = "") -> str:
    """Format the estimate as a table. where: Added to the head, as in "on GPUs"."""
    rows = {
        "weights": found.weights,
        "masters and moments": found.state,
        "memory shared with other ranks": found.shared,
        "after step and zero_grad": found.idle,
        "gradients, after backward": found.gradients,
        "buckets or blocks on their way, at most": found.buckets,
        "peak, without activations": found.peak,
        "masters and moments on the host": found.host,
        "kept for the next step's gradients": found.kept,
    }
    lines = [f"{' '.join(['bytes per rank', where]).strip():<40}{'MiB':>12}{'per parameter':>16}"]
    for name, num_bytes in rows.items():
        gib = f"{num_bytes / 1024 / _MEBIBYTE:>12,.1f} GiB" if name.startswith("peak") else ""
        lines.append(f"{name:<40}{num_bytes / _MEBIBYTE:>12,.1f}{num_bytes / max(found.num_params, 1):>14.2f} B{gib}")
    return "\n".join(lines)

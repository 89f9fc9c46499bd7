"""Stream handles, as launches take them."""

import torch


def current_stream(device: torch.device) -> int:
    """Return the handle of torch's current stream on a GPU. The device must have an index.

    Triton calls it too. torch.cuda.current_stream() makes an object and takes ten times as long.
    """
    return torch._C._cuda_getCurrentRawStream(device.index)

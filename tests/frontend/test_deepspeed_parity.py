"""What scripts were seen to do under DeepSpeed 0.19, and not here: each does the same now."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyzero

CONFIG = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "Adam", "params": {"lr": 0.01}}}
BF16 = {**CONFIG, "bf16": {"enabled": True}}


class Rotary(nn.Module):
    """A layer behind frequencies, which are not to be rounded: at place 1000 an angle would be off by radians."""

    def __init__(self, casts: bool = True) -> None:
        super().__init__()
        self.casts = casts
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("frequencies", 1.0 / torch.arange(1.0, 5.0) ** 0.7)
        self.register_buffer("phases", torch.polar(torch.ones(2), torch.arange(2.0)))

    def forward(self, inputs: Tensor) -> Tensor:
        turned = inputs * torch.cos(1000 * self.frequencies)
        return self.norm(self.layer(turned.to(inputs.dtype) if self.casts else turned))


def dtypes_of_buffers(group: Any, stage: int, data_types: dict[str, str], path: str) -> dict[str, torch.dtype]:
    model = Rotary()
    exact = model.frequencies.clone()
    engine, *_ = pyzero.initialize(
        model=model, config={**BF16, "zero_optimization": {"stage": stage}, "data_types": data_types}
    )
    engine.backward(engine(torch.randn(2, 4)).float().sum())
    engine.step()
    assert torch.equal(model.frequencies.float(), exact.to(model.frequencies.dtype).float())
    engine.save_16bit_model(path)
    if engine.rank == 0:
        saved = torch.load(f"{path}/pytorch_model.bin")
        assert saved["layer.weight"].dtype == torch.bfloat16
        assert all(saved[name].dtype == buffer.dtype for name, buffer in model.named_buffers())
    return {name: buffer.dtype for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_buffers_stay_in_fp32_beside_16_bit_weights(ranks, tmp_path, stage, dtype):
    data_types = {} if dtype is None else {"buffer_dtype": dtype}
    size = 4 if stage == 3 else 1
    run = ranks.run(size, dtypes_of_buffers, stage, data_types, str(tmp_path)) if size > 1 else None
    found = run[0] if run else dtypes_of_buffers(None, stage, data_types, str(tmp_path))
    assert found == {
        "frequencies": torch.float32 if dtype is None else torch.bfloat16,
        "phases": torch.complex64,
        "norm.running_mean": torch.bfloat16,  # torch takes them in the dtype of BatchNorm's weights alone
        "norm.running_var": torch.bfloat16,
        "norm.num_batches_tracked": torch.int64,
    }


def test_a_buffer_that_widens_activations_is_an_error_with_the_remedy():
    engine, *_ = pyzero.initialize(model=Rotary(casts=False), config=BF16)
    with pytest.raises(RuntimeError, match="buffers as frequencies stay .* set data_types.buffer_dtype"):
        engine(torch.ones(2, 4))
    narrow = {**BF16, "data_types": {"buffer_dtype": "bf16", "keep_in_fp32_modules": "auto"}}
    engine, *_ = pyzero.initialize(model=Rotary(casts=False), config=narrow)
    assert engine(torch.ones(2, 4)).dtype == torch.bfloat16

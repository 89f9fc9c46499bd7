"""safetensors files that the safetensors package and transformers load."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyzero.checkpoint.export import export_safetensors
from pyzero.estimate import DTYPES


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(3, 5, generator=generator).half(),
        "odd": torch.randn(7, generator=generator),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "part": torch.randn(10, generator=generator)[3:8:2],
        "scalar": torch.tensor(3.25, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "numbers": torch.tensor([-(2**40), 7]),
        "brain": torch.randn(9, generator=generator).bfloat16(),
        "grad": torch.nn.Parameter(torch.ones(2)),
        "naïve": torch.ones(1),
    }


def test_what_the_package_reads_is_what_was_given(tmp_path: Path):
    given, path = tensors(), tmp_path / "model.safetensors"
    export_safetensors(given, path)
    read = load_file(path)
    assert read.keys() == given.keys()
    for name, tensor in given.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_the_file_that_the_package_writes(tmp_path: Path):
    given = {name: tensor.detach().contiguous() for name, tensor in tensors().items() if name != "naïve"}
    export_safetensors(given, tmp_path / "ours")
    save_file(given, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_floating_point_is_converted(tmp_path: Path, dtype: torch.dtype):
    export_safetensors(tensors(), tmp_path / "model.safetensors", dtype)
    for name, read in load_file(tmp_path / "model.safetensors").items():
        given = tensors()[name]
        wanted = given.to(dtype) if given.is_floating_point() else given
        assert read.dtype == wanted.dtype and torch.equal(read, wanted), name


def test_inf_and_nan_stay_and_too_large_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    bad = torch.tensor([float("inf"), float("nan"), -float("inf"), 65504.0])
    export_safetensors({"w": bad}, path, torch.float16)
    before = path.read_bytes()
    assert torch.equal(load_file(path)["w"].float().nan_to_num(1.0), bad.nan_to_num(1.0))
    for large in ([65520.0], [float("inf"), 65520.0]):
        with pytest.raises(ValueError, match=r"expected values that torch.float16 holds, got larger ones in w;"):
            export_safetensors({"w": torch.tensor(large)}, path, torch.float16)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.tensor([1e300], dtype=torch.float64), torch.float32),
        (torch.tensor([3.4e38]), torch.bfloat16),
        (torch.tensor([1e5]), torch.float8_e5m2),
        (torch.tensor([1e38]).bfloat16(), torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_what_no_dtype_holds_is_refused(tmp_path: Path, value: Tensor, dtype: torch.dtype):
    with pytest.raises(ValueError, match=f"expected values that {dtype} holds, .* export in {value.dtype}"):
        export_safetensors({"w": value}, tmp_path / "model.safetensors", dtype)
    export_safetensors({"w": torch.ones_like(value)}, tmp_path / "model.safetensors", dtype)
    assert load_file(tmp_path / "model.safetensors")["w"].float().item() == 1.0


def test_what_a_killed_export_has_left_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        child = os.fork()
        if not child:
            export_safetensors(tensors(), path)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL and not path.exists()
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(os, "getpid", lambda: child)  # as in a container, where each run may have the same
    export_safetensors(tensors(), path)
    assert load_file(path).keys() == tensors().keys() and {*tmp_path.iterdir()} == {left, path}


def test_tied_tensors_are_stored_once(tmp_path: Path):
    weight = torch.randn(4, 4)
    given = {"a": weight, "b": weight, "c": weight.t(), "d": weight.clone(), "e": weight[:2]}
    export_safetensors(given, tmp_path / "found")
    assert sorted(load_file(tmp_path / "found")) == ["a", "c", "d", "e"]
    export_safetensors(given, tmp_path / "told", tied={"a": "b", "d": "b"})
    assert sorted(load_file(tmp_path / "told")) == ["b", "c", "e"]


def test_tensors_are_loaded_when_their_turn_comes(tmp_path: Path):
    given = {name: tensor.detach() for name, tensor in tensors().items()}
    loaded = []

    def load(name: str) -> Tensor:
        loaded.append(name)
        return given[name]

    shapes = {name: tensor.to("meta") for name, tensor in given.items()}
    export_safetensors(shapes, tmp_path / "lazy", torch.bfloat16, load=load)
    export_safetensors(given, tmp_path / "whole", torch.bfloat16)
    assert sorted(loaded) == sorted(given)
    assert (tmp_path / "lazy").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_tensor_that_is_loaded_otherwise_is_refused(tmp_path: Path):
    shapes = {"w": torch.empty(3, device="meta")}
    with pytest.raises(ValueError, match=r"expected w of shape \(3,\) in torch.float32, got \(4,\) in torch.float32"):
        export_safetensors(shapes, tmp_path / "model.safetensors", load=lambda name: torch.zeros(4))
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    r"got w in torch.complex64": ({"w": torch.zeros(2, dtype=torch.complex64)}, {}),
    r"got a tensor named __metadata__": ({"__metadata__": torch.zeros(2)}, {}),
    r"got \{'w': 'v'\}; correct tied": ({"w": torch.zeros(2)}, {"tied": {"w": "v"}}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_written_is_refused(tmp_path: Path, message: str):
    given, options = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        export_safetensors(given, tmp_path / "model.safetensors", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_loads_it(tmp_path: Path, dtype: torch.dtype):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config: Any = GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).to(dtype).eval()
    export_safetensors(model.state_dict(), tmp_path / "model.safetensors", dtype)
    config.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    tokens = torch.arange(12).reshape(2, 6)
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_permissions_are_those_of_any_new_file(tmp_path: Path):
    export_safetensors({"w": torch.ones(1)}, tmp_path / "ours")
    (tmp_path / "other").touch()
    assert os.stat(tmp_path / "ours").st_mode == os.stat(tmp_path / "other").st_mode


@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
def test_a_checkpoint_is_exported(tmp_path, capsys, dtype):
    """Masters as fp32; else the weights, which are what the masters round to."""
    import pyzero
    from pyzero.__main__ import main

    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)}).bfloat16()
    model["head"].weight = model["embed"].weight
    model.register_buffer("count", torch.tensor(3))
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    model["head"](model["embed"](torch.arange(5))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    pyzero.save_checkpoint(tmp_path / "saved", model=model, optimizer=optimizer, step=1)
    path = tmp_path / "model.safetensors"
    assert main(["export", str(tmp_path / "saved"), str(path), *(["--dtype", dtype] if dtype else [])]) == 0
    assert capsys.readouterr().out == f"{path}: 2 tensors of step 1\n"
    found = load_file(path)
    master = optimizer.full_master(model["embed"].weight)
    weight = found.pop("embed.weight")
    assert torch.equal(weight, master if dtype == "fp32" else master.bfloat16())
    assert found.keys() == {"count"} and int(found["count"]) == 3


def test_views_of_one_memory_are_tensors_of_their_own(tmp_path):
    """A frozen matrix and its transpose, a buffer and its head, begin at one address."""
    import pyzero
    from pyzero.checkpoint.convert import export, fp32_state_dict

    model: Any = nn.Linear(4, 3)
    model.table = nn.Parameter(torch.arange(16.0).reshape(4, 4), requires_grad=False)
    model.turned = nn.Parameter(model.table.data.T, requires_grad=False)
    model.register_buffer("ramp", torch.arange(6.0))
    model.register_buffer("head", model.ramp[:3])
    optimizer = pyzero.FusedZeroAdamW([model.weight, model.bias])
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=0)
    export(tmp_path, tmp_path / "model.safetensors")
    for found in (load_file(tmp_path / "model.safetensors"), fp32_state_dict(tmp_path)):
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_export_says_what_is_missing(tmp_path, capsys):
    from pyzero.__main__ import main

    assert main(["export", str(tmp_path), str(tmp_path / "file.safetensors")]) == 1
    assert "expected a checkpoint in" in capsys.readouterr().err
    for name, wanted in (("out.pt", "out"), ("out", "out"), ("out-3.1", "out-3.1")):
        assert main(["export", str(tmp_path), str(tmp_path / name)]) == 1
        assert f"got {tmp_path / name}; pass {tmp_path / wanted}.safetensors" in capsys.readouterr().err

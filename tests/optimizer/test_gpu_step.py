"""The step on a GPU: it waits for nothing, and can be captured in a CUDA graph."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from models import assert_same, build, loss_of, micro_batch, params_of
from torch import Tensor, nn

import pyzero

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: no GPU"),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """A host read, or anything else that waits for the device, raises in here."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def make(dtype: torch.dtype, **options: object) -> tuple[nn.Module, pyzero.FusedZeroAdamW]:
    model = build(dtype).cuda()
    return model, pyzero.FusedZeroAdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_and_step_wait_for_nothing(dtype):
    model, optimizer = make(dtype, loss_scale="dynamic")
    for step in range(4):
        loss = loss_of(model, micro_batch(step, 0).cuda())
        torch.cuda.synchronize()
        if step == 0:  # the first one builds and loads kernels, and copies the pattern of used parameters
            optimizer.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            continue
        with no_waiting():
            optimizer.backward(loss)
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(RuntimeError), no_waiting():
        torch.ones(1, device="cuda").item()


def gradients(step: int, like: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(param.shape, generator=generator).to(param) for param in like]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_step_equals_an_eager_one_with_a_changing_rate(dtype, backend):
    models, found = [], []
    for captured in (False, True):
        rate = torch.tensor(1e-2, device="cuda")
        model = build(dtype).cuda()
        params = list(model.parameters())
        optimizer = pyzero.FusedZeroAdamW(params, lr=rate, max_grad_norm=0.5, backend=backend)
        for param, grad in zip(params, gradients(0, params), strict=True):
            param.grad = grad
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()  # the same first step in both
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(1, 8):
            rate.fill_(1e-2 / step)
            new = gradients(step, params)
            if step == 4:
                new[0].view(-1)[0] = float("inf")
            torch._foreach_copy_([param.grad for param in params], new)
            graph.replay() if captured else optimizer.step()
        models.append(params_of(model))
        found.append((optimizer.skipped_steps, float(optimizer.loss_scale)))
    assert_same(*models)
    assert found[0] == found[1] and found[0][0] == 1


def scaled_run(captured: bool) -> tuple[list[Tensor], list[Tensor], float]:
    """fp16: a captured step behind eager backwards, with an eager one between for another pattern of gradients."""
    model = build(torch.float16).cuda()
    params = list(model.parameters())
    rate = torch.tensor(1e-2, device="cuda")
    scale = pyzero.LossScale(init_scale=1024.0, growth_interval=2)
    optimizer = pyzero.FusedZeroAdamW(params, lr=rate, loss_scale=scale)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(8):
            optimizer.zero_grad(set_to_none=False)
            optimizer.backward(loss_of(model, micro_batch(step, 0).cuda()))
            if step in (0, 4):
                kept = params[-2].grad
                if step == 4:
                    params[-2].grad = None  # the gain's: another pattern
                optimizer.step()
                params[-2].grad = kept
            elif captured and step == 1:
                with torch.cuda.graph(graph, stream=stream):
                    optimizer.step()
                graph.replay()
            elif captured:
                graph.replay()
            else:
                optimizer.step()
            torch.empty(4096, device="cuda").fill_(float("nan"))  # where anything was freed
    torch.cuda.synchronize()
    return params_of(model), [optimizer.full_state(param)["step"] for param in params], float(optimizer.loss_scale)


def test_a_captured_step_follows_the_loss_scale_and_outlives_other_patterns():
    for got, wanted in zip(scaled_run(True), scaled_run(False), strict=True):
        assert_same(got, wanted) if isinstance(got, list) else None
        assert isinstance(got, list) or got == wanted


def whole_run(captured: bool, dtype: torch.dtype, clips: bool) -> tuple[list[Tensor], tuple[float, int]]:
    """Iterations of forward, backward, clip and step, of which one overflows; one graph for all but the first two."""
    model = build(dtype).cuda()
    scale = pyzero.LossScale(init_scale=1024.0, growth_interval=2) if dtype == torch.float16 else None
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=torch.tensor(1e-2, device="cuda"), loss_scale=scale)
        batch, factor = micro_batch(0, 0).cuda(), torch.ones((), device="cuda")

        def iterate() -> None:
            optimizer.backward(loss_of(model, batch) * factor)
            if clips:
                optimizer.clip_grad_norm_(0.5)
            optimizer.step()

        for step in range(8):
            batch.copy_(micro_batch(step, 0).cuda())
            factor.fill_(float("inf") if step == 5 else 1.0)
            if step < 3 or not captured:
                optimizer.zero_grad()
            if step < 2 or not captured:
                iterate()
                continue
            if step == 2:
                with torch.cuda.graph(graph, stream=side):
                    iterate()
            graph.replay()
            torch.empty(4096, device="cuda").fill_(float("nan"))  # where anything was freed
    torch.cuda.synchronize()
    return params_of(model), (float(optimizer.loss_scale), optimizer.skipped_steps)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_whole_iteration_can_be_captured(dtype, clips):
    (got, after), (wanted, after_eager) = (whole_run(captured, dtype, clips) for captured in (True, False))
    assert_same(got, wanted)
    assert after == after_eager and after[1] == 1


def captured_step(optimizer: pyzero.FusedZeroAdamW) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_what_a_graph_would_replay_wrongly_is_refused(caplog):
    model, optimizer = make(torch.float32)
    params = list(model.parameters())
    for param, grad in zip(params, gradients(0, params), strict=True):
        param.grad = grad
    with pytest.raises(RuntimeError, match="got the first, which loads kernels; run one step before the capture"):
        captured_step(optimizer)
    optimizer.step()
    weights = params_of(model)
    captured_step(optimizer)
    assert "lr=0.01 is recorded in the CUDA graph as it is" in caplog.text
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-2)
    with pytest.raises(RuntimeError, match="got lr as a tensor on cpu"):
        captured_step(optimizer)
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, device="cuda")
    params[0].grad = None
    with pytest.raises(RuntimeError, match="gradients for the same parameters as in the step before the capture"):
        captured_step(optimizer)
    for param, grad in zip(params, gradients(0, params), strict=True):
        param.grad = grad
    optimizer.clip_grad_norm_(0.5)
    with pytest.raises(RuntimeError, match="got it called before the capture; call it in the capture too"):
        captured_step(optimizer)
    torch.cuda.synchronize()
    assert_same(weights, params_of(model))  # what is captured is not run
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(weights, params_of(model), strict=True))


def test_a_skip_is_told_when_it_is_known(caplog):
    model, optimizer = make(torch.float32)
    for step in range(5):
        optimizer.zero_grad()
        (loss_of(model, micro_batch(step, 0).cuda()) * (float("nan") if step < 3 else 1.0)).backward()
        optimizer.step()
        torch.cuda.synchronize()
    assert "step skipped" in caplog.text and "on rank 0" in caplog.text
    assert optimizer.skipped_steps == 3


def test_memory_comes_back():
    before = 0
    for _ in range(2):  # the first takes what stays: workspaces of cuBLAS and of the kernels
        before = torch.cuda.memory_allocated()
        model, optimizer = make(torch.bfloat16)
        loss_of(model, micro_batch(0, 0).cuda()).backward()
        optimizer.step()
        del model, optimizer
        torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before

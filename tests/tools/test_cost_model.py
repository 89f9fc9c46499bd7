"""The cost model of docs/scaling.md: by hand where that is possible, and what its tables say."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import cost_model, simulate
from benchmarks.cost_model import H100, STRATEGIES, Host

DOCS = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
EXACT, COLLECTIVE, TWO_LEVELS, DEEPSPEED, FSDP_KEPT, FSDP = STRATEGIES
PARAMS, TOKENS = 1e9, 4096


def test_a_ring_of_two_ranks_by_hand():
    """One hop of 2 us, half of 720 kB at 360 GB/s: 1 us."""
    assert cost_model.ring_s(H100, 2, 720e3) == pytest.approx(3e-6)


def test_a_byte_enters_a_host_once_in_rings_and_eight_times_in_an_all_to_all():
    size = 1e12  # latency is nothing
    assert cost_model.ring_s(H100, 1024, size) == pytest.approx(size * 1023 / 1024 / (8 * 42e9), rel=1e-3)
    assert cost_model.all_to_all_s(H100, 1024, size) == pytest.approx(size * 1016 / 1024 / 42e9, rel=1e-3)


@pytest.mark.parametrize("size", [0, 1e6, 1e9])
def test_on_one_host_two_levels_are_one(size):
    assert cost_model.two_level_s(H100, 8, size) == pytest.approx(cost_model.ring_s(H100, 8, size))
    both = [made(H100, 8, size) for made in (cost_model.two_level_all_to_all_s, cost_model.all_to_all_s)]
    assert both[0] == pytest.approx(both[1])


def test_volumes():
    assert [strategy.volume(8) for strategy in STRATEGIES] == [3.5, 3.5, 3.5, 5.25, 5.25, 7.0]


def test_what_compute_hides_costs_nothing():
    """Free links and memory: only launches are left; endless compute hides all but the last bucket and the weights."""
    free = replace(H100, inside=cost_model.Link(0, 1e30), memory_bytes_per_s=1e30, message_s=0.0, launch_s=0.0)
    assert cost_model.simulate(COLLECTIVE, free, 8, PARAMS, TOKENS).exposed_s == pytest.approx(0)
    fast = cost_model.simulate(COLLECTIVE, H100, 8, PARAMS, 1e6)
    slow = cost_model.simulate(COLLECTIVE, H100, 8, PARAMS, 1)
    assert fast.exposed_s < slow.exposed_s - 0.4 * 2 * PARAMS / 360e9 * 7 / 8


def test_larger_buckets_where_latency_counts():
    sizes = [cost_model.best_bucket(COLLECTIVE, H100, ranks, PARAMS, TOKENS)[0] for ranks in (8, 128, 2048)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_latency_is_a_part_of_the_step_and_grows():
    steps = [cost_model.simulate(EXACT, H100, ranks, PARAMS, TOKENS) for ranks in simulate.RANKS]
    latencies = [step.latency_s for step in steps]
    assert latencies == sorted(latencies) and all(step.total_s > step.compute_s for step in steps)


def test_a_host_by_hand():
    """50 MB/s: 30 bytes of 1M parameters take 0.6 s, the 27 of each of two ranks 0.54 s."""
    alphas = {(ranks, kind): 0.0 for ranks in (1, 2) for kind in ("peer", "exact")}
    host = Host({1: 1e8, 2: 1e8}, 0.5, alphas, socket_bytes_per_s=1e7)
    assert host.step_s(1, 10**6, "peer") == pytest.approx(0.6)
    assert host.step_s(2, 10**6, "peer") == pytest.approx(27e6 / 5e7)
    assert host.step_s(2, 10**6, "exact") == pytest.approx(23e6 / 5e7 + 4e6 / 1e7)


def test_the_docs_say_what_the_model_says():
    text = DOCS.read_text()
    for part in simulate.report(H100, 7e9, 8192).split("\n\n"):
        assert part in text, "run python -m benchmarks simulate, and take over its tables"


def test_the_command(tmp_path, capsys):
    assert bench.main(["simulate", "--model-params", "1e9", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "1B bf16 parameters" in text and "16,384" in text and "Assumed" in text
    assert (tmp_path / "simulation.png").stat().st_size < 100_000
    assert "not measured" in (tmp_path / "simulation.md").read_text()

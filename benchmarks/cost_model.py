"""Predicts the time of a training step on W ranks: bytes over memory and links, latency, overlap. See docs/scaling.md.

A model has N parameters, a shard n = N / W. A link takes alpha seconds per message, and has a rate in bytes per second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from pyzero.ops.rounding import ceil_div
from pyzero.sharding.layout import cap_bytes

from . import ledger

_BF16, _FP32 = 2, 4
_BLOCKS = 32  # blocks of the model; fully_shard wraps each


@dataclass(frozen=True)
class Link:
    """A link from one rank to another."""

    alpha_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Cluster:
    """Hosts of GPUs. The figures are assumed, not measured."""

    name: str
    ranks_per_host: int
    memory_bytes_per_s: float  # reached by streaming kernels
    inside: Link
    across: Link  # through the network adapter of each rank
    launch_s: float  # per kernel
    message_s: float  # for each further message that is posted at once, as in an all-to-all
    flops: float  # per second, reached by forward and backward


H100 = Cluster(
    name="8 x H100 per host, NVLink, 400 Gb/s per GPU",
    ranks_per_host=8,
    memory_bytes_per_s=3.0e12,
    inside=Link(2e-6, 360e9),
    across=Link(6e-6, 42e9),
    launch_s=5e-6,
    message_s=0.5e-6,
    flops=400e12,
)


# ---- collectives: seconds for a buffer of `num_bytes` on each rank ---------------------------------------------------


Collective = Callable[[Cluster, int, float], float]


def _hosts(cluster: Cluster, num_ranks: int) -> tuple[int, int]:
    """(ranks in a host, hosts)."""
    inside = min(num_ranks, cluster.ranks_per_host)
    return inside, ceil_div(num_ranks, inside)


def ring_s(cluster: Cluster, num_ranks: int, num_bytes: float) -> float:
    """Reduce-scatter or all-gather. One ring per network adapter runs through all ranks: a byte enters a host once."""
    inside, hosts = _hosts(cluster, num_ranks)
    latency = (num_ranks - hosts) * cluster.inside.alpha_s + (hosts - 1) * cluster.across.alpha_s
    speed = cluster.inside.bytes_per_s
    if hosts > 1:
        speed = min(speed, inside * cluster.across.bytes_per_s)
    return latency + num_bytes * (num_ranks - 1) / num_ranks / speed


def two_level_s(cluster: Cluster, num_ranks: int, num_bytes: float) -> float:
    """Rings inside each host, then rings between the ranks that hold the same part."""
    inside, hosts = _hosts(cluster, num_ranks)
    first = (inside - 1) * cluster.inside.alpha_s + num_bytes * (inside - 1) / inside / cluster.inside.bytes_per_s
    part = num_bytes / inside
    return first + (hosts - 1) * cluster.across.alpha_s + part * (hosts - 1) / hosts / cluster.across.bytes_per_s


def all_to_all_s(cluster: Cluster, num_ranks: int, num_bytes: float) -> float:
    """Each rank sends every other rank its slice. All slices for other hosts pass through the rank's own adapter."""
    inside, hosts = _hosts(cluster, num_ranks)
    latency = cluster.inside.alpha_s + (num_ranks - 1) * cluster.message_s + (hosts > 1) * cluster.across.alpha_s
    near = num_bytes * (inside - 1) / num_ranks / cluster.inside.bytes_per_s
    return latency + max(near, num_bytes * (num_ranks - inside) / num_ranks / cluster.across.bytes_per_s)


def two_level_all_to_all_s(cluster: Cluster, num_ranks: int, num_bytes: float) -> float:
    """Slices are summed inside each host, and then go all-to-all between the ranks that hold the same part."""
    inside, hosts = _hosts(cluster, num_ranks)
    first = all_to_all_s(cluster, inside, num_bytes)
    part = num_bytes / inside * (hosts - 1) / hosts / cluster.across.bytes_per_s
    return first + (cluster.across.alpha_s + (hosts - 1) * cluster.message_s + part if hosts > 1 else 0)


def quicker_s(cluster: Cluster, num_ranks: int, num_bytes: float) -> float:
    """The quicker of rings on one level and rings on two."""
    return min(made(cluster, num_ranks, num_bytes) for made in (ring_s, two_level_s))


def balanced_bytes(collective: Collective, cluster: Cluster, num_ranks: int) -> float:
    """The size of a buffer whose latency takes as long as its bytes. Latency bounds smaller buffers."""
    latency = collective(cluster, num_ranks, 0)
    return latency / (collective(cluster, num_ranks, 1e12) - latency) * 1e12


def message_s(cluster: Cluster, num_ranks: int) -> float:
    """Seconds to send a few numbers from all ranks to all, by recursive doubling."""
    inside, hosts = _hosts(cluster, num_ranks)
    return math.ceil(math.log2(inside)) * cluster.inside.alpha_s + math.ceil(math.log2(hosts)) * cluster.across.alpha_s


# ---- strategies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strategy:
    """How gradients and weights travel."""

    name: str
    grad_bytes: float  # per gradient sent in one reduction
    reduce: Collective
    gather: Collective
    passes: tuple[ledger.Pass, ...]  # kernels in backward and step
    bucket_bytes: Callable[[int], float] | None = None  # by number of ranks; None: the model's blocks are the buckets
    doubles_reduce: bool = False  # uses an all-reduce where a reduce-scatter suffices
    num_gathers: int = 1  # of all weights per step
    gathers_in_forward: bool = False  # gathers a layer while the previous one computes
    overlaps_gather: bool = True  # sends a bucket's weights while the next bucket is updated

    def volume(self, num_ranks: int) -> float:
        """Bytes that each rank sends per parameter and step."""
        share = (num_ranks - 1) / num_ranks
        return share * (self.grad_bytes * (1 + self.doubles_reduce) + _BF16 * self.num_gathers)


_FSDP_PASSES = (ledger.Pass("copies", "in and out of the flat buffers of a layer", 10), ledger.Pass("adam_", "", 0, 28))

# NCCL or gloo returns one slice that holds the sum.
_ONE_SLICE = (ledger.SHARDED[0], ledger.Pass("reduce_scatter_", "", 0, 6), ledger.SHARDED[2])


def _our_bucket_bytes(num_ranks: int) -> float:
    return cap_bytes(None, num_ranks, on_gpu=True)


STRATEGIES = (
    Strategy("pyzero, exact (all-to-all)", _BF16, all_to_all_s, ring_s, ledger.SHARDED, _our_bucket_bytes),
    Strategy("pyzero, collective (rings)", _BF16, ring_s, ring_s, _ONE_SLICE, _our_bucket_bytes),
    Strategy(
        "exact on two levels (not built)", _BF16, two_level_all_to_all_s, quicker_s, ledger.SHARDED, _our_bucket_bytes
    ),
    Strategy(
        "DeepSpeed ZeRO-2",
        _BF16,
        ring_s,
        ring_s,
        (ledger.DEEPSPEED,),
        bucket_bytes=lambda num_ranks: 1e9,
        doubles_reduce=True,
        overlaps_gather=False,
    ),
    Strategy("FSDP2, fp32 sums, weights kept", _FP32, ring_s, ring_s, _FSDP_PASSES, None, gathers_in_forward=True),
    Strategy("FSDP2, fp32 sums", _FP32, ring_s, ring_s, _FSDP_PASSES, None, num_gathers=2, gathers_in_forward=True),
)


@dataclass(frozen=True)
class Step:
    """Simulated seconds of one rank."""

    compute_s: float  # forward and backward alone
    total_s: float
    latency_s: float  # of all collectives, without their bytes

    @property
    def exposed_s(self) -> float:
        return self.total_s - self.compute_s


def simulate(strategy: Strategy, cluster: Cluster, num_ranks: int, num_params: float, tokens_per_rank: float) -> Step:
    """Buckets become ready at even intervals of backward. The link sends them in order, one at a time."""
    forward_s = 2 * num_params * tokens_per_rank / cluster.flops
    num_buckets = _BLOCKS
    if strategy.bucket_bytes is not None:
        num_buckets = max(round(_BF16 * num_params / strategy.bucket_bytes(num_ranks)), 1)
    part = num_params / num_buckets
    once = strategy.reduce(cluster, num_ranks, strategy.grad_bytes * part)
    reduce_s = cluster.launch_s + once * (1 + strategy.doubles_reduce)
    gather_s = cluster.launch_s + strategy.gather(cluster, num_ranks, _BF16 * part)
    moved = ledger.total(strategy.passes)
    update_s = cluster.launch_s + part * moved.shard / num_ranks / cluster.memory_bytes_per_s
    packing_s = moved.whole * num_params / cluster.memory_bytes_per_s  # in backward's stream

    start = _forward(strategy, forward_s, gather_s, num_buckets)
    backward_s = 2 * forward_s + packing_s
    link = start
    for index in range(num_buckets):
        ready = start + backward_s * (index + 1) / num_buckets
        if strategy.num_gathers > 1:  # weights for this layer come before its gradients
            link += gather_s
        link = max(link, ready) + reduce_s
    now = max(link, start + backward_s) + message_s(cluster, num_ranks)
    now = _update(strategy, now, update_s, gather_s, num_buckets)
    latency = num_buckets * (
        strategy.reduce(cluster, num_ranks, 0) * (1 + strategy.doubles_reduce)
        + strategy.gather(cluster, num_ranks, 0) * strategy.num_gathers
    )
    return Step(3 * forward_s, now, latency)


def _forward(strategy: Strategy, forward_s: float, gather_s: float, num_buckets: int) -> float:
    """When forward ends. Weights that are gathered in forward are gathered one layer ahead."""
    if not strategy.gathers_in_forward:
        return forward_s
    now = link = 0.0
    for _ in range(num_buckets):
        link += gather_s
        now = max(now, link) + forward_s / num_buckets
    return now


def _update(strategy: Strategy, now: float, update_s: float, gather_s: float, num_buckets: int) -> float:
    """When the step ends."""
    if strategy.gathers_in_forward:
        return now + num_buckets * update_s
    if not strategy.overlaps_gather:
        return now + num_buckets * (update_s + gather_s)
    link = now
    for _ in range(num_buckets):
        now += update_s
        link = max(link, now) + gather_s
    return link


BUCKET_MIB = (1, 4, 12.5, 25, 50, 100, 200, 400, 800)


def best_bucket(
    strategy: Strategy, cluster: Cluster, num_ranks: int, num_params: float, tokens_per_rank: float
) -> tuple[float, Step]:
    """(MiB, its step) of the smallest bucket within 0.2% of the quickest. A smaller bucket holds less memory."""

    def step(mib: float) -> Step:
        sized = replace(strategy, bucket_bytes=lambda _: mib * 2**20)
        return simulate(sized, cluster, num_ranks, num_params, tokens_per_rank)

    steps = {mib: step(mib) for mib in BUCKET_MIB}
    best = min(step.total_s for step in steps.values())
    return next((mib, step) for mib, step in steps.items() if step.total_s <= 1.002 * best)


# ---- ranks on the cores of one host, to compare with measured times -------------------------------------------------


@dataclass(frozen=True)
class Host:
    """A host, as `python -m benchmarks scaling` measures it."""

    copy_bytes_per_s: dict[int, float]  # read and written per rank, by number of ranks that copy at once
    kernel_share: float  # the share of it that the kernels of a step reach on one rank
    alpha_s: dict[tuple[int, str], float]  # of a step without bytes, by ranks and transport
    socket_bytes_per_s: float  # of all ranks' sockets together, from the run on two ranks

    def step_s(self, num_ranks: int, num_params: int, transport: str) -> float:
        """The predicted time of a step that includes the reduction."""
        moved = ledger.total(ledger.kernels(num_ranks)).at(num_ranks) * num_params
        sent = 0.0 if transport == "peer" else self.sent_bytes(num_ranks, num_params)
        if num_ranks > 1 and transport == "peer":
            moved += ledger.COPIES.at(num_ranks) * num_params
        speed = self.copy_bytes_per_s[num_ranks] * self.kernel_share
        return self.alpha_s[num_ranks, transport] + moved / speed + sent / self.socket_bytes_per_s

    def sent_bytes(self, num_ranks: int, num_params: int) -> int:
        """Bytes through the sockets of all ranks together: gradients to all, weights to all."""
        return 2 * _BF16 * num_params * (num_ranks - 1)

"""initialize(): make an engine from a DeepSpeed script's model, optimizer and config."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torch.utils.data import DataLoader, DistributedSampler

from pyzero.deepspeed import comm, launcher
from pyzero.deepspeed.config.dtype_sections import DTYPES
from pyzero.deepspeed.config.reader import load
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from pyzero.deepspeed.conversion import convert, guard
from pyzero.deepspeed.engine import param_owners
from pyzero.deepspeed.engine.engine import Engine
from pyzero.deepspeed.engine.eval_engine import EvalEngine
from pyzero.deepspeed.engine.inner_optimizer import add_names
from pyzero.deepspeed.log import remark_on, show_log
from pyzero.deepspeed.optimizers import make_optimizer
from pyzero.deepspeed.parallel import groups, tensor_parallel
from pyzero.deepspeed.parallel.mesh import Parallelism, parallelism_of
from pyzero.deepspeed.partition import Partition
from pyzero.deepspeed.pipe.engine import PipelineEngine
from pyzero.deepspeed.pipe.module import PipelineModule
from pyzero.deepspeed.stage_3.parameter_offload import ParameterOffload
from pyzero.deepspeed.utils import RepeatingLoader
from pyzero.optimizer import ZeroOptimizer


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
    mesh: Any = None,
    tp_plan: Mapping[str, Any] | None = None,
) -> tuple[Engine, ZeroOptimizer, DataLoader[Any] | None, Any]:
    """Make an engine. This is DeepSpeed's entry point, with its argument names and order.

    Joins the ranks that a launcher started (it sets RANK and WORLD_SIZE). Without a launcher it runs alone. The GPU of
    LOCAL_RANK becomes the current one.

    Args:
        args: An object with the attribute `deepspeed_config` (or its older name `deepscale_config`), a path, in place
            of `config`.
        model: Any module. With fp16 or bf16 enabled its weights are converted in place, as the same Parameter objects.
            Buffers stay as they are, except a BatchNorm's and unless data_types.buffer_dtype is set.
        optimizer: A torch Adam, AdamW, SGD or Muon, or one of pyzero.deepspeed.ops: it is replaced by pyzero's with the
            same groups and hyper-parameters, and shares `param_groups` with it. Or a function from parameters to such
            an optimizer. Or one of pyzero's, used as it is. Takes precedence over the config's `optimizer`.
        model_parameters: Parameters or groups for the config's `optimizer` or for the function; default: all of the
            model's.
        training_data: A dataset for the data loader that is returned.
        lr_scheduler: A torch scheduler, or a function from optimizer to scheduler. Takes precedence over the config's.
        distributed_port: Ignored; torchrun's port is used.
        mpu: An object as for DeepSpeed, with get_data_parallel_group(), and get_model_parallel_group() or
            get_tensor_model_parallel_group().
        dist_init_required: False if the process group exists already, or is not wanted.
        collate_fn: collate_fn of the data loader.
        config: A dict, a path or JSON text; see docs/deepspeed.md.
        mesh_param: Not supported; see mesh.
        config_params: Old name of `config`.
        mesh: A DeviceMesh of one or two dimensions. ZeRO shards over the one named dp or data, otherwise over the
            first. The model is split over the other.
        tp_plan: How to split the model for `tensor_parallel.autotp_size`: a dict from names of modules, in which *
            stands for one part, to styles. A style is transformers' name ("colwise", "rowwise") or torch's
            ParallelStyle. Default: the config's partition_config, or transformers' plan of the model.

    Returns:
        (engine, optimizer, data loader or None, scheduler or None). If neither the arguments nor the config have an
        optimizer or a scheduler, the engine's model is not trained, and the optimizer is None.

    Raises:
        ValueError: The config or an option of the optimizer is not supported, or a scheduler has no optimizer.
        TypeError: The optimizer is of another kind, or there is no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, an nn.Module, got {type(model).__name__}; pass one as model=")
    if mesh_param is not None:
        raise ValueError("got mesh_param, which is not supported; pass a DeviceMesh as mesh=")
    settings = _settings_of(args, config_params if config is None else config)
    backend = launcher.backend_to_join(from_host=settings.zero_optimization.offloads_params())
    joined = launcher.claim_early_group() or (dist_init_required is not False and launcher.join(backend))
    launcher.take_device()
    tp_size = tensor_parallel.size_for(model, settings.tensor_parallel)
    parallel = _parallelism(model, settings, mesh, mpu, tp_size)
    groups.set_current(parallel)
    _check_accumulation(model, settings, parallel)
    _check_storage(settings)
    is_pipeline = isinstance(model, PipelineModule)
    asks_to_train = optimizer, lr_scheduler, settings.optimizer, settings.scheduler
    trains = is_pipeline or any(one is not None for one in asks_to_train)
    show_log()
    remark_on(settings, trains)

    params = [_listed(item) for item in (model.parameters() if model_parameters is None else model_parameters)]
    convert(model, settings, moves=tp_size == 1)
    partition = _partition(model, optimizer, settings, parallel, tp_size, tp_plan)
    guard(model, settings)
    ours: Any = None
    schedule: Any = None
    if not trains:
        engine: Engine = EvalEngine(model, settings, parallel, made_group=joined)
    else:
        ours = make_optimizer(model, partition.moved_optimizer(), partition.replaced(params), settings, parallel)
        ours._take_names(model)
        add_names(ours)
        if settings.zero_optimization.stage == 3:
            ours.parameter_offload = ParameterOffload()
        if tp_size > 1:
            tensor_parallel.check_first_gradients(model, ours, parallel)
        schedule = _make_schedule(lr_scheduler, ours, settings)
        param_owners.register(ours)
        make: Any = PipelineEngine if is_pipeline else Engine
        engine = make(model, ours, schedule, settings, parallel, made_group=joined)
    engine.collate_fn = collate_fn
    engine.client_optimizer, engine.client_lr_scheduler = optimizer, lr_scheduler
    if not is_pipeline:
        engine.mpu = mpu
    if training_data is not None:
        _give_data(engine, training_data)
    return engine, ours, engine.training_dataloader, schedule


def _settings_of(args: Any, given: Any) -> Config:
    """Load the config, which is given or among the arguments."""
    of_args = (getattr(args, name, None) for name in ("deepspeed_config", "deepscale_config"))
    configs = [config for config in (given, next(filter(None, of_args), None)) if config is not None]
    if not configs:
        raise ValueError(
            "expected a config, got none; pass config= as a dict, a path or JSON text, or pass args= and start the "
            "script with --deepspeed_config FILE"
        )
    if len(configs) > 1:
        raise ValueError(
            f"expected one config, got config= and args.deepspeed_config={configs[1]!r}; pass config= alone, or start "
            f"the script without --deepspeed_config"
        )
    return load(configs[0])


def _listed(item: Any) -> Any:
    """Return a group with its parameters in a list, because an iterator can be read only once. Return others as is."""
    if not isinstance(item, dict) or "params" not in item or isinstance(item["params"], Tensor):
        return item
    return {**item, "params": list(item["params"])}


def _parallelism(model: nn.Module, config: Config, mesh: Any, mpu: Any, tp_size: int) -> Parallelism:
    if isinstance(model, PipelineModule):
        return _parallelism_of_pipeline(model, config, mesh, mpu, tp_size)
    return tensor_parallel.parallelism_with(tp_size, mesh, mpu) if tp_size > 1 else parallelism_of(mesh, mpu)


def _parallelism_of_pipeline(model: PipelineModule, config: Config, mesh: Any, mpu: Any, tp_size: int) -> Parallelism:
    if tp_size > 1:
        raise ValueError(
            f"got tensor_parallel.autotp_size {tp_size} with a PipelineModule, whose layers are whole; remove the key"
        )
    if mesh is not None or mpu not in (None, model.mpu()):
        raise ValueError(
            f"got {'mpu' if mesh is None else 'mesh'} with a PipelineModule, wanted neither: its topology says which "
            f"ranks see different data, and its layers are whole; leave it out, or split layers without a pipeline, by "
            f"torch's parallelize_module and initialize(mesh=)"
        )
    if config.zero_optimization.stage == 3:
        raise ValueError(
            "expected zero_optimization.stage of 0 to 2 with a PipelineModule, got 3; a stage of a pipeline has a part "
            "of the weights already: set 1"
        )
    grid = model.grid
    others = grid.get_pipe_parallel_group() if model.num_stages > 1 else None
    data = grid.get_data_parallel_group()
    return Parallelism(data, others, grid.data_parallel_id, grid.data_parallel_size, is_pipeline=True)


def _check_accumulation(model: nn.Module, config: Config, parallel: Parallelism) -> None:
    """Raise if data_types.grad_accum_dtype is wider than the weights on one rank, which adds in `.grad`, as torch."""
    wanted = config.data_types.grad_accum_dtype
    dtype = config.weights_dtype() or next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if wanted in (None, "auto") or dtype is None or parallel.data_size > 1:
        return
    if config.batches(parallel.num_batch_ranks).accumulation == 1:
        return
    if DTYPES[wanted].itemsize > dtype.itemsize:
        raise ValueError(
            f"data_types.grad_accum_dtype is {wanted}, and one rank adds micro-batches in .grad, in {dtype}; run two "
            f"ranks, which sum in fp32, take larger micro-batches, or remove the key"
        )


def _check_storage(config: Config) -> None:
    """Raise if checkpoint.use_node_local_storage is set and there are several hosts. Collective if it is set."""
    if not config.checkpoint.use_node_local_storage or comm.get_world_size() == 1:
        return
    hosts = [""] * comm.get_world_size()
    comm.all_gather_object(hosts, platform.node())
    if len(set(hosts)) > 1:
        raise ValueError(
            f"expected checkpoints in one folder that all ranks see, got checkpoint.use_node_local_storage and ranks "
            f"on {len(set(hosts))} hosts; save to a shared folder, and remove the key"
        )


def _partition(
    model: nn.Module, optimizer: Any, config: Config, parallel: Parallelism, tp_size: int, tp_plan: Any
) -> Partition:
    """Split the model's layers for tensor parallelism, and shard it in stage 3."""
    if isinstance(model, PipelineModule):
        model.broadcast_tied()
    partition = Partition(model, optimizer, config, parallel)
    if tp_size > 1:
        partition.split(tp_plan)
    if config.zero_optimization.stage == 3 and parallel.data_size > 1:
        partition.shard()
    else:
        partition.gather()
    return partition


def _make_schedule(given: Any, optimizer: ZeroOptimizer, config: Config) -> Any:
    if given is None:
        section = config.scheduler
        return None if section is None else section.make(optimizer)
    if not hasattr(given, "step"):
        return given(optimizer)
    if isinstance(given, LRScheduler):
        _mark_as_scheduled(optimizer)
    for schedule in (given, *getattr(given, "_schedulers", ())):  # the members of a chain too
        if hasattr(schedule, "optimizer"):
            schedule.optimizer = optimizer
    return given


def _mark_as_scheduled(optimizer: Optimizer) -> None:
    """Mark the optimizer's step() as a scheduler's constructor does. Without the mark a scheduler would warn."""
    rates = [group["lr"] for group in optimizer.param_groups]
    ConstantLR(optimizer, factor=1.0)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _give_data(engine: Engine, data: Any) -> None:
    if not isinstance(engine, PipelineEngine):
        engine.training_dataloader = engine.deepspeed_io(data)
        return
    in_order: Any = DistributedSampler(data, engine.dp_world_size, engine.dp_rank, shuffle=False)  # as DeepSpeed's
    engine.set_dataloader(RepeatingLoader(engine.deepspeed_io(data, data_sampler=in_order)))

"""initialize(): make an engine from a DeepSpeed script's model, optimizer and config."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torch.utils.data import DataLoader, DistributedSampler

from pyzero.comm import process
from pyzero.deepspeed import comm, launcher
from pyzero.deepspeed.config.dtype_sections import DTYPES
from pyzero.deepspeed.config.keys import remarks
from pyzero.deepspeed.config.reader import load
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.engine import param_owners
from pyzero.deepspeed.engine.engine import Engine
from pyzero.deepspeed.engine.eval_engine import EvalEngine
from pyzero.deepspeed.optimizers import make_optimizer
from pyzero.deepspeed.parallel import groups, tensor_parallel
from pyzero.deepspeed.parallel.mesh import Parallelism, parallelism_of
from pyzero.deepspeed.partition import Partition
from pyzero.deepspeed.pipe.engine import PipelineEngine
from pyzero.deepspeed.pipe.module import PipelineModule
from pyzero.deepspeed.stage_3.parameter_offload import ParameterOffload
from pyzero.deepspeed.stage_3.shard import is_sharded
from pyzero.deepspeed.utils import RepeatingLoader
from pyzero.optimizer import ZeroOptimizer

log = logging.getLogger("pyzero")


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
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
    trains = is_pipeline or _trains(optimizer, lr_scheduler, settings)
    _show_log()
    _remark(settings, trains)

    params = [_listed(item) for item in (model.parameters() if model_parameters is None else model_parameters)]
    _convert(model, settings, moves=tp_size == 1)
    partition = _partition(model, optimizer, settings, parallel, tp_size, tp_plan)
    ours: Any = None
    schedule: Any = None
    if not trains:
        engine: Engine = EvalEngine(model, settings, parallel, made_group=joined)
    else:
        ours = make_optimizer(model, partition.moved_optimizer(), partition.replaced(params), settings, parallel)
        ours.take_names(model)
        if settings.zero_optimization.stage == 3:
            ours.parameter_offload = ParameterOffload()
        if tp_size > 1:
            tensor_parallel.check_first_gradients(model, ours, parallel)
        schedule = _make_schedule(lr_scheduler, ours, settings)
        param_owners.register(ours)
        make: Any = PipelineEngine if is_pipeline else Engine
        engine = make(model, ours, schedule, settings, parallel, made_group=joined)
    engine.collate_fn = collate_fn
    if training_data is not None:
        _give_data(engine, training_data)
    return engine, ours, engine.training_dataloader, schedule


def _settings_of(args: Any, given: Any) -> Config:
    """Load the config, which is given or among the arguments."""
    of_args = (getattr(args, name, None) for name in ("deepspeed_config", "deepscale_config"))
    configs = [config for config in (given, next(filter(None, of_args), None)) if config is not None]
    if not configs:
        raise ValueError("expected a config, got none; pass config= as a dict, a path or JSON text")
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


def _trains(optimizer: Any, lr_scheduler: Any, config: Config) -> bool:
    """Return whether an optimizer or a scheduler is given or in the config."""
    return not (optimizer is None and config.optimizer is None and lr_scheduler is None and config.scheduler is None)


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


class _UntilConfigured(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr until somebody configures logging. It is a filter too, because filters are asked first."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not logging.getLogger().handlers and log.handlers == [self]:
            return True
        log.removeHandler(self)
        log.filters = [other for other in log.filters if other is not self]  # a new list: the old one is being iterated
        if log.level == logging.INFO:
            log.setLevel(logging.NOTSET)
        return log.isEnabledFor(record.levelno)

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)  # the present one, because it may have been redirected
        super().emit(record)


def _show_log() -> None:
    """Show the log on rank 0 from level INFO on, unless somebody configured logging: DeepSpeed shows it too."""
    levels = log.level, logging.getLogger().level
    is_configured = log.hasHandlers() or levels != (logging.NOTSET, logging.WARNING)  # Python's initial levels
    if process.rank_and_size()[0] > 0 or is_configured:
        return
    handler = _UntilConfigured()
    handler.setFormatter(logging.Formatter("[pyzero] %(message)s"))
    log.addHandler(handler)
    log.addFilter(handler)
    log.setLevel(logging.INFO)


def _remark(config: Config, trains: bool) -> None:
    """Log one line for each key of the config that works differently here than a reader may expect."""
    if process.rank_and_size()[0] > 0:
        return
    if config.optimizer is not None and config.optimizer.remark:
        log.warning("config: optimizer.type=%s: %s", config.optimizer.type, config.optimizer.remark)
    if trains and config.max_grad_norm() is None and "gradient_clipping" not in config.model_fields_set:
        log.warning("config: gradient_clipping is not given: nothing is clipped; DeepSpeed 0.19 clips to a norm of 1.0")
    if config.zero_optimization.offloads_params():
        if config.zero_optimization.stage < 3:
            log.warning("config: zero_optimization.offload_param: weights stay on their device below stage 3")
        elif launcher.device().type == "cpu":
            log.info("config: zero_optimization.offload_param: nothing to do, for weights lie in memory of the host")
    for line, warns in remarks(config):
        log.log(logging.WARNING if warns else logging.INFO, "config: %s", line)


def _convert(model: nn.Module, config: Config, moves: bool) -> None:
    """Convert the model to the wanted dtypes and this rank's device, in place, so that optimizers keep its parameters.

    moves: False leaves it on its device, because it is split before it has to fit on this one.
    """
    if config.zero_optimization.stage == 3 and is_sharded(model):
        return  # its shards have another dtype than it computes in
    device, dtypes = launcher.device() if moves else None, _dtypes(model, config)
    if all(_lies_as(tensor, device, dtypes[id(tensor)]) for tensor in (*model.parameters(), *model.buffers())):
        return  # torch cannot convert a DTensor that an engine holds, not even to the same dtype
    if tensor_parallel.is_split(model):
        raise ValueError(
            f"expected a model of whole weights to convert to {config.weights_dtype()}, got one that initialize() has "
            f"split before; pass it a config of the same fp16 and bf16, or build the model anew"
        )
    before = [id(param) for param in model.parameters()]
    model._apply(lambda tensor: _converted(tensor, device, dtypes.get(id(tensor), config.weights_dtype())))
    assert before == [id(param) for param in model.parameters()]


def _dtypes(model: nn.Module, config: Config) -> dict[int, torch.dtype | None]:
    """Return the dtype of each parameter and buffer, by id. None: it stays. Buffers stay unless the config gives one.

    A BatchNorm's buffers follow its weights, because torch requires one dtype for both.
    """
    dtype = config.weights_dtype()
    of_buffers = None if dtype is None else config.data_types.buffers_dtype()
    dtypes: dict[int, torch.dtype | None] = dict.fromkeys(map(id, model.buffers()), of_buffers)
    for module in model.modules():
        if isinstance(module, _NormBase) and module.weight is not None:
            dtypes.update(dict.fromkeys(map(id, module.buffers()), dtype))
    return {**dtypes, **dict.fromkeys(map(id, model.parameters()), dtype)}


def _converted(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


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


def _lies_as(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    return device in (None, tensor.device) and (dtype in (None, tensor.dtype) or not tensor.is_floating_point())


# ---- the schedule and the data ---------------------------------------------------------------------------------------


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

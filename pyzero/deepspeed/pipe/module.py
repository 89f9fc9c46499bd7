"""PipelineModule: a model as a sequence of layers, of which each stage builds only its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyzero.comm import process
from pyzero.comm.group import Group
from pyzero.deepspeed import launcher
from pyzero.deepspeed.checkpointing import checkpoint
from pyzero.deepspeed.pipe.layers import LayerSpec, TiedLayerSpec, partition
from pyzero.deepspeed.pipe.topology import PipeDataParallelTopology, PipelineParallelGrid, ProcessTopology


class PipelineError(RuntimeError):
    """A pipeline cannot do this, or failed on another rank."""


class PipelineModule(nn.Module):
    """The layers of this rank's stage, with the names that nn.Sequential would give them.

    Args:
        layers: LayerSpecs, modules and functions, or an nn.Sequential. Each takes what the one before it returns: a
            tensor, or a tuple of several.
        num_stages: Number of stages; divides the number of ranks.
        topology: A PipeDataParallelTopology, instead of num_stages.
        loss_fn: Called with the last layer's output and the labels; None: that output is the loss.
        seed_layers: Seed the construction of layer i with base_seed + i, so that it does not depend on the stages.
        seed_fn: Called instead of torch.manual_seed.
        base_seed: See seed_layers.
        partition_method: See pyzero.deepspeed.pipe.layers.partition.
        activation_checkpoint_interval: Number of layers to recompute at a time in backward; 0: none.
        activation_checkpoint_func: Called with a function and its inputs, to recompute it in backward.
        checkpointable_layers: Class names. Only groups of layers that are all of these classes are recomputed; default:
            groups with parameters.
        dynamic_shape: Not supported.

    Raises:
        ValueError: An argument does not fit the ranks or the layers, or two stages share a parameter.
        PipelineError: Another rank failed to build its stage.
    """

    builds_own_layers = True  # ranks build different layers, so zero.Init refuses it

    def __init__(
        self,
        layers: Iterable[Any],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] = checkpoint,
        checkpointable_layers: list[str] | None = None,
        dynamic_shape: bool = False,
    ) -> None:
        super().__init__()
        if dynamic_shape:
            raise ValueError("got dynamic_shape=True, which is not supported; pad micro-batches to one shape")
        self.layer_specs = list(layers)
        if topology is None:
            if num_stages is None:
                raise ValueError("expected num_stages or topology, got neither; pass one")
            topology = PipeDataParallelTopology(num_stages, max(1, process.rank_and_size()[1] // num_stages))
        self.grid = PipelineParallelGrid(topology)
        self.num_stages = self.grid.pipe_parallel_size
        self.stage_id = self.grid.stage_id
        if len(self.layer_specs) < self.num_stages:
            raise ValueError(
                f"expected a layer for each stage, got {len(self.layer_specs)} layers and {self.num_stages} stages; "
                f"take fewer stages"
            )
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.activation_checkpoint_func = activation_checkpoint_func
        self.checkpointable_layers = checkpointable_layers
        self.forward_funcs: list[Callable[[Any], Any]] = []
        self.tied_modules = nn.ModuleDict()
        if self.stage_id == self.num_stages - 1:
            self.loss_fn = loss_fn
        else:
            self.__dict__["loss_fn"] = loss_fn  # bypasses nn.Module: a loss module's weights belong to the last stage
        with self._failing_on_all_ranks():
            self.parts = partition(self.layer_specs, self.num_stages, partition_method)
            self._check_apart()
            self._build(seed_layers, seed_fn or torch.manual_seed, base_seed)
            self._check_trained()
        self._tied_groups = self._connect_tied()

    # ---- construction ----------------------------------------------------------------------------------------------

    @contextmanager
    def _failing_on_all_ranks(self) -> Iterator[None]:
        """A context whose error is raised on all ranks, so that none waits for a failed one. Collective."""
        problem: Exception | None = None
        try:
            yield
        except Exception as error:  # any error: the other ranks wait for this one
            problem = error
        told = None if problem is None else f"{type(problem).__name__}: {problem}"
        failures = Group().gather_objects(told, "the agreement on a PipelineModule")
        if problem is not None:
            raise problem
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise PipelineError(f"a PipelineModule failed on rank {rank}: {failure}")

    def _check_trained(self) -> None:
        if not any(param.requires_grad for param in self.parameters()):
            first, end = self.parts[self.stage_id : self.stage_id + 2]
            raise ValueError(
                f"expected trained parameters on every stage, got none in layers {first} to {end - 1} of stage "
                f"{self.stage_id}; choose another partition_method, or fewer stages"
            )

    def _check_apart(self) -> None:
        """Refuse modules that share a parameter across stages, because their copies would diverge."""
        stage_of: dict[int, tuple[int, int]] = {}
        for index, layer in enumerate(self.layer_specs):
            for param in layer.parameters() if isinstance(layer, nn.Module) else ():
                first, stage = stage_of.setdefault(id(param), (index, self.stage_owner(index)))
                if stage != self.stage_owner(index):
                    raise ValueError(
                        f"expected stages without parameters in common, got one of shape {tuple(param.shape)} in layer "
                        f"{first} on stage {stage} and in layer {index} on stage {self.stage_owner(index)}; build "
                        f"both as TiedLayerSpec(key, ...)"
                    )

    def _build(self, seed_layers: bool, seed_fn: Callable[[int], Any], base_seed: int) -> None:
        first, end = self.parts[self.stage_id], self.parts[self.stage_id + 1]
        for index, layer in enumerate(self.layer_specs[first:end], first):
            if seed_layers:
                seed_fn(base_seed + index)
            if isinstance(layer, TiedLayerSpec):
                if layer.key not in self.tied_modules:
                    self.tied_modules[layer.key] = layer.build()
                module = self.tied_modules[layer.key]
                self.forward_funcs.append(module if layer.forward_fn is None else partial(layer.forward_fn, module))
                continue
            built = layer.build() if isinstance(layer, LayerSpec) else layer
            if isinstance(built, nn.Module):
                self.add_module(str(index), built)
            self.forward_funcs.append(built)
        for param in self.parameters():
            param.model_parallel = True  # type: ignore[attr-defined]  # only this stage has it: see ZeroOptimizer

    def _connect_tied(self) -> dict[str, Any]:
        """Return, by key, the group of this pipeline's ranks that hold copies.

        Only the first of these ranks counts the copies in the norm, and saves them.
        """
        groups = {}
        ties: dict[str, set[int]] = {}
        for index, layer in enumerate(self.layer_specs):
            if isinstance(layer, TiedLayerSpec):
                ties.setdefault(layer.key, set()).add(self.stage_owner(index))
        self.has_ties = any(len(stages) > 1 for stages in ties.values())  # of any stages, also others than this one
        for key, stages in sorted(ties.items()):
            if len(stages) == 1:
                continue
            to_global = self.grid.stage_to_global
            columns = range(self.grid.data_parallel_size)
            handle = launcher.subgroup([[to_global(stage, column) for stage in sorted(stages)] for column in columns])
            if handle is not None:
                groups[key] = handle
                for param in self.tied_modules[key].parameters() if self.stage_id != min(stages) else ():
                    param.model_parallel = False  # type: ignore[attr-defined]
        return groups

    def tied_params(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield each parameter with copies on other stages, and the group of these. All stages use one order."""
        for key, group in self._tied_groups.items():
            for param in self.tied_modules[key].parameters():
                yield param, group

    @torch.no_grad()
    def broadcast_tied(self) -> None:
        """Copy tied weights from the first stage that has them to the others. Collective."""
        for key, handle in self._tied_groups.items():
            group = Group(handle)
            for param in self.tied_modules[key].parameters():
                group.broadcast(param, "the broadcast of tied weights")

    # ---- what can be asked -----------------------------------------------------------------------------------------

    def stage_owner(self, layer_idx: int) -> int:
        """Return the stage of a layer."""
        return next(stage for stage in range(self.num_stages) if layer_idx < self.parts[stage + 1])

    def partitions(self) -> list[int]:
        """Return the bounds of the stages, as indices of layers."""
        return self.parts

    def num_pipeline_stages(self) -> int:
        """Return the number of stages."""
        return self.num_stages

    def topology(self) -> ProcessTopology:
        """Return the topology of all ranks."""
        return self.grid.topology()

    def mpu(self) -> PipelineParallelGrid:
        """Return the grid that gives this rank's place and groups."""
        return self.grid

    def set_checkpoint_interval(self, interval: int) -> None:
        """Set activation_checkpoint_interval."""
        self.activation_checkpoint_interval = interval

    # ---- forward ---------------------------------------------------------------------------------------------------

    def forward(self, forward_input: Any) -> Any:
        """Run this stage's layers in order."""
        every = self.activation_checkpoint_interval
        if not every or not torch.is_grad_enabled():
            return _run(self.forward_funcs, forward_input)
        value = forward_input
        for start in range(0, len(self.forward_funcs), every):
            run = self.forward_funcs[start : start + every]
            inputs = value if isinstance(value, tuple) else (value,)
            if self._is_checkpointable(run):
                value = self.activation_checkpoint_func(partial(_run_on, run), *inputs)
            else:
                value = _run_on(run, *inputs)
        return value

    def _is_checkpointable(self, functions: list[Callable[[Any], Any]]) -> bool:
        if self.checkpointable_layers is not None:
            return all(type(function).__name__ in self.checkpointable_layers for function in functions)
        return any(isinstance(f, nn.Module) and next(f.parameters(), None) is not None for f in functions)


def _run(functions: list[Callable[[Any], Any]], value: Any) -> Any:
    for function in functions:
        value = function(value)
    return value


def _run_on(functions: list[Callable[[Any], Any]], *inputs: Any) -> Any:
    """Run functions on inputs. A single input is passed bare, as DeepSpeed does where it recomputes."""
    return _run(functions, inputs[0] if len(inputs) == 1 else inputs)

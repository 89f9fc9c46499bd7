"""The engine's whole weights: written in 16 bits to a file, or returned in fp32 as a dict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyzero.checkpoint.export import atomic_file
from pyzero.optimizer import ZeroOptimizer
from pyzero.sharding.fsdp import reshard
from pyzero.sharding.local_param import whole_of

if TYPE_CHECKING:
    from pyzero.deepspeed.config.schema import Config


class EngineWeights:
    """The part of Engine for whole weights. All ranks make the same calls."""

    module: nn.Module
    optimizer: ZeroOptimizer
    config: Config
    rank: int

    def module_state_dict(self) -> dict[str, Any]:
        """Return the module's state dict."""
        return self.module.state_dict()

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the module's whole state dict, in the dtype that it computes in, to one file, on rank 0.

        Returns:
            True.
        """
        state = self._consolidated_16bit_state_dict(exclude_frozen_parameters)
        if self.rank == 0:
            folder = Path(save_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / save_filename) as file:
                torch.save(state, file)
        return True

    def _whole_weights(self) -> dict[str, Any]:
        """Return the module's whole state dict on rank 0, and an empty one elsewhere.

        Shards are gathered to rank 0's CPU one by one, tied ones once.
        """
        reshard(self.module)
        params = {name: id(param) for name, param in self.module.named_parameters(remove_duplicate=False)}
        state: dict[str, Any] = {}
        gathered: dict[int, Any] = {}
        for name, value in self.module.state_dict().items():
            key = params.get(name, id(value))
            if key not in gathered:
                whole = whole_of(value)
                whole = whole if whole is value else whole.cpu()
                gathered[key] = None if self.rank else self._in_16_bits(whole) if name in params else whole
            if self.rank == 0:
                state[name] = gathered[key]
        return state

    def _in_16_bits(self, value: Any) -> Any:
        """Convert a weight of stage 3, which is fp32."""
        dtype = self.config.weights_dtype()
        return value.to(dtype) if dtype is not None and torch.is_tensor(value) and value.is_floating_point() else value

    save_fp16_model = save_16bit_model  # its older name

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, state_dict: Any = None, **options: Any
    ) -> None:
        """Call transformers' save_pretrained with whole weights, as `save_16bit_model` writes them, on rank 0.

        The module's own method sees only parts if layers are split or weights sharded.

        Args:
            save_directory: The model's folder.
            is_main_process: Ignored.
            state_dict: What to save; default: whole weights, which are gathered by a collective.
            **options: Options of the module's method.
        """
        module: Any = self.module
        state = self._whole_weights() if state_dict is None else state_dict
        if self.rank == 0:
            module.save_pretrained(save_directory, state_dict=state, **options)

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Return True: in stage 3 accelerate asks whether whole weights can be gathered."""
        return True

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """Return the state dict that accelerate and transformers save. Collective; empty except on rank 0."""
        params = self.module.named_parameters(remove_duplicate=False)
        frozen = {name for name, param in params if not param.requires_grad}
        left_out = frozen if exclude_frozen_parameters else ()
        return {name: value for name, value in self._whole_weights().items() if name not in left_out}

    _zero3_consolidated_16bit_state_dict = _consolidated_16bit_state_dict  # its name in stage 3

    def get_fp32_state_dict(self) -> dict[str, Tensor]:
        """Return the module's state dict in fp32 on the CPU, with masters instead of weights. Collective."""
        reshard(self.module)
        held = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        masters = {
            id(param): self.optimizer.full_master(param).cpu()
            for param in self.module.parameters()
            if id(param) in held
        }
        of_name = {name: id(param) for name, param in self.module.named_parameters(remove_duplicate=False)}
        result: dict[str, Tensor] = {}
        for name, value in self.module.state_dict().items():
            master = masters.get(of_name.get(name, 0))
            own = whole_of(value).detach().cpu()
            result[name] = master if master is not None else own.float() if own.is_floating_point() else own
        return result

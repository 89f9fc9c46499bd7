"""`tensor_parallel` of DeepSpeed's config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import model_validator

from pyzero.deepspeed.config.keys import Count, Done, Flag, Ignored, Refused, Section, Size

_SEE_SIZE = Ignored("see autotp_size", quiet=True)


class LayerSpecSection(Section):
    """`tensor_parallel.partition_config.layer_specs[]`."""

    patterns: Annotated[list[str], Done("regular expressions of parameters' names, matched from their beginning")]
    partition_type: Annotated[
        Literal["row", "column", "skip"], Done("which dimension of the weight is split, as Megatron calls it")
    ] = "column"
    gather_output: Annotated[Flag, Done("a column-split layer's output is whole on every rank")] = False
    model_types: Annotated[list[str] | None, Done("of model.config.model_type; null: all")] = None
    grad_allreduce: Annotated[Flag, Refused("use initialize(tp_plan=), style replicated_with_grad_allreduce")] = False
    shape: Annotated[Any, Refused("a fused weight is not split; split its layer in several, or skip it")] = None
    partition_dim: Annotated[Any, Ignored("see partition_type", quiet=True)] = None


class PartitionSection(Section):
    """`tensor_parallel.partition_config`."""

    layer_specs: Annotated[list[LayerSpecSection], Done("which layers are split; the first that matches counts")] = []
    use_default_specs: Annotated[
        Flag, Done("true, and preset_model set: the model's own plan, for layers that no spec matches")
    ] = True
    strict_mode: Annotated[Flag, Ignored("a plan without any layer of the model is an error", quiet=True)] = False
    tp_size: Annotated[Any, _SEE_SIZE] = None
    embedding_partition_dim: Annotated[Any, Ignored("embeddings are split where a spec or the plan says so")] = None
    lm_head_patterns: Annotated[Any, Ignored("see layer_specs", quiet=True)] = None


class TpSection(Section):
    """`tensor_parallel.tp`."""

    tp_size: Annotated[Count, Done("as autotp_size")] = 1
    tp_grain_size: Annotated[Any, _SEE_SIZE] = 1
    mpu: Annotated[Any, Refused("pass it as initialize(mpu=)")] = None
    tp_group: Annotated[Any, Refused("pass initialize(mpu=) or a DeviceMesh as initialize(mesh=)")] = None


class TensorParallelSection(Section):
    """`tensor_parallel`."""

    autotp_size: Annotated[
        Size,
        Done(
            "ranks that share each layer, side by side; 0: none. torch's parallelize_module splits the model, by the "
            "plan that transformers has of it, partition_config or initialize(tp_plan=); ZeRO over the others"
        ),
    ] = 0
    tp: TpSection = TpSection()
    tp_size: Annotated[Size, Done("as autotp_size")] = 1
    tp_grain_size: Annotated[Any, _SEE_SIZE] = 1
    tp_overlap_comm: Annotated[Flag, Ignored("torch decides what overlaps", quiet=True)] = False
    preset_model: Annotated[Any, Ignored("the model's own plan is used", quiet=True)] = None
    partition_config: PartitionSection | None = None
    injection_policy_tuple: Annotated[Any, Refused("set partition_config, or pass initialize(tp_plan=)")] = None
    vocab_parallel_lm_head: Annotated[
        Flag | None, Ignored("logits are gathered, and the loss is taken of whole ones", warns=True)
    ] = None
    vocab_parallel_ce_backend: Annotated[Any, Ignored("see vocab_parallel_lm_head", quiet=True)] = "torch"
    dtype: Annotated[Any, Ignored("fp16 and bf16 set the dtype of the weights", quiet=True)] = None
    keep_module_on_host: Annotated[Flag, Ignored("the model is split where it is, layer by layer", quiet=True)] = False
    replace_with_kernel_inject: Annotated[Flag, Ignored("the model's own layers run", quiet=True)] = False

    def size(self) -> int:
        """Return the number of ranks that share a layer."""
        return max(self.autotp_size, self.tp.tp_size, self.tp_size, 1)

    @model_validator(mode="after")
    def _one_size(self) -> TensorParallelSection:
        sizes = {self.autotp_size, self.tp.tp_size, self.tp_size} - {0, 1}
        if len(sizes) > 1:
            raise ValueError("got several sizes, wanted one; remove tp.tp_size and tp_size")
        return self

"""DeepSpeed configs with the combinations of keys and values that public sources use: DeepSpeed's documentation and
example scripts, transformers' documentation, and well-known training scripts. Each is written anew and shortened.

Batch sizes are filled in if the originals leave them to a launcher.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
CPU = {"device": "cpu", "pin_memory": True}
NONE = {"device": "none", "pin_memory": True}
AUTO_ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
AUTO_WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
}
AUTO_DECAY = {"type": "WarmupDecayLR", "params": {**AUTO_WARMUP["params"], "total_num_steps": "auto"}}
AUTO_SIZES = {
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
FP16_AUTO = {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
FP16 = {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
CIFAR_ADAM = {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}}
ZERO_2 = {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
}
ZERO_3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
ACTIVATIONS = {
    "partition_activations": False,
    "cpu_checkpointing": False,
    "contiguous_memory_optimization": False,
    "number_checkpoints": None,
    "synchronize_checkpoint_boundary": False,
    "profile": True,
}
NVME = {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True, "buffer_count": 4}


def bert(optimizer: Json, **others: Any) -> Json:
    """Pretraining of BERT in fp16 with a clip of 1."""
    return {
        "train_batch_size": 4096,
        "train_micro_batch_size_per_gpu": 16,
        "steps_per_print": 100,
        "prescale_gradients": False,
        "optimizer": optimizer,
        "gradient_clipping": 1.0,
        "wall_clock_breakdown": False,
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
        **others,
    }


def one_bit(kind: str, **params: Any) -> Json:
    shared = {"weight_decay": 0.01, "bias_correction": False, "cuda_aware": False, "comm_backend_name": "nccl"}
    return {"type": kind, "params": {"lr": 4e-4, **shared, **params}}


def megatron(**others: Any) -> Json:
    return {
        "train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
        "gradient_clipping": 1.0,
        "fp16": FP16,
        "wall_clock_breakdown": False,
        **others,
    }


def trainer(zero: Json, **others: Any) -> Json:
    """A config that transformers' Trainer fills in."""
    shared = {"steps_per_print": 2000, "wall_clock_breakdown": False}
    return {"fp16": FP16_AUTO, "bf16": {"enabled": "auto"}, "zero_optimization": zero, **AUTO_SIZES, **shared, **others}


def quantised(**methods: Any) -> Json:
    base = {
        "train_batch_size": 8,
        "optimizer": CIFAR_ADAM,
        "zero_optimization": {"stage": 0},
        "fp16": {"enabled": True},
    }
    return {**base, "gradient_clipping": 1.0, "prescale_gradients": True, "compression_training": methods}


def tutorial(zero: Json, **others: Any) -> Json:
    """A model's config with a complete schedule."""
    decay = {"warmup_min_lr": 0, "warmup_max_lr": 1.2e-4, "warmup_num_steps": 2000, "total_num_steps": 150000}
    return {
        "train_batch_size": 128,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "steps_per_print": 100,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1.2e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        },
        "scheduler": {"type": "WarmupDecayLR", "params": decay},
        **others,
    }


CIFAR = {
    "train_batch_size": 16,
    "steps_per_print": 2000,
    "optimizer": CIFAR_ADAM,
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000}},
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "bf16": {"enabled": False},
    "fp16": {"enabled": True, "fp16_master_weights_and_grads": False, "loss_scale": 0, "initial_scale_power": 15},
    "wall_clock_breakdown": False,
    "zero_optimization": {**ZERO_2, "stage": 0, "cpu_offload": False},
}
CYCLE = {
    "cycle_first_step_size": 1000,
    "cycle_first_stair_count": 500,
    "cycle_second_step_size": 1000,
    "cycle_second_stair_count": 500,
    "decay_step_size": 1000,
    "cycle_min_lr": 0.0001,
    "cycle_max_lr": 0.0010,
    "decay_lr_rate": 0.001,
    "cycle_min_mom": 0.85,
    "cycle_max_mom": 0.99,
    "decay_mom_rate": 0.0,
}
RANGE = {
    "lr_range_test_min_lr": 0.0001,
    "lr_range_test_step_size": 200,
    "lr_range_test_step_rate": 5,
    "lr_range_test_staircase": False,
}
SPARSE = {"mode": "fixed", "block": 16, "num_local_blocks": 4, "attention": "bidirectional"}
PLAIN_ADAM = {"type": "Adam", "params": {"lr": 3e-5, "weight_decay": 0.0, "bias_correction": False}}
LAMB = {"type": "Lamb", "params": {"lr": 11e-3, "weight_decay": 0.01, "bias_correction": False, "max_coeff": 0.3}}
ONE_BIT_LAMB = {"coeff_beta": 0.9, "factor_max": 4.0, "factor_min": 0.5, "factor_threshold": 0.1, "freeze_step": 1000}
HYBRID = {"enabled": False, "max_out_tokens": 512, "inference_tp_size": 1, "release_inference_cache": False}
PROFILER = {"enabled": True, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True}

ACCEPTED: dict[str, Json] = {
    # DeepSpeed's own documentation
    "getting started": {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
        "fp16": {"enabled": True},
        "zero_optimization": True,
    },
    "docs fp16": {"train_batch_size": 8, "fp16": {**FP16, "initial_scale_power": 32}},
    "docs bfloat16": {"train_batch_size": 8, "bfloat16": {"enabled": True}},
    "docs zero": {
        "train_batch_size": 8,
        "zero_optimization": {
            **ZERO_2,
            "offload_optimizer": NVME,
            "stage3_max_live_parameters": 1e9,
            "sub_group_size": 1e12,
            "elastic_checkpoint": True,
            "stage3_gather_fp16_weights_on_model_save": True,
            "ignore_unused_parameters": True,
            "round_robin_gradients": True,
        },
    },
    "docs activation checkpointing": {"train_batch_size": 8, "activation_checkpointing": ACTIVATIONS},
    "docs flops profiler": {"train_batch_size": 8, "flops_profiler": PROFILER},
    "tensor parallel": trainer(ZERO_2, tensor_parallel={"autotp_size": 4}),
    "docs tensor parallel": {
        "train_micro_batch_size_per_gpu": 1,
        "tensor_parallel": {
            "autotp_size": 4,
            "preset_model": "llama",
            "partition_config": {
                "use_default_specs": True,
                "layer_specs": [
                    {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row", "model_types": ["llama"]}
                ],
            },
        },
    },
    "docs autotuning": {"train_batch_size": 8, "autotuning": {"enabled": True, "fast": True, "metric": "throughput"}},
    "docs 1-bit adam": {
        "train_batch_size": 8,
        "optimizer": {"type": "OneBitAdam", "params": {"lr": 2e-4, "freeze_step": 400, "cuda_aware": False}},
        "fp16": {"enabled": True},
    },
    "docs 1-bit lamb": bert(one_bit("OneBitLamb", **ONE_BIT_LAMB, max_coeff=0.3, min_coeff=0.01)),
    "docs 0/1 adam": bert(one_bit("ZeroOneAdam", var_freeze_step=1000, var_update_scaler=16, local_step_scaler=1000)),
    "docs lr range test": {"train_batch_size": 8, "scheduler": {"type": "LRRangeTest", "params": RANGE}},
    "docs 1cycle": {"train_batch_size": 8, "scheduler": {"type": "OneCycle", "params": CYCLE}},
    "docs csv and tensorboard": {
        "train_batch_size": 8,
        "tensorboard": {"enabled": False, "output_path": "logs/", "job_name": "bert"},
        "wandb": {"enabled": False, "team": "team", "group": "group", "project": "project"},
        "csv_monitor": {"enabled": True, "output_path": "logs/", "job_name": "bert"},
    },
    "docs comms logger": {
        "train_batch_size": 8,
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
    },
    "docs zero++": {
        "train_batch_size": 8,
        "zero_optimization": {
            **ZERO_3,
            "zero_quantized_weights": True,
            "zero_hpz_partition_size": 16,
            "zero_quantized_gradients": True,
        },
    },
    "docs mics": {"train_batch_size": 8, "zero_optimization": {**ZERO_3, "mics_shard_size": 8}},
    "docs torch autocast": {"train_batch_size": 8, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "docs universal checkpoint": {
        "train_batch_size": 8,
        "checkpoint": {"load_universal": True, "tag_validation": "Fail"},
    },
    "docs bf16 masters": {
        "train_batch_size": 8,
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        "zero_optimization": {"stage": 2},
    },
    "docs curriculum, disabled": {
        "train_batch_size": 8,
        "curriculum_learning": {"enabled": False, "min_difficulty": 8},
    },
    "docs elasticity, disabled": {
        "train_batch_size": 8,
        "elasticity": {"enabled": False, "max_train_batch_size": 2000},
    },
    # the example scripts: vision, BERT, GPT, chat
    "cifar": CIFAR,
    "cifar bf16": {
        **CIFAR,
        "fp16": {"enabled": False},
        "bf16": {
            "enabled": True,
            "loss_scale": 0,
            "loss_scale_window": 500,
            "hysteresis": 2,
            "initial_scale_power": 15,
        },
    },
    "cifar moe": {**CIFAR, "zero_optimization": {**ZERO_2, "cpu_offload": False}},
    "cifar lamb": bert(LAMB, fp16={"enabled": False, "loss_scale": 0}),
    "cifar 1-bit lamb": bert(one_bit("OneBitLamb", **ONE_BIT_LAMB), fp16={"enabled": False, "loss_scale": 0}),
    "gan": {
        "train_batch_size": 64,
        "optimizer": {"type": "Adam", "params": {"lr": 0.0002, "betas": [0.5, 0.999], "eps": 1e-8}},
        "steps_per_print": 10,
    },
    "imagenet": {
        "train_batch_size": 256,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 50,
        "optimizer": CIFAR_ADAM,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": True, "auto_cast": True},
        "gradient_clipping": 0,
        "prescale_gradients": False,
        "cuda_visible_devices": 0,
        "wall_clock_breakdown": False,
    },
    "bert adam": bert({"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.01, "bias_correction": False}}),
    "bert prescaled": bert(PLAIN_ADAM, prescale_gradients=True, gradient_predivide_factor=8),
    "bert lamb": bert(LAMB, sparse_attention={**SPARSE, "num_different_global_patterns": 4}),
    "bert 1-bit adam": bert(one_bit("OneBitAdam", freeze_step=23000)),
    "bert 0/1 adam": bert(one_bit("ZeroOneAdam", var_freeze_step=12500, local_step_scaler=32678)),
    "bert 1-bit lamb": bert(one_bit("OneBitLamb", **ONE_BIT_LAMB, max_coeff=0.3, min_coeff=0.01)),
    "squad": {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 6,
        "optimizer": {"type": "Adam", "params": {**PLAIN_ADAM["params"], "max_grad_norm": 1.0}},
        "fp16": {"enabled": True},
    },
    "squad 1-bit": {
        "train_batch_size": 96,
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "OnebitAdam", "params": {"lr": 3e-5, "freeze_step": 400, "bias_correction": False}},
        "gradient_clipping": 1.0,
        "fp16": {"enabled": True},
    },
    "glue": {"train_batch_size": 32, "optimizer": PLAIN_ADAM, "gradient_clipping": 1.0, "fp16": {"enabled": True}},
    "qanet one cycle": {
        "train_batch_size": 512,
        "train_micro_batch_size_per_gpu": 32,
        "optimizer": CIFAR_ADAM,
        "scheduler": {
            "type": "OneCycle",
            "params": {
                "cycle_min_lr": 0.004,
                "cycle_max_lr": 0.015,
                "cycle_first_step_size": 1000,
                "cycle_second_step_size": 100,
                "cycle_first_stair_count": 100,
                "cycle_second_stair_count": 100,
                "decay_step_size": 1000,
                "decay_lr_rate": 0.01,
            },
        },
    },
    "qanet warmup": {"train_batch_size": 32, "steps_per_print": 10, "scheduler": CIFAR["scheduler"]},
    "megatron zero 2": megatron(
        zero_optimization={"stage": 2},
        activation_checkpointing={"partition_activations": True, "contiguous_memory_optimization": False},
    ),
    "megatron zero-offload": megatron(
        optimizer={"type": "DeepSpeed_Adam", "params": {"lr": 0.00015, "weight_decay": 1e-2}},
        zero_optimization={"stage": 2, "cpu_offload": True, "reduce_bucket_size": 50000000},
        activation_checkpointing={"partition_activations": True, "cpu_checkpointing": True},
    ),
    "megatron client optimizer": megatron(optimizer=None, zero_allow_untested_optimizer=1),
    "megatron zero 3": megatron(zero_optimization={**ZERO_3, "offload_param": CPU, "offload_optimizer": CPU}),
    "megatron infinity": megatron(
        zero_optimization={
            "stage": 3,
            "stage3_max_live_parameters": 1e9,
            "sub_group_size": 1e8,
            "offload_optimizer": {**NVME, "pipeline_read": False, "pipeline_write": False},
            "offload_param": {"device": "nvme", "nvme_path": "/nvme", "max_in_cpu": 1, "pin_memory": True},
        },
        wall_clock_breakdown=True,
        aio={
            "block_size": 1048576,
            "queue_depth": 16,
            "single_submit": False,
            "overlap_events": True,
            "thread_count": 2,
        },
    ),
    "megatron bf16": {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {**FP16, "enabled": False, "auto_cast": False},
    },
    "autotuning, trainer": {
        "train_micro_batch_size_per_gpu": "auto",
        "fp16": {"enabled": True},
        "autotuning": {"enabled": True, "fast": True, "arg_mappings": {"gradient_accumulation_steps": "--steps"}},
    },
    "alpaca lora": {
        **megatron(zero_optimization={**ZERO_3, "offload_optimizer": CPU, "offload_param": CPU}),
        "activation_checkpointing": ACTIVATIONS,
        "steps_per_print": 2000000,
    },
    "chat, actor": {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10,
        "zero_optimization": {
            "stage": 2,
            "offload_param": {"device": "none"},
            "offload_optimizer": {"device": "none"},
            "stage3_param_persistence_threshold": 1e4,
            "stage3_max_live_parameters": 3e7,
            "stage3_prefetch_bucket_size": 3e7,
            "memory_efficient_linear": False,
        },
        "fp16": {"enabled": True, "loss_scale_window": 100},
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        "hybrid_engine": HYBRID,
        "tensorboard": {"enabled": False, "output_path": "out/", "job_name": "step1"},
    },
    "chat, hybrid engine": {
        "train_batch_size": 32,
        "zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": False},
        "bfloat16": {"enabled": True},
        "hybrid_engine": {**HYBRID, "enabled": True},
    },
    "gpt-2": tutorial({"stage": 0}, fp16={"enabled": False}),
    "gpt-j": tutorial({**ZERO_2, "reduce_bucket_size": 500000000}),
    "gpt-neox": tutorial({**ZERO_3, "offload_optimizer": CPU}, activation_checkpointing=ACTIVATIONS),
    "llama, lora": tutorial({**ZERO_2, "offload_optimizer": {"device": "none"}}),
    "bert-large, 1-bit lamb": tutorial(
        {"stage": 1},
        bf16={"enabled": False},
        fp16=FP16,
        optimizer={"type": "OneBitLamb", "params": {"lr": 3e-4, "betas": [0.9, 0.999], "eps": 1e-6, "max_coeff": 0.3}},
    ),
    "cosine": tutorial(
        {"stage": 1},
        scheduler={
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": 1000,
                "warmup_min_ratio": 0,
                "warmup_num_steps": 100,
                "cos_min_ratio": 0.001,
                "warmup_type": "linear",
            },
        },
    ),
    "deepcompile": tutorial({"stage": 1}, compile={"deepcompile": True}, gradient_clipping="auto"),
    # transformers, and models that are trained with it
    "transformers zero 1": trainer({"stage": 1}),
    "transformers zero 2": trainer({**ZERO_2, "offload_optimizer": CPU}, optimizer=AUTO_ADAMW, scheduler=AUTO_WARMUP),
    "transformers zero 3": trainer(
        {**ZERO_3, "offload_optimizer": CPU, "offload_param": CPU}, optimizer=AUTO_ADAMW, scheduler=AUTO_WARMUP
    ),
    "transformers zero 3 bf16": {
        "bfloat16": {"enabled": "auto"},
        "optimizer": AUTO_ADAMW,
        "scheduler": AUTO_WARMUP,
        "zero_optimization": {**ZERO_3, "stage3_gather_fp16_weights_on_model_save": True},
        **AUTO_SIZES,
    },
    "transformers zero 3 nvme": trainer(
        {
            **ZERO_3,
            "offload_optimizer": {**NVME, "fast_init": False},
            "offload_param": {**NVME, "buffer_count": 5, "buffer_size": 1e8, "max_in_cpu": 1e9},
        },
        aio={
            "block_size": 262144,
            "queue_depth": 32,
            "thread_count": 1,
            "single_submit": False,
            "overlap_events": True,
        },
    ),
    "transformers fp32": trainer(ZERO_2, fp16={"enabled": False}, bf16={"enabled": False}),
    "transformers communication dtype": trainer(ZERO_2, communication_data_type="fp32"),
    "transformers dumped": trainer(ZERO_2, steps_per_print=float("inf"), train_batch_size=16, gradient_clipping=1.0),
    "transformers cpu adam": trainer({**ZERO_2, "offload_optimizer": CPU}, zero_force_ds_cpu_optimizer=False),
    "transformers adam with torch": trainer(
        ZERO_2, optimizer={"type": "AdamW", "params": {**AUTO_ADAMW["params"], "torch_adam": True, "adam_w_mode": True}}
    ),
    "accelerate": trainer({**ZERO_2, "offload_optimizer": NONE, "offload_param": NONE}),
    "zero 2 without offload": trainer({**ZERO_2, "round_robin_gradients": True, "overlap_comm": False}),
    "zero 3, newer names": trainer({**ZERO_3, "gather_16bit_weights_on_model_save": True}, steps_per_print=1e5),
    "zero 3, untested optimizer": trainer(ZERO_3, zero_allow_untested_optimizer=True),
    "zero 3 and tensorboard": trainer(ZERO_3, tensorboard={"enabled": True, "output_path": "logs/", "job_name": "run"}),
    "zero 3 and zero++": trainer({**ZERO_3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}),
    "zero 2 decay": trainer({**ZERO_2, "offload_optimizer": CPU}, optimizer=AUTO_ADAMW, scheduler=AUTO_DECAY),
    "autocast and dtypes": {
        **trainer(ZERO_3, bf16={"enabled": False}, fp16={"enabled": False}),
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "bf16"},
    },
    "chatglm": {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
        "fp16": FP16_AUTO,
        "zero_optimization": {**ZERO_2, "overlap_comm": False},
    },
    "one offloaded stage": {
        "zero_optimization": {"stage": 2, "offload_optimizer": CPU},
        "bf16": {"enabled": True},
        "gradient_accumulation_steps": 16,
        "train_micro_batch_size_per_gpu": 1,
    },
    "lightning": {
        "train_batch_size": 2,
        "bf16": {"enabled": True},
        "optimizer": CIFAR_ADAM,
        "scheduler": {"type": "WarmupLR", "params": {"last_batch_iteration": -1, "warmup_max_lr": 3e-5}},
        "zero_optimization": {"stage": 3},
    },
    "a monitor in the wrong place": trainer(
        ZERO_2, comms_config={"verbose": False}, monitor_config={"enabled": True, "csv_monitor": {"enabled": False}}
    ),
    "megatron, an older bf16": megatron(
        communication_data_type="bfp16", bfloat16={"enabled": True, "loss_scale": 1.0}, fp16={**FP16, "enabled": False}
    ),
    "leaf modules": tutorial({"stage": 3, "leaf_module": {"classes": ["model.MoeBlock"]}}),
    "squad lamb": bert({"type": "Lamb", "params": {**LAMB["params"], "max_grad_norm": 1.0, "min_coeff": 0.08}}),
    "muon": {"train_batch_size": 8, "optimizer": {"type": "Muon", "params": {"lr": 0.001}}},
    "sgd": {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.001}}},
    "profiled": {
        "train_batch_size": 8,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": True,
        "memory_breakdown": True,
        "flops_profiler": {"enabled": False},
        "comms_logger": {"enabled": False},
    },
    # DeepSpeed ignores these keys of LLaMA-Factory's.
    "fp8": trainer(ZERO_3, fp8={"enabled": True}),
    "ulysses": trainer(ZERO_3, sequence_parallel={"enabled": True, "size": 4}),
}

GROUPS = {"wq1": {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["attn"]}}
WEIGHTS = {"shared_parameters": {"enabled": True, "quantize_groups": 64}, "different_groups": GROUPS}

REFUSED: dict[str, Json] = {
    "quantised weights": quantised(weight_quantization=WEIGHTS),
    "quantised activations": quantised(activation_quantization=WEIGHTS),
    "pruned": quantised(sparse_pruning={"shared_parameters": {"enabled": True}, "different_groups": {}}),
    "fewer layers": quantised(layer_reduction={"enabled": True, "keep_number_layer": 5}),
    "moq": {"train_batch_size": 8, "quantize_training": {"enabled": True, "quantize_bits": {"start_bits": 16}}},
    "curriculum": megatron(curriculum_learning={"enabled": True, "curriculum_type": "seqlen", "min_difficulty": 8}),
    "random-ltd": {"train_batch_size": 4, "data_efficiency": {"enabled": True, "data_routing": {"enabled": True}}},
    "layer drop": {"train_batch_size": 4, "progressive_layer_drop": {"enabled": True, "theta": 0.5, "gamma": 0.001}},
    "elastic": {"elasticity": {"enabled": True, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4, 6]}},
    "apex amp": {"train_batch_size": 8, "amp": {"enabled": True, "opt_level": "O1"}},
    "sequence parallel": tutorial({"stage": 0}, sequence_parallel_size=2),
    "expert parallel": tutorial({"stage": 1}, expert_parallel={"enabled": True, "autoep_size": 8}),
    "zenflow": tutorial({**ZERO_2, "zenflow": {"topk_ratio": 0.1, "update_interval": 4}}),
    "per-head muon": {"train_batch_size": 8, "optimizer": {"type": "Muon", "params": {"per_head_muon": True}}},
    "adagrad": {"train_batch_size": 8, "optimizer": {"type": "Adagrad", "params": {"lr": 0.001}}},
    "misspelt threshold": megatron(zero_optimization={"stage": 3, "stage3_param_persitance_threshold": 1e5}),
    "decay without an end": trainer(ZERO_3, scheduler={"type": "WarmupDecayLR", "params": AUTO_WARMUP["params"]}),
}

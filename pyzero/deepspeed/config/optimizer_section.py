"""The section `optimizer` of DeepSpeed's config: which of pyzero's optimizers it selects, and its hyper-parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pyzero.deepspeed.config.keys import Auto, Done, Flag, Fraction, Ignored, NotNegative, OpenSection, Refused, Section

Rule = Literal["Adam", "AdamW", "Lion", "Lamb", "Muon", "SGD"]

# DeepSpeed's names, in lower case and without underscores -> (rule, remark if the rule differs from DeepSpeed's)
_TYPES: dict[str, tuple[Rule, str]] = {
    "adam": ("Adam", ""),
    "adamw": ("AdamW", ""),
    "fusedadam": ("Adam", ""),
    "deepspeedcpuadam": ("Adam", ""),
    "deepspeedadam": ("Adam", ""),
    "lion": ("Lion", ""),
    "fusedlion": ("Lion", ""),
    "deepspeedcpulion": ("Lion", ""),
    "lamb": ("Lamb", ""),
    "fusedlamb": ("Lamb", ""),
    "muon": ("Muon", ""),
    "sgd": ("SGD", ""),
    "onebitadam": ("Adam", "gradients are not compressed: Adam throughout, as in its warm-up"),
    "onebitlamb": ("Lamb", "gradients are not compressed: Lamb throughout, as in its warm-up"),
    "zerooneadam": ("Adam", "gradients are not compressed, and every step is synchronised: Adam"),
}
_COMPRESSION = Ignored("gradients are not compressed", quiet=True)
# The defaults of DeepSpeed's FusedLion. FusedZeroLion has the paper's: 1e-4 and (0.9, 0.99).
_LION_DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999)}

# DeepSpeed's defaults for Muon's matrices, and for the parameters that Adam trains beside them.
_MUON_DEFAULTS: dict[str, Any] = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0}
_MUONS_ADAM_DEFAULTS: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}

_TORCH_DEFAULTS: dict[str, Any] = {"weight_decay": 0.01}  # torch's AdamW, which params.torch_adam selects

# The parameters that each rule accepts.
_ADAM = ("lr", "betas", "eps", "weight_decay", "bias_correction", "maximize")
_ARGUMENTS: dict[Rule, tuple[str, ...]] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Lion": ("lr", "betas", "weight_decay", "maximize"),
    "Lamb": ("lr", "betas", "eps", "weight_decay", "bias_correction", "max_coeff", "min_coeff"),
    "Muon": ("lr", "betas", "eps", "weight_decay", "momentum", "muon_lr", "adam_lr"),
    "SGD": ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
}
_NOT_FOR_ALL = tuple(dict.fromkeys(name for names in _ARGUMENTS.values() for name in names))


class OptimizerParams(Section):
    """Parameters of all rules, with torch's names. "auto" selects DeepSpeed's default."""

    lr: Annotated[NotNegative | Auto, Done("learning rate; default 1e-3")] = "auto"
    betas: Annotated[tuple[Fraction, Fraction] | Auto, Done("default (0.9, 0.999)")] = "auto"
    eps: Annotated[NotNegative | Auto, Done("default 1e-8; Lion has none")] = "auto"
    weight_decay: Annotated[NotNegative | Auto, Done("default 0, for AdamW too")] = "auto"
    adam_w_mode: Annotated[Flag | None, Done("AdamW's decay; DeepSpeed's default for type Adam is true")] = None
    bias_correction: Annotated[Flag, Done("false: the moments are taken as they are")] = True
    max_grad_norm: Annotated[NotNegative | None, Done("as gradient_clipping")] = None
    torch_adam: Annotated[
        Flag | None, Done("the fused kernels run; weight_decay is 0.01 by default, as torch's AdamW has it")
    ] = None
    fused: Annotated[Flag | None, Ignored("the fused kernels always run", quiet=True)] = None
    foreach: Annotated[Flag | None, Ignored("the fused kernels run", quiet=True)] = None
    set_grad_none: Annotated[Flag | None, Ignored("gradients are cleared either way", quiet=True)] = None
    fp32_optimizer_states: Annotated[Flag, Ignored("the state is fp32 all the same: more exact")] = True
    amsgrad: Annotated[Flag, Refused("it is not supported; leave it out")] = False
    maximize: Annotated[Flag, Done("ascend; Lamb cannot")] = False
    max_coeff: Annotated[NotNegative | None, Done("Lamb's largest trust ratio; default 10")] = None
    min_coeff: Annotated[NotNegative | None, Done("Lamb's smallest one; default 0.01")] = None
    momentum: Annotated[Fraction | Auto | None, Done("default 0.95 for Muon, 0 for SGD")] = None
    dampening: Annotated[NotNegative | None, Done("SGD's; default 0")] = None
    nesterov: Annotated[Flag | None, Done("SGD's; default false")] = None
    muon_lr: Annotated[NotNegative | None, Done("lr of Muon's matrices, in place of lr; default 0.02")] = None
    adam_lr: Annotated[NotNegative | None, Done("lr of Adam's parameters, in place of lr; default 3e-4")] = None
    ns_method: Annotated[
        Literal["gram", "standard"] | None,
        Ignored("Newton-Schulz in bf16, as torch.optim.Muon's", quiet=True),
    ] = None
    per_head_muon: Annotated[Flag, Refused("it is not supported; leave it out")] = False
    eps_inside_sqrt: Annotated[Flag, Refused("it is not supported; leave it out")] = False
    freeze_step: Annotated[Any, _COMPRESSION] = None
    cuda_aware: Annotated[Any, _COMPRESSION] = None
    comm_backend_name: Annotated[Any, _COMPRESSION] = None
    var_freeze_step: Annotated[Any, _COMPRESSION] = None
    var_update_scaler: Annotated[Any, _COMPRESSION] = None
    local_step_scaler: Annotated[Any, _COMPRESSION] = None
    local_step_clipper: Annotated[Any, _COMPRESSION] = None
    coeff_beta: Annotated[Any, _COMPRESSION] = None
    factor_max: Annotated[Any, _COMPRESSION] = None
    factor_min: Annotated[Any, _COMPRESSION] = None
    factor_threshold: Annotated[Any, _COMPRESSION] = None


class OptimizerSection(OpenSection):
    """`optimizer`. As in DeepSpeed, type Adam decays as AdamW does unless params.adam_w_mode is false."""

    type: Annotated[
        str,
        Done(
            "Adam, AdamW, Lion, Lamb, SGD; Muon, of matrices without embed or lm_head in their names, Adam for the "
            "rest, the norm being that of gradients (DeepSpeed takes it of Muon's updates); OneBitAdam and ZeroOneAdam "
            "run as Adam, OneBitLamb as Lamb, with one log line; others are refused"
        ),
    ]
    params: OptimizerParams = Field(default=OptimizerParams())
    torch_adam: Annotated[Flag | None, Ignored("the fused kernels run", quiet=True)] = None  # params has this key too
    legacy_fusion: Annotated[Flag, Ignored("the fused kernels run", quiet=True)] = False

    @field_validator("type", mode="after")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if _key(value) not in _TYPES:
            raise ValueError(
                "wanted Adam, AdamW, Lion, Lamb, Muon, SGD, OneBitAdam, ZeroOneAdam or OneBitLamb; choose one, or "
                "train with the other one under torch's FSDP or DistributedDataParallel"
            )
        return value

    @model_validator(mode="after")
    def _params_fit(self) -> OptimizerSection:
        for name in _NOT_FOR_ALL:
            value = getattr(self.params, name)
            if name not in _ARGUMENTS[self.rule] and value != type(self.params).model_fields[name].default:
                raise ValueError(f"{self.type} has no params.{name}; leave it out")
        return self

    @property
    def rule(self) -> Rule:
        """The update rule of the type."""
        return _TYPES[_key(self.type)][0]

    @property
    def remark(self) -> str:
        """What the user should know about a type that runs as another; empty if nothing."""
        return _TYPES[_key(self.type)][1]

    def decoupled(self) -> bool:
        """Return whether weight decay is decoupled, as in AdamW."""
        return self.rule == "AdamW" or self.params.adam_w_mode is not False

    def _chosen(self) -> dict[str, Any]:
        given = [name for name in _ARGUMENTS[self.rule] if name in self.params.model_fields_set]
        values = {name: getattr(self.params, name) for name in given}
        return {name: value for name, value in values.items() if value not in ("auto", None)}

    def muon_groups(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the default hyper-parameters of Muon's groups and of Adam's groups, for type Muon."""
        chosen = self._chosen()
        halves = []
        for defaults, own_lr in ((_MUON_DEFAULTS, "muon_lr"), (_MUONS_ADAM_DEFAULTS, "adam_lr")):
            named = {name: value for name, value in chosen.items() if name in defaults}
            halves.append({**defaults, **named, "lr": chosen.get(own_lr, named.get("lr", defaults["lr"]))})
        muon, adam = halves
        return muon, {**adam, "decoupled_weight_decay": self.decoupled()}

    def arguments(self) -> dict[str, Any]:
        """Return the optimizer's arguments; empty for Muon, whose groups carry them."""
        chosen = self._chosen()
        if self.rule == "Muon":
            return {}
        if self.rule == "Lion":
            return {**_LION_DEFAULTS, **chosen}
        if self.rule in ("Lamb", "SGD"):
            return chosen
        torchs = _TORCH_DEFAULTS if self.params.torch_adam and self.decoupled() else {}
        return {**torchs, **chosen, "decoupled_weight_decay": self.decoupled()}


def _key(name: str) -> str:
    return name.lower().replace("_", "")

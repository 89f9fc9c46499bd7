"""Plain PyTorch oracles: written for reading, independently of csrc/math, and usable in fp64."""

from pyzero.ops.reference.adam import adam_
from pyzero.ops.reference.lion import lion_
from pyzero.ops.reference.loss_scale import loss_scale_update_
from pyzero.ops.reference.pack import pack_
from pyzero.ops.reference.reduce_scatter import reduce_scatter_
from pyzero.ops.reference.sgd import sgd_
from pyzero.ops.reference.step_scalars import step_scalars_
from pyzero.ops.reference.unscale import unscale_

__all__ = ["adam_", "lion_", "loss_scale_update_", "pack_", "reduce_scatter_", "sgd_", "step_scalars_", "unscale_"]

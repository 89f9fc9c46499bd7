"""The Triton backend. Importing it imports triton; nothing else in pyzero does."""

from .adam import adam_
from .lion import lion_
from .loss_scale import loss_scale_update_
from .pack import pack_
from .reduce_scatter import reduce_scatter_
from .sgd import sgd_
from .step_scalars import step_scalars_
from .unscale import unscale_

__all__ = ["adam_", "lion_", "loss_scale_update_", "pack_", "reduce_scatter_", "sgd_", "step_scalars_", "unscale_"]

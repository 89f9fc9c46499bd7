"""One optimizer per file, with its update rule and torch's arguments."""

import pyzero

__getattr__ = pyzero.lazy_getattr(
    __name__, "FusedZeroAdam", "FusedZeroAdamW", "FusedZeroLion", "FusedZeroSGD", "ZeroLamb", "ZeroMuon"
)

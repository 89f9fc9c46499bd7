"""One optimizer per file, with its update rule and torch's arguments."""

import pyzero

__getattr__ = pyzero.exports(
    __name__, "FusedZeroAdam", "FusedZeroAdamW", "FusedZeroLion", "FusedZeroSGD", "ZeroLamb", "ZeroMuon"
)

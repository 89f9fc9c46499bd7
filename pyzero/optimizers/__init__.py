"""One optimizer per file: its update rule, and its arguments, which are torch's."""

import pyzero

__getattr__ = pyzero.exports(
    __name__, "FusedZeroAdam", "FusedZeroAdamW", "FusedZeroLion", "FusedZeroSGD", "ZeroLamb", "ZeroMuon"
)

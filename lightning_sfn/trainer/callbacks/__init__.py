"""Callbacks for an existing Trainer and an unchanged module."""

from lightning_sfn.trainer.callbacks.spectrum import HessianSpectrum
from lightning_sfn.trainer.callbacks.switch import SwitchToSFN

__all__ = ["HessianSpectrum", "SwitchToSFN"]

"""The callbacks as classes of `lightning.pytorch`, the other name of `pytorch_lightning`.

A Trainer of that name takes the callbacks of `lightning_sfn` as they are. Its `LightningCLI` asks for subclasses of its
own `Callback`: ``class_path: lightning_sfn.lightning.SwitchToSFN``.
"""

from lightning_sfn.trainer._lightning import HessianSpectrum, SwitchToSFN

__all__ = ["HessianSpectrum", "SwitchToSFN"]

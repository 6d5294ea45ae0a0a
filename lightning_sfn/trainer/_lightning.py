"""What `lightning_sfn.lightning` exports.

jsonargparse leaves classes of a private module out when it looks for a short name (``class_path: SwitchToSFN``), which
would have two meanings otherwise.
"""

from lightning.pytorch.callbacks import Callback, EarlyStopping

from lightning_sfn.trainer.callbacks import spectrum, switch

__all__ = ["HessianSpectrum", "SwitchToSFN"]


class _Made(EarlyStopping):
    """The other name's `EarlyStopping`, of an object that the first one's constructor has filled already."""

    def __init__(self) -> None:
        """Leaves everything as it is."""


class SwitchToSFN(switch.SwitchToSFN, _Made):  # type: ignore[misc]  # hooks of both names take Trainers of their own
    """`lightning_sfn.SwitchToSFN`, with the same options, as a callback of `lightning.pytorch`."""


class HessianSpectrum(spectrum.HessianSpectrum, Callback):  # type: ignore[misc]
    """`lightning_sfn.HessianSpectrum`, with the same options, as a callback of `lightning.pytorch`."""

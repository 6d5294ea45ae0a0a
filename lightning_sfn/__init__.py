"""Saddle-free Newton and Hessian spectra for PyTorch Lightning.

Names are imported when they are used first: `import lightning_sfn` alone loads neither torch nor Lightning, and the
plain torch part (`lightning_sfn.newton`) works where Lightning is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_sfn.registration import register_strategies
from lightning_sfn.version import __version__

if TYPE_CHECKING:
    from lightning_sfn.newton.optimizer import SaddleFreeNewton
    from lightning_sfn.newton.spectrum import Spectrum, hessian_spectrum
    from lightning_sfn.trainer.callbacks.spectrum import HessianSpectrum
    from lightning_sfn.trainer.callbacks.switch import SwitchToSFN
    from lightning_sfn.trainer.mixin import SaddleFreeNewtonMixin
    from lightning_sfn.trainer.strategies import SFNDDPStrategy, SFNStrategy

register_strategies()

_HOME = {
    "SaddleFreeNewton": "lightning_sfn.newton.optimizer",
    "Spectrum": "lightning_sfn.newton.spectrum",
    "hessian_spectrum": "lightning_sfn.newton.spectrum",
    "HessianSpectrum": "lightning_sfn.trainer.callbacks.spectrum",
    "SFNDDPStrategy": "lightning_sfn.trainer.strategies",
    "SFNStrategy": "lightning_sfn.trainer.strategies",
    "SaddleFreeNewtonMixin": "lightning_sfn.trainer.mixin",
    "SwitchToSFN": "lightning_sfn.trainer.callbacks.switch",
}

__all__ = [
    "HessianSpectrum",
    "SFNDDPStrategy",
    "SFNStrategy",
    "SaddleFreeNewton",
    "SaddleFreeNewtonMixin",
    "Spectrum",
    "SwitchToSFN",
    "__version__",
    "hessian_spectrum",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lightning_sfn' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Saddle-free Newton in plain torch: nothing here knows Lightning.

Read in this order: `objective` (a loss as one fixed function), `curvature` (gradient and Hessian-vector products of
it), `krylov` (a subspace from those products), `trust_region` and `damping` (a step from the subspace), `step` (the
parts of a step), `outer_step` (Algorithm 1 from them), `optimizer` (the class that keeps the books).
"""

from lightning_sfn.newton.coordinates import AutoPreconditioner
from lightning_sfn.newton.curvature import CurvatureOperator, HessianOperator
from lightning_sfn.newton.damping import Damping, FixedDamping, GridDamping, LevenbergMarquardt, WarmDamping
from lightning_sfn.newton.density import SpectralDensity, spectral_density
from lightning_sfn.newton.diagnosis import CurvatureError
from lightning_sfn.newton.finite_difference import FiniteDifferenceOperator
from lightning_sfn.newton.fisher import FisherOperator
from lightning_sfn.newton.gauss_newton import GaussNewtonOperator
from lightning_sfn.newton.gradient_covariance import GradientCovarianceOperator
from lightning_sfn.newton.kronecker import KroneckerFactors
from lightning_sfn.newton.krylov import Direction, KrylovSubspace, lanczos
from lightning_sfn.newton.objective import Objective, ObjectiveError
from lightning_sfn.newton.optimizer import SaddleFreeNewton
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.preconditioner import DiagonalPreconditioner, IdentityPreconditioner, Preconditioner
from lightning_sfn.newton.spectrum import Spectrum, SpectrumSettings, hessian_spectrum
from lightning_sfn.newton.step import StepRecord

__all__ = [
    "AutoPreconditioner",
    "CurvatureError",
    "CurvatureOperator",
    "Damping",
    "DiagonalPreconditioner",
    "Direction",
    "FiniteDifferenceOperator",
    "FisherOperator",
    "FixedDamping",
    "FlatParameters",
    "GaussNewtonOperator",
    "GradientCovarianceOperator",
    "GridDamping",
    "HessianOperator",
    "IdentityPreconditioner",
    "KroneckerFactors",
    "KrylovSubspace",
    "LevenbergMarquardt",
    "Objective",
    "ObjectiveError",
    "Preconditioner",
    "SaddleFreeNewton",
    "SpectralDensity",
    "Spectrum",
    "SpectrumSettings",
    "StepRecord",
    "WarmDamping",
    "hessian_spectrum",
    "lanczos",
    "spectral_density",
]

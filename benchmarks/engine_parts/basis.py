"""Orthogonality of a float32 basis, the time of orthogonalisation beside the products, and waits for the device."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sfn.newton import HessianOperator, KrylovSubspace, Objective, lanczos

from .networks import Case, autoencoder, perceptron
from .timing import Clock, now

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"}
COPIES = {"_to_copy", "copy_"}
TARGET_ORTHOGONALITY, TARGET_TIME = 2e-6, 1.2


def measure(device: torch.device, quick: bool) -> dict[str, Any]:
    """All three."""
    sizes = [(8, 4), (8, 8)] if quick else [(512, 16), (512, 32), (512, 64), (512, 128), (2048, 64), (2048, 128)]
    return {
        "orthogonality": orthogonality(device, quick),
        "time": [time_beside_products(cases, dim, device, quick) for cases, dim in sizes],
        "waits": [{"basis": dim, "waits": waits(device, dim)} for dim in (16, 64, 256)],
    }


def _subspace(case: Case, dim: int, device: torch.device, clock: Clock) -> KrylovSubspace:
    """A basis of a network's Hessian from a random vector; products and the rest are counted apart."""
    operator = HessianOperator(Objective(case.closures), case.parameters)
    operator.loss_and_gradient()
    generator = torch.Generator(device).manual_seed(1)
    start = torch.randn(operator.parameters.size, device=device, generator=generator)
    room = torch.empty_like(start)

    def product(vector: Tensor) -> Tensor:
        with clock.part("products"):
            return operator.matvec_into(vector, room)

    with clock.part("orthogonalisation"):
        space = lanczos(product, start, dim, generator=generator)
    operator.close()
    return space


def orthogonality(device: torch.device, quick: bool) -> dict[str, Any]:
    """``|V V' - 1|`` of 500 vectors, its products summed in float64."""
    case, dim = perceptron(device, quick, (1, 8 if quick else 64)), 40 if quick else 500
    basis = _subspace(case, dim, device, Clock(partial(now, device))).basis
    gram = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=device)
    for slab in basis.split(2**15, dim=1):
        gram += slab.double() @ slab.double().T
    deviation = (gram - torch.eye(len(gram), dtype=torch.float64, device=device)).abs().max()
    return {
        "basis": dim,
        "parameters": basis.shape[1],
        "deviation": float(deviation),
        "target": TARGET_ORTHOGONALITY,
    }


def time_beside_products(cases: int, dim: int, device: torch.device, quick: bool) -> dict[str, Any]:
    """The time of a whole basis in that of its products, for the autoencoder on so many images."""
    clock = Clock(partial(now, device))
    _subspace(autoencoder(device, quick, (1, cases)), dim, device, clock)
    products, rest = clock.seconds["products"], clock.seconds["orthogonalisation"]
    return {"cases": cases, "basis": dim, "ratio": (products + rest) / products, "target": TARGET_TIME}


class Waits(TorchDispatchMode):
    """Counts the operations that hand a number to the host."""

    def __init__(self) -> None:
        """Starts at none."""
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Sees one operation."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.count += name in WAITS or (name in COPIES and _leaves(args, result))
        return result


def _leaves(args: Sequence[Any], result: Any) -> bool:
    """Whether a copy leads from another device to the CPU."""
    origins = [value.device.type for value in args if isinstance(value, Tensor)]
    return bool(result.device.type == "cpu" and any(kind != "cpu" for kind in origins))


def waits(device: torch.device, dim: int) -> int:
    """How often Lanczos hands a number to the host, for a basis of so many vectors."""
    values = torch.linspace(-1, 5, 3000, device=device)
    generator = torch.Generator(device).manual_seed(0)
    start = torch.randn(3000, device=device, generator=generator)
    with Waits() as counter:
        lanczos(lambda v: values * v, start, dim, generator=generator)
    return counter.count

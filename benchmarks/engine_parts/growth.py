"""How costs grow: measured exponents beside those that the operations have."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sfn.newton import HessianOperator, Objective, lanczos

from .networks import Case, perceptron, recurrent_cell
from .timing import medians


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Exponents of a product over parameters, batch and time, and of orthogonalisation over parameters and vectors."""
    return [
        _products("product", "parameters n", _wide(device, quick), device, quick),
        _products("gradient", "parameters n", _wide(device, quick), device, quick, gradient=True),
        _products("product", "batch", _batches(device, quick), device, quick),
        _products("product", "time steps T", _times(device, quick), device, quick),
        _orthogonalisation("parameters n", [(n, 32) for n in _powers(10_000, 10_000_000, quick)], 1, device, quick),
        _orthogonalisation("vectors k", [(200_000, k) for k in _powers(8, 512, quick)], 2, device, quick),
    ]


def _powers(low: int, high: int, quick: bool) -> list[int]:
    """Numbers from low to high, equally far apart on a logarithmic scale."""
    count = 2 if quick else round(math.log(high / low, 4)) + 1
    top = 2 * low if quick else high
    return [round(low * (top / low) ** (i / (count - 1))) for i in range(count)]


def _wide(device: torch.device, quick: bool) -> list[tuple[int, Case]]:
    """Perceptrons of growing width: 1e4 to 1e7 parameters."""
    widths = [16, 32] if quick else [13, 48, 160, 480, 1000, 2800]
    made = [perceptron(device, False, (1, 8 if quick else 256), hidden=width) for width in widths]
    return [(sum(p.numel() for p in case.parameters), case) for case in made]


def _batches(device: torch.device, quick: bool) -> list[tuple[int, Case]]:
    sizes = [8, 16] if quick else [32, 64, 128, 256, 512, 1024, 2048]
    return [(size, perceptron(device, quick, (1, size))) for size in sizes]


def _times(device: torch.device, quick: bool) -> list[tuple[int, Case]]:
    return [(time, recurrent_cell(device, False, time)) for time in ([4, 8] if quick else [10, 20, 40, 80, 160, 320])]


def _products(
    what: str, over: str, sized: list[tuple[int, Case]], device: torch.device, quick: bool, *, gradient: bool = False
) -> dict[str, Any]:
    """Seconds of a product (or a gradient), all sizes in turns."""
    ways: dict[str, Callable[[], Any]] = {}
    operators = []
    for size, case in sized:
        operator = HessianOperator(Objective(case.closures), case.parameters)
        vector = torch.randn(operator.parameters.size, device=device)
        ways[str(size)] = case.gradient if gradient else _product(operator, vector, torch.empty_like(vector))
        operators.append(operator)
    found = _fitted(what, over, 1, medians(ways, 1 if quick else 7, device))
    for operator in operators:
        operator.close()
    return found


def _product(operator: HessianOperator, vector: Tensor, room: Tensor) -> Callable[[], Tensor]:
    return lambda: operator.matvec_into(vector, room)


def _orthogonalisation(
    over: str, sizes: list[tuple[int, int]], theory: int, device: torch.device, quick: bool
) -> dict[str, Any]:
    """Seconds of a basis whose products cost next to nothing."""

    def build(size: int, dim: int) -> Callable[[], Any]:
        values = torch.linspace(-1, 5, size, device=device)
        start = torch.randn(size, device=device)
        return lambda: lanczos(lambda v: values * v, start, dim, generator=torch.Generator(device))

    ways = {str(size if "n" in over.split()[-1:] else dim): build(size, dim) for size, dim in sizes}
    return _fitted("orthogonalisation", over, theory, medians(ways, 1 if quick else 3, device))


def _fitted(what: str, over: str, theory: int, seconds: dict[str, float]) -> dict[str, Any]:
    """The slope of the logarithms over the whole range, and over its upper half."""
    points = [(math.log(float(size)), math.log(max(value, 1e-9))) for size, value in seconds.items()]
    upper = points[len(points) // 2 :] if len(points) > 2 else points
    return {
        "what": what,
        "over": over,
        "from": float(next(iter(seconds))),
        "to": float(list(seconds)[-1]),
        "theory": theory,
        "exponent": _slope(points),
        "exponent_of_upper_half": _slope(upper),
        "seconds": seconds,
    }


def _slope(points: list[tuple[float, float]]) -> float:
    """Least squares."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)

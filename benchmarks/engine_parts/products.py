"""What a Hessian-vector product costs in gradients of the same data."""

from typing import Any

import torch

from lightning_sfn.newton import HessianOperator, Objective

from .networks import Case, cases
from .timing import medians


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """The ratio for every network."""
    return [cost(case, device, 2 if quick else 15) for case in cases(device, quick)]


def cost(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """The ratio for one network, and that to the gradient of the reference if it has one."""
    operator = HessianOperator(Objective(case.closures), case.parameters)
    vector = torch.randn(operator.parameters.size, device=device)
    room = torch.empty_like(vector)
    ways = {"gradient": case.gradient, "product": lambda: operator.matvec_into(vector, room)}
    if case.reference is not None:
        ways["reference"] = case.reference_gradient
    taken = medians(ways, rounds, device)
    operator.close()
    unit = taken.get("reference", taken["gradient"])
    return {
        "case": case.name,
        "parameters": operator.parameters.size,
        "micro_batches": len(case.closures),
        "gradient_seconds": taken["gradient"],
        "ratio_to_own_gradient": taken["product"] / taken["gradient"],
        "ratio": taken["product"] / unit,
        "target": case.target,
    }

"""What a Hessian-vector product costs in gradients of the same data."""

from collections.abc import Callable
from typing import Any

import torch
from paper_scale.first_order import Captured

from lightning_sfn.newton import HessianOperator, Objective

from .networks import Case, cases
from .timing import medians


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """The ratio for every network."""
    as_one_graph = quick or device.type == "cuda"  # elsewhere nothing is captured
    return [cost(case, device, 2 if quick else 15, as_one_graph=as_one_graph) for case in cases(device, quick)]


def cost(case: Case, device: torch.device, rounds: int, *, as_one_graph: bool = False) -> dict[str, Any]:
    """The ratio for one network, and that to the gradient of the reference if it has one.

    Args:
        case: The network with its data.
        device: Where it is.
        rounds: Turns of each measurement.
        as_one_graph: Whether the product that derives everything anew, in one CUDA graph, is measured beside ours.
    """
    operator = HessianOperator(Objective(case.closures), case.parameters)
    vector = torch.randn(operator.parameters.size, device=device)
    room = torch.empty_like(vector)
    ways = {"gradient": case.gradient, "product": lambda: operator.matvec_into(vector, room)}
    if case.reference is not None:
        ways["reference"] = case.reference_gradient
    if as_one_graph and (captured := one_graph(case, vector)) is not None:
        ways["captured"] = captured[0]
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
        **({"ratio_captured": taken["captured"] / unit} if "captured" in taken else {}),
    }


def one_graph(case: Case, vector: torch.Tensor) -> tuple[Callable[[], Any], torch.Tensor] | None:
    """A product by autograd alone, from the loss on, as one CUDA graph; ``None`` where that cannot be captured.

    Returns:
        What computes it, and the vector that it fills.
    """
    image, pieces = torch.empty_like(vector), vector.split([p.numel() for p in case.parameters])
    along = [piece.view_as(p) for piece, p in zip(pieces, case.parameters, strict=True)]

    def product() -> None:
        image.zero_()
        for closure in case.closures:
            gradients = torch.autograd.grad(closure(), case.parameters, create_graph=True)
            found = torch.autograd.grad(gradients, case.parameters, along)
            image.add_(torch.cat([piece.flatten() for piece in found]), alpha=1 / len(case.closures))

    try:
        return Captured(product, (image,)), image
    except RuntimeError:  # an operation that waits for the host, or allocates in a way that no graph allows
        return None

"""Losses whose targets are drawn from the model: what Fisher factors are estimated from.

For cross entropies and the squared error the loss of one element is a negative log-likelihood. With targets drawn from
the model, its squared gradient is on average its Gauss-Newton matrix (Martens 2014, "New insights and perspectives on
the natural gradient method"), whatever the true targets are.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ElementwiseLosses"]


class ElementwiseLosses:
    """Answers calls of known loss functions with sampled targets, and remembers the losses of single elements.

    Args:
        generator: Source of the targets, on the parameters' device.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self.elements: list[Tensor] = []

    def answer(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
        """The loss with the gradient that sampled targets give it.

        Its value is that of the true targets, so that a model or a closure that looks at its loss sees no other one.

        Args:
            function: A function of `torch.nn.functional`.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            The loss, reduced as asked for; ``None`` if the function is not a known loss, or weights its elements, or if
            its targets depend on parameters.
        """
        if function not in _SAMPLERS:
            return None
        call = inspect.signature(function).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if any(given.get(name) is not None for name in ("weight", "pos_weight", "size_average", "reduce")):
            return None
        if function is F.mse_loss and given["target"].requires_grad and not given["input"].requires_grad:
            given["input"], given["target"] = given["target"], given["input"]  # its arguments may change places
        if given["target"].requires_grad:
            return None
        true: Tensor = function(*args, **kwargs).detach()
        reduction, target = given["reduction"], given["target"]
        counted = torch.ones((), device=target.device)
        drawn = _SAMPLERS[function](given["input"].detach(), self._generator)
        if "ignore_index" in given and not target.is_floating_point():
            ignored = target == given["ignore_index"]
            drawn = torch.where(ignored, target, drawn)
            counted = (~ignored).sum() / target.numel()
        if "label_smoothing" in given:
            given["label_smoothing"] = 0.0
        given["target"], given["reduction"] = drawn, "none"
        losses: Tensor = function(**given)
        self.elements.append(losses)
        reduced = losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean() / counted
        return true + (reduced - reduced.detach())


def _normal(prediction: Tensor, generator: torch.Generator) -> Tensor:
    """The squared error is the negative log-likelihood of variance 1/2."""
    noise = torch.empty_like(prediction, memory_format=torch.contiguous_format).normal_(generator=generator)
    return prediction + noise * math.sqrt(0.5)


def _bernoulli(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    return torch.bernoulli(probabilities, generator=generator)


def _classes(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Class indices for probabilities whose classes lie in dimension 1 (0 for a single case)."""
    last = probabilities.movedim(min(1, probabilities.dim() - 1), -1)
    flat = last.reshape(-1, last.shape[-1]).float()
    return torch.multinomial(flat, 1, generator=generator).reshape(last.shape[:-1])


_SAMPLERS: dict[Callable[..., Any], Callable[[Tensor, torch.Generator], Tensor]] = {
    F.mse_loss: _normal,
    F.binary_cross_entropy: _bernoulli,
    F.binary_cross_entropy_with_logits: lambda logits, generator: _bernoulli(logits.sigmoid(), generator),
    F.cross_entropy: lambda logits, generator: _classes(logits.softmax(min(1, logits.dim() - 1)), generator),
    F.nll_loss: lambda log_p, generator: _classes(log_p.exp(), generator),
}

"""K-FAC as a rival: Martens and Grosse 2015, with Grosse and Martens 2016 for convolutions.

Curvature of each layer is ``A x S``: A the second moment of its inputs (a one appended for the bias), S that of the
output gradients for targets sampled from the model, both moving averages. Layers that are used several times in one
pass (time steps, image positions) take A as the mean and S as the sum over the uses (Martens et al. 2018, independent
uses). Embeddings have a diagonal A; layer norms take the diagonal of the Fisher matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["KFAC"]

_LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm)


class KFAC:
    """Steps ``-lr v``, where the momentum v gathers ``(A + ..)^-1 x (S + ..)^-1 g``.

    Args:
        model: The network; every parameter belongs to a linear, convolution, embedding or layer norm module.
        lr: Learning rate.
        damping: Of the Kronecker product, as a share of the largest ``mean diag A`` times ``mean diag S`` of a layer;
            split between the factors by their traces (pi, Section 6.3).
        momentum: Factor on the step before.
        average: Weight of the old factors.
        refresh: Steps between factors.
        kl_clip: Bound on ``lr^2 g' F^-1 g``, by which a step is shortened.

    Raises:
        ValueError: A parameter belongs to no layer with a rule.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        damping: float,
        *,
        momentum: float = 0.9,
        average: float = 0.9,
        refresh: int = 3,
        kl_clip: float = 1e-3,
    ) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
        ours = {id(p) for layer in self.layers for p in layer.parameters()}
        if any(id(p) not in ours for p in model.parameters()):
            raise ValueError("K-FAC has rules for linear, convolution, embedding and layer norm parameters alone.")
        self.lr, self.damping, self.momentum, self.kl_clip = lr, damping, momentum, kl_clip
        self.average, self.refresh, self._steps = average, refresh, 0
        self.factors: list[tuple[Tensor, Tensor]] = []
        self._inverses: list[tuple[Tensor, Tensor]] = []
        self._velocity: list[Tensor] = []

    def step(self, loss: Tensor, sampled: Callable[[], tuple[Tensor, int]]) -> None:
        """Takes one step.

        Args:
            loss: The mini-batch's loss, with its graph.
            sampled: Returns the summed negative log-likelihood of targets drawn from the model, and over how many terms
                the loss takes the mean.
        """
        if self._steps % self.refresh == 0:
            self.observe(sampled)
        self._steps += 1
        tensors = [p for layer in self.layers for p in layer.parameters()]
        gradients = iter(torch.autograd.grad(loss, tensors))
        joined = [_join(layer, [next(gradients) for _ in layer.parameters()]) for layer in self.layers]
        directions = [self._solve(i, g) for i, g in enumerate(joined)]
        length = self.lr**2 * sum(float((d * g).sum()) for d, g in zip(directions, joined, strict=True))
        clip = 1.0 if length <= self.kl_clip else (self.kl_clip / length) ** 0.5
        old = self._velocity or [torch.zeros_like(d) for d in directions]
        self._velocity = [self.momentum * v + clip * d for v, d in zip(old, directions, strict=True)]
        with torch.no_grad():
            for layer, velocity in zip(self.layers, self._velocity, strict=True):
                for parameter, part in zip(layer.parameters(), _split(layer, velocity), strict=True):
                    parameter.sub_(part, alpha=self.lr)

    def observe(self, sampled: Callable[[], tuple[Tensor, int]]) -> None:
        """Brings the factors and their damped inverses up to date."""
        seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in self.layers}

        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda gradient: seen[module].append((inputs[0].detach(), gradient)))

        handles = [layer.register_forward_hook(watch) for layer in self.layers]
        loss, terms = sampled()
        for handle in handles:
            handle.remove()
        torch.autograd.grad(loss, [p for layer in self.layers for p in layer.parameters()])
        new = [_factors(layer, seen[layer], terms) for layer in self.layers]
        if not self.factors:
            self.factors = new
        for old, fresh in zip(self.factors, new, strict=True):
            for moving, value in zip(old, fresh, strict=True):
                moving.lerp_(value, 1 - self.average)
        scale = max(float(_diagonal(a).mean() * _diagonal(s).mean()) for a, s in self.factors)
        self._inverses = [_damped_inverses(a, s, self.damping * scale) for a, s in self.factors]

    def _solve(self, index: int, gradient: Tensor) -> Tensor:
        a, s = self._inverses[index]
        if a.dim() == 0:  # a layer norm: the diagonal
            return s * gradient
        right = gradient * a if a.dim() == 1 else gradient @ a
        return s @ right


def _factors(layer: nn.Module, seen: list[tuple[Tensor, Tensor]], terms: int) -> tuple[Tensor, Tensor]:
    """A and S of one layer from its inputs and output gradients."""
    inputs = torch.cat([_rows(layer, a) for a, _ in seen])
    gradients = [g.movedim(1, -1) if isinstance(layer, nn.Conv2d) else g for _, g in seen]
    deltas = torch.cat([g.reshape(-1, g.shape[-1]) for g in gradients])
    if isinstance(layer, nn.LayerNorm):
        return deltas.new_ones(()), torch.stack([(deltas * inputs).square().sum(0), deltas.square().sum(0)]) / terms
    if isinstance(layer, nn.Embedding):
        a = torch.bincount(inputs, minlength=layer.num_embeddings) / inputs.numel()
    else:
        a = inputs.T @ inputs / len(inputs)
    return a.to(deltas.dtype), deltas.T @ deltas / terms


def _rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What each use of the weights has seen: shape (uses, inputs), a one appended where there is a bias."""
    if isinstance(layer, nn.Embedding):
        return inputs.flatten()
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps).reshape(-1, inputs.shape[-1])
    if isinstance(layer, nn.Conv2d):
        inputs = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride).movedim(1, -1)  # type: ignore[arg-type]
    rows = inputs.reshape(-1, inputs.shape[-1])
    return rows if layer.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def _damped_inverses(a: Tensor, s: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    if a.dim() == 0:
        return a, 1 / (s + damping)
    mean_a, mean_s = float(_diagonal(a).mean()), float(_diagonal(s).mean())
    pi = (mean_a / mean_s) ** 0.5 if mean_a > 0 and mean_s > 0 else 1.0
    root = damping**0.5
    return _inverse(a, pi * root), _inverse(s, root / pi)


def _inverse(factor: Tensor, damping: float) -> Tensor:
    if factor.dim() == 1:
        return 1 / (factor + damping)
    ones = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(factor + damping * ones))


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.dim() < 2 or factor.shape[0] != factor.shape[1] else factor.diagonal()


def _join(layer: nn.Module, gradients: list[Tensor]) -> Tensor:
    """A layer's gradient as one matrix of shape (outputs, inputs), the bias as last column; (2, n) for a layer norm."""
    if isinstance(layer, nn.LayerNorm):
        return torch.stack(gradients)
    weight = gradients[0].T if isinstance(layer, nn.Embedding) else gradients[0].flatten(1)
    return weight if len(gradients) == 1 else torch.cat([weight, gradients[1][:, None]], 1)


def _split(layer: nn.Module, joined: Tensor) -> list[Tensor]:
    """The inverse of `_join`."""
    if isinstance(layer, nn.LayerNorm):
        return [joined[0], joined[1]]
    if isinstance(layer, nn.Embedding):
        return [joined.T]
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if layer.bias is None:
        return [joined.view_as(weight)]
    return [joined[:, :-1].reshape(weight.shape), joined[:, -1]]

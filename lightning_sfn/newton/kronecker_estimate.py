"""An estimate of Kronecker factors from one look at the data.

A loss is evaluated once while the uses of its weights are watched, and differentiated by the outputs of each.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sfn.newton.kronecker_blocks import Block, Signature
from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.processes import ProcessError
from lightning_sfn.newton.sampled_targets import ElementwiseLosses
from lightning_sfn.newton.shortage import is_out_of_memory
from lightning_sfn.newton.weight_uses import Use, WatchingWeights

__all__ = ["FactorsError", "Targets", "estimated"]

Targets = Literal["sampled", "given"]
"""Where output gradients come from: targets drawn from the model, or those of the data."""


class FactorsError(Exception):
    """Factors cannot be had: the loss cannot be evaluated while it is watched, or they are zero or not finite."""


def estimated(
    objective: Objective,
    parameters: FlatParameters,
    seed: int,
    targets: Targets,
    max_width: int,
    max_memory: int | None,
) -> list[Block]:
    """The factors of all parameters, the mean over processes.

    Args:
        objective: The loss.
        parameters: The parameters.
        seed: Of the sampled targets, the same on all processes; each draws its own from it.
        targets: Where output gradients come from.
        max_width: Factors wider than this are diagonal.
        max_memory: Bytes for factors, eigenvectors and scales.

    Returns:
        A block for each layer, and one for each parameter that belongs to none.

    Raises:
        FactorsError: The loss cannot be evaluated while it is watched; raised on all processes.
        ProcessError: Another process failed.
    """
    observation, signatures = _observed(objective, parameters, seed, targets)
    chosen = _resolve(signatures, parameters, max_width, max_memory)
    like = parameters.tensors[0].detach()
    blocks = [Block.zeros(signature, parameters.shapes, like, max_width) for signature in chosen]
    for block in blocks:
        observation.fill(block)
    factors = [factor for block in blocks for factor in (block.inputs, block.outputs)]
    means = objective.reduce(torch.cat([factor.reshape(-1) for factor in factors]))
    sizes = [factor.numel() for factor in factors]
    for factor, mean in zip(factors, torch.split(means, sizes), strict=True):
        factor.copy_(mean.view_as(factor))
    return blocks


def _observed(
    objective: Objective, parameters: FlatParameters, seed: int, targets: Targets
) -> tuple["_Observation", set[Signature]]:
    """What this process sees, and the kinds of uses that all processes see."""
    processes = objective.processes
    observation: _Observation | None = None
    failure: Exception | None = None
    try:
        observation = _observe(objective, parameters, seed + (processes.rank if processes else 0), targets)
    except Exception as error:
        failure = error
    # What is wrong with the loss itself shows in the products too, and is raised there.
    fatal = not isinstance(failure, (RuntimeError, TypeError, ValueError)) or is_out_of_memory(failure)
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    own = (None if observation is None else sorted(observation.signatures), message, fatal)
    reports = [own] if processes is None else processes.collect(own)
    if failure is not None and fatal:
        raise failure
    for rank, (found, message, fatal) in enumerate(reports):
        if found is None and fatal:
            raise ProcessError(f"Rank {rank} of {len(reports)} failed in the middle of a step: {message}")
    if hindrances := [message for _, message, _ in reports if message is not None]:
        raise FactorsError(f"Kronecker factors cannot be estimated ({hindrances[0]})") from failure
    assert observation is not None
    return observation, {tuple(signature) for found, _, _ in reports for signature in found or ()}


class _Observation:
    """Uses of weights with their output gradients, and the gradients of the parameters, over all parts."""

    def __init__(self, parameters: FlatParameters) -> None:
        self._index = {id(p): i for i, p in enumerate(parameters.tensors)}
        self._parts: list[tuple[list[tuple[Signature, Use, Tensor]], float]] = []  # uses of a part, and its share
        self._squares: dict[int, Tensor] = {}

    @property
    def signatures(self) -> set[Signature]:
        """What kinds of uses were seen."""
        return {signature for uses, _ in self._parts for signature, _, _ in uses}

    def add(self, uses: list[Use], outputs: list[Tensor | None], gradients: list[Tensor | None], weight: float) -> None:
        """Adds one part of the data with its share of the whole."""
        reached: list[tuple[Signature, Use, Tensor]] = []
        for use, gradient in zip(uses, outputs, strict=True):
            bias = -1 if use.bias is None else self._index.get(id(use.bias), -1)
            if gradient is not None:
                signature = (use.kind, self._index[id(use.weight)], bias)
                reached.append((signature, use, use.rows(gradient)))
        self._parts.append((reached, weight))
        for index, by_parameter in enumerate(gradients):
            if by_parameter is not None:
                square = by_parameter.detach().square().mean()
                self._squares[index] = self._squares.get(index, torch.zeros_like(square)) + square

    def fill(self, block: Block) -> None:
        """Sums up what belongs to a block."""
        kind, index, _ = block.signature
        if kind == "number":
            block.outputs += self._squares.get(index, torch.zeros_like(block.outputs))
            return
        for uses, weight in self._parts:
            own = [(use, rows) for signature, use, rows in uses if signature == block.signature]
            places = sum(len(rows) for _, rows in own)
            for use, rows in own:
                block.observe(use.inputs, rows, weight * len(rows) / places)


def _observe(objective: Objective, parameters: FlatParameters, seed: int, targets: Targets) -> _Observation:
    """Evaluates each part once and differentiates by the outputs of every linear map."""
    generator = torch.Generator(parameters.device).manual_seed(seed)
    observation = _Observation(parameters)
    for index, weight in enumerate(objective.weights):
        losses = ElementwiseLosses(generator) if targets == "sampled" else None
        watching = WatchingWeights(parameters.tensors, losses)
        with watching, _eager():
            loss = objective.evaluate(index).loss
        heads, seeds = _heads(loss, [] if losses is None else losses.elements, weight)
        with torch.enable_grad():
            inputs: list[Any] = [*(use.output for use in watching.uses), *parameters.tensors]
            found = torch.autograd.grad(heads, inputs, seeds, allow_unused=True)
        count = len(watching.uses)
        observation.add(watching.uses, list(found[:count]), list(found[count:]), weight)
    return observation


def _heads(loss: Tensor, elements: list[Tensor], weight: float) -> tuple[list[Tensor], list[Tensor]]:
    """What to differentiate, and with which factors.

    An element with share w in the loss adds ``w`` times its squared gradient to the Fisher matrix, so it is
    differentiated with the factor ``sqrt(w)``, however the loss was reduced. Without known elements the loss itself is
    differentiated; then only the ratios between layers are right, and no more is needed.
    """
    known = [element for element in elements if element.requires_grad]
    shares = torch.autograd.grad(loss, known, retain_graph=True, allow_unused=True) if known else ()
    pairs = [(e, (s.abs() * weight).sqrt()) for e, s in zip(known, shares, strict=True) if s is not None]
    if not pairs:
        return [loss], [torch.full_like(loss, math.sqrt(weight))]
    return [element for element, _ in pairs], [share for _, share in pairs]


def _resolve(
    signatures: set[Signature], parameters: FlatParameters, max_width: int, max_memory: int | None
) -> list[Signature]:
    """One block for each parameter: as seen where it was seen in one way and fits, one number elsewhere."""
    owners: dict[int, list[Signature]] = {}
    for signature in signatures:
        for index in {signature[1], signature[2]} - {-1}:
            owners.setdefault(index, []).append(signature)
    single = [s for s in signatures if all(len(owners[i]) == 1 for i in {s[1], s[2]} - {-1})]
    itemsize = parameters.tensors[0].element_size()
    costs = {signature: Block.cost(signature, parameters.shapes, itemsize, max_width) for signature in single}
    kept, spent = [], 0
    for signature in sorted(single, key=lambda s: (costs[s], s)):
        if max_memory is None or spent + costs[signature] <= max_memory:
            kept.append(signature)
            spent += costs[signature]
    covered = {index for signature in kept for index in signature[1:]}
    numbers: list[Signature] = [("number", i, -1) for i in range(len(parameters.tensors)) if i not in covered]
    return sorted([*kept, *numbers], key=lambda s: s[1])


def _eager() -> Any:
    """Compiled models run as written while their calls are watched."""
    set_stance: Callable[[str], Any] = torch.compiler.set_stance
    return set_stance("force_eager")

"""An estimate of Kronecker factors from one look at the data.

A loss is evaluated once while the uses of its weights are watched, and differentiated by the outputs of each.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_sfn.newton.kronecker_blocks import Block, Signature
from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.processes import ProcessError
from lightning_sfn.newton.sampled_targets import ElementwiseLosses
from lightning_sfn.newton.shortage import is_out_of_memory
from lightning_sfn.newton.weight_uses import Use, WatchingWeights

__all__ = ["FactorsError", "Limits", "NoRoomForFactors", "Targets", "estimated"]

Targets = Literal["sampled", "given"]
"""Where output gradients come from: targets drawn from the model, or those of the data."""


class FactorsError(Exception):
    """Factors cannot be had: the loss cannot be evaluated while it is watched, or they are zero or not finite."""


class NoRoomForFactors(FactorsError):  # noqa: N818
    """Memory ran out in estimating factors."""


@dataclass(frozen=True)
class Limits:
    """How large factors may be; see `KroneckerFactors` for the options.

    Attributes:
        max_width: Factors wider than this are diagonal.
        max_memory: Bytes for factors, eigenvectors and scales; ``None`` for no limit.
        min_rows: Factors for which there are fewer rows of data than this for each unit of their width are diagonal.
    """

    max_width: int
    max_memory: int | None
    min_rows: float


def estimated(
    objective: Objective, parameters: FlatParameters, seed: int, targets: Targets, limits: Limits
) -> list[Block]:
    """The factors of all parameters, the mean over processes.

    Args:
        objective: The loss.
        parameters: The parameters.
        seed: Of the sampled targets, the same on all processes; each draws its own from it.
        targets: Where output gradients come from.
        limits: How large factors may be.

    Returns:
        A block for each layer, and one for each parameter that belongs to none.

    Raises:
        FactorsError: The loss cannot be evaluated while it is watched; raised on all processes.
        ProcessError: Another process failed.
    """
    own, reports = _observed(objective, parameters, seed, targets, limits)
    rows: Counter[Signature] = Counter()
    hidden: set[Signature] = set()
    for signature, count, is_hidden in reports:
        rows[signature] += count
        hidden |= {signature} if is_hidden else set()
    blocks = []
    for signature in _resolve(set(rows), parameters, limits):
        block = own.block(signature)
        block.hidden = signature in hidden
        blocks.append(block.narrowed(rows[signature] / limits.min_rows) if limits.min_rows > 0 else block)
    factors = [factor for block in blocks for factor in (block.inputs, block.outputs)]
    means = objective.reduce(torch.cat([factor.reshape(-1) for factor in factors]))
    sizes = [factor.numel() for factor in factors]
    for factor, mean in zip(factors, torch.split(means, sizes), strict=True):
        factor.copy_(mean.view_as(factor))
    return blocks


Seen = tuple[Signature, int, bool]
"""A kind of use, the rows of data that it was seen with, and whether other layers see its outputs."""


def _observed(
    objective: Objective, parameters: FlatParameters, seed: int, targets: Targets, limits: Limits
) -> tuple["_Sums", list[Seen]]:
    """What this process sees, and the uses that all processes see."""
    processes = objective.processes
    sums, failure = _Sums(parameters, limits), None
    try:
        _observe(objective, parameters, seed + (processes.rank if processes else 0), targets, sums)
    except Exception as error:
        failure = error
    # What is wrong with the loss itself shows in the products too, and is raised there.
    fatal = failure is not None and not isinstance(failure, (RuntimeError, TypeError, ValueError))
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    try:
        own = (sums.seen, message, fatal, failure is not None and is_out_of_memory(failure))
        reports = [own] if processes is None else processes.collect(own)
        if failure is not None and fatal:
            raise failure
        for rank, (_, message, fatal, _) in enumerate(reports):
            if fatal:
                raise ProcessError(f"Rank {rank} of {len(reports)} failed in the middle of a step: {message}")
        for _, message, _, for_want_of_memory in reports:
            if message is not None:
                kind = NoRoomForFactors if for_want_of_memory else FactorsError
                raise kind(f"Kronecker factors cannot be estimated ({message})") from failure
        return sums, [(tuple(signature), *rest) for seen, *_ in reports for signature, *rest in seen]
    finally:
        failure = None  # its traceback holds this frame: a cycle that would keep graphs and gradients


class _Sums:
    """Factors of one process, summed up part by part, so that inputs and gradients of one part are kept at a time."""

    def __init__(self, parameters: FlatParameters, limits: Limits) -> None:
        self._parameters, self._limits = parameters, limits
        self._index = {id(p): i for i, p in enumerate(parameters.tensors)}
        self._blocks: dict[Signature, Block] = {}
        self._rows: Counter[Signature] = Counter()
        self._hidden: set[Signature] = set()
        self._squares: dict[int, Tensor] = {}

    @property
    def seen(self) -> list[Seen]:
        """What kinds of uses were seen."""
        return [(signature, rows, signature in self._hidden) for signature, rows in sorted(self._rows.items())]

    def add(self, uses: list[Use], outputs: list[Tensor | None], gradients: list[Tensor | None], weight: float) -> None:
        """Adds one part of the data with its share of the whole."""
        seen_from_others = _ancestors(uses)
        reached: list[tuple[Signature, Use, Tensor]] = []
        places: Counter[Signature] = Counter()
        for use, gradient in zip(uses, outputs, strict=True):
            if gradient is None or gradient.numel() == 0:
                continue
            signature: Signature = (use.kind, self._index[id(use.weight)], self._index.get(id(use.bias), -1))
            reached.append((signature, use, gradient))
            places[signature] += gradient.numel() // gradient.shape[use.channels]
            self._hidden |= {signature} if use.output.node in seen_from_others else set()
        self._rows += places
        kept = set(_resolve(set(self._rows), self._parameters, self._limits))
        for signature, use, gradient in reached:
            if signature in kept:
                rows = use.rows(gradient)
                self.block(signature).observe(use.inputs, rows, weight * len(rows) / places[signature])
        for index, by_parameter in enumerate(gradients):
            if by_parameter is not None:
                square = by_parameter.detach().square().mean()
                self._squares[index] = self._squares.get(index, torch.zeros_like(square)) + square

    def block(self, signature: Signature) -> Block:
        """The sums for a signature."""
        if signature not in self._blocks:
            like = self._parameters.tensors[0].detach()
            block = Block.zeros(signature, self._parameters.shapes, like, self._limits.max_width)
            if signature[0] == "number":
                block.outputs += self._squares.get(signature[1], torch.zeros_like(block.outputs))
            self._blocks[signature] = block
        return self._blocks[signature]


def _ancestors(uses: list[Use]) -> set[Node]:
    """The nodes of the graph from which any use's output comes, itself not counted.

    A use that is not among them is the last one on its way to the loss.
    """
    found: set[Node] = set()
    waiting = [parent for use in uses for parent, _ in use.output.node.next_functions]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
    return found


def _observe(objective: Objective, parameters: FlatParameters, seed: int, targets: Targets, sums: _Sums) -> None:
    """Evaluates each part once and differentiates by the outputs of every linear map."""
    generator = torch.Generator(parameters.device).manual_seed(seed)
    for index, weight in enumerate(objective.weights):
        losses = ElementwiseLosses(generator) if targets == "sampled" else None
        watching = WatchingWeights(parameters.tensors, losses)
        with watching, torch.compiler.set_stance("force_eager"):  # compiled models run as written while watched
            loss = objective.evaluate(index).loss
        heads, seeds = _heads(loss, [] if losses is None else losses.elements, weight)
        with torch.enable_grad():
            inputs: list[Any] = [*(use.output for use in watching.uses), *parameters.tensors]
            found = torch.autograd.grad(heads, inputs, seeds, allow_unused=True)
        count = len(watching.uses)
        sums.add(watching.uses, list(found[:count]), list(found[count:]), weight)


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


def _resolve(signatures: set[Signature], parameters: FlatParameters, limits: Limits) -> list[Signature]:
    """One block for each parameter: as seen where it was seen in one way and fits, one number elsewhere."""
    owners = Counter(index for signature in signatures for index in signature[1:])
    single = [s for s in signatures if all(owners[index] == 1 for index in s[1:] if index >= 0)]
    itemsize = parameters.tensors[0].element_size()
    costs = {signature: Block.cost(signature, parameters.shapes, itemsize, limits.max_width) for signature in single}
    kept, spent = [], 0
    for signature in sorted(single, key=lambda s: (costs[s], s)):
        if limits.max_memory is None or spent + costs[signature] <= limits.max_memory:
            kept.append(signature)
            spent += costs[signature]
    covered = {index for signature in kept for index in signature[1:]}
    numbers: list[Signature] = [("number", i, -1) for i in range(len(parameters.tensors)) if i not in covered]
    return sorted([*kept, *numbers], key=lambda s: s[1])

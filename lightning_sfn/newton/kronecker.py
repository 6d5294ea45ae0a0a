"""`KroneckerFactors`: coordinates in which the curvature of each layer is about the identity.

The map is ``D = (A x S + damping)^(-1/2)`` for each layer (see `kronecker_blocks`), so that ``D H D`` is flat as
far as the factors tell, and a few Krylov vectors are left with what they do not tell: negative curvature above all.
"""

import contextlib
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.curvature import CurvatureOperator
from lightning_sfn.newton.kronecker_blocks import Block, BlockRoot
from lightning_sfn.newton.kronecker_estimate import FactorsError, Limits, Targets, estimated
from lightning_sfn.newton.kronecker_excess import Excess
from lightning_sfn.newton.objective import Objective
from lightning_sfn.newton.options import require_at_least, require_whole
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.preconditioner import Preconditioner

__all__ = ["KroneckerFactors"]

_SHIFT = 1.0  # quadratic mean of a layer's change of outputs that is always allowed: units saturate over a few of these
_RELATIVE_SHIFT = 0.1  # the same, relative to the outputs: for layers that are large for another reason


class KroneckerFactors(Preconditioner):
    """Kronecker-factored coordinates (after Martens and Grosse 2015): all data tell them first, then what products see.

    Linear maps, convolutions (one and two spatial dimensions, ungrouped), the recurrent layers ``nn.RNN``, ``nn.LSTM``
    and ``nn.GRU``, and ``nn.MultiheadAttention`` have two factors; embeddings have a diagonal for their rows; layer,
    batch, group and root-mean-square norms a diagonal. Every other parameter is scaled by one number, and so are

    * a weight that is used in two ways (tied weights), and layers over the memory limit;
    * recurrent layers on packed sequences, or with projections;
    * attention with ``add_bias_kv`` or ``add_zero_attn``, and the joint bias of separate projections (``kdim``);
    * recurrent layers and attention under activation checkpointing.

    `unfactored` names them.

    The packed projection of attention is one layer. Where query and key differ (cross attention), its input factor is
    that of both together.

    While there is much negative curvature, of which a Fisher matrix knows nothing, each estimate spends a product on
    more curvature along the factors' eigenvectors than the factors say. Subspaces allow for it (`Excess`), momentum
    steps do not.

    A step is shortened so that no hidden layer's outputs change by more than 1, or a tenth of their size, in the
    quadratic mean over units and cases: the first steps away from a saddle would otherwise saturate units.

    Factors come from targets drawn from the model where the loss is a cross entropy or squared error of
    `torch.nn.functional` (or a module of it), else from the gradients of the loss as it is.

    Args:
        model: Gives the parameters' names for `unfactored`; not needed otherwise.
        targets: ``"sampled"``, or ``"given"`` for gradients of the loss as it is in any case.
        refresh_every: Steps between estimates.
        average: Weight of what was known before in each new estimate, from 0 (forget) to less than 1.
        damping: Damping of the factors, relative to the largest product of mean diagonals of a layer.
        max_width: Factors wider than this are diagonal, as eigenvectors cost the cube of the width.
        max_memory: Bytes for factors, eigenvectors and scales; the layers that need most give way. No limit by default.
        min_rows: Factors are diagonal too where they are estimated from fewer rows of data than this for each unit of
            their width: what so few rows tell is not worth what the map costs.
        min_coverage: Share of the parameters that must belong to a layer with a rule; otherwise there are no factors.
        probes: Products that an estimate spends on curvature that the factors do not tell, at first and while the last
            subspace showed negative curvature of at least a tenth of its largest; 0 leaves the factors as they are.

    Attributes:
        memory: Bytes that factors, eigenvectors and scales take now.
        unfactored: Names of the parameters that are scaled by one number; known after the first step.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_sfn import SaddleFreeNewton
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> optimizer = SaddleFreeNewton(model.parameters(), krylov_dim=4, preconditioner=KroneckerFactors(model))
        >>> x, y = torch.randn(32, 3), torch.randn(32, 2)
        >>> loss = optimizer.step(lambda: torch.nn.functional.mse_loss(model(x), y))
        >>> optimizer.preconditioner.unfactored
        ()
    """

    name = "kronecker"
    unfactored: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        targets: Targets = "sampled",
        refresh_every: int = 3,
        average: float = 0.8,
        damping: float = 1e-4,
        max_width: int = 1536,
        max_memory: int | None = None,
        min_rows: float = 0.0,
        min_coverage: float = 0.0,
        probes: int = 1,
    ) -> None:
        if targets not in ("sampled", "given"):
            raise ValueError(f"targets is {targets!r}, but 'sampled' or 'given' is expected.")
        self.refresh_every = require_whole("refresh_every", refresh_every, 1)
        require_at_least("average", average, 0)
        require_at_least("damping", damping, 0)
        max_width = require_whole("max_width", max_width, 0)
        require_at_least("min_rows", min_rows, 0)
        self.probes = require_whole("probes", probes, 0)
        require_at_least("min_coverage", min_coverage, 0)
        if average >= 1:
            raise ValueError(f"average is {average}, but a number from 0 to less than 1 is expected.")
        if damping == 0:
            raise ValueError(f"damping is {damping}, but a positive number is expected.")
        if min_coverage > 1:
            raise ValueError(f"min_coverage is {min_coverage}, but a number from 0 to 1 is expected.")
        if max_memory is not None:
            require_at_least("max_memory", max_memory, 0)
        self._named = [] if model is None else list(model.named_parameters())
        self.targets: Targets = targets
        self.average, self.damping = average, damping
        self.limits, self.min_coverage = Limits(max_width, max_memory, min_rows), min_coverage
        self.reset()

    def reset(self) -> None:
        """Forgets the factors."""
        self._blocks: list[Block] = []
        self._excess: list[Excess] = []
        self._roots: list[BlockRoot] = []
        self._allowed: list[float] = []  # largest change of outputs for each layer with two factors
        self._last_layers: Tensor | None = None
        self._shapes: list[torch.Size] = []
        self._caution, self._shortens = 1.0, False
        self._age = 0
        self.unfactored = ()

    @property
    def memory(self) -> int:
        """Bytes of factors, eigenvectors and scales."""
        kept = zip(self._blocks, self._roots, strict=True)
        return sum(2 * (b.inputs.nbytes + b.outputs.nbytes) + root.scale.nbytes for b, root in kept)

    @property
    def is_known(self) -> bool:
        """Whether there are factors; until then the map is the identity."""
        return bool(self._roots)

    def default_krylov_dim(self, bent: bool) -> int:
        """4 while there is much negative curvature, else 1."""
        return 4 if bent else 1  # the factors know most of what further ones would tell

    # ------------------------------------------------------------------------------------------------ estimation

    def refresh(
        self,
        operator: CurvatureOperator,
        generator: torch.Generator,
        bent: bool = True,
        whole: Objective | None = None,
    ) -> None:
        """Estimates the factors anew, every few steps; warns where they cannot be had."""
        try:
            self.renew(operator, generator, bent, whole)
        except FactorsError as error:
            warnings.warn(f"{error}: those of an earlier step, if any, stay in use.", stacklevel=3)

    def renew(
        self,
        operator: CurvatureOperator,
        generator: torch.Generator,
        bent: bool = True,
        whole: Objective | None = None,
    ) -> None:
        """`refresh` for callers that have something else where there are no factors.

        The factors see the operator's objective; a first estimate sees ``whole``, where that is more.

        Raises:
            FactorsError: They cannot be had, on all processes alike; those of an earlier step, if any, stay.
            ProcessError: Another process failed.
        """
        if 0 < self._age < self.refresh_every:
            self._age += 1
            return
        parameters = operator.parameters
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        self._age = 1
        blocks = self._estimated(operator.objective, parameters, seed)
        if not self._blocks and whole is not None and _any_sees_a_part(operator.objective, whole):
            # One look at a part has eigenvalues far below the true ones: just along these momentum goes astray.
            with contextlib.suppress(FactorsError):  # for want of memory: then the part must do
                blocks = self._estimated(whole, parameters, seed)
        self._shapes = list(parameters.shapes)
        if not bent:
            self._excess = []  # it would stay as it was then: along the valley factors know better
        alone = self._adopt(self._averaged(blocks))
        for _ in range(self.probes if bent else 0):
            self._probe(alone, operator, generator)
        self._allowed, self._last_layers = self._allowed_shifts(parameters), None
        names = {id(p): name for name, p in self._named}  # made here: copies of model and optimizer have other ids
        self.unfactored = tuple(
            names.get(id(parameters.tensors[block.signature[1]]), f"parameter {block.signature[1]}")
            for block in blocks
            if block.signature[0] == "number"
        )

    def _estimated(self, objective: Objective, parameters: FlatParameters, seed: int) -> list[Block]:
        """A single estimate, if it is one to build on."""
        blocks = estimated(objective, parameters, seed, self.targets, self.limits)
        magnitudes = _magnitudes(blocks)
        if not all(map(math.isfinite, magnitudes)) or max(magnitudes) == 0:
            raise FactorsError("Kronecker factors are zero or not finite at the present parameters")
        if _coverage(blocks, parameters.shapes) < self.min_coverage:
            raise FactorsError("Too few of the parameters belong to layers that have Kronecker factors")
        return blocks

    def _averaged(self, blocks: list[Block]) -> list[Block]:
        """The moving average of the factors, where they are about the same uses of the weights as before."""
        layouts = ([(b.signature, b.inputs.shape, b.outputs.shape) for b in each] for each in (blocks, self._blocks))
        if len({tuple(layout) for layout in layouts}) > 1:
            return blocks
        for block, before in zip(blocks, self._blocks, strict=True):
            block.inputs.lerp_(before.inputs, self.average)
            block.outputs.lerp_(before.outputs, self.average)
        return blocks

    def _allowed_shifts(self, parameters: FlatParameters) -> list[float]:
        """By how much outputs of hidden layers may change in a step; the last layers' are for the loss to judge."""
        sizes = self._shifts(parameters.read().unsqueeze(0))
        hidden = [block.hidden for block in self._blocks if block.is_product]
        allowed = [max(_SHIFT, _RELATIVE_SHIFT * size) for size in (torch.cat(sizes).tolist() if sizes else [])]
        return [most if inner else math.inf for most, inner in zip(allowed, hidden, strict=True)]

    def _adopt(self, blocks: list[Block]) -> list[BlockRoot]:
        """Takes over factors, with the excess, if any, that is known over others of the same layout.

        Returns:
            The roots of the factors alone.
        """
        damping = self.damping * max(_magnitudes(blocks))
        alone = [block.root(damping) for block in blocks]
        if [excess.shape for excess in self._excess] != [root.scale.shape for root in alone]:
            self._excess = []
        self._blocks, self._roots = blocks, _lessened(alone, self._excess) if self._excess else alone
        return alone

    def _probe(self, alone: list[BlockRoot], operator: CurvatureOperator, generator: torch.Generator) -> None:
        """Looks for curvature that the factors alone do not tell."""
        parameters = operator.parameters
        probe = parameters.random(generator)
        image = self.scale(operator.matvec(self.scale(probe)))
        if not bool(torch.isfinite(image).all()):
            return  # the products of the step will say so
        pieces = self._pieces(image.unsqueeze(0))
        along = [root.along(pieces)[0] for root in self._roots]
        before = self._excess or [Excess.none(root.scale) for root in alone]
        self._excess = [excess.after(each) for excess, each in zip(before, along, strict=True)]
        self._roots = _lessened(alone, self._excess)

    # ------------------------------------------------------------------------------------------------ the map

    def scale(self, vectors: Tensor) -> Tensor:
        """``D v``."""
        return self._map(vectors, 1, self._roots)

    def unscale(self, vectors: Tensor) -> Tensor:
        """``D^-1 v``."""
        return self._map(vectors, -1, self._roots)

    def precondition(self, vectors: Tensor) -> Tensor:
        """``D^2 v`` for the factors alone: allowing for an excess costs momentum more than it brings."""
        without = (root.lessened(1 / each.product) for root, each in zip(self._roots, self._excess, strict=True))
        return self._map(vectors, 2, without if self._excess else self._roots)

    def shares(self, steps: Tensor, *, straight: bool = False) -> Tensor:
        """So much of each step that no hidden layer's outputs change by more than 1, or a tenth of their size.

        Longer steps saturate units. Their gradients vanish with them, and no curvature tells the way back. Last layers
        go the whole way: were they held back with the others, targets of another size than the outputs would have to be
        reached in many small steps, and by hidden units that saturate on the way.
        """
        if not self._allowed:
            return super().shares(steps, straight=straight)
        shifts = torch.stack(self._shifts(steps)).double().cpu()
        limits = self._caution * torch.tensor(self._allowed, dtype=torch.float64, device="cpu").unsqueeze(1)
        shares = (limits / shifts).amin(0).clamp_max(1.0).unsqueeze(1).to(steps)
        self._shortens = bool((shares < 1).any())
        if straight or not self._shortens:
            return shares
        if self._last_layers is None:
            self._last_layers = self._find_last_layers(steps.device)
        return torch.where(self._last_layers, 1.0, shares)

    def _find_last_layers(self, device: torch.device) -> Tensor:
        """Which parameters belong to layers whose outputs may change by as much as the loss allows, shape ``(n,)``."""
        layers = zip((block for block in self._blocks if block.is_product), self._allowed, strict=True)
        last = {index for block, most in layers if math.isinf(most) for index in block.signature[1:]}
        sizes = torch.tensor([shape.numel() for shape in self._shapes], device=device)
        known = torch.tensor([index in last for index in range(len(self._shapes))], device=device)
        return known.repeat_interleave(sizes)

    def feedback(self, *, accepted: bool, store: BasisStore) -> None:
        """Allows a quarter where a shortened step was too long, and twice as much again after one that was taken.

        More damping would not help hidden layers: all steps of theirs along one direction that are too long are
        shortened to the same one.
        """
        if accepted:
            self._caution = min(1.0, 2 * self._caution)
        elif store.agreed(float(self._shortens))[0]:
            self._caution /= 4

    def _shifts(self, steps: Tensor) -> list[Tensor]:
        pieces = self._pieces(steps)
        return [block.shift(pieces) for block in self._blocks if block.is_product]

    def _pieces(self, rows: Tensor) -> list[Tensor]:
        """Rows of shape ``(c, n)`` taken apart by parameters."""
        split = torch.split(rows, [shape.numel() for shape in self._shapes], dim=1)
        return [piece.reshape(-1, *shape) for piece, shape in zip(split, self._shapes, strict=True)]

    def _map(self, vectors: Tensor, power: int, roots: Iterable[BlockRoot]) -> Tensor:
        if not self._roots:
            return vectors
        rows = vectors.reshape(-1, vectors.shape[-1])
        pieces = self._pieces(rows)
        for root in roots:
            root.apply(pieces, power)
        return torch.cat([piece.reshape(len(rows), -1) for piece in pieces], 1).view_as(vectors)

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The factors, and how many steps they have been in use."""
        if not self._blocks:
            return {"age": self._age}
        blocks = [(list(block.signature), block.inputs.clone(), block.outputs.clone()) for block in self._blocks]
        shapes = [list(shape) for shape in self._shapes]
        own = {"blocks": blocks, "shapes": shapes, "limits": list(self._allowed), "caution": self._caution}
        own["shortens"] = self._shortens  # a step may be taken back first, before any is measured
        own["excess"] = [(excess.rows.clone(), excess.columns.clone()) for excess in self._excess]
        return own | {"age": self._age, "unfactored": list(self.unfactored)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over factors."""
        self.reset()
        self._age = int(state.get("age", 0))
        if "blocks" not in state:
            return
        self._shapes = [torch.Size(shape) for shape in state["shapes"]]
        blocks = []
        for (kind, weight, bias), inputs, outputs in state["blocks"]:
            blocks.append(Block((kind, weight, bias), inputs.clone(), outputs.clone()))
        known = state["excess"] if self.probes else ()  # without probes it would stay for ever
        self._excess = [Excess(rows.clone(), columns.clone()) for rows, columns in known]
        self._adopt(blocks)
        self._allowed, self._caution = list(state["limits"]), state["caution"]
        self._shortens = state["shortens"]
        self.unfactored = tuple(state["unfactored"])


def _magnitudes(blocks: list[Block]) -> list[float]:
    """How large the blocks' entries are; the host waits once for all of them."""
    return cast("list[float]", torch.stack([block.magnitude for block in blocks]).tolist())


def _lessened(roots: list[BlockRoot], excess: list[Excess]) -> list[BlockRoot]:
    return [root.lessened(each.product) for root, each in zip(roots, excess, strict=True)]


def _any_sees_a_part(seen: Objective, whole: Objective) -> bool:
    """Whether products see less than the whole on any process: an estimate needs all of them."""
    part = seen is not whole
    return part if seen.processes is None else any(seen.processes.collect(part))


def _coverage(blocks: list[Block], shapes: Sequence[torch.Size]) -> float:
    """Share of the parameters that the loss depends on which belong to a layer with a rule."""
    loose = [b for b in blocks if b.signature[0] == "number" and bool(b.outputs.any())]
    factored = {index for b in blocks if b.signature[0] != "number" for index in b.signature[1:] if index >= 0}
    inside, outside = (
        sum(shapes[index].numel() for index in indices) for indices in (factored, {b.signature[1] for b in loose})
    )
    return inside / max(inside + outside, 1)

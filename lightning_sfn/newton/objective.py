"""The objective: a loss as one fixed function of the parameters.

An objective is a weighted mean of parts (micro-batches). Every evaluation of a part starts from the same random number
state, so gradient, Hessian-vector products and trial losses of one step see one function: the same data, the same
dropout masks, the same weights. Mixed precision is that of the place where the objective was made.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from lightning_sfn.newton.precision import Autocast
from lightning_sfn.newton.processes import Processes, ProcessMean
from lightning_sfn.newton.randomness import RandomState

__all__ = ["Closure", "Evaluation", "Objective", "ObjectiveError"]

_REPEATABLE = 1e-4  # relative difference of two evaluations at one point that nondeterministic kernels explain

Output = Tensor | Distribution
"""What a loss was computed from: model output, losses of single cases, or the predicted distribution."""

Closure = Callable[[], Tensor | tuple[Tensor, Output]]
"""A function without arguments that returns the scalar loss with its graph, or ``(loss, output)``."""


class ObjectiveError(ValueError):
    """A closure did not return a loss that can be optimized."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one part.

    Attributes:
        loss: Scalar loss with its graph.
        output: What the loss was computed from, if the closure gave it (other curvatures than the Hessian need it).
    """

    loss: Tensor
    output: Output | None = None


class Objective:
    """A weighted mean of closures, evaluated again and again as the same function.

    Args:
        closures: One closure for each part. A closure returns the part's mean loss with its graph, or a pair of the
            loss and the model output. It runs several times, must not call ``backward``, and may use torch's, NumPy's
            and Python's global random numbers freely: they are replayed.
        weights: Relative weights of the parts, for instance their numbers of cases. Equal if left out.
        random_states: The random number state of each part; by default the state found at its first evaluation.
        self_seeding: Whether the closures set the random numbers themselves, so that nothing is to be replayed.
        reduce: Mean over processes of a tensor, for objectives shared out over several devices: a `ProcessMean`.

    Attributes:
        weights: The parts' weights, adding up to 1.
        sizes: The weights as they were given: comparable between objectives.
        device: Where the parameters are, as soon as somebody says so; random numbers of that device are replayed.

    Raises:
        ObjectiveError: There are no closures, or the weights do not fit.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> Objective([lambda: (x**2).sum(), lambda: x.sum()], weights=[3, 1]).value()
        2.0
    """

    def __init__(
        self,
        closures: Sequence[Closure],
        weights: Sequence[float] | None = None,
        *,
        random_states: Sequence[RandomState | None] | None = None,
        self_seeding: bool = False,
        reduce: ProcessMean | None = None,
    ) -> None:
        if not closures:
            raise ObjectiveError("An objective needs at least one closure, but none was given.")
        for closure in closures:
            if not callable(closure):
                raise ObjectiveError(
                    f"The loss was given as a {type(closure).__name__}, but a function that computes it is expected, "
                    "since it is evaluated again and again: write lambda: loss_fn(model(inputs), targets)."
                )
        weights = [1.0] * len(closures) if weights is None else [float(w) for w in weights]
        if len(weights) != len(closures) or any(not math.isfinite(w) or w <= 0 for w in weights):
            raise ObjectiveError(
                f"An objective of {len(closures)} parts needs as many positive weights, but was given {weights}."
            )
        total = sum(weights)
        self.weights = tuple(w / total for w in weights)
        self.sizes = tuple(weights)
        self._closures = tuple(closures)
        self._states: list[RandomState | None] = list(random_states or [None] * len(closures))
        self._self_seeding = self_seeding
        self._reduce = reduce
        self._autocast = Autocast()
        self.device: torch.device | None = None

    def __len__(self) -> int:
        """Number of parts."""
        return len(self._closures)

    def evaluate(self, index: int) -> Evaluation:
        """Evaluates one part with its graph.

        The first evaluation draws from the global random number generators as any call would; later ones replay those
        draws and leave the generators alone.

        Args:
            index: Which part.

        Returns:
            The part's loss (not weighted) and model output.

        Raises:
            ObjectiveError: The closure returned something else than a real scalar tensor.
        """
        state = self._states[index]
        # Losses that differentiate inside (physics-informed ones) need grad mode even where no gradient is asked for.
        with torch.enable_grad(), self._autocast.restored():
            if self._self_seeding:
                result = self._closures[index]()
            elif state is None:
                self._states[index] = RandomState.capture(_accelerator(self.device))
                result = self._closures[index]()
            else:
                with state.replayed():
                    result = self._closures[index]()
            if isinstance(result, tuple) and len(result) != 2:
                raise ObjectiveError(
                    f"The closure returned a tuple of {len(result)}, but the scalar loss, or a pair of loss and model "
                    "output, is expected: leave the rest out."
                )
            loss, output = result if isinstance(result, tuple) else (result, None)
            if not isinstance(loss, Tensor):
                raise ObjectiveError(
                    f"The closure returned {type(loss).__name__}, but a scalar tensor with its graph is expected: "
                    "return the loss itself, without .item()."
                )
            if loss.numel() != 1 or not loss.is_floating_point():
                raise ObjectiveError(
                    f"The closure returned a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}, but a real "
                    "scalar loss is expected: reduce it, for instance by .mean()."
                )
            return Evaluation(loss.reshape(()), output)

    def value(self) -> float:
        """The objective at the present parameters, without keeping a graph.

        Returns:
            The weighted mean of the parts, accumulated in float64; NaN or infinite where the closures say so.

        Raises:
            ProcessError: A closure failed on another process.
        """
        nothing = torch.full((), math.nan, dtype=torch.float64, device="cpu")
        value = self.reduce(self.guarded(self.local_value, nothing))
        self.require_sound(value, far=True)
        return float(value)

    def local_value(self) -> Tensor:
        """This process' share of `value`, as a float64 scalar on the loss' device."""
        losses = [self.evaluate(index).loss.detach().double() * weight for index, weight in enumerate(self.weights)]
        return torch.stack(losses).sum()

    def require_repeatable(self, value: float) -> None:
        """Evaluates again at the same parameters: the value must be the same, or no comparison means anything.

        Args:
            value: What an earlier evaluation gave.

        Raises:
            ObjectiveError: The two differ by more than nondeterministic kernels explain.
        """
        again = self.value()
        if not abs(again - value) <= _REPEATABLE * max(abs(value), abs(again)):
            raise ObjectiveError(
                f"The loss was {value:.8g} and then {again:.8g} at the same parameters, but it must be a fixed "
                "function within one step: draw the batch outside of it and leave the batch unchanged, draw random "
                "numbers from torch's, NumPy's or Python's global generators, which are replayed, and keep modules "
                "that update themselves in each forward pass (spectral_norm) in eval()."
            )

    def local(self) -> "Objective":
        """The same parts, with the same random numbers, without the mean over processes."""
        objective = Objective(self._closures, self.weights, self_seeding=self._self_seeding)
        objective._states, objective.device, objective._autocast = self._states, self.device, self._autocast
        return objective

    @property
    def is_shared(self) -> bool:
        """Whether several processes evaluate it together, so that all of them must do the same."""
        return self._reduce is not None

    # ------------------------------------------------------------------------------------------------ processes

    @property
    def processes(self) -> Processes | None:
        """The processes that share it; ``None`` if one evaluates it alone."""
        return None if self._reduce is None else self._reduce.processes

    def reduce(self, tensor: Tensor) -> Tensor:
        """Mean of a tensor over the processes that share this objective (the tensor itself if there is one)."""
        return tensor if self._reduce is None else self._reduce(tensor)

    def reduce_part(self, vector: Tensor) -> Tensor:
        """This process' part of the mean of vectors of shape ``(n,)`` (the vector itself if there is one process)."""
        return vector if self._reduce is None else self._reduce.part(vector)

    def reduce_with(self, values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of values over the processes, and rank zero's version of other numbers, in one collective."""
        return (values, numbers) if self._reduce is None else self._reduce.with_numbers(values, numbers)

    def guarded(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """What a computation gives, or NaN where it fails on one of several processes (see `Processes.guard`)."""
        return compute() if self._reduce is None else self._reduce.processes.guard(compute, like)

    def require_sound(self, reduced: Tensor, *, far: bool = False) -> None:
        """Where a reduced tensor is not finite: raises on all processes, naming the one that is to blame.

        Args:
            reduced: What `reduce` gave.
            far: Whether it was evaluated at a point where it may overflow on some processes alone: then only a failed
                evaluation is to blame.
        """
        if self._reduce is not None and not bool(torch.isfinite(reduced).all()):
            self._reduce.processes.require_sound(blame_nan=not far)


def _accelerator(parameters: torch.device | None) -> torch.device | None:
    """The CUDA device whose random numbers are replayed as well: that of the parameters, or else the current one."""
    if parameters is not None and parameters.type == "cuda":
        return parameters
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.device("cuda", torch.cuda.current_device()) if in_use else None

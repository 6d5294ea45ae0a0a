"""Methods of first order, fast enough for hundreds of thousands of updates.

One update is a fixed sequence of kernels on tensors that stay where they are: the next images are taken by a counter on
the device, learning rate and momentum are numbers on the device. On CUDA it is captured once as a graph and replayed;
elsewhere the same function runs as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_sfn.experiments.figure4_autoencoder import momentum_schedule
from lightning_sfn.experiments.plateau import Problem
from paper_scale.method import Counts

__all__ = ["Adam", "Captured", "FirstOrder", "Momentum", "Schedule"]

_TAIL_MOMENTUM = 0.9
_WARM_UP = 3  # runs before a capture, as CUDA graphs need


@dataclass(frozen=True)
class Schedule:
    """Learning rate and momentum of every update.

    Attributes:
        rate: Learning rate at the start.
        planned: Number of updates.
        momentum: Where the momentum schedule ends.
        tail: Last updates, which have a momentum of at most 0.9.
        decays: Whether the learning rate falls linearly to 0.
    """

    rate: float
    planned: int
    momentum: float = 0.0
    tail: int = 0
    decays: bool = False

    def at(self, update: int) -> tuple[float, float]:
        """Learning rate and momentum of an update, counted from 0 (Sutskever et al. 2013, Equation 5)."""
        rate = self.rate * max(0.0, 1 - update / self.planned) if self.decays else self.rate
        late = update >= self.planned - self.tail
        return rate, momentum_schedule(update, largest=min(self.momentum, _TAIL_MOMENTUM) if late else self.momentum)


class Rule(Protocol):
    """How gradients change the parameters; all on tensors that stay where they are."""

    tensors: tuple[Tensor, ...]

    def before(self, point: Tensor, momentum: Tensor) -> None:
        """Moves the parameters to where the gradient is taken."""

    def after(self, point: Tensor, gradient: Tensor, rate: Tensor, momentum: Tensor) -> None:
        """Moves them to where the update ends."""


class Momentum:
    """``v <- mu v - rate g``, ``x <- x + v``, with the gradient at x (classical) or at ``x + mu v`` (Nesterov).

    Sutskever et al. (2013), Equations 1 to 4. `torch.optim.SGD` takes the momentum as a number of the host, which a
    captured graph cannot change.

    Args:
        point: The parameters, shape ``(n,)``.
        nesterov: Which of the two.
    """

    def __init__(self, point: Tensor, *, nesterov: bool) -> None:
        self.velocity = torch.zeros_like(point)
        self.nesterov = nesterov
        self.tensors = (self.velocity,)

    def before(self, point: Tensor, momentum: Tensor) -> None:
        """Decays the velocity, and looks ahead along it."""
        self.velocity.mul_(momentum)
        if self.nesterov:
            point.add_(self.velocity)

    def after(self, point: Tensor, gradient: Tensor, rate: Tensor, momentum: Tensor) -> None:
        """Adds the gradient; where the parameters are ahead already, only that is left to be done."""
        gradient.mul_(rate)
        self.velocity.sub_(gradient)
        if self.nesterov:
            point.sub_(gradient)
        else:
            point.add_(self.velocity)


class Adam:
    """`torch.optim.Adam` on the parameters as one vector.

    Args:
        point: The parameters, shape ``(n,)``.
    """

    def __init__(self, point: Tensor) -> None:
        self._point = torch.nn.Parameter(point)
        self._rate = torch.zeros((), device=point.device)
        on_cuda = point.device.type == "cuda"
        self._adam = torch.optim.Adam([self._point], lr=self._rate, fused=True, capturable=on_cuda)
        self._point.grad = torch.zeros_like(point)
        self._adam.step()  # a rate of zero: only makes the state
        state = self._adam.state[self._point]
        state["step"].zero_()
        self.tensors = (state["step"], state["exp_avg"], state["exp_avg_sq"])

    def before(self, point: Tensor, momentum: Tensor) -> None:
        """The gradient is taken where the parameters are."""

    def after(self, point: Tensor, gradient: Tensor, rate: Tensor, momentum: Tensor) -> None:
        """One step of Adam."""
        self._rate.copy_(rate)
        self._point.grad = gradient
        self._adam.step()


class Captured:
    """A function of fixed tensors: a CUDA graph where there is CUDA, else the function itself.

    Args:
        function: Reads and changes tensors that stay where they are, and nothing else.
        changed: The tensors that it changes; warming up leaves them as they were.
    """

    def __init__(self, function: Callable[[], None], changed: tuple[Tensor, ...]) -> None:
        self._run = function
        if changed[0].device.type == "cuda":
            self._run = self._capture(function, changed)

    def __call__(self) -> None:
        """Runs it once."""
        self._run()

    @staticmethod
    def _capture(function: Callable[[], None], changed: tuple[Tensor, ...]) -> Callable[[], None]:
        before = [tensor.clone() for tensor in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        return graph.replay


class FirstOrder:
    """A rule, applied to mini-batches of the training images, one epoch at a time.

    Args:
        problem: The problem; its parameters become views of one vector.
        make_rule: Makes the rule for that vector.
        schedule: Rates and momenta.
        batch_size: Images in a mini-batch; what is left over at the end of an epoch waits for the next.
        seed: Of the order of the images.
        max_grad_norm: Gradients are clipped to this norm; not at all if None.
    """

    def __init__(
        self,
        problem: Problem,
        make_rule: Callable[[Tensor], Rule],
        schedule: Schedule,
        *,
        batch_size: int,
        seed: int,
        max_grad_norm: float | None = None,
    ) -> None:
        self._max_grad_norm = max_grad_norm
        self.problem, self.schedule, self.counts = problem, schedule, Counts()
        self._parameters = list(problem.model.parameters())
        self._point = _as_one(self._parameters)
        self._rule = make_rule(self._point)
        device, count = self._point.device, len(problem.cases)
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.arange(count, device=device)
        self._next = torch.arange(batch_size, device=device)
        self._rate, self._momentum = torch.zeros((), device=device), torch.zeros((), device=device)
        self.updates_per_epoch = count // batch_size
        self._share = batch_size / count
        self._update = Captured(self._one_update, (self._point, self._next, *self._rule.tensors))

    @property
    def finished(self) -> bool:
        """Whether all planned updates are done."""
        return self.counts.updates >= self.schedule.planned

    def advance(self) -> None:
        """One epoch, or what is left of the plan."""
        order = torch.randperm(len(self.problem.cases), generator=self._generator)
        self._order.copy_(order)
        torch.arange(len(self._next), out=self._next)
        known: tuple[float, float] | None = None
        done = self.counts.updates
        for update in range(done, min(done + self.updates_per_epoch, self.schedule.planned)):
            if known != (known := self.schedule.at(update)):
                self._rate.fill_(known[0])
                self._momentum.fill_(known[1])
            self._update()
            self.counts.updates += 1
        self.counts.gradients += (self.counts.updates - done) * self._share

    def _one_update(self) -> None:
        images = self.problem.cases.index_select(0, self._order.index_select(0, self._next))
        self._next.add_(len(self._next))
        self._rule.before(self._point, self._momentum)
        parts = torch.autograd.grad(self.problem.loss(images), self._parameters)
        gradient = torch.cat([part.flatten() for part in parts])
        if self._max_grad_norm is not None:
            gradient.mul_((self._max_grad_norm / gradient.norm()).clamp_max(1.0))
        self._rule.after(self._point, gradient, self._rate, self._momentum)

    def state_dict(self) -> dict[str, Any]:
        """The rule's tensors, the generator and the counts; the parameters are kept by the caller."""
        return {
            "rule": [tensor.clone() for tensor in self._rule.tensors],
            "generator": self._generator.get_state(),
            "counts": self.counts.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave, in place: a captured graph knows the tensors by their addresses."""
        for tensor, value in zip(self._rule.tensors, state["rule"], strict=True):
            tensor.copy_(value)
        self._generator.set_state(state["generator"].cpu())
        self.counts = Counts(**state["counts"])


@torch.no_grad()
def _as_one(parameters: list[torch.nn.Parameter]) -> Tensor:
    """One vector of shape ``(n,)`` that the parameters become views of."""
    point = torch.cat([parameter.flatten() for parameter in parameters])
    offset = 0
    for parameter in parameters:
        parameter.data = point[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    return point

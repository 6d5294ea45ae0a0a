"""Replay: evaluate a module's `training_step` again without leaving a trace.

Lightning runs `training_step` once for each batch. Curvature needs it many more times, on the same batch with the same
random numbers, and none of those runs may be seen in logs, metrics, buffers, counters or random number streams.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint
from torch.utils._pytree import tree_map

from lightning_sfn.newton.objective import Closure, ObjectiveError
from lightning_sfn.newton.processes import Processes
from lightning_sfn.newton.randomness import RandomState

__all__ = [
    "Isolation",
    "RecordedStep",
    "StepRecorder",
    "evaluate",
    "is_mixed",
    "isolated",
    "loss_of",
    "own_containers",
    "processes_of",
    "replay_closure",
]

_CONTAINERS = (list, dict, set, deque)


@dataclass(frozen=True)
class RecordedStep:
    """One call of `training_step` as Lightning made it.

    Attributes:
        args: Its positional arguments (batch, batch index, ...); containers are copied, tensors are not.
        kwargs: Its keyword arguments.
        random_state: State of the random number generators just before the call.
        loss: The loss that it returned, detached; ``None`` if it returned none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: RandomState
    loss: Tensor | None


class StepRecorder:
    """Notes every `training_step` that Lightning runs, at the one place where its arguments and random state are exact.

    Args:
        trainer: The Trainer whose strategy calls `training_step`.
        device: The module's device, whose generator is part of the random state.
    """

    def __init__(self, trainer: Trainer, device: torch.device) -> None:
        """See the class."""
        self._strategy = trainer.strategy
        self._device = device
        self._recorded: list[RecordedStep] = []
        self._active = True
        self._original: Callable[..., Any] = self._strategy.training_step
        # An attribute of the instance, in front of the class' method.
        self._strategy.__dict__["training_step"] = self._record

    def _record(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active:
            return self._original(*args, **kwargs)
        state = RandomState.capture(self._device)
        kept_args, kept_kwargs = own_containers((args, kwargs))
        output = self._original(*args, **kwargs)
        loss = loss_of(output)
        self._recorded.append(RecordedStep(kept_args, kept_kwargs, state, None if loss is None else loss.detach()))
        return output

    def take(self) -> list[RecordedStep]:
        """The steps recorded since the last call."""
        taken, self._recorded = self._recorded, []
        return taken

    def detach(self) -> None:
        """Stops recording."""
        self._active = False
        self._recorded = []
        if self._strategy.__dict__.get("training_step") != self._record:
            return  # somebody has put a wrapper around ours, which now only passes on
        if getattr(self._original, "__func__", None) is type(self._strategy).training_step:
            del self._strategy.__dict__["training_step"]
        else:
            self._strategy.__dict__["training_step"] = self._original


def own_containers(value: Any) -> Any:
    """The value with its lists, tuples and dictionaries copied: a step may take its batch apart."""
    return tree_map(lambda leaf: leaf, value)


def loss_of(output: Any) -> Tensor | None:
    """The loss in what `training_step` returned: a tensor, a mapping with ``"loss"``, or nothing."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    return output if isinstance(output, Tensor) else None


def processes_of(trainer: Trainer) -> Processes | None:
    """The Trainer's processes; ``None`` if there is one.

    Args:
        trainer: The Trainer.
    """
    return None if trainer.world_size == 1 else Processes()


def replay_closure(
    trainer: Trainer,
    module: LightningModule,
    recorded: RecordedStep,
    *,
    with_output: bool = False,
    dtype: torch.dtype | None = None,
) -> Closure:
    """A closure that evaluates a recorded step again, in isolation, on the unwrapped module.

    Args:
        trainer: The module's Trainer.
        module: The module.
        recorded: The step.
        with_output: Whether the closure returns the pair of loss and model output, for the Gauss-Newton matrix. The
            output is what `training_step` returned as ``"output"`` beside the loss, or else what `forward` returned.
        dtype: torch's default dtype in the replay; the Trainer's precision decides if it is left out.

    Returns:
        A closure for an `Objective`, which replays the random numbers.
    """

    def closure() -> Any:
        with isolated(trainer, module), _default_dtype(dtype):
            return evaluate(module, recorded, with_output=with_output)

    return closure


def evaluate(module: LightningModule, recorded: RecordedStep, *, with_output: bool = False) -> Any:
    """Runs a recorded step again.

    Args:
        module: The module, isolated.
        recorded: The step.
        with_output: Whether the model output is wanted too, for Gauss-Newton products.

    Returns:
        The scalar loss with its graph, or the pair of loss and output.

    Raises:
        ObjectiveError: The step returned no loss, or no output where one is wanted.
    """
    with _noted_forward(module, with_output) as forwarded:
        args, kwargs = own_containers((recorded.args, recorded.kwargs))
        returned = module.training_step(*args, **kwargs)
    loss = loss_of(returned)
    if loss is None:
        raise ObjectiveError(
            "training_step returned no loss in a replay, but it did in training: let it return the loss whenever "
            "it is given the same batch."
        )
    return (loss, _output_of(module, returned, forwarded)) if with_output else loss


@contextmanager
def _noted_forward(module: nn.Module, wanted: bool) -> Iterator[list[Any]]:
    """Collects what the module's own `forward` returns in the body."""
    returned: list[Any] = []
    hook = module.register_forward_hook(lambda _, __, output: returned.append(output)) if wanted else None
    try:
        yield returned
    finally:
        if hook is not None:
            hook.remove()


def _output_of(module: nn.Module, returned: Any, forwarded: list[Any]) -> Tensor:
    output = returned.get("output") if isinstance(returned, Mapping) else None
    if output is None and len(forwarded) == 1:
        output = forwarded[0]
    if not isinstance(output, Tensor):
        raise ObjectiveError(
            f"curvature='gauss_newton' needs the model output, but training_step of {type(module).__name__} gives "
            "none: let it return {'loss': loss, 'output': output}, or call self(...) once and get a tensor."
        )
    return output


@contextmanager
def isolated(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Runs the body, one evaluation of `training_step`, in an `Isolation` of its own.

    Args:
        trainer: The module's Trainer.
        module: The module.
    """
    with Isolation(trainer, module) as isolation:
        isolation.rewind()
        yield


class Isolation:
    """Keeps evaluations of a module's `training_step` from leaving a trace, and lets them be differentiated twice.

    A context manager. Inside, logging is switched off and loggers are dummies; attention runs in its math kernel,
    recurrent layers without cuDNN, compiled modules eagerly, activation checkpoints without reentry, and automatic
    mixed precision is off, since Lanczos amplifies rounding noise. `rewind` puts the module back to the state at the
    beginning, so that each evaluation after it is the same function. At the end every attribute of every submodule is
    what it was (buffers and other tensors, torchmetrics states, counters, the contents of lists, dictionaries and
    sets), and so are the global random numbers.

    Tensors are copied before an evaluation changes them in place. Not undone are in-place changes of tensors inside
    lists and dictionaries, and changes of anything outside the module.

    Args:
        trainer: The module's Trainer.
        module: The module.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        """See the class."""
        self._trainer, self._module = trainer, module
        self._stack = ExitStack()
        self._before: list[_Saved] = []
        self._tensors: list[tuple[dict[str, Any], str, Tensor]] = []

    def __enter__(self) -> "Isolation":
        """Notes the module's state."""
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if "torch._dynamo" in sys.modules:  # only then can anything have been compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_differentiable_checkpoints())
            stack.enter_context(_full_precision(self._trainer))
            stack.enter_context(_untouched_trainer(self._trainer))
            stack.callback(RandomState.capture(self._module.device).restore)
            self._before = [_Saved.of(submodule) for submodule in self._module.modules()]
            self._tensors = [place for saved in self._before for place in saved.tensors()]
            stack.callback(self._restore)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leaves everything as it was."""
        self._stack.close()

    def rewind(self) -> None:
        """Puts the module back to the beginning, with copies in place of its tensors."""
        self._restore()
        copies: dict[int, Tensor] = {}
        for attributes, name, tensor in self._tensors:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.clone()
            attributes[name] = copies[id(tensor)]
        for saved in self._before:
            if saved.logs:
                saved.attributes.update(log=_log_nothing, log_dict=_log_nothing)

    def _restore(self) -> None:
        for saved in self._before:
            saved.restore()


@dataclass(frozen=True)
class _Saved:
    """A submodule's attributes as they were: the objects, and the contents of plain containers.

    Attributes:
        attributes: The submodule's ``__dict__``.
        values: A copy of it.
        contents: Pairs of each container among the values, at any depth, and a copy of it.
        logs: Whether the submodule has Lightning's logging methods.
    """

    attributes: dict[str, Any]
    values: dict[str, Any]
    contents: list[tuple[Any, Any]]
    logs: bool

    @classmethod
    def of(cls, submodule: nn.Module) -> "_Saved":
        attributes = submodule.__dict__
        contents = [(container, container.copy()) for container in _containers(attributes.values(), set())]
        return cls(attributes, attributes.copy(), contents, hasattr(submodule, "training_step"))

    def tensors(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Where the submodule's own tensors stand, parameters apart: buffers and plain attributes."""
        for attributes in (self.attributes, self.attributes["_buffers"]):
            for name, value in attributes.items():
                if isinstance(value, Tensor) and not value.requires_grad and not isinstance(value, nn.Parameter):
                    yield attributes, name, value

    def restore(self) -> None:
        self.attributes.clear()
        self.attributes.update(self.values)
        for container, copy in self.contents:
            if container or copy:
                _refill(container, copy)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of `log` and `log_dict` in a replay."""


def _full_precision(trainer: Trainer) -> Any:
    """Lightning's context for the step, unless it is autocast."""
    return nullcontext() if is_mixed(trainer) else trainer.precision_plugin.train_step_context()


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def is_mixed(trainer: Trainer) -> bool:
    """Whether training runs under autocast, so that its losses differ from those of replays by rounding."""
    return hasattr(trainer.precision_plugin, "scaler")  # the slot of the mixed precision plugin alone


class _NonReentrant:
    """Stands for the autograd function of reentrant activation checkpoints, which has no second derivative."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


@contextmanager
def _differentiable_checkpoints() -> Iterator[None]:
    """Lets reentrant activation checkpoints work as the other kind does."""
    reentrant = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _NonReentrant  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]


@contextmanager
def _untouched_trainer(trainer: Trainer) -> Iterator[None]:
    """Dummy loggers, and no stop: a step may ask for one where a trial loss is large."""
    loggers, should_stop = trainer.loggers, trainer.should_stop
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers, trainer.should_stop = loggers, should_stop


def _containers(values: Iterable[Any], seen: set[int]) -> Iterator[Any]:
    """The plain containers among some values, and those inside them, each once."""
    for value in values:
        if isinstance(value, _CONTAINERS) and id(value) not in seen:
            seen.add(id(value))
            yield value
            if value:
                yield from _containers(value.values() if isinstance(value, dict) else value, seen)


def _refill(container: Any, copy: Any) -> None:
    """Gives a container its old contents back, without replacing the container."""
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(copy)
    else:
        container.extend(copy)

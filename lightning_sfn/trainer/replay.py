"""Replay: evaluate a module's `training_step` again without leaving a trace.

Lightning runs `training_step` once for each batch. Curvature needs it many more times, on the same batch with the same
random numbers, and none of those runs may be seen in logs, metrics, buffers, counters or random number streams.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sfn.newton.objective import Closure, Objective, ObjectiveError
from lightning_sfn.newton.processes import Processes
from lightning_sfn.trainer.isolation import isolated
from lightning_sfn.trainer.recording import RecordedStep, loss_of, own_containers

__all__ = ["evaluate", "processes_of", "replay_closure", "require_repeatable"]


def processes_of(trainer: Trainer) -> Processes | None:
    """The Trainer's processes; ``None`` if there is one."""
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
        # A module that steps its optimizers itself has another method for a replay: the mixin alone records this name.
        step: Any = module._replay_step if "replayed" in kwargs else module.training_step
        returned = step(*args, **kwargs)
    loss = loss_of(returned)
    if loss is None:
        raise ObjectiveError(
            "training_step returned no loss in a replay: let it return one for this batch whenever it is given it."
        )
    return (loss, _output_of(module, returned, forwarded)) if with_output else loss


def require_repeatable(objective: Objective, value: float) -> None:
    """`Objective.require_repeatable`, with the usual cause where a module's step is replayed.

    Args:
        objective: The objective, whose parts are replays.
        value: What an earlier evaluation gave.

    Raises:
        ObjectiveError: Another one gives another value.
    """
    try:
        objective.require_repeatable(value)
    except ObjectiveError as error:
        raise ObjectiveError(
            f"{error} In a module, look first for a tensor in a list or dictionary that the step changes in place, "
            "which a replay does not put back: make it a buffer."
        ) from error


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
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

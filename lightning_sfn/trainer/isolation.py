"""Isolation: evaluations of a module's `training_step` that leave no trace and can be differentiated twice."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint

from lightning_sfn.newton.precision import rounds_to_bfloat16
from lightning_sfn.newton.randomness import RandomState
from lightning_sfn.trainer.held_state import HeldState
from lightning_sfn.trainer.own_writes import UntrainedParameters
from lightning_sfn.trainer.silent_logger import SilentLogger

__all__ = ["Isolation", "isolated", "rounds_otherwise"]

# Layers whose cuDNN kernels have no second derivative. Those of convolutions and norms have one, and are fast.
_NOT_BY_CUDNN = (nn.RNNBase, nn.CTCLoss)
_BY_TF32 = (nn.modules.conv._ConvNd, nn.RNNBase)  # what cuDNN computes with TensorFloat-32 unless it is told not to


@contextmanager
def isolated(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Runs the body, one evaluation of `training_step`, in an `Isolation` of its own."""
    with Isolation(trainer, module) as isolation:
        isolation.rewind()
        yield


class Isolation:
    """Keeps evaluations of a module's `training_step` from leaving a trace, and lets them be differentiated twice.

    A context manager. Inside, logging is switched off and loggers are silent; attention runs in its math kernel,
    modules with recurrent layers or CTC losses without cuDNN, compiled modules eagerly, activation checkpoints without
    reentry, and automatic mixed precision and cuDNN's TF32 are off, since Lanczos amplifies rounding noise. `rewind`
    puts the module back to the state at the beginning, so that each evaluation after it is the same function. At the
    end every attribute of every submodule is what it was (buffers and other tensors, torchmetrics states, counters, the
    contents of lists, dictionaries and sets), and so are the global random numbers.

    Tensors are copied before an evaluation changes them. A parameter that the step changes in place is put back if no
    optimizer trains it (a teacher); `own_writes` has checks for the others. Not undone are in-place changes of tensors
    inside lists and dictionaries, and changes of anything outside the module.

    Args:
        trainer: The module's Trainer.
        module: The module.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._stack = ExitStack()
        self._evaluated = False

    def __enter__(self) -> "Isolation":
        """Notes the module's state."""
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_differentiable_cudnn(self._module))
            if "torch._dynamo" in sys.modules:  # only then can anything have been compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_differentiable_checkpoints())
            stack.enter_context(_full_precision(self._trainer))
            stack.enter_context(_untouched_trainer(self._trainer))
            stack.enter_context(_silent_results(self._trainer))
            stack.callback(RandomState.capture(self._module.device).restore)
            self._held = HeldState(self._module)
            self._untrained = UntrainedParameters(self._trainer, self._module, self._held.unregistered)
            stack.callback(self._restore)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leaves everything as it was."""
        self._stack.close()

    def rewind(self) -> None:
        """Puts the module back to the beginning, with copies in place of its tensors."""
        self._restore()
        self._held.stand_in()
        # Whatever hook asks for the replay, what the step may log is judged as in training.
        self._module.__dict__["_current_fx_name"] = "training_step"
        self._evaluated = True

    def _restore(self) -> None:
        self._held.restore()
        if self._evaluated:
            self._untrained.restore()
            self._untrained.require_no_others()


def _full_precision(trainer: Trainer) -> Any:
    """Lightning's context for the step, unless it is autocast."""
    return nullcontext() if is_mixed(trainer) else trainer.precision_plugin.train_step_context()


def is_mixed(trainer: Trainer) -> bool:
    """Whether training runs under autocast."""
    return hasattr(trainer.precision_plugin, "scaler")  # the slot of the mixed precision plugin alone


def rounds_otherwise(trainer: Trainer, module: LightningModule) -> bool:
    """Whether losses of training differ from those of replays by rounding: by autocast, or in float32 products."""
    if is_mixed(trainer):
        return True
    if module.device.type == "cpu" and rounds_to_bfloat16():
        return any(p.dtype == torch.float32 for p in module.parameters())
    if module.device.type != "cuda" or not torch.backends.cudnn.enabled or not _allows_tf32():
        return False
    layers = (layer for layer in module.modules() if isinstance(layer, _BY_TF32))
    return any(p.dtype == torch.float32 for layer in layers for p in layer.parameters(recurse=False))


def _allows_tf32() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set by operation (torch 2.9 and newer), which this option does not go with: a choice to keep
        return False


@contextmanager
def _differentiable_cudnn(module: nn.Module) -> Iterator[None]:
    """Float32 as it is in cuDNN's kernels, and none of them where a layer of the module has one without derivative."""
    cudnn = torch.backends.cudnn  # its `flags` would reset what is not given, deterministic kernels among it
    enabled, tf32 = cudnn.enabled, _allows_tf32()
    try:
        if any(isinstance(layer, _NOT_BY_CUDNN) for layer in module.modules()):
            cudnn.enabled = False
        if tf32:
            cudnn.allow_tf32 = False
        yield
    finally:
        cudnn.enabled = enabled
        if tf32:
            cudnn.allow_tf32 = True


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
    """Silent loggers, and no stop: a step may ask for one where a trial loss is large."""
    loggers, should_stop = trainer.loggers, trainer.should_stop
    trainer.loggers = [SilentLogger(logger) for logger in loggers]
    try:
        yield
    finally:
        trainer.loggers, trainer.should_stop = loggers, should_stop


@contextmanager
def _silent_results(trainer: Trainer) -> Iterator[None]:
    """Lets Lightning's own `log` keep nothing, where a module calls it past its attribute: ``super().log(...)``."""
    connector = trainer._logger_connector
    current_fx = connector._current_fx
    loop = trainer.fit_loop.epoch_loop
    held = [vars(results) for results in (loop._results, loop.val_loop._results)]
    before = [own.copy() for own in held]
    for own in held:
        own |= dict.fromkeys(("log", "reset"), _keep_nothing)  # on the objects, in front of the methods of their class
    try:
        yield
    finally:
        connector._current_fx = current_fx
        for own, values in zip(held, before, strict=True):
            own.clear()
            own.update(values)


def _keep_nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of methods by which results are changed."""

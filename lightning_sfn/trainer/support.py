"""What callbacks, strategies and the mixin cannot work with, said before training starts."""

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

__all__ = [
    "SPECTRUM_BY_HAND",
    "is_dry_run",
    "require_curvature",
    "require_differentiable",
    "require_metrics",
    "require_one_optimizer",
    "require_replayable",
    "require_steady_weights",
]

SPECTRUM_BY_HAND = "lightning_sfn.hessian_spectrum(closure, params), whose closure gives the loss of a batch"
"""What takes spectra of modules with manual optimization."""

_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def require_replayable(
    trainer: Trainer,
    module: LightningModule,
    who: str,
    instead: str = "lightning_sfn.SaddleFreeNewtonMixin, or SaddleFreeNewton as its optimizer",
) -> None:
    """Checks that the module's `training_step` can be replayed; ``instead`` is for those that optimize by hand.

    Raises:
        MisconfigurationException: It cannot, with the reason and the alternative.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{who} needs automatic optimization, but {type(module).__name__} sets automatic_optimization = False: "
            f"use {instead}."
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{who} needs training_step(batch, batch_idx), but {type(module).__name__} draws from dataloader_iter "
            "itself, so its step cannot be replayed: let it take the batch."
        )
    require_differentiable(trainer, module, who)


def require_differentiable(trainer: Trainer, module: LightningModule, who: str) -> None:
    """Checks that losses of the module can be differentiated twice, and averaged over processes, where it trains.

    Raises:
        MisconfigurationException: They cannot, with the reason and the alternative.
    """
    for name, layer in module.named_modules():
        if getattr(layer, "sparse", False) is True:
            raise MisconfigurationException(
                f"{who} needs dense gradients, but layer {name!r} makes sparse ones: build it with sparse=False."
            )
    for base in type(trainer.strategy).__mro__:
        if base.__name__ in _SHARDING:
            raise MisconfigurationException(
                f"{who} cannot differentiate twice through {type(trainer.strategy).__name__}, which shards parameters "
                "outside autograd: use strategy='ddp' or one device, and basis='sharded' where the basis is too large."
            )
    if getattr(trainer.strategy, "_layer_sync", None) is not None or any(
        isinstance(layer, nn.SyncBatchNorm) for layer in module.modules()
    ):
        raise MisconfigurationException(
            f"{who} cannot differentiate twice through synchronised batch norm, whose kernel has no second derivative: "
            "pass sync_batchnorm=False, then each process has its own statistics, or use a norm over features."
        )
    if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
        raise MisconfigurationException(
            f"{who} needs the mean gradient over processes, but a ddp_comm_hook puts something else in its place: "
            "leave the hook out."
        )


def require_steady_weights(module: LightningModule, who: str) -> None:
    """Checks that no layer renormalises the weights that are trained whenever it is evaluated.

    Raises:
        MisconfigurationException: One does. Trial losses would move the point at which they are taken.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm and layer.weight.requires_grad:
            raise MisconfigurationException(
                f"{who} needs a training_step that leaves the parameters alone that are being trained, but layer "
                f"{name!r} changes its weight in place (max_norm={layer.max_norm:g}): leave max_norm out, or shorten "
                "the rows of the weight in on_train_batch_end."
            )


def require_curvature(curvature: str, who: str) -> None:
    """Checks that replays of `training_step` give what a curvature is computed from: a loss, or loss and output.

    Raises:
        MisconfigurationException: They do not.
    """
    if curvature in ("fisher", "gradient_covariance"):
        raise MisconfigurationException(
            f"{who} got curvature={curvature!r}, which needs more than training_step hands over: use 'hessian' or "
            "'gauss_newton', or SaddleFreeNewton in plain torch."
        )


def require_metrics(trainer: Trainer, who: str) -> None:
    """Checks that the Trainer keeps logged metrics.

    Raises:
        MisconfigurationException: It does not, with the reason and the alternative.
    """
    if trainer.barebones:
        raise MisconfigurationException(
            f"{who} watches a logged metric, but Trainer(barebones=True) logs nothing: leave barebones out, or say "
            "when to switch with switch_at_epoch or switch_at_step."
        )


def is_dry_run(trainer: Trainer) -> bool:
    """Whether the Trainer runs a few batches only, to see that the code works (``fast_dev_run``)."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set through setattr


def require_one_optimizer(trainer: Trainer, who: str) -> None:
    """Checks, after `configure_optimizers`, that there is exactly one optimizer to replace.

    Raises:
        MisconfigurationException: There is none, or there are several.
    """
    # Lightning stands in a mock without parameters where configure_optimizers returned nothing.
    count = sum(any(group["params"] for group in optimizer.param_groups) for optimizer in trainer.optimizers)
    if count != 1:
        raise MisconfigurationException(
            f"{who} replaces one optimizer, but configure_optimizers returned {count}: return a single optimizer (with "
            "several parameter groups, if need be)."
        )

"""Random numbers of a checkpoint, given back where a resumed run draws the order of its next epoch from them."""

from pytorch_lightning import Trainer

from lightning_sfn.newton.randomness import RandomState

__all__ = ["reshuffle"]


def reshuffle(trainer: Trainer, state: RandomState) -> None:
    """Restores random numbers when a resumed fit starts, so that the loader shuffles as it would have.

    The Trainer makes the loader's iterator next, which draws. It has done so already where `configure_optimizers` asked
    it for `estimated_stepping_batches`; then the loader is iterated anew. But not a stateful one: its order comes from
    its own state, which a second iterator would not have.

    Args:
        trainer: The Trainer, in ``on_fit_start``.
        state: The random numbers when the checkpoint was written.
    """
    state.restore()
    loader, fetcher = trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher
    if loader is None or fetcher is None or any(hasattr(each, "load_state_dict") for each in loader.flattened):
        return
    iter(fetcher)

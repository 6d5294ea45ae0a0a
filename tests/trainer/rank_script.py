"""Trains on two ranks, as a user's script would: `python rank_script.py STRATEGY FOLDER [NODES]`."""

import sys

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import lightning_sfn  # noqa: F401  (registers the strategies)


class Line(LightningModule):
    """A linear network with a saddle at the origin."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.full((2, 2), 1e-3)) for _ in range(2))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return (batch[0] @ self.a @ self.b - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Writing(Callback):
    """Each rank writes its parameters down."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save([p.detach() for p in pl_module.parameters()], f"{sys.argv[2]}/{trainer.global_rank}.pt")


def main() -> None:
    """Trains."""
    torch.set_num_threads(1)
    nodes = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    trainer = Trainer(
        max_epochs=12,
        accelerator="cpu",
        strategy=sys.argv[1],
        devices=2 // nodes,
        num_nodes=nodes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Writing()],
    )
    data = TensorDataset(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))
    trainer.fit(Line(), DataLoader(data, batch_size=4))


if __name__ == "__main__":
    main()

"""Trainers on several ranks: the same parameters on all, and those of one process on the batches put together."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sfn import SaddleFreeNewton, SaddleFreeNewtonMixin, SFNDDPStrategy, SFNStrategy, SwitchToSFN

from ..newton.ranks import Failed, on_ranks
from .modules import flat, make_trainer

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

RANKS = 2
NAMES = ("plain", "sharded", "uneven mean", "uneven samples", "accumulated", "clipped", "callback", "mixin", "held")
BATCHES = 4
DIAGONAL = {"preconditioner": "diagonal"}  # each rank draws targets of its own for Kronecker factors
Batch = tuple[Tensor, Tensor, Tensor]  # inputs, targets, weights of the rows in the batch's loss


def batches(sizes: tuple[int, ...], rank: int | None, reduction: str, dtype: torch.dtype) -> list[Batch]:
    """The batches of one rank, or of all ranks put together so that the loss is their mean."""
    made = []
    for index in range(BATCHES):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64).to(dtype)
        y = (x[:, :1] * x[:, 1:2]).tanh()
        by_rank = [1 / (size * len(sizes)) for size in sizes for _ in range(size)]
        whole = by_rank if reduction == "mean" else [1 / sum(sizes)] * sum(sizes)
        own = [1 / size for size in sizes for _ in range(size)]
        weights = torch.tensor(whole if rank is None else own, dtype=dtype).unsqueeze(1)
        start = 0 if rank is None else sum(sizes[:rank])
        rows = slice(start, sum(sizes) if rank is None else start + sizes[rank])
        made.append((x[rows], y[rows], weights[rows]))
    return made


class Net(LightningModule):
    """A small network whose loss is a weighted sum over rows."""

    def __init__(self, dtype: torch.dtype = torch.float64, batch_norm: bool = False, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        norm = [nn.BatchNorm1d(5)] if batch_norm else []
        self.net = nn.Sequential(nn.Linear(3, 5), *norm, nn.Tanh(), nn.Linear(5, 1)).to(dtype)
        if unused:
            self.unused = nn.Linear(2, 2, dtype=dtype)

    def loss(self, batch: Batch) -> Tensor:
        x, y, weights = batch
        return ((self.net(x) - y).square() * weights).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]), sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=1e-3)


class Manual(SaddleFreeNewtonMixin, Net):
    """The same network under manual optimization."""

    preconditioner = "diagonal"

    def objective(self, batch: Batch) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return SaddleFreeNewton(self.parameters(), damping=1.0, preconditioner=self.preconditioner)


class Watching(Callback):
    """Notes the parameters after every batch."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append(flat(pl_module))


def fit(
    module: LightningModule,
    sizes: tuple[int, ...] = (6, 6),
    *,
    reduction: str = "mean",
    dtype: torch.dtype = torch.float64,
    epochs: int = 2,
    strategy: dict[str, Any] | None = None,
    newton: dict[str, Any] | None = None,
    callbacks: Any = (),
    ckpt_path: str | None = None,
    **options: Any,
) -> list[Tensor]:
    """Trains on this rank's batches, or on all of them where there is one process."""
    rank = dist.get_rank() if dist.is_initialized() else None
    data = batches(sizes, rank, reduction, dtype)
    watching = Watching()
    chosen: Any = "auto" if rank is None else "ddp"
    if not any(isinstance(callback, SwitchToSFN) for callback in callbacks):
        kind = SFNStrategy if rank is None else SFNDDPStrategy
        make = partial(SaddleFreeNewton, check_ranks=True, **(newton or {}))
        chosen = kind(make, reduction=reduction, **(strategy or {}))
    trainer = make_trainer(
        epochs,
        strategy=chosen,
        devices=1 if rank is None else RANKS,
        use_distributed_sampler=False,
        callbacks=[watching, *callbacks],
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=None, shuffle=False), ckpt_path=ckpt_path)
    return watching.seen


def switching() -> SwitchToSFN:
    return SwitchToSFN(optimizer=partial(SaddleFreeNewton, **DIAGONAL), patience=1, min_delta=1e9, probe_dim=0)


class Saving(Callback):
    """Saves a checkpoint at the end of every epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(f"{trainer.current_epoch}.ckpt")


def same_as_one_process() -> dict[str, list[Tensor]]:
    """Runs that are to be those of one process on the batches put together."""
    return {
        "plain": fit(Net(), newton=DIAGONAL),
        "sharded": fit(Net(), newton={"basis": "sharded", **DIAGONAL}),
        "uneven mean": fit(Net(), (8, 3), newton=DIAGONAL),
        "uneven samples": fit(Net(), (8, 3), reduction="samples", newton=DIAGONAL),
        "accumulated": fit(Net(), accumulate_grad_batches=3, newton=DIAGONAL),
        "clipped": fit(Net(), gradient_clip_val=0.05, newton=DIAGONAL),
        "callback": fit(Net(), epochs=4, callbacks=[switching()]),
        "mixin": fit(Manual()),
        "held": fit(Manual(hold=True, gradient_batches=2, reduction="samples"), (8, 3), reduction="samples"),
    }


def same_on_all_ranks() -> dict[str, list[Tensor]]:
    """Runs that one process cannot copy, or that need several."""
    unused = {"find_unused_parameters": True}
    return {
        "kronecker": fit(Net()),
        "kronecker sharded": fit(Net(), newton={"basis": "sharded"}),
        "static graph": fit(Net(), strategy={"static_graph": True}),
        "unused": fit(Net(unused=True), strategy=unused),
        "batch norm": fit(Net(batch_norm=True), (6, 5)),
        "mixed": fit(Net(torch.float32), dtype=torch.float32, precision="bf16-mixed"),
        "mixin static graph": fit(Manual(), strategy={"static_graph": True}),
        "mixin mixed": fit(Manual(torch.float32), dtype=torch.float32, precision="bf16-mixed"),
        "saved": fit(Net(), epochs=1, newton={"basis": "sharded", **DIAGONAL}, callbacks=[Saving()]),
        "resumed": fit(Net(), newton={"basis": "sharded", **DIAGONAL}, ckpt_path="0.ckpt"),
    }


def as_torchrun_does() -> None:
    """Tells Lightning that this process is one of several already."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "", "MASTER_PORT": "1"}


def on_each_rank() -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    as_torchrun_does()
    return same_as_one_process(), same_on_all_ranks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Any]:
    torch.set_num_threads(1)
    before = os.getcwd()
    os.chdir(folder)
    try:
        outcomes = on_ranks(RANKS, on_each_rank, limit=300.0)
    finally:
        os.chdir(before)
    assert not any(isinstance(outcome, Failed) for outcome in outcomes), outcomes
    return outcomes


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Tensor]]:
    torch.set_num_threads(1)
    return same_as_one_process()


def test_all_ranks_have_the_same_bits_after_every_batch(ranks: list[Any]) -> None:
    for of_first, of_second in zip(*ranks, strict=True):
        for name, seen in of_first.items():
            assert len(seen) >= BATCHES
            assert all(map(torch.equal, seen, of_second[name])), name
            assert not torch.equal(seen[-1], flat(Net())), name


@pytest.mark.parametrize("name", NAMES)
def test_ranks_do_what_one_process_does(ranks: list[Any], alone: dict[str, list[Tensor]], name: str) -> None:
    shared = ranks[0][0][name]
    assert len(shared) == len(alone[name])
    for ours, theirs in zip(shared, alone[name], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-12


def test_reductions_differ_where_batches_do_in_size(alone: dict[str, list[Tensor]]) -> None:
    assert not torch.allclose(alone["uneven mean"][-1], alone["uneven samples"][-1], rtol=1e-3)


def test_the_sharded_basis_changes_nothing(ranks: list[Any]) -> None:
    exact, own = ranks[0]
    for plain, sharded in ((exact["plain"], exact["sharded"]), (own["kronecker"], own["kronecker sharded"])):
        assert float((plain[-1] - sharded[-1]).norm() / plain[-1].norm()) < 1e-12


def test_a_checkpoint_of_two_ranks_goes_on_on_two_and_on_one(
    ranks: list[Any], folder: Path, alone: dict[str, list[Tensor]]
) -> None:
    uninterrupted = ranks[0][0]["sharded"][-1]
    assert torch.equal(ranks[0][1]["resumed"][-1], uninterrupted)
    saved = str(folder / "0.ckpt")
    on_one = fit(Net(), newton={"basis": "sharded", **DIAGONAL}, ckpt_path=saved)
    assert float((on_one[-1] - alone["sharded"][-1]).norm() / uninterrupted.norm()) < 1e-12


# ------------------------------------------------------------------------------------------------ refusals


class Odd(Net):
    """Its ranks differ."""

    def __init__(self, how: str) -> None:
        super().__init__()
        if how == "sizes" and dist.get_rank() == 1:
            self.net.append(nn.Linear(1, 1, dtype=torch.float64))
        if how == "dtypes" and dist.get_rank() == 1:
            self.float()
        if how == "frozen" and dist.get_rank() == 1:
            self.requires_grad_(False)


def refusals() -> list[str]:
    as_torchrun_does()
    messages = []
    for how in ("sizes", "dtypes", "frozen"):
        try:
            fit(Odd(how))
        except MisconfigurationException as error:
            messages.append(str(error))
    return messages


def test_ranks_with_different_models_are_told_before_anything_waits() -> None:
    first, second = on_ranks(RANKS, refusals, limit=60.0)
    assert first == second
    sizes, dtypes, frozen = first
    assert "rank 0 has 4 trainable parameters of float64" in sizes
    assert "rank 1 has 6 trainable parameters of float64" in sizes
    assert "rank 1 has 4 trainable parameters of float32" in dtypes
    assert "rank 1 has none that can be trained" in frozen

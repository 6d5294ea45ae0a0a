"""The autoencoder against its formulas written out in NumPy."""

import functools
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sfn.experiments.autoencoder import Autoencoder


def images(count: int = 5, pixels: int = 6) -> Tensor:
    return torch.rand(count, pixels)


def by_hand(model: Autoencoder, batch: Tensor, activation: str) -> np.ndarray:
    functions = {
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(x, 0),
    }
    values = batch.double().numpy()
    for stack in (model.encoder, model.decoder):
        linear = [layer for layer in stack if isinstance(layer, nn.Linear)]
        for index, layer in enumerate(linear):
            values = values @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
            if index < len(linear) - 1:
                values = functions[activation](values)
    return functions["sigmoid"](values)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_forward_is_a_linear_code_between_mirrored_stacks(activation: str) -> None:
    model = Autoencoder(sizes=(6, 5, 4, 2), activation=activation)  # type: ignore[arg-type]
    widths = [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert widths == [(6, 5), (5, 4), (4, 2), (2, 4), (4, 5), (5, 6)]
    batch = images()
    np.testing.assert_allclose(model(batch).detach().numpy(), by_hand(model, batch, activation), rtol=1e-5)


@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_loss_is_summed_over_pixels_and_averaged_over_images(loss: str) -> None:
    model = Autoencoder(sizes=(6, 3), loss=loss)  # type: ignore[arg-type]
    batch = images()
    x, y = batch.double().numpy(), by_hand(model, batch, "sigmoid")
    per_pixel = (x - y) ** 2 if loss == "squared_error" else -(x * np.log(y) + (1 - x) * np.log(1 - y))
    assert model.reconstruction_loss(batch).item() == pytest.approx(per_pixel.sum(axis=1).mean(), rel=1e-6)


def test_closed_form_for_zero_weights() -> None:
    for loss, per_pixel in (("squared_error", 0.25), ("cross_entropy", math.log(2))):
        model = Autoencoder(sizes=(6, 3), loss=loss)  # type: ignore[arg-type]
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        assert model.reconstruction_loss(torch.zeros(4, 6)).item() == pytest.approx(6 * per_pixel)


def test_cross_entropy_stays_finite_where_the_sigmoid_saturates() -> None:
    model = Autoencoder(sizes=(6, 3), loss="cross_entropy")
    nn.init.constant_(model.decoder[-1].bias, 1e4)
    assert model.reconstruction_loss(torch.zeros(4, 6)).item() == pytest.approx(6e4, rel=1e-3)


def test_starts_as_pytorchs_layers_do() -> None:
    torch.manual_seed(3)
    model = Autoencoder(sizes=(6, 3))
    torch.manual_seed(3)
    expected = nn.Linear(6, 3)
    assert torch.equal(model.encoder[0].weight, expected.weight)
    assert torch.equal(model.encoder[0].bias, expected.bias)


def test_default_optimizer_and_one_given() -> None:
    default = Autoencoder().configure_optimizers()
    assert isinstance(default, torch.optim.SGD)
    assert (default.defaults["lr"], default.defaults["momentum"]) == (0.1, 0.9)
    given = Autoencoder(optimizer=functools.partial(torch.optim.Adam, lr=0.5)).configure_optimizers()
    assert isinstance(given, torch.optim.Adam)
    assert given.defaults["lr"] == 0.5


def test_logs_epoch_means_of_both_losses() -> None:
    model = Autoencoder(sizes=(6, 3), optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    train, held_out = images(8), images(4)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=3), DataLoader(held_out, batch_size=3))
    for name, data in (("train_loss", train), ("val_loss", held_out)):
        logged = trainer.callback_metrics[name].item()
        assert logged == pytest.approx(model.reconstruction_loss(data).item(), rel=1e-5)
    assert model.automatic_optimization


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sizes": (100,)}, "at least two positive layer widths"),
        ({"sizes": (100, 0)}, "at least two positive layer widths"),
        ({"activation": "gelu"}, "one of sigmoid, tanh, relu"),
        ({"loss": "hinge"}, "one of squared_error, cross_entropy"),
    ],
)
def test_refuses_what_it_does_not_know(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        Autoencoder(**arguments)  # type: ignore[arg-type]

"""Both ends of a 2.8-million-parameter spectrum from a basis of 64 vectors: right, and at what cost in gradients?"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm, trange

from lightning_sfn.experiments.autoencoder import Autoencoder
from lightning_sfn.experiments.mnist import MNISTDataModule
from lightning_sfn.newton import HessianOperator, Objective, Spectrum, SpectrumSettings
from lightning_sfn.newton.spectrum import spectrum_of

from .networks import AUTOENCODER
from .timing import now, seconds_of

LARGEST, RIGHT = 10, 1e-3  # relative error of an eigenvalue that counts as right
TARGET, PEER_RIGHT, PEER_WRONG = 150, 518, 161  # gradients
_GRADIENT_EVERY = 4  # products between two gradients that are timed beside them


def measure(device: torch.device, quick: bool, steps: int, reference: int) -> dict[str, Any]:
    """Trains the autoencoder, computes the reference in float64, and asks for the ends.

    Args:
        device: Where.
        quick: A tiny network.
        steps: Adam steps before the Hessian is taken.
        reference: Vectors of the float64 basis.
    """
    model, images = trained(device, quick, steps)
    exact = _spectrum(model.double(), images.double(), SpectrumSettings(reference), lambda _: None)
    model, images = model.float(), images.float()
    dim, largest = (12, 3) if quick else (64, LARGEST)
    rows = [
        _row(model, images, exact, device, SpectrumSettings(dim, smallest, largest, tol, max_products=4 * reference))
        for smallest, tol in ((1, None), (0, 3e-2), (1, 3e-2), (1, 1e-3))
    ]
    return {
        "parameters": exact.size,
        "reference": {
            "largest": exact.eigenvalues[-largest:].flip(0).tolist(),
            "smallest": exact.lambda_min,
            "largest_residual": float(exact.residuals[-largest:].max()),
            "smallest_residual": float(exact.residuals[0]),
        },
        "target": TARGET,
        "peer_right": PEER_RIGHT,
        "peer_wrong": PEER_WRONG,
        "rows": rows,
    }


def trained(device: torch.device, quick: bool, steps: int) -> tuple[Autoencoder, Tensor]:
    """The autoencoder after some Adam steps on 512 images of the sample."""
    torch.manual_seed(0)
    side = 5 if quick else 28
    data = MNISTDataModule(source="sample", image_size=side, batch_size=64 if quick else 512)
    data.setup("fit")
    images = next(iter(data.train_dataloader())).to(device)
    sizes = [side * side, 8, 4] if quick else AUTOENCODER
    model = Autoencoder(sizes, activation="sigmoid", loss="squared_error", linear_code=True).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in trange(steps, desc="Adam", leave=False):
        optimizer.zero_grad()
        model.reconstruction_loss(images).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model, images


def _spectrum(
    model: Autoencoder, images: Tensor, settings: SpectrumSettings, between: Callable[[int], None]
) -> Spectrum:
    operator = HessianOperator(Objective([lambda: model.reconstruction_loss(images)]), model.parameters())
    with tqdm(desc=f"basis of {settings.krylov_dim}", leave=False) as bar:

        def progress(done: int, _: int) -> None:
            bar.update(done - bar.n)
            between(done)

        return spectrum_of(operator, settings, progress=progress)


def _row(
    model: Autoencoder, images: Tensor, exact: Spectrum, device: torch.device, settings: SpectrumSettings
) -> dict[str, Any]:
    """One tolerance: how many are right, and the cost in gradients that were timed between the products."""
    parameters, gradients = list(model.parameters()), []

    def between(done: int) -> None:
        if done % _GRADIENT_EVERY == 0:
            loss = model.reconstruction_loss
            with torch.enable_grad():
                spent = seconds_of(lambda: torch.autograd.grad(loss(images), parameters), device)
            gradients.append(spent)

    begun = now(device)
    ours = _spectrum(model, images, settings, between)
    seconds = now(device) - begun - sum(gradients)
    unit = sorted(gradients)[len(gradients) // 2]
    wanted = exact.eigenvalues[-settings.largest :]
    errors = (ours.eigenvalues[-settings.largest :] - wanted).abs() / wanted.abs()
    smallest = abs(ours.lambda_min - exact.lambda_min) / abs(exact.lambda_min)
    return {
        "basis": settings.krylov_dim,
        "tolerance": settings.tol,
        "products": ours.products,
        "gradients": seconds / unit,
        "right": int((errors <= RIGHT).sum()),
        "asked": settings.largest,
        "smallest_asked": settings.smallest,
        "worst_error": float(errors.max()),
        "smallest_error": smallest,
        "smallest_right": smallest <= RIGHT,
    }

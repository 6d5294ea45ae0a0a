"""Both ends of a 2.8-million-parameter spectrum from a basis of 64 vectors: right, and at what cost in gradients?"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm, trange

from lightning_sfn.experiments.autoencoder import Autoencoder
from lightning_sfn.experiments.mnist import MNISTDataModule
from lightning_sfn.newton import HessianOperator, KrylovSubspace, Objective, Spectrum, SpectrumSettings, lanczos
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
    exact = _reference(model.double(), images.double(), reference)
    model, images = model.float(), images.float()
    dim, largest = (12, 3) if quick else (64, LARGEST)
    rows = [
        _row(model, images, exact, device, SpectrumSettings(dim, smallest, largest, tol, max_products=4 * reference))
        for smallest, tol in ((1, None), (0, 1e-2), (1, 3e-2), (1, 1e-3))
    ]
    return {
        "parameters": exact.size or 0,
        "reference": {
            "largest": exact.eigenvalues[-largest:].flip(0).tolist(),
            "smallest": float(exact.eigenvalues[0]),
            "largest_residual": float(exact.residuals[-largest:].max()),
            "smallest_residual": float(exact.residuals[0]),
        },
        "without_restarts": without_restarts(exact, largest),
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


def _reference(model: Autoencoder, images: Tensor, dim: int) -> KrylovSubspace:
    """One long float64 basis from a random vector."""
    operator = HessianOperator(Objective([lambda: model.reconstruction_loss(images)]), model.parameters())
    generator = torch.Generator(images.device).manual_seed(0)
    start = torch.randn(operator.parameters.size, generator=generator, dtype=torch.float64, device=images.device)
    with tqdm(desc="reference", total=dim, leave=False) as bar:

        def product(vector: Tensor) -> Tensor:
            bar.update()
            return operator.matvec(vector)

        space = lanczos(product, start, dim, generator=generator)
    operator.close()
    return replace(space, basis=space.basis[:0], size=space.basis.shape[1])


def without_restarts(exact: KrylovSubspace, largest: int) -> dict[str, int | None]:
    """After how many products one growing basis has the largest, and both ends, right: no method needs fewer.

    The leading blocks of the tridiagonal matrix are the projected Hessians of the shorter bases.
    """

    def right(dim: int, smallest: int) -> bool:
        values = torch.linalg.eigvalsh(exact.projected[:dim, :dim])
        wanted = torch.cat([exact.eigenvalues[:smallest], exact.eigenvalues[-largest:]])
        found = torch.cat([values[:smallest], values[-largest:]])
        return len(found) == len(wanted) and bool(((found - wanted).abs() <= RIGHT * wanted.abs()).all())

    dims = range(largest, len(exact) + 1)
    return {
        "largest": next((dim for dim in dims if right(dim, 0)), None),
        "both_ends": next((dim for dim in dims if right(dim, 1)), None),
    }


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
    model: Autoencoder, images: Tensor, exact: KrylovSubspace, device: torch.device, settings: SpectrumSettings
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
    lowest = float(exact.eigenvalues[0])
    smallest = abs(ours.lambda_min - lowest) / abs(lowest)
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

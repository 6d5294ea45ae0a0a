"""Both ends of a 2.8-million-parameter Hessian: are they right, and how many products do they take?

    python benchmarks/spectrum_accuracy.py [--steps 400] [--reference 220]

The paper's autoencoder (784-1000-500-250-30 and back, sigmoid units) on 512 MNIST images after Adam steps. Asked for
are the ten largest eigenvalues and the smallest one. The reference is one float64 basis of 220 vectors. Peer is
ARPACK's implicitly restarted Lanczos (scipy's `eigsh`, which curvlinops hands its operators to), on the very same
float32 products, with its default basis and with ours; for both ends it is asked twice, or for ten of each end ("BE").
Writes `benchmarks/results/spectrum_accuracy.json`.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import record
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from tqdm import tqdm, trange

from lightning_sfn.experiments.autoencoder import Autoencoder
from lightning_sfn.experiments.mnist import MNISTDataModule
from lightning_sfn.newton import HessianOperator, Objective, Spectrum, SpectrumSettings
from lightning_sfn.newton.spectrum import spectrum_of

SIZES = [784, 1000, 500, 250, 30]
LARGEST, SMALLEST, TOL = 10, 1, 1e-3


def main() -> None:
    """Trains, computes the reference, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="Adam steps before the Hessian is taken")
    parser.add_argument("--reference", type=int, default=220, help="vectors of the float64 reference")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, images = trained(options.steps)
    exact = spectrum(model.double(), images.double(), SpectrumSettings(options.reference), "reference")
    model, images = model.float(), images.float()
    rows = []
    for smallest, dim in ((0, 64), (SMALLEST, 64), (SMALLEST, 32)):
        settings = SpectrumSettings(dim, smallest, LARGEST, TOL, max_products=300)
        started = time.process_time()
        ours = spectrum(model, images, settings, f"lightning_sfn, basis {dim}")
        seconds = time.process_time() - started
        asked = f"{LARGEST} largest" + (f", {smallest} smallest" if smallest else "")
        low, high = ours.eigenvalues[:smallest], ours.eigenvalues[-LARGEST:].flip(0)
        rows.append(row("lightning_sfn", dim, asked, ours.products, seconds, low, high, exact))
    for ends, wanted, dim in (
        ("LA", LARGEST, None),
        ("LA", LARGEST, 64),
        ("SA", SMALLEST, 64),
        ("BE", 2 * LARGEST, 64),
    ):
        rows.append(peer(model, images, ends, wanted, dim, exact))
    top, low = exact.eigenvalues[-LARGEST:].flip(0).tolist(), exact.lambda_min
    reference = {
        "largest": top,
        "largest_residuals": exact.residuals[-LARGEST:].flip(0).tolist(),
        "smallest": low,
        "smallest_residual": float(exact.residuals[0]),
        "loss": exact.loss,
        "parameters": exact.size,
    }
    print(record.write("spectrum_accuracy", {"settings": vars(options), "reference": reference, "rows": rows}))


def trained(steps: int) -> tuple[Autoencoder, Tensor]:
    """The autoencoder after some Adam steps on its 512 images."""
    torch.manual_seed(0)
    data = MNISTDataModule(source="sample", image_size=28, batch_size=512)
    data.setup("fit")
    images = next(iter(data.train_dataloader()))
    model = Autoencoder(SIZES, activation="sigmoid", loss="squared_error", linear_code=True, optimizer=torch.optim.Adam)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in trange(steps, desc="Adam"):
        optimizer.zero_grad()
        model.reconstruction_loss(images).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model, images


def operator(model: Autoencoder, images: Tensor) -> HessianOperator:
    """The Hessian of the reconstruction loss."""
    return HessianOperator(Objective([lambda: model.reconstruction_loss(images)]), model.parameters())


def spectrum(model: Autoencoder, images: Tensor, settings: SpectrumSettings, name: str) -> Spectrum:
    """Our spectrum, with a progress bar."""
    with tqdm(total=settings.most_products(2**31), desc=name) as bar:
        return spectrum_of(operator(model, images), settings, progress=lambda done, _: bar.update(done - bar.n))


def peer(
    model: Autoencoder, images: Tensor, ends: str, wanted: int, dim: int | None, exact: Spectrum
) -> dict[str, Any]:
    """ARPACK on the same products; "BE" takes half of the wanted eigenvalues from each end."""
    hessian = operator(model, images)
    size = hessian.parameters.size
    with tqdm(desc=f"eigsh {ends}, basis {dim or 'default'}") as bar:

        def matvec(vector: np.ndarray) -> np.ndarray:
            bar.update()
            return hessian.matvec(torch.from_numpy(vector.reshape(-1).copy())).numpy()

        started = time.process_time()
        try:
            start = torch.randn(size, generator=torch.Generator().manual_seed(0)).numpy()
            linear = LinearOperator((size, size), matvec=matvec, dtype=np.float32)
            values = eigsh(linear, k=wanted, which=ends, ncv=dim, tol=TOL, v0=start, return_eigenvectors=False)
        except ArpackNoConvergence as error:
            values = error.eigenvalues
        seconds = time.process_time() - started
    hessian.close()
    found = torch.from_numpy(np.sort(values)).double()
    low = found[: 0 if ends == "LA" else SMALLEST]
    high = found[len(found) if ends == "SA" else -LARGEST :].flip(0)
    asked = {
        "LA": f"{wanted} largest",
        "SA": f"{wanted} smallest",
        "BE": f"{wanted // 2} largest, {wanted // 2} smallest",
    }
    return row("scipy eigsh", dim or 21, asked[ends], hessian.products, seconds, low, high, exact)


def row(
    name: str, dim: int, asked: str, products: int, seconds: float, low: Tensor, high: Tensor, exact: Spectrum
) -> dict[str, Any]:
    """How many of the ten are right in order, and the worst error, relative to each eigenvalue."""
    true = exact.eigenvalues[-LARGEST:].flip(0)
    error: Callable[[Tensor, Tensor], Tensor] = lambda found, right: ((found - right) / right).abs()  # noqa: E731
    wrong = error(high, true[: len(high)])
    return {
        "method": name,
        "basis": dim,
        "asked": asked,
        "products": products,
        "cpu_seconds": seconds,
        "largest_right_in_order": int((wrong <= TOL).sum()) if len(high) else None,
        "largest_worst_error": float(wrong.max()) if len(high) else None,
        "smallest_error": float(error(low, exact.eigenvalues[:SMALLEST]).max()) if len(low) else None,
    }


if __name__ == "__main__":
    main()

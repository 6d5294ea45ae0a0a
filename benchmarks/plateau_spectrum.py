"""Is the plateau of the main recipe a saddle? Its spectrum in float64, on all images and on a tenth of them.

    python benchmarks/plateau_spectrum.py [--epochs 60] [--relax 1000]

Trains the recipe's network by SGD (0.1, momentum 0.9), takes the spectrum there, then relaxes to the critical point
nearby by full-batch gradient descent and takes it again. Writes `benchmarks/results/plateau_spectrum.json`.
"""

import argparse
from typing import Any

import record
import torch
from stall_search import network, sample
from torch import Tensor
from tqdm import trange

from lightning_sfn import hessian_spectrum
from lightning_sfn.experiments.autoencoder import Autoencoder

SIZES = (100, 64, 32, 16, 4)
KRYLOV_DIM = 160


def main() -> None:
    """Trains, relaxes, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--relax", type=int, default=1000, help="steps of full-batch gradient descent")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = sample().double()
    model = network(0, SIZES, linear_code=False).double()
    descend(model, images, options.epochs)
    spectra = measure("SGD", model, images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in trange(options.relax, desc="relaxing"):
        optimizer.zero_grad()
        model.reconstruction_loss(images).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    spectra += measure("relaxed", model, images)
    print(record.write("plateau_spectrum", {"settings": vars(options), "spectra": spectra}))


def descend(model: Autoencoder, images: Tensor, epochs: int) -> None:
    """SGD as in the recipe."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in trange(epochs, desc="SGD"):
        for chunk in torch.randperm(len(images), generator=generator).split(100):
            optimizer.zero_grad()
            model.reconstruction_loss(images[chunk]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def measure(point: str, model: Autoencoder, images: Tensor) -> list[dict[str, Any]]:
    """Both ends of the spectrum on all images and on the first tenth."""
    rows = []
    for name, part in (("all images", images), ("a tenth", images[: len(images) // 10])):
        spectrum = hessian_spectrum(
            lambda part=part: model.reconstruction_loss(part),  # type: ignore[misc]
            model.parameters(),
            KRYLOV_DIM,
        )
        rows.append(
            {
                "point": point,
                "data": name,
                "loss": spectrum.loss,
                "lambda_min": spectrum.lambda_min,
                "residual": float(spectrum.residuals[0]),
                "lambda_max": spectrum.lambda_max,
                "gradient_norm": spectrum.gradient_norm,
            }
        )
    return rows


if __name__ == "__main__":
    main()

"""Hessian-vector products and a spectrum beside those of curvlinops, PyHessian and scipy.

    make bench-peers

Runs in an environment of its own with `benchmarks/peers.txt`. Costs are in gradients of the same data, measured in
turns in one process, medians of processor time. Writes `benchmarks/results/peers.json`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import record
import torch
from curvlinops import HessianLinearOperator
from pyhessian import hessian as pyhessian_hessian
from pyhessian.utils import hessian_vector_product
from scipy.sparse.linalg import LinearOperator, eigsh
from suite.networks import Recurrent, autoencoder, convolutional
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

from lightning_sfn.newton import FlatParameters, HessianOperator, Objective, hessian_spectrum
from lightning_sfn.newton.dense import dense_matrix

PEERS = ("curvlinops-for-pytorch", "pyhessian", "scipy")
BASIS, LEADING = 64, 10
_RIGHT = 1e-3  # relative error of an eigenvalue that counts as right


class Flattened(nn.Module):
    """A recurrent network with one row of logits for each predicted character."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, characters: Tensor) -> Tensor:
        """Logits of shape (batch * time, vocabulary)."""
        logits: Tensor = self.network(characters).flatten(0, 1)
        return logits


@dataclass
class Case:
    """A network with data in one or several micro-batches.

    Attributes:
        name: What it is.
        model: The network.
        loss: Mean over the cases of a batch.
        batches: Inputs and targets.
    """

    name: str
    model: nn.Module
    loss: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        """Collects the parameters once."""
        self.parameters = list(self.model.parameters())

    def closures(self) -> list[Callable[[], Tensor]]:
        """One loss for each micro-batch."""
        return [lambda x=x, y=y: self.loss(self.model(x), y) for x, y in self.batches]

    def gradient(self) -> None:
        """One gradient of all data."""
        for x, y in self.batches:
            torch.autograd.grad(self.loss(self.model(x), y), self.parameters)


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    products = []
    for parts in (1, 5):
        for case in tqdm(cases(parts), desc=f"products, {parts} micro-batches"):
            products.append({"case": case.name, "micro_batches": parts} | product_costs(case, options.rounds))
    content = {"peers": {name: version(name) for name in PEERS}, "settings": {"rounds": options.rounds}}
    print(record.write("peers", content | {"products": products, "spectra": spectra()}))


def cases(parts: int, images: int = 1000) -> list[Case]:
    """The networks, with their data in so many micro-batches."""
    torch.manual_seed(0)
    pixels = torch.rand(images, 100)
    classes = torch.randint(10, (images,))
    characters = torch.randint(50, (20, 51))
    perceptron = nn.Sequential(nn.Linear(100, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    entropy = nn.CrossEntropyLoss()
    windows = [(c[:, :-1], c[:, 1:].flatten()) for c in characters.chunk(parts)]
    images = list(zip(pixels.chunk(parts), classes.chunk(parts), strict=True))
    return [
        Case(
            "autoencoder",
            autoencoder((100, 64, 32, 16, 8), nn.Tanh),
            nn.MSELoss(),
            [(x, x) for x in pixels.chunk(parts)],
        ),
        Case("MLP", perceptron, entropy, images),
        Case("CNN", convolutional(), entropy, images),
        Case("recurrent, T = 50", Flattened(Recurrent(50, 120)), entropy, windows),
    ]


def product_costs(case: Case, rounds: int) -> dict[str, Any]:
    """Median seconds of a product in those of a gradient, in turns; and how far the peers' products are from ours."""
    size = parameters_to_vector(case.parameters).numel()
    vector = torch.randn(size)
    ours = HessianOperator(Objective(case.closures()), FlatParameters(case.parameters))
    shaped = FlatParameters(case.parameters).unflatten(vector)
    curvlinops = _curvlinops(case)
    pyhessian = _pyhessian(case)
    ways: dict[str, Callable[[], Any]] = {
        "gradient": case.gradient,
        "lightning_sfn": lambda: ours.matvec(vector),
        "curvlinops": lambda: curvlinops @ vector,
        "pyhessian": lambda: pyhessian(list(shaped)),
    }
    reference = ways["lightning_sfn"]()
    errors = {name: float((ways[name]() - reference).norm() / reference.norm()) for name in ("curvlinops", "pyhessian")}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.process_time()
            way()
            times[name].append(time.process_time() - begun)
    ours.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: medians[name] / medians["gradient"] for name in ways if name != "gradient"}
    return {"parameters": size, "gradient_seconds": medians["gradient"], "ratios": ratios, "differences": errors}


def _curvlinops(case: Case) -> HessianLinearOperator:
    return HessianLinearOperator(case.model, case.loss, case.parameters, case.batches, check_deterministic=False)


def _pyhessian(case: Case) -> Callable[[list[Tensor]], Tensor]:
    """PyHessian's product: kept graphs for one batch, all anew for several."""
    if len(case.batches) == 1:
        kept = pyhessian_hessian(case.model, case.loss, data=case.batches[0], cuda=False)
        return lambda v: torch.cat([p.flatten() for p in hessian_vector_product(kept.gradsH, kept.params, v)])
    loader = pyhessian_hessian(case.model, case.loss, dataloader=case.batches, cuda=False)
    return lambda v: torch.cat([p.flatten() for p in loader.dataloader_hv_product(v)[1]])


def spectra() -> list[dict[str, Any]]:
    """The ten largest eigenvalues and the smallest one of the small CNN against its dense float64 Hessian."""
    case = _convolutional()
    exact = _exact(case)
    rows = []
    for name, way in {"lightning_sfn": _ours, "scipy on curvlinops": _scipy, "PyHessian": _power_iteration}.items():
        case = _convolutional()
        begun = time.process_time()
        values, products = way(case)
        seconds = time.process_time() - begun
        begun = time.process_time()
        for _ in range(5):
            case.gradient()
        gradients = seconds / ((time.process_time() - begun) / 5)
        rows.append({"method": name, "products": products, "gradients": gradients} | _judged(values, exact))
    return rows


def _convolutional() -> Case:
    """The small CNN on so few images that its dense Hessian takes a minute."""
    return cases(1, images=100)[2]


def _exact(case: Case) -> np.ndarray:
    model = case.model.double()
    (x, y) = case.batches[0]
    objective = Objective([lambda: case.loss(model(x.double()), y)])
    values = torch.linalg.eigvalsh(dense_matrix(HessianOperator(objective, FlatParameters(case.parameters))))
    case.model.float()
    return np.asarray(values)


def _judged(values: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """How many of the leading eigenvalues are right in order, and the error of the smallest one."""
    largest, smallest = np.sort(values)[::-1][:LEADING], float(np.min(values))
    wanted = exact[::-1][:LEADING]
    errors = np.abs(largest - wanted[: len(largest)]) / np.abs(wanted[: len(largest)])
    right = int(np.argmin(np.append(errors < _RIGHT, False)))
    low = abs(smallest - exact[0]) / abs(exact[0]) if smallest < 0 else None
    return {"largest_right_in_order": right, "smallest_error": low}


def _ours(case: Case) -> tuple[np.ndarray, int]:
    spectrum = hessian_spectrum(case.closures()[0], case.parameters, krylov_dim=BASIS)
    return np.asarray(spectrum.eigenvalues), BASIS


def _scipy(case: Case) -> tuple[np.ndarray, int]:
    """`eigsh` for both ends of the spectrum at the tolerance that counts as right."""
    operator, count = _curvlinops(case), [0]
    size = parameters_to_vector(case.parameters).numel()

    def product(vector: np.ndarray) -> np.ndarray:
        count[0] += 1
        return (operator @ torch.as_tensor(vector.reshape(-1), dtype=torch.float32)).numpy()

    linear = LinearOperator((size, size), matvec=product, dtype=np.float32)
    ends = [eigsh(linear, k, which=end, ncv=BASIS, tol=_RIGHT, return_eigenvectors=False, v0=np.ones(size, np.float32))
            for end, k in (("LA", LEADING), ("SA", 1))]  # fmt: skip
    return np.concatenate(ends), count[0]


def _power_iteration(case: Case) -> tuple[np.ndarray, None]:
    """`eigenvalues(top_n=10)`: its Lanczos (`density`) calls a function that torch has removed."""
    torch.manual_seed(0)
    values, _ = pyhessian_hessian(case.model, case.loss, data=case.batches[0], cuda=False).eigenvalues(top_n=LEADING)
    return np.asarray(values), None


if __name__ == "__main__":
    main()

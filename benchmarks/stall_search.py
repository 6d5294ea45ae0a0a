"""Where does first-order training of the recipe's autoencoder stall? A search over learning rates and seeds.

    python benchmarks/stall_search.py [--epochs 150] [--seeds 5] [--sizes 100 64 32 16 4] [--linear-code]

SGD with momentum 0.9 over learning rates from 0.01 to 3, and Adam over four, all on the embedded sample with batches
of 100: the recipe's data, network and initialisation, nothing else. Seeds are trained side by side
(`torch.func`). Writes `benchmarks/results/stall_search.json`: final and lowest full-sample loss of every run.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import record
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from tqdm import tqdm

from lightning_sfn.experiments.autoencoder import Autoencoder
from lightning_sfn.experiments.mnist import MNISTDataModule

SGD_RATES = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
BATCH = 100
CHECK_EVERY = 10  # epochs between evaluations on the whole sample


def main() -> None:
    """Runs the search and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 64, 32, 16, 4])
    parser.add_argument("--linear-code", action="store_true")
    parser.add_argument("--name", default="stall_search", help="name of the results file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = sample()
    plateau = float(((images - images.mean(0)) ** 2).sum(1).mean())
    jobs = [("sgd", rate) for rate in SGD_RATES] + [("adam", rate) for rate in ADAM_RATES]
    runs = []
    for method, rate in tqdm(jobs, desc="learning rates"):
        models = [network(seed, options.sizes, options.linear_code) for seed in range(options.seeds)]
        runs.append({"method": method, "lr": rate, **train(models, images, method, rate, options.epochs)})
    settings = {"sizes": options.sizes, "linear_code": options.linear_code, "epochs": options.epochs, "batch": BATCH}
    print(record.write(options.name, {"settings": settings, "error_of_mean_image": plateau, "runs": runs}))


def sample() -> Tensor:
    """The training images of the recipe, shape ``(5000, 100)``."""
    data = MNISTDataModule()
    data.prepare_data()
    data.setup("fit")
    batches = data.train_dataloader().dataset
    return batches.__getitems__(range(len(batches)))  # type: ignore[no-any-return]


def network(seed: int, sizes: Sequence[int], linear_code: bool) -> Autoencoder:
    """The recipe's network with the initial weights of a seed."""
    torch.manual_seed(seed)
    return Autoencoder(sizes=sizes, linear_code=linear_code)


def train(models: list[Autoencoder], images: Tensor, method: str, rate: float, epochs: int) -> dict[str, Any]:
    """Trains several seeds side by side; returns their final and lowest losses on the whole sample."""
    state, _ = stack_module_state(models)  # type: ignore[arg-type]
    weights = {name: tensor.detach().requires_grad_() for name, tensor in state.items()}
    chosen = torch.optim.SGD if method == "sgd" else torch.optim.Adam
    options = {"momentum": 0.9} if method == "sgd" else {}
    optimizer = chosen(list(weights.values()), lr=rate, **options)

    def loss_of(parameters: dict[str, Tensor], batch: Tensor) -> Tensor:
        output = functional_call(models[0], parameters, (batch,))
        return ((output - batch) ** 2).sum() / batch.shape[0]

    step = vmap(grad_and_value(loss_of))
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(models))]
    lowest = torch.full((len(models),), torch.inf)
    for epoch in range(epochs):
        orders = torch.stack([torch.randperm(len(images), generator=g) for g in generators])
        for chunk in orders.split(BATCH, dim=1):
            gradients, _ = step(weights, images[chunk])
            for name, tensor in weights.items():
                tensor.grad = gradients[name]
            optimizer.step()
        if (epoch + 1) % CHECK_EVERY == 0 or epoch + 1 == epochs:
            with torch.no_grad():
                final = vmap(loss_of, in_dims=(0, None))(weights, images)
            lowest = torch.minimum(lowest, torch.nan_to_num(final, nan=torch.inf))
    return {"final": final.tolist(), "lowest": lowest.tolist()}


if __name__ == "__main__":
    main()

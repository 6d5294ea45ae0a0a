"""What ways to hold a Krylov basis cost in memory and in accuracy, and whether the cost model counts right.

    python benchmarks/sharded_basis.py

Lanczos on a diagonal matrix of 2^20 rows whose spectrum has a bulk and outliers at both ends, in float32 from one start
vector, on 1, 2 and 4 processes; compared with the same in float64. The memory is the growth of the resident set at its
peak. Then the operations of a gradient and of a Hessian-vector product of a network are counted.
"""

import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from record import write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_sfn.newton import HessianOperator, Objective
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.krylov import KrylovSubspace, lanczos
from lightning_sfn.newton.processes import Processes

N, KRYLOV_DIM = 2**20, 64
WAYS: dict[str, dict[str, Any]] = {
    "replicated": {},
    "sharded": {"sharded": True},
    "sharded, bfloat16": {"sharded": True, "dtype": torch.bfloat16},
    "sharded, cpu": {"sharded": True, "device": torch.device("cpu")},
}
# Parameters and devices of the predictions; the network is fully connected, of 32-bit numbers.
PREDICTED = [(10**8, 500, 8), (10**8, 500, 64), (10**9, 500, 8), (10**9, 500, 64)]
_PEAK = Path("/proc/self/clear_refs")
BATCH = 1024  # cases of each device that Hessian-vector products see


def main() -> None:
    """Measures, and writes ``results/sharded_basis.json``; says so where the system has not what that takes."""
    if not _PEAK.exists() or "fork" not in multiprocessing.get_all_start_methods():
        print(f"The memory of a process is read from {_PEAK.parent}, as Linux has it: nothing is measured here.")
        return
    torch.set_num_threads(1)
    reference = step_of(subspace(torch.float64, BasisStore()))
    runs = [
        {"processes": size, "basis": way, **on_processes(size, way, reference)} for size in (1, 2, 4) for way in WAYS
    ]
    counted = operations()
    write(
        "sharded_basis",
        {"n": N, "krylov_dim": KRYLOV_DIM, "runs": runs, "flops": counted, "predictions": predictions()},
    )


def eigenvalues(dtype: torch.dtype) -> Tensor:
    """A bulk in [-0.1, 1], five outliers up to 100, two down to -2."""
    bulk = torch.linspace(-0.1, 1.0, N - 7, dtype=torch.float64)
    return torch.cat([bulk, torch.tensor([100.0, 50.0, 20.0, 10.0, 5.0, -1.0, -2.0], dtype=torch.float64)]).to(dtype)


def subspace(dtype: torch.dtype, store: BasisStore) -> KrylovSubspace:
    """The Krylov space of one start vector."""
    values = eigenvalues(dtype)
    start = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    return lanczos(lambda v: store.local(v * values), start, KRYLOV_DIM, generator=generator, store=store)


def step_of(space: KrylovSubspace) -> tuple[Tensor, Tensor]:
    """Ritz values, and the saddle-free step for a gradient along the start vector with damping 0.1."""
    coordinates = space.eigenvectors[0] / (space.eigenvalues.abs() + 0.1)
    return space.eigenvalues, space.lift(coordinates).double()


def on_processes(size: int, way: str, reference: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The largest of each measure over the processes."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=measure, args=(rank, size, way, reference, folder)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        results = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(size)]
    return {name: max(result[name] for result in results) for name in results[0]}


def measure(rank: int, size: int, way: str, reference: tuple[Tensor, Tensor], folder: str) -> None:
    """One process' part."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    processes = Processes()
    store = BasisStore(processes, working_dtype=torch.float32, **WAYS[way])
    processes.sum(torch.zeros(1))
    _PEAK.write_text("5")  # the peak begins here
    before = resident("VmRSS")
    space = subspace(torch.float32, store)
    grown = resident("VmHWM") - before
    values, step = step_of(space)
    gram = torch.stack([store.project(space.basis, row.float()) for row in space.basis])
    result = {
        "basis_mib": space.basis.nbytes / 2**20,
        "peak_mib": grown / 2**10,
        "ritz_error": float((values - reference[0]).abs().max() / reference[0].abs().max()),
        "step_error": float((step - reference[1]).norm() / reference[1].norm()),
        "orthogonality": float((gram - torch.eye(len(gram))).abs().max()),
    }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)


def resident(name: str) -> int:
    """A line of the process' status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def operations() -> dict[str, float]:
    """Floating-point operations of a gradient and of a product on a kept graph, counted and by the model."""
    widths, batch = (64, 256, 256, 256, 256, 64), 32
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    module, inputs = nn.Sequential(*layers), torch.randn(batch, widths[0])
    parameters = list(module.parameters())
    weights = sum(p.numel() for p in parameters if p.ndim == 2)
    operator = HessianOperator(Objective([lambda: module(inputs).square().mean()]), parameters, retention="retain")
    with FlopCounterMode(display=False) as gradient:
        torch.autograd.grad(module(inputs).square().mean(), parameters)
    operator.matvec(torch.randn(operator.parameters.size))
    with FlopCounterMode(display=False) as product:
        operator.matvec(torch.randn(operator.parameters.size))
    first = widths[0] * widths[1]
    return {
        "gradient_counted": gradient.get_total_flops(),
        "gradient_model": (6 * weights - 2 * first) * batch,
        "product_counted": product.get_total_flops(),
        "product_model": (12 * weights - 8 * first) * batch,
    }


def predictions() -> list[dict[str, float]]:
    """The cost model of the page, for one subspace in float32: what each device holds, sends and computes."""
    rows = []
    for n, k, devices in PREDICTED:
        vector = 4 * n
        rows.append(
            {
                "n": n,
                "k": k,
                "devices": devices,
                "replicated_gb": k * vector / 1e9,
                "sharded_gb": k * vector / devices / 1e9,
                "sharded_bf16_gb": k * vector / devices / 2e9,
                "vectors_gb": 12 * vector / 1e9,
                "sent_gb": k * 2 * (devices - 1) / devices * vector / 1e9,
                "product_tflop": k * 12 * n * BATCH / 1e12,
                "orthogonalisation_tflop": k * k * 2 * n / devices / 1e12,
            }
        )
    return rows


if __name__ == "__main__":
    main()

"""What TF32 and bfloat16 inside of products of float32 matrices do to eigenvalues and to steps.

    python benchmarks/rounded_products.py [--quick] [--device cuda]

On the CPU the rounding is simulated as tensor cores do it: the factors of every matrix product and convolution lose the
last bits of their mantissas, sums are float32. On a CUDA device TF32 is the device's own, and bfloat16 is left out.
Ritz values are compared with those of a float64 basis from the same random vector, at three starts of the race: on a
plateau, where Adam stalls, and of a recurrent network. Steps are those of `default` and `turns` from two of them.
Writes `benchmarks/results/rounded_products.json`, or `rounded_products_cuda.json`.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import record
import torch
from suite.methods import METHODS
from suite.tasks import STARTS, TASKS, Problem, Task
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from lightning_sfn.newton import HessianOperator, KrylovSubspace, Objective, lanczos

SPECTRA = {"mnist escape": 100, "mnist last mile": 500, "shakespeare tanh": 200}  # vectors of a basis
STEPS = {"default": 40, "turns": 200}
TASKS_OF_STEPS = ("mnist escape", "mnist last mile")
MANTISSA = {"float32": 23, "tf32": 10, "bfloat16": 7}
ENDS = 3  # eigenvalues looked at on either end

_aten = torch.ops.aten
_FACTORS = {  # which arguments are multiplied with each other; what is added is not
    **dict.fromkeys((_aten.mm, _aten.bmm, _aten.convolution), slice(0, 2)),
    **dict.fromkeys((_aten.addmm, _aten.addmm_, _aten.baddbmm), slice(1, 3)),
    _aten.convolution_backward: slice(0, 3),
}


class Rounded(TorchDispatchMode):
    """Rounds the factors of products to so many bits, ties to even."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._drop = 23 - bits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Sees one operation."""
        factors = _FACTORS.get(func.overloadpacket)
        if factors is not None:
            changed = list(args)
            changed[factors] = [self._round(value) for value in args[factors]]
            args = tuple(changed)
        return func(*args, **(kwargs or {}))

    def _round(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        whole = value.contiguous().view(torch.int32)
        half = (1 << (self._drop - 1)) - 1 + ((whole >> self._drop) & 1)
        return ((whole + half) & -(1 << self._drop)).view(torch.float32)


@contextmanager
def arithmetic(name: str, device: torch.device) -> Iterator[None]:
    """Runs the body with products in one of the formats of `MANTISSA`; cuDNN does not round."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if device.type == "cuda" and name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = False
    simulated = device.type == "cpu" and name != "float32"
    try:
        with Rounded(MANTISSA[name]) if simulated else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs")
    record.add_device(parser)
    parser.add_argument("--seeds", type=int, default=3, help="of the steps")
    parser.add_argument("--folder", type=Path, default=record.RESULTS, help="where the results go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device, quick = options.device, options.quick
    formats = [name for name in MANTISSA if device.type == "cpu" or name != "bfloat16"]
    with tempfile.TemporaryDirectory() as folder:
        starts = Path(folder) if quick else STARTS

        def start(name: str, seed: int) -> Problem:
            task: Task = TASKS[name].tiny() if quick else TASKS[name]
            return task.start(seed, Path(folder), starts).to(device)

        found = {
            "settings": {"device": record.processor_of(device) or "cpu, simulated", "quick": quick},
            "spectra": [row for name in tqdm(SPECTRA, desc="spectra") for row in spectra(name, start, formats, quick)],
            "steps": steps(start, formats, 1 if quick else options.seeds, quick),
        }
    return record.write(record.named("rounded_products", device), found, folder=options.folder)


def _basis(problem: Problem, dim: int, name: str) -> KrylovSubspace:
    """A basis of the Hessian from a random vector that is the same for every precision."""
    device = problem.inputs.device
    with arithmetic(name, device):
        operator = HessianOperator(Objective([problem.loss]), problem.model.parameters())
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(operator.parameters.size, dtype=torch.float64, generator=generator)
        start = start.to(device, operator.parameters.dtype)
        space = lanczos(operator.matvec, start, dim, generator=torch.Generator(device).manual_seed(0))
        operator.close()
    return space


def spectra(
    name: str, start: Callable[[str, int], Problem], formats: list[str], quick: bool
) -> Iterator[dict[str, Any]]:
    """Both ends of a spectrum in each format beside those of float64."""
    problem, dim = start(name, 0), 20 if quick else SPECTRA[name]
    double = copy.deepcopy(problem)
    double.model.double()
    if double.inputs.is_floating_point():
        double.inputs, double.targets = double.inputs.double(), double.targets.double()
    exact = _basis(double, dim, "float32").eigenvalues
    for precision in formats:
        space = _basis(problem, dim, precision)
        off = ((space.eigenvalues - exact) / exact).abs()
        gram = space.basis.double() @ space.basis.double().T
        yield {
            "task": name,
            "format": precision,
            "lambda_min": float(exact[0]),
            "lambda_max": float(exact[-1]),
            "smallest_errors": off[:ENDS].tolist(),
            "largest_errors": off[-ENDS:].flip(0).tolist(),
            "smallest_error": float((space.eigenvalues[0] - exact[0]).abs()),
            "smallest_residual": float(space.residuals[0]),
            "rounding": space.rounding,
            "deviation": float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()),
        }


def steps(start: Callable[[str, int], Problem], formats: list[str], seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Losses after as many steps of two methods in each format."""
    rows = []
    with tqdm(total=len(TASKS_OF_STEPS) * len(STEPS) * len(formats) * seeds, desc="steps") as bar:
        for name in TASKS_OF_STEPS:
            for method, count in STEPS.items():
                row: dict[str, Any] = {"task": name, "method": method, "steps": 2 if quick else count}
                for precision in formats:
                    row[precision] = []
                    for seed in range(seeds):
                        row[precision].append(_after(start(name, seed), method, row["steps"], precision, seed))
                        bar.update()
                rows.append(row)
    return rows


def _after(problem: Problem, method: str, count: int, precision: str, seed: int) -> float | None:
    """The loss afterwards; ``None`` where a step failed because something was not finite."""
    torch.manual_seed(seed)
    with arithmetic(precision, problem.inputs.device):
        stepping = METHODS[method](problem)
        try:
            for _ in range(count):
                next(stepping)
        except (FloatingPointError, torch.linalg.LinAlgError):
            return None
    with torch.no_grad():
        return float(problem.loss())


if __name__ == "__main__":
    print(main())

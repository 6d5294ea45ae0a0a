"""The second-order engine: what products, a basis and a step cost, each as a ratio inside one run.

    python benchmarks/engine.py [--quick] [--device cuda] [--only products spectrum ...]

One thread, processor time (on a CUDA device the clock, with the device waited for), the measured things in turns,
medians. Measured are Hessian-vector products in gradients, both ends of a large spectrum in gradients, orthogonality
and orthogonalisation, memory beside the byte budget, the parts of a Newton step, growth, and waits for the device.
Writes `benchmarks/results/engine.json`, or `engine_cuda.json`; with ``--only`` the other parts of that file stay.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record
import torch
from engine_parts import basis, growth, memory, products, spectra, steps
from tqdm import tqdm

from lightning_sfn.experiments.conditions import conditions


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    record.add_device(parser)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to measure")
    parser.add_argument("--steps", type=int, default=400, help="Adam steps before the spectrum is taken")
    parser.add_argument("--reference", type=int, default=220, help="vectors of the float64 reference of the spectrum")
    parser.add_argument("--folder", type=Path, default=record.RESULTS, help="where the results go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.quick:
        options.steps, options.reference = 5, 20
    device = options.device
    name = record.named("engine", device)
    content = _earlier(options.folder / f"{name}.json") if set(options.only) != set(PARTS) else {}
    where = record.processor_of(device)
    content["settings"] = {"device": where or "cpu", "quick": options.quick, "steps": options.steps}
    for part in tqdm(options.only, desc="engine"):
        content[part] = PARTS[part](device, options)
        content.setdefault("measured", {})[part] = conditions()  # parts may be from different days and processors
        path = record.write(name, content, folder=options.folder)
    return path


def _earlier(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    content.pop("conditions", None)
    return content


PARTS: dict[str, Callable[[torch.device, argparse.Namespace], Any]] = {
    "products": lambda device, options: products.measure(device, options.quick),
    "memory": lambda device, options: memory.measure(device, options.quick),
    "basis": lambda device, options: basis.measure(device, options.quick),
    "steps": lambda device, options: steps.measure(device, options.quick),
    "growth": lambda device, options: growth.measure(device, options.quick),
    "spectrum": lambda device, options: spectra.measure(device, options.quick, options.steps, options.reference),
}


if __name__ == "__main__":
    print(main())

"""How long the parts of a step take, and what the device's matrix rate and bandwidth would allow."""

import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_sfn.experiments.conditions import conditions, rounded
from lightning_sfn.experiments.runner import write_atomically
from lightning_sfn.newton import HessianOperator, KroneckerFactors, Objective
from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.coordinates import make_preconditioner
from lightning_sfn.newton.curvature import gradient_of
from lightning_sfn.newton.graphs import GraphBudget
from lightning_sfn.newton.krylov import lanczos
from paper_scale.first_order import FirstOrder, Momentum, Schedule
from paper_scale.memory import require_room
from paper_scale.settings import Settings
from paper_scale.task import Task

__all__ = ["Part", "layer_sizes", "write_roofline"]

_LOG = logging.getLogger("paper_scale")
_GRID = 6  # dampings of the paper's grid
_OUR_TRIALS = 4  # trial losses of an inner step, as measured on small networks
_OUR_LARGEST_K = 4  # where the optimizer chooses k, as long as it sees much negative curvature


@dataclass(frozen=True)
class Part:
    """One part of a step.

    Attributes:
        name: What it is.
        seconds: Time of one.
        flops: Floating-point operations of one.
        bytes: Bytes that one moves at least, each tensor that is used counted once.
        in_step: How many there are in one step of each method.
    """

    name: str
    seconds: float
    flops: float
    bytes: float
    in_step: dict[str, float]

    def against(self, flop_rate: float, bandwidth: float) -> dict[str, Any]:
        """The part beside the lower bound of its time.

        Args:
            flop_rate: Measured operations in a second.
            bandwidth: Measured bytes in a second.
        """
        bounds = {"matrix rate": self.flops / flop_rate, "bandwidth": self.bytes / bandwidth}
        limit = max(bounds, key=bounds.__getitem__)
        return {
            "part": self.name,
            "seconds": self.seconds,
            "flops": self.flops,
            "bytes": self.bytes,
            "bound_seconds": bounds[limit],
            "limit": limit,
            "share_of_roofline": bounds[limit] / self.seconds,
        }


def write_roofline(task: Task, path: Path) -> dict[str, Any]:
    """Measures the device and the parts of a step, and how far a bfloat16 basis is off; writes a JSON file.

    Args:
        task: The task.
        path: The file.

    Returns:
        Its content.

    Raises:
        ValueError: The task is another one than the autoencoder, whose operations are counted here.
    """
    if task.settings.task != "autoencoder":
        raise ValueError(f"The roofline is that of the autoencoder, but the task is {task.settings.task!r}.")
    device = device_rates(task.device)
    _LOG.info("matrix rate %.3g FLOP/s, bandwidth %.3g B/s", device["flop_rate"], device["bandwidth"])
    parts = list(_parts(task))
    rows = [part.against(**device) for part in parts]
    for part, row in zip(parts, rows, strict=True):
        row |= {f"share_of_{name}": part.in_step.get(name, 0.0) * part.seconds for name in ("sfn_paper", "sfn")}
    for name in ("sfn_paper", "sfn"):
        total = sum(row[f"share_of_{name}"] for row in rows)
        device[f"step_seconds_{name}"] = total
        for row in rows:
            row[f"share_of_{name}"] /= total
    content = {"conditions": conditions(), "device": device, "parts": rows, "bfloat16_basis": bfloat16_error(task)}
    write_atomically(path, json.dumps(rounded(content), indent=1) + "\n")
    _LOG.info("written to %s", path)
    return content


def device_rates(device: torch.device) -> dict[str, float]:
    """Measured rate of a square float32 matrix product, and bandwidth of a copy (bytes read and written)."""
    on_cuda = device.type == "cuda"
    side, length = (8192, 2**28) if on_cuda else (1024, 2**24)
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    product = _timed(lambda: torch.mm(a, b), device)
    source, target = torch.randn(length, device=device), torch.empty(length, device=device)
    copy = _timed(lambda: target.copy_(source), device)
    return {"flop_rate": 2 * side**3 / product, "bandwidth": 2 * 4 * length / copy}


def layer_sizes(settings: Settings) -> list[tuple[int, int]]:
    """Inputs and outputs of each layer, from the image to its reconstruction."""
    return list(pairwise((*settings.sizes, *settings.sizes[-2::-1])))


def _parts(task: Task) -> list[Part]:
    settings = task.settings
    problem = task.problem()
    flat, cases = problem.parameters, len(task.train)
    vector, n = 4 * flat.size, flat.size
    weights = sum(a * b for a, b in layer_sizes(settings))
    activations = 4 * cases * sum(b for _, b in layer_sizes(settings))
    k = min(settings.krylov_dim, n)
    whole = problem.objective()
    ours, inner = (settings.curvature_share, settings.trial_share), settings.our_inner_steps
    grads = {"sfn_paper": settings.inner_steps, "sfn": inner * (1 + ours[1])}
    device = task.device
    gradient = _timed(lambda: gradient_of(whole, flat), device)
    value = _timed(lambda: _without_graph(whole), device)
    product, product_flops, saved = _product(task, whole)
    orthogonalisation, lift = _basis_work(task, n, k)
    first = FirstOrder(
        problem,
        lambda point: Momentum(point, nesterov=True),
        Schedule(1e-9, 10**9, 0.9),
        batch_size=settings.batch_size,
        seed=0,
    )
    update = _timed(first.advance, device) / first.updates_per_epoch
    first_layer = settings.sizes[0] * settings.sizes[1]
    gradient_flops = (6 * weights - 2 * first_layer) * cases
    trials = {"sfn_paper": _GRID * settings.inner_steps, "sfn": _OUR_TRIALS * inner * ours[1]}
    our_k = settings.our_krylov_dim or _OUR_LARGEST_K
    return [
        Part("first-order update", update, gradient_flops * settings.batch_size / cases, 8 * vector, {}),
        Part("gradient on all images", gradient, gradient_flops, 4 * activations + 3 * vector, grads),
        Part("trial loss on all images", value, 2 * weights * cases, 2 * activations + vector, trials),
        Part(
            "product on all images",
            product,
            product_flops,
            saved + 4 * vector,
            {"sfn_paper": k + 1, "sfn": (our_k + 1) * ours[0]},
        ),
        Part(f"orthogonalisation against {k} vectors", orthogonalisation, 4 * k * n, 2 * k * vector, {
            "sfn_paper": k / 2,
            "sfn": our_k**2 / 2 / k + 2 * settings.previous_directions * our_k / k,
        }),
        Part(f"{_GRID} steps from {k} vectors", lift, 2 * _GRID * k * n, k * vector, {
            "sfn_paper": settings.inner_steps,
            "sfn": inner * (our_k + settings.previous_directions) / k,
        }),
        *_kronecker_work(task, layer_sizes(settings), our_k),
    ]  # fmt: skip


def _kronecker_work(task: Task, layers: list[tuple[int, int]], our_k: int) -> list[Part]:
    """The factors of all layers with their roots, and the map of one vector; nothing in other coordinates."""
    settings, problem = task.settings, task.problem()
    coordinates = make_preconditioner(settings.preconditioner)
    if not isinstance(coordinates, KroneckerFactors):
        return []
    count = max(1, round(settings.curvature_share * len(task.train)))
    objective = problem.objective(torch.arange(count))
    operator = HessianOperator(objective, problem.parameters, retention="recompute")
    generator = torch.Generator(task.device).manual_seed(0)

    def estimate() -> None:
        coordinates.reset()  # or it would wait for its turn
        coordinates.refresh(operator, generator, bent=False)  # along a valley: no product in it

    vector = torch.randn(problem.parameters.size, device=task.device)
    estimation = _timed(estimate, task.device)
    mapping = _timed(lambda: coordinates.scale(vector), task.device)
    operator.close()
    # Two moments and about 9 m^3 for the eigenvectors of each factor and 4 m^3 for its two roots.
    moments = sum(2 * count * ((a + 1) ** 2 + b**2) for a, b in layers)
    roots = sum(13 * ((a + 1) ** 3 + b**3) for a, b in layers)
    maps = sum(2 * (a + 1) * b * (a + 1 + b) for a, b in layers)
    used = {"sfn": 2 * our_k + 2 * settings.previous_directions + _OUR_TRIALS + 2.0}
    return [
        Part("Kronecker factors and roots", estimation, moments + roots, coordinates.memory, {
            "sfn": 1 / coordinates.refresh_every,
        }),
        Part("Kronecker map of one vector", mapping, maps, coordinates.memory / 3 + 2 * vector.nbytes, used),
    ]  # fmt: skip


def _product(task: Task, whole: Objective) -> tuple[float, float, float]:
    """Seconds, operations and bytes read of one product on kept graphs."""
    problem = task.problem()
    objective, flat = problem.objective(), problem.parameters
    budget = GraphBudget(task.settings.graph_bytes)
    operator = HessianOperator(objective, flat, retention="auto", budget=budget)
    vector = torch.randn(flat.size, device=task.device)
    operator.matvec(vector)
    seconds = _timed(lambda: operator.matvec(vector), task.device)
    operator.close()
    part = HessianOperator(
        problem.objective(torch.arange(len(task.train[: task.settings.part]))), flat, retention="retain"
    )
    part.matvec(vector)
    # PyTorch's counter passes over the form of this product that adds to what is there.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **others: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        part.matvec(vector)
    part.close()
    share = len(task.train) / len(task.train[: task.settings.part])
    return seconds, counter.get_total_flops() * share, (budget.bytes_per_size or 0.0) * len(task.train)


def _basis_work(task: Task, n: int, k: int) -> tuple[float, float]:
    """Seconds of one pass of Gram-Schmidt against k vectors, and of the steps of the whole damping grid."""
    require_room(n, k, device=task.device)
    store = BasisStore()
    vector = torch.randn(n, device=task.device)
    basis = store.empty(k, vector)
    basis.normal_()
    coefficients = torch.randn(_GRID, k, dtype=torch.float64)
    one_pass = _timed(lambda: store.combine(store.project(basis, vector), basis), task.device)
    return one_pass, _timed(lambda: store.combine(coefficients, basis), task.device)


def bfloat16_error(task: Task) -> dict[str, float]:
    """How far Ritz values and step are off with a basis in bfloat16, against one in float32.

    Args:
        task: The task; the products see its first images, as spectra do.

    Returns:
        Largest error of a Ritz value at either end relative to the largest one, and relative error of the step of the
        best damping for the paper's grid, 1e-2.
    """
    problem, settings = task.problem(), task.settings
    flat = problem.parameters
    rows = torch.arange(min(settings.probe_cases, len(task.train)), device=task.device)
    operator = HessianOperator(problem.objective(rows), flat, retention="retain")
    _, gradient = operator.loss_and_gradient()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        store = BasisStore(dtype=dtype, working_dtype=torch.float32, working_device=task.device)
        generator = torch.Generator(task.device).manual_seed(settings.seed)
        space = lanczos(
            operator.matvec, gradient, min(settings.krylov_dim, flat.size), generator=generator, store=store
        )
        step = space.lift(space.coordinates(gradient) / (space.eigenvalues.abs() + 1e-2))
        found[dtype] = (space.eigenvalues, step)
    operator.close()
    (values, step), (rough_values, rough_step) = found[torch.float32], found[torch.bfloat16]
    ends = [0, -1]
    return {
        "krylov_dim": len(values),
        "ritz_error": float((values - rough_values)[ends].abs().max() / values.abs().max()),
        "step_error": float((step - rough_step).norm() / step.norm()),
    }


@torch.no_grad()
def _without_graph(objective: Objective) -> float:
    return objective.value()


def _timed(work: Callable[[], object], device: torch.device, *, least: float = 0.2) -> float:
    """Median seconds of a few runs after one that is not counted."""
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < least and len(times) < 50):
        if device.type == "cuda":
            torch.cuda.synchronize()
        since = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(max(time.perf_counter() - since, math.ulp(1.0)))
    return statistics.median(times)

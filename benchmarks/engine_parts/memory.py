"""Memory above the basis: what kept graphs take beside their budget, and the peak of building a basis."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lightning_sfn.newton import HessianOperator, Objective
from lightning_sfn.newton.graphs import GraphBudget
from lightning_sfn.newton.spectrum import SpectrumSettings, spectrum_of

from .networks import Case, autoencoder, convolutional, recurrent_cell


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Three networks in ten micro-batches, with budgets for all graphs, for some and for none."""
    rows = []
    for case in (
        autoencoder(device, quick, (10, 4 if quick else 50)),
        convolutional(device, quick, (10, 2 if quick else 32)),
        _in_micro_batches(recurrent_cell(device, quick), 10),
    ):
        whole = _graph_bytes(case)
        rows += [_held(case, device, round(whole * share), share, quick) for share in (1.0, 0.5, 0.0)]
    return rows


def _in_micro_batches(case: Case, count: int) -> Case:
    return Case(case.name, case.model, case.closures * count, case.target)


def _graph_bytes(case: Case) -> float:
    """Bytes of all graphs together, as the budget counts them."""
    budget = GraphBudget()
    operator = HessianOperator(Objective(case.closures), case.parameters, budget=budget)
    operator.loss_and_gradient()  # what a graph takes is measured when the first is asked for
    operator.close()
    return (budget.bytes_per_size or 0.0) * len(case.closures)


def _held(case: Case, device: torch.device, limit: int, share: float, quick: bool) -> dict[str, Any]:
    """One budget: bytes of the graphs that are held, and the peak of a small spectrum above its basis."""
    operator = HessianOperator(Objective(case.closures), case.parameters, budget=GraphBudget(limit))
    size, item = operator.parameters.size, 4
    vector = torch.randn(size, device=device)
    operator.objective.value()  # from its first evaluation on it keeps the states of the random generators
    held, _ = allocations(lambda: operator.matvec(vector), device)
    kept = operator._graphs.retained
    operator.close()
    dim = 4 if quick else 8
    fresh = HessianOperator(Objective(case.closures), case.parameters, budget=GraphBudget(limit))
    _, peak = allocations(lambda: spectrum_of(fresh, SpectrumSettings(dim)), device)
    return {
        "case": case.name,
        "budget_share": share,
        "budget_bytes": limit,
        "kept_graphs": kept,
        "graphs": len(case.closures),
        "held_bytes": held,
        "peak_above_basis_bytes": peak - dim * size * item,
        "vector_bytes": size * item,
    }


def allocations(work: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """By the allocator's books: bytes that a call leaves behind, its result dropped, and the most it had at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        work()
    assert events.profiler is not None
    assert events.profiler.kineto_results is not None
    moves = sorted(
        (event.start_ns(), event.nbytes())
        for event in events.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    level = peak = 0
    for _, change in moves:
        level += change
        peak = max(peak, level)
    return level, peak

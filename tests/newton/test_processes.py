"""Several ranks: exactness against one process, what they send each other, the sharded basis, and failures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_sfn.newton import SaddleFreeNewton
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.processes import Processes

from .ranks import Collectives

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

ROWS = 24


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 5, dtype=torch.float64, generator=generator)
    return x.to(dtype), (x[:, :3] * x[:, 2:]).tanh().to(dtype)


def loss_on(module: nn.Module, rows: slice, dtype: torch.dtype) -> Callable[[], Tensor]:
    x, y = (tensor[rows] for tensor in data(dtype))
    return lambda: (module(x) - y).square().mean()


def rows_of(rank: int, size: int) -> slice:
    return slice(rank * ROWS // size, (rank + 1) * ROWS // size)


def steps(count: int, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """A few steps on this rank's rows, or on all rows where there is no process group."""
    processes = Processes() if dist.is_initialized() else None
    rank, size = (0, 1) if processes is None else (processes.rank, processes.size)
    module = network(dtype)
    optimizer = SaddleFreeNewton(module.parameters(), processes=processes, **options)
    closure = loss_on(module, rows_of(rank, size), dtype)
    parameters, records = [], []
    counted = Collectives(small=sum(p.numel() for p in module.parameters()) * dtype.itemsize // 4)
    with counted:
        for _ in range(count):
            optimizer.step(closure)
            parameters.append(FlatParameters(module.parameters()).read())
            records.append(optimizer.last_step)
    state = optimizer.state_dict()
    return {"parameters": parameters, "records": records, "counted": counted.__dict__, "state": state}

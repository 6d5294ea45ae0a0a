"""Steps and spectra inside of autocast are those of closures that enter autocast themselves; float32 is not rounded.

What rounds products of float32 is simulated: by the switches of a GPU, or of a processor that multiplies in bfloat16.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sfn.newton import HessianOperator, Objective, SaddleFreeNewton, hessian_spectrum
from lightning_sfn.newton.outlook import outlook_of
from lightning_sfn.newton.precision import Autocast, full_precision, rounds_to_bfloat16
from lightning_sfn.newton.subspace_descent import KrylovSubspaceDescent


class Task:
    """A classifier whose closure says in which dtype it computed."""

    def __init__(self, *, inside: bool) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.x, self.y, self.inside = torch.randn(20, 4), torch.randint(3, (20,)), inside
        self.dtypes: set[torch.dtype] = set()

    def autocast(self, on: bool) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()

    def closure(self) -> Any:
        with self.autocast(self.inside):
            logits = self.model(self.x)
            self.dtypes.add(logits.dtype)
            return F.cross_entropy(logits, self.y)

    def pair(self, curvature: str) -> Callable[[], Any]:
        def closure() -> Any:
            with self.autocast(self.inside):
                logits = self.model(self.x)
                losses = F.cross_entropy(logits, self.y, reduction="none")
            others = {"gauss_newton": logits, "fisher": Categorical(logits=logits), "gradient_covariance": losses}
            return (losses.mean(), others[curvature]) if curvature in others else losses.mean()

        return closure

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preconditioner": None},
        {"preconditioner": "diagonal", "heavy_ball": 0.9},
        {"krylov_dim": "full"},
        {"hvp": "finite_difference"},
        {"hvp": "recompute"},
        {"basis_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_steps_inside_of_autocast(options: dict[str, Any]) -> None:
    tasks = [Task(inside=inside) for inside in (False, True)]
    losses: list[list[float]] = [[], []]
    for task, seen in zip(tasks, losses, strict=True):
        optimizer = SaddleFreeNewton(task.model.parameters(), **options)
        with task.autocast(not task.inside):
            for _ in range(4):
                seen.append(float(optimizer.step(task.closure, trial_closure=task.closure)))
            assert torch.is_autocast_enabled("cpu") is not task.inside
        assert task.dtypes == {torch.bfloat16}
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert torch.equal(tasks[0].weights, tasks[1].weights)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "fisher", "gradient_covariance"])
def test_spectra_inside_of_autocast(curvature: Any) -> None:
    spectra = []
    for inside in (False, True):
        task = Task(inside=inside)
        with task.autocast(not inside):
            closure, parameters = task.pair(curvature), task.model.parameters()
            spectra.append(hessian_spectrum(closure, parameters, 8, curvature=curvature, density_probes=1))
    assert torch.equal(spectra[0].eigenvalues, spectra[1].eigenvalues)
    assert spectra[0].lambda_max > 0
    assert spectra[0].to_dict() == spectra[1].to_dict()


def test_outlooks_inside_of_autocast() -> None:
    outlooks = []
    for inside in (False, True):
        task = Task(inside=inside)
        with task.autocast(not inside):
            operator = HessianOperator(Objective([task.closure]), task.model.parameters())
            outlooks.append(outlook_of(operator, 8))
        assert task.dtypes == {torch.bfloat16}
    assert outlooks[0] == outlooks[1]


def test_subspace_descent_inside_of_autocast() -> None:
    tasks = [Task(inside=inside) for inside in (False, True)]
    for task in tasks:
        optimizer = KrylovSubspaceDescent(task.model.parameters(), krylov_dim=4)
        with task.autocast(not task.inside):
            optimizer.step(task.closure)
        assert task.dtypes == {torch.bfloat16}
    assert torch.equal(tasks[0].weights, tasks[1].weights)


def test_what_was_cast_before_a_step_is_cast_anew_after_it() -> None:
    """Autocast keeps the weights that it has cast, which a step changes."""
    task = Task(inside=False)
    optimizer = SaddleFreeNewton(task.model.parameters())
    with task.autocast(True):
        before = float(task.closure().detach())
        assert float(optimizer.step(task.closure)) == before
        kept = task.model(task.x)
    with task.autocast(True):
        assert torch.equal(kept, task.model(task.x))


def test_an_objective_keeps_the_precision_of_where_it_was_made() -> None:
    task = Task(inside=False)
    with task.autocast(True):
        objective = Objective([task.closure])
    for each in (objective, objective.local()):
        task.dtypes.clear()
        each.value()
        assert task.dtypes == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")


def test_nothing_is_changed_where_there_is_no_autocast() -> None:
    with full_precision(), Autocast().restored():
        assert not torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", torch.bfloat16), full_precision():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


# ------------------------------------------------------------------------------------------------ float32

CUDA, CPU, CUDNN = torch.backends.cuda, torch.backends.mkldnn, torch.backends.cudnn
NEWER = pytest.mark.skipif(not hasattr(CUDNN, "conv"), reason="this torch has no precision for each operation")
BITS = {"tf32": 10, "bf16": 7}  # of the mantissa


def matmul(kind: str) -> str:
    """How products of float32 matrices are computed on a kind of device, by whichever switches this torch has."""
    switch = (CUDA if kind == "cuda" else CPU).matmul if hasattr(CUDNN, "conv") else None
    if switch is not None:
        return str(switch.fp32_precision)
    return {"highest": "ieee", "high": "tf32", "medium": "tf32" if kind == "cuda" else "bf16"}[
        torch.get_float32_matmul_precision()
    ]


def rounded(value: Any, bits: int) -> Any:
    """Float32 tensors to the nearest number of fewer bits, ties to even."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    drop, whole = 23 - bits, value.contiguous().view(torch.int32)
    half = (1 << (drop - 1)) - 1 + ((whole >> drop) & 1)
    return ((whole + half) & -(1 << drop)).view(torch.float32)


class Products(TorchDispatchMode):
    """Rounds the factors of matrix products as the switches say at that moment, and counts which it has rounded."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.rounded, self.exact = kind, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            bits, added = BITS.get(matmul(self.kind)), func.overloadpacket.__name__ in ("addmm", "baddbmm")
            self.rounded, self.exact = self.rounded + (bits is not None), self.exact + (bits is None)
            if bits is not None:
                args = (*args[:added], *(rounded(a, bits) for a in args[added:]))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def switches_as_they_were() -> Iterator[None]:
    yield
    if hasattr(CUDNN, "conv"):
        torch.backends.fp32_precision = CUDA.matmul.fp32_precision = CPU.matmul.fp32_precision = "none"
        CPU.conv.fp32_precision = CPU.rnn.fp32_precision = CUDNN.fp32_precision = CPU.fp32_precision = "none"
        CUDNN.conv.fp32_precision = CUDNN.rnn.fp32_precision = "tf32"
    CUDNN.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")


def read(everything: bool = False) -> list[Any]:
    """Every switch, or those of products; what torch refuses to say is part of it."""

    def ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except RuntimeError:
            return "refused"

    newer = [CUDA.matmul, CPU.matmul, CUDNN.conv, CUDNN.rnn, CPU.conv, CPU.rnn] if hasattr(CUDNN, "conv") else []
    older = [torch.get_float32_matmul_precision, lambda: CUDA.matmul.allow_tf32, lambda: CUDNN.allow_tf32]
    return [switch.fp32_precision for switch in newer] + [ask(question) for question in older if everything]


def by_newer(owner: Any, precision: str) -> Callable[[], None]:
    return lambda: setattr(owner, "fp32_precision", precision)


SETTINGS = [
    lambda: None,
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: setattr(CUDA.matmul, "allow_tf32", True),
    lambda: setattr(CUDNN, "allow_tf32", False),
]
if hasattr(CUDNN, "conv"):
    SETTINGS += [
        by_newer(torch.backends, "tf32"),
        by_newer(CUDA.matmul, "tf32"),
        by_newer(CPU.matmul, "bf16"),
        by_newer(CUDNN.conv, "ieee"),
        by_newer(CPU.rnn, "bf16"),
        lambda: (torch.set_float32_matmul_precision("medium"), by_newer(CUDA.matmul, "ieee")()),
    ]


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_switches_of_float32_are_those_of_before(setting: Callable[[], None], tf32: bool) -> None:
    setting()
    before = read(everything=True)
    with full_precision(tf32=tf32):
        inside = read()
        with full_precision(tf32=tf32):
            assert read() == inside
        assert read() == inside
    assert "bf16" not in inside
    assert not any(now == "tf32" and then == "ieee" for now, then in zip(inside, before, strict=False))
    assert tf32 or "tf32" not in inside
    if tf32:
        assert all(now == then for now, then in zip(inside, before, strict=False) if then != "bf16")
    assert read(everything=True) == before
    with pytest.raises(ValueError, match="of the body"), full_precision(tf32=tf32):
        raise ValueError("of the body")
    assert read(everything=True) == before


@pytest.mark.parametrize("asked", ["high", "medium"])
def test_torch_answers_by_the_older_switches_inside_too(asked: str) -> None:
    """Where they set the precision: code of users, and torch's own, goes on asking them."""
    torch.set_float32_matmul_precision(asked)
    with full_precision(tf32=False):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not CUDA.matmul.allow_tf32
        assert not CUDNN.allow_tf32
    with full_precision():
        assert torch.get_float32_matmul_precision() == "high"
        assert CUDA.matmul.allow_tf32
        assert CUDNN.allow_tf32


@pytest.mark.parametrize(("kind", "asked"), [("cuda", "high"), ("cuda", "medium"), ("cpu", "medium")])
def test_spectra_do_not_round_products(kind: str, asked: str) -> None:
    task = Task(inside=False)
    parameters = list(task.model.parameters())

    def measured() -> list[Any]:
        operator = HessianOperator(Objective([task.closure]), parameters)
        return [hessian_spectrum(task.closure, parameters, 8, density_probes=1).to_dict(), outlook_of(operator, 8)]

    exact = measured()
    torch.set_float32_matmul_precision(asked)
    rounds = matmul(kind)
    with Products(kind) as products:
        assert measured() == exact
    assert products.exact
    assert not products.rounded
    direction = torch.ones(sum(p.numel() for p in parameters))
    with Products(kind) as products:  # the operators alone round as the process does
        by_itself = HessianOperator(Objective([task.closure]), parameters).matvec(direction)
    assert products.rounded
    torch.set_float32_matmul_precision("highest")
    whole = HessianOperator(Objective([task.closure]), parameters).matvec(direction)
    assert 0 < float((by_itself - whole).norm() / whole.norm()) < 2 ** -BITS[rounds]


@pytest.mark.parametrize(("kind", "asked"), [("cuda", "high"), ("cuda", "medium"), ("cpu", "medium")])
@pytest.mark.parametrize("make", [SaddleFreeNewton, KrylovSubspaceDescent])
def test_steps_leave_tf32_to_the_process_and_take_no_bfloat16(make: Callable[..., Any], kind: str, asked: str) -> None:
    task, seen = Task(inside=False), set()

    def closure() -> Tensor:
        seen.add(matmul(kind))
        result: Tensor = task.closure()
        return result

    torch.set_float32_matmul_precision(asked)
    optimizer = make(task.model.parameters())
    with Products(kind) as products:
        first = float(optimizer.step(closure))
        assert float(optimizer.step(closure)) < first
    assert seen == {"tf32"}
    assert products.rounded


@NEWER
def test_bfloat16_on_the_cpu_is_noticed_however_it_was_asked_for() -> None:
    assert not rounds_to_bfloat16()
    for switch in (CPU.matmul, CPU.conv, CPU.rnn):
        switch.fp32_precision = "bf16"
        assert rounds_to_bfloat16()
        switch.fp32_precision = "none"
    torch.set_float32_matmul_precision("high")
    assert not rounds_to_bfloat16()
    torch.set_float32_matmul_precision("medium")
    assert rounds_to_bfloat16()
    CPU.matmul.fp32_precision = "ieee"
    assert not rounds_to_bfloat16()


@NEWER
def test_a_switch_that_follows_another_follows_it_afterwards() -> None:
    torch.backends.fp32_precision = "tf32"
    for tf32 in (True, False):
        with full_precision(tf32=tf32):
            pass
    torch.backends.fp32_precision = "ieee"
    assert CUDA.matmul.fp32_precision == CPU.matmul.fp32_precision == CPU.conv.fp32_precision == "ieee"


def test_steps_leave_the_switches_alone_where_nothing_is_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: asked.append(None) or "highest")
    with full_precision():
        pass
    assert bool(asked) != hasattr(CUDNN, "conv")

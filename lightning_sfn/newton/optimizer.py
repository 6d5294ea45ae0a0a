"""`SaddleFreeNewton`: Algorithm 1 of the paper as a `torch.optim.Optimizer`: options, bookkeeping and state."""

import inspect
import math
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lightning_sfn.newton.basis import BasisName, BasisStore, check_basis
from lightning_sfn.newton.carried import Carried, moved_to
from lightning_sfn.newton.coordinates import make_preconditioner
from lightning_sfn.newton.curvature import CurvatureOperator, gradient_of
from lightning_sfn.newton.damping import Damping, make_damping
from lightning_sfn.newton.graphs import GraphBudget
from lightning_sfn.newton.memory import StepMemory
from lightning_sfn.newton.momentum import Glide
from lightning_sfn.newton.objective import Closure, Objective, ObjectiveError
from lightning_sfn.newton.operators import CurvatureName, ProductMethod, check_curvature, make_operator
from lightning_sfn.newton.options import (
    is_number,
    require_at_least,
    require_group_entries,
    require_krylov_dim,
    require_positive_or_none,
    require_seed,
    require_whole,
)
from lightning_sfn.newton.outer_step import Descent, Losses, Search, learn_refuted, take_outer_step
from lightning_sfn.newton.parameters import FlatParameters
from lightning_sfn.newton.precision import full_precision
from lightning_sfn.newton.preconditioner import Preconditioner
from lightning_sfn.newton.processes import Processes, ProcessMean
from lightning_sfn.newton.reductions import norm
from lightning_sfn.newton.secant_steps import SecantSteps
from lightning_sfn.newton.shortage import is_out_of_memory
from lightning_sfn.newton.step import StepRecord
from lightning_sfn.newton.trust_region import trust_region as find_trust_region

__all__ = ["Driver", "SaddleFreeNewton"]

_PAPER_KRYLOV_DIM = 500  # of its experiments
_SMALL_BUDGET = 2**24  # bytes of kept graphs that are not worth a further try
_ENTRIES = ("memory", "escape", "bent", "expected", "damping", "coordinates", "preconditioner", "generator", "layout")


class Driver(Protocol):
    """A training loop that owns the batches and turns its own closures into objectives (see `trainer/`)."""

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Runs the loop's closure, and takes a Newton step when enough of them have been seen."""


class SaddleFreeNewton(Optimizer):
    r"""Saddle-free Newton steps in a small Krylov subspace.

    The step is ``-(|H| + damping)^-1 g`` in a subspace spanned by Lanczos vectors and remembered steps: along
    directions of positive curvature it is Newton's, along negative curvature it goes the same length the other way, so
    saddle points repel it (Dauphin et al. 2014, Algorithm 1). A step that does not lower the loss is not taken, unless
    ``heavy_ball`` allows momentum steps.

    Args:
        params: Parameters or parameter groups; groups may differ in ``lr`` alone.
        lr: Factor on each step, a number or a tensor of one. Newton steps have a natural length of 1.
        krylov_dim: Number of Lanczos vectors k, or ``"full"`` for the exact method (small networks: ``O(n^3)``).
            When left out, 4 in Kronecker-factored coordinates as long as the subspace shows negative curvature of at
            least a tenth of its largest curvature, else 1; 16 in all other coordinates.
        inner_steps: Steps m with one subspace and one Hessian, each with a fresh gradient.
        damping: ``"warm"`` (a few values around the last one), ``"grid"`` (the paper's 1e0 to 1e-5),
            ``"levenberg_marquardt"``, a positive number, or a `Damping`.
        trust_region: ``"saddle_free"``, ``"newton"``, ``"damped_newton"``, ``"truncated_newton"`` or ``"gradient"``.
        curvature: ``"hessian"``; or, with closures that return a pair, ``"gauss_newton"`` for ``(loss, output)``,
            ``"fisher"`` for ``(loss, distribution)`` (natural gradient) or ``"gradient_covariance"`` for ``(loss,
            losses of the cases)`` (TONGA).
        max_grad_norm: Clips the gradient to this norm.
        max_step_norm: Clips each inner step to this norm.
        previous_directions: How many past steps join the subspace.
        secant_steps: Most quasi-Newton steps that follow a subspace, in Kronecker-factored coordinates and as long as
            they are worth their gradients; 0 for none (see `SecantSteps`). There are none with ``heavy_ball``, with
            another ``trust_region``, without remembered steps and their secants, or where their basis is sharded.
        heavy_ball: Largest momentum, from 0 (none) to less than 1. Above 0, steps in a subspace and cheap steps with
            momentum in the preconditioner's coordinates take turns, by what each kind achieves (see `Glide`). Momentum
            lets the loss rise for a while, perhaps by the last step of a run: keep the parameters of the lowest loss.
        preconditioner: ``"kronecker"`` (see `KroneckerFactors`), ``"diagonal"`` (equilibration), ``None``, or a
            `Preconditioner`. The default, ``"auto"``, is Kronecker factors where most parameters belong to layers that
            have them, else the diagonal, and none for the exact method (see `AutoPreconditioner`).
        secants: Whether past steps bring gradient differences as Hessian products (free; needs gradients of one and the
            same function, as full-batch closures give). Otherwise each costs one product. With another ``curvature``
            gradient differences are no products: past steps serve quasi-Newton steps alone then.
        exploration: Share of a random vector and of the last most negative Ritz vector in the start vector, so that a
            gradient orthogonal to the way out does not hide it. 0 starts from the gradient alone.
        hvp: ``"auto"`` keeps gradient graphs up to ``graph_bytes``; ``"retain"`` keeps all, ``"recompute"`` none;
            ``"finite_difference"`` needs no second derivative.
        graph_bytes: Byte budget for kept gradient graphs.
        basis: ``"replicated"``: each process keeps the whole basis. ``"sharded"``: each keeps its share of every
            vector, remembered steps included. The exact method always keeps it whole.
        basis_dtype: Dtype of the basis, ``"bfloat16"`` for half of its memory; the parameters' if left out.
        basis_device: ``"cpu"`` keeps the basis in host memory, from where it is streamed; else with the parameters.
        processes: The processes that run this program on data of their own: losses, gradients and products are averaged
            over them. Training loops that drive the optimizer set it themselves.
        check_ranks: Compare a checksum of the parameters over the processes after each step.
        seed: Seed of the optimizer's own random generator; the global ones are left alone.

    Raises:
        ValueError: An argument is out of its range, a group has another option than ``lr``, or the parameters are not
            of one real dtype on one device.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 1e-3], requires_grad=True)
        >>> optimizer = SaddleFreeNewton([x])
        >>> for _ in range(10):
        ...     loss = optimizer.step(lambda: 5 * x[0] ** 2 - x[1] ** 2)
        >>> bool(x[1].abs() > 0.5)  # 1e-3 times 2^10: the saddle at the origin repels
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        krylov_dim: int | Literal["full"] | None = None,
        inner_steps: int = 2,
        damping: str | float | Damping = "warm",
        trust_region: str = "saddle_free",
        curvature: CurvatureName = "hessian",
        max_grad_norm: float | None = None,
        max_step_norm: float | None = None,
        previous_directions: int = 10,
        secant_steps: int = 8,
        heavy_ball: float = 0.0,
        preconditioner: str | Preconditioner | None = "auto",
        secants: bool = True,
        exploration: float = 1e-2,
        hvp: ProductMethod = "auto",
        graph_bytes: int = 2**30,
        basis: BasisName = "replicated",
        basis_dtype: str | torch.dtype | None = None,
        basis_device: str | torch.device | None = None,
        processes: Processes | None = None,
        check_ranks: bool = False,
        seed: int = 0,
    ) -> None:
        lr = require_at_least("lr", _number(lr), 0.0)
        self.inner_steps = require_whole("inner_steps", inner_steps, 1)
        self.exploration = require_at_least("exploration", exploration, 0.0)
        previous_directions = require_whole("previous_directions", previous_directions, 0)
        secant_steps = require_whole("secant_steps", secant_steps, 0)
        graph_bytes = require_whole("graph_bytes", graph_bytes, 0)
        if processes is not None and not hasattr(processes, "size"):
            raise ValueError(f"processes is {processes!r}, but a Processes() or None is expected.")
        if not (is_number(heavy_ball) and 0 <= heavy_ball < 1):
            raise ValueError(f"heavy_ball is {heavy_ball!r}, but a number from 0 to less than 1 is expected.")
        self.max_grad_norm = require_positive_or_none("max_grad_norm", max_grad_norm)
        self.max_step_norm = require_positive_or_none("max_step_norm", max_step_norm)
        check_curvature(curvature, hvp)
        self.basis, self.basis_dtype = basis, check_basis(basis, basis_dtype, basis_device)
        self.basis_device = None if basis_device is None else torch.device(basis_device)
        super().__init__(params, {"lr": lr})
        self._parameters = FlatParameters.of_groups(self.param_groups)
        self.krylov_dim = require_krylov_dim(krylov_dim, self._parameters.size)
        if preconditioner == "auto" and krylov_dim == "full":
            preconditioner = None  # nothing to make flat where every direction is known
        self.preconditioner = make_preconditioner(preconditioner)
        self.damping = make_damping(damping)
        self.trust_region = find_trust_region(trust_region)
        self.curvature: CurvatureName = curvature
        self._processes, self._check_ranks = processes, check_ranks
        self._carried = Carried(StepMemory(previous_directions, secants=secants))
        self._glide = Glide(float(heavy_ball)) if heavy_ball > 0 else None
        follow = heavy_ball == 0 and self.trust_region.uses_negative_curvature
        self._secants = SecantSteps(secant_steps if follow else 0)
        self.hvp: ProductMethod = hvp
        self._budget = GraphBudget(graph_bytes)
        self._generator = torch.Generator(self._parameters.device).manual_seed(require_seed(seed))
        self._driver: Driver | None = None
        self.last_step: StepRecord | None = None

    @classmethod
    def as_in_paper(
        cls, params: Any, lr: float = 1.0, *, krylov_dim: int | Literal["full"] | None = None, **options: Any
    ) -> "SaddleFreeNewton":
        """The paper's Algorithms 1 and 2 without our additions.

        k Lanczos vectors from the gradient, the last update as last vector (one product), the damping grid of Appendix
        F, no preconditioner, no random seed in the start vector.

        Args:
            params: Parameters or parameter groups.
            lr: Factor on each step.
            krylov_dim: The paper's k; 500 as in its experiments (or the number of parameters, if fewer) when left out.
            options: Any other option of the class.

        Returns:
            The optimizer.
        """
        paper: dict[str, Any] = {
            "damping": "grid",
            "previous_directions": 1,
            "secants": False,
            "secant_steps": 0,
            "preconditioner": None,
            "exploration": 0.0,
        }
        optimizer = cls(params, lr, krylov_dim=krylov_dim, **(paper | options))
        if krylov_dim is None:
            optimizer.krylov_dim = min(_PAPER_KRYLOV_DIM, optimizer._parameters.size)
        return optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, which the next step trains along with the others.

        Args:
            param_group: ``params``, and ``lr`` if it is another than that of the optimizer.

        Raises:
            ValueError: The learning rate is no number of at least zero, or the group has an option of the whole
                optimizer, a weight decay, or ``maximize=True``.
        """
        given = param_group if isinstance(param_group, dict) else {}  # anything else torch refuses
        rate = given.get("lr", 0.0)
        # `lr` has a default, and so have entries of an optimizer whose place this one took: others read them.
        require_group_entries({k: v for k, v in given.items() if k not in self.defaults}, _OPTIONS)
        require_at_least("lr", _number(rate), 0.0)
        super().add_param_group(param_group)

    # ------------------------------------------------------------------------------------------------ stepping

    def step(  # type: ignore[override]
        self,
        closure: Closure | None = None,
        *,
        curvature_closure: Closure | None = None,
        trial_closure: Closure | None = None,
    ) -> Any:
        """Takes one outer step: a new subspace, up to ``inner_steps`` steps in it, and quasi-Newton steps after them.

        With ``heavy_ball`` it may be a momentum step instead.

        Args:
            closure: Returns the loss with its graph. It is called several times and must give the same value at the
                same parameters; it must not call ``backward``. Global random numbers are replayed.
            curvature_closure: The loss that Hessian-vector products see (a part of the data); ``closure`` if left out.
            trial_closure: The loss that decides on damping and acceptance; ``closure`` if left out. The slope that it
                shows is corrected to that of ``closure`` (see `TrialLoss`). A step that it lets through and that raises
                ``closure`` is taken back by the next call, if that has the same loss where the step began.

        Returns:
            The loss before the step, as a scalar tensor without graph.

        Raises:
            ObjectiveError: The closure's result cannot be optimized, or it changes from call to call.
            CurvatureError: An operation has no second derivative.
            FloatingPointError: Loss or gradient is not finite. In every case the parameters are as they were.
        """
        if self._driver is not None:
            return self._driver.step(closure)
        if closure is None:
            raise ObjectiveError("step() needs a closure that returns the loss with its graph: step(lambda: loss()).")
        mean = None if self._processes is None else ProcessMean(self._processes)
        record = self.step_on(
            Objective([closure], reduce=mean),
            curvature=Objective([curvature_closure], reduce=mean) if curvature_closure is not None else None,
            trial=Objective([trial_closure], reduce=mean) if trial_closure is not None else None,
        )
        return torch.tensor(record.loss_before, dtype=self._parameters.dtype, device=self._parameters.device)

    @full_precision()
    def step_on(
        self,
        objective: Objective,
        *,
        curvature: Objective | None = None,
        trial: Objective | None = None,
        loss_and_gradient: tuple[float, Tensor] | None = None,
        same_function: bool | None = None,
    ) -> StepRecord:
        """Takes one outer step on objectives: what `step` does, for callers that hold micro-batches.

        Args:
            objective: What is minimized; its gradient is taken here.
            curvature: What Hessian-vector products see; ``objective`` if left out.
            trial: What trial losses see; ``objective`` if left out.
            loss_and_gradient: Loss and gradient (shape ``(n,)``) of ``objective`` here, if they are known already.
            same_function: Whether ``objective`` is the function of the step before, so that the difference of the two
                gradients is a Hessian product. If left out, the losses tell where they can.

        Returns:
            The record of the step, also kept as ``last_step``.

        Raises:
            ObjectiveError: An objective cannot be optimized.
            CurvatureError: An operation has no second derivative.
            FloatingPointError: Loss or gradient is not finite.
            ProcessError: Another process failed or is gone. In every case the parameters are as they were. Where memory
                runs out (on a process that works alone), the step is tried again with fewer kept graphs, then with
                fewer Lanczos vectors.
        """
        if torch.is_inference_mode_enabled():
            raise ObjectiveError(
                "step() was called in torch.inference_mode(), which forbids derivatives: leave it first."
            )
        parameters = self._current_parameters()
        if not self._carried.checked:
            self._require_same_model(parameters)
        losses = Losses(objective, curvature or objective, trial or objective, same_function, loss_and_gradient)
        origin = parameters.read()
        waiting, glide = self._carried.unconfirmed, None if self._glide is None else self._glide.copy()
        try:
            with torch.no_grad():
                losses, taken_back, spent = self._confirmed(parameters, losses)
                if self._glide is not None:
                    losses = self._glide.settle(parameters, losses, self._carried)
                record = self._with_what_memory_allows(parameters, losses, parameters.read())
                spent += 0 if self._glide is None else self._glide.spent
                moved, gradients = float(norm(parameters.read() - origin)), record.gradients + spent
                self.last_step = replace(record, step_norm=moved, taken_back=taken_back, gradients=gradients)
            if self._check_ranks:
                self._require_same_model(parameters)
        except BaseException:
            parameters.write(origin)
            self._carried.memory.refute(None)
            self._carried.unconfirmed, self._glide = waiting, glide
            raise
        finally:
            if self._processes is not None:
                self._processes.release()
        return self.last_step

    def _confirmed(self, parameters: FlatParameters, losses: Losses) -> tuple[Losses, bool, int]:
        """Takes the last step back if the objective, seen for the first time after it, refutes it.

        Returns:
            What the next step knows, whether the last one was taken back, and gradients spent in vain.
        """
        carried, objective, known = self._carried, losses.objective, losses.known
        waiting, carried.unconfirmed = carried.unconfirmed, None
        if waiting is None:
            return losses, False, 0
        if known is None and losses.curvature is objective and self._glide is None:
            loss = objective.value()  # the gradient will come with the graphs of the products
        else:
            known = known or gradient_of(objective, parameters, far=True)
            loss = known[0] if bool(torch.isfinite(known[1]).all()) else math.inf
        if not waiting.take_back(parameters, objective, loss, losses.same_function):
            return replace(losses, known=known), False, 0
        store = self._store()
        gradient = known[1] if known is not None and math.isfinite(loss) else None
        learn_refuted(carried, gradient, self.damping, self._descent(parameters), store)
        return replace(losses, known=gradient_of(objective, parameters)), True, int(known is not None)

    def _with_what_memory_allows(self, parameters: FlatParameters, losses: Losses, start: Tensor) -> StepRecord:
        while True:
            try:
                return self._one_step(parameters, losses)
            except BaseException as error:
                # Other processes would go on without the repeated products, and wait for what never comes.
                if losses.objective.is_shared or not (is_out_of_memory(error) and self._economise(parameters)):
                    raise
            parameters.write(start)
            self._carried.memory.refute(None)
            if parameters.device.type == "cuda":  # only here, where the error no longer holds the failed step's tensors
                torch.cuda.empty_cache()

    def _one_step(self, parameters: FlatParameters, losses: Losses) -> StepRecord:
        operator, descent = self.operator(losses.curvature, parameters), self._descent(parameters)
        carried, store = self._carried, self._store()
        if self._glide is not None and self._glide.pace.kind == "momentum":
            return self._glide.step(parameters, losses, operator, descent, carried, store)
        search = Search(self.damping, self.inner_steps)
        record = take_outer_step(parameters, losses, operator, descent, search, carried, store)
        if not self._secants.can_follow(record, carried, store):
            return record
        return self._secants.run(parameters, losses, descent, carried, store, record)

    def _economise(self, parameters: FlatParameters) -> bool:
        """Gives up memory after a shortage: first kept graphs, then Lanczos vectors. Whether there was any to give."""
        dimension = self._descent(parameters).dimension(self._carried, parameters.size)
        if self.hvp in ("auto", "retain") and self._budget.limit > 0:
            self.hvp = "auto"
            self._budget.limit = self._budget.limit // 4 if self._budget.limit > _SMALL_BUDGET else 0
        elif dimension is not None and dimension > 1:
            self.krylov_dim = dimension = dimension // 2
        else:
            return False
        warnings.warn(
            f"Memory ran out in a Newton step. It is tried again with graph_bytes={self._budget.limit} and "
            f"krylov_dim={'all' if dimension is None else dimension}: pass these values to begin with.",
            stacklevel=3,
        )
        return True

    # ------------------------------------------------------------------------------------------------ parts of a step

    @property
    def memory(self) -> StepMemory:
        """The remembered steps."""
        return self._carried.memory

    def operator(self, objective: Objective, parameters: FlatParameters) -> CurvatureOperator:
        """The curvature operator that this optimizer's options name.

        Args:
            objective: What products see.
            parameters: The parameters.

        Returns:
            The operator.
        """
        return make_operator(objective, parameters, self.curvature, self.hvp, self._budget)

    def _current_parameters(self) -> FlatParameters:
        """The parameters that require gradients now; what belongs to others, or to another dtype, is forgotten."""
        parameters = FlatParameters.of_groups(self.param_groups)
        if parameters.device != self._generator.device:  # the model was moved after the optimizer was made
            self._generator = torch.Generator(parameters.device).manual_seed(self._generator.initial_seed())
        if not self._are_known(parameters):
            self._glide, self._secants = _forgotten(self._carried, self.preconditioner, self._glide, self._secants)
        self._parameters = parameters
        return parameters

    def _are_known(self, parameters: FlatParameters) -> bool:
        """Whether what is carried from step to step belongs to these parameters."""
        before = self._parameters
        kept = [id(p) for p in parameters.tensors] == [id(p) for p in before.tensors]
        return kept and (parameters.dtype, parameters.device) == (before.dtype, before.device)

    def _descent(self, parameters: FlatParameters) -> Descent:
        return Descent(
            krylov_dim=self.krylov_dim,
            preconditioner=self.preconditioner,
            rule=self.trust_region,
            exploration=self.exploration,
            generator=self._generator,
            learning_rates=parameters.learning_rates(self.param_groups),
            max_grad_norm=self.max_grad_norm,
            max_step_norm=self.max_step_norm,
            straight=self._glide is not None,
        )

    # ------------------------------------------------------------------------------------------------ processes

    @property
    def processes(self) -> Processes | None:
        """The processes that run this program; remembered steps are shared out anew where they change."""
        return self._processes

    @processes.setter
    def processes(self, processes: Processes | None) -> None:
        before = self._store()
        self._processes = processes
        size, after = self._parameters.size, self._store()
        self._carried.memory = self.memory.mapped(lambda part: after.local(before.whole(part, size)))

    def _store(self) -> BasisStore:
        parameters, sharded = self._parameters, self.basis == "sharded"
        return BasisStore(
            self._processes, sharded, self.basis_dtype, self.basis_device, parameters.dtype, parameters.device
        )

    def _require_same_model(self, parameters: FlatParameters) -> None:
        """All ranks must hold the same parameters, bit for bit."""
        if self._processes is not None:
            remedy = "build the same model on every rank, and let nothing but the optimizer change it."
            self._processes.require_equal(parameters.description, "models", remedy)
            self._processes.require_equal(f"the checksum {parameters.checksum()}", "parameters", remedy)

    # ------------------------------------------------------------------------------------------------ training loops

    def attach(self, driver: Driver | None) -> None:
        """Lets a training loop that owns the batches take over `step`; ``None`` gives it back."""
        self._driver = driver

    # ------------------------------------------------------------------------------------------------ state

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the training loop that drives the optimizer, so that copies and pickles work."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("_driver", "_generator", "step")}
        return state | {"generator_state": self._generator.get_state(), "generator_device": self._generator.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over what `__getstate__` gave, or the two entries that torch's `load_state_dict` passes."""
        whole = "generator_state" in state
        super().__setstate__({k: v for k, v in state.items() if k not in ("generator_state", "generator_device")})
        if whole:
            self._driver = None
            self._generator = torch.Generator(state["generator_device"])
            self._generator.set_state(state["generator_state"])

    def state_dict(self) -> dict[str, Any]:
        """The complete state, as tensors, lists and numbers: damping, remembered steps, preconditioner, generator.

        Where the basis is sharded, all processes have to call it: remembered steps are put together, so that they can
        be shared out among another number of processes.
        """
        state, parameters = super().state_dict(), self._parameters
        carried, preconditioner, glide, secants = self._carried, self.preconditioner, self._glide, self._secants
        with suppress(ValueError):  # nothing to train just now: what is known belongs to what was trained before
            parameters = FlatParameters.of_groups(self.param_groups)
        if not self._are_known(parameters):  # a state of what is trained now, of which nothing is known yet
            carried, preconditioner = deepcopy((carried, preconditioner))
            glide, secants = _forgotten(carried, preconditioner, glide, secants)
        store, size, memory = self._store(), self._parameters.size, carried.memory
        if self.basis == "sharded" and self._processes is not None:
            memory = memory.mapped(lambda part: store.whole(part, size).cpu())
        state["newton"] = replace(carried, memory=memory).state_dict() | {
            "damping": self.damping.state_dict(),
            "coordinates": type(preconditioner).__name__,
            "preconditioner": preconditioner.state_dict(),
            "glide": None if glide is None else glide.state_dict(),
            "secants": secants.state_dict(),
            "generator": self._generator.get_state(),
            "layout": [list(shape) for shape in parameters.shapes],
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state that `state_dict` gave.

        Args:
            state_dict: The state.

        Raises:
            ValueError: The state belongs to another optimizer or to other parameters; nothing is changed then.
        """
        if "newton" not in state_dict:
            raise ValueError(
                "The state was not saved by SaddleFreeNewton (it has no 'newton' entry): load it into the optimizer "
                "that saved it."
            )
        newton = state_dict["newton"]
        lacking = [name for name in _ENTRIES if name not in newton]
        if lacking:
            raise ValueError(
                f"The state is not whole (its 'newton' entry has no {', '.join(map(repr, lacking))}): load one as "
                "state_dict() gave it."
            )
        shapes = FlatParameters.of_groups(self.param_groups).shapes
        if [list(shape) for shape in newton["layout"]] != [list(shape) for shape in shapes]:
            raise ValueError("The state belongs to parameters of other shapes: build the model that it was saved with.")
        own = type(self.preconditioner).__name__
        if newton["coordinates"] != own:
            raise ValueError(
                f"The state was saved with a {newton['coordinates']}, but this optimizer has a {own}: build it with "
                "the preconditioner that the state was saved with."
            )
        super().load_state_dict(state_dict)
        self._current_parameters()
        own_kind = self._parameters.device, self._parameters.dtype
        self.damping.load_state_dict(newton["damping"])
        self.preconditioner.load_state_dict(moved_to(*own_kind, newton["preconditioner"]))
        self._carried.load_state_dict(newton, self._store())
        self._glide, self._secants = _anew(self._glide, self._secants)  # the state may have none
        if newton.get("secants") is not None:
            self._secants.load_state_dict(newton["secants"])
        if self._glide is not None and newton.get("glide") is not None:
            self._glide.load_state_dict(moved_to(*own_kind, newton["glide"]))
        _take_over(self._generator, newton["generator"].cpu())


def _forgotten(
    carried: Carried, preconditioner: Preconditioner, glide: Glide | None, secants: SecantSteps
) -> tuple[Glide | None, SecantSteps]:
    """Lets steps forget what belongs to other parameters; returns a new glide, if there is one, and secant steps."""
    carried.forget()
    preconditioner.reset()
    return _anew(glide, secants)


def _anew(glide: Glide | None, secants: SecantSteps) -> tuple[Glide | None, SecantSteps]:
    """Both with the same options, and nothing learned."""
    return None if glide is None else Glide(glide.momentum), SecantSteps(secants.most)


def _take_over(generator: torch.Generator, state: Tensor) -> None:
    """Sets a generator's state, or, where that is of another kind of device, a seed that depends on it."""
    if state.numel() == generator.get_state().numel():
        generator.set_state(state)
    else:
        generator.manual_seed(zlib.crc32(state.numpy().tobytes()))


def _number(rate: Any) -> Any:
    """A rate that torch lets be a tensor of one number; anything else as it is, to be judged."""
    return rate.item() if isinstance(rate, Tensor) and rate.numel() == 1 else rate


_OPTIONS = set(inspect.signature(SaddleFreeNewton).parameters) - {"params", "lr"}  # of the optimizer, not of a group

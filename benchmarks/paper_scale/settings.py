"""Sizes and budgets: the paper's, and small ones that a processor finishes in minutes."""

import ast
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["METHODS", "SCALES", "TASKS", "Settings"]

TASKS = ("autoencoder", "recurrent")
"""What is trained: the networks of Figure 4 (a, b) and of Figure 4 (c, d)."""

METHODS = ("sfn", "sfn_paper", "adam", "nesterov", "momentum", "lbfgs")
"""The methods in the order in which they run; those of first order are preceded by the search for their rates."""


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on.

    Attributes:
        task: ``"autoencoder"``, or ``"recurrent"`` for that of Figure 4 (c): 120 tanh units that predict the next
            character in windows of 50. Images are windows there.
        sizes: Layer widths from the pixels to the code.
        side: Height and width of the images.
        cases: Training images from the front of the data set; all if None.
        seed: Of the initialization, the order of the images and every random draw.
        seconds: Training time of each method, in seconds on the device; measuring does not count.
        start_method: Method of first order that SFN starts after.
        start_seconds: How much of its time SFN spends on that; 0 starts SFN from the initialization.
        search_seconds: Time of each setting in the search for rates.
        batch_size: Images in a mini-batch (Sutskever et al. 2013: 200).
        rates: Learning rates of both kinds of momentum that are searched (Sutskever et al. 2013: 0.05 and lower).
        momenta: Where the momentum schedule ends, searched with the rates.
        adam_rates: Adam's learning rates that are searched; each decays linearly to 0.
        max_grad_norm: Gradients of first order are clipped to this norm; not at all if None.
        tail: Last updates, which have a momentum of at most 0.9.
        updates: Updates of first order in place of the time; for tests, where nothing may depend on a clock.
        part: Images in one part of a full batch (memory, not mathematics).
        graph_bytes: Memory for kept graphs.
        history: Pairs that L-BFGS keeps.
        lbfgs_iterations: Iterations of L-BFGS between two looks at the clock.
        krylov_dim: Lanczos vectors of the paper's SFN.
        inner_steps: Its steps in one subspace.
        basis_dtype: Of its basis; the parameters' if None.
        our_krylov_dim: Lanczos vectors of ours.
        previous_directions: Remembered steps of ours.
        preconditioner: Coordinates of ours, by the name that `make_preconditioner` knows; the parameters' own if None.
        curvature_share: Share of the images, drawn anew for each step, that our products see.
        trial_share: Share that our trial losses see.
        max_step_norm: Bound on the length of each inner step; none if None.
        probe_cases: Images that spectra see.
        probe_dim: Lanczos vectors of spectra.
        spectrum_every: Measurements between two spectra.
        note_ratio: Factor from the time of one measurement to that of the next.
        matmul: ``"ieee"`` or ``"tf32"``: arithmetic of float32 matrix products on CUDA.
    """

    task: str = "autoencoder"
    sizes: tuple[int, ...] = (784, 1000, 500, 250, 30)
    side: int = 28
    cases: int | None = None
    seed: int = 0
    seconds: float = 600.0
    start_method: str = "nesterov"
    start_seconds: float = 30.0
    search_seconds: float = 15.0
    batch_size: int = 200
    rates: tuple[float, ...] = (0.1, 0.05, 0.02, 0.01)
    momenta: tuple[float, ...] = (0.99, 0.995)
    adam_rates: tuple[float, ...] = (1e-2, 3e-3, 1e-3, 3e-4)
    max_grad_norm: float | None = None
    tail: int = 1000
    updates: int | None = None
    part: int = 10_000
    graph_bytes: int = 24 * 2**30
    history: int = 20
    lbfgs_iterations: int = 5
    krylov_dim: int = 500
    inner_steps: int = 5
    basis_dtype: str | None = None
    our_krylov_dim: int | None = None
    our_inner_steps: int = 1
    previous_directions: int = 10
    preconditioner: str | None = "kronecker"
    curvature_share: float = 0.08
    trial_share: float = 0.10
    max_step_norm: float | None = None
    probe_cases: int = 10_000
    probe_dim: int = 64
    spectrum_every: int = 5
    note_ratio: float = 1.1
    matmul: str = "ieee"

    def __post_init__(self) -> None:
        """Checks what would only be found after minutes."""
        if self.start_method not in ("adam", "nesterov", "momentum"):
            raise ValueError(
                f"start_method is {self.start_method!r}, but 'adam', 'nesterov' or 'momentum' is expected."
            )
        if not 0 <= self.start_seconds < self.seconds:
            raise ValueError(
                f"start_seconds is {self.start_seconds:g}, but it is part of each method's {self.seconds:g} seconds."
            )
        if self.matmul not in ("ieee", "tf32"):
            raise ValueError(f"matmul is {self.matmul!r}, but 'ieee' or 'tf32' is expected.")
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}, but one of {', '.join(TASKS)} is expected.")
        if self.task == "autoencoder" and self.sizes[0] != self.side**2:
            raise ValueError(f"sizes begins with {self.sizes[0]}, but the images have {self.side**2} pixels.")
        if self.note_ratio <= 1:
            raise ValueError(f"note_ratio is {self.note_ratio:g}, but a factor above 1 is expected.")

    @classmethod
    def changed(cls, base: "Settings", words: list[str]) -> "Settings":
        """Settings with some values replaced.

        Args:
            base: The others.
            words: Each ``name=value`` with a Python literal, or a bare word, as value.

        Raises:
            ValueError: There is no such setting.
        """
        changes: dict[str, Any] = {}
        for word in words:
            name, equals, text = word.partition("=")
            if not equals or name not in asdict(base):
                raise ValueError(
                    f"The setting {word!r} is unknown: give name=value with one of {', '.join(asdict(base))}."
                )
            try:
                changes[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                changes[name] = text
        return replace(base, **changes)


_RECURRENT: dict[str, Any] = {
    "task": "recurrent",
    "batch_size": 100,
    "rates": (1.0, 0.5, 0.2, 0.1),
    "momenta": (0.9, 0.99),
    "max_grad_norm": 1.0,
    "curvature_share": 0.05,
    "part": 2000,
}

_SMALL = Settings(
    sizes=(196, 100, 50, 25, 12),
    side=14,
    cases=5000,
    seconds=60.0,
    start_seconds=6.0,
    search_seconds=3.0,
    batch_size=100,
    rates=(0.2, 0.1, 0.05, 0.02),
    momenta=(0.95, 0.99),
    adam_rates=(3e-2, 1e-2, 3e-3, 1e-3),
    tail=200,
    part=2500,
    graph_bytes=2**30,
    krylov_dim=100,
    probe_cases=1000,
    probe_dim=32,
)

SCALES = {
    ("autoencoder", "paper"): Settings(),
    ("autoencoder", "small"): _SMALL,
    ("recurrent", "paper"): Settings(**_RECURRENT),
    ("recurrent", "small"): replace(_SMALL, **{**_RECURRENT, "cases": 400, "part": 200, "batch_size": 20}),
}
"""The presets, by task and scale."""

"""Lanczos steps that leave their numbers on the device.

What a step decides on (a product that is not finite, a vector that vanishes because the space is invariant, one that
orthogonalisation leaves little of) is rare. So steps are taken as if nothing of that kind came up, and the host looks
at all of their numbers once, at the end; where it hears earlier of something (see `Watch`), it ends there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sfn.newton.basis import BasisStore
from lightning_sfn.newton.reductions import SAFE_NORMS

__all__ = ["SECOND_PASS", "Steps", "Watch", "is_invariant", "unattended_steps"]

SECOND_PASS = 0.707  # Daniel et al. (1976): a pass that removes this much of a vector has to be repeated
_SMALL = 1e-8  # square of the error, in single precision, up to which two steps share an orthogonalisation
_IMPURE = 2.0  # flag of a step from a vector that was mostly error; others that need a second look have 1


@dataclass(frozen=True)
class Steps:
    """What steps have found.

    Attributes:
        first: The basis vector from which the first step went on.
        diagonal: Diagonal elements of the projected operator, float64, on the CPU.
        couplings: Norms of what each product has outside the basis, likewise.
        sound: How many steps, from the first one on, need no second look.
        leftover: What the last product has outside the basis, shape ``(n,)``, not normalised.
        by_chance: Whether there might as well have been more steps, had the host heard later of what ended them.
        from_impure: Whether the step that needs a second look went on from a vector before it was orthogonalised, which
            left little of it: then what it found is not to be mended.
    """

    first: int
    diagonal: Tensor
    couplings: Tensor
    sound: int
    leftover: Tensor
    by_chance: bool = False
    from_impure: bool = False

    def __len__(self) -> int:
        """Number of steps taken."""
        return len(self.diagonal)

    def fill(self, projected: Tensor, count: int) -> None:
        """Writes the numbers of the first steps into a projected operator, in place."""
        for step in range(count):
            j = self.first + step
            projected[j, j] = self.diagonal[step]
            if step + 1 < count:
                projected[j, j + 1] = projected[j + 1, j] = self.couplings[step]


def is_invariant(coupling: float, scale: float, dtype: torch.dtype) -> bool:
    """Whether a norm is rounding error alone, next to the largest number of the projected operator."""
    return coupling <= 4 * torch.finfo(dtype).eps * scale


def unattended_steps(
    matvec: Callable[[Tensor], Tensor],
    basis: Tensor,
    first: int,
    last: int,
    scale: float,
    coupling: float,
    store: BasisStore,
    recent: list[Tensor],
    *,
    by_twos: bool = True,
    scratch: bool = False,
) -> Steps:
    """Takes Lanczos steps from basis vectors ``first`` to ``last - 1``, each filling in the next row of the basis.

    Args:
        matvec: The symmetric operator on parts of vectors.
        basis: The basis, of which rows 0 to ``first`` are in use.
        first: The basis vector to go on from.
        last: The number of steps is ``last - first``, unless something comes up.
        scale: The largest number of the projected operator so far.
        coupling: The coupling of basis vector ``first`` with the one before it.
        store: How the basis is kept.
        recent: Basis vector ``first`` in full precision, then the one before it if there is one.
        by_twos: Whether two steps may share an orthogonalisation.
        scratch: Whether row ``last``, if there is one, may be written to, so that the last two may do so as well.

    Returns:
        What they have found.
    """
    course = _Course(matvec, basis, first, last, scale, coupling, store, recent)
    course.may_pair &= by_twos
    course.rows = min(len(basis), last + scratch)
    while course.goes_on():
        course.take_two() if course.may_take_two else course.take_one()
    diagonals, couplings, flags = torch.stack(course.numbers).cpu().unbind(1)
    found = [step for step, flag in enumerate(flags.tolist()) if flag or math.isnan(flag)]
    (sound,) = store.agreed(found[0] if found else len(flags), reduced=True)
    by_chance = len(flags) < last - first and not course.watch.is_prompt
    from_impure = int(sound) < len(flags) and flags[int(sound)] == _IMPURE
    return Steps(first, diagonals, couplings, int(sound), course.leftover, by_chance, bool(from_impure))


class Watch:
    """Whether one of many conditions on a device has come true, as far as the host has heard.

    On a CUDA device a condition travels to pinned memory behind the work that decides it, and `raised` asks whether it
    has arrived; on the CPU it is there at once. On other devices, and with ``deaf=True``, the host hears of nothing.

    Args:
        capacity: How many conditions will be posted.
        device: Where they are computed.
        deaf: Never hear of anything: processes that hear at different times would go different ways.

    Attributes:
        is_prompt: Whether it hears of a condition at once or never; else chance says when.
    """

    def __init__(self, capacity: int, device: torch.device, *, deaf: bool = False) -> None:
        self._device, self._on_cuda = device, device.type == "cuda"
        self._deaf = deaf or device.type not in ("cpu", "cuda")
        self.is_prompt = self._deaf or not self._on_cuda
        arrived = torch.zeros(capacity, dtype=torch.bool, device="cpu", pin_memory=self._on_cuda)
        self._slots = arrived.unbind(0)
        self._flags = arrived.numpy()  # the same memory, read without an operation of torch
        self._events: list[torch.cuda.Event] = []
        self._posted = self._heard = 0

    def post(self, condition: Tensor) -> None:
        """Sends a condition on its way: a bool tensor without dimensions."""
        if self._deaf:
            return
        self._slots[self._posted].copy_(condition, non_blocking=True)
        self._posted += 1
        if self._on_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))  # the condition's device need not be the current one
            self._events.append(event)

    def raised(self) -> bool:
        """Whether a condition that has arrived is true."""
        while self._heard < self._posted:
            if self._on_cuda and not self._events[self._heard].query():  # type: ignore[no-untyped-call]
                return False
            self._heard += 1
            if self._flags[self._heard - 1]:
                return True
        return False


class _Course:
    """Steps under way; see `unattended_steps` for the arguments.

    A basis is far larger than any cache, so what orthogonalisation costs is to read it, twice for each vector. Two
    steps share that: the first leaves its vector with the rounding error of the three-term recurrence, the second
    takes it from there, and both are orthogonalised together. The error c of the first is known then, and its effect on
    the second step's numbers is taken back, so that two steps together are as accurate as one by one. Where
    it is large, because one eigenvalue exceeds the others by a factor of thousands, the rest are taken one by one.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        basis: Tensor,
        first: int,
        last: int,
        scale: float,
        coupling: float,
        store: BasisStore,
        recent: list[Tensor],
    ) -> None:
        self.matvec, self.basis, self.store = matvec, basis, store
        self.j, self.last, self.rows = first, last, last
        self.vector = recent[0]
        self.before = recent[1] if len(recent) > 1 else None
        self.dtype = self.vector.dtype
        self.leftover = torch.empty_like(self.vector)
        self.coupling, self.largest = (
            torch.full((), value, dtype=torch.float64, device=self.vector.device) for value in (coupling, scale)
        )
        self.watch = Watch(last - first, self.vector.device, deaf=store.processes is not None)
        self.numbers: list[Tensor] = []  # diagonal element, coupling and whether something came up, of each step
        self.ended = first >= last
        self.may_pair = basis.dtype == self.dtype and basis.device == self.vector.device

    def goes_on(self) -> bool:
        """Whether there are steps to take, and nothing has come up that the host has heard of."""
        return not self.ended

    @property
    def may_take_two(self) -> bool:
        """Whether there are two steps to take, and rows to hold their vectors side by side."""
        return self.may_pair and self.j + 2 <= self.last and self.j + 2 < self.rows

    def take_one(self) -> None:
        """One step: recurrence, orthogonalisation, next row."""
        rows = self.basis[: self.j + 1]
        diagonal = self._recur(self.leftover)
        inside = self.store.project(rows, self.leftover)
        self.store.subtract(self.leftover, inside, rows)
        coupling = self.store.length(self.leftover)
        self._note(diagonal, coupling, self._left(coupling, inside.square().sum()))
        if self.goes_on():
            self._advance(self.store.keep_divided(self.basis, self.j + 1, self.leftover, coupling), coupling)

    def take_two(self) -> None:
        """Two steps with one orthogonalisation."""
        store, j = self.store, self.j
        rows, pair = self.basis[: j + 1], self.basis[j + 1 : j + 3]
        diagonal = self._recur(self.leftover)
        coupling = store.length(self.leftover)
        self._note(diagonal, coupling, torch.ones_like(coupling))
        if not self.goes_on():
            return
        self._advance(store.keep_divided(self.basis, j + 1, self.leftover, coupling), coupling)
        diagonal = self._recur(pair[1])
        inside = store.project_rows(rows, pair)
        store.subtract_rows(pair, inside, rows)
        error, below = inside
        kept = 1 - error.square().sum()  # of the square of a unit vector
        pair[0].mul_(kept.rsqrt().to(self.dtype))
        self.numbers[-1][1] *= kept.sqrt()
        between = store.inner(pair[1], pair[0])
        pair[1].addcmul_(pair[0], between.neg().to(self.dtype))
        length = store.length(pair[1])
        # What the second step went on from is u = sqrt(kept) v + V'c. The products of V lie in the span of V and v, so
        # that they only change what is found inside of it: u'Hu is off from v'Hv by this, and outside of it Hu is Hv
        # times sqrt(kept).
        diagonal = diagonal - (error @ below + (1 + kept) * coupling * error[-1]) / kept
        share = self._left(length, below.square().sum() + between.square())
        following = length / kept.sqrt()
        self._note(diagonal, following, torch.where(kept > 1 - _SMALL, share, 0.0))
        self.numbers[-1][2] *= torch.where(kept > SECOND_PASS**2, 1.0, _IMPURE)
        if self.goes_on():
            pair[1].div_(length.to(self.dtype))
            self._advance(pair[1], following)
        else:
            torch.mul(pair[1], kept.rsqrt().to(self.dtype), out=self.leftover)

    def _recur(self, out: Tensor) -> Tensor:
        """The three-term recurrence from the present vector; returns its diagonal element."""
        image = self.matvec(self.vector)
        diagonal = self.store.inner(image, self.vector)
        torch.addcmul(image, self.vector, diagonal.neg().to(self.dtype), out=out)
        if self.before is not None:
            out.addcmul_(self.before, self.coupling.neg().to(self.dtype))
        return diagonal

    @staticmethod
    def _left(length: Tensor, removed: Tensor) -> Tensor:
        """What a pass has left of a vector: the rows are orthonormal, so its squares add up."""
        return length.square() / (length.square() + removed)

    def _note(self, diagonal: Tensor, coupling: Tensor, share: Tensor) -> None:
        """Notes the numbers of a step, and ends the course if it was the last or something is heard of."""
        self.largest = torch.maximum(torch.maximum(self.largest, diagonal.abs()), coupling)
        vanished = coupling <= 4 * torch.finfo(self.dtype).eps * self.largest
        strange = vanished | ~(share > SECOND_PASS**2) | ~diagonal.isfinite()
        strange |= ~((coupling > SAFE_NORMS[0]) & (coupling < SAFE_NORMS[1]))
        self.numbers.append(torch.stack([diagonal, coupling, strange.to(torch.float64)]))
        self.watch.post(strange)
        self.ended = self.watch.raised() or self.j + 1 == self.last

    def _advance(self, vector: Tensor, coupling: Tensor) -> None:
        self.before, self.vector, self.coupling = self.vector, vector, coupling
        self.j += 1

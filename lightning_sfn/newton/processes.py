"""Processes that share an objective: a few collectives of `torch.distributed`, and what happens when one of them fails.

Every process runs the same program on its own part of the data. What they decide on are reduced numbers or numbers of
rank zero, so they decide alike. A process whose evaluation fails still takes part in the collective that the others
wait for, with NaN: the others meet the NaN, ask who failed, and end the step with the same sentence.
"""

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ContributionError", "ProcessError", "ProcessMean", "Processes"]

_ROLL_CALL = timedelta(seconds=5)  # how long survivors wait for each other's sign of life
# torch 2.13 renamed them.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class ProcessError(RuntimeError):
    """The processes fell apart: one of them failed, is gone, or differs from the others."""


class ContributionError(ProcessError, FloatingPointError):
    """What some of the processes contributed is not finite; raised on all of them alike."""


class Processes:
    """A view of a process group.

    Args:
        group: The process group; the default group if left out.

    Attributes:
        rank: Rank of this process in the group.
        size: Number of processes.

    Raises:
        ProcessError: `torch.distributed` has no process group yet.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ProcessError(
                "There is no process group, but processes that share an objective need one: call "
                "torch.distributed.init_process_group() first."
            )
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        on_gpu_only = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu_only else None
        self._failure: Exception | None = None
        self._contributions = 0
        self._first_bad: Tensor | None = None  # number of the first contribution that was not finite; infinite if none

    # ------------------------------------------------------------------------------------------------ collectives

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place where the backend can reach the tensor.

        Args:
            tensor: Any shape, the same on all processes.

        Returns:
            The sum, bitwise the same on all processes.
        """
        moved = self._reachable(tensor)
        self._run(dist.all_reduce, moved)
        return moved.to(tensor.device)

    def from_first(self, tensor: Tensor) -> Tensor:
        """Rank zero's tensor, in place where the backend can reach the tensor."""
        moved = self._reachable(tensor)
        self._run(dist.broadcast, moved, src=0 if self._group is None else dist.get_global_rank(self._group, 0))
        return moved.to(tensor.device)

    def scatter_sum(self, vector: Tensor) -> Tensor:
        """This process' part of the sum over the processes (a reduce-scatter).

        Args:
            vector: Shape ``(n,)``.

        Returns:
            Shape ``(ceil(n / size),)``; the last parts end with zeros where n is not divisible.
        """
        length = self.part_length(vector.numel())
        padded = torch.nn.functional.pad(vector, (0, length * self.size - vector.numel()))
        part = torch.empty(length, dtype=vector.dtype, device=vector.device)
        self._run(_reduce_scatter, part, padded)
        return part

    def gather(self, part: Tensor, size: int) -> Tensor:
        """The whole vector of shape ``(size,)`` from the parts of all processes (an all-gather)."""
        whole = torch.empty(len(part) * self.size, dtype=part.dtype, device=part.device)
        self._run(_all_gather, whole, part.contiguous())
        return whole[:size]

    def part_length(self, size: int) -> int:
        """Length of one process' part of a vector."""
        return -(-size // self.size)

    def collect(self, value: Any) -> list[Any]:
        """The picklable objects of all processes, by rank."""
        values: list[Any] = [None] * self.size
        self._run(dist.all_gather_object, values, value)
        return values

    def _reachable(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device or tensor.device).contiguous()

    def _run(self, collective: Any, *tensors: Any, **options: Any) -> None:
        try:
            collective(*tensors, group=self._group, **options)
        except RuntimeError as error:
            raise ProcessError(f"{self._roll_call()} The step of rank {self.rank} is undone.") from error

    def _roll_call(self) -> str:
        """Who is missing after a collective failed, found out through the group's key-value store."""
        silent = []
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"lightning_sfn/roll_call/{self.rank}", "here")
            for rank in range(self.size):
                try:
                    store.wait([f"lightning_sfn/roll_call/{rank}"], _ROLL_CALL)
                except RuntimeError:
                    silent.append(rank)
        except RuntimeError:
            silent = [0]  # it hosts the store
        if not silent:
            return "A collective failed although every rank is there: look at the network, or at another rank's error."
        names = " and ".join(f"rank {rank}" for rank in silent)
        waiting = " (one of them is enough: the others may wait for it)" if len(silent) > 1 else ""
        return (
            f"No sign of life from {names} of {self.size}: the process died, or hangs longer than the process group's "
            f"timeout{waiting}. Look at its output, and resume from the last checkpoint."
        )

    # ------------------------------------------------------------------------------------------------ failures

    def guard(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """A result that goes into a collective, or NaN if it cannot be computed; `require_sound` then raises.

        Args:
            compute: Computes this process' contribution.
            like: A tensor shaped like the contribution.

        Returns:
            The contribution.
        """
        try:
            return compute()
        except Exception as error:
            self._failure = error
            return torch.full_like(like, torch.nan)

    def contribute(self, tensor: Tensor) -> Tensor:
        """Notes whether what this process puts into a reduction is finite, so that a NaN can be traced to it."""
        finite = torch.isfinite(tensor.sum().double())  # read when it is asked for: no wait for the device here
        self._contributions += 1
        none = torch.full_like(finite, math.inf, dtype=torch.float64)
        before = none if self._first_bad is None else self._first_bad.to(finite.device)
        self._first_bad = torch.where(finite, before, before.clamp_max(self._contributions))
        return tensor

    def require_sound(self, *, blame_nan: bool = True) -> None:
        """To be called by all processes when a reduced number is not finite: raises if one of them failed.

        Args:
            blame_nan: Whether a NaN that some processes alone contributed is a failure too.

        Raises:
            ProcessError: Another process failed.
            ContributionError: The NaN came from some of the processes alone; the ranks are named.
            Exception: This process' own failure.
        """
        failure, self._failure = self._failure, None
        # After a NaN of one process all of them go on with NaN: to blame is whose was the first.
        first_bad = math.inf if self._first_bad is None else float(self._first_bad)
        self._first_bad = None
        reports = self.collect((None if failure is None else f"{type(failure).__name__}: {failure}", first_bad))
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback holds this frame, so together they would keep the tensors of all frames
        for rank, (message, _) in enumerate(reports):
            if message is not None:
                raise ProcessError(f"Rank {rank} of {self.size} failed in the middle of a step: {message}")
        earliest = min(first for _, first in reports)
        culprits = [rank for rank, (_, first) in enumerate(reports) if first == earliest < math.inf]
        if blame_nan and 0 < len(culprits) < self.size:
            names = " and ".join(f"rank {rank}" for rank in culprits)
            raise ContributionError(
                f"The contribution of {names} of {self.size} to the objective is not finite (loss, gradient or Hessian-"
                "vector product), so the step is undone on all ranks: look at the batch that it has."
            )

    def require_equal(self, value: str, what: str, remedy: str) -> None:
        """Compares a description over the processes.

        Args:
            value: The description.
            what: What it describes, in the plural, for the message.
            remedy: What to do where it differs.

        Raises:
            ProcessError: The descriptions differ; raised on all processes.
        """
        values = self.collect(value)
        odd = [rank for rank, other in enumerate(values) if other != values[0]]
        if odd:
            raise ProcessError(
                f"The ranks have different {what}: rank 0 has {values[0]}, rank {odd[0]} has {values[odd[0]]}: {remedy}"
            )

    def release(self) -> None:
        """Drops what was noted during a step."""
        self._failure, self._first_bad = None, None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Processes":
        """The same processes: a copy of an optimizer runs in them too."""
        return self


class ProcessMean:
    """The mean over processes, each with its share.

    Args:
        processes: The processes.
        share: Weight of this process; the shares of all processes add up to 1. Equal shares if left out.
    """

    def __init__(self, processes: Processes, share: float | None = None) -> None:
        self.processes = processes
        self.share = 1 / processes.size if share is None else share

    def __call__(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor, by one all-reduce."""
        return self.processes.sum(self._weighted(tensor))

    def part(self, vector: Tensor) -> Tensor:
        """This process' part of the mean of vectors of shape ``(n,)``, by one reduce-scatter."""
        return self.processes.scatter_sum(self._weighted(vector))

    def with_numbers(self, values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of some values, and rank zero's version of other numbers, by one all-reduce.

        Args:
            values: Shape ``(c,)``, float64.
            numbers: Shape ``(d,)``, float64, computed on every process.

        Returns:
            The means, and the numbers of rank zero.
        """
        of_first = numbers if self.processes.rank == 0 else torch.zeros_like(numbers)
        both = self.processes.sum(torch.cat([self._weighted(values), of_first]))
        return both[: len(values)], both[len(values) :]

    def _weighted(self, tensor: Tensor) -> Tensor:
        return self.processes.contribute(tensor * self.share)

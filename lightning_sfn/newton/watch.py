"""Numbers on a device that the host looks at when they have come, without waiting for them."""

import torch
from torch import Tensor

__all__ = ["Watch"]


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

"""Random number states: evaluate a function again with the random numbers that it drew the first time.

Dropout masks, noise layers and random crops make a loss a different function at each call. Within one optimizer step
every evaluation must see one function, so an objective notes the state of the generators before its first evaluation
and goes back to it for each later one.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomState"]


@dataclass(frozen=True)
class RandomState:
    """A snapshot of the global generators of Python, NumPy and torch (CPU and one accelerator).

    Attributes:
        python: State of the ``random`` module.
        numpy: State of NumPy's legacy global generator.
        cpu: State of torch's CPU generator.
        device: The accelerator whose generator is part of the snapshot, if any.
        accelerator: State of that generator.
    """

    python: Any
    numpy: Any
    cpu: Tensor
    device: torch.device | None = None
    accelerator: Tensor | None = None

    @classmethod
    def capture(cls, device: torch.device | None = None) -> "RandomState":
        """Notes the present state; ``device`` adds the generator of that CUDA device."""
        device = device if device is not None and device.type == "cuda" else None
        accelerator = None if device is None else torch.cuda.get_rng_state(device)
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), device, accelerator)

    @classmethod
    def seeded(cls, seed: int, device: torch.device | None = None) -> "RandomState":
        """The state that seeding every generator gives; the generators themselves are left as they are."""
        before = cls.capture(device)
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            if before.device is not None:
                with torch.cuda.device(before.device):
                    torch.cuda.manual_seed(seed)
            return cls.capture(device)
        finally:
            before.restore()

    def restore(self) -> None:
        """Sets the global generators to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None and self.device is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)

    def state_dict(self) -> dict[str, Any]:
        """The snapshot as tensors, numbers and strings, for checkpoints."""
        version, words, gauss = self.python
        kind, keys, *rest = self.numpy
        return {
            "python": [version, torch.tensor(words, device="cpu"), gauss],
            "numpy": [kind, torch.tensor(keys.tolist(), device="cpu"), *rest],
            "cpu": self.cpu,
            "device": None if self.device is None else str(self.device),
            "accelerator": self.accelerator,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "RandomState":
        """The snapshot that `state_dict` gave."""
        version, words, gauss = state["python"]
        kind, keys, *rest = state["numpy"]
        accelerator = state["accelerator"]
        return cls(
            python=(version, tuple(words.tolist()), gauss),
            numpy=(kind, np.array(keys.tolist(), dtype=np.uint32), *rest),
            cpu=state["cpu"].cpu(),
            device=None if state["device"] is None else torch.device(state["device"]),
            accelerator=None if accelerator is None else accelerator.cpu(),
        )

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Runs the body from this state, and leaves the global generators as they were before."""
        before = RandomState.capture(self.device)
        self.restore()
        try:
            yield
        finally:
            before.restore()

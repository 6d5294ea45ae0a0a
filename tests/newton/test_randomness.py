import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from lightning_sfn.newton.randomness import RandomState


def draw() -> tuple[float, float, float, float]:
    """Normal draws: those of NumPy and Python keep a second number for the next call."""
    return random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(())), float(torch.rand(()))


def fail_inside(state: RandomState) -> None:
    with state.replayed():
        draw()
        raise KeyError("inside")


def test_replayed_draws_are_the_first_ones() -> None:
    state = RandomState.capture()
    first = draw()
    draw()
    with state.replayed():
        assert draw() == first


def test_replay_leaves_the_stream_where_it_was() -> None:
    draw()
    state = RandomState.capture()
    expected = [draw(), draw(), draw()]
    state.restore()
    assert draw() == expected[0]
    with state.replayed():
        for _ in range(5):
            draw()
    assert draw() == expected[1]
    with pytest.raises(KeyError):
        fail_inside(state)
    assert draw() == expected[2]


def test_a_snapshot_can_be_replayed_again_and_again() -> None:
    state = RandomState.capture()
    seen = set()
    for _ in range(3):
        with state.replayed():
            seen.add(draw())
    assert len(seen) == 1


def test_nested_replays_return_to_the_outer_stream() -> None:
    outer = RandomState.capture()
    expected = (draw(), draw())
    inner = RandomState.capture()
    with outer.replayed():
        first = draw()
        with inner.replayed():
            draw()
        assert (first, draw()) == expected


def test_a_snapshot_survives_a_checkpoint() -> None:
    draw()  # so that Python's generator and NumPy's keep a second normal number
    state = RandomState.capture()
    expected = (draw(), draw())
    torch.save(state.state_dict(), "random.pt")
    RandomState.from_state(torch.load("random.pt", weights_only=True)).restore()
    assert (draw(), draw()) == expected


def seeded_by_hand(seed: int) -> tuple[float, float, float, float]:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return draw()


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_a_seeded_state_draws_what_seeding_gives_and_leaves_the_generators(seed: int) -> None:
    expected = seeded_by_hand(seed)
    before = RandomState.capture()
    following = draw()
    before.restore()
    with RandomState.seeded(seed).replayed():
        assert draw() == expected
    assert draw() == following


def test_seeds_differ() -> None:
    draws = set()
    for seed in range(4):
        with RandomState.seeded(seed).replayed():
            draws |= set(draw())
    assert len(draws) == 16


def test_a_seed_that_is_refused_leaves_the_generators() -> None:
    before = RandomState.capture()
    following = draw()
    before.restore()
    with pytest.raises(ValueError, match="2\\*\\*32"):
        RandomState.seeded(2**32)
    assert draw() == following


class Generators:
    """The generators of two CUDA devices, each a number: in the place of those of a machine that has none."""

    def __init__(self) -> None:
        self.states = {torch.device("cuda", index): torch.tensor([index], dtype=torch.uint8) for index in range(2)}
        self.current = torch.device("cuda", 0)

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return self.states[device].clone()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.states[device] = state.clone()

    def manual_seed(self, seed: int) -> None:
        self.states[self.current] = torch.tensor([100 + seed], dtype=torch.uint8)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> Generators:
    fake = Generators()
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_the_generator_of_a_device_is_noted_and_set_back(generators: Generators) -> None:
    second = torch.device("cuda", 1)
    state = RandomState.capture(second)
    generators.set_rng_state(torch.tensor([7], dtype=torch.uint8), second)
    with state.replayed():
        assert generators.states[second].tolist() == [1]
    assert generators.states[second].tolist() == [7]
    with RandomState.seeded(5, second).replayed():
        assert generators.states[second].tolist() == [105]
    assert [each.tolist() for each in generators.states.values()] == [[0], [7]]


def test_the_generator_of_a_device_survives_a_checkpoint(generators: Generators) -> None:
    state = RandomState.capture(torch.device("cuda", 1))
    torch.save(state.state_dict(), "random.pt")
    found = RandomState.from_state(torch.load("random.pt", weights_only=True))
    assert found.device == torch.device("cuda", 1)
    assert found.accelerator is not None
    assert found.accelerator.tolist() == [1]
    found.restore()
    assert generators.states[torch.device("cuda", 1)].tolist() == [1]


def test_the_processor_is_no_accelerator() -> None:
    state = RandomState.capture(torch.device("cpu"))
    assert (state.device, state.accelerator) == (None, None)
    assert RandomState.from_state(state.state_dict()).device is None

"""What an isolation puts back; whole runs with replays are in test_replay.py."""

import torch

from lightning_sfn.trainer.isolation import Isolation, isolated

from .modules import Fitting, Untidy, make_trainer, random_streams


def test_nested_isolation_and_shared_submodules() -> None:
    module = Untidy()
    module.again = module.norm  # one module under two names
    before = module.traces()
    buffers = list(module.buffers())
    trainer = make_trainer(1)
    with isolated(trainer, module):
        with isolated(trainer, module):
            module(torch.randn(4, 3))
            module.count = 7
        assert module.count == 0
        assert module.norm.num_batches_tracked is not None
        assert module.norm.num_batches_tracked.item() == 0
        module(torch.randn(4, 3))
    assert module.traces() == before
    assert all(a is b for a, b in zip(module.buffers(), buffers, strict=True))


def test_rewinding_gives_each_evaluation_the_same_start() -> None:
    """One isolation for several evaluations: none sees what another did, tensors shared by two names included."""
    module, trainer = Untidy(dropout=0.0), make_trainer(1)
    module.plain = module.alias = torch.zeros(2)
    before, streams = module.traces(), random_streams()
    seen = []
    with Isolation(trainer, module) as isolation:
        for _ in range(3):
            isolation.rewind()
            seen.append(
                (module.count, len(module.losses), float(module.norm.running_mean.sum()), module.plain.tolist())
            )
            module.count += 1
            module.losses.append(torch.ones(()))
            module.brand_new = 1
            module(torch.randn(4, 3))
            module.plain.add_(1.0)
            assert module.alias is module.plain
            trainer.should_stop = True
    assert seen == [seen[0]] * 3
    assert module.traces() == before
    assert random_streams() == streams
    assert not trainer.should_stop
    assert module.plain is module.alias
    assert not module.plain.any()


def test_parameters_are_never_copied() -> None:
    """Neither registered ones, nor those that a module keeps in an attribute of its own."""
    module = Fitting()
    module.__dict__["favourite"] = module.net[0].weight
    module.net[2].weight.requires_grad_(False)
    with Isolation(make_trainer(1), module) as isolation:
        isolation.rewind()
        assert module.favourite is module.net[0].weight
        assert module.net[2].weight is dict(module.named_parameters())["net.2.weight"]
        (gradient,) = torch.autograd.grad(module.favourite.sum(), module.net[0].weight)
    assert bool(gradient.all())

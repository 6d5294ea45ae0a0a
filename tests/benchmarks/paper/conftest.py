"""A paper-scale task small enough for a test."""

import pytest
import torch
from paper_scale.images import Images
from paper_scale.settings import Settings
from paper_scale.task import Task

TINY = Settings(
    sizes=(49, 16, 5),
    side=7,
    seconds=6.0,
    start_seconds=2.0,
    search_seconds=1.0,
    rates=(0.01,),
    momenta=(0.99,),
    adam_rates=(3e-3, 1e-4),
    batch_size=50,
    tail=2,
    updates=9,
    part=80,
    graph_bytes=2**26,
    history=4,
    lbfgs_iterations=2,
    krylov_dim=6,
    inner_steps=2,
    previous_directions=3,
    preconditioner="kronecker",
    curvature_share=0.2,
    trial_share=0.2,
    probe_cases=60,
    probe_dim=4,
    spectrum_every=2,
)


@pytest.fixture(scope="session")
def images() -> Images:
    """Smooth random pictures: sums of three bumps."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(0, 1, 7)
    centres = torch.rand(260, 3, 2, generator=generator)
    across = torch.exp(-((grid - centres[..., :1]) ** 2) * 20)
    down = torch.exp(-((grid - centres[..., 1:]) ** 2) * 20)
    pictures = (across.unsqueeze(-1) * down.unsqueeze(-2)).amax(dim=1).flatten(1)
    pixels = (pictures * 255).to(torch.uint8)
    return {"train": pixels[:210], "test": pixels[210:]}


@pytest.fixture(scope="session")
def task(images: Images) -> Task:
    return Task.on(torch.device("cpu"), images, TINY)

"""An option has one name, one default, one type and one description, wherever it can be set."""

import inspect
import re
from collections import defaultdict
from typing import Any

from pytorch_lightning.callbacks import EarlyStopping

from lightning_sfn import (
    HessianSpectrum,
    SaddleFreeNewton,
    SaddleFreeNewtonMixin,
    SFNDDPStrategy,
    SFNStrategy,
    SwitchToSFN,
    hessian_spectrum,
)
from lightning_sfn.newton.spectrum import SpectrumSettings
from lightning_sfn.trainer.budgets import DataBudgets
from lightning_sfn.trainer.inspection import InspectingTrainer
from lightning_sfn.trainer.window import WindowedNewton

TRAINING = (SwitchToSFN, SaddleFreeNewtonMixin, SFNStrategy, SFNDDPStrategy)
STEPPING = (*TRAINING, DataBudgets, SaddleFreeNewton, WindowedNewton)
LOOKING = (HessianSpectrum, hessian_spectrum, InspectingTrainer.spectrum, SpectrumSettings)


def options_of(owner: Any) -> dict[str, inspect.Parameter]:
    function = owner.__init__ if inspect.isclass(owner) else owner
    return dict(inspect.signature(function).parameters)


def shared(owners: tuple[Any, ...]) -> dict[str, dict[str, inspect.Parameter]]:
    """Each option that several owners have, by owner."""
    found: dict[str, dict[str, inspect.Parameter]] = defaultdict(dict)
    for owner in owners:
        for name, option in options_of(owner).items():
            if option.default is not inspect.Parameter.empty:
                found[name][owner.__qualname__] = option
    return {name: by_owner for name, by_owner in found.items() if len(by_owner) > 1}


def description(owner: Any, name: str) -> str:
    found = re.search(rf"^ +{name}: (.*(?:\n {{8,}}.*)*)", inspect.cleandoc(owner.__doc__), flags=re.MULTILINE)
    assert found is not None, f"{owner.__qualname__} does not describe {name}"
    return " ".join(found[1].split())


def test_an_option_of_training_has_one_default_and_one_type() -> None:
    options = shared(STEPPING)
    assert {"optimizer", "max_grad_norm", "curvature_fraction"} <= set(options)
    for name, by_owner in options.items():
        assert len({repr(option.default) for option in by_owner.values()}) == 1, (name, by_owner)
        assert len({str(option.annotation) for option in by_owner.values()}) == 1, (name, by_owner)


def test_an_option_of_spectra_has_one_default_but_for_what_it_may_cost() -> None:
    """A callback that looks every epoch is cheap, the command that looks once is thorough, a function does as told."""
    defaults = {name: {repr(option.default) for option in owners.values()} for name, owners in shared(LOOKING).items()}
    several = {name for name, values in defaults.items() if len(values) > 1}
    assert several == {"krylov_dim", "num_batches", "smallest", "largest", "tol", "density_probes"}
    assert {"max_products", "curvature", "hvp", "density", "precision"} <= set(defaults) - several


def test_an_option_has_one_description() -> None:
    for name in ("optimizer", *inspect.signature(DataBudgets).parameters):
        texts = {description(owner, name) for owner in TRAINING if name in options_of(owner)}
        assert len(texts) == 1, texts


def test_every_budget_can_be_set_wherever_training_is() -> None:
    for owner in TRAINING:
        assert {*inspect.signature(DataBudgets).parameters} <= set(options_of(owner)), owner


def test_the_options_of_the_watch_are_those_of_early_stopping() -> None:
    ours, theirs = options_of(SwitchToSFN), options_of(EarlyStopping)
    common = {"monitor", "mode", "patience", "min_delta", "check_finite", "strict", "check_on_train_epoch_end"}
    assert common <= set(ours) & set(theirs)
    different = {name for name in common & set(ours) if ours[name].default != theirs[name].default}
    # The metric has a name here; a switch that comes a little late costs less than a run that ends early.
    assert different <= {"monitor", "patience"}

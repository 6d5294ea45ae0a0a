import doctest
import importlib
import pkgutil

import pytest

import lightning_sfn.trainer

MODULES = [info.name for info in pkgutil.walk_packages(lightning_sfn.trainer.__path__, "lightning_sfn.trainer.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_there_are_examples_and_modules() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [t for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples]
    assert {name.rsplit(".", 1)[1] for name in MODULES} >= {"replay", "window", "switch", "spectrum", "support"}
    assert examples

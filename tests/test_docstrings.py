"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import lightning_sfn

MODULES = [info.name for info in pkgutil.walk_packages(lightning_sfn.__path__, "lightning_sfn.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize(("layer", "least"), [("newton", 5), ("trainer", 2)])
def test_there_are_examples(layer: str, least: int) -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in MODULES if name.startswith(f"lightning_sfn.{layer}.")]
    assert len(modules) >= 18
    assert len([test for module in modules for test in finder.find(module) if test.examples]) >= least

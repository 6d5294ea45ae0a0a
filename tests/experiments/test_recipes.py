"""A recipe is found by path, by name and as it is spelt in a checkout."""

from pathlib import Path

import pytest
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sfn.experiments.recipes import find_recipe, shipped_recipes, with_recipe_paths


def test_ships_the_autoencoder() -> None:
    assert shipped_recipes()["autoencoder"].is_file()


@pytest.mark.parametrize("name", ["autoencoder", "autoencoder.yaml", "recipes/autoencoder.yaml", "recipes/autoencoder"])
def test_finds_a_shipped_recipe_from_any_folder(name: str) -> None:
    assert find_recipe(name) == shipped_recipes()["autoencoder"]


def test_existing_file_wins(empty_folder: Path) -> None:
    mine = empty_folder / "recipes" / "autoencoder.yaml"
    mine.parent.mkdir()
    mine.write_text("seed_everything: 1\n")
    assert find_recipe("recipes/autoencoder.yaml").resolve() == mine


@pytest.mark.parametrize("name", ["autoencodr", "configs/autoencoder.yaml", "autoencoder.json", "/autoencoder.yaml"])
def test_unknown_recipe_lists_the_shipped_ones(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"There is no recipe '{name}': .*autoencoder.*\.$"):
        find_recipe(name)


def test_rewrites_only_what_follows_the_config_flag() -> None:
    path = str(shipped_recipes()["autoencoder"])
    given = ["fit", "-c", "autoencoder", "--config=autoencoder", "--config", "autoencoder", "--name", "x", "-c"]
    expected = ["fit", "-c", path, f"--config={path}", "--config", path, "--name", "x", "-c"]
    assert with_recipe_paths(given) == expected

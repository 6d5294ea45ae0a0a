"""Finding a recipe: by path in a checkout, by name anywhere else."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning.utilities.exceptions import MisconfigurationException

import lightning_sfn


def shipped_recipes() -> dict[str, Path]:
    """List the recipes that come with the package.

    Returns:
        Path of each recipe by name (``autoencoder`` for ``autoencoder.yaml``), sorted by name.
    """
    package = Path(lightning_sfn.__file__).resolve().parent
    # An installed wheel has the folder inside the package, an editable install and a checkout beside it.
    folder = next((path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Resolve what stands after ``-c`` on the command line.

    Args:
        name: A path to an existing file, which wins; or a shipped recipe as ``autoencoder``, ``autoencoder.yaml`` or
            ``recipes/autoencoder.yaml``.

    Returns:
        The path of the file: `name` itself if it exists.

    Raises:
        MisconfigurationException: If there is neither such a file nor such a recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if path.parent in (Path("."), Path("recipes")) and path.suffix in ("", ".yaml") and path.stem in shipped:
        return shipped[path.stem]
    raise MisconfigurationException(
        f"There is no recipe {name!r}: give the path of an existing YAML file or one of the shipped recipes, "
        f"{', '.join(shipped) or 'of which this installation has none'}."
    )


def with_recipe_paths(arguments: list[str]) -> list[str]:
    """Replace recipe names by paths in a command line.

    Args:
        arguments: Command-line arguments without the program's name.

    Returns:
        A new list in which every value of ``-c`` and ``--config`` is the path of an existing file.

    Raises:
        MisconfigurationException: If a recipe does not exist.
    """
    resolved: list[str] = []
    expects_recipe = False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if expects_recipe:
            resolved.append(str(find_recipe(argument)))
        elif flag in ("-c", "--config") and equals:
            resolved.append(f"{flag}={find_recipe(value)}")
        else:
            resolved.append(argument)
        expects_recipe = not expects_recipe and argument in ("-c", "--config")
    return resolved

"""The small data samples that travel with the package, so that every recipe runs without a network.

Each sample is a folder beside this file with its data (one parquet file per split, or one text) and a ``README.md``
that states where it comes from, what was cut and under which licence it may be passed on.
"""

from pathlib import Path


def sample_folder() -> Path:
    """Locate the embedded MNIST sample.

    Returns:
        The folder that holds ``train.parquet`` (5,000 rows) and ``test.parquet`` (1,000 rows), each with the columns
        ``image`` (PNG, 28x28, grey) and ``label`` (digit).
    """
    return Path(__file__).resolve().parent / "mnist"


def text_folder() -> Path:
    """Locate the embedded text.

    Returns:
        The folder that holds ``train.txt``: tiny Shakespeare, 1,115,394 ASCII characters in the public domain.
    """
    return Path(__file__).resolve().parent / "tinyshakespeare"

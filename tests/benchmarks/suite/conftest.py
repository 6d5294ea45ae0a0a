"""The benchmarks are scripts beside the package: their folder joins the path, as when they are run."""

import sys
from pathlib import Path

FOLDER = str(Path(__file__).parents[3] / "benchmarks")
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)

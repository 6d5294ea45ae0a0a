"""The benchmarks are scripts beside the package: their folder joins the path, as when they are run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

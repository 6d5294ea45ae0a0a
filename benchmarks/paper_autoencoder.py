"""The paper's 2.8-million-parameter autoencoder, below 0.57, on one GPU, in pieces of at most nine minutes.

    python benchmarks/paper_autoencoder.py run --data FOLDER       # call again while it exits with 3
    python benchmarks/paper_autoencoder.py roofline --data FOLDER
    python benchmarks/paper_autoencoder.py report

FOLDER holds ``train*.parquet`` and ``test*.parquet`` of MNIST (read by pyarrow and pillow); where only torch,
pytorch-lightning and torchmetrics are installed, give a tensor file that ``prepare --data FOLDER`` wrote elsewhere.
Without CUDA a small version runs on the processor. See ``docs/paper_scale.md``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout is enough, nothing has to be installed

from paper_scale.command import main

if __name__ == "__main__":
    sys.exit(main())

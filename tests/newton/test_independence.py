import subprocess
import sys
from pathlib import Path

import lightning_sfn

ROOT = str(Path(lightning_sfn.__file__).parents[1])


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_newton_works_where_lightning_is_not_installed() -> None:
    code = """
import sys
for name in ("pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics"):
    sys.modules[name] = None
import torch, lightning_sfn.newton as newton
from lightning_sfn import SaddleFreeNewton, hessian_spectrum
x = torch.tensor([1.0, 0.5], requires_grad=True)
optimizer = SaddleFreeNewton([x])
optimizer.step(lambda: 5 * x[0] ** 2 - x[1] ** 2)
assert all(hasattr(newton, name) for name in newton.__all__)
print(float(x[1].detach()) > 0.9)
"""
    assert python(code) == "True"


def test_the_package_alone_loads_neither_torch_nor_lightning() -> None:
    code = """
import sys, lightning_sfn
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "pytorch_lightning", "lightning", "numpy"}))
"""
    assert python(code) == "[]"

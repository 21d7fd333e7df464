#!/usr/bin/env bash
# performer-pytorch 1.1.4, torch 2.13.0, CPU: the random features' estimate of exp(x . x) is 14% low for x = (1, ...,
# 1) / 8 in 16 dimensions and 15% high for -x, however many features one averages. A block of directions is Q of a QR
# decomposition as it comes, whose diagonal LAPACK tends to make negative, so directions lean away from (1, ..., 1).
# google-research issue 436 and performer-pytorch issue 8 (2020) know the draw; the answer there was that the estimate
# stays unbiased, which was the guess too. With random signs of the rows it is. Seen: "exact 1.284; x 1.10, -x 1.47;
# with random signs x 1.28, -x 1.29; standard error at most 0.007".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 performer-pytorch==1.1.4 setuptools==80.9.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata
import math
import sys

import torch
from performer_pytorch.performer_pytorch import gaussian_orthogonal_random_matrix

d, blocks = 16, 4000
torch.manual_seed(0)
drawn = torch.stack([gaussian_orthogonal_random_matrix(d, d) for _ in range(blocks)])      # (block, row, d)
signed = drawn * (torch.randint(2, (blocks, d, 1)) * 2 - 1)
x = torch.full((d,), 0.5 / d ** 0.5)                                                       # |x| = 1/2


def estimate(w, x):
    """Mean and standard error of phi(x) . phi(x) = mean over rows of exp(2 w . x - |x|^2)."""
    means = torch.exp(2 * w @ x - x @ x).mean(1)
    return means.mean().item(), (means.std() / blocks ** 0.5).item()


exact = math.exp(x @ x)
(a, b, c, e), errors = zip(*[estimate(w, y) for w in (drawn, signed) for y in (x, -x)])
print(f"performer-pytorch {importlib.metadata.version('performer-pytorch')}, torch {torch.__version__}")
print(f"exact {exact:.3f}; x {a:.2f}, -x {b:.2f}; with random signs x {c:.2f}, -x {e:.2f};",
      f"standard error at most {max(errors):.3f}")
sys.exit(not (a < 0.9 * exact and b > 1.1 * exact and max(abs(c - exact), abs(e - exact)) < 5 * max(errors)))
PYTHON

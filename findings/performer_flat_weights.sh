#!/usr/bin/env bash
# performer-pytorch 1.1.4, torch 2.13.0, CPU: for q, k ~ N(0, 1) in 64 dimensions FastAttention is nearly a plain mean
# of all values. A feature is exp(. - largest) + 1e-4, and at this scale the typical exponential of a key is some
# 1e-8: what was added against division by 0 is most of the feature. The guess was softmax's weights with noise, as
# the package's own softmax_kernel gives with eps = 0. No issue was found in November 2026. Seen: "distance from equal
# weights (1 = 100%): softmax 0.76, FastAttention 0.02, with eps = 0 1.19; a key's exponential, median: 3e-08".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 performer-pytorch==1.1.4 setuptools==80.9.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata
import sys

import torch
from performer_pytorch import FastAttention
from performer_pytorch.performer_pytorch import softmax_kernel

n, d, draws = 256, 64, 10
torch.manual_seed(0)
rows, medians = [], []
for _ in range(draws):
    q, k = torch.randn(2, 1, 1, n, d)
    attention = FastAttention(dim_heads=d)                                       # 266 features
    directions = attention.projection_matrix
    softmax = (q @ k.transpose(2, 3) / d ** 0.5).softmax(-1)
    default = attention(q, k, torch.eye(n)[None, None])                          # values e_1 ... e_n: the weights
    phi_q, phi_k = (softmax_kernel(x.double(), projection_matrix=directions, is_query=query, eps=0.0)
                    for x, query in ((q, True), (k, False)))
    product = phi_q @ phi_k.transpose(2, 3)
    exact = product / product.sum(-1, keepdim=True)
    medians.append(phi_k.median() * len(directions) ** 0.5)                       # the package divides by the root
    rows.append([(n * weights - 1).abs().mean().item() for weights in (softmax, default, exact)])
softmax, default, exact = torch.tensor(rows).mean(0).tolist()
print(f"performer-pytorch {importlib.metadata.version('performer-pytorch')}, torch {torch.__version__}")
print(f"distance from equal weights (1 = 100%): softmax {softmax:.2f}, FastAttention {default:.2f},",
      f"with eps = 0 {exact:.2f}; a key's exponential, median: {torch.stack(medians).median():.0e}")
sys.exit(not (default < 0.15 and softmax > 0.6 and exact > 0.6))
PYTHON

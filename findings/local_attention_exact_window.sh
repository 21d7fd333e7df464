#!/usr/bin/env bash
# local-attention 1.11.2, torch 2.13.0, CPU: causal, with window_size=w and exact_windowsize=True, a token sees w + 1
# keys, its own included. The README of its repository says of this option that a query sees at most as many keys as
# the window size, which was the guess. Issue 5 (2021) corrected how this mask is joined with the causal one, not its
# width. Seen: "keys seen by the last 8 tokens, w = 4: [5, 5, 5, 5, 5, 5, 5, 5]".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 local-attention==1.11.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys

import torch
from local_attention import LocalAttention

w, n = 4, 16
torch.manual_seed(0)
q, k = torch.randn(2, 1, n, 8)
attention = LocalAttention(window_size=w, causal=True, exact_windowsize=True)
weights = attention(q, k, torch.eye(n)[None])[0]                        # values e_1 ... e_n: the weights
keys = (weights > 0).sum(1).tolist()[-8:]
print(f"local-attention {importlib.metadata.version('local-attention')}, torch {torch.__version__}")
print(f"keys seen by the last 8 tokens, w = {w}: {keys}")
sys.exit(keys != [w + 1] * 8)
PYTHON

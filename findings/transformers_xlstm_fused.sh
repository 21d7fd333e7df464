#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: xLSTMConfig documents two values of weight_mode, "single" and "fused". A model of
# the second cannot be made from its configuration: giving the fused gates their biases raises, for a vector of
# num_heads meets one of 2 num_heads. The guess was that both work. Seen: "single: made; fused: RuntimeError: The size of
# tensor a (4) must match the size of tensor b (8) at non-singleton dimension 0".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import xLSTMConfig, xLSTMForCausalLM

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
result = {}
for mode in ("single", "fused"):
    config = xLSTMConfig(hidden_size=64, num_heads=4, num_hidden_layers=2, num_blocks=2, vocab_size=50,
                         weight_mode=mode)
    try:
        xLSTMForCausalLM(config)
        result[mode] = "made"
    except RuntimeError as e:
        result[mode] = f"RuntimeError: {e}"
print("; ".join(f"{mode}: {what}" for mode, what in result.items()))
sys.exit(not (result["single"] == "made" and "must match the size" in result["fused"]))
PYTHON

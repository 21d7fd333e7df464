#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: a new xLSTM in its default weight_mode zeroes every linear layer with "gate" in
# its name. It is meant for the input and forget gates, whose biases decide at the start; but the output gate
# (ogate_preact) and the feed-forward's gate (ffn.proj_up_gate) are called so too: all their weights are 0, every
# feed-forward block starts as the function 0, and its proj_up and proj_down have no gradient in the first step. The
# guess was the small random numbers that the other layers get. Seen: "output gate 0, feed-forward gate 0, largest output
# of a feed-forward block 0, gradients of proj_up, proj_down, proj_up_gate: 0 0 above 0".
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

torch.manual_seed(0)
config = xLSTMConfig(hidden_size=64, num_heads=4, num_hidden_layers=2, num_blocks=2, vocab_size=50)
model = xLSTMForCausalLM(config)
block = model.backbone.blocks[0]
seen = []
block.ffn.register_forward_hook(lambda module, inputs, output: seen.append(output.abs().max().item()))
ids = torch.randint(50, (2, 16))
model(ids, labels=ids, use_cache=False).loss.backward()
largest = {name: p.abs().max().item() for name, p in block.named_parameters()}
gradients = [p.grad.abs().max().item() for p in (block.ffn.proj_up.weight, block.ffn.proj_down.weight,
                                                 block.ffn.proj_up_gate.weight)]
print(f"torch {torch.__version__}, transformers {transformers.__version__}, weight_mode {config.weight_mode!r}")
print(f"largest weight: query {largest['mlstm_layer.q.weight']:.2f}, output gate "
      f"{largest['mlstm_layer.ogate_preact.weight']:g}, feed-forward gate {largest['ffn.proj_up_gate.weight']:g}; "
      f"largest output of a feed-forward block {seen[0]:g}")
print("gradients of proj_up, proj_down, proj_up_gate:", *(f"{g:.1e}" for g in gradients))
as_seen = (largest["mlstm_layer.ogate_preact.weight"] == largest["ffn.proj_up_gate.weight"] == seen[0] == 0
           and largest["mlstm_layer.q.weight"] > 0 and gradients[:2] == [0, 0] and gradients[2] > 0)
sys.exit(not as_seen)
PYTHON

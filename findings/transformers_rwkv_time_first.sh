#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: a new RWKV-4 starts with time_first, the extra log weight of the token
# itself, at 1 in every channel. RWKV-LM (v4neo) starts it at log 0.3 + (-1/2, 0 or 1/2 by channel). That formula
# stands in _init_weights, but inside the brackets of ones_like(), which looks at its shape only; so the token's own
# weight is e^1 = 2.7, not 0.2, 0.3 or 0.5. time_decay and time_mix do start as in RWKV-LM, and the guess was that all
# of them do. No issue was found in November 2026. Seen: "time_first: [1.0]; time_decay: 16 values from -5.0 to 3.0".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import RwkvConfig, RwkvForCausalLM

model = RwkvForCausalLM(RwkvConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, context_length=64))
blocks = model.rwkv.blocks
first = torch.cat([block.attention.time_first for block in blocks]).unique().tolist()
decay = blocks[0].attention.time_decay.unique().tolist()
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"time_first: {first}; time_decay: {len(decay)} values from {decay[0]} to {decay[-1]}")
sys.exit(not (first == [1.0] and len(decay) == 16))
PYTHON

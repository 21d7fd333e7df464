#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: save_pretrained() after a forward pass in eval mode writes another RWKV-4
# than the one in memory. In eval, the first pass divides two weights of block l by 2^(l // rescale_every), in place;
# the file holds the divided ones, and whoever loads it divides them again. It takes 7 blocks or more (rescale_every
# is 6 by default; the 169M model has 12 blocks). The documentation says that weights are divided; the guess was that
# a model that was saved and loaded gives the same logits. No issue was found in November 2026. Seen, the largest
# error of the logits over the largest logit: "saved before a pass: 0.0; after one: 0.55".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import torch
import transformers
from transformers import RwkvConfig, RwkvForCausalLM

transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
torch.set_grad_enabled(False)
model = RwkvForCausalLM(RwkvConfig(vocab_size=50, hidden_size=16, num_hidden_layers=12, context_length=64)).eval()
text = torch.randint(50, (1, 12))

model.save_pretrained(sys.argv[1] + "/before")
logits = model(text).logits
model.save_pretrained(sys.argv[1] + "/after")

errors = []
for name in ("before", "after"):
    loaded = RwkvForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}").eval()
    errors.append(((loaded(text).logits - logits).abs().max() / logits.abs().max()).item())
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"saved before a pass: {errors[0]}; after one: {errors[1]:.2f}")
sys.exit(not (errors[0] < 1e-6 and errors[1] > 0.1))
PYTHON

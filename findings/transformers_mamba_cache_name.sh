#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: MambaForCausalLM takes past_key_values, as most models call their cache,
# without an error or a warning, and forgets the text so far: logits are bit for bit those of a text that begins with
# the new token. Here the argument is called cache. The guess was that the name works, or raises as an unknown
# argument does; the other old name, cache_params, works and warns. No issue was found in November 2026. Seen: "cache:
# as one text True; past_key_values: as one text False, as a new text True, warnings 0; no_such_name: as a new text
# True". The last shows why: forward takes any name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import torch
import transformers
from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(0)
torch.set_grad_enabled(False)
model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8)).eval()
text = torch.randint(1, 50, (1, 12))
one_text, new_text = model(text).logits[:, -1:], model(text[:, -1:]).logits

same, new = {}, {}
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for name in ("cache", "past_key_values", "no_such_name"):
        cache = model(text[:, :-1], use_cache=True).cache
        logits = model(text[:, -1:], **{name: cache}).logits
        same[name], new[name] = torch.allclose(logits, one_text, atol=1e-5), torch.equal(logits, new_text)
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"cache: as one text {same['cache']}; past_key_values: as one text {same['past_key_values']}, as a new text",
      f"{new['past_key_values']}, warnings {len(seen)}; no_such_name: as a new text {new['no_such_name']}")
sys.exit(not (same["cache"] and not same["past_key_values"] and all(new[name] for name in list(new)[1:]) and not seen))
PYTHON

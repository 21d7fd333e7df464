#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: RWKV-4 generates two texts at once otherwise than each alone, though they
# are as long as each other and nothing is padded. One token of b rows that goes on from a state gives logits of shape
# (b, b, vocab): the last token's hidden state, (b, width), meets this token's, (b, 1, width), and is spread over all
# pairs of rows. Without the cache, or with one row, all is right. The guess was that rows do not touch each other. No
# issue was found in November 2026. Seen: "logits of one step (2, 2, 50)" and "tokens as alone: together False,
# together without the cache True".
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

torch.manual_seed(0)
torch.set_grad_enabled(False)
model = RwkvForCausalLM(RwkvConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, context_length=64)).eval()
texts = torch.randint(1, 50, (2, 6))
greedy = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)

state = model(texts, use_cache=True).state
shape = tuple(model(texts[:, -1:], state=state, use_cache=True).logits.shape)
alone = torch.cat([model.generate(text[None], **greedy) for text in texts])
together = model.generate(texts, **greedy)
uncached = model.generate(texts, use_cache=False, **greedy)

same, same_uncached = torch.equal(together, alone), torch.equal(uncached, alone)
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"logits of one step {shape}")
print("alone   ", alone[:, 6:].tolist())
print("together", together[:, 6:].tolist())
print(f"tokens as alone: together {same}, together without the cache {same_uncached}")
sys.exit(not (shape == (2, 2, 50) and not same and same_uncached))
PYTHON

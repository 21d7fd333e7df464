#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: RecurrentGemma's greedy generate() gives another text when it is called
# again with the same prompt of one token (as who samples from the token that begins every text does). The last inputs
# of its convolution live in the modules, not in the cache; forward clears them only where it makes the cache itself,
# and generate() brings one along. A longer prompt overwrites them, and without a cache there are none. The guess was
# that greedy generation in eval mode depends on the prompt alone. No issue was found in November 2026. Seen: "same
# text: prompt of 1 token False, of 2 tokens True, of 1 token without the cache True".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

torch.manual_seed(0)
torch.set_grad_enabled(False)
config = RecurrentGemmaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, intermediate_size=64,
                              num_attention_heads=2, lru_width=32, attention_window_size=16)
model = RecurrentGemmaForCausalLM(config).eval()
same = []
for prompt, use_cache in ((torch.tensor([[3]]), True), (torch.tensor([[3, 7]]), True), (torch.tensor([[3]]), False)):
    texts = [model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
                            use_cache=use_cache)[0].tolist() for _ in range(2)]
    same.append(texts[0] == texts[1])
    print(prompt.shape[1], "token(s), cache", use_cache, *texts)
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"same text: prompt of 1 token {same[0]}, of 2 tokens {same[1]}, of 1 token without the cache {same[2]}")
sys.exit(same != [False, True, True])
PYTHON

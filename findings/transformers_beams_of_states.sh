#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: beam search with RecurrentGemma and MiniMax returns a text and a score that is
# not that text's. RWKV refuses beam search, as its state cannot be put in another order, and the guess was that models
# that do not refuse reorder theirs, as Falcon-H1 and Qwen3-Next do. Seen: a beam goes on with the state of another one;
# the score (mean log probability of the new tokens) is 0.24 to 0.26 nats a token better than what the model itself gives
# the text, and without the cache another text comes out, whose score is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import (FalconH1Config, FalconH1ForCausalLM, MiniMaxConfig, MiniMaxForCausalLM, RecurrentGemmaConfig,
                          RecurrentGemmaForCausalLM)

print("transformers", transformers.__version__, "torch", torch.__version__)
small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
models = {"RecurrentGemma": RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**small, lru_width=32)),
          "MiniMax": MiniMaxForCausalLM(MiniMaxConfig(**small, num_local_experts=2, num_experts_per_tok=1)),
          "Falcon-H1": FalconH1ForCausalLM(FalconH1Config(**small, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
                                                          mamba_d_ssm=64, mamba_chunk_size=8))}
prompt, wrong = torch.randint(2, 60, (1, 12), generator=torch.Generator().manual_seed(0)), {}
with torch.no_grad():
    for name, model in models.items():
        torch.manual_seed(0)
        for key, p in model.eval().named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * (0.5 if "conv" in key else 1.5 / p.shape[-1] ** 0.5))
        for cache in (True, False):
            out = model.generate(prompt, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=cache,
                                 output_scores=True, return_dict_in_generate=True)
            said, text = out.sequences_scores.item(), out.sequences
            log_p = model(text, use_cache=False).logits.log_softmax(-1)[0, 11:-1]
            true = log_p.gather(1, text[0, 12:, None]).mean().item()
            wrong[name, cache] = abs(said - true) > 0.05
            print(f"{name}, {'with' if cache else 'without'} a cache: score {said:.3f}, the text's own {true:.3f}")
sys.exit(wrong != {(name, cache): cache and name != "Falcon-H1" for name in models for cache in (True, False)})
PYTHON

#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: generate(prefill_chunk_size=8) makes another text with Jamba. The option reads
# a prompt in pieces to save memory, and the guess was that the text stays the same, as it does with Granite 4, which
# has Mamba-2's layers beside attention. Seen: Jamba's Mamba layers begin each piece with an empty state, and nothing
# says so. (Mamba itself refuses the option.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, JambaConfig, JambaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
jamba = small | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
                 "num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False}
granite = small | {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
                   "mamba_chunk_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16}
models = {"Jamba": JambaForCausalLM(JambaConfig(**jamba)),
          "Granite 4": GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**granite))}
prompt, same = torch.randint(2, 60, (1, 24), generator=torch.Generator().manual_seed(0)), {}
with torch.no_grad():
    for name, model in models.items():
        torch.manual_seed(0)
        for key, p in model.eval().named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * (0.5 if "conv" in key else 1.5 / p.shape[-1] ** 0.5))
        texts = [model.generate(prompt, max_new_tokens=12, do_sample=False, **more)[0, 24:].tolist()
                 for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 8})]
        same[name] = [text == texts[0] for text in texts]
        print(name, "at once", texts[0], "in pieces", texts[2], sep="\n  ")
sys.exit(same != {"Jamba": [True, True, False], "Granite 4": [True, True, True]})
PYTHON

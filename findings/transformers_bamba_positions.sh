#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: Bamba, given the next tokens and its cache, counts their positions from 0
# again, unless it is told position_ids (which generate() does). The guess was that it goes on behind what the cache
# holds, as Llama, Granite 4 and Falcon-H1 do when they are called the same way. Seen: no warning, and logits that are
# wrong by as much as the largest of them; with position_ids they are right up to rounding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import BambaConfig, BambaForCausalLM, FalconH1Config, FalconH1ForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "intermediate_size": 48, "pad_token_id": 0, "eos_token_id": 1, "mamba_n_heads": 8,
         "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
models = {"Bamba": BambaForCausalLM(BambaConfig(**small, attn_layer_indices=[1])),
          "Falcon-H1": FalconH1ForCausalLM(FalconH1Config(**small, mamba_d_ssm=64))}
tokens, seen = torch.randint(2, 60, (1, 16), generator=torch.Generator().manual_seed(0)), {}
with torch.no_grad():
    for name, model in models.items():
        torch.manual_seed(0)
        for key, p in model.eval().named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * (0.5 if "conv" in key else 1.5 / p.shape[-1] ** 0.5))
        right = model(tokens, use_cache=False).logits[:, 15]
        for said, more in (("", {}), (", told the position", {"position_ids": torch.tensor([[15]])})):
            cache = model(tokens[:, :15], use_cache=True).cache
            last = model(tokens[:, 15:], cache=cache, use_cache=True, **more).logits[:, 0]
            seen[name + said] = ((last - right).abs().max() / right.abs().max()).item()
            print(f"{name}{said}: {seen[name + said]:.1e}")
sys.exit(not (seen.pop("Bamba") > 0.1 and max(seen.values()) < 1e-5))
PYTHON

#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: Nemotron-H reads a prompt with its step sizes dt held above time_step_min
# (0.001), and generates with dt as it comes. The guess was that a text read token by token has the logits of the same
# text read at once, as it has in Falcon-H1. Seen: the same up to rounding for the tokens of the prompt, 0.3% off
# in those read one at a time; with the floor taken away they agree everywhere. (The config's own time_step_limit, whose
# default is 0, is read by neither. So a layer of this model is two functions, and which one is trained depends on the
# code that trains it.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import FalconH1Config, FalconH1ForCausalLM, NemotronHConfig, NemotronHForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "intermediate_size": 48, "pad_token_id": 0, "eos_token_id": 1}
nemotron = small | {"hybrid_override_pattern": "M*M-", "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
                    "n_groups": 1, "chunk_size": 8}
falcon = small | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8}


def off(model, tokens, prompt):
    """The largest difference of a text read at once and read as a prompt and then one token at a time, relative."""
    at_once = model(tokens, use_cache=False).logits
    out, logits = model(tokens[:, :prompt], use_cache=True), []
    for i in range(prompt, tokens.shape[1]):
        logits.append(out.logits)
        out = model(tokens[:, i:i + 1], cache=out.cache, use_cache=True)
    return ((torch.cat([*logits, out.logits], 1) - at_once).abs().max() / at_once.abs().max()).item()


def wide(model):
    """Weights as large as those of a trained model, so that some dt are small."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.copy_(torch.randn_like(p) * (0.5 if "conv" in name else 1.5 / p.shape[-1] ** 0.5))
    return model.eval()


with torch.no_grad():
    tokens = torch.randint(2, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    model = wide(NemotronHForCausalLM(NemotronHConfig(**nemotron)))
    seen = {"Nemotron-H": off(model, tokens, 15)}
    for layer in model.modules():
        if hasattr(layer, "time_step_limit"):
            layer.time_step_limit = (0.0, float("inf"))
    seen["Nemotron-H without the floor"] = off(model, tokens, 15)
    seen["Falcon-H1"] = off(wide(FalconH1ForCausalLM(FalconH1Config(**falcon))), tokens, 15)
for name, x in seen.items():
    print(f"{name}: {x:.1e}")
sys.exit(not (seen["Nemotron-H"] > 1e-3 and max(seen["Nemotron-H without the floor"], seen["Falcon-H1"]) < 1e-5))
PYTHON

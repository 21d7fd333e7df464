#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: OLMo-hybrid's attention knows no positions where its config has none: its code
# tests whether rope_parameters is None, and a comment says that released models have None. The guess was that
# "rope_parameters": null in a config gives such a model. Seen: null, and nothing at all, become a base of 10000, and the
# attention turns; only a base that is null itself, {"rope_theta": null}, gives a model without positions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
         "pad_token_id": 0, "eos_token_id": 1, "linear_key_head_dim": 6, "linear_value_head_dim": 12}
turns = {}
for name, said in (("not there", {}), ("null", {"rope_parameters": None}),
                   ("a base of null", {"rope_parameters": {"rope_type": "default", "rope_theta": None}})):
    config = OlmoHybridConfig.from_dict(small | said)
    turns[name] = OlmoHybridForCausalLM(config).model.rotary_emb is not None
    print(f"rope_parameters {name}: {config.rope_parameters}, the attention {'turns' if turns[name] else 'does not turn'}")
sys.exit(turns != {"not there": True, "null": True, "a base of null": False})
PYTHON

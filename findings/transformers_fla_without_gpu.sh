#!/usr/bin/env bash
# transformers 5.24.0, flash-linear-attention 0.6.0, triton 3.7.1, torch 2.13.0, on a machine without a GPU: with
# flash-linear-attention installed, models with a gated delta rule do not run any more. The guess was that an optional
# package for speed is used where it can run; transformers' is_flash_linear_attention_available() asks for a GPU, and
# without the package a PyTorch version is used and named as the fallback. Seen: Qwen3.5 and OLMo-hybrid ask the
# package all the same, and end in Triton's RuntimeError that there is no active driver; is_flash_linear_attention_
# available() says False at the same time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy triton==3.7.1 flash-linear-attention==0.6.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.utils.import_utils import is_flash_linear_attention_available

if torch.cuda.is_available():
    sys.exit("this is about machines without a GPU")
print("transformers", transformers.__version__, "torch", torch.__version__)
print("is_flash_linear_attention_available():", is_flash_linear_attention_available())
small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "intermediate_size": 48, "pad_token_id": 0, "eos_token_id": 1, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
models = {"Qwen3.5": Qwen3_5ForCausalLM(Qwen3_5TextConfig(**small)),
          "OLMo-hybrid": OlmoHybridForCausalLM(OlmoHybridConfig(**{k: v for k, v in small.items() if k != "head_dim"}))}
errors = []
for name, model in models.items():
    try:
        model(torch.arange(2, 12)[None])
        errors.append("")
    except RuntimeError as e:
        errors.append(str(e))
    print(f"{name}: {errors[-1] or 'runs'}")
sys.exit(is_flash_linear_attention_available() or not all("active drivers" in error for error in errors))
PYTHON

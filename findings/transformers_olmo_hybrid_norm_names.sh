#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, CPU: in a saved OLMo-hybrid the norm behind the attention has another name than in the
# model. The guess was that the file of an attention layer has the model's names, as OLMo 2's has, whose layer it is:
# post_attention_layernorm and post_feedforward_layernorm. Seen: a rename that is right for the gated DeltaNet layers takes
# hold of the attention layers, too; there the file has feedforward_layer_norm (for the one behind the attention) beside
# post_feedforward_layernorm. from_pretrained undoes it, so nothing is lost; who reads the file by the model's names misses
# a norm, and who goes by the word puts it behind the wrong half.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys, warnings
warnings.filterwarnings("ignore")
import safetensors, torch, transformers
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

torch.manual_seed(0)
config = OlmoHybridConfig(vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
                          pad_token_id=0, eos_token_id=1, linear_key_head_dim=6, linear_value_head_dim=12)
model = OlmoHybridForCausalLM(config).eval()
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
model.save_pretrained(sys.argv[1] + "/model")
with safetensors.safe_open(sys.argv[1] + "/model/model.safetensors", "pt") as f:
    saved = {name: f.get_tensor(name) for name in f.keys()}
print("transformers", transformers.__version__, "torch", torch.__version__)


def norms(names, layer):
    return sorted(name.split(".")[-2] for name in names if f"layers.{layer}." in name and name.split(".")[-2].endswith("norm")
                  and name.split(".")[-2] not in ("q_norm", "k_norm", "o_norm"))


state = model.state_dict()
for layer, kind in ((0, "gated DeltaNet"), (3, "attention")):
    print(f"layer {layer}, {kind}: in the model {norms(state, layer)}, in the file {norms(saved, layer)}")
behind = state["model.layers.3.post_attention_layernorm.weight"]
assert norms(saved, 3) == ["feedforward_layer_norm", "post_feedforward_layernorm"], norms(saved, 3)
assert torch.equal(saved["model.layers.3.feedforward_layer_norm.weight"], behind)
again = OlmoHybridForCausalLM.from_pretrained(sys.argv[1] + "/model").state_dict()
assert torch.equal(again["model.layers.3.post_attention_layernorm.weight"], behind)
print("the norm behind the attention is saved as feedforward_layer_norm, and comes back by from_pretrained")
PYTHON

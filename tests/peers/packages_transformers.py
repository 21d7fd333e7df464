"""The layers of transformers (5.24.0) as referees: our parameters are handed to theirs, so that gradients come back."""
import functools

import torch
from papers_attention import H
from referees import in_double, peer, referee

C = 32                   # width


def interleave_heads(*weights, h=H):
    """Rows of several projections, head by head: (h, rows of the first, rows of the second, ...)."""
    return torch.cat([w.unflatten(0, (h, -1)) for w in weights], dim=1).flatten(0, 1)


def call(module, weights, *args, **named):
    """The module's output with these weights in place of its own, with its float32 made float64."""
    with in_double():
        y = torch.func.functional_call(module, weights, args, named, strict=True)
    return y[0] if isinstance(y, tuple) else y


def generate(x, s, step):
    """step(x of some tokens, the position of the first): a prompt of s tokens, then one token after the other."""
    return torch.cat([step(x[:, :s], 0)] + [step(x[:, i:i + 1], i) for i in range(s, x.shape[1])], dim=1)


# ----------------------------------------------------------------------------------------------------------- attention


@functools.cache
def llama(name, **settings):
    """(model library's module, config, attention layer, rotary embedding) of Llama or a model like it."""
    module = peer(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    config = getattr(module, f"{name}Config")(hidden_size=C, num_attention_heads=H, num_hidden_layers=1, vocab_size=9,
                                              intermediate_size=C, attn_implementation="eager", **settings)
    with in_double():
        rotary = getattr(module, f"{name}RotaryEmbedding")(config)
    return module, config, getattr(module, f"{name}Attention")(config, layer_idx=0).eval(), rotary


def llama_layer(p, x, kind, start=0, cache=None, **settings):
    module, config, layer, rotary = llama(kind, **settings)
    masks = peer("transformers.masking_utils")
    mask = masks.create_sliding_window_causal_mask if kind == "Mistral" else masks.create_causal_mask
    place = start + torch.arange(x.shape[1])[None].expand(len(x), -1)
    with in_double():
        allowed = mask(config=config, inputs_embeds=x, attention_mask=None, cache=cache, position_ids=place)
        turns = rotary(x, place)
    q, k, v = p["qkv.weight"].split([C, *2 * [(len(p["qkv.weight"]) - C) // 2]])
    weights = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": p["out.weight"]}
    return call(layer, weights, x, position_embeddings=turns, attention_mask=allowed, cache=cache)


def llama_cached(p, x, s, kind, **settings):
    cache = peer("transformers").DynamicCache(config=llama(kind, **settings)[1])
    return generate(x, s, lambda x, start: llama_layer(p, x, kind, start, cache, **settings))


def llama_cache(kind, **settings):
    return lambda p, x, s: llama_cached(p, x, s, kind, **settings)


@referee("attention", by="transformers' Llama, shared key heads", needs="transformers", options={"n_kv_heads": 2},
         cached=llama_cache("Llama", num_key_value_heads=2))
def shared_heads(p, x):
    return llama_layer(p, x, "Llama", num_key_value_heads=2)


@referee("window", by="transformers' Mistral", needs="transformers", options={"window": 5},
         cached=llama_cache("Mistral", num_key_value_heads=H, sliding_window=5))
def mistral(p, x):
    return llama_layer(p, x, "Mistral", num_key_value_heads=H, sliding_window=5)


@functools.cache
def gpt2_layer():
    module = peer("transformers.models.gpt2.modeling_gpt2")
    config = module.GPT2Config(n_embd=C, n_head=H, n_layer=1, vocab_size=9, attn_implementation="eager")
    return config, module.GPT2Attention(config, layer_idx=0).eval()


def gpt2_with(p, x, start=0, cache=None):
    config, layer = gpt2_layer()
    x = x + p["positions"][start:start + x.shape[1]]
    mask = peer("transformers.masking_utils").create_causal_mask
    with in_double():
        allowed = mask(config=config, inputs_embeds=x, attention_mask=None, cache=cache)
    zeros = torch.zeros(3 * C, dtype=x.dtype)
    weights = {"c_attn.weight": p["qkv.weight"].mT, "c_attn.bias": zeros, "c_proj.weight": p["out.weight"].mT,
               "c_proj.bias": zeros[:C]}
    return call(layer, weights, x, cache=cache, attention_mask=allowed)


def gpt2_cached(p, x, s):
    cache = peer("transformers").DynamicCache(config=gpt2_layer()[0])
    return generate(x, s, lambda x, start: gpt2_with(p, x, start, cache))


@referee("attention", by="transformers' GPT-2", needs="transformers", options={"rope": False, "n_positions": 30},
         cached=gpt2_cached)
def gpt2(p, x):
    return gpt2_with(p, x)


# ---------------------------------------------------------------------------------------------- recurrences with caches


def recurrent_cache(layer, weights):
    """generate() by the cache that the layers of recurrent models share."""
    def cached(p, x, s):
        module, config = layer()
        cache, w = peer("transformers").DynamicCache(config=config), weights(p)
        with torch.no_grad():
            return generate(x, s, lambda x, start: call(module, w, x, cache=cache))
    return cached


@functools.cache
def mamba_layer():
    module = peer("transformers.models.mamba.modeling_mamba")
    config = module.MambaConfig(hidden_size=C, state_size=16, num_hidden_layers=1, expand=2, time_step_rank=2)
    return module.MambaMixer(config, layer_idx=0).eval(), config


def mamba_weights(p):
    return {"in_proj.weight": torch.cat([p["x.weight"], p["gate.weight"]]), "conv1d.weight": p["short.conv.weight"],
            "conv1d.bias": p["short.conv.bias"], "x_proj.weight": p["dt_B_C.weight"], "dt_proj.weight": p["dt.weight"],
            "dt_proj.bias": p["dt.bias"], "A_log": p["log_A"], "D": p["D"], "out_proj.weight": p["out.weight"]}


@referee("mamba", by="transformers' Mamba", needs="transformers", cached=recurrent_cache(mamba_layer, mamba_weights))
def mamba(p, x):
    return call(mamba_layer()[0], mamba_weights(p), x)


@functools.cache
def mamba2_layer():
    module = peer("transformers.models.mamba2.modeling_mamba2")
    config = module.Mamba2Config(hidden_size=C, state_size=64, num_hidden_layers=1, expand=2, num_heads=H,
                                 head_dim=2 * C // H, n_groups=1, chunk_size=8)
    return module.Mamba2Mixer(config, layer_idx=0).eval(), config


def mamba2_weights(p):
    return {"in_proj.weight": torch.cat([p["z.weight"], p["xbc.weight"], p["dt.weight"]]), "norm.weight": p["norm"],
            "conv1d.weight": p["conv.conv.weight"], "conv1d.bias": p["conv.conv.bias"], "dt_bias": p["dt_bias"],
            "A_log": p["A_log"], "D": p["skip"], "out_proj.weight": p["out.weight"]}


@referee("mamba2", by="transformers' Mamba-2", needs="transformers",
         cached=recurrent_cache(mamba2_layer, mamba2_weights))
def mamba2(p, x):
    return call(mamba2_layer()[0], mamba2_weights(p), x)


@functools.cache
def qwen3_next_layer(e):
    """Qwen3-Next's gated DeltaNet with values of e numbers for each head."""
    module = peer("transformers.models.qwen3_next.modeling_qwen3_next")
    config = module.Qwen3NextConfig(hidden_size=C, num_hidden_layers=1, linear_num_value_heads=H, vocab_size=9,
                                    linear_num_key_heads=H, linear_key_head_dim=C // H, linear_value_head_dim=e,
                                    rms_norm_eps=1e-5, layer_types=["linear_attention"], num_experts=2)
    return module.Qwen3NextGatedDeltaNet(config, layer_idx=0).eval(), config


def gated_deltanet_weights(p):
    q, k, v = p["qkv.weight"].split([C, C, len(p["qkv.weight"]) - 2 * C])
    return {"in_proj_qkvz.weight": interleave_heads(q, k, v, p["gate.weight"]), "norm.weight": p["norm"],
            "in_proj_ba.weight": interleave_heads(p["beta.weight"], p["decay.weight"]), "dt_bias": p["dt_bias"],
            "conv1d.weight": p["conv.conv.weight"], "A_log": p["A_log"], "out_proj.weight": p["out.weight"]}


def qwen3_next_cached(p, x, s):
    return recurrent_cache(lambda: qwen3_next_layer(len(p["norm"])), gated_deltanet_weights)(p, x, s)


@referee("gated_deltanet", by="transformers' Qwen3-Next", needs="transformers", cached=qwen3_next_cached)
def gated_deltanet(p, x):
    return call(qwen3_next_layer(len(p["norm"]))[0], gated_deltanet_weights(p), x)


@functools.cache
def olmo_hybrid_layer():
    """OLMo-hybrid's gated DeltaNet, whose beta goes up to 2."""
    module = peer("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
    config = module.OlmoHybridConfig(hidden_size=C, num_hidden_layers=2, num_attention_heads=H, vocab_size=9,
                                     linear_key_head_dim=C // H, linear_value_head_dim=2 * C // H)
    return module.OlmoHybridGatedDeltaNet(config, layer_idx=0).eval(), config


def olmo_hybrid_weights(p):
    q, k, v = p["qkv.weight"].split([C, C, 2 * C])
    return {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "a_proj.weight": p["decay.weight"],
            "b_proj.weight": p["beta.weight"], "g_proj.weight": p["gate.weight"], "o_proj.weight": p["out.weight"],
            "conv1d.weight": p["conv.conv.weight"], "o_norm.weight": p["norm"], "A_log": p["A_log"],
            "dt_bias": p["dt_bias"]}


@referee("gated_deltanet", by="transformers' OLMo-hybrid", needs="transformers", options={"beta_max": 2.0},
         cached=recurrent_cache(olmo_hybrid_layer, olmo_hybrid_weights))
def gated_deltanet_up_to_2(p, x):
    return call(olmo_hybrid_layer()[0], olmo_hybrid_weights(p), x)


@functools.cache
def kimi_layer():
    """Kimi Linear's delta attention."""
    module = peer("transformers.models.kimi_linear.modeling_kimi_linear")
    config = module.KimiLinearConfig(hidden_size=C, num_hidden_layers=1, vocab_size=9, linear_num_heads=H,
                                     linear_head_dim=C // H)
    return module.KimiLinearDeltaAttention(config, layer_idx=0).eval(), config


def kda_weights(p):
    q, k, v = p["qkv.weight"].split(C)
    return {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "conv1d.weight": p["conv.conv.weight"],
            "forget_gate.f_a_proj.weight": p["decay.0.weight"], "forget_gate.f_b_proj.weight": p["decay.1.weight"],
            "forget_gate.dt_bias": p["dt_bias"], "forget_gate.A_log": p["A_log"][None, None, :, None],
            "b_proj.weight": p["beta.weight"], "g_a_proj.weight": p["gate.0.weight"], "o_norm.weight": p["norm"],
            "g_b_proj.weight": p["gate.1.weight"], "o_proj.weight": p["out.weight"]}


@referee("kda", by="transformers' Kimi-Linear", needs="transformers",
         cached=recurrent_cache(kimi_layer, kda_weights))
def kda(p, x):
    return call(kimi_layer()[0], kda_weights(p), x)


@functools.cache
def xlstm_layer():
    """xLSTM's layer, which goes through a text in chunks of 8, and token by token through what is left. What it adds
    to the divisor, 1e-6, is set to 0."""
    module = peer("transformers.models.xlstm.modeling_xlstm")
    with in_double():
        return module.xLSTMLayer(module.xLSTMConfig(hidden_size=C, num_heads=H, num_hidden_layers=1, vocab_size=9,
                                                    eps=0.0, chunk_size=8)).eval()


def mlstm_weights(p):
    return {"q.weight": p["q.weight"], "k.weight": p["k.weight"], "v.weight": p["v.weight"],
            "ogate_preact.weight": p["gate.weight"], "igate_preact.weight": p["i.weight"],
            "igate_preact.bias": p["i.bias"], "fgate_preact.weight": p["f.weight"], "fgate_preact.bias": p["f.bias"],
            "multihead_norm.weight": p["norm"], "out_proj.weight": p["out.weight"]}


def mlstm_cached(p, x, s):
    state = None

    def step(x, start):
        nonlocal state
        with in_double(), torch.no_grad():
            y, state = torch.func.functional_call(xlstm_layer(), mlstm_weights(p), (x, state), strict=True)
        return y
    return generate(x, s, step)


@referee("mlstm", by="transformers' xLSTM", needs="transformers", cached=mlstm_cached)
def mlstm(p, x):
    return call(xlstm_layer(), mlstm_weights(p), x)


LAYERS = 5               # of a MiniMax


@functools.cache
def minimax_layer(i):
    module = peer("transformers.models.minimax.modeling_minimax")
    config = module.MiniMaxConfig(hidden_size=C, num_attention_heads=H, num_hidden_layers=LAYERS, vocab_size=9,
                                  block_size=8, layer_types=["linear_attention"] * LAYERS, num_local_experts=2)
    with in_double():
        return module.MiniMaxLightningAttention(config, layer_idx=i).eval()


def minimax(i, p, x, cache=None):
    layer = minimax_layer(i)
    own = {"qkv_proj.weight": interleave_heads(*p["qkv.weight"].split(C)), "norm.weight": p["norm"],
           "output_gate.weight": p["gate.weight"], "out_proj.weight": p["out.weight"]}
    return call(layer, own | dict(layer.named_buffers()), x, position_embeddings=None, attention_mask=None, cache=cache)


def minimax_cached(i, p, x, s):
    cache = peer("transformers.models.minimax.modeling_minimax").MiniMaxCache()
    return generate(x, s, lambda x, start: minimax(i, p, x, cache))


for i in (0, 1, 3, LAYERS - 1):                                  # decays in float32 here: 1e-7
    referee("lightning_attention", by=f"transformers' MiniMax, layer {i} of {LAYERS}", needs="transformers",
            options={"depth": i / (LAYERS - 1 + 1e-5)}, tolerance=1e-7,
            cached=functools.partial(minimax_cached, i))(functools.partial(minimax, i))


@functools.cache
def rwkv_layer():
    module = peer("transformers.models.rwkv.modeling_rwkv")
    return module.RwkvSelfAttention(module.RwkvConfig(hidden_size=C, num_hidden_layers=1, vocab_size=9)).eval()


def rwkv_weights(p):
    mix = dict(zip(("time_mix_key", "time_mix_value", "time_mix_receptance"), p["mixes"][:, None, None], strict=True))
    return mix | {"time_decay": p["decay"], "time_first": p["u"], "key.weight": p["k.weight"],
                  "value.weight": p["v.weight"], "receptance.weight": p["r.weight"], "output.weight": p["out.weight"]}


def rwkv_cached(p, x, s):
    """A text by itself: in steps it mixes the rows of a batch."""
    if len(x) > 1:
        return torch.cat([rwkv_cached(p, row[None], s) for row in x])
    state = [torch.zeros(1, C, 1, dtype=x.dtype) for _ in range(5)]
    state[4] -= 1e38

    def step(x, start):
        with in_double(), torch.no_grad():
            y, _ = torch.func.functional_call(rwkv_layer(), rwkv_weights(p), (x, state), {"use_cache": True})
        return y
    return generate(x, s, step)


@referee("rwkv4", by="transformers' RWKV-4", needs="transformers", cached=rwkv_cached)
def rwkv4(p, x):
    return call(rwkv_layer(), rwkv_weights(p), x)


@functools.cache
def griffin_layer():
    module = peer("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = module.RecurrentGemmaConfig(hidden_size=C, lru_width=C, num_attention_heads=H, num_hidden_layers=1,
                                         hidden_activation="gelu", conv1d_width=4, vocab_size=9, intermediate_size=C)
    layer = module.RecurrentGemmaRecurrentBlock(config, layer_idx=0).eval()
    layer.rg_lru._rnn_scan = functools.partial(layer.rg_lru._rnn_scan, acc_dtype=torch.float64)
    return layer


def griffin(p, x, start=0, use_cache=False):
    """Positions from 1 on: at position 0 it would forget, and take the first input whole."""
    zero = torch.zeros(C, dtype=x.dtype)
    blocks, bias = p["W"], p["bias"].unflatten(-1, (H, -1))
    weights = {"linear_y.weight": p["gate.weight"], "linear_y.bias": zero, "linear_x.weight": p["x.weight"],
               "linear_x.bias": zero, "linear_out.weight": p["out.weight"], "linear_out.bias": zero,
               "conv_1d.weight": p["short.conv.weight"], "conv_1d.bias": p["short.conv.bias"],
               "rg_lru.recurrent_param": p["Lambda"], "rg_lru.recurrent_gate_weight": blocks[0],
               "rg_lru.recurrent_gate_bias": bias[0], "rg_lru.input_gate_weight": blocks[1],
               "rg_lru.input_gate_bias": bias[1]}
    place = 1 + start + torch.arange(x.shape[1])[None].expand(len(x), -1)
    return call(griffin_layer(), weights, x, position_ids=place, attention_mask=None, use_cache=use_cache)


def griffin_cached(p, x, s):
    layer = griffin_layer()
    layer.conv1d_state = layer.rg_lru.recurrent_states = None            # it keeps its state in the module
    with torch.no_grad():
        y = generate(x, s, lambda x, start: griffin(p, x, start, use_cache=True))
    layer.conv1d_state = layer.rg_lru.recurrent_states = None
    return y


@referee("rglru", by="transformers' RecurrentGemma", needs="transformers", cached=griffin_cached)
def rglru(p, x):
    return griffin(p, x)

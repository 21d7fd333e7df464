"""Lesson 01: PyTorch's own attention as referee, the cache and the ring, padding, Linformer, n-gram heads."""
import importlib

import pytest
import torch
import torch.nn.functional as F
from harness import check_close, inputs, plain_forms, run

lesson = importlib.import_module("01_attention")


def qkv(t=70, s=None, h=4, g=4, d=16, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, length, d, generator=gen, dtype=torch.float64, requires_grad=True)
            for n, length in ((h, t), (g, s or t), (g, s or t))]


def band(t, s, window):
    i, j = torch.arange(s - t, s)[:, None], torch.arange(s)
    return (j <= i) & (j > i - (window or s))


@pytest.mark.parametrize("form", [lesson.parallel_attention, lesson.chunked_attention])
@pytest.mark.parametrize("t, s, g, window", [(70, 70, 4, None), (1, 1, 4, None), (300, 300, 4, None), (70, 70, 2, None),
                                             (70, 70, 1, 5), (300, 300, 4, 64), (7, 150, 4, None), (7, 150, 2, 40)])
def test_torch_is_the_referee(form, t, s, g, window):
    q, k, v = qkv(t, s, g=g)
    o = form(q, k, v, window)
    referee = F.scaled_dot_product_attention(q, k, v, attn_mask=band(t, s, window), enable_gqa=g < 4)
    check_close(o, referee, 1e-12, "attention and torch's")
    weight = torch.randn_like(o)
    for a, b in zip(torch.autograd.grad((o * weight).sum(), (q, k, v)),
                    torch.autograd.grad((referee * weight).sum(), (q, k, v)), strict=True):
        check_close(a, b, 1e-11, "gradient and torch's")


def test_the_hand_written_gradient_is_the_derivative():
    q, k, v = qkv(9, 13, h=2, g=2, d=4)
    assert torch.autograd.gradcheck(lambda *x: lesson.chunked_attention(*x, window=6, chunk=4), (q, k, v))


@pytest.mark.parametrize("form", [lesson.parallel_attention, lesson.chunked_attention])
def test_padding_is_invisible_and_a_row_without_sources_is_zero(form):
    q, k, v = qkv(40)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[0, :7] = False                                  # left padding: rows 0..6 see nothing
    o = form(q, k, v, real=real)
    check_close(o[0, :, :7], torch.zeros_like(o[0, :, :7]), 0.0, "rows that see nothing")
    check_close(o[:1, :, 7:], form(q[:1, :, 7:], k[:1, :, 7:], v[:1, :, 7:]), 1e-12, "what padding leaves")
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads) and not grads[1][0, :, :7].any() and not grads[2][0, :, :7].any()


@pytest.mark.parametrize("make", [lesson.Attention, lesson.SlidingWindow])
def test_a_padded_batch_generates_as_each_sequence_alone(make):
    torch.manual_seed(0)
    mixer = make(32).double()
    x = torch.randn(2, 100, 32, dtype=torch.float64)
    real = torch.ones(2, 90, dtype=torch.bool)
    real[1, :30] = False
    y, state = mixer.prefill(x[:, :90], real=real)
    tail = []
    for i in range(90, 100):
        y_t, state = mixer.step(x[:, i], state)
        tail.append(y_t)
    alone = mixer(x[1:, 30:])                            # positions shift by 30, which rotary scores do not notice
    check_close(torch.cat([y[1:, 30:], torch.stack(tail, 1)[1:]], 1), alone, 1e-11, "the padded sequence")


def test_online_softmax_keeps_scores_that_overflow_exp():
    q, k, v = qkv()
    o = lesson.chunked_attention(q * 300, k * 300, v, chunk=16)
    referee = F.scaled_dot_product_attention(q * 300, k * 300, v, is_causal=True)
    assert o.isfinite().all()
    check_close(o, referee, 1e-9, "huge scores")


def test_memory_of_the_chunked_form_does_not_grow_with_the_square():
    q, k, v = (torch.randn(1, 1, 4096, 8, requires_grad=True) for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        lesson.chunked_attention(q, k, v)
    assert sum(saved) < 4096 * 64                        # M would have 4096 * 4096


def test_rope_depends_on_distance_only():
    q, k = (torch.randn(1, 1, 1, 16, dtype=torch.float64) for _ in range(2))
    scores = [(lesson.rope(q, i + 5) * lesson.rope(k, i)).sum() for i in (0, 3, 1000, 10 ** 6)]
    for s in scores[1:]:
        check_close(s, scores[0], 1e-9, "a score five apart")
    assert (scores[0] - (lesson.rope(q, 6) * lesson.rope(k, 0)).sum()).abs() > 1e-3


def test_a_window_sees_exactly_w_tokens():
    torch.manual_seed(0)
    mixer = lesson.SlidingWindow(32, window=5).double()
    x, _ = inputs(mixer, 20)
    x.requires_grad_()
    for form in plain_forms(mixer):
        grad, = torch.autograd.grad(mixer(x, form)[:, 12].sum(), x)
        assert [i for i in range(20) if grad[:, i].any()] == [8, 9, 10, 11, 12], form
    assert mixer.init_state(3).k.shape[2] == 5 and mixer.prefill(x)[1].k.shape[2] == 5


def test_linformer_with_identity_projections_is_full_attention():
    torch.manual_seed(0)
    mixer = lesson.Linformer(32, k=24, max_len=24).double()
    with torch.no_grad():
        mixer.E.copy_(torch.eye(24))
        mixer.F.copy_(torch.eye(24))
    x, _ = inputs(mixer, 24)
    q, k, v = mixer.project(x)
    check_close(mixer(x), mixer.output(F.scaled_dot_product_attention(q, k, v), x), 1e-12, "Linformer with E = F = 1")


def test_linformers_sketch_of_the_values_improves_with_k():
    """[W20, theorem 1] P R^T R V tends to P V for R ~ N(0, 1/k): the error falls as 1/sqrt(k)."""
    torch.manual_seed(0)
    P, V = torch.randn(256, 256).mul(2).softmax(-1), torch.randn(256, 8)
    errors = []
    for k in (64, 1024, 16384):
        R = torch.randn(k, 256) * k ** -0.5
        errors.append(((P @ R.T @ (R @ V) - P @ V).norm() / (P @ V).norm()).item())
    assert 3 < errors[0] / errors[1] < 5 and 3 < errors[1] / errors[2] < 5, errors


def test_linformer_refuses_what_is_too_long():
    with pytest.raises(ValueError, match="max_len 16"):
        lesson.Linformer(32, max_len=16)(torch.randn(1, 17, 32))


def test_ngram_heads_by_hand():
    """After a b c d a b: the bigram head looks at c, the unigram head too; e was never seen before."""
    mixer = lesson.NGram(8)
    M = mixer.matrix(torch.randn(1, 8, 8), torch.tensor([[0, 1, 2, 3, 0, 1, 4, 1]]))[0]
    assert M[0, 5].tolist() == [0, 0, 1, 0, 0, 0, 0, 0] and M[1, 5].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert M[0, 7].tolist() == [0, 0, 0.5, 0, 0, 0, 0.5, 0] and not M[1, 7].any() and not M[0, 6].any()
    assert M[0, 4].tolist() == [0, 1, 0, 0, 0, 0, 0, 0] and not M[2, :6].any()


def test_ngram_heads_read_equal_rows_as_equal_tokens():
    torch.manual_seed(0)
    mixer, ids = lesson.NGram(8), torch.randint(0, 3, (2, 30))
    rows = torch.randn(3, 8)[ids]
    assert torch.equal(mixer.matrix(rows), mixer.matrix(rows, ids))
    for form in plain_forms(mixer):
        check_close(mixer(rows, form), mixer(rows, form, ids=ids), 0.0, form)


@pytest.mark.parametrize("options, message", [
    ({"n_heads": 3}, "multiple of n_heads 3"), ({"n_kv_heads": 3}, "multiple of n_kv_heads 3"),
    ({"window": 0}, "window 0"), ({"n_heads": 32}, "must be even"), ({"n_heads": 0}, "multiple"),
    ({"n_positions": 0}, "n_positions 0"), ({"head_dim": 0}, "head_dim 0"), ({"head_dim": 5}, "head dim 5"),
    ({"theta": (1.0,) * 5}, "angles for 5 pairs")])
def test_attention_names_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        lesson.Attention(32, **options)


def test_grouped_heads_keep_a_smaller_cache():
    mixer = lesson.Attention(32, n_kv_heads=1)
    assert mixer.state_size(10) * 4 == lesson.Attention(32).state_size(10)
    results = [run(mixer.double(), form, inputs(mixer, 65)[0], {}) for form in plain_forms(mixer)]
    for what in results[0]:
        for other in results[1:]:
            check_close(results[0][what], other[what], 1e-9, what)


def test_learned_positions():
    """In every form, with their gradients, and in steps; a text must not be longer than there are."""
    mixer = lesson.Attention(32, 2, rope=False, n_positions=70).double()
    x = inputs(mixer, 70)[0]
    results = [run(mixer, form, x, {}) for form in plain_forms(mixer)]
    for what in results[0]:
        for other in results[1:]:
            check_close(results[0][what], other[what], 1e-9, what)
    y, state = mixer.prefill(x[:, :60])
    check_close(y, mixer(x)[:, :60], 1e-9, "prefill")
    for i in range(60, 70):
        y, state = mixer.step(x[:, i], state)
        check_close(y, mixer(x)[:, i], 1e-9, f"step {i}")
    same = x[:, :1].expand(-1, 5, -1)                            # equal tokens: only their positions differ
    assert (mixer(same)[:, 1:] - mixer(same)[:, :1]).abs().amin(dim=(0, 2)).gt(0).all()
    for too_long in (lambda: mixer(torch.cat([x, x], 1)), lambda: mixer.step(x[:, 0], state),
                     lambda: mixer.reserve(state, 1), lambda: mixer.prefill(x, state)):
        with pytest.raises(ValueError, match="tokens, where n_positions is 70"):
            too_long()


WISHES = {"head_dim": 12, "n_kv_heads": 2, "qkv_bias": True, "out_bias": True, "qk_norm": 1e-6,
          "theta": (1.0, 0.1, 0.01), "gate": True}


@pytest.mark.parametrize("options", [{name: value} for name, value in WISHES.items()] + [WISHES], ids=[*WISHES, "all"])
def test_what_pretrained_models_want(options):
    """In every form, with all gradients, and in steps."""
    torch.manual_seed(0)
    mixer = lesson.Attention(32, 4, **options).double()
    x = inputs(mixer, 70)[0]
    results = [run(mixer, form, x, {}) for form in plain_forms(mixer)]
    for what in results[0]:
        for other in results[1:]:
            check_close(results[0][what], other[what], 1e-9, what)
    y, state = mixer.prefill(x[:, :60])
    for i in range(60, 70):
        y, state = mixer.step(x[:, i], state)
        check_close(y, mixer(x)[:, i], 1e-9, f"step {i}")
    assert mixer.state_size(70) == state.k.numel() + state.v.numel() >> 1            # two texts


def test_norms_of_q_and_k_and_the_turn_of_a_part():
    """Each q and k has the length that its norm says, and numbers beyond the pairs of theta are as they were."""
    torch.manual_seed(0)
    mixer = lesson.Attention(32, 2, qk_norm=0.0, theta=(0.5, 0.25)).double()
    x = inputs(mixer, 9)[0]
    q, k, v = mixer.project(x)
    check_close(q.square().mean(-1), torch.ones(2, 2, 9, dtype=q.dtype), 1e-12, "the length of q")
    plain = mixer.qkv(x)[..., :16].unflatten(-1, (1, 16)).transpose(1, 2)
    plain = plain / plain.square().mean(-1, keepdim=True).sqrt()
    check_close(q[:, :1, :, 4:], plain[..., 4:], 1e-12, "what does not turn")
    angle = 8 * torch.tensor([0.5, 0.25], dtype=torch.float64)
    check_close(q[:, 0, 8, :2], plain[:, 0, 8, :2] * angle.cos() - plain[:, 0, 8, 2:4] * angle.sin(), 1e-12, "a turn")
    check_close(lesson.rope(v, 3, theta=1e4 ** (-torch.arange(8.0, dtype=torch.float64) / 8)), lesson.rope(v, 3), 1e-12,
                "rope's own angles")


@pytest.mark.parametrize("window", [None, 4])
def test_a_target_that_sees_nothing_gets_nothing_in_every_form(window):
    """Left padding, in the loop too, where a step may find a cache of padding only."""
    q, k, v = qkv(12, h=2, g=2, d=4)
    real = torch.ones(len(q), 12, dtype=torch.bool)
    real[0, :5] = False
    slots = (*k.shape[:2], window or 0)
    empty = lesson.Cache(k.new_zeros(*slots, 4), v.new_zeros(*slots, v.shape[3]), real.new_zeros(len(q), slots[2]), 0)
    results = {"parallel": lesson.parallel_attention(q, k, v, window, real),
               "chunked": lesson.chunked_attention(q, k, v, window, real, chunk=4),
               "recurrent": lesson.recurrent_attention(q, k, v, empty, real, window)[0]}
    for form, o in results.items():
        check_close(o[0, :, :5], torch.zeros_like(o[0, :, :5]), 0.0, f"{form}: padding")
        check_close(o, results["parallel"], 1e-12, form)


@pytest.mark.parametrize("window", [None, 4])
def test_the_cache_keeps_its_precision(window):
    """Also where keys come in bfloat16: autocast on a GPU, unlike on a CPU, does not bring the two together."""
    state = lesson.Attention(32, 2, window=window).init_state(1)
    k = torch.randn(1, 2, 3, 16).bfloat16()
    kept = lesson.remember(state, k, k, torch.ones(1, 3, dtype=torch.bool), window)
    assert kept.k.dtype == kept.v.dtype == torch.float32 and torch.equal(kept.k[:, :, :3], k.float())


@pytest.mark.parametrize("window", [None, 4])
def test_a_cache_with_room_is_the_cache(window):
    """In steps, and in a prefill behind them."""
    mixer = lesson.Attention(32, 2, window=window).double()
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, state = mixer.prefill(x[:, :7])
    roomy, kept = mixer.reserve(state, 5), state.k.clone()
    for i in range(7, 12):
        y, state = mixer.step(x[:, i], state)
        z, roomy = mixer.step(x[:, i], roomy)
        check_close(z, y, 1e-12, f"step {i}")
    assert roomy.k.shape[2] == (window or 12) and torch.equal(kept, mixer.prefill(x[:, :7])[1].k)
    roomy = mixer.reserve(roomy, 3)
    (y, state), (z, roomy) = mixer.prefill(x[:, 12:], state), mixer.prefill(x[:, 12:], roomy)
    check_close(z, y, 1e-12, "prefill")
    assert torch.allclose(roomy.k, state.k) and torch.equal(roomy.real, state.real)

"""Lesson 02: the forms with every kind of decay, stability, RWKV-4's readings, feature maps, mimicry of softmax."""
import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from harness import check_close

import train

lesson = importlib.import_module("02_linear_attention")
attention = importlib.import_module("01_attention")
FORMS = lesson.FORMS | {"scan": lesson.scanned}
GATES = {"none": None, "constant": (1, 3, 1, 1), "scalar": (2, 3, 70, 1), "vector": (2, 3, 70, 4),
         "constant vector": (1, 3, 1, 4)}


def qkvg(gate="none", t=70, strength=1.0, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, t, n, generator=gen, dtype=torch.float64) for n in (4, 4, 5))
    g = None
    if gate == "complex":
        g = torch.complex(-torch.rand(2, 3, t, 1, generator=gen, dtype=torch.float64),
                          torch.randn(2, 3, t, 1, generator=gen, dtype=torch.float64))
        q, k, v = (x.to(g.dtype) for x in (q, k, v))
    elif GATES[gate]:
        shape = tuple(t if n == 70 else n for n in GATES[gate])
        g = -strength * torch.rand(shape, generator=gen, dtype=torch.float64)
    return [x if x is None or x.is_complex() else x.to(dtype) for x in (q, k, v, g)]


def definition(q, k, v, g, state=None):
    """o_t = q_t^T S_t with S_t = sum over s of the decayed k_s v_s^T: a double loop, sharing no code with the
    lesson."""
    b, h, t, d = q.shape
    g = torch.zeros(1, 1, 1, 1, dtype=q.dtype) if g is None else g
    g, o = g.expand(b, h, t, d), []
    for i in range(t):
        S = 0 if state is None else g[:, :, :i + 1].sum(2).exp()[..., None] * state
        for s in range(i + 1):
            S = S + (g[:, :, s + 1:i + 1].sum(2).exp() * k[:, :, s])[..., None] * v[:, :, s, None, :]
        o.append((q[:, :, i, :, None] * S).sum(2))
    return torch.stack(o, 2)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("gate", [*GATES, "complex"])
def test_every_form_is_the_definition(gate, with_state):
    q, k, v, g = qkvg(gate, t=70)
    state = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(q.dtype) if with_state else None
    start = [x if x is None or x.shape[2] == 1 else x[:, :, :20] for x in (q, k, v, g)]
    referee = definition(*start, state)
    results = {form: FORMS[form](q, k, v, g, state=state)
               for form in ("parallel", "chunked", "recurrent", "scan")}
    for form, (o, _) in results.items():
        check_close(o[:, :, :20], referee, 1e-11, f"{form} and the definition")
    for (a, (o1, s1)), (b, (o2, s2)) in itertools.combinations(results.items(), 2):
        check_close(o1, o2, 1e-11, f"{a} and {b}")
        check_close(s1, s2, 1e-11, f"states of {a} and {b}")


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_a_bonus_is_read_before_writing(gate):
    q, k, v, g = qkvg(gate, t=30)
    u, state = torch.rand(3, 1, 4, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    S, o = state, []
    decay = torch.zeros(2, 3, 30, 4, dtype=torch.float64) if g is None else g.expand(2, 3, 30, 4)
    for t in range(30):
        kv = k[:, :, t, :, None] * v[:, :, t, None, :]
        o.append((q[:, :, t, None] @ (S + u.mT * kv))[:, :, 0])
        S = decay[:, :, t, :, None].exp() * S + kv
    for form in (lesson.parallel, lesson.chunked, lesson.recurrent):
        ours, after = lesson.with_bonus(form, q, k, v, g, u, state)
        check_close(ours, torch.stack(o, 2), 1e-11, "bonus")
        check_close(after, S, 1e-11, "state after a bonus")


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_long_sequences_and_strong_gates_stay_exact_in_float32(gate, strength):
    """t = 8192: the decays multiply to e^-100000 and less, and nothing overflows, vanishes wrongly or becomes NaN."""
    single, double = qkvg(gate, 8192, strength, torch.float32), qkvg(gate, 8192, strength)
    (o, S), (referee, S2) = lesson.chunked(*single), lesson.chunked(*double)
    assert o.isfinite().all()
    check_close(o.double(), referee, 1e-4, "float32 and float64")
    check_close(S.double(), S2, 1e-4, "states in float32 and float64")
    recurrent, _ = lesson.recurrent(*double)
    check_close(referee, recurrent, 1e-9, "chunked and recurrent at t = 8192")


def test_small_gates_behind_large_ones_are_kept():
    """Why segment_sums sums: a difference of cumulative sums in float32 is off by 1e-4 here."""
    g = torch.full((1, 1, 64, 1), -1e-3)
    g[:, :, :32] = -300.0
    exact = lesson.segment_sums(g.double())
    check_close(lesson.segment_sums(g)[0, 0, 32:, 32:].double(), exact[0, 0, 32:, 32:], 1e-8, "segment sums")
    G = g.cumsum(2)
    by_difference = (G - G.mT)[0, 0, 32:, 32:].tril()
    assert (by_difference.double() - exact[0, 0, 32:, 32:, 0]).abs().max() > 1e-5


# -------------------------------------------------------------------------------------------------------------- RWKV-4


def rwkv(t=70, scale=1.0):
    torch.manual_seed(0)
    k, v = scale * torch.randn(2, 6, t, dtype=torch.float64), torch.randn(2, 6, t, dtype=torch.float64)
    state = torch.zeros(2, 3, 6, dtype=torch.float64)
    state[:, 2] = torch.finfo(torch.float64).min
    return k, v, -torch.rand(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64), state


def test_rwkv4_is_a_loop_a_softmax_a_scan_and_a_ratio_of_two_linear_recurrences():
    k, v, w, u, state = rwkv()
    loop, _ = lesson.rwkv_recurrent(k, v, w, u, state)
    check_close((lesson.rwkv_weights(k, w, u) @ v[..., None])[..., 0], loop, 1e-12, "quadratic form")
    check_close(lesson.rwkv_scan(k, v, w, u, state)[0], loop, 1e-12, "scan")
    for form in (lesson.parallel, lesson.chunked, lesson.recurrent):
        check_close(lesson.rwkv_ratio(k, v, w, u, form), loop, 1e-12, "ratio of two recurrences")


def test_only_the_naive_ratio_breaks_for_large_k():
    k, v, w, u, state = rwkv(scale=300.0)
    loop, _ = lesson.rwkv_recurrent(k, v, w, u, state)
    assert loop.isfinite().all() and lesson.rwkv_ratio(k, v, w, u).isnan().any()
    check_close(lesson.rwkv_scan(k, v, w, u, state)[0], loop, 1e-12, "scan")
    check_close((lesson.rwkv_weights(k, w, u) @ v[..., None])[..., 0], loop, 1e-12, "quadratic form")


# -------------------------------------------------------------------------------------------------------- feature maps


def test_performer_is_unbiased_and_improves_as_one_over_the_root_of_m():
    torch.manual_seed(0)
    d, draws = 8, 400
    q, k = (0.6 * torch.randn(1, 1, 16, d, dtype=torch.float64) for _ in range(2))
    exact = (q @ k.mT / d ** 0.5).exp()
    spread = {}
    for m in (16, 64, 256):
        maps = [lesson.Performer(d, 1, m).double() for _ in range(draws)]
        estimates = torch.stack([phi(q) @ phi(k).mT for phi in maps])
        assert (estimates > 0).all()
        error = (estimates.mean(0) - exact) / (estimates.std(0) / draws ** 0.5)
        assert error.square().mean() < 2 and error.abs().max() < 6, f"biased at m={m}"
        spread[m] = (estimates.std(0) / exact).mean().item()
    assert 1.6 < spread[16] / spread[64] < 2.5 and 1.6 < spread[64] / spread[256] < 2.5, spread


def test_performer_follows_the_exponent_it_estimates():
    torch.manual_seed(0)
    q, k = (0.6 * torch.randn(1, 1, 64, 16, dtype=torch.float64) for _ in range(2))
    phi = lesson.Performer(16, 1, 1024).double()
    estimate, exact = (phi(q) @ phi(k).mT).log().flatten(), (q @ k.mT / 4).flatten()
    assert torch.corrcoef(torch.stack([estimate, exact]))[0, 1] > 0.9
    rows = phi.w[:16] / phi.w[:16].norm(dim=1, keepdim=True)
    check_close(rows @ rows.mT, torch.eye(16, dtype=torch.float64), 1e-6, "orthogonal directions")


def test_taylor_is_the_second_order_polynomial_full_and_packed():
    q, k = (torch.randn(1, 1, 40, 16, dtype=torch.float64) for _ in range(2))
    s = q @ k.mT / 4
    for name, features in (("taylor", 153), ("taylor_full", 273)):
        phi = lesson.FEATURE_MAPS[name](16, 1).double()
        assert phi(q).shape[-1] == phi.dim == features
        check_close(phi(q) @ phi(k).mT, 1 + s + s.square() / 2, 1e-12, name)
    assert (1 + s + s.square() / 2).min() >= 0.5


def test_cosformer_weighs_by_the_cosine_of_the_distance_and_has_an_end():
    phi = lesson.CosFormer(4, 1, M=50)
    q, k = (torch.rand(1, 1, 50, 4, dtype=torch.float64) for _ in range(2))
    lag = torch.arange(50)[:, None] - torch.arange(50)
    check_close(phi(q) @ phi(k).mT, (q @ k.mT) * torch.cos(math.pi / 100 * lag.double()), 1e-12, "cosFormer")
    check_close(phi(q[:, :, 20:], start=20), phi(q)[:, :, 20:], 1e-12, "positions")
    with pytest.raises(ValueError, match="M = 50"):
        phi(q, start=1)


def test_rfa_is_a_gaussian_kernel_that_can_be_negative():
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(1, 1, 30, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    phi = lesson.RandomFourier(8, 1, m=20000).double()
    check_close(phi(x) @ phi(y).mT, (x @ y.mT - 1).exp(), 0.05, "e^{x.y - 1}")
    narrow = lesson.RandomFourier(8, 1, m=64, tau=0.5).double()
    assert 0.1 < ((narrow(x) @ narrow(y).mT) < 0).double().mean() < 0.5


def test_rebased_is_the_square_of_normalised_q_and_k():
    q, k = (torch.randn(1, 1, 30, 16, dtype=torch.float64) for _ in range(2))
    phi = lesson.ReBased(16, 1).double()
    exact = (F.layer_norm(q, (16,)) @ F.layer_norm(k, (16,)).mT).square() / 16
    check_close(phi(q) @ phi(k).mT, exact, 1e-10, "ReBased")


def test_rebased_has_no_kernel():
    """A kernel is the default in bfloat16, whose digits do not do for features that cancel where q . k is near 0."""
    with pytest.raises(ValueError, match="has no form 'triton'"):
        lesson.ReBasedAttention(32)(torch.zeros(1, 4, 32), "triton")


def test_unknown_feature_maps_are_named():
    with pytest.raises(ValueError, match="unknown feature_map 'exp'; there are elu"):
        lesson.LinearAttention(32, feature_map="exp")


# ----------------------------------------------------------------------------------------------------- softmax mimicry


def test_softmax_is_spiky_and_monotone_and_the_early_maps_are_neither():
    table = lesson.mimicry()
    entropy, monotone = ({name: row[i] for name, row in table.items()} for i in (0, 1))
    assert monotone["softmax"] == pytest.approx(1)
    for name in ("elu", "relu", "cosformer"):
        assert entropy[name] > entropy["softmax"] + 1 and monotone[name] < 0.7
    assert monotone["performer"] < 0.7                       # spiky, but in the wrong places
    assert monotone["hedgehog"] == max(m for name, m in monotone.items() if name != "softmax")


def test_a_divergence_is_never_negative():
    """Not even of a map whose weights are negative in places, like RFA's: a share above 1 of the rest must not pay."""
    q = k = 10 * torch.eye(8)[None, None]                        # softmax: every token attends to itself
    phi_q, phi_k = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        phi_q.weight.copy_(1.5 * torch.eye(8) - 0.1)             # weight 1.4 to itself, -0.1 to all others
        phi_k.weight.copy_(torch.eye(8))
    assert lesson.distil(q, k, phi_q, phi_k, steps=0)[0] > -1e-6


def test_hedgehog_learns_a_trained_attention_layer():
    """[Z24]: distillation brings the weights five times nearer to softmax's; on other text, three times."""
    args, _ = train.parse("""--mixer attention --n_layers 1 --d_model 64 --n_heads 2 --context 64 --batch_size 16
                             --steps 200 --lr 1e-2 --tokenizer byte""".split())
    machine, data = train.Machine("cpu"), train.Text(args)
    model = train.build_model(args, data.vocab_size)
    optimizer = train.optimizer_for(model, args)
    for i in range(200):
        train.train_step(model, optimizer, data.batch(16, torch.Generator().manual_seed(i)), args, machine)
    block = model.blocks[0]

    def queries_and_keys(tokens):
        ids, _, _ = data.windows(tokens, range(0, 64 * 640, 640))
        return block.mixer.project(block.norm(model.embed(ids)))[:2]
    torch.manual_seed(0)
    maps = lesson.Hedgehog(32, 2), lesson.Hedgehog(32, 2)
    held_out_before = lesson.distil(*queries_and_keys(data.val), *maps, steps=0)[0]
    divergences = lesson.distil(*queries_and_keys(data.train), *maps, steps=400, lr=0.02)
    held_out = lesson.distil(*queries_and_keys(data.val), *maps, steps=0)[0]
    assert divergences[-1] < divergences[0] / 5, divergences[::100]
    assert held_out < held_out_before / 3, (held_out_before, held_out)

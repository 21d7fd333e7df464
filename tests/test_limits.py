"""Where one mixer is a special case of another, across lessons; and what stands in several lessons is the same."""
import importlib
import inspect

import torch
from harness import MIXERS, check_close, inputs, make, plain_forms


def same_weights(a, b):
    """b with a's parameters."""
    b.load_state_dict(a.state_dict())
    return b


def test_a_window_as_long_as_the_text_is_full_attention():
    full = make("attention")
    window = same_weights(full, MIXERS["window"](32, window=50).double())
    x, _ = inputs(full, 50)
    for form in plain_forms(full):
        check_close(window(x, form), full(x, form), 1e-12, form)
    assert (window(*inputs(full, 60)[:1]) - full(*inputs(full, 60)[:1])).abs().max() > 1e-3


def test_based_is_lesson_02_and_lesson_01():
    """Its linear part alone is linear attention with the Taylor map, its window alone softmax attention."""
    linear_part, window_part = (MIXERS["based"](32, **{other: None}).double() for other in ("window", "feature_dim"))
    taylor, window = MIXERS["taylor"](32).double(), MIXERS["window"](32, window=64).double()
    q, k = linear_part.qk["linear"].weight.detach().chunk(2)
    taylor.load_state_dict({"q.weight": q, "k.weight": k, "v.weight": linear_part.v.weight,
                            "out.weight": linear_part.out.weight})
    window.load_state_dict({"qkv.weight": torch.cat([window_part.qk["window"].weight, window_part.v.weight]),
                            "out.weight": window_part.out.weight})
    full = same_weights(window, MIXERS["attention"](32).double())
    for t in (60, 130):
        x, _ = inputs(taylor, t)
        for form in ("parallel", "chunked", "recurrent"):
            check_close(linear_part(x, form), taylor(x, form), 1e-11, "Based without its window is lesson 02's Taylor")
            check_close(window_part(x, form), window(x, form), 1e-11, "Based without its linear part is the window")
        assert ((window_part(x) - full(x)).abs().max() < 1e-11) == (t <= 64)
    both = MIXERS["based"](32).double()
    weights = linear_part.state_dict() | window_part.state_dict() | {n: linear_part.state_dict()[n] for n in
                                                                     ("v.weight", "out.weight")}
    both.load_state_dict(weights)
    window_part.load_state_dict({n: weights[n] for n in window_part.state_dict()})
    check_close(both(x), linear_part(x) + window_part(x), 1e-11, "Based is the sum of its parts")


def test_jrt_with_an_empty_prefix_is_baseds_linear_part_and_lesson_02():
    jrt, based = make("jrt"), MIXERS["based"](32, window=None).double()
    based.load_state_dict({"qk.linear.weight": jrt.qk.weight, "v.weight": jrt.v.weight, "out.weight": jrt.out.weight})
    x, _ = inputs(jrt, 130)
    for form in plain_forms(jrt):
        check_close(jrt(x, form), based(x, form), 1e-11, form)
        check_close(jrt(x, form, prefix=0), based(x, form), 1e-11, form)
    for feature_map, name in (("elu", "linear_attention"), ("relu", "relu")):
        jrt, other = MIXERS["jrt"](32, feature_dim=8, feature_map=feature_map).double(), make(name)
        q, k = (20 * jrt.qk.weight.detach()).chunk(2)
        jrt.load_state_dict(jrt.state_dict() | {"qk.weight": torch.cat([q, k])})
        other.load_state_dict({"q.weight": q, "k.weight": k, "v.weight": jrt.v.weight, "out.weight": jrt.out.weight})
        check_close(jrt(x), other(x), 1e-11, f"with {feature_map} it is a mixer of lesson 02")


# ---------------------------------------------------------------------------------------------------- within lesson 02

linear = importlib.import_module("02_linear_attention")


def random_qkv(t=70, d=8, e=6, h=2):
    torch.manual_seed(0)
    return [torch.randn(2, h, t, n, dtype=torch.float64) for n in (d, d, e)]


def test_gla_with_a_constant_gate_is_retnets_core():
    q, k, v = random_qkv()
    gamma = (1 - 2.0 ** (-5 - torch.arange(2, dtype=torch.float64))).log()[None, :, None, None]
    for form in (linear.parallel, linear.chunked, linear.recurrent):
        vector, _ = form(q, k, v, gamma.expand(2, 2, 70, 8))
        scalar, _ = form(q, k, v, gamma)
        check_close(vector, scalar, 1e-11, "a constant vector gate and RetNet's decay")


def test_retnet_is_the_decayed_sum_of_its_paper():
    mixer = make("retnet")
    x, _ = inputs(mixer, 20)
    lag = torch.arange(20)[:, None] - torch.arange(20)
    D = mixer.g.exp() ** lag * (lag >= 0)
    q, k, _, _, _ = mixer.inputs(x)
    check_close(mixer.matrix(x), (q @ k.mT) * D, 1e-11, "(Q K^T) * D")


def test_gateloop_with_real_gates_is_the_scalar_decay():
    q, k, v = random_qkv(d=1, e=1, h=8)
    g = -torch.rand(2, 8, 70, 1, dtype=torch.float64)
    as_complex = [x.to(torch.complex128) for x in (q, k, v, g)]
    for form in (linear.parallel, linear.chunked, linear.recurrent, linear.scanned):
        check_close(form(*as_complex)[0].real, form(q, k, v, g)[0], 1e-11, "real gates")
        assert form(*as_complex)[0].imag.abs().max() < 1e-12


def test_mamba2_is_a_scalar_decay_with_its_own_inputs():
    """y = sum over s of C_t . B_s dt_s e^{-A (dt_{s+1} + ... + dt_t)} x_s + D x_t, written out."""
    mixer = make("mamba2")
    x, _ = inputs(mixer, 30)
    xbc, _ = mixer.conv(mixer.xbc(x), mixer.init_carry(2))
    v, B, C = xbc.split([64, 64, 64], dim=-1)
    dt = torch.nn.functional.softplus(mixer.dt(x) + mixer.dt_bias)                   # (b, t, h)
    since = (-dt * mixer.A_log.exp()).cumsum(1)
    L = (since[:, :, None] - since[:, None]).exp() * torch.ones(30, 30).tril()[..., None]          # (b, t, s, h)
    M = torch.einsum("btn,bsn,btsh,bsh->bhts", C, B, L, dt) + mixer.skip[:, None, None] * torch.eye(30)
    y = torch.einsum("bhts,bshe->bthe", M, v.unflatten(-1, (4, -1))).flatten(-2)
    z = torch.nn.functional.silu(mixer.z(x))
    check_close(mixer.out(linear.rms_norm(y * z) * mixer.norm), mixer(x), 1e-11, "Mamba-2 written out")


def test_turning_q_and_k_is_a_complex_decay():
    """Mamba-3: pairs turned by the angles summed so far, with a real decay, are one complex number that turns."""
    q, k, v = random_qkv(40, d=6)
    g, theta = -torch.rand(2, 2, 40, 1, dtype=torch.float64), torch.randn(2, 2, 40, 3, dtype=torch.float64)
    q_turned, k_turned = (linear.turned(x, theta.cumsum(dim=2)) for x in (q, k))
    q, k = (torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous()) for x in (q, k))
    o, _ = linear.recurrent(q, k.conj(), v.to(k.dtype), torch.complex(g.expand_as(theta), theta))
    check_close(linear.parallel(q_turned, k_turned, v, g)[0], o.real, 1e-11, "a turn")


def test_the_general_delta_rule_without_removal_is_linear_attention():
    q, k, v = random_qkv(40)
    g, nothing = -torch.rand_like(k), torch.zeros_like(k)
    for form in linear.GENERAL.values():
        check_close(form(q, k, v, g, nothing, k)[0], linear.parallel(q, k, v, g)[0], 1e-12, "a = 0")
        check_close(form(q, k, v, g, k, nothing)[0], linear.parallel(q, k, v, g)[0], 1e-12, "b = 0")


def test_a_reflection_turns_the_state_over():
    """beta = 2 under one key of length 1: what is there changes its sign at each token, which is parity."""
    k = torch.zeros(1, 1, 5, 2, dtype=torch.float64)
    k[..., 0] = 1
    S, v = torch.tensor([[[[1.0], [3.0]]]], dtype=torch.float64), torch.zeros(1, 1, 5, 1, dtype=torch.float64)
    for form in (linear.delta_parallel, linear.delta_chunked, linear.delta_recurrent):
        o, after = form(k, k, v, None, 2 * torch.ones(1, 1, 5, 1, dtype=torch.float64), state=S)
        assert o[0, 0, :, 0].tolist() == [-1, 1, -1, 1, -1] and after[0, 0, :, 0].tolist() == [-1, 3]


def test_the_mlstms_running_maximum_changes_nothing():
    """Against the definition with e^i as it is: o = S^T q / max(|n . q|, 1) [Be24, eq. 19-27]."""
    mixer = make("mlstm")
    x, _ = inputs(mixer, 30)
    q, k, v = (linear.split_heads(f(x), 4) for f in (mixer.q, mixer.k, mixer.v))
    g, one = torch.nn.functional.logsigmoid(15 * torch.tanh(mixer.f(x) / 15).mT[..., None]), torch.ones_like(v[..., :1])
    for more in (0, 9):                                                  # the input gate small, and large
        with torch.no_grad():
            mixer.i.bias.add_(more)
        i = 15 * torch.tanh(mixer.i(x) / 15).mT[..., None]
        o, _ = linear.recurrent(q * q.shape[-1] ** -0.5, k * i.exp(), torch.cat([v, one], dim=-1), g)
        o = o[..., :-1] / o[..., -1:].abs().clamp(min=1)
        check_close(mixer.finish(o, torch.sigmoid(mixer.gate(x))), mixer(x), 1e-9, "the mLSTM by its definition")


def test_the_delta_rule_with_orthonormal_keys_and_beta_1_is_linear_attention():
    t = 24
    q, _, v = random_qkv(t, d=t)
    k = torch.linalg.qr(torch.randn(2, 2, t, t, dtype=torch.float64))[0]
    beta = torch.ones(2, 2, t, 1, dtype=torch.float64)
    for delta in (linear.delta_parallel, linear.delta_chunked, linear.delta_recurrent):
        check_close(delta(q, k, v, None, beta)[0], linear.parallel(q, k, v)[0], 1e-11, "orthonormal keys")


def test_the_delta_rule_replaces_what_is_under_a_key():
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1).expand(-1, -1, 2, -1)
    v = torch.randn(1, 1, 2, 3, dtype=torch.float64)
    o, _ = linear.delta_chunked(k, k, v, None, torch.ones(1, 1, 2, 1, dtype=torch.float64))
    check_close(o, v, 1e-12, "the value written last")             # linear attention would give v_1 + v_2


def test_rwkv4_without_a_bonus_is_a_normalised_linear_recurrence():
    """With u = 0 the own token has the weight that it will be written with: an average over what decays from then
    on."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 6, 50, dtype=torch.float64), torch.randn(2, 6, 50, dtype=torch.float64)
    w = -torch.rand(6, dtype=torch.float64)
    state = torch.zeros(2, 3, 6, dtype=torch.float64)
    state[:, 2] = torch.finfo(torch.float64).min
    loop, _ = linear.rwkv_recurrent(k, v, w, torch.zeros(6, dtype=torch.float64), state)
    lag = (torch.arange(50)[:, None] - torch.arange(50) - 1).clamp(min=0)
    M = (lag * w[:, None, None] + k[:, :, None, :]).exp().tril()                     # (b, c, t, s)
    check_close(loop, (M @ v[..., None])[..., 0] / M.sum(-1), 1e-12, "an average with decaying weights e^k")
    ek, v1 = k[..., None].exp(), torch.stack([v, torch.ones_like(v)], -1)
    g, u = w[None, :, None, None], torch.ones(6, 1, 1)
    late, _ = linear.with_bonus(linear.chunked, torch.ones_like(ek), ek, v1, g, u)
    check_close(loop, late[..., 0] / late[..., 1], 1e-12, "the general form")


def test_feature_maps_in_linear_attention_are_the_normalised_kernel():
    for name in ("elu", "taylor", "hedgehog"):
        mixer = make("linear_attention" if name == "elu" else name)
        x, _ = inputs(mixer, 40)
        q, k, v, *_ = mixer.inputs(x)
        A = (q @ k.mT).tril()
        check_close(mixer(x), mixer.output(A @ v / A.sum(-1, keepdim=True), x), 1e-10, name)


def test_taylor_full_and_packed_are_one_mixer():
    packed = make("taylor")
    full = same_weights(packed, MIXERS["taylor_full"](32).double())
    x, _ = inputs(packed, 70)
    check_close(full(x), packed(x), 1e-11, "Taylor, full and packed")
    assert full.state_size(1) == 4 * 273 * 9 and packed.state_size(1) == 4 * 153 * 9


def test_what_stands_in_two_lessons_is_the_same():
    one, two = importlib.import_module("01_attention"), linear
    three, four = importlib.import_module("03_ssm"), importlib.import_module("04_based")
    five = importlib.import_module("05_jrt")
    copies = {"pick_form": (one, two, three, four, five), "join_heads": (one, two, four, five), "scan": (two, three),
              "fft_conv": (three, four), "triton_conv": (three, four), "toeplitz": (three, four),
              "products": (two, four, five), "rope": (two, four),
              "hash_rows": (one, four), "share_groups": (one, four), "head_dim": (two, four, five),
              "taylor": (four, five),
              "linear": (two, three, four, five), "with_one": (four, five), "normalised": (four, five)}
    for name, lessons in copies.items():
        assert len({inspect.getsource(getattr(lesson, name)) for lesson in lessons}) == 1, name
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    check_close(one.rope(x, 5), two.rope(x, 5), 0.0, "rope")
    torch.manual_seed(0)
    w = four.orthogonal_gaussian(20, 8)
    torch.manual_seed(0)
    performer = two.Performer(8, 1, m=20).double()
    check_close(four.favor(x, w), performer(x), 1e-6, "FAVOR+")
    check_close(four.taylor(x), two.Taylor(8, 1)(x), 0.0, "Taylor")
    check_close(four.Hedgehog(8, 3).double()(x), two.Hedgehog(8, 3).double()(x), 0.0, "Hedgehog")
    check_close(four.taylor_full(x), two.TaylorFull(8, 1)(x), 0.0, "Taylor, all products")


def test_gated_rfa_averages():
    """S_t = g S_{t-1} + (1 - g) phi(k) v^T, and the same for the normaliser [P21, eq. 7]."""
    mixer = make("gated_rfa")
    x, _ = inputs(mixer, 20)
    q, k, v = (linear.split_heads(f(x), 4) for f in (mixer.q, mixer.k, mixer.v))
    q, k, g = mixer.phi_q(q), mixer.phi_k(k), mixer.gate(x).sigmoid().mT[..., None]
    S, z, o = 0, 0, []
    for t in range(20):
        S = g[:, :, t, :, None] * S + (1 - g[:, :, t, :, None]) * k[:, :, t, :, None] * v[:, :, t, None, :]
        z = g[:, :, t] * z + (1 - g[:, :, t]) * k[:, :, t]
        o.append((q[:, :, t, None] @ S)[:, :, 0] / (q[:, :, t] * z).sum(-1, keepdim=True).clamp(min=1e-3))
    check_close(mixer.output(torch.stack(o, 2), x), mixer(x), 1e-10, "gated RFA")

"""Lesson 03: HiPPO against closed forms, S4's three kernels, discretisation, Monarch, long signals, limits."""
import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import MIXERS, check_close, check_forms, check_split, inputs, make, plain_forms

lesson = importlib.import_module("03_ssm")
double = torch.float64


# ---------------------------------------------------------------------------------------------------------- primitives


def test_fft_convolution_is_the_sum_and_torchs_conv1d():
    u, K = torch.randn(2, 3, 50, dtype=double), torch.randn(3, 50, dtype=double)
    direct = torch.stack([sum(K[:, t - s] * u[:, :, s] for s in range(t + 1)) for t in range(50)], dim=-1)
    referee = F.conv1d(F.pad(u, (49, 0)), K.flip(-1)[:, None], groups=3)
    for y in (lesson.fft_conv(u, K), (lesson.toeplitz(K) @ u[..., None])[..., 0]):
        check_close(y, direct, 1e-12, "the sum")
        check_close(y, referee, 1e-12, "torch's conv1d")


@pytest.mark.parametrize("kind", [double, torch.complex128])
def test_scan_is_the_loop(kind):
    a, b = (torch.randn(2, 3, 37, 4, dtype=kind) for _ in range(2))
    h = torch.randn(2, 3, 4, dtype=kind)
    a = a / a.abs().clamp(min=1)
    for how in (lesson.scan_from, lesson.chunks):
        check_close(how(a, b, h), lesson.loop(a, b, h), 1e-12, how.__name__)
        check_close(how(a, b), lesson.loop(a, b), 1e-12, how.__name__)


@pytest.mark.parametrize("kind", [double, torch.complex128])
def test_the_loops_gradient_is_right_also_for_the_state_it_starts_from(kind):
    a, b, h = (torch.randn(*size, dtype=kind, requires_grad=True) for size in ((1, 2, 5, 3), (1, 2, 5, 3), (1, 2, 3)))
    assert torch.autograd.gradcheck(lesson.loop, (a, b, h)) and torch.autograd.gradcheck(lesson.loop, (a, b))
    assert torch.autograd.gradcheck(lesson.loop, (a[:, :, :1], b[:, :, :1], h))


def test_a_loop_is_the_default_on_a_cpu_only_and_not_where_it_is_compiled(monkeypatch):
    mixer, x = make("mamba"), torch.randn(1, 8, 16)
    assert lesson.pick_form(mixer, x) == "recurrent"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert lesson.pick_form(mixer, x) == "chunked" and lesson.pick_form(mixer, x, "recurrent") == "recurrent"
    monkeypatch.undo()
    x = SimpleNamespace(ndim=3, shape=(1, 8, 16), dtype=double, is_cuda=True)
    assert lesson.pick_form(mixer, x) == "chunked"
    mixer.forms = ("recurrent",)
    assert lesson.pick_form(mixer, x) == "recurrent"


def test_discretisations_agree_as_the_step_shrinks_and_zoh_is_exact():
    A = torch.complex(torch.tensor([-0.5, -2.0], dtype=double), torch.tensor([3.0, -1.0], dtype=double))
    errors, nearly = {}, torch.tensor([-1e-9], dtype=double)
    check_close(lesson.zoh(nearly, 0.1)[1], torch.tensor([0.1], dtype=double), 1e-9, "an A of nearly 0")
    assert lesson.zoh(0 * nearly, 0.1)[1].item() == 0.1
    for dt in (0.1, 0.01):
        log_a, b = lesson.zoh(A, dt)
        fine = torch.arange(20000, dtype=double)[:, None] * dt / 20000 + dt / 40000
        check_close(log_a.exp(), (dt * A).exp(), 1e-14, "a")
        check_close(b, (fine * A).exp().mean(0) * dt, 1e-9, "the integral of e^{sA} over a step")
        errors[dt] = [((x[0].exp() - log_a.exp()).abs().max(), (x[1] - b).abs().max())
                      for x in (lesson.bilinear(A, dt), (dt * A, dt + 0 * A))]       # the second is Mamba's
    for big, small in zip(errors[0.1], errors[0.01], strict=True):
        assert small[0] <= big[0] / 500 + 1e-15 and small[1] < big[1] / 50


# --------------------------------------------------------------------------------------------------------------- HiPPO


def test_the_kernel_of_legs_is_legendre():
    """e^{tA} B = sqrt(2n + 1) P_n(2 e^{-t} - 1) e^{-t}, exactly."""
    A, B = lesson.hippo_legs(64)
    for t in (0.1, 0.7, 3.0):
        x = torch.tensor([math.exp(-t)], dtype=double)
        check_close(torch.matrix_exp(t * A) @ B, lesson.legendre(64, x)[:, 0] * x, 1e-11, f"t = {t}")
    nodes, weights = (torch.from_numpy(y) for y in np.polynomial.legendre.leggauss(100))
    P = lesson.legendre(64, (nodes + 1) / 2)
    check_close(P * weights / 2 @ P.mT, torch.eye(64, dtype=double), 1e-12, "orthonormal")


@pytest.mark.parametrize("make_system, leak", [(lesson.hippo_legt, 0.03), (lesson.hippo_fout, 0.06)])
def test_the_windows_of_legt_and_fout_are_one_long(make_system, leak):
    """Inside the window of length 1 the kernel is the basis, of size 1 and more; a window later hardly anything is
    left."""
    A, B = make_system(64)
    assert torch.linalg.eigvals(A).real.max() < 1e-9
    inside = torch.stack([torch.matrix_exp(t * A) @ B for t in (0.2, 0.4, 0.6)])[:, :16].square().mean().sqrt()
    after = torch.stack([torch.matrix_exp(t * A) @ B for t in (1.3, 1.6, 1.9)])[:, :16].square().mean().sqrt()
    assert after < leak * inside, (after / inside)


SYSTEMS = {"legs": lesson.hippo_legs, "legt": lesson.hippo_legt, "fout": lesson.hippo_fout}


def settled(name, n, signal, steps=4000):
    """The state of h' = A h + B u after a window of the signal u: (0, 1) -> numbers, by exact steps. LegS's own time is
    the logarithm: h' = (A h + B u) / t, from t = e^-14 to 1."""
    A, B = SYSTEMS[name](n)
    past = 14.0 if name == "legs" else 3.0
    dt, h = past / steps, torch.zeros(n, dtype=double)
    E = torch.matrix_exp(dt * torch.cat([torch.cat([A, B[:, None]], 1), torch.zeros(1, n + 1, dtype=double)]))
    for i in range(steps):
        t = past * (i + 0.5) / steps - past                      # from -past to 0
        at = math.exp(t) if name == "legs" else 1 + t
        h = E[:n, :n] @ h + E[:n, n] * signal(at)
    return h


def basis(name, n, x):
    if name != "fout":
        return lesson.legendre(n, x)
    rows, x = [torch.ones_like(x)], 1 - x                        # FouT's x is the age of what it remembers
    for i in range(1, n):
        f = math.sin if i % 2 else math.cos
        rows.append(2 ** 0.5 * torch.tensor([f(2 * math.pi * ((i + 1) // 2) * y) for y in x.tolist()], dtype=double))
    return torch.stack(rows)


@pytest.mark.parametrize("name", SYSTEMS)
def test_hippo_gives_back_what_went_in_at_its_own_size(name):
    """A ratio could not see a scale: a constant input of 1 settles at (1, 0, 0, ...), and a smooth signal comes back at
    1.000 times itself."""
    constant = settled(name, 9, lambda t: 1.0)
    check_close(constant, F.one_hot(torch.tensor(0), 9).double(), 1e-2, f"{name}: a constant")

    def wave(t):
        return math.cos(2 * math.pi * t) + 0.5 * math.sin(4 * math.pi * t) if t > 0 or name != "legs" else 0.0
    x = torch.linspace(0.1, 0.9, 81, dtype=double)
    back = settled(name, 33, wave) @ basis(name, 33, x)
    real = torch.tensor([wave(t) for t in x.tolist()], dtype=double)
    scale = (back @ real / (real @ real)).item()
    assert abs(scale - 1) < 1e-2, (name, scale)
    assert (back - real).square().mean().sqrt() < 0.05, (name, (back - real).abs().max())


def test_hippo_remembers_a_smooth_signal_better_with_more_numbers():
    errors = list(lesson.reconstruction_errors().values())
    assert errors[0] < 0.5 and errors[3] < 0.02, errors
    assert all(after < before / 2 for before, after in zip(errors, errors[1:], strict=False)), errors


def test_s4d_legs_is_s4_legs_smoothed():
    """[G22b, theorem 3] with the normal part of A and B halved the kernels tend to LegS's, but only weakly: the raw
    difference stays, its average over 0.2 falls: 0.06, 0.013, 0.0016 for the first basis function."""
    t, raw, smooth = torch.linspace(0, 5, 5001, dtype=double), [], []
    for n in (16, 64, 256):
        A, B = lesson.hippo_legs(n)
        P = (torch.arange(n, dtype=double) + 0.5).sqrt()
        w, V = torch.linalg.eigh(1j * (A + P[:, None] * P + 0.5 * torch.eye(n, dtype=double)))
        K = (V[0] * (V.mH @ (B / 2).to(V.dtype))) @ torch.exp((-0.5 - 1j * w)[:, None] * t)
        gap = K.real - torch.exp(-t)                             # LegS's first: P_0 = 1
        raw.append(gap.square().mean().sqrt().item())
        smooth.append(gap.unfold(0, 200, 1).mean(-1).square().mean().sqrt().item())
        start = lesson.s4d_legs(n)
        check_close(start.imag.double(), w[w > 1e-9].sort().values, 1e-6, "S4DLegS's first eigenvalues")
    assert all(abs(r - 0.222) < 0.005 for r in raw)
    assert all(abs(s - e) < 0.1 * e for s, e in zip(smooth, (0.06, 0.013, 0.0016), strict=True)), smooth


# ------------------------------------------------------------------------------------------------------------------ S4


@pytest.mark.parametrize("t", [1, 2, 7, 64, 100])
def test_s4s_kernel_by_generating_function_by_powers_and_by_the_loop(t):
    mixer = make("s4")
    generating = mixer.filter(t)
    krylov = lesson.Dense.filter(mixer, t)
    impulse = F.pad(torch.ones(1, mixer.channels, 1, dtype=double), (0, t - 1))
    loop, _ = mixer.loop(impulse, None)
    check_close(generating, krylov, 1e-9, "generating function and powers")
    check_close(mixer.kernel(t), loop[0], 1e-9, "powers and the loop, with D")


@pytest.mark.parametrize("t", [1, 7, 65])
def test_every_step_of_s4s_derivation_is_the_one_before(t):
    mixer, w = make("s4"), lesson.roots_of_unity(t, torch.zeros(1, dtype=torch.complex128))
    (Lambda, P, B, dt, C), (a, b, _) = mixer.continuous(), mixer.discrete()
    A, K = torch.diag(Lambda) - P[:, None] * P.conj(), lesson.by_powers(a, b, C, w)
    for step, other in (("geometric sum", lesson.by_geometric_sum(a, b, C, w)),
                        ("resolvent", lesson.by_resolvent(A, B, dt, a, C, w)),
                        ("Woodbury", lesson.by_woodbury(Lambda, P, B, dt, a, C, w))):
        check_close(torch.view_as_real(other), torch.view_as_real(K), 1e-9, step)


def test_s4_starts_as_hippo_legs():
    torch.manual_seed(0)
    mixer = lesson.S4(4, n_state=32)
    Lambda, P, B, _, _ = mixer.continuous()
    A, _ = lesson.hippo_legs(32)
    eigenvalues = torch.linalg.eigvals(torch.diag(Lambda) - P[:, None] * P.conj()).to(torch.complex128)
    assert abs(eigenvalues.sum() - torch.trace(A)) < 1e-4 * abs(torch.trace(A))
    check_close(B.abs().square().sum().double(), (2 * torch.arange(32) + 1).sum().double(), 1e-4, "|B|^2")


# ------------------------------------------------------------------------------------------------------------- Monarch


def test_the_monarch_mixer_is_exactly_causal_and_not_toeplitz():
    mixer = make("monarch_mixer")
    M = mixer.mixing_matrix(None, 70)[0]
    assert M.triu(1).abs().max() == 0
    assert (M[:, 40:60, 0:20] - M[:, 41:61, 1:21]).abs().max() > 1e-3
    u = torch.randn(1, mixer.channels, 70, dtype=double)
    later = u.clone()
    later[..., 40:] += 10
    assert (mixer.convolve("conv", u) - mixer.convolve("conv", later))[..., :40].abs().max() < 1e-11


def test_without_the_degree_bound_causality_breaks():
    """Products of degree above the transform's length wrap around to the start."""
    u = torch.zeros(1, 1, 8, 8, dtype=double)
    u[..., 6, 6] = 1
    k = torch.randn(1, 8, 8, dtype=double)
    wrapped = torch.fft.irfft2(torch.fft.rfft2(u) * torch.fft.rfft2(k), s=(8, 8))
    assert wrapped[0, 0, 0, 0].abs() > 1e-3


# -------------------------------------------------------------------------------------------------------- long signals


@pytest.mark.parametrize("name", ["s4d", "dss", "lru", "ema", "modal", "h3", "gss"])
def test_a_long_signal_passes_by_convolution_and_by_scan(name):
    torch.manual_seed(0)
    mixer = MIXERS[name](4, **({"n_state": 4} if name != "h3" else {"n_state": 4, "shift": 8}))
    x = torch.randn(1, 16384, 4)
    with torch.no_grad():
        conv, scan = mixer(x, "conv"), mixer(x, "scan")
    assert conv.isfinite().all()
    check_close(scan, conv, 2e-3, "scan and convolution in float32")


@pytest.mark.parametrize("name, options", [
    ("mamba", {"n_state": 4}), ("rglru", {}), ("qrnn", {}), ("sru", {}), ("s5", {"n_state": 16}),
    ("liquid_s4", {"n_state": 4}), ("sgconv", {"max_len": 16384}), ("hyena", {"max_len": 16384}),
    ("monarch_mixer", {"max_len": 16384, "m": 128})])
def test_a_long_signal_passes_by_the_form_meant_for_it(name, options):
    torch.manual_seed(0)
    mixer = MIXERS[name](4, **options)
    with torch.no_grad():
        assert mixer(3 * torch.randn(1, 16384, 4)).isfinite().all()


@pytest.mark.parametrize("name", ["sgconv", "hyena", "monarch_mixer", "monarch"])
def test_a_largest_length_is_kept(name):
    mixer = MIXERS[name](8, max_len=64)
    with pytest.raises(ValueError, match="64"):
        mixer(torch.randn(1, 65, 8))


# -------------------------------------------------------------------------------------------------------------- limits


def test_h3_with_unit_gates_is_the_diagonal_system_and_gates_make_the_rest():
    mixer = make("h3")
    x, _ = inputs(mixer, 40)
    signals = mixer.project(x, mixer.init_carry(2))[0]
    y = lesson.fft_conv(signals.pre * signals.v, mixer.kernel(40))
    check_close(mixer(x), mixer.finish(signals.post * y, None), 1e-11, "q * SSM(k * v)")
    ungated = lesson.S4D(32).double()
    ungated.diagonal.load_state_dict(mixer.diagonal.state_dict())
    ungated.system = lambda: ungated.diagonal(lesson.bilinear)
    ungated.D.data.copy_(mixer.skip)
    check_close(mixer.kernel(40), ungated.kernel(40), 1e-11, "the system between the gates")


def test_h3_with_wide_heads_is_linear_attention_under_a_convolution():
    torch.manual_seed(0)
    mixer = lesson.H3(32, head_dim=8).double()
    x, _ = inputs(mixer, 40)
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    k = mixer.short(k.mT, mixer.init_carry(2))[0].mT
    q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v))           # (b, h, t, d)
    K = mixer.kernel(40)[::64]                                                       # one for each head
    y = (q @ k.mT * lesson.toeplitz(K)) @ v
    for form in plain_forms(mixer):
        check_close(mixer(x, form), mixer.out(y.transpose(1, 2).flatten(-2)), 1e-10, form)


def test_s5_with_one_input_is_s4d():
    """Diagonal state, the same A, dt, C and D, B = 1: a kernel for the one channel."""
    torch.manual_seed(0)
    s5, s4d = lesson.S5(1, n_state=16, blocks=1).double(), lesson.S4D(1, n_state=16).double()
    with torch.no_grad():
        system = s4d.diagonal
        system.log_A_real[0], system.A_imag[0] = s5.log_A_real, s5.A_imag
        s5.log_dt.fill_(system.log_dt.item())
        s5.B.copy_(torch.tensor([1.0, 0.0]))
        s5.C.copy_(system.C)
        s5.skip.copy_(s4d.D)
        s5.out.load_state_dict(s4d.out.state_dict())
    x = torch.randn(2, 50, 1, dtype=double)
    for form in plain_forms(s5):
        check_close(s5(x, form), s4d(x), 1e-11, form)


def test_lru_with_real_decays_is_an_average():
    torch.manual_seed(0)
    ema, lru = lesson.EMA(8).double(), lesson.LRU(8).double()
    g, b, C = (z[0, :, 0] for z in ema.system())
    with torch.no_grad():
        lru.nu.copy_((-g).log())
        lru.theta.fill_(-100.0)                                  # angle e^-100
        lru.log_gamma.zero_()
        lru.B.copy_(torch.stack([b, 0 * b], -1))
        lru.C.copy_(torch.stack([C, 0 * C], -1))
        lru.D.copy_(ema.D)
    check_close(lru.kernel(60), ema.kernel(60), 1e-10, "LRU with real decays and EMA")


def test_mamba_with_constant_dt_b_c_is_s4d_under_euler():
    torch.manual_seed(0)
    mixer = lesson.Mamba(8, n_state=4).double()
    u, dt = torch.randn(2, 16, 50, dtype=double), torch.rand(16, 1, dtype=double) + 0.1
    A, B, C = -mixer.log_A.exp(), torch.randn(4, dtype=double), torch.randn(4, dtype=double)
    K = torch.einsum("cn,cnl->cl", dt * B * C, torch.exp((dt * A)[..., None] * torch.arange(50)))
    K = K + F.pad(mixer.D[:, None], (0, 49))
    signals = lesson.Signals(u, dt.expand(2, -1, 50), B[:, None].expand(2, -1, 50), C[:, None].expand(2, -1, 50))
    for form in plain_forms(mixer):
        y, _ = mixer.mix(form, u, signals, torch.zeros(2, 16, 4, dtype=double))
        check_close(y, lesson.fft_conv(u, K), 1e-11, form)


def test_dss_prefixes_do_not_depend_on_the_length():
    mixer = make("dss")
    x, _ = inputs(mixer, 60)
    check_close(mixer(x)[:, :20], mixer(x[:, :20]), 1e-11, "a prefix")
    g, _, C = (z[0, :, 0] for z in mixer.system())
    A = g / mixer.diagonal.log_dt.exp()[:, None]
    softmax = torch.exp(g[..., None] * torch.arange(mixer.max_len))
    softmax = softmax / softmax.sum(-1, keepdim=True)
    K = torch.einsum("cn,cnl->cl", C / A, softmax).real
    check_close(mixer.filter(60), K[:, :60], 1e-10, "w / Lambda softmax(Lambda dt l)")


def test_a_filter_of_one_tap_keeps_no_past():
    filter_ = lesson.ShortConv(4, 1)
    _, past = filter_(torch.randn(2, 4, 5), filter_.init_carry(2))
    assert past.shape == (2, 4, 0)


def test_state_space_parameters_are_marked_for_a_small_learning_rate():
    mixer = make("s4d")
    assert mixer.diagonal.A_imag.optim == mixer.diagonal.log_dt.optim == {"lr": 1e-3, "weight_decay": 0.0}
    assert not hasattr(mixer.diagonal.C, "optim")


# ------------------------------------------------------------------------------------------------ the papers' own loops


def test_rglru_is_its_papers_loop():
    mixer = make("rglru")
    x, _ = inputs(mixer, 20)
    u = mixer.short(mixer.x(x).mT, mixer.init_carry(2))[0].mT
    r, i = (torch.sigmoid(u @ torch.block_diag(*W) + bias) for W, bias in zip(mixer.W, mixer.bias, strict=True))
    a = torch.sigmoid(-mixer.Lambda) ** (8 * r)              # sigmoid(Lambda') ^ (c r) with Lambda' = -Lambda
    h, y = torch.zeros(2, 32, dtype=double), []
    for t in range(20):
        h = a[:, t] * h + torch.sqrt(1 - a[:, t] ** 2) * (i[:, t] * u[:, t])
        y.append(h)
    check_close(mixer.out(torch.stack(y, 1) * F.gelu(mixer.gate(x))), mixer(x), 1e-10, "RG-LRU")


def test_qrnn_and_sru_are_their_papers_loops():
    mixer = make("qrnn")
    x, _ = inputs(mixer, 20)
    before = F.pad(x, (0, 0, 1, -1))
    z, f, o = (mixer.now(x) + mixer.before(before)).chunk(3, dim=-1)
    z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
    c, y = torch.zeros(2, 32, dtype=double), []
    for t in range(20):
        c = f[:, t] * c + (1 - f[:, t]) * z[:, t]
        y.append(o[:, t] * c)
    check_close(mixer.out(torch.stack(y, 1)), mixer(x), 1e-11, "QRNN")
    mixer = make("sru")
    f, r = mixer.f_r(x).sigmoid().chunk(2, dim=-1)
    c, y = torch.zeros(2, 32, dtype=double), []
    for t in range(20):
        c = f[:, t] * c + (1 - f[:, t]) * mixer.z(x[:, t])
        y.append(r[:, t] * c + (1 - r[:, t]) * 3 ** 0.5 * x[:, t])
    check_close(mixer.out(torch.stack(y, 1)), mixer(x), 1e-11, "SRU")


def test_mamba_is_algorithm_2():
    mixer = make("mamba")
    x, _ = inputs(mixer, 20)
    u = F.silu(mixer.short(mixer.x(x).mT, mixer.init_carry(2))[0].mT)
    low, B, C = mixer.dt_B_C(u).split([mixer.rank, 16, 16], dim=-1)
    dt, A = F.softplus(mixer.dt(low)), -mixer.log_A.exp()
    h, y = torch.zeros(2, 64, 16, dtype=double), []
    for t in range(20):
        h = torch.exp(dt[:, t, :, None] * A) * h + dt[:, t, :, None] * B[:, t, None] * u[:, t, :, None]
        y.append((h * C[:, t, None]).sum(-1) + mixer.D * u[:, t])
    check_close(mixer.out(torch.stack(y, 1) * F.silu(mixer.gate(x))), mixer(x), 1e-11, "Mamba")


def test_rglru_takes_the_first_input_whole_if_told_to():
    """With whole_first, h_1 = i * x: once, at the start of a text, in every form, in steps and over a seam."""
    torch.manual_seed(0)
    mixer = lesson.RGLRU(32, bias=True, gelu="tanh", whole_first=True).double()
    plain = lesson.RGLRU(32, bias=True, gelu="tanh").double()
    plain.load_state_dict(mixer.state_dict())
    check_forms(mixer, 20)
    check_split(mixer, 20, 1, 9)
    x, _ = inputs(mixer, 20)
    s, p = (m.project(x, m.init_carry(2))[0] for m in (mixer, plain))
    check_close(s.k[:, :, 1:], p.k[:, :, 1:], 0.0, "later inputs")
    root = (-torch.expm1(2 * s.g[:, :, :1])).sqrt()
    check_close(s.k[:, :, :1] * root, p.k[:, :, :1], 1e-12, "the first input")
    assert mixer.state_size(5) == plain.state_size(5) + 32

"""Where a paper or its authors' code says how parameters start, ours start so: constants, ranges, and the norm of a
kernel. A layer with the right formula and a wrong start learns another thing."""
import math

import pytest
import torch
from harness import MIXERS
from referees import peer, require

C = 128                  # wide, so that ranges and standard deviations show


def fresh(name, c=C, **options):
    torch.manual_seed(0)
    return MIXERS[name](c, **options).double()


def parts(mixer):
    """Its parameters and buffers by name, those of its diagonal system by their last name, as D is whatever skips."""
    named = [*mixer.named_parameters(), *mixer.named_buffers()]
    short = {name: name.removeprefix("diagonal.") for name, _ in named}
    return {"D" if short[name] == "skip" else short[name]: p.detach() for name, p in named}


def check_uniform(x, low, high):
    """Within the range, up to both of its ends, and with the mean of the uniform distribution."""
    spread, n = high - low, x.numel()
    assert n >= 32, f"{n} are too few to tell"
    assert low - 1e-6 * abs(low) <= x.min() and x.max() <= high + 1e-6 * abs(high), (x.min(), x.max())
    assert x.min() < low + 8 / n * spread and x.max() > high - 8 / n * spread, (x.min(), x.max())
    assert abs(x.mean() - (low + high) / 2) < 4 * spread / math.sqrt(12 * n), x.mean()


def check_normal(x, std, mean=0.0):
    n = x.numel()
    assert abs(x.mean() - mean) < 4 * std / math.sqrt(n), x.mean()
    assert abs(x.std() / std - 1) < 4 / math.sqrt(2 * n), x.std()
    assert n < 1000 or 0.66 < ((x - mean).abs() < std).double().mean() < 0.71        # and not uniform of that spread


def check_equal(x, wanted, tolerance=1e-6):
    wanted = torch.as_tensor(wanted, dtype=torch.float64).expand_as(x)
    assert (x - wanted).abs().max() <= tolerance * max(1, wanted.abs().max())


# -------------------------------------------------------------------------------------------------- linear attention


def test_linformer_starts_as_a_random_projection():
    """[Wang et al. 2020]: entries of N(0, 1/k)."""
    p = parts(fresh("linformer", k=16))
    check_normal(p["E"], 1 / 4)
    check_normal(p["F"], 1 / 4)
    assert (p["E"] - p["F"]).abs().max() > 0.1


def test_hedgehog_starts_as_the_identity():
    p = parts(fresh("hedgehog"))
    for name in ("phi_q.W", "phi_k.W"):
        check_equal(p[name], torch.eye(C // 4).expand(4, -1, -1), 0)


def test_performers_features_are_gaussian_and_orthogonal():
    w = parts(fresh("performer", m=1024))["phi_q.w"]                                 # (m, d), d = 32
    d = w.shape[1]
    direction = w / w.norm(dim=1, keepdim=True)
    for block in direction.split(d):
        check_equal(block @ block.mT, torch.eye(d), 1e-5)
    lengths = w.norm(dim=1)
    assert abs(lengths.square().mean() - d) < 4 * math.sqrt(2 * d / len(w))          # chi^2 with d degrees of freedom
    assert direction.mean(0).abs().max() < 0.05 and w.diagonal(dim1=0, dim2=1).numel() == d


@pytest.mark.parametrize("name", ["rfa", "gated_rfa"])
def test_rfas_features_are_gaussian(name):
    check_normal(parts(fresh(name))["phi_q.w"], 1.0)


def test_rebased_starts_as_a_layer_norm():
    p = parts(fresh("rebased"))
    for which in "qk":
        check_equal(p[f"phi_{which}.norm.weight"], 1, 0)
        check_equal(p[f"phi_{which}.norm.bias"], 0, 0)


def test_retnet_starts_small():
    """[torchscale]: Xavier with gain 2^(-5/2) for q, k, v and the gate, 1/2 for the output."""
    p = parts(fresh("retnet"))
    for name, gain in [("q", 2 ** -2.5), ("k", 2 ** -2.5), ("v", 2 ** -2.5), ("gate", 2 ** -2.5), ("out", 0.5)]:
        bound = gain * math.sqrt(6 / sum(p[f"{name}.weight"].shape))
        check_uniform(p[f"{name}.weight"], -bound, bound)


def test_gateloop_starts_remembering():
    p = parts(fresh("gateloop"))
    check_uniform(p["decay.bias"][:C], 1, 5)


def test_rwkv4_starts_as_its_authors():
    """[RWKV-LM, v4]: decays from -5 to 3 over the channels, bonus log 0.3 in a zigzag, mixes as powers of i / c."""
    depth = 0.5
    p, i = parts(fresh("rwkv4", depth=depth)), torch.arange(C, dtype=torch.float64)
    check_equal(p["decay"], -5 + 8 * (i / (C - 1)) ** (0.7 + 1.3 * depth))
    check_equal(p["u"], math.log(0.3) + 0.5 * ((i + 1) % 3 - 1))
    power = 1 - depth
    check_equal(p["mixes"], torch.stack([(i / C) ** power, (i / C) ** power + 0.3 * depth, (i / C) ** (power / 2)]))
    for name in ("k", "r", "out"):
        check_equal(p[f"{name}.weight"], 0, 0)


def test_rwkv4_starts_as_transformers_does():
    """But for the bonus u, which there starts at 1 everywhere: a ones_like() around the whole formula."""
    require("transformers")
    module = peer("transformers.models.rwkv.modeling_rwkv")
    config = module.RwkvConfig(hidden_size=C, num_hidden_layers=3, vocab_size=9)
    layer = module.RwkvModel(config).blocks[1].attention                             # of three: 1/2 and 1 - 1/3
    module.RwkvPreTrainedModel._init_weights(module.RwkvModel(config), layer)
    p = parts(fresh("rwkv4", depth=0.5))
    check_equal(p["decay"], layer.time_decay.detach().double())
    near = layer.time_mix_key.detach().double()[0, 0] ** (3 / 4)                     # their power is 2/3, ours 1/2
    check_equal(p["mixes"], torch.stack([near, near + 0.15, near ** 0.5]), 1e-5)


def test_rwkv6_starts_as_its_authors():
    """[RWKV-LM, v6]"""
    depth = 0.5
    p, i = parts(fresh("rwkv6", depth=depth)), torch.arange(C, dtype=torch.float64)
    near, half = 1 - (i / C) ** (1 - depth), 1 - (i / C) ** ((1 - depth) / 2)
    check_equal(p["mix_all"], near)
    check_equal(p["mixes"], torch.stack([near, near, near - 0.3 * depth, half, half]))
    check_equal(p["w"], -6 + 5 * (i / (C - 1)) ** (0.7 + 1.3 * depth))
    check_equal(p["bonus"].flatten(), depth * (1 - i / (C - 1)) + 0.1 * ((i + 1) % 3 - 1))
    for name in ("mix_down", "w_down", "out.weight"):
        check_equal(p[name], 0, 0)
    for name in ("mix_up", "w_up"):
        check_uniform(p[name], -0.01, 0.01)
    for name, gain in (("r", 1.0), ("k", 0.1), ("v", 1.0), ("gate", 0.1)):
        check_equal(p[f"{name}.weight"] @ p[f"{name}.weight"].mT, gain ** 2 * torch.eye(C), 1e-5)


def test_rwkv7_starts_as_its_authors():
    """[RWKV-LM, v7, at 524481d, train_temp]: mixes as powers of i / c; decays and rates by place in the width, with a
    zigzag in each head; the low ranks begin at 0. (Their gate's rank is larger than that of the decays and rates.)"""
    depth = 0.25
    p, i = parts(fresh("rwkv7", depth=depth)), torch.arange(C, dtype=torch.float64)
    powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2], dtype=torch.float64)               # of r, w, k, v, a, g
    check_equal(p["mixes"], 1 - (i / C) ** (powers[:, None] * (1 - depth)))
    place, within = i / (C - 1), (i % 32 - 31 / 2) / (31 / 2)
    zigzag = within * within.abs()
    check_equal(p["up.0.bias"], -6 + 6 * place ** (1 + depth ** 0.3) + 0.5 + 2.5 * zigzag)
    check_equal(p["up.1.bias"], -0.19 + 0.3 * zigzag + 0.4 * (place - 0.5))
    check_equal(p["remove"], 0.71 - 0.1 * (place - 0.5))
    check_equal(p["keep"], 1.02)
    check_equal(p["bonus"], -0.04)
    for name in ("down.0.weight", "down.1.weight", "down.2.weight", "out.weight"):
        check_equal(p[name], 0, 0)
    for name, gain in (("q", 1.0), ("k", 0.1), ("v", 1.0)):
        check_equal(p[f"{name}.weight"] @ p[f"{name}.weight"].mT, gain ** 2 * torch.eye(C), 1e-5)
    for j in range(3):
        check_equal(p[f"up.{j}.weight"].mT @ p[f"up.{j}.weight"], 0.01 * torch.eye(32), 1e-5)


def test_mlstm_starts_as_its_authors():
    """[NX-AI/xlstm at 032a6fb, mLSTMCell, for the weights and f; transformers' xLSTM for i]: gates that do not see the
    token yet; an input gate of e^-10, forget gates from 3 to 6 over the heads."""
    p = parts(fresh("mlstm"))
    check_equal(p["i.bias"], -10)
    check_equal(p["f.bias"], torch.tensor([3.0, 4.0, 5.0, 6.0]))
    for name in ("i.weight", "f.weight"):
        check_equal(p[name], 0, 0)


def check_time_steps(bias, low=1e-3, high=1e-1):
    """softplus(bias) is log-uniform."""
    check_uniform(torch.log(torch.log1p(torch.exp(bias))), math.log(low), math.log(high))


def test_mamba_starts_as_its_authors():
    """[mamba-ssm]: A = -(1, ..., n), D = 1, dt = softplus(bias) log-uniform in 0.001 to 0.1, its weights within
    rank^(-1/2)."""
    p = parts(fresh("mamba"))
    check_equal(p["log_A"].exp(), torch.arange(1, 17))
    check_equal(p["D"], 1, 0)
    check_time_steps(p["dt.bias"])
    check_uniform(p["dt.weight"], -8 ** -0.5, 8 ** -0.5)


def test_mamba2_starts_as_its_authors():
    """[mamba-ssm]: A = -U(1, 16) for each head, D = 1, dt log-uniform in 0.001 to 0.1."""
    p = parts(fresh("mamba2", 512, n_heads=256))
    check_uniform(p["A_log"].exp(), 1, 16)
    check_equal(p["D"], 1, 0)
    check_time_steps(p["dt_bias"])


def test_mamba3_starts_as_its_authors():
    """[mamba-ssm at e9594ce]: dt as Mamba-2's; D, the norms' weights and the biases of B and C 1."""
    p = parts(fresh("mamba3", 512, n_heads=256))
    check_time_steps(p["dt_bias"])
    for name in ("D", "norms", "biases"):
        check_equal(p[name], 1, 0)


def test_gated_deltanet_starts_as_its_authors():
    """[fla; transformers' OLMo-hybrid]: A = -U(0, 16), dt as Mamba-2's."""
    p = parts(fresh("gated_deltanet", 512, n_heads=256))
    check_uniform(p["A_log"].exp(), 0, 16)
    check_time_steps(p["dt_bias"])


def test_kda_starts_as_its_authors():
    """[fla, where the authors put it; transformers' Kimi-Linear]: A = -U(1, 16) a head, a dt a channel."""
    p = parts(fresh("kda", 512, n_heads=256))
    check_uniform(p["A_log"].exp(), 1, 16)
    check_time_steps(p["dt_bias"])
    assert len(p["dt_bias"]) == 512


# ------------------------------------------------------------------------------------------------------- state spaces


def eigenvalues_of(p):
    return torch.complex(-p["log_A_real"].exp(), p["A_imag"])


def check_same_everywhere(A, wanted):
    """Every channel's eigenvalues are these."""
    assert (A - wanted.expand_as(A)).abs().max() < 1e-5 * wanted.abs().max()


def hippo_matrix(n):
    """HiPPO-LegS: A_nk = -sqrt(2n + 1) sqrt(2k + 1) for n > k, -(n + 1) on the diagonal, 0 above."""
    return torch.tensor([[-math.sqrt((2 * i + 1) * (2 * k + 1)) if i > k else -(i + 1.0) * (i == k) for k in range(n)]
                         for i in range(n)], dtype=torch.float64)


def normal_part(n):
    """Eigenvalues of positive imaginary part of A + P P^T, P = sqrt(k + 1/2), smallest first; |V^* B| of HiPPO's B."""
    P, B = ((torch.arange(n) * f + g).double().sqrt() for f, g in ((1, 0.5), (2, 1)))
    skew = hippo_matrix(n) + P[:, None] * P + 0.5 * torch.eye(n)
    imag, V = torch.linalg.eigh(-1j * skew)
    up = imag > 1e-9
    return torch.complex(torch.full_like(imag[up], -0.5), imag[up]), (V.mH @ B.to(V.dtype))[up].abs()


def test_s4ds_eigenvalues():
    """[Gu et al. 2022 (S4D)]: -1/2 + i pi k; -1/2 + i N/pi (N / (2k + 1) - 1); those of HiPPO's normal part."""
    k, half = torch.arange(32, dtype=torch.float64), torch.full((32,), -0.5, dtype=torch.float64)
    check_same_everywhere(eigenvalues_of(parts(fresh("s4d"))), torch.complex(half, math.pi * k))
    check_same_everywhere(eigenvalues_of(parts(fresh("s4d_inv"))),
                          torch.complex(half, 64 / math.pi * (64 / (2 * k + 1) - 1)))
    check_same_everywhere(eigenvalues_of(parts(fresh("s4d_legs"))), normal_part(64)[0])


@pytest.mark.parametrize("name", ["s4d", "s4d_inv", "s4d_legs", "dss", "s4", "lssl", "s5", "h3", "liquid_s4"])
def test_time_steps_start_log_uniform(name):
    """[the authors' code of each]: from 0.001 to 0.1."""
    check_uniform(parts(fresh(name))["log_dt"], math.log(1e-3), math.log(1e-1))


@pytest.mark.parametrize("name", ["s4d", "s4d_inv", "s4d_legs", "dss", "s4", "lssl", "s5", "gss", "h3", "lru", "sgconv",
                                  "hyena", "ema", "liquid_s4"])
def test_the_skip_starts_normal(name):
    """[state-spaces, safari and the authors' code of the others]: D ~ N(0, 1)."""
    check_normal(parts(fresh(name))["D"], 1.0)


@pytest.mark.parametrize("name", ["s4d", "s4d_inv", "s4d_legs", "dss", "gss", "h3", "liquid_s4", "bigs"])
def test_s4d_reads_its_state_with_complex_normal_numbers(name):
    """[state-spaces; safari, GSS and BiGS alike]: C of variance 1, half of it in each part."""
    p = parts(fresh(name))
    for C in [value for key, value in p.items() if key.split(".")[-1] == "C"]:
        check_normal(C, 0.5 ** 0.5)


def check_norms(mixer, expected, length=256):
    """|K|^2 of the kernel without its skip, over its expected value: on average 1."""
    K = mixer.kernel(length).detach()
    K[:, 0] -= mixer.D.detach()
    ratio = K.square().sum(-1) / expected
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio)) and ratio.std() < 2, ratio.mean()


@pytest.mark.parametrize("name", ["s4d", "s4d_inv", "s4d_legs"])
def test_s4ds_kernel_has_the_norm_of_its_formula(name):
    """K_l = 2 Re sum_n C_n B_n (exp(dt A_n) - 1) / A_n exp(l dt A_n): a C_n of variance 1 adds 2 |the rest|^2."""
    mixer = fresh(name, 512)
    p = parts(mixer)
    A, dt = eigenvalues_of(p), p["log_dt"].exp()[:, None]
    B = torch.complex(p["B"][..., 0], p["B"][..., 1]) if "B" in p else torch.ones_like(A)
    rest, r = B * (torch.exp(dt * A) - 1) / A, torch.exp(2 * dt * A.real)
    check_norms(mixer, (2 * rest.abs() ** 2 * (1 - r ** 256) / (1 - r)).sum(-1))


def test_dsss_kernel_has_the_norm_of_its_formula():
    """K_l = 2 Re sum_n w_n / Lambda_n softmax_l(Lambda_n dt l)"""
    mixer = fresh("dss", 512, max_len=256)
    p = parts(mixer)
    A = eigenvalues_of(p)
    E = torch.exp(A[..., None] * (p["log_dt"].exp()[:, None, None] * torch.arange(256)))
    check_norms(mixer, (2 * (E / E.sum(-1, keepdim=True) / A[..., None]).abs() ** 2).sum((1, 2)))


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("name", ["s4", "lssl"])
def test_s4s_and_lssls_kernels_have_the_norm_of_theirs(name, n):
    """K_l = C Abar^l Bbar with C ~ N(0, 1) in HiPPO's basis: E K_l^2 = |Abar^l Bbar|^2, Abar, Bbar bilinear."""
    mixer = fresh(name, 128, n_state=n)
    A, one = hippo_matrix(n), torch.eye(n, dtype=torch.float64)
    B = (2 * torch.arange(n) + 1.0).double().sqrt()
    dt = parts(mixer)["log_dt"].exp()[:, None, None]
    inverse = torch.linalg.inv(one - dt / 2 * A)
    Abar, h, expected = inverse @ (one + dt / 2 * A), (inverse @ (dt * B[:, None]))[..., 0], 0
    for _ in range(256):
        expected, h = expected + h.square().sum(-1), (Abar @ h[..., None])[..., 0]
    check_norms(mixer, expected)


def test_lssls_matrix_is_hippos():
    p = parts(fresh("lssl"))
    n = p["A"].shape[-1]
    check_same_everywhere(p["A"], hippo_matrix(n))
    check_same_everywhere(p["B"], (2 * torch.arange(n) + 1.0).double().sqrt())


def test_s4s_system_is_hippos_in_another_basis():
    """A = V (Lambda - P P^*) V^*. No unitary V changes P^* Lambda^k P, P^* Lambda^k B, B^* Lambda^k B: HiPPO's."""
    p = parts(fresh("s4"))
    Lambda = torch.complex(-p["log_real"].exp(), p["imag"])
    n = Lambda.shape[-1]
    vectors = [torch.complex(p[name][..., 0], p[name][..., 1]) for name in "PB"]
    P, B = (torch.tensor([math.sqrt(f(k)) for k in range(n)], dtype=torch.float64)
            for f in (lambda k: k + 0.5, lambda k: 2 * k + 1))
    S = hippo_matrix(n) + P[:, None] * P
    for x, wanted_x in zip(vectors, (P, B), strict=True):
        for y, wanted_y in zip(vectors, (P, B), strict=True):
            for k in range(4):
                ours = (x.conj() * Lambda ** k * y).sum(-1)
                theirs = wanted_x @ torch.linalg.matrix_power(S, k) @ wanted_y
                scale = wanted_x.norm() * torch.linalg.matrix_norm(S, 2) ** k * wanted_y.norm()
                assert (ours - theirs).abs().max() < 1e-5 * scale, k


def test_s4d_legss_B_is_hippos():
    """[state-spaces, nplr]: V^* B of HiPPO's B, clipped at 2 (it goes up to 40); of V only the phases are free."""
    p, (_, hippos) = parts(fresh("s4d_legs")), normal_part(64)
    B = torch.complex(p["B"][..., 0], p["B"][..., 1])
    check_equal(B.abs(), hippos.clamp(max=2), 0.05)


def test_gss_starts_as_its_authors():
    """[Mehta et al. 2023]: log(-Re A), log Im A ~ N(0, 1), the same for all channels; steps of 1."""
    p = parts(fresh("gss", n_state=1024))
    assert p["A_imag"].shape[0] == 1 and p["A_imag"].min() > 0 and "log_dt" not in p
    check_normal(p["log_A_real"], 1.0)
    check_normal(p["A_imag"].log(), 1.0)


def test_bigss_systems_start_as_its_authors():
    """[BiGS's code]: A as S4D-Lin's, D = 1, dt log-uniform in 0.01 to 1."""
    p = parts(fresh("bigs"))
    for way in ("ahead", "back"):
        check_uniform(p[f"{way}.log_dt"], math.log(1e-2), 0)
        check_equal(p[f"D_{way}"], 1, 0)
        check_same_everywhere(p[f"{way}.A_imag"], math.pi * torch.arange(p[f"{way}.A_imag"].shape[1]).double())
        check_equal(p[f"{way}.log_A_real"].exp(), 0.5)


def test_lru_starts_uniform_on_the_disc():
    """[Orvieto et al. 2023, lemma 3.2 and section 3.4; lru-pytorch]: |lambda|^2 uniform, phases up to 2 pi, gamma =
    sqrt(1 - |lambda|^2), B and C of complex normal numbers."""
    p = parts(fresh("lru"))
    radius2 = torch.exp(-2 * p["nu"].exp())
    check_uniform(radius2, 0, 1)
    check_uniform(p["theta"].exp(), 0, 2 * math.pi)
    check_equal(p["log_gamma"].exp(), torch.sqrt(1 - radius2), 1e-5)
    check_normal(p["B"], 0.5 ** 0.5)
    check_normal(p["C"], p["C"].shape[1] ** -0.5)


def test_ema_starts_as_megas():
    """[mega, EMA's reset_parameters]: alpha, delta ~ N(0, 0.2^2), beta 1, -1, 1, ... + N(0, 0.02^2), eta ~ N(0, 1)."""
    p = parts(fresh("ema"))
    check_normal(p["alpha"], 0.2)
    check_normal(p["delta"], 0.2)
    check_normal(p["beta"] - (-1.0) ** torch.arange(p["beta"].shape[1]), 0.02)
    check_normal(p["gamma"], 1.0)


def test_sgconvs_kernels_start_with_norm_1():
    mixer = fresh("sgconv", max_len=256, d=16)
    p = parts(mixer)
    check_normal(p["taps"], 1.0)
    K = mixer.kernel(256).detach()
    K[:, 0] -= p["D"]
    check_equal(K.norm(dim=-1), 1, 1e-5)
    sizes = K[:, 32:64].square().mean().sqrt() / K[:, 128:].square().mean().sqrt()   # the scale after next: a quarter
    assert 3.3 < sizes < 4.7, sizes


def test_hyenas_filter_starts_as_its_authors():
    p = parts(fresh("hyena"))
    check_equal(p["frequency"], 14, 0)


def test_modal_filters_start_inside_the_disc():
    p = parts(fresh("modal"))
    check_uniform(torch.exp(-p["log_decay"].exp()), 0.8, 0.999)
    check_uniform(p["angle"], 0, math.pi)
    check_normal(p["R"], 1 / p["R"].shape[1])


def test_monarch_mixers_filter_fades():
    """0.1 N(0, 1), a factor e smaller after every block of m."""
    p = parts(fresh("monarch_mixer", max_len=128, m=32))
    check_normal(p["k"] / (0.1 * torch.exp(-torch.arange(128) / 32)), 1.0)
    for name in ("R1", "R2"):
        check_normal(p[name], 0.1 / math.sqrt(32))


def test_rglru_starts_as_its_authors():
    """[De et al. 2024, section 2.4; recurrentgemma]: a^2 uniform between 0.9^2 and 0.999^2, gates of variance 1 / d
    without bias, filter of std 0.05 = sqrt(0.01 / 4)."""
    p = parts(fresh("rglru"))
    check_uniform(torch.exp(-2 * 8 * torch.log1p(torch.exp(p["Lambda"]))), 0.9 ** 2, 0.999 ** 2)
    check_normal(p["W"], (C // 4) ** -0.5)
    check_equal(p["bias"], 0, 0)
    check_normal(p["short.conv.weight"], 0.05)


def test_qrnn_starts_remembering():
    bias = parts(fresh("qrnn"))["now.bias"]
    check_equal(bias[C:2 * C], 1, 0)


def test_sru_starts_as_its_authors():
    """[Lei et al. 2018, section 3.2]: biases 0."""
    check_equal(parts(fresh("sru"))["f_r.bias"], 0, 0)


@pytest.mark.parametrize("name, taps", [("baseconv", 1024), ("baseconv_short", 3)])
def test_baseconvs_filters_start_within_a_bound(name, taps):
    p = parts(fresh(name))
    check_uniform(p["h"], -taps ** -0.5, taps ** -0.5)
    check_equal(p["b2"], 0, 0)


def test_scatterbrains_features_are_gaussian():
    W = parts(fresh("scatterbrain", m=1024))["W"]
    lengths = W.norm(dim=1)
    assert abs(lengths.square().mean() - W.shape[1]) < 4 * math.sqrt(2 * W.shape[1] / len(W))
    check_equal((W @ W.mT)[:32, :32] / lengths[:32] ** 2, torch.eye(32), 1e-5)

"""The formulas of the papers on state spaces, long convolutions and selection, in their letters. A convolution is
written as the sum that it is, a system as the loop over its state."""
import math

import torch
from papers_attention import back
from papers_linear import before, outer, short_filter, swish
from referees import referee


def gelu(x):
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def softplus(x):
    return torch.log(1 + torch.exp(x))


def lin(x, p, name):
    y = x @ p[f"{name}.weight"].mT
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def glu_behind_gelu(p, y):
    """The output of S4's layers: a b-gated a of W gelu(y) + bias."""
    a, b = lin(gelu(y), p, "out.linear").chunk(2, dim=-1)
    return a * sigmoid(b)


def complex_of(p, name):
    return torch.complex(p[name][..., 0], p[name][..., 1])


def convolution(u, K):
    """y_t = sum_{l <= t} K_l u_{t-l}. u: (b, t, c), K: (c, t)"""
    lag = back(u.shape[1])
    return torch.einsum("cts,bsc->btc", torch.where(lag >= 0, K[:, lag.clamp(min=0)], 0), u)


def causal_filter(u, w, bias=0):
    """sum_k w_k u_{t-K+1+k} + bias for each channel. u: (b, t, c), w: (c, 1, K)"""
    K, t = w.shape[-1], u.shape[1]
    padded = torch.cat([torch.zeros(len(u), K - 1, u.shape[2], dtype=u.dtype), u], dim=1)
    return bias + sum(w[:, 0, k] * padded[:, k:k + t] for k in range(K))


def diagonal(Abar, Bbar, C, D, u):
    """x_k = Abar x_{k-1} + Bbar u_k, y_k = Re(C x_k) + D u_k. Abar, Bbar, C: (c, n), D: (c,), u: (b, t, c)"""
    x, y = 0, []
    for k in range(u.shape[1]):
        x = Abar * x + Bbar * u[:, k, :, None]
        y.append((C * x).sum(-1).real + D * u[:, k])
    return torch.stack(y, dim=1)


def dense(Abar, Bbar, C, D, u):
    """The same with a matrix for each channel. Abar: (c, n, n), Bbar, C: (c, n)"""
    x, y = torch.zeros(len(u), *Bbar.shape, dtype=Bbar.dtype), []
    for k in range(u.shape[1]):
        x = torch.einsum("cij,bcj->bci", Abar, x) + Bbar * u[:, k, :, None]
        y.append((C * x).sum(-1).real + D * u[:, k])
    return torch.stack(y, dim=1)


def bilinear_dense(A, B, step):
    """S4, eq. 3: Abar = (I - step/2 A)^{-1} (I + step/2 A), Bbar = (I - step/2 A)^{-1} step B. step: (c,)"""
    step, I = step[:, None, None], torch.eye(A.shape[-1], dtype=A.dtype)
    inverse = torch.linalg.inv(I - step / 2 * A)
    return inverse @ (I + step / 2 * A), (inverse @ (step * B[..., None]))[..., 0]


# ----------------------------------------------------------------------------------------------- time-invariant systems


@referee("lssl", by="Gu et al. 2021 (LSSL), bilinear")
def lssl(p, u):
    Abar, Bbar = bilinear_dense(p["A"], p["B"], p["log_dt"].exp())
    return glu_behind_gelu(p, dense(Abar, Bbar, p["C"], p["D"], u))


@referee("s4", by="Gu et al. 2022 (S4), eq. 3 and 6")
def s4(p, u):
    """A = Lambda - P P^*, discretised and run as it stands: no generating function, no Woodbury."""
    P, B, C = (complex_of(p, name) for name in "PBC")
    A = torch.diag_embed(torch.complex(-p["log_real"].exp(), p["imag"])) - outer(P, P.conj())
    Abar, Bbar = bilinear_dense(A, B, p["log_dt"].exp())
    return glu_behind_gelu(p, dense(Abar, Bbar, C, p["D"], u))


def continuous(p, prefix="diagonal."):
    """A, B, step, C of a diagonal system, (c or 1, n / 2) each; the other states are the conjugates of these."""
    A = torch.complex(-p[f"{prefix}log_A_real"].exp(), p[f"{prefix}A_imag"])
    B = complex_of(p, f"{prefix}B") if f"{prefix}B" in p else torch.ones_like(A)
    step = p[f"{prefix}log_dt"].exp()[:, None] if f"{prefix}log_dt" in p else torch.ones_like(A.real[:, :1])
    return A, B, step, complex_of(p, f"{prefix}C")


def held(p, prefix="diagonal."):
    """Zero-order hold: Abar = exp(step A), Bbar = (step A)^{-1} (exp(step A) - I) step B; and C, twice its half."""
    A, B, step, C = continuous(p, prefix)
    return torch.exp(step * A), (torch.exp(step * A) - 1) / A * B, 2 * C


def trapezoidal(p, prefix="diagonal."):
    """The bilinear rule: Abar = (1 + step/2 A) / (1 - step/2 A), Bbar = step B / (1 - step/2 A); and C as above."""
    A, B, step, C = continuous(p, prefix)
    return (1 + step / 2 * A) / (1 - step / 2 * A), step * B / (1 - step / 2 * A), 2 * C


@referee("s4d", "s4d_inv", "s4d_legs", by="Gu et al. 2022 (S4D), zero-order hold")
def s4d(p, u):
    return glu_behind_gelu(p, diagonal(*held(p), p["D"], u))


@referee("dss", by="Gupta et al. 2022 (DSS), proposition 1, softmax", options={"max_len": 40})
def dss(p, u, L=40):
    """K = w Lambda^{-1} row-softmax(P), P_jk = Lambda_j k step, over L positions."""
    Lambda, _, step, w = continuous(p)
    P = Lambda[..., None] * (step[..., None] * torch.arange(L))
    P = torch.exp(P) / torch.exp(P).sum(-1, keepdim=True)
    K = 2 * ((w / Lambda)[..., None] * P).sum(1).real
    return glu_behind_gelu(p, convolution(u, K) + p["D"] * u)


@referee("s5", by="Smith et al. 2023 (S5): one system, in and out of all channels")
def s5(p, u):
    Lambda = torch.complex(-p["log_A_real"].exp(), p["A_imag"])
    B, C, step = complex_of(p, "B"), complex_of(p, "C"), p["log_dt"].exp()
    x, y = 0, []
    for k in range(u.shape[1]):
        Bbar_u = (torch.exp(step * Lambda) - 1) / Lambda * (u[:, k].to(B.dtype) @ B.mT)
        x = torch.exp(step * Lambda) * x + Bbar_u
        y.append(2 * (x @ C.mT).real + p["skip"] * u[:, k])
    return glu_behind_gelu(p, torch.stack(y, dim=1))


@referee("lru", by="Orvieto et al. 2023 (LRU), section 3.4, for each channel")
def lru(p, u):
    """x_k = lambda x_{k-1} + exp(gamma^log) B u_k, lambda = exp(-exp(nu^log) + i exp(theta^log))."""
    Lambda = torch.exp(torch.complex(-p["nu"].exp(), p["theta"].exp()))
    B, C = p["log_gamma"].exp() * complex_of(p, "B"), complex_of(p, "C")
    return glu_behind_gelu(p, diagonal(Lambda, B, C, p["D"], u))


@referee("ema", by="Ma et al. 2023 (MEGA), eq. 3 to 5")
def ema(p, x):
    """u = beta x, h_t = alpha u_t + (1 - alpha delta) h_{t-1}, y = eta^T h / sqrt(n) + omega x; silu: the code's."""
    alpha, delta, eta = sigmoid(p["alpha"]), sigmoid(p["delta"]), p["gamma"]
    h, y = 0, []
    for t in range(x.shape[1]):
        h = alpha * (p["beta"] * x[:, t, :, None]) + (1 - alpha * delta) * h
        y.append((eta * h).sum(-1) / math.sqrt(h.shape[-1]) + p["D"] * x[:, t])
    return lin(swish(torch.stack(y, dim=1)), p, "out")


def stretched(k, s):
    """Linear interpolation of d taps to s d places, the ends held: (c, d) -> (c, s d)"""
    d = k.shape[-1]
    at = ((torch.arange(s * d, dtype=torch.float64) + 0.5) / s - 0.5).clamp(0, d - 1)
    left = at.floor().long()
    right = (left + 1).clamp(max=d - 1)
    return k[:, left] * (1 - at + left) + k[:, right] * (at - left)


@referee("sgconv", by="Li et al. 2023 (SGConv): Cat(alpha^i Upsample(w_i)) / Z", options={"d": 8, "max_len": 50})
def sgconv(p, u):
    """alpha = 1/2; the first two scales have d taps, each one after twice as many as the one before; Z: the norm at
    the start."""
    K = torch.cat([0.5 ** i * stretched(w, 2 ** max(0, i - 1)) for i, w in enumerate(p["taps"])], dim=-1)
    return glu_behind_gelu(p, convolution(u, K / p["norm"][:, :1]) + p["D"] * u)


def liquid(p, u, limit):
    """x_k = (Abar + Bbar u_k) x_{k-1} + Bbar u_k, with limit(Abar + Bbar u_k) in its place."""
    Abar, Bbar, C = held(p)
    x, y = 0, []
    for k in range(u.shape[1]):
        now = u[:, k, :, None]
        x = limit(Abar + Bbar * now) * x + Bbar * now
        y.append((C * x).sum(-1).real + p["D"] * u[:, k])
    return glu_behind_gelu(p, torch.stack(y, dim=1))


@referee("liquid_s4", by="Hasani et al. 2023 (Liquid-S4), eq. 9", options={"cut": False})
def liquid_s4(p, u):
    return liquid(p, u, lambda a: a)


@referee("liquid_s4", by="Hasani et al. 2023 (Liquid-S4), eq. 9, no coefficient above 1")
def liquid_s4_cut(p, u):
    return liquid(p, u, lambda a: a / a.abs().clamp(min=1))


# -------------------------------------------------------------------------------------------------- gated convolutions


def layer_norm(x, weight, bias, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight + bias


@referee("gss", by="Mehta et al. 2023 (GSS), pseudocode")
def gss(p, x):
    """u = gelu(W x), v = LayerNorm(gelu(W x)) of a quarter of the width, uc = W DSS(v), o = W(uc * u)."""
    u, v = gelu(lin(x, p, "gate")), gelu(lin(x, p, "down"))
    v = layer_norm(v, p["norm.weight"], p["norm.bias"])
    return lin(lin(diagonal(*held(p), p["D"], v), p, "up") * u, p, "out")


@referee("bigs", by="Wang et al. 2022 (BiGS) and the authors' code")
def bigs(p, x):
    """V = gelu(W_v x), F = gelu(W_f x), B = gelu(W_b flip(x)); U = W_uf SSM(F) * flip(W_ub SSM(B)), O = W_o(gelu(W_u U)
    * V)."""
    F, B, V = gelu(lin(x, p, "into_ahead")), gelu(lin(x.flip(1), p, "into_back")), gelu(lin(x, p, "gate"))
    F = diagonal(*held(p, "ahead."), p["D_ahead"], F)
    B = diagonal(*held(p, "back."), p["D_back"], B)
    U = lin(F, p, "up_ahead") * lin(B, p, "up_back").flip(1)
    return lin(gelu(lin(U, p, "up")) * V, p, "out")


@referee("h3", by="Fu et al. 2023 (H3), algorithm 1", options={"shift": 6})
def h3(p, u):
    """Q * SSM_diag(SSM_shift(K) * V)"""
    Q, K, V = lin(u, p, "qkv").chunk(3, dim=-1)
    K = causal_filter(K, p["short.conv.weight"])
    return lin(Q * diagonal(*trapezoidal(p), p["skip"], K * V), p, "out")


@referee("h3", by="Fu et al. 2023 (H3), algorithm 1, heads of 2", options={"shift": 6, "head_dim": 2})
def h3_heads(p, u):
    """For each head: SSM_diag over K^T V, a d x d matrix at each time, then Q times it."""
    Q, K, V = lin(u, p, "qkv").chunk(3, dim=-1)
    K = causal_filter(K, p["short.conv.weight"])
    Q, K, V = (y.unflatten(-1, (-1, 2)) for y in (Q, K, V))                          # (b, t, h, d)
    KV, y = outer(K, V), 0                                                           # (b, t, h, d, d)
    system = *trapezoidal(p), p["skip"]
    rows = [[diagonal(*system, KV[..., i, j]) for j in range(2)] for i in range(2)]
    y = torch.stack([sum(Q[..., i] * rows[i][j] for i in range(2)) for j in range(2)], dim=-1)
    return lin(y.flatten(-2), p, "out")


def hyena_gates(p, u, convolve):
    """Hyena, order 2: x^2, x^1, v = short filters of projections; y = x^2 * (h conv (x^1 * v))."""
    projected = lin(u, p, "qkv")
    x2, x1, v = causal_filter(projected, p["short.conv.weight"], p["short.conv.bias"]).chunk(3, dim=-1)
    return lin(x2 * convolve(x1 * v), p, "out")


@referee("hyena", by="Poli et al. 2023 (Hyena), definition 3.1 and section 3.3", tolerance=1e-7,
         options={"max_len": 40, "n_bands": 8})
def hyena(p, u, L=40, K=8):
    """h_t = Window(t) FFN(PositionalEncoding(t)): the encoding is [t / (L - 1), Re rho_k(t), Im rho_k(t)], rho_k(t) =
    e^{-2 pi i k t / L}, k from 1e-4 to K - 1; sines in the FFN; the window is e^{-alpha t}, alpha from log(100) / 1.5
    to log(100) / 0.3 (in float32 in the mixer)."""
    t = torch.arange(u.shape[1], dtype=torch.float64)
    rho = torch.exp(-2j * math.pi * torch.linspace(1e-4, K - 1, K, dtype=torch.float64) * t[:, None] / L)
    z = torch.cat([t[:, None] / (L - 1), rho.real, rho.imag], dim=-1)
    for i in range(3):
        z = torch.sin(p["frequency"] * lin(z, p, f"layers.{i}"))
    alpha = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, u.shape[-1], dtype=torch.float64)
    h = (lin(z, p, "last") * torch.exp(-alpha * t[:, None] / (L - 1))).mT
    return hyena_gates(p, u, lambda v: convolution(v, h) + p["D"] * v)


@referee("modal", by="Massaroli et al. 2023 (Laughing Hyena): h_t = Re sum_n R_n lambda_n^t")
def modal(p, u):
    Lambda = torch.polar(torch.exp(-p["log_decay"].exp()), p["angle"])
    t = torch.arange(u.shape[1])
    h = (complex_of(p, "R")[..., None] * Lambda[..., None] ** t).sum(1).real
    return hyena_gates(p, u, lambda v: convolution(v, h) + p["D"] * v)


@referee("monarch", by="Dao et al. 2022 (Monarch): M = P L P^T R", options={"max_len": 25})
def monarch(p, x, m=5):
    """L and R block-diagonal, P the permutation that writes an m x m grid row by row, read column by column."""
    n = m * m
    P = torch.eye(n, dtype=x.dtype)[torch.arange(n).view(m, m).mT.flatten()]
    M = P @ torch.block_diag(*p["L"]) @ P.mT @ torch.block_diag(*p["R"])
    t = x.shape[1]
    return lin(M[:t, :t] @ x, p, "out")


@referee("monarch_mixer", by="Fu et al. 2023 (Monarch Mixer), section 4: products of bivariate polynomials",
         options={"max_len": 24, "m": 4})
def monarch_mixer(p, u, m=4):
    """A sequence x is the polynomial sum_j x_j q_j(X, Y), q_j = X^{j1} (Y^{j0} + sum_{i0 > j0} R[j1][i0, j0] Y^{i0}) at
    j = j1 m + j0: of degree j0 at least, so that the product of u's and k's has nothing of u_j at X^{i1} Y^{i0}, i = i1
    m + i0, if j > i. Read off there; terms of degree m and more in Y are left out."""
    def coefficients(x, R):
        """c[i1][i0] of a sequence x: (..., t)"""
        c = [[0] * m for _ in range(-(-x.shape[-1] // m))]
        for j in range(x.shape[-1]):
            j1, j0 = divmod(j, m)
            for i0 in range(j0, m):
                c[j1][i0] = c[j1][i0] + x[..., j] * (1 if i0 == j0 else R[j1, i0, j0])
        return torch.stack([torch.stack([torch.as_tensor(a).expand(x.shape[:-1]) for a in row], -1) for row in c], -2)

    def convolve(v):
        t = v.shape[1]
        f, g = coefficients(p["k"][:, :t], p["R1"]), coefficients(v.mT, p["R2"])     # (c, i1, i0), (b, c, i1, i0)
        product = torch.zeros_like(g)
        for a1 in range(f.shape[1]):
            for a0 in range(m):
                moved = torch.roll(g, (a1, a0), (-2, -1)).clone()                    # times X^{a1} Y^{a0}
                moved[..., :a1, :], moved[..., :a0] = 0, 0
                product = product + f[:, a1, a0, None, None] * moved
        return product.flatten(-2)[..., :t].mT + p["D"] * v
    return hyena_gates(p, u, convolve)


# ----------------------------------------------------------------------------------------------------------- selection


@referee("mamba", by="Gu, Dao 2023 (Mamba), algorithm 2")
def mamba(p, x):
    """A from log_A; Delta = softplus(parameter + s_Delta(x)), B = s_B(x), C = s_C(x); Abar = exp(Delta A), and Delta B
    for Bbar, as in the code; y = C h + D x; times silu of the other branch."""
    n, rank = p["log_A"].shape[1], p["dt.weight"].shape[1]
    u = short_filter(lin(x, p, "x"), p["short.conv.weight"], p["short.conv.bias"])
    low, B, C = lin(u, p, "dt_B_C").split([rank, n, n], dim=-1)
    Delta, A = softplus(lin(low, p, "dt")), -torch.exp(p["log_A"])
    h, y = 0, []
    for t in range(x.shape[1]):
        d = Delta[:, t, :, None]                                                     # (b, c, 1)
        h = torch.exp(d * A) * h + d * B[:, t, None] * u[:, t, :, None]
        y.append((h * C[:, t, None]).sum(-1) + p["D"] * u[:, t])
    return lin(torch.stack(y, dim=1) * swish(lin(x, p, "gate")), p, "out")


@referee("rglru", by="De et al. 2024 (Griffin), section 2.4")
def rglru(p, x):
    """r_t, i_t = sigmoid(W x_t + b), a_t = a^{c r_t}, a = sigmoid of a parameter, c = 8; h_t = a_t h_{t-1} + sqrt(1 -
    a_t^2) (i_t * x_t). With a = sigmoid(-Lambda) here, log a = -softplus(Lambda)."""
    u = causal_filter(lin(x, p, "x"), p["short.conv.weight"], p["short.conv.bias"])
    r, i = (sigmoid(u @ torch.block_diag(*W) + b) for W, b in zip(p["W"], p["bias"], strict=True))
    a = sigmoid(-p["Lambda"]) ** (8 * r)
    h, y = 0, []
    for t in range(x.shape[1]):
        h = a[:, t] * h + torch.sqrt(1 - a[:, t] ** 2) * (i[:, t] * u[:, t])
        y.append(h)
    return lin(torch.stack(y, dim=1) * gelu(lin(x, p, "gate")), p, "out")


@referee("qrnn", by="Bradbury et al. 2017 (QRNN), fo-pooling")
def qrnn(p, x):
    """Z = tanh(W^1 x_{t-1} + W^2 x_t), F, O alike with sigmoids; c_t = f_t c_{t-1} + (1 - f_t) z_t, h_t = o_t c_t."""
    Z, F, O = (lin(x, p, "now") + before(x) @ p["before.weight"].mT).chunk(3, dim=-1)
    Z, F, O = torch.tanh(Z), sigmoid(F), sigmoid(O)
    c, h = 0, []
    for t in range(x.shape[1]):
        c = F[:, t] * c + (1 - F[:, t]) * Z[:, t]
        h.append(O[:, t] * c)
    return lin(torch.stack(h, dim=1), p, "out")


@referee("sru", by="Lei et al. 2018 (SRU), with v = 0")
def sru(p, x):
    """f_t, r_t = sigmoid(W x_t + b), c_t = f_t c_{t-1} + (1 - f_t) (W x_t), h_t = r_t c_t + (1 - r_t) alpha x_t, with
    alpha = sqrt(1 + 2 e^b) = sqrt(3) for b = 0."""
    f, r = sigmoid(lin(x, p, "f_r")).chunk(2, dim=-1)
    c, h = 0, []
    for t in range(x.shape[1]):
        c = f[:, t] * c + (1 - f[:, t]) * lin(x[:, t], p, "z")
        h.append(r[:, t] * c + (1 - r[:, t]) * math.sqrt(3) * x[:, t])
    return lin(torch.stack(h, dim=1), p, "out")

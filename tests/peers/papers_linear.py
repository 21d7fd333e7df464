"""The formulas of the papers on linear attention, in their letters: sums over all sources, or a loop over tokens."""
import functools
import math

import torch
from papers_attention import H, R, back, heads, joined
from referees import referee


def similarity_attention(p, sim, x, floor=1e-6):
    """Katharopoulos et al. 2020, eq. 3: V'_i = sum_{j<=i} sim(Q_i, K_j) V_j / sum_{j<=i} sim(Q_i, K_j); a sum that is
    0, where no key is like the query, counts as `floor`."""
    Q, K, V = (heads(x, p[f"{name}.weight"]) for name in "qkv")
    S = torch.where(back(x.shape[1]) >= 0, sim(Q, K), 0)
    return joined(S @ V / S.sum(-1, keepdim=True).clamp(min=floor), p["out.weight"])


def pairs(phi_Q, phi_K):
    return torch.einsum("bhid,bhjd->bhij", phi_Q, phi_K)


@referee("linear_attention", by="Katharopoulos et al. 2020, eq. 3 and 7")
def elu(p, x):
    def phi(x):
        return torch.where(x > 0, x + 1, torch.exp(x))
    return similarity_attention(p, lambda Q, K: pairs(phi(Q), phi(K)), x)


@referee("relu", by="Kasai et al. 2021: the ReLU map, here without its matrix")
def relu(p, x):
    return similarity_attention(p, lambda Q, K: pairs(Q.clamp(min=0), K.clamp(min=0)), x)


@referee("performer", by="Choromanski et al. 2020, lemma 1")
def performer(p, x):
    """SM(q, k) = E_w[exp(w.q - |q|^2 / 2) exp(w.k - |k|^2 / 2)], the mean over the m drawn w, of q and k / d^{1/4}."""
    def SM(Q, K):
        Q, K = Q / Q.shape[-1] ** 0.25, K / K.shape[-1] ** 0.25
        total = 0
        for w in p["phi_q.w"]:
            at_q = torch.exp(Q @ w - (Q * Q).sum(-1) / 2)
            at_k = torch.exp(K @ w - (K * K).sum(-1) / 2)
            total = total + at_q[..., :, None] * at_k[..., None, :]
        return total / len(p["phi_q.w"])
    return similarity_attention(p, SM, x)


def random_fourier(p, Q, K):
    """RFA: phi(q) . phi(k) = (1/D) sum_i sin w_i.q sin w_i.k + cos w_i.q cos w_i.k = mean of cos w_i.(q - k)."""
    Q, K = (y / torch.linalg.vector_norm(y, dim=-1, keepdim=True) for y in (Q, K))
    difference = Q[:, :, :, None] - K[:, :, None]                                    # (b, h, i, j, d)
    return torch.cos(difference @ p["phi_q.w"].mT).mean(-1)


@referee("rfa", by="Peng et al. 2021 (RFA)")
def rfa(p, x):
    return similarity_attention(p, lambda Q, K: random_fourier(p, Q, K), x, floor=1e-3)


@referee("gated_rfa", by="Peng et al. 2021 (RFA), gated")
def gated_rfa(p, x):
    """g_t = sigmoid(w.x_t + b), S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T, and z_t alike."""
    Q, K, V = (heads(x, p[f"{name}.weight"]) for name in "qkv")
    g = torch.sigmoid(x @ p["gate.weight"].mT + p["gate.bias"]).mT                   # (b, h, t)
    S, z, o = 0, 0, []
    similar = random_fourier(p, Q, K)
    share = torch.zeros_like(similar[:, :, 0])                                       # of each source, in S_t
    for t in range(x.shape[1]):
        share = share * g[:, :, t, None]
        share = torch.cat([share[..., :t], (1 - g[:, :, t, None]), share[..., t + 1:]], dim=-1)
        S = ((share * similar[:, :, t])[..., None] * V).sum(2)
        z = (share * similar[:, :, t]).sum(-1, keepdim=True)
        o.append(S / z.clamp(min=1e-3))
    return joined(torch.stack(o, dim=2), p["out.weight"])


@referee("cosformer", by="Qin et al. 2022 (cosFormer): the cosine of the distance")
def cosformer(p, x, M=8192):
    def sim(Q, K):
        return pairs(torch.relu(Q), torch.relu(K)) * torch.cos(math.pi / 2 * back(x.shape[1]).double() / M)
    return similarity_attention(p, sim, x)


@referee("hedgehog", by="Zhang et al. 2024 (Hedgehog): two softmaxes")
def hedgehog(p, x):
    def phi(x, W):
        x = torch.einsum("hij,bhtj->bhti", W, x)
        up, down = torch.exp(x), torch.exp(-x)
        return torch.cat([up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)], dim=-1)
    return similarity_attention(p, lambda Q, K: pairs(phi(Q, p["phi_q.W"]), phi(K, p["phi_k.W"])), x)


@referee("taylor", "taylor_full", by="Arora et al. 2024 (Based), eq. 4: exp to second order")
def taylor(p, x):
    def sim(Q, K):
        s = pairs(Q, K) / math.sqrt(Q.shape[-1])
        return 1 + s + s * s / 2
    return similarity_attention(p, sim, x)


@referee("rebased", by="Aksenov et al. 2024 (ReBased): a square behind a LayerNorm")
def rebased(p, x):
    """phi(x) = (gamma * norm(x) + beta)^2, in the kernel (q . k)^2; one norm over all heads, as in the code."""
    def norm(x, which):
        x = x.transpose(1, 2).flatten(-2)                                            # (b, t, h d)
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)
        x = x * p[f"phi_{which}.norm.weight"] + p[f"phi_{which}.norm.bias"]
        return x.unflatten(-1, (H, -1)).transpose(1, 2)
    return similarity_attention(p, lambda Q, K: pairs(norm(Q, "q"), norm(K, "k")).square() / Q.shape[-1], x)


# -------------------------------------------------------------------------------------------------------------- decays


def swish(x):
    return x / (1 + torch.exp(-x))


def rms(x, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def over_time(f, *sequences):
    """f(t, what each of the sequences (b, h, t, ...) has at t), stacked along time: (b, h, t, ...)."""
    return torch.stack([f(t, *now) for t, now in enumerate(zip(*(y.unbind(2) for y in sequences), strict=True))], dim=2)


def outer(k, v):
    return k[..., :, None] * v[..., None, :]


@referee("retnet", by="Sun et al. 2023 (RetNet), eq. 5 and 8", tolerance=1e-7)
def retnet(p, x):
    """D_nm = gamma^{n-m}, Retention = ((Q K^T / sqrt(d)) * D) V, gamma = 1 - 2^{-5 - arange(0, h)}; the norm of each
    head; (swish(X W_G) * Y) W_O. (The mixer's gamma come out of float32 logarithms.)"""
    Q, K, V = (heads(x, p[f"{name}.weight"]) for name in "qkv")
    gamma = torch.tensor([1 - 2.0 ** (-5 - i) for i in range(H)], dtype=torch.float64)[:, None, None]
    lag = back(x.shape[1])
    D = torch.where(lag >= 0, gamma ** lag, 0)
    Y = rms((R(Q) @ R(K).mT / math.sqrt(Q.shape[-1]) * D) @ V, eps=1e-6)
    return (swish(x @ p["gate.weight"].mT) * Y.transpose(1, 2).flatten(-2)) @ p["out.weight"].mT


@referee("gla", by="Yang et al. 2023 (GLA), section 4.4")
def gla(p, x):
    """alpha_t = sigmoid(x_t W_1 W_2 + b)^{1/16}, S_t = diag(alpha_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t / sqrt(d_k)."""
    Q, K, V = (heads(x, p[f"{name}.weight"]) for name in "qkv")
    low = x @ p["decay.0.weight"].mT @ p["decay.1.weight"].mT + p["decay.1.bias"]
    alpha = torch.sigmoid(low).unflatten(-1, (H, -1)).transpose(1, 2) ** (1 / 16)
    S = 0

    def step(t, q, k, v, a):
        nonlocal S
        S = a[..., None] * S + outer(k, v)
        return torch.einsum("bhd,bhde->bhe", q, S) / math.sqrt(q.shape[-1])
    O = rms(over_time(step, Q, K, V, alpha), eps=1e-5) * p["norm"]
    return (O.transpose(1, 2).flatten(-2) * swish(x @ p["gate.weight"].mT)) @ p["out.weight"].mT


@referee("lightning_attention", by="Qin et al. 2024 (Lightning Attention-2): sums that decay", tolerance=1e-7,
         options={"depth": 0.25})
def lightning_attention(p, x):
    """kv_t = lambda kv_{t-1} + k_t^T v_t, o_t = q_t kv_t, for swish(X W); lambda = exp(-s), s = 2^{-8h/H} (1 - depth +
    1e-5) in head h = 1..H; RMSNorm over all heads, then times sigmoid(X W_g). (The mixer's s are in float32.)"""
    Q, K, V = ((swish(x @ W.mT)).unflatten(-1, (H, -1)).transpose(1, 2) for W in p["qkv.weight"].chunk(3))
    s = torch.tensor([2 ** (-8 * h / H) * (1 - 0.25 + 1e-5) for h in range(1, H + 1)], dtype=torch.float64)
    kv = 0

    def step(t, q, k, v):
        nonlocal kv
        kv = torch.exp(-s)[:, None, None] * kv + outer(k, v)
        return torch.einsum("bhd,bhde->bhe", q, kv)
    o = over_time(step, Q, K, V).transpose(1, 2).flatten(-2)
    return (rms(o, eps=1e-6) * p["norm"] * torch.sigmoid(x @ p["gate.weight"].mT)) @ p["out.weight"].mT


@referee("mlstm", by="Beck et al. 2024 (xLSTM), eq. 19 to 27, without a stabiliser")
def mlstm(p, x, cap=15):
    """C_t = f_t C_{t-1} + i_t v_t k_t^T, n_t = f_t n_{t-1} + i_t k_t, h~ = C_t q_t / max(|n_t^T q_t|, 1), i = exp(i~),
    f = sigmoid(f~), k / sqrt(d); h = o * h~ behind a LayerNorm for each head. i~, f~ capped: 15 tanh(. / 15)."""
    Q, K, V = (heads(x, p[f"{name}.weight"]) for name in "qkv")
    i, f = (cap * torch.tanh((x @ p[f"{name}.weight"].mT + p[f"{name}.bias"]) / cap).mT[..., None] for name in "if")
    C, n = 0, 0

    def step(t, q, k, v, i, f):
        nonlocal C, n
        k = k / math.sqrt(k.shape[-1])
        C = f[..., None] * C + i[..., None] * outer(v, k)
        n = f * n + i * k
        return torch.einsum("bhed,bhd->bhe", C, q) / (n * q).sum(-1, keepdim=True).abs().clamp(min=1)
    h = over_time(step, Q, K, V, torch.exp(i), torch.sigmoid(f))
    h = h - h.mean(-1, keepdim=True)
    h = (h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-6)).transpose(1, 2).flatten(-2) * p["norm"]
    return (torch.sigmoid(x @ p["gate.weight"].mT) * h) @ p["out.weight"].mT


@referee("gateloop", by="Katsch 2023 (GateLoop): h_n = a_n h_{n-1} + k_n v_n")
def gateloop(p, x):
    """a_n = sigmoid(size) e^{i turn}, y_n = q_n Re(h_n), one number of state for each channel."""
    q, k, v = (x @ p[f"{name}.weight"].mT for name in "qkv")
    size, turn = (x @ p["decay.weight"].mT + p["decay.bias"]).chunk(2, dim=-1)
    a = torch.polar(torch.sigmoid(size), turn)
    h, y = 0, []
    for n in range(x.shape[1]):
        h = a[:, n] * h + k[:, n] * v[:, n]
        y.append(q[:, n] * h.real)
    return (torch.stack(y, dim=1) * swish(x @ p["gate.weight"].mT)) @ p["out.weight"].mT


def before(x):
    """x_{t-1}, and 0 before the first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


@referee("rwkv4", by="Peng et al. 2023 (RWKV-4), eq. 11 to 13, 16, 17")
def rwkv4(p, x):
    """r = W_r (mu_r x_t + (1 - mu_r) x_{t-1}), k and v alike; w = exp(decay);
    wkv_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same without v); o = W_o (sigmoid(r) wkv)."""
    k, v, r = ((mu * x + (1 - mu) * before(x)) @ p[f"{name}.weight"].mT
               for mu, name in zip(p["mixes"], "kvr", strict=True))
    w, u, wkv = torch.exp(p["decay"]), p["u"], []
    for t in range(x.shape[1]):
        weights = [torch.exp(-(t - 1 - i) * w + k[:, i]) for i in range(t)] + [torch.exp(u + k[:, t])]
        wkv.append(sum(e * v[:, i] for i, e in enumerate(weights)) / sum(weights))
    return (torch.sigmoid(r) * torch.stack(wkv, dim=1)) @ p["out.weight"].mT


@referee("rwkv6", by="Peng et al. 2024 (RWKV-6), section 4")
def rwkv6(p, x):
    """lora(x) = lambda + tanh(x A) B; ddlerp(a, b) = a + (b - a) * lora(a + (b - a) * mu_x);
    w_t = exp(-exp(lora_d(ddlerp_d))); wkv_t = diag(u) k_t^T v_t + sum_{i<t} diag(w_{i+1} ... w_{t-1}) k_i^T v_i."""
    b = before(x)
    A, B = p["mix_down"].chunk(5, dim=1), p["mix_up"]

    def ddlerp(i):
        lora = p["mixes"][i] + torch.tanh((x + (b - x) * p["mix_all"]) @ A[i]) @ B[i]
        return x + (b - x) * lora
    w, k, v, r, g = (ddlerp(i) for i in range(5))
    w = torch.exp(-torch.exp(p["w"] + torch.tanh(w @ p["w_down"]) @ p["w_up"]))
    w = w.unflatten(-1, (H, -1)).transpose(1, 2)
    k, v, r = (heads(y, p[f"{name}.weight"]) for y, name in ((k, "k"), (v, "v"), (r, "r")))
    S = 0

    def step(t, r, k, v, w):
        nonlocal S
        wkv = p["bonus"][:, 0, :, None] * outer(k, v) + S
        S = w[..., None] * S + outer(k, v)
        return torch.einsum("bhd,bhde->bhe", r, wkv)
    o = over_time(step, r, k, v, w).transpose(1, 2)                                  # (b, t, h, e)
    o = o - o.mean(-1, keepdim=True)
    o = (o / torch.sqrt((o * o).mean(-1, keepdim=True) + 64e-5)).flatten(-2) * p["norm.weight"] + p["norm.bias"]
    return (swish(g @ p["gate.weight"].mT) * o) @ p["out.weight"].mT


def short_filter(x, w, bias=0):
    """swish(bias + sum_k w_k x_{t-K+1+k}) for each channel. x: (b, t, c), w: (c, 1, K)"""
    taps, y = w[:, 0].unbind(-1), bias
    for k, tap in enumerate(taps):
        lag = len(taps) - 1 - k
        y = y + tap * torch.cat([torch.zeros_like(x[:, :lag]), x[:, :max(0, x.shape[1] - lag)]], dim=1)[:, :x.shape[1]]
    return swish(y)


@referee("mamba2", by="Dao, Gu 2024 (Mamba-2), section 7")
def mamba2(p, x):
    """h_t = e^{dt_t A} h_{t-1} + dt_t B_t x_t, y_t = C_t^T h_t + D x_t; RMSNorm(y * swish(z)) behind."""
    inner = len(p["norm"])
    xBC = short_filter(x @ p["xbc.weight"].mT, p["conv.conv.weight"], p["conv.conv.bias"])
    N = (xBC.shape[-1] - inner) // 2
    X, B, C = xBC.split([inner, N, N], dim=-1)
    dt = torch.log(1 + torch.exp(x @ p["dt.weight"].mT + p["dt_bias"]))              # (b, t, h)
    A, h, y = -torch.exp(p["A_log"]), 0, []
    X = X.unflatten(-1, (H, -1))                                                     # (b, t, h, e)
    for t in range(x.shape[1]):
        new = torch.einsum("bh,bn,bhe->bhen", dt[:, t], B[:, t], X[:, t])
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + new
        y.append(torch.einsum("bn,bhen->bhe", C[:, t], h) + p["skip"][:, None] * X[:, t])
    y = torch.stack(y, dim=1).flatten(-2)
    return (rms(y * swish(x @ p["z.weight"].mT), eps=1e-5) * p["norm"]) @ p["out.weight"].mT


@referee("mamba3", by="Lahoti et al. 2026 (Mamba-3), proposition 4, as a complex system")
def mamba3(p, x):
    """h_t = alpha_t R_t h_{t-1} + beta_t R_t B_{t-1} x_{t-1} + gamma_t B_t x_t, y_t = C_t^T h_t + D x_t, by swish(z);
    alpha = e^{dt A}, beta = (1 - lambda) dt alpha, gamma = lambda dt. Neighbours of B, C and h are complex numbers, of
    which R_t turns the first half by -dt pi tanh(theta) (the paper: by dt theta). lambda = sigmoid; A = -(1 + a) for
    a >= 0, else -1 / (1 - a); B and C behind an RMSNorm, with a bias in each head. Order of the rows: z, x, B, C, dt,
    a, lambda, theta."""
    N, inner = p["norms"].shape[1], p["out.weight"].shape[1]
    z, X, B, C, dt, a, lam, theta = (x @ p["all.weight"].mT).split([inner, inner, N, N, H, H, H, N // 4], dim=-1)
    dt = torch.log(1 + torch.exp(dt + p["dt_bias"]))                                 # (b, t, h)
    A = -torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0))).clamp(min=1e-4)
    angle = dt[..., None] * math.pi * torch.tanh(theta)[:, :, None]                  # (b, t, h, N / 4)
    R = torch.exp(-1j * torch.cat([angle, torch.zeros_like(angle)], dim=-1))         # (b, t, h, N / 2)
    B, C = ((rms(y, eps=1e-5) * norm)[:, :, None] + bias[:, 0] for y, norm, bias in
            zip((B, C), p["norms"], p["biases"], strict=True))                       # (b, t, h, N)
    B, C = (torch.complex(*y.unflatten(-1, (-1, 2)).unbind(-1)) for y in (B, C))     # (b, t, h, N / 2)
    X, lam, alpha = X.unflatten(-1, (H, -1)), torch.sigmoid(lam), torch.exp(dt * A)
    h, last, y = 0, 0, []
    for t in range(x.shape[1]):
        now = outer(B[:, t], X[:, t])                                                # (b, h, N / 2, e)
        al, ga = alpha[:, t, :, None, None], (lam * dt)[:, t, :, None, None]
        be = ((1 - lam) * dt * alpha)[:, t, :, None, None]
        h = R[:, t, ..., None] * (al * h + be * last) + ga * now
        y.append(torch.einsum("bhn,bhne->bhe", C[:, t].conj(), h).real + p["skip"][:, None] * X[:, t])
        last = now
    return (torch.stack(y, dim=1).flatten(-2) * swish(z)) @ p["out.weight"].mT


@referee("rwkv7", by="Peng et al. 2025 (RWKV-7), section 4")
def rwkv7(p, x):
    """x_i = lerp(x_t, x_{t-1}, mu_i); w = exp(-e^{-1/2} sigmoid(d)), d = lora(tanh); a = sigmoid(lora); kappa = xi * k,
    kappa^ of length 1; k~ = k * lerp(1, a, alpha); wkv_t = wkv_{t-1} (diag(w) - kappa^T (a * kappa)) + v^T k~;
    p = LayerNorm(r wkv^T) + (r . (rho * k~)) v; o = (g * p) W_o, g = lora(sigmoid)."""
    r, w, k, v, a, g = (x + (before(x) - x) * mu for mu in p["mixes"])
    d = torch.tanh(w @ p["down.0.weight"].mT) @ p["up.0.weight"].mT + p["up.0.bias"]
    a = torch.sigmoid(a @ p["down.1.weight"].mT @ p["up.1.weight"].mT + p["up.1.bias"])
    g = torch.sigmoid(g @ p["down.2.weight"].mT) @ p["up.2.weight"].mT
    r, k, v = (y @ p[f"{name}.weight"].mT for y, name in ((r, "q"), (k, "k"), (v, "v")))
    kappa, k = p["remove"] * k, k * (1 - p["keep"] + p["keep"] * a)
    r, w, k, v, a, kappa = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in (
        r, torch.exp(-math.exp(-0.5) / (1 + torch.exp(-d))), k, v, a, kappa))
    kappa = kappa / torch.sqrt((kappa * kappa).sum(-1, keepdim=True))
    wkv = torch.zeros(*v.shape[:2], v.shape[-1], k.shape[-1], dtype=x.dtype)

    def step(t, r, w, k, v, a, kappa):
        nonlocal wkv
        wkv = wkv @ (torch.diag_embed(w) - outer(kappa, a * kappa)) + outer(v, k)
        return torch.einsum("bhed,bhd->bhe", wkv, r)
    o = over_time(step, r, w, k, v, a, kappa).transpose(1, 2)                        # (b, t, h, e)
    o = o - o.mean(-1, keepdim=True)
    o = (o / torch.sqrt((o * o).mean(-1, keepdim=True) + 1e-5 * o.shape[-1])).flatten(-2)
    u = ((r * p["bonus"] * k).sum(-1, keepdim=True) * v).transpose(1, 2).flatten(-2)
    return (g * (o * p["norm.weight"] + p["norm.bias"] + u)) @ p["out.weight"].mT


def delta_rule(p, x, alpha, beta_max=1):
    """S_t = S_{t-1} Diag(alpha_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t with
    q / sqrt(d); q and k of length 1 (1e-6 under the root: the authors' code), q, k, v = swish of a short filter; beta
    = beta_max sigmoid(W x). alpha: (b, h, t, 1 or d)"""
    c = x.shape[-1]
    qkv = short_filter(x @ p["qkv.weight"].mT, p["conv.conv.weight"])
    q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in qkv.split([c, c, qkv.shape[-1] - 2 * c], dim=-1))
    q, k = (y / torch.sqrt((y * y).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    beta = beta_max * torch.sigmoid(x @ p["beta.weight"].mT).mT                      # (b, h, t)
    S = torch.zeros(*v.shape[:2], v.shape[-1], k.shape[-1], dtype=x.dtype)
    one = torch.eye(k.shape[-1], dtype=x.dtype)

    def step(t, q, k, v, beta, alpha):
        nonlocal S
        beta = beta[..., None, None]
        S = S @ (alpha[..., None] * (one - beta * outer(k, k))) + beta * outer(v, k)
        return torch.einsum("bhed,bhd->bhe", S, q) / math.sqrt(q.shape[-1])
    return rms(over_time(step, q, k, v, beta, alpha.expand(*beta.shape, -1)), eps=1e-5) * p["norm"]


def deltanet(p, x, beta_max=1):
    return joined(delta_rule(p, x, torch.ones(1, 1, 1, 1, dtype=x.dtype), beta_max), p["out.weight"])


def gated_deltanet(p, x, beta_max=1):
    """alpha_t = exp(-e^{A_log} softplus(W x + dt_bias)), Mamba-2's; the norm's output times swish(W_g x)."""
    dt = torch.log(1 + torch.exp(x @ p["decay.weight"].mT + p["dt_bias"]))
    o = delta_rule(p, x, torch.exp(-dt * torch.exp(p["A_log"])).mT[..., None], beta_max)
    return (o.transpose(1, 2).flatten(-2) * swish(x @ p["gate.weight"].mT)) @ p["out.weight"].mT


def kda(p, x, beta_max=1):
    """alpha_t = exp(-e^{A_log} softplus(W_2 W_1 x + dt_bias)) for each channel; behind the norm sigmoid(W_4 W_3 x)."""
    dt = torch.log(1 + torch.exp(x @ p["decay.0.weight"].mT @ p["decay.1.weight"].mT + p["dt_bias"]))
    dt = dt.unflatten(-1, (H, -1)).transpose(1, 2)                                   # (b, h, t, d)
    o = delta_rule(p, x, torch.exp(-dt * torch.exp(p["A_log"])[:, None, None]), beta_max)
    gate = torch.sigmoid(x @ p["gate.0.weight"].mT @ p["gate.1.weight"].mT)
    return (o.transpose(1, 2).flatten(-2) * gate) @ p["out.weight"].mT


for name, formula, paper in (("deltanet", deltanet, "Yang et al. 2024 (DeltaNet)"),
                             ("gated_deltanet", gated_deltanet, "Yang et al. 2024b (Gated DeltaNet)"),
                             ("kda", kda, "Kimi Team 2025 (KDA), eq. 1")):
    referee(name, by=paper)(formula)
    referee(name, by=f"{paper}, and Grazzi et al. 2024: beta up to 2", options={"beta_max": 2.0})(
        functools.partial(formula, beta_max=2))

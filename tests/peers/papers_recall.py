"""The formulas of the papers on recall: Zoology, Based, Scatterbrain, Just read twice."""
import math

import torch
from papers_attention import R, back, heads, joined, scaled_dot_product
from papers_linear import pairs, swish
from papers_ssm import convolution, lin
from referees import referee


def sum_of_taps(x, h):
    """(h conv x)_t = sum_l h_l x_{t-l}, of as many taps as there are. x: (b, t, c), h: (c, taps)"""
    t, taps = x.shape[1], h.shape[1]
    return convolution(x, torch.cat([h[:, :t], torch.zeros(len(h), max(0, t - taps), dtype=h.dtype)], dim=1))


@referee("baseconv", by="Arora et al. 2023 (Zoology): BaseConv", options={"taps": 40})
@referee("baseconv", by="Arora et al. 2023 (Zoology): BaseConv, a filter shorter than the text", options={"taps": 17})
@referee("baseconv_short", by="Arora et al. 2023 (Zoology): BaseConv")
def baseconv(p, u):
    """y = (u W + b_1) * (h conv u + b_2)"""
    return lin(u, p, "gate") * (sum_of_taps(u, p["h"]) + p["b2"])


@referee("short_conv", by="the Based authors' code: W_o (silu(h conv W_1 x + b) * W_2 x)")
def short_conv(p, x):
    convolved = sum_of_taps(lin(x, p, "W1"), p["h"]) + p["b2"]
    return lin(swish(convolved) * lin(x, p, "gate"), p, "out")


@referee("repeat_attention", by="Arora et al. 2023 (Zoology): attention for repeated tokens")
def repeat_attention(p, x, ids):
    """softmax(Q K^T / sqrt(d)) V in the rows of tokens that occurred before, 0 in the others."""
    Q, K, V = (heads(x, W) for W in p["qkv.weight"].chunk(3))
    again = torch.tensor([[w in text[:i] for i, w in enumerate(text)] for text in ids.tolist()])
    o = scaled_dot_product(R(Q), R(K), V, back(x.shape[1]) >= 0)
    return joined(o * again[:, None, :, None], p["out.weight"])


def taylor_exp(Q, K):
    s = pairs(Q, K) / math.sqrt(Q.shape[-1])
    return 1 + s + s * s / 2


@referee("based", by="Arora et al. 2024 (Based), eq. 4, and a window", options={"window": 5, "feature_dim": 6})
def based(p, x):
    """Taylor linear attention to all, and softmax attention to the last w, of the same values."""
    Q, K = (heads(x, W) for W in p["qk.linear.weight"].chunk(2))
    V, seen = heads(x, p["v.weight"]), back(x.shape[1]) >= 0
    A = taylor_exp(Q, K) * seen
    far = A @ V / A.sum(-1, keepdim=True)
    Q, K = (R(heads(x, W)) for W in p["qk.window.weight"].chunk(2))
    near = scaled_dot_product(Q, K, V, seen & (back(x.shape[1]) < 5))
    return joined(far + near, p["out.weight"])


def favor_mean(Q, K, W):
    """The Performer's estimate of exp(q . k / sqrt(d)): the mean over w of exp(w.q - |q|^2/2) exp(w.k - |k|^2/2)."""
    Q, K = (y / y.shape[-1] ** 0.25 for y in (Q, K))
    at = (torch.exp(y @ W.mT - (y * y).sum(-1, keepdim=True) / 2) for y in (Q, K))
    return pairs(*at) / len(W)


def scatterbrain(p, x, support):
    """A = phi(Q) phi(K)^T + S, S = exp(Q K^T / sqrt(d)) - phi(Q) phi(K)^T on the support
    and 0 elsewhere; D^{-1} A V with D the sums of A's rows."""
    Q, K = (R(heads(x, W)) for W in p["qk.both.weight"].chunk(2))
    V, seen = heads(x, p["v.weight"]), back(x.shape[1]) >= 0
    estimate, exact = favor_mean(Q, K, p["W"]), torch.exp(pairs(Q, K) / math.sqrt(Q.shape[-1]))
    A = (estimate + torch.where(support(pairs(Q, K), seen), exact - estimate, 0)) * seen
    return joined(A @ V / A.sum(-1, keepdim=True), p["out.weight"])


@referee("scatterbrain", by="Chen et al. 2021 (Scatterbrain), a window", options={"window": 5, "m": 16})
def scatterbrain_window(p, x):
    return scatterbrain(p, x, lambda scores, seen: back(x.shape[1]) < 5)


@referee("scatterbrain", by="Chen et al. 2021 (Scatterbrain), the largest scores",
         options={"top": 5, "m": 16})
def scatterbrain_top(p, x):
    def support(scores, seen):
        """A score is in it if fewer than 5 of those seen are larger."""
        larger = (scores[..., None, :] > scores[..., :, None]) & seen[:, None, :]
        return larger.sum(-1) < 5
    return scatterbrain(p, x, support)


def lolcats(p, x, window, first, groups):
    """y_n = (gamma sum_{window} exp(q_n . k_i / sqrt(d) - c_n) v_i + phi(q_n) sum_{before} phi(k_i) v_i) / (the same
    sums with v = 1), c_n the largest exponent in the window; phi = [softmax(W x), softmax(-W x)]; first tokens count as
    in the window."""
    h, g = 4, 4 // groups
    q, k = p["qk.both.weight"].split([32, 8 * g])
    q, k = R(heads(x, q)), R(heads(x, k, g))
    v = heads(x, p["v.weight"], g)
    k, v = (torch.stack([y[:, j // groups] for j in range(h)], dim=1) for y in (k, v))       # head j reads group j // 2
    place, exponents = torch.arange(x.shape[1]), pairs(q, k) / math.sqrt(8)
    seen = back(x.shape[1]) >= 0
    near = seen & ((back(x.shape[1]) < window) | (place < first))

    def phi(y, W):
        y = torch.einsum("bhtd,hed->bhte", y, W)
        return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1)
    c = torch.where(near, exponents, -math.inf).max(-1, keepdim=True).values
    exact = torch.sigmoid(p["gamma"]) * torch.where(near, torch.exp(torch.where(near, exponents - c, 0)), 0)
    A = exact + pairs(phi(q, p["phi_q.W"]), phi(k, p["phi_k.W"])) * (seen & ~near)
    return joined(A @ v / A.sum(-1, keepdim=True), p["out.weight"])


@referee("lolcats", by="Zhang et al. 2025 (LoLCATs)", options={"window": 5, "first": 0})
def lolcats_as_published(p, x):
    return lolcats(p, x, 5, 0, 1)


@referee("lolcats", by="Zhang et al. 2025 (LoLCATs), first tokens, shared keys",
         options={"window": 5, "first": 3, "n_kv_heads": 2})
def lolcats_with_more(p, x):
    return lolcats(p, x, 5, 3, 2)


@referee("jrt", by="Arora et al. 2024 (Just read twice), a prefix of 9", extras=lambda t: {"prefix": min(9, t)},
         options={"feature_dim": 6})
@referee("jrt", by="Arora et al. 2024 (Just read twice), no prefix", options={"feature_dim": 6})
def jrt(p, x, prefix=0):
    """y_i = phi(q_i) (sum_{j<=i} phi(k_j) v_j + sum_{j<=M} phi(k^e_j) v^e_j) / phi(q_i) (the same sums of the keys)."""
    q, k = (heads(x, W) for W in p["qk.weight"].chunk(2))
    ke, v, ve = (heads(x, p[f"{name}.weight"]) for name in ("k_enc", "v", "v_enc"))
    decoder = taylor_exp(q, k) * (back(x.shape[1]) >= 0)
    encoder = taylor_exp(q, ke) * (torch.arange(x.shape[1]) < prefix)
    y = decoder @ v + encoder @ ve
    return joined(y / (decoder.sum(-1, keepdim=True) + encoder.sum(-1, keepdim=True)), p["out.weight"])


@referee("bidirectional", by="Katharopoulos et al. 2020, with Based's map", options={"feature_dim": 6})
def bidirectional(p, x):
    q, k = (heads(x, W) for W in p["qk.weight"].chunk(2))
    A, v = taylor_exp(q, k), heads(x, p["v.weight"])
    return joined(A @ v / A.sum(-1, keepdim=True), p["out.weight"])

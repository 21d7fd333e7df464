"""The formulas of the papers on attention, in their letters."""
import math

import torch
from referees import referee

H = 4                    # heads


def heads(x, W, h=H):
    """x W, cut into h heads: (b, h, t, d)"""
    return (x @ W.mT).unflatten(-1, (h, -1)).transpose(1, 2)


def joined(o, W):
    """Concat(head_1, ..., head_h) W^O"""
    return o.transpose(1, 2).flatten(-2) @ W.mT


def R(x):
    """RoFormer: (W x_m) e^{i m theta}, theta_i = 10000^{-2i/d}. As in GPT-NeoX and Llama the real parts are
    the first half of a head, the imaginary parts the second."""
    m, d = x.shape[-2:]
    re, im = x.chunk(2, dim=-1)
    theta = torch.tensor([10000 ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
    turned = torch.complex(re, im) * torch.exp(1j * torch.arange(m)[:, None] * theta)
    return torch.cat([turned.real, turned.imag], dim=-1)


def scaled_dot_product(Q, K, V, allowed):
    """Vaswani et al. 2017, eq. 1: softmax(Q K^T / sqrt(d_k)) V, among the sources that are allowed."""
    S = Q @ K.mT / math.sqrt(Q.shape[-1])
    E = torch.exp(S - S.amax(-1, keepdim=True).detach()) * allowed
    return E / E.sum(-1, keepdim=True) @ V


def back(t):
    """How far target m looks back to source n: m - n."""
    return torch.arange(t)[:, None] - torch.arange(t)


def with_rope(p, x, allowed, g=H):
    """g heads of keys and values, each for h / g query heads in a row [Ainslie et al. 2023, figure 2]."""
    d = x.shape[-1] // H
    WQ, WK, WV = p["qkv.weight"].split([H * d, g * d, g * d])
    Q, K, V = R(heads(x, WQ)), R(heads(x, WK, g)), heads(x, WV, g)
    o = [scaled_dot_product(Q[:, i], K[:, i * g // H], V[:, i * g // H], allowed) for i in range(H)]
    return joined(torch.stack(o, dim=1), p["out.weight"])


@referee("attention", by="Vaswani et al. 2017, eq. 1, with RoFormer's rotations")
def attention(p, x):
    return with_rope(p, x, back(x.shape[1]) >= 0)


@referee("attention", by="Ainslie et al. 2023 (GQA), figure 2", options={"n_kv_heads": 2})
def grouped(p, x):
    return with_rope(p, x, back(x.shape[1]) >= 0, g=2)


@referee("attention", by="torch's scaled_dot_product_attention", options={"rope": False})
def torchs(p, x):
    Q, K, V = (heads(x, W) for W in p["qkv.weight"].chunk(3))
    return joined(torch.nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=True), p["out.weight"])


@referee("window", by="Longformer: one side of its window", options={"window": 5})
def window(p, x):
    distance = back(x.shape[1])
    return with_rope(p, x, (distance >= 0) & (distance < 5))


@referee("linformer", by="Wang et al. 2020 (Linformer), eq. 7", options={"k": 8, "max_len": 50})
def linformer(p, x):
    """softmax(Q (E K)^T / sqrt(d_k)) F V"""
    n = x.shape[1]
    Q, K, V = (heads(x, W) for W in p["qkv.weight"].chunk(3))
    E, F = p["E"][:, :n], p["F"][:, :n]
    P = torch.softmax(Q @ (E @ K).mT / math.sqrt(Q.shape[-1]), dim=-1)
    return joined(P @ (F @ V), p["out.weight"])


@referee("ngram", by="Akyurek et al. 2024: n-gram heads")
def ngram(p, x, ids):
    """A(n)_ij = 1 / (how often) where the n tokens before j are the n tokens up to i, j < i; y = W_1 x + W_0 A x."""
    c, y = x.shape[-1], x @ p["W1.weight"].mT
    for n, W0 in zip((1, 2, 3), p["W0.weight"].split(c, dim=1), strict=True):
        A = torch.zeros(len(x), x.shape[1], x.shape[1], dtype=x.dtype)
        for b, w in enumerate(ids.tolist()):
            for i in range(n - 1, len(w)):
                js = [j for j in range(n, i) if w[j - n:j] == w[i - n + 1:i + 1]]
                A[b, i, js] = 1 / max(1, len(js))
        y = y + A @ x @ W0.mT
    return y

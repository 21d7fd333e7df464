"""Lesson 04. Recall: what gated convolutions lack, and how a Taylor series and a small window give it back.

    a 3 b 7 c 2 ... c ? ... a ?        2 and 3: look up where the token stood before, and say what followed

A convolution looks back by fixed amounts: to find a token that may stand anywhere it needs channels for every distance,
a width that grows with the length. Attention compares contents; one narrow head is enough, but its state grows with the
length instead. Some growth is a law: a state that can answer for k pairs holds at least k log2 v bits. Based lies
between the two,

    o_t = [sum_{s<=t} (1 + q_t.k_s + (q_t.k_s)^2 / 2) v_s / (the same with v = 1)]   e^x to second order, to all tokens
        + sum_{t-w<s<=t} softmax_s(q_t . k_s) v_s                                    softmax itself, to the last w

by the feature dimension f of q and k above (a state of f^2 / 2 features) and the window w (a state of w tokens); the
scores q.k are divided by the square root of their dimension, as always. Far away it finds a token roughly, nearby it
compares exactly.

Papers  [Ar23] Arora et al. 2023, Zoology: MQAR, BaseConv           arXiv:2312.04927
        [Ar24] Arora et al. 2024, Based                             arXiv:2402.18668
        [C21]  Chen et al. 2021, Scatterbrain                       arXiv:2110.15343
        [Zh25] Zhang et al. 2025, LoLCATs                           arXiv:2410.10254
        [X24]  Xiao et al. 2024, attention sinks                    arXiv:2309.17453
        [Z24]  Zhang et al. 2024, Hedgehog                          arXiv:2402.04347
        [C20]  Choromanski et al. 2020, Performer                   arXiv:2009.14794
        [De24] De et al. 2024, Griffin                              arXiv:2402.19427
        [R24]  Ren et al. 2024, Samba                               arXiv:2406.07522
        [L24]  Lieber et al. 2024, Jamba                            arXiv:2403.19887
        [Be87] Bentley 1987, Programming pearls: a sample of brilliance

Axes    b batch, t time (target), s source, h head, g heads of keys and values, d key dim, f feature dim, D features,
        e value dim, c model width, w window, n first tokens, m random features, k tap of a filter.
Letters of BaseConv are [Ar23]'s: u its input, W, b_1 the gate, h, b_2 the filter; S is a sum over phi(k) [v, 1]^T.

mixer             forms                       training cost   state per sequence
baseconv          conv parallel               t log t         the past inputs, c t (at most its taps)
baseconv_short    conv recurrent parallel     t               c (k - 1)
short_conv        conv recurrent parallel     t               2 c (k - 1)
repeat_attention  parallel recurrent          t repeats       2 c t
based             chunked parallel recurrent  t (D + w)       h D (e + 1) + 2 c w, D = 1 + f + f (f + 1) / 2
scatterbrain      chunked parallel recurrent  t (m + w)       h m (e + 1) + 2 c w
lolcats           chunked parallel recurrent  t (D + w)       h D (e + 1) + 2 g d (w + n), D = 2 d
(based and baseconv also triton: kernels for each part, the default on a GPU in bfloat16)

    python 04_based.py                  forms compared; the theory, run: constructions, degrees, bits, Scatterbrain
    python 04_based.py --plot FILE.png  e^x and its Taylor series; Based's matrix as the sum of its two parts
"""
import argparse
import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

KERNELS = Path(__file__).with_name("kernels").is_dir()       # a lesson also runs alone, without its kernels
NO_FLOAT64 = {"mps"}                                         # devices that have no float64


def first():
    """The lesson on four tokens with d = e = 2: what followed the first A? In A c B A it stands two back when the
    second A asks, in A c A B one back. Prints and returns the texts and, for each, q, k, v, the M of Taylor, M V."""
    A, B, c = (2.0, 0.0), (0.0, 2.0), (-1.0, -1.0)
    texts = {"AcBA": (torch.tensor([A, c, B, A]), 3), "AcAB": (torch.tensor([A, c, A, B]), 2)}       # x, who asks

    # One convolution, M_ts = K_{t-s}: each text wants the weight 1 at the lag of c and 0 at the other.
    print("four tokens: the second A asks what followed the first; one convolution has to serve both texts")
    lags = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])                          # (text, lag): what is wanted
    K = lags.mean(dim=0)                                                             # nearest to both
    print(f"    wanted: K = {lags[0].int().tolist()} and K = {lags[1].int().tolist()}; the nearest to both is "
          f"{K.tolist()}, half of c and half of another token")

    results = {}
    for name, (x, asks) in texts.items():
        # A convolution of two taps sets the token before beside each token: it is the key, the token is the value.
        q, k, v = x, torch.cat([torch.zeros(1, 2), x[:-1]]), x                       # (t, d), (t, d), (t, e)

        # All at once: 1 + s + s^2 / 2 in place of e^s, rows that sum to 1.
        s = q @ k.T / 2 ** 0.5                                                       # (t, s)
        weights = (1 + s + s * s / 2).tril()
        M = weights / weights.sum(dim=1, keepdim=True)
        softmax = s.masked_fill(torch.ones(4, 4).triu(1) == 1, -torch.inf).softmax(dim=1)

        # Token by token: the polynomial is phi(q) . phi(k) with six features, so a state of 6 x 3 numbers is enough.
        def phi(x):
            y = x * 2 ** -0.25
            return torch.stack([torch.ones(()), y[0], y[1], y[0] ** 2 / 2 ** 0.5, y[0] * y[1], y[1] ** 2 / 2 ** 0.5])
        S, recurrent = torch.zeros(6, 3), []                                         # (D, e + 1)
        for t in range(4):
            S = S + phi(k[t])[:, None] * torch.cat([v[t], torch.ones(1)])
            o = phi(q[t]) @ S
            recurrent.append(o[:2] / o[2])
        assert torch.allclose(M @ v, torch.stack(recurrent), atol=1e-5)
        by_distance = torch.tensor([K[asks - s].item() if asks - s < len(K) else 0.0 for s in range(4)][:asks + 1])
        shown = {"convolution": by_distance, "Taylor": M[asks], "softmax": softmax[asks]}
        print(f"    {name}: the second A's weights   " + "   ".join(
            f"{kind} " + " ".join(f"{w:.2f}" for w in row.tolist()) for kind, row in shown.items()))
        results[name] = q, k, v, M, M @ v
    print("    a key beside its value is found wherever it stands; the state has 18 numbers for any length\n")
    return results

# ------------------------------------------------------------------------------------------------ convolution and gate


def fft_conv(u, K):
    """y_t = sum_{s <= t} K_{t-s} u_s. u: (b, c, t), K: (c, t). Padded to 2t, so that nothing wraps around; float32 or
    better."""
    n = 2 * u.shape[-1]
    U, V = (torch.fft.rfft(at_least_float32(x), n=n) for x in (u, K))
    return torch.fft.irfft(U * V, n=n)[..., :u.shape[-1]].to(u.dtype)


def triton_conv(u, kernel, pre=None, post=None):
    """post * (K * (pre * u)), K = kernel(t), as matrix products, on a GPU: kernels/fft_conv.py. u, pre and post in the
    dtype of autocast, if it is on; K as ever without it."""
    from kernels.fft_conv import fft_conv
    autocast = u.is_cuda and torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else u.dtype
    u, pre, post = (x if x is None else x.to(dtype) for x in (u, pre, post))
    with torch.autocast(u.device.type, enabled=False):
        return fft_conv(u, kernel(u.shape[-1]), pre, post)


def short_conv(u, K):
    """The same for few taps, K: (c, k), without a transform."""
    return F.conv1d(F.pad(u, (K.shape[1] - 1, 0)), K.flip(-1)[:, None].to(u.dtype), groups=len(K))


def toeplitz(K):
    """The matrix of that convolution, T_ts = K_{t-s} for s <= t: (c, t) -> (c, t, s)."""
    t = torch.arange(K.shape[-1], device=K.device)
    return K[:, (t[:, None] - t).clamp(min=0)].tril()


# ------------------------------------------------------------------------------------------- attention, and its Taylor
#
# q, k: (b, h, t, d), v: (b, h, t, e). A `term` is a way to look back, and has
#
#     matrix(q, k)           -> M: (b, h, t, s), the definition
#     init(like, b, h, d, e) -> its state before the first token, of like's dtype and device
#     write(state, k, v)     -> the state after these tokens
#     block(q, k, v, state)  -> o: (b, h, t, e), for a block of tokens that come after the state
#     lookup(q, state)       -> o: (b, h, 1, e), for the token that was written last
#     size(t, h, d, e)       -> floats in its state after t tokens


def parallel(term, q, k, v, state=None):
    """M V: the definition. For the whole sequence at once, so from no state and to none."""
    return term.matrix(q, k) @ share_groups(v, q.shape[1]), None


def chunked(term, q, k, v, state, chunk=64):
    """Blocks: parallel inside, recurrent from one to the next. Time and memory O(t)."""
    o = []
    for i in range(0, q.shape[2], chunk):
        q_i, k_i, v_i = (x[:, :, i:i + chunk] for x in (q, k, v))
        o.append(term.block(q_i, k_i, v_i, state))
        state = term.write(state, k_i, v_i)
    return torch.cat(o, dim=2), state


def recurrent(term, q, k, v, state):
    """Token by token: write, then look up."""
    o = []
    for i in range(q.shape[2]):
        now = slice(i, i + 1)
        state = term.write(state, k[:, :, now], v[:, :, now])
        o.append(term.lookup(q[:, :, now], state))
    return torch.cat(o, dim=2), state


def triton(term, q, k, v, state):
    """The same as one kernel, on a GPU; in what dtype q, k and v come, which may be of 16 bits."""
    return term.kernel(q, k, v, state)


FORMS = {"chunked": chunked, "parallel": parallel, "recurrent": recurrent, "triton": triton}


def with_one(v):
    """v with a column of ones: its sum is the normaliser."""
    return F.pad(v, (0, 1), value=1.0)


def normalised(o):
    return o[..., :-1] / o[..., -1:].clamp(min=1e-6)


def products(x):
    """The d (d + 1) / 2 different products x_i x_j, so weighted that products(x) . products(y) = (x . y)^2."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    pick = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)        # products with 0 and 1: faster than indexing
    return (x @ pick[:, i]) * (x @ pick[:, j]) * x.new_full(i.shape, 2 ** 0.5).masked_fill(i == j, 1.0)


def taylor(x):
    """phi(x) = [1, x / f^{1/4}, x x^T / sqrt(2 f)] [Ar24, eq. 4], each product once: 1 + f + f (f + 1) / 2 features.
    phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(f), which is at least 1/2: positive, but below s = -1 it
    rises again, so that keys that point away from the query count as well."""
    x = x * x.shape[-1] ** -0.25
    return torch.cat([torch.ones_like(x[..., :1]), x, products(x) * 0.5 ** 0.5], dim=-1)


def taylor_full(x):
    """The same with all f^2 products, as it is usually written."""
    x = x * x.shape[-1] ** -0.25
    square = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x, square * 0.5 ** 0.5], dim=-1)


class Taylor:
    """All tokens so far, with weights 1 + s + s^2 / 2. Inside a block this is a polynomial of the scores; the features
    are only needed for the state S = sum_s phi(k_s) [v_s, 1]^T: (b, h, D, e + 1)."""

    def __init__(self, packed=True):
        self.phi = taylor if packed else taylor_full

    def weights(self, q, k):
        s = (q * q.shape[-1] ** -0.5) @ k.mT
        return (1 + s + s * s / 2).tril()                                                    # (b, h, t, s)

    def matrix(self, q, k):
        M = self.weights(q, k)
        return M / M.sum(dim=-1, keepdim=True)

    def features(self, d):
        return self.phi(torch.zeros(d)).numel()

    def init(self, like, b, h, d, e):
        return like.new_zeros(b, h, self.features(d), e + 1)

    def size(self, t, h, d, e):
        return h * self.features(d) * (e + 1)

    def write(self, S, k, v):
        return S + self.phi(k).mT @ with_one(v)

    def block(self, q, k, v, S):
        return normalised(self.weights(q, k) @ with_one(v) + self.phi(q) @ S)

    def lookup(self, q, S):
        return normalised(self.phi(q) @ S)

    def kernel(self, q, k, v, S):
        from kernels.taylor_attention import taylor_attention
        return taylor_attention(q, k, v, S)


def distance(t, s, device):
    """How far each target looks back to each source, when the last of t targets is the last of s sources: (t, s)."""
    return torch.arange(s - t, s, device=device)[:, None] - torch.arange(s, device=device)


class Window:
    """Softmax over the last w tokens, itself among them. State: their keys and values, oldest first."""

    def __init__(self, w):
        self.w = w

    def matrix(self, q, k):
        """For targets that are the last of the sources."""
        back = distance(q.shape[2], k.shape[2], q.device)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        return scores.masked_fill((back < 0) | (back >= self.w), -torch.inf).softmax(dim=-1)

    def init(self, like, b, h, d, e):
        return like.new_zeros(b, h, 0, d), like.new_zeros(b, h, 0, e)

    def size(self, t, h, d, e):
        return h * (d + e) * min(t, self.w)

    def write(self, past, k, v):
        return tuple(torch.cat(pair, dim=2)[:, :, -self.w:] for pair in zip(past, (k, v), strict=True))

    def block(self, q, k, v, past):
        k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))
        return self.matrix(q, k) @ v

    def lookup(self, q, past):
        k, v = past
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v

    def kernel(self, q, k, v, past):
        from kernels.flash_attention import flash_attention
        k, v = (torch.cat([old.to(x.dtype), x], dim=2) for old, x in zip(past, (k, v), strict=True))
        return flash_attention(q, k, v, self.w), (k[:, :, -self.w:], v[:, :, -self.w:])


def favor(x, W):
    """FAVOR+ [C20, lemma 1]: phi(x) = e^{Wy - |y|^2 / 2} / sqrt(m) with y = x / d^{1/4}: phi(q) . phi(k) is e^{q.k /
    sqrt(d)} on average over W ~ N(0, 1): (m, d)."""
    x = x * x.shape[-1] ** -0.25
    return torch.exp(x @ W.mT.to(x.dtype) - x.square().sum(dim=-1, keepdim=True) / 2) * len(W) ** -0.5


def orthogonal_gaussian(m, d):
    """m rows like N(0, 1), orthogonal in blocks of d. (The signs: QR alone leans to one side.)"""
    blocks = [Q * R.diagonal().sign() for Q, R in (torch.linalg.qr(torch.randn(d, d)) for _ in range(-(-m // d)))]
    return torch.cat(blocks)[:m] * torch.randn(m, d).norm(dim=1, keepdim=True)


def share_groups(k, n_heads):
    """Repeat each key (or value) head for the h / g query heads that share it: (b, g, s, d) -> (b, h, s, d)."""
    return k if k.shape[1] == n_heads else k.repeat_interleave(n_heads // k.shape[1], dim=1)


class SparsePlusLowRank:
    """Weights of softmax's kind on a support (the last w tokens and the first n of a text, or the w largest scores),
    phi_q(q) . phi_k(k) elsewhere, and one normaliser for both. k, v: (b, g, s, ...), g a divisor of h. State: a sum S
    over the tokens that left the support, and keys and values of the others.

    The two sides have to be on one scale. Scatterbrain [C21]: e^s in the support, where phi estimates e^s (gamma None).
    LoLCATs [Zh25]: gamma e^{s - c}, c the largest score in the support: the exact side weighs at least gamma, and
    phi learns to stand beside it. There c is part of M, so gradients pass through it; in Scatterbrain it cancels."""

    def __init__(self, phi_q, phi_k, m, w, top=False, first=0, gamma=None):
        self.phi_q, self.phi_k, self.m, self.w, self.top = phi_q, phi_k, m, w, top
        self.first, self.gamma = first, gamma

    def support(self, scores):
        """For the last t of s sources: what is seen, and what of that is in the support, (t, s) or (b, h, t, s)."""
        t, s = scores.shape[2:]
        back = distance(t, s, scores.device)
        past = back >= 0
        if self.top:
            ranked = scores.masked_fill(~past, -torch.inf).topk(min(self.w, s), dim=-1).values
            return past, past & (scores >= ranked[..., -1:])
        return past, past & ((back < self.w) | (torch.arange(s, device=scores.device) < self.first))

    def weights(self, q, k):
        """A, and what S is multiplied by to stand beside it: (b, h, t, s), (b, h, t, 1) or 1. Scatterbrain's are both
        times e^{-top}, so that no exponent is above 0; but not below -20, so that e^{-top} is not too large either."""
        k = share_groups(k, q.shape[1])
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        past, support = self.support(scores)
        rest = (self.phi_q(q) @ self.phi_k(k).mT).masked_fill(support | ~past, 0)
        top = scores.masked_fill(~support, -torch.inf).amax(dim=-1, keepdim=True)
        if self.gamma is not None:
            return self.gamma * torch.where(support, scores - top, -torch.inf).exp() + rest, 1
        top = top.detach().clamp(min=-20)
        return torch.where(support, scores - top, -torch.inf).exp() + rest * torch.exp(-top), torch.exp(-top)

    def matrix(self, q, k):
        A, _ = self.weights(q, k)
        return A / A.sum(dim=-1, keepdim=True).clamp(min=1e-6)

    def init(self, like, b, h, d, e, g=None):
        g = h if g is None else g
        return like.new_zeros(b, h, self.m, e + 1), like.new_zeros(b, g, 0, d), like.new_zeros(b, g, 0, e)

    def size(self, t, h, d, e, g=None):
        kept = t if self.top else min(t, self.w + self.first)
        return h * self.m * (e + 1) + (h if g is None else g) * (d + e) * kept

    def write(self, state, k, v):
        """The kept tokens stand in order, the first n of the text in front: of the others all but the last w leave."""
        S, *past = state
        k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))
        n, old = self.first, 0 if self.top else max(0, k.shape[2] - self.w - self.first)
        k_old, v_old = (share_groups(x[:, :, n:n + old], S.shape[1]) for x in (k, v))
        k, v = (torch.cat([x[:, :, :n], x[:, :, n + old:]], dim=2) for x in (k, v))
        return S + self.phi_k(k_old).mT @ with_one(v_old), k, v

    def block(self, q, k, v, state):
        S, *past = state
        return self.lookup(q, (S, *(torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))))

    def lookup(self, q, state):
        S, k, v = state
        A, scale = self.weights(q, k)
        return normalised(A @ with_one(share_groups(v, q.shape[1])) + scale * (self.phi_q(q) @ S))


def scatterbrain(W, w, top=False):
    """The term of Scatterbrain: Performer's features, of the rows of W, beside e^s."""
    phi = partial(favor, W=W)
    return SparsePlusLowRank(phi, phi, len(W), w, top)


def rope(x, start=0, base=10000.0):
    """Rotary positions (lesson 01): the pair (x_i, x_{i + d/2}) at position p turned by the angle p base^(-2i/d)."""
    t, d = x.shape[-2:]
    exact = torch.float32 if x.device.type in NO_FLOAT64 else torch.float64
    theta = base ** (-torch.arange(0, d, 2, device=x.device, dtype=exact) / d)                   # (d/2,)
    angle = (start + torch.arange(t, device=x.device, dtype=exact))[:, None] * theta
    cos, sin = (f(angle).to(torch.promote_types(x.dtype, torch.float32)) for f in (torch.cos, torch.sin))
    return (x * torch.cat([cos, cos], -1) + x.roll(d // 2, -1) * torch.cat([-sin, sin], -1)).to(x.dtype)


# -------------------------------------------------------------------------------------------------------------- mixers


def split_heads(x, n):
    """(b, t, n d) -> (b, n, t, d)"""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def join_heads(x):
    """(b, n, t, d) -> (b, t, n d)"""
    return x.transpose(1, 2).flatten(-2)


def head_dim(d_model, n_heads):
    if n_heads < 1 or d_model % n_heads:
        raise ValueError(f"d_model {d_model} is not a multiple of n_heads {n_heads}")
    return d_model // n_heads


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(d_in, d_out, bias=False):
    return nn.Linear(d_in, d_out, bias=bias)


class BaseConv(nn.Module):
    """y = (u W + b_1) * (h conv u + b_2) [Ar23, eq. 1]: a gate times a convolution, the least that Hyena, H3 and RWKV
    have in common. h: a free number for each channel and tap, so nothing beyond `taps` tokens back is seen. (The
    authors' code adds the input, too; where its text is shorter than its longest, the convolution wraps around.)"""
    forms = ("conv", "parallel", "triton")
    causal = True

    def __init__(self, d_model, n_heads=None, taps=1024):          # n_heads is not used: each channel has its filter
        super().__init__()
        if taps < 1:
            raise ValueError(f"taps {taps} is below 1: a filter sees at least the own token")
        self.taps, self.channels = taps, d_model
        if taps <= 16:                                             # summed up one by one, which needs no kernel
            self.forms = tuple(form for form in self.forms if form != "triton")
        self.gate, self.b2 = linear(d_model, d_model, bias=True), nn.Parameter(torch.zeros(d_model))
        self.h = nn.Parameter(torch.empty(d_model, taps).uniform_(-1, 1) * taps ** -0.5)

    def u(self, x):
        """What is convolved: (b, c, t)"""
        return x.mT

    def output(self, o, x):
        return self.gate(x) * (o[..., 0].mT + self.b2)

    def filter(self, t):
        """The first t taps: (c, t)"""
        return F.pad(self.h[:, :t], (0, max(0, t - self.taps)))

    def convolve(self, form, u):
        if form == "parallel":
            return (toeplitz(self.filter(u.shape[-1])).to(u.dtype) @ u[..., None])[..., 0]
        if form == "triton":
            return triton_conv(u, lambda t: self.h)
        return short_conv(u, self.h) if self.taps <= 16 else fft_conv(u, self.filter(u.shape[-1]))

    def forward(self, x, form=None):
        form = pick_form(self, x, form)
        if form == "recurrent":
            y, state = [], self.init_state(len(x))
            for i in range(x.shape[1]):
                y_t, state = self.step(x[:, i], state)
                y.append(y_t)
            return torch.stack(y, dim=1)
        return self.output(self.convolve(form, self.u(x))[..., None], x)

    def init_state(self, batch_size):
        return self.h.new_zeros(batch_size, self.channels, 0)

    def prefill(self, x, state=None):
        pick_form(self, x)
        past = self.init_state(len(x)) if state is None else state
        u = torch.cat([past, self.u(x).to(past.dtype)], dim=-1)                              # (b, c, s)
        o = self.convolve("conv", u)[..., -x.shape[1]:, None].to(x.dtype)
        return self.output(o, x), u[..., max(0, u.shape[-1] - self.taps + 1):]

    def step(self, x_t, state):
        """y_t = sum_k h_k u_{t-k}, over the inputs that are kept."""
        x = x_t[:, None]
        u = torch.cat([state, self.u(x).to(state.dtype)], dim=-1)
        o = (self.filter(u.shape[-1]).flip(-1) * u).sum(dim=-1)[..., None, None].to(x.dtype)         # (b, c, 1, 1)
        return self.output(o, x)[:, 0], u[..., max(0, u.shape[-1] - self.taps + 1):]

    def values(self, x):
        return self.u(x)[..., None]                                                          # (b, c, s, 1)

    def matrix(self, x):
        return toeplitz(self.filter(x.shape[1])).expand(len(x), -1, -1, -1)

    def state_size(self, t):
        return self.channels * min(t, self.taps - 1)


class BaseConvShort(BaseConv):
    """BaseConv with a filter of a few taps: a state that does not grow, and nothing seen from further away."""
    forms = ("conv", "recurrent", "parallel")

    def __init__(self, d_model, n_heads=None, taps=3):
        super().__init__(d_model, n_heads, taps)


class ShortConv(BaseConvShort):
    """Based's gated short convolution [Ar24, code]: y = W_o (silu(h conv W_1 x + b) * W_2 x), twice as wide inside,
    each W with a bias: what stands next to what, for a state of two tokens."""

    def __init__(self, d_model, n_heads=None, taps=3, expand=2):
        super().__init__(expand * d_model, n_heads, taps)
        self.W1, self.gate = (linear(d_model, expand * d_model, bias=True) for _ in range(2))
        self.out = linear(expand * d_model, d_model, bias=True)

    def u(self, x):
        return self.W1(x).mT

    def output(self, o, x):
        return self.out(F.silu(o[..., 0].mT + self.b2) * self.gate(x))


class LookBack(nn.Module):
    """A sum of terms over the same values: M = sum of the terms' M. dims: the key dim d of each term, by name.
    n_kv_heads: g, a divisor of n_heads, of keys and values that groups of heads share (default: n_heads)."""
    forms = ("chunked", "parallel", "recurrent")
    causal = True
    rotary = ()              # the terms that are told positions

    def __init__(self, d_model, n_heads, dims, n_kv_heads=None):
        super().__init__()
        self.n_heads, self.e, self.dims = n_heads, head_dim(d_model, n_heads), dims
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if self.n_kv_heads < 1 or n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {n_heads} is not a multiple of n_kv_heads {n_kv_heads}")
        for name in self.rotary:
            if dims.get(name, 0) % 2:
                raise ValueError(f"rotary positions turn pairs: the head dim d_model / n_heads = {dims[name]} is odd")
        self.qk = nn.ModuleDict({name: linear(d_model, (n_heads + self.n_kv_heads) * d) for name, d in dims.items()})
        self.v, self.out = linear(d_model, self.n_kv_heads * self.e), linear(d_model, d_model)

    def inputs(self, x, start=0):
        """Each term with its q: (b, h, t, d) and k: (b, g, t, d)."""
        h, g = self.n_heads, self.n_kv_heads
        for name, term in self.terms().items():
            qk = split_heads(self.qk[name](x), h + g)
            q, k = (rope(qk, start) if name in self.rotary else qk).split([h, g], dim=1)
            yield name, term, q, k

    def run(self, x, state, form):
        start, *states = self.init_state(len(x)) if state is None else state
        v, o, after = split_heads(self.v(x), self.n_kv_heads), 0, [start + x.shape[1]]       # v: (b, g, t, e)
        for (_, *term_q_k), before in zip(self.inputs(x, start), states, strict=True):
            with torch.autocast(x.device.type, enabled=False):
                term, *qkv = *term_q_k, v
                part, state = FORMS[form](term, *(qkv if form == "triton" else map(at_least_float32, qkv)), before)
            o = o + part
            after.append(state)
        return self.output(o.to(v.dtype), x), after

    def forward(self, x, form=None):
        chosen = pick_form(self, x, form)
        if form is None and chosen == "chunked" and x.shape[1] <= (1024 if x.is_cuda else 256):
            chosen = "parallel"
        return self.run(x, None, chosen)[0]

    def init_state(self, batch_size):
        """The number of tokens so far, and a state for each term."""
        like = at_least_float32(self.v.weight)
        shared = () if self.n_kv_heads == self.n_heads else (self.n_kv_heads,)
        return [0, *(term.init(like, batch_size, self.n_heads, self.dims[name], self.e, *shared)
                     for name, term in self.terms().items())]

    def prefill(self, x, state=None):
        return self.run(x, self.init_state(len(x)) if state is None else state, pick_form(self, x))

    def step(self, x_t, state):
        y, state = self.run(x_t[:, None], state, "recurrent")
        return y[:, 0], state

    def values(self, x):
        return share_groups(split_heads(self.v(x), self.n_kv_heads), self.n_heads)           # (b, h, s, e)

    def output(self, o, x):
        return self.out(join_heads(o))

    def matrices(self, x):
        """M of each term, by name."""
        return {name: term.matrix(at_least_float32(q), at_least_float32(k)) for name, term, q, k in self.inputs(x)}

    def matrix(self, x):
        return sum(self.matrices(x).values())

    def state_size(self, t):
        shared = () if self.n_kv_heads == self.n_heads else (self.n_kv_heads,)
        return sum(term.size(t, self.n_heads, self.dims[name], self.e, *shared) for name, term in self.terms().items())


class Based(LookBack):
    """Based [Ar24] in one layer: Taylor linear attention to all tokens plus softmax attention to the last `window`, of
    the same values (the authors alternate the two: train.py's pattern based_layers). As in the paper only the window is
    told positions.

    feature_dim: f, to which q and k are projected for the linear part. window: w tokens, itself among them. packed:
    keep each product of features once (f = 16: 153 features, not 273). feature_dim=None or window=None leaves that part
    out. ValueError for sizes that do not fit. (The authors' window of 128 is 65 tokens, nearly the 64 here: they hand
    window_size // 2 to flash-attention, which sees one more.)"""
    forms = ("chunked", "parallel", "recurrent", "triton")
    rotary = ("window",)

    def __init__(self, d_model, n_heads=4, feature_dim=16, window=64, packed=True):
        if feature_dim is None and window is None:
            raise ValueError("feature_dim and window are both None: nothing is left to look back with")
        for name, size in (("feature_dim", feature_dim), ("window", window)):
            if size is not None and size < 1:
                raise ValueError(f"{name} {size} is below 1; None leaves that part out")
        dims = {"linear": feature_dim, "window": window and head_dim(d_model, n_heads)}
        super().__init__(d_model, n_heads, {name: d for name, d in dims.items() if d})
        self.window, self.packed = window, packed
        if not packed or (feature_dim or 0) > 24 or self.e > 256:                # more than the kernels hold on chip
            self.forms = type(self).forms[:-1]

    def terms(self):
        terms = {"linear": Taylor(self.packed), "window": Window(self.window)}
        return {name: terms[name] for name in self.dims}

    def step(self, x_t, state):
        """On a GPU both parts are one kernel, kernels/step.py, if the window is small enough to be held on chip."""
        x = x_t[:, None]
        fused = len(self.dims) == 2 and self.window <= 128 and not torch.is_grad_enabled()
        if pick_form(self, x) != "triton" or not fused:
            return super().step(x_t, state)
        from kernels.step import based_step
        start, S, past = state
        (q, k), (q_window, k_window) = ((q[:, :, 0], k[:, :, 0]) for _, _, q, k in self.inputs(x, start))
        o, S, *past = based_step(q, k, self.values(x)[:, :, 0], S, q_window, k_window, *past, self.window)
        return self.output(o[:, :, None], x)[:, 0], [start + 1, S, tuple(past)]


class Scatterbrain(LookBack):
    """Scatterbrain [C21]: softmax's own weights on a support, Performer's estimate of them elsewhere, one normaliser.
    The support is the last `window` tokens, or, with top=k, the k largest scores: then no key can be forgotten, and
    the state grows. m: random features. (The authors' support is two-sided, and found by hashing.)"""
    rotary = ("both",)

    def __init__(self, d_model, n_heads=4, window=64, top=None, m=64):
        for name, size in (("window", window), ("top", 1 if top is None else top), ("m", m)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, not {size!r}")
        super().__init__(d_model, n_heads, {"both": head_dim(d_model, n_heads)})
        self.window, self.top = window, top
        self.register_buffer("W", orthogonal_gaussian(m, self.e))

    def terms(self):
        return {"both": scatterbrain(self.W, self.top or self.window, self.top is not None)}


class Hedgehog(nn.Module):
    """Lesson 02's [softmax(Wx), softmax(-Wx)] [Z24, eq. 6], W learned for each head, the identity at first."""

    def __init__(self, d, n_heads):
        super().__init__()
        self.W = nn.Parameter(torch.eye(d).repeat(n_heads, 1, 1))                            # (h, d, d)

    def forward(self, x):
        x = x @ self.W.mT.to(x.dtype)
        return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1)


class LoLCATs(LookBack):
    """LoLCATs' hybrid [Zh25]: softmax to the last `window` tokens, Hedgehog's feature map [Z24] to all before them, in
    one normaliser; and softmax to the `first` tokens of the text too, where a trained model keeps its attention when it
    has nothing to look for [X24]. It is what a pretrained attention is turned into (experiments/conversion.py):
    n_kv_heads heads of keys and values are shared by groups of heads. gamma, for each head, starts at 0.1.
    Differs: the first tokens are ours; first=0 is the paper's."""
    rotary = ("both",)

    def __init__(self, d_model, n_heads=4, window=64, first=4, n_kv_heads=None):
        if window < 1 or first < 0:
            raise ValueError(f"window {window} must be at least 1, first {first} at least 0")
        d = head_dim(d_model, n_heads)
        super().__init__(d_model, n_heads, {"both": d}, n_kv_heads)
        self.window, self.first = window, first
        self.phi_q, self.phi_k = Hedgehog(d, n_heads), Hedgehog(d, n_heads)
        self.gamma = nn.Parameter(torch.full((n_heads, 1, 1), math.log(0.1 / 0.9)))          # its sigmoid is 0.1
        self.gamma.optim = {"weight_decay": 0.0}

    def terms(self):
        features = 2 * self.dims["both"]
        return {"both": SparsePlusLowRank(self.phi_q, self.phi_k, features, self.window, first=self.first,
                                          gamma=at_least_float32(self.gamma).sigmoid())}


class RepeatAttention(nn.Module):
    """Zoology's input-dependent sparse attention [Ar23, eq. 3]: softmax attention for the tokens that occurred before,
    zero for the others: what a convolution can't do, and only where it is needed. (The paper's learned selection
    takes the highest-scored tokens of a whole text, which is not causal.)

    Which tokens are equal is read from ids: (b, t), an argument more for every method. Without ids, rows of x that are
    equal to the bit count as the same token. Keys and values of all tokens stay in the state."""
    forms = ("parallel", "recurrent")
    causal = True
    reads = ("ids",)

    def __init__(self, d_model, n_heads=4):
        super().__init__()
        self.n_heads, d = n_heads, head_dim(d_model, n_heads)
        if d % 2:
            raise ValueError(f"rotary positions turn pairs: the head dim d_model / n_heads = {d} is odd")
        self.qkv, self.out = linear(d_model, 3 * d_model), linear(d_model, d_model)

    def project(self, x, start=0):
        qk, v = split_heads(self.qkv(x), 3 * self.n_heads).split([2 * self.n_heads, self.n_heads], dim=1)
        return *rope(qk, start).chunk(2, dim=1), v                                           # (b, h, t, d) each

    def attend(self, q, k, v, ids):
        """Rows of softmax(Q K^T / sqrt(d)) V for the repeated ones of the last t tokens alone. ids: (b, s)."""
        repeated = repeats(ids)[:, -q.shape[2]:]                                             # (b, t)
        n = int(repeated.sum(dim=1).max())
        rows = (~repeated).int().argsort(dim=1, stable=True)[:, :n]                          # the repeated ones first
        index = rows[:, None, :, None].expand(-1, self.n_heads, -1, q.shape[3])
        see = rows[:, None, :, None] + k.shape[2] - q.shape[2] >= torch.arange(k.shape[2], device=q.device)
        scores = (q.gather(2, index) * q.shape[3] ** -0.5) @ k.mT                            # (b, h, n, s)
        o = scores.masked_fill(~see, -torch.inf).softmax(dim=-1) @ v
        o = o * repeated.gather(1, rows)[:, None, :, None]                                   # rows that fill up
        return torch.zeros_like(q).scatter(2, index, o.to(q.dtype))

    def forward(self, x, form=None, ids=None):
        ids = hash_rows(x) if ids is None else ids
        if pick_form(self, x, form) == "parallel":
            return self.output(self.attend(*self.project(x), ids), x)
        y, state = [], self.init_state(len(x))
        for i in range(x.shape[1]):
            y_t, state = self.step(x[:, i], state, ids[:, i])
            y.append(y_t)
        return torch.stack(y, dim=1)

    def init_state(self, batch_size):
        empty = self.qkv.weight.new_zeros(batch_size, self.n_heads, 0, self.qkv.in_features // self.n_heads)
        return empty, empty, torch.zeros(batch_size, 0, dtype=torch.long, device=empty.device)

    def prefill(self, x, state=None, ids=None):
        pick_form(self, x)
        k, v, seen = self.init_state(len(x)) if state is None else state
        q, *new = self.project(x, seen.shape[1])
        k, v = (torch.cat([old, y], dim=2) for old, y in zip((k, v), new, strict=True))
        seen = torch.cat([seen, hash_rows(x) if ids is None else ids], dim=1)
        return self.output(self.attend(q, k, v, seen), x), (k, v, seen)

    def step(self, x_t, state, ids=None):
        """Has the token been seen? Then attend to everything kept."""
        k, v, seen = state
        q, *new = self.project(x_t[:, None], seen.shape[1])
        k, v = (torch.cat([old, y], dim=2) for old, y in zip((k, v), new, strict=True))
        ids = hash_rows(x_t) if ids is None else ids
        again = (seen == ids[:, None]).any(dim=1)
        o = ((q * q.shape[3] ** -0.5) @ k.mT).softmax(dim=-1) @ v * again[:, None, None, None]
        return self.output(o, x_t)[:, 0], (k, v, torch.cat([seen, ids[:, None]], dim=1))

    def values(self, x, ids=None):
        return self.project(x)[2]

    def output(self, o, x):
        return self.out(join_heads(o))

    def matrix(self, x, ids=None):
        q, k, _ = self.project(x)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        M = ((q * q.shape[3] ** -0.5) @ k.mT).masked_fill(future, -torch.inf).softmax(dim=-1)
        return M * repeats(hash_rows(x) if ids is None else ids)[:, None, :, None]

    def state_size(self, t):
        return 2 * self.out.in_features * t


def repeats(ids):
    """Did this token occur before? (b, t) -> (b, t) bool"""
    return (ids[:, :, None] == ids[:, None, :]).tril(-1).any(dim=-1)


GOLDEN = -7046029254386353131        # 2^64 / golden ratio as a signed number, Knuth's multiplicative hash


def hash_rows(x):
    """Equal rows, equal number: the bits of each row of x: (..., c) as a 64-bit linear hash (...)."""
    bits = x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).long()
    odd = 2 * torch.arange(x.shape[-1], device=x.device) + 1
    return (bits * (odd * GOLDEN)).sum(dim=-1)         # wraps around, as a hash should


# ---------------------------------------------------------------------------------------------------------------- tasks


def mqar(batch_size=32, generator=None, length=64, n_pairs=4, vocab_size=8192, filler=False, power=0.01, easy=0.0,
         progress=1.0):
    """Multi-query associative recall [Ar23, section 3 and code]: n_pairs of key and value, then every key once more
    somewhere, where its value is asked for. Keys are of the lower half of the vocabulary, values of the upper, all
    different. The query of a key stands 2 g tokens after the pairs, p(g) ~ (g + 1)^(power - 1): mostly early, as words
    come back in text. In between is token 0, or, with filler, random tokens. While progress, the share of the training
    that is done, is below `easy`, there is only a quarter of the pairs, but 4 (the authors, too, go from easy to hard).
    Returns ids and targets, (b, length) int64; -100 where nothing is asked."""
    n_pairs = min(n_pairs, max(4, n_pairs // 4)) if progress < easy else n_pairs
    places, half = (length - 2 * n_pairs) // 2, vocab_size // 2
    if length % 2 or places < n_pairs or half - 1 < n_pairs:
        raise ValueError(f"mqar needs an even length of at least 4 n_pairs, and vocab_size // 2 above n_pairs; not "
                         f"length {length}, n_pairs {n_pairs}, vocab_size {vocab_size}")

    def different(n):
        """n_pairs different numbers below n in each row, in any order: of j + 1 numbers one is drawn, or, if the row
        has it, the new one, j [Be87]."""
        drawn = torch.full((batch_size, n_pairs), -1)
        for i, j in enumerate(range(n - n_pairs, n)):
            x = torch.randint(j + 1, (batch_size, 1), generator=generator)
            drawn[:, i:i + 1] = x.where((drawn != x).all(dim=1, keepdim=True), j)
        return drawn.gather(1, torch.rand(batch_size, n_pairs, generator=generator).argsort(dim=1))

    keys, values = 1 + different(half - 1), half + different(vocab_size - half)
    chance = torch.arange(1, places + 1, dtype=torch.float64) ** (power - 1)
    gaps = torch.multinomial(chance.expand(batch_size, -1), n_pairs, generator=generator)
    ids = torch.zeros(batch_size, length, dtype=torch.long)
    if filler:
        ids = torch.randint(vocab_size, ids.shape, generator=generator)
    ids[:, 0:2 * n_pairs:2], ids[:, 1:2 * n_pairs:2] = keys, values
    queries = 2 * n_pairs + 2 * gaps
    targets = torch.full_like(ids, -100).scatter(1, queries, values)
    return ids.scatter(1, queries, keys), targets


def associative_recall(batch_size=32, generator=None, length=63, vocab_size=8192):
    """What was asked before MQAR: pairs of key and value fill the text, one key is asked for, at the end. A model can
    get this right by preparing for a single lookup; a text asks for many, anywhere, with many tokens to tell apart."""
    n_pairs, half = (length - 1) // 2, vocab_size // 2
    if length < 3 or length % 2 == 0 or half < n_pairs:
        raise ValueError(f"associative_recall needs an odd length from 3 on, pairs and a query, and vocab_size // 2 "
                         f"not below length // 2; not length {length}, vocab_size {vocab_size}")
    keys, values = (torch.rand(batch_size, half, generator=generator).topk(n_pairs, dim=1).indices for _ in range(2))
    asked = torch.randint(n_pairs, (batch_size, 1), generator=generator)
    pairs = torch.stack([keys, half + values], dim=2).flatten(1)
    targets = torch.full((batch_size, length), -100)
    targets[:, -1:] = half + values.gather(1, asked)
    return torch.cat([pairs, keys.gather(1, asked)], dim=1), targets


# The settings that have names: length and pairs in Zoology's Figure 2 [Ar23]; with random filler in Based's [Ar24].
MQAR_SETTINGS = {f"mqar_{n}": dict(length=n, n_pairs=k) for n, k in ((64, 4), (128, 8), (256, 16), (512, 64))}
MQAR_SETTINGS |= {f"mqar_based_{n}": dict(length=n, n_pairs=n // 4, filler=True) for n in (64, 128, 256, 512, 1024)}
MIXERS = {"baseconv": BaseConv, "baseconv_short": BaseConvShort, "short_conv": ShortConv, "based": Based,
          "scatterbrain": Scatterbrain, "lolcats": LoLCATs, "repeat_attention": RepeatAttention}
TASKS = {"mqar": mqar, "associative_recall": associative_recall}
TASKS |= {name: partial(mqar, **setting) for name, setting in MQAR_SETTINGS.items()}

# Layers in a row, as published models repeat them: names that train.py's --mixer takes.
PATTERNS = {
    "based_layers": "short_conv,taylor,window,short_conv,short_conv",                        # [Ar24], 360M
    "zoology_hybrid": "baseconv,repeat_attention",                                           # [Ar23]
    "stripedhyena": "modal,attention",                                                       # 7B: strictly in turn
    "griffin": "rglru,rglru,window",                                                         # [De24]
    "samba": "mamba,window",                                                                 # [R24]
    "jamba": "mamba,mamba,mamba,mamba,attention,mamba,mamba,mamba",                          # [L24]
}


# ------------------------------------------------------------------------------------------------- the theory, executed


def set_weights(layer, W=0.0, b1=0.0, h=0.0, b2=0.0):
    """Fill a BaseConv by hand: numbers, or tensors of the parameters' shapes; W as in u W."""
    with torch.no_grad():
        for p, value in ((layer.gate.weight, W), (layer.gate.bias, b1), (layer.h, h), (layer.b2, b2)):
            p.copy_(torch.as_tensor(value, dtype=p.dtype).mT if p is layer.gate.weight and torch.is_tensor(value)
                    else torch.as_tensor(value, dtype=p.dtype))
    return layer


def taps_at(lags, n):
    """Filters that only shift: channel i by lags[i]. (c, n)"""
    return F.one_hot(torch.as_tensor(lags), n).double()


def hadamard_layer(d):
    """A BaseConv of width 2d that takes [a, b] to [a * b, 0]."""
    W = torch.zeros(2 * d, 2 * d)
    W[d:, :d] = torch.eye(d)                                                     # the gate of a is b
    return set_weights(BaseConv(2 * d, taps=1), W=W, h=1.0)


def convolution_layer(K):
    """A BaseConv that convolves with K: (c, taps), and does nothing else."""
    return set_weights(BaseConv(*K.shape[:1], taps=K.shape[1]), b1=1.0, h=K)


def degree(f, d_model, t=16, points=48):
    """The degree of f(x): (1, t, c) -> (1, t, c) as a polynomial: that of s -> f(s x) for a random x, by interpolation
    in Chebyshev polynomials. `points` - 1 stands for no polynomial."""
    x = torch.randn(1, t, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = np.polynomial.chebyshev.chebpts1(points)
    with torch.no_grad():
        y = np.stack([f(si * x).flatten().numpy() for si in s])                  # (points, t c)
    coefficients = np.abs(np.polynomial.chebyshev.chebvander(s, points - 1).T @ y).max(axis=1)
    return int(np.nonzero(coefficients > 1e-9 * coefficients.max())[0].max())


def mqar_by_convolutions(length, vocab_size):
    """Three hand-set BaseConv layers that solve MQAR: ids (b, t) -> logits (b, t, v), and their width. For each lag l <
    length there are three blocks of v channels: q_l = x_t, k_l = x_{t-l}, v_l = x_{t-l+1}, one-hot. Layer 1 gathers
    them, layer 2 multiplies q_l k_l, layer 3 lets v_l pass where that is not 0. The width, 3 (length - 1) v, grows with
    the length: a convolution needs a channel for each distance from which something is to be recalled."""
    n, v = length - 1, vocab_size
    width, lags = 3 * n * v, torch.arange(1, length).repeat_interleave(v)
    q, k, values = (slice(i * n * v, (i + 1) * n * v) for i in range(3))
    still = taps_at(torch.zeros(width, dtype=torch.long), length)
    gather, compare, select = (BaseConv(width, taps=length) for _ in range(3))
    set_weights(gather, b1=1.0, h=taps_at(torch.cat([0 * lags, lags, lags - 1]), length))
    W, ones = torch.zeros(width, width), torch.zeros(width)
    W[k, q], ones[values] = torch.eye(n * v), 1.0                                # gate of q_l: k_l; of v_l: 1
    set_weights(compare, W=W, b1=ones, h=still)
    W = torch.zeros(width, width)
    W[q, values] = torch.block_diag(*[torch.ones(v, v)] * n)                     # gate of v_l: the sum over q_l k_l
    set_weights(select, W=W, h=still)

    def model(ids):
        x = F.one_hot(ids, v).to(gather.h.dtype).repeat(1, 1, 3 * n)                         # (b, t, width)
        return select(compare(gather(x)))[..., values].unflatten(-1, (n, v)).sum(dim=2)
    return model, width


def mqar_by_attention(vocab_size):
    """One shift and one attention head that solve MQAR, hand-set: token i is the binary number i in signs; a BaseConv
    sets the token before beside it; the head looks for the place whose token before is the one here, and takes what
    stands there. Width 2 log2 v, for any length."""
    bits = math.ceil(math.log2(vocab_size))
    code = 2.0 * (torch.arange(vocab_size)[:, None] >> torch.arange(bits) & 1) - 1           # (v, bits)
    here, before = slice(0, bits), slice(bits, 2 * bits)
    shift = set_weights(BaseConv(2 * bits, taps=2), b1=1.0, h=taps_at([0] * bits + [1] * bits, 2))

    def model(ids):
        x = shift(code[ids].repeat(1, 1, 2))                                                 # (b, t, 2 bits)
        scores = 20 * x[..., here] @ x[..., before].mT
        future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ x[..., here] @ code.T
    return model, 2 * bits


def accuracy(model, ids, targets):
    with torch.no_grad():
        return (model(ids).argmax(dim=-1) == targets)[targets != -100].double().mean().item()


def best_readout(states, answers):
    """The lower bound [Ar24, theorem 3.1], run. states: (memories, n), what a recurrent model is left with for
    each memory that it may have read; answers: (memories, questions). Memories with equal states get equal answers,
    whatever reads the state: the best share of right answers, and the number of different states."""
    groups = torch.unique(states, dim=0, return_inverse=True)[1]
    right = sum(F.one_hot(answers[groups == g]).sum(dim=0).amax(dim=-1).sum() for g in groups.unique())
    return right.item() / answers.numel(), len(groups.unique())


def quantised_memory(d, levels, n_pairs=3, n_values=8):
    """best_readout for linear attention with finite numbers: S = sum_i k_i v_i^T over every way to give n_pairs keys
    one of n_values values, k_i random of d numbers, v_i a binary code, each number of S rounded to one of `levels`."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(n_pairs, d, generator=generator)
    answers = torch.cartesian_prod(*[torch.arange(n_values)] * n_pairs)                      # (memories, n_pairs)
    code = 2.0 * (answers[..., None] >> torch.arange(round(math.log2(n_values))) & 1) - 1    # (memories, n_pairs, e)
    S = torch.einsum("pd,mpe->mde", k, code).flatten(1)
    S = ((S - S.min()) / (S.max() - S.min()) * (levels - 1)).round()
    return *best_readout(S, answers), S.shape[1] * math.log2(levels), n_pairs * math.log2(n_values)


def scatterbrain_errors(scale, top=8, n=64, d=16, m=32, seeds=10):
    """Distance (Frobenius) to softmax(Q K^T / sqrt(d)) of its low-rank estimate, of its `top` largest weights in each
    row, and of Scatterbrain with both, for q, k ~ N(0, scale^2)."""
    errors = torch.zeros(3, dtype=torch.float64)
    for seed in range(seeds):
        torch.manual_seed(seed)
        q, k = (scale * torch.randn(n, d, dtype=torch.float64) for _ in range(2))
        scores, W = q @ k.T / d ** 0.5, orthogonal_gaussian(m, d)
        low_rank = favor(q, W) @ favor(k, W).T
        support = scores >= scores.topk(top).values[:, -1:]
        sparse = torch.where(support, scores.exp(), 0)
        for i, A in enumerate((low_rank, sparse, torch.where(support, scores.exp(), low_rank))):
            errors[i] += (A / A.sum(dim=1, keepdim=True) - scores.softmax(dim=1)).norm() / seeds
    return errors.tolist()


# ------------------------------------------------------------------------------------------------------------ plumbing


def pick_form(mixer, x, form=None):
    """The form to run: the one asked for, or the fastest on x's device. Raises ValueError if the mixer lacks it, if it
    cannot run there, or if x is not (b, t, c) with t >= 1."""
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be (batch, time, width) with at least one of each, not {tuple(x.shape)}")
    if form is None:
        autocast = x.dtype == torch.float32 and torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype    # float16 could not hold a long text's sums
        if x.is_cuda and dtype == torch.bfloat16 and KERNELS and "triton" in mixer.forms:
            return "triton"
        slow = ("recurrent",) if x.is_cuda or torch.compiler.is_compiling() else ()      # many launches, or much code
        return ([form for form in mixer.forms if form not in slow] or mixer.forms)[0]
    if form not in mixer.forms:
        raise ValueError(f"{type(mixer).__name__} has no form {form!r}; it has {', '.join(mixer.forms)}")
    if form == "triton" and (x.dtype == torch.float64 or not (x.is_cuda or os.environ.get("TRITON_INTERPRET"))):
        raise ValueError("the form 'triton' needs a GPU (or TRITON_INTERPRET=1, to try it), and does not do float64")
    return form


# ------------------------------------------------------------------------------------------------------ look and check


def timed(f, *args, **more):
    """f's result, and its time in milliseconds: the shortest of up to five calls within a quarter of a second."""
    times = []
    while not times or len(times) < 5 and sum(times) < 0.25:
        start = time.perf_counter()
        y = f(*args, **more)
        times.append(time.perf_counter() - start)
    return y, 1e3 * min(times)


def compare_forms(t=256, d_model=64):
    """Print the time of every form of every mixer, and the largest difference between every two of them."""
    torch.manual_seed(0)
    x, ids = torch.randn(2, t, d_model, dtype=torch.float64), torch.randint(9, (2, t))
    print(f"{'mixer':18}{'form':11}{'time':>10}   largest difference from the forms above (float64, t = {t})")
    with torch.no_grad():
        for name, make in MIXERS.items():
            mixer, done = make(d_model).double(), {}
            reads = {"ids": ids} if hasattr(mixer, "reads") else {}
            for form in (form for form in mixer.forms if form != "triton"):
                y, ms = timed(mixer, x, form, **reads)
                gaps = "   ".join(f"{other} {(y - z).abs().max():.0e}" for other, z in done.items())
                print(f"{'' if done else name:18}{form:11}{ms:>7.1f} ms   {gaps}")
                done[form] = y


def print_theory(vocab_size=16, n_pairs=4):
    print("\nMQAR by hand, nothing trained (16 tokens, 4 pairs)       length    width   accuracy")
    for length in (16, 24, 32):
        batch = mqar(64, torch.Generator().manual_seed(0), length, n_pairs, vocab_size)
        for name, (model, width) in {"three BaseConv layers": mqar_by_convolutions(length, vocab_size),
                                     "a shift and an attention head": mqar_by_attention(vocab_size)}.items():
            print(f"    {name:51}{length:8}{width:9}{accuracy(model, *batch):11.2%}", flush=True)
    print("\nDegree as a polynomial of the input (attention is none: the highest degree that was tried)")
    for n in range(1, 4):
        torch.manual_seed(n)
        layers = nn.Sequential(*(BaseConv(4, taps=16) for _ in range(n))).double()
        print(f"    {n} BaseConv layers    degree {degree(layers, 4)}")
    print(f"    attention            degree {degree(Based(4, 1, feature_dim=None).double(), 4)}")
    print("\nThree keys, eight values: 9 bits. What can be read, at best, from linear attention's S in finite numbers?")
    print(f"    {'d':>2}  {'levels':>6}  {'bits of S':>9}  {'different states of 512':>24}  {'best accuracy':>13}")
    for d, levels in ((1, 2), (1, 4), (1, 16), (2, 2), (2, 4), (3, 2), (3, 4), (4, 4)):
        best, n_states, bits, _ = quantised_memory(d, levels)
        print(f"    {d:>2}  {levels:>6}  {bits:>9.0f}  {n_states:>24}  {best:>13.1%}")
    print("\nScatterbrain: distance from softmax by size of q and k   low rank    largest 8       both")
    for scale in (0.5, 1.0, 1.5, 3.0):
        print(f"    {scale:<51}" + "".join(f"{error:11.3f}" for error in scatterbrain_errors(scale)))


def plot(path, text="to be or not to be that is the question so to be or not to be is what we ask"):
    """Above: e^x, its Taylor polynomial, and the weights that follow. Below: Based's matrix, part by part, for a line
    of words. q and k are set equal, so that equal words attract each other."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    torch.manual_seed(0)
    figure = plt.figure(figsize=(17, 9.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    ax1, ax2, ax3 = above.subplots(1, 3)
    s = torch.linspace(-3, 3, 200)
    ax1.plot(s, s.exp(), label="exp(s): softmax")
    ax1.plot(s, 1 + s + s * s / 2, label="1 + s + s²/2: Taylor, never below 1/2")
    ax1.plot(s, 1 + s, lw=0.8, label="1 + s")
    ax1.set(xlabel="s = q . k / sqrt(d)", ylim=(-2, 12), title="The exponential and its second-order series")
    ax1.legend()
    q, k = 1.3 * torch.randn(16), 1.3 * torch.randn(64, 16)
    scores = k @ q / 16 ** 0.5
    order = scores.argsort(descending=True)
    for name, w in {"softmax": scores.exp(), "Taylor": taylor(k) @ taylor(q),
                    "elu + 1, lesson 02's first": (F.elu(k) + 1) @ (F.elu(q) + 1)}.items():
        ax2.plot((w / w.sum())[order], ".-", label=name)
    ax2.set(xlabel="64 random keys, by their score with a query", ylabel="weight", title="The weights that follow")
    ax2.legend()
    scales = torch.linspace(0.25, 3, 12)
    errors = torch.tensor([scatterbrain_errors(scale.item(), seeds=3) for scale in scales])
    for name, e in zip(("low rank", "8 largest of 64", "Scatterbrain: both"), errors.T, strict=True):
        ax3.plot(scales, e, ".-", label=name)
    ax3.set(xlabel="size of q and k", ylabel="distance from softmax", title="Scatterbrain: sparse and low rank")
    ax3.legend()
    words = text.split()
    ids = torch.tensor([[sorted(set(words)).index(w) for w in words]])
    x = F.normalize(torch.randn(ids.max() + 1, 64), dim=-1)[ids] * 8               # a random vector for each word
    based, brain = Based(64, 1, feature_dim=64, window=5), Scatterbrain(64, 1, window=5, m=256)
    with torch.no_grad():
        for layer in (*based.qk.values(), *brain.qk.values()):
            layer.weight[:] = torch.eye(64).repeat(2, 1) * 0.55
        parts = based.matrices(x)
        shown = {"linear part: Taylor, far": parts["linear"], "window part: the last 5": parts["window"],
                 "Based: their sum": based.matrix(x), "Scatterbrain: one normaliser": brain.matrix(x)}
        for ax, (title, M) in zip(below.subplots(1, 4), shown.items(), strict=True):
            ax.imshow(M[0, 0], cmap="Reds", vmin=0, vmax=0.6)
            ax.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
            ax.set_yticks(range(len(words)), words, fontsize=8)
            ax.set_title(title)
    figure.savefig(path, dpi=80)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lesson 04: recall, Based.")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the Taylor series and the mixing matrices instead")
    args = parser.parse_args()
    if args.plot:
        try:
            plot(args.plot)
        except (OSError, ValueError) as e:               # a folder that is not there, an ending that is no picture's
            parser.error(f"--plot {args.plot}: {e}")
    else:
        first()
        compare_forms()
        print_theory()

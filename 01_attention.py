"""Lesson 01. Attention: every token looks at every earlier token, and pays for it.

    y_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(d)) v_s

Read as a matrix it is Y = M V with M = softmax(Q K^T / sqrt(d)), a t x t matrix that depends on the input: quadratic
time, but any token can be recalled exactly. Read token by token it is a cache of keys and values that grows without
end. Read in blocks (FlashAttention) the matrix never exists: a running maximum and a running sum are enough. All three
compute the same numbers. Every later lesson keeps Y = M V, and asks for an M whose state does not grow.

Papers  [V17]  Vaswani et al. 2017, Attention Is All You Need            arXiv:1706.03762
        [D22]  Dao et al. 2022, FlashAttention                           arXiv:2205.14135
        [D23]  Dao 2023, FlashAttention-2                                arXiv:2307.08691
        [MG18] Milakov, Gimelshein 2018, Online normalizer for softmax   arXiv:1805.02867
        [S21]  Su et al. 2021, RoFormer: rotary position embedding       arXiv:2104.09864
        [Ai23] Ainslie et al. 2023, GQA: grouped keys and values         arXiv:2305.13245
        [Qiu25] Qiu et al. 2025, Gated attention                         arXiv:2505.06708
        [B20]  Beltagy et al. 2020, Longformer: sliding window           arXiv:2004.05150
        [W20]  Wang et al. 2020, Linformer                               arXiv:2006.04768
        [Aky24] Akyurek et al. 2024, In-Context Language Learning        arXiv:2401.12973
        [Ol22] Olsson et al. 2022, Induction heads                       arXiv:2209.11895

Axes    b batch, t time (target), s source, h head, g group of heads that share keys and values, d key dim,
        e value dim, c model width, w window, n order of an n-gram.
Letters here are the papers': M the mixing matrix (P in [D22]), S scores, m, l a row's maximum and sum, L = m + log2 l,
        D = rowsum(dO * O); E, F Linformer's projections; A, W_0, W_1 of [Aky24]. W_Q, W_K, W_V, W_O are qkv and out.

mixer      forms                          training cost   state per sequence
attention  chunked parallel recurrent     t^2             2 g d t   (the KV cache grows)
window     chunked parallel recurrent     t w             2 g d w   (a ring of w slots)
linformer  parallel                       t k             none: not causal, so it cannot generate
ngram      parallel recurrent             t^2 compares    one sum of values per n-gram seen, at most n t (c + 1)
(attention and window also triton: one kernel, the default on a GPU in bfloat16)

    python 01_attention.py                    every form against every other, and the time of each
    python 01_attention.py --plot FILE.png    the mixing matrices M
"""
import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

LOG2E = 1.4426950408889634
KERNELS = Path(__file__).with_name("kernels").is_dir()       # a lesson also runs alone, without its kernels
NO_FLOAT64 = {"mps"}                                         # devices that have no float64


def first():
    """The lesson on four tokens, A c B A, with d = e = 2: what followed A? A token asks for itself (q); what it
    says is itself (v), and that lies under the token that stood before it (k). Prints and returns q, k, v, M, M V."""
    A, B, c, nothing = (2.0, 0.0), (0.0, 2.0), (-1.0, -1.0), (0.0, 0.0)
    q = v = torch.tensor([A, c, B, A])                           # (t, d), (t, e)
    k = torch.tensor([nothing, A, c, B])                         # (t, d)
    root = 2 ** 0.5                                              # the square root of d

    # All at once: every query with every key, no key of a later token, rows that sum to 1.
    scores = q @ k.T / root                                      # (t, s)
    future = torch.ones(4, 4).triu(1) == 1
    M = scores.masked_fill(future, -torch.inf).softmax(dim=1)    # (t, s)
    parallel = M @ v                                             # (t, e)

    # Token by token: the state is a list of keys and values, and it grows.
    keys, values, recurrent = [], [], []
    print("four tokens, A c B A: the state after each is all keys and values so far")
    for t in range(4):
        keys.append(k[t])
        values.append(v[t])
        weights = (torch.stack(keys) @ q[t] / root).softmax(dim=0)                   # (s,)
        recurrent.append(weights @ torch.stack(values))
        print(f"    {'AcBA'[t]}  {len(keys) * 4:2} numbers: keys {torch.stack(keys).int().tolist()}")

    # In blocks of two: for each token a largest score m so far, and two sums in units of e^m.
    chunked = []
    for t in range(4):
        m, l, o = torch.tensor(-1e30), torch.tensor(0.0), torch.zeros(2)
        for block in (slice(0, 2), slice(2, 4)):
            s = scores[t, block].masked_fill(future[t, block], -torch.inf)
            new = torch.maximum(m, s.max())
            p, shrink = (s - new).exp(), (m - new).exp()
            m, l, o = new, shrink * l + p.sum(), shrink * o + p @ v[block]
        chunked.append(o / l)

    assert torch.allclose(parallel, torch.stack(recurrent)) and torch.allclose(parallel, torch.stack(chunked))
    print("    M                           M V = the loop = the blocks")
    for row, y, token in zip(M.tolist(), parallel.tolist(), "AcBA", strict=True):
        print(f"    {token} " + "".join(f"{x:6.2f}" for x in row) + "   " + "".join(f"{x:7.2f}" for x in y))
    print(f"    the last A gives c, which followed the first A, the weight {M[3, 1]:.2f}\n")
    return q, k, v, M, parallel


# --------------------------------------------------------------------------------------- softmax attention, three forms
#
# All of them take q: (b, h, t, d), k: (b, g, s, d), v: (b, g, s, e) where g divides h, and return (b, h, t, e).
# s >= t: the last target stands at the last source, so earlier sources are a cache. `window` w: a target sees w
# sources, itself among them. `real`: (b, s) bool, False where a source is padding. A target that sees nothing gets 0.


def visible(t, s, window=None, real=None, device=None, rows=slice(None), cols=slice(None)):
    """May a target see a source? (t, s) bool, or (b, 1, t, s) with padding; rows and cols cut a tile out of it."""
    distance = torch.arange(s - t, s, device=device)[rows, None] - torch.arange(s, device=device)[cols]
    see = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return see if real is None else see & real[:, None, None, cols]


def hide(scores, see, value):
    """scores where see, `value` (as good as -inf) elsewhere."""
    return scores.masked_fill(~see, value)


def share_groups(k, n_heads):
    """Repeat each key (or value) head for the h / g query heads that share it: (b, g, s, d) -> (b, h, s, d)."""
    return k if k.shape[1] == n_heads else k.repeat_interleave(n_heads // k.shape[1], dim=1)


def attention_weights(q, k, window=None, real=None):
    """The mixing matrix M = softmax(Q K^T / sqrt(d)) [V17, eq. 1], zero where a target may not look: (b, h, t, s)."""
    see = visible(q.shape[2], k.shape[2], window, real, q.device)
    scores = (q * q.shape[-1] ** -0.5) @ share_groups(k, q.shape[1]).mT                                # (b, h, t, s)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = hide(scores, see, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights if real is None else weights * see        # with padding, a target may have nothing to see


def parallel_attention(q, k, v, window=None, real=None):
    """M V with M written out: the definition. O(t s) memory."""
    return attention_weights(q, k, window, real).to(v.dtype) @ share_groups(v, q.shape[1])


def tiles(t, s, window, chunk):
    """Blocks of sources, each with the targets that can see some of them: what a causal, banded M leaves to do."""
    past = s - t
    for j in range(0, s, chunk):
        end = min(j + chunk, s)
        rows = slice(max(0, j - past), t if window is None else min(t, end - 1 + window - past))
        if rows.start < rows.stop:
            yield rows, slice(j, end)


class FlashAttention(torch.autograd.Function):
    """FlashAttention [D22; D23] in PyTorch: M is made a tile at a time and never kept, not even for the gradient: O(t)
    memory. Scores are S = log2(e) Q K^T / sqrt(d), because 2^x is faster than e^x."""

    @staticmethod
    def tile_scores(q, k, rows, cols, window, real):
        scores = (q[:, :, rows] * (q.shape[-1] ** -0.5 * LOG2E)) @ k[:, :, cols].mT         # (b, h, rows, cols)
        see = visible(q.shape[2], k.shape[2], window, real, q.device, rows, cols)
        return hide(scores.to(torch.promote_types(q.dtype, torch.float32)), see, -torch.inf)

    @staticmethod
    def forward(ctx, q, k, v, window, real, chunk):
        """For each tile of scores S [D23, algorithm 1; MG18]:
        m' = max(m, rowmax S),   l' = 2^(m - m') l + rowsum 2^(S - m'),   O' = 2^(m - m') O + 2^(S - m') V"""
        acc = torch.promote_types(q.dtype, torch.float32)
        o = q.new_zeros(*q.shape[:3], v.shape[3], dtype=acc)                                 # (b, h, t, e)
        l = q.new_zeros(*q.shape[:3], 1, dtype=acc)                                          # (b, h, t, 1)
        m = torch.full_like(l, torch.finfo(acc).min)     # finite: a tile with nothing to see must not be -inf - (-inf)
        for rows, cols in tiles(q.shape[2], k.shape[2], window, chunk):
            scores = FlashAttention.tile_scores(q, k, rows, cols, window, real)
            m_new = torch.maximum(m[:, :, rows], scores.amax(dim=-1, keepdim=True))
            p = scores.sub_(m_new).exp2_()                                                   # (b, h, rows, cols)
            shrink = torch.exp2(m[:, :, rows] - m_new)
            l[:, :, rows] = shrink * l[:, :, rows] + p.sum(dim=-1, keepdim=True)
            o[:, :, rows] = shrink * o[:, :, rows] + p.to(v.dtype) @ v[:, :, cols]
            m[:, :, rows] = m_new
        l = l.clamp(min=torch.finfo(acc).tiny)
        o = (o / l).to(v.dtype)
        ctx.save_for_backward(q, k, v, o, m + l.log2(), real)    # L = m + log2 l is all that the gradient needs of M
        ctx.window, ctx.chunk = window, chunk
        return o

    @staticmethod
    def backward(ctx, do):
        """[D23, algorithm 2]   P = 2^(S - L),   dV = P^T dO,   dS = P * (dO V^T - D) with D = rowsum(dO * O),
        dQ = dS K / sqrt(d),   dK = dS^T Q / sqrt(d), where dS is the gradient of Q K^T / sqrt(d), that is of S ln 2."""
        q, k, v, o, L, real = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():        # a gradient of the gradient is wanted
            return *gradients(parallel_attention, (q, k, v, ctx.window, real), do), None
        dq, dk, dv = (torch.zeros_like(x, dtype=L.dtype) for x in (q, k, v))
        D = (do * o).sum(dim=-1, keepdim=True, dtype=L.dtype)                                # (b, h, t, 1)
        for rows, cols in tiles(q.shape[2], k.shape[2], ctx.window, ctx.chunk):
            p = FlashAttention.tile_scores(q, k, rows, cols, ctx.window, real).sub_(L[:, :, rows]).exp2_()
            dv[:, :, cols] += p.to(do.dtype).mT @ do[:, :, rows]
            ds = p.mul_(do[:, :, rows] @ v[:, :, cols].mT - D[:, :, rows]).to(q.dtype)
            dq[:, :, rows] += ds @ k[:, :, cols]
            dk[:, :, cols] += ds.mT @ q[:, :, rows]
        scale = q.shape[-1] ** -0.5
        return (dq * scale).to(q.dtype), (dk * scale).to(k.dtype), dv.to(v.dtype), None, None, None


def gradients(f, inputs, grad):
    """The gradients of f(*inputs), as functions that can be differentiated again; None where none is wanted."""
    wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    found = iter(torch.autograd.grad(f(*inputs), wanted, grad, create_graph=True))
    return [next(found) if torch.is_tensor(x) and x.requires_grad else None for x in inputs]


def chunked_attention(q, k, v, window=None, real=None, chunk=128):
    """Blocks of `chunk` sources, joined by the online softmax. O(t) memory; with a window, O(t w) time."""
    return FlashAttention.apply(q, share_groups(k, q.shape[1]), share_groups(v, q.shape[1]), window, real, chunk)


def triton_attention(q, k, v, window=None):
    """The same as one kernel, on a GPU: kernels/flash_attention.py."""
    from kernels.flash_attention import flash_attention
    return flash_attention(q, k, v, window)


def triton_step(q, cache):
    """One target behind a cache, q: (b, h, 1, d), as one kernel: kernels/step.py. No gradients."""
    from kernels.step import attention_step
    return attention_step(q[:, :, 0], cache.k, cache.v, cache.real)[:, :, None]              # (b, h, 1, e)


class Cache(NamedTuple):
    """The keys and values that later tokens may look at. Full attention: all so far, in order. Sliding window: a ring
    of w slots, the key of position p in slot p % w (softmax does not mind the order)."""
    k: torch.Tensor       # (b, g, s, d)
    v: torch.Tensor       # (b, g, s, e)
    real: torch.Tensor    # (b, s) bool: neither padding nor a slot that is still empty
    length: int           # positions seen so far


class Room(NamedTuple):
    """A cache of full attention with empty slots at its end, written in place: for those who generate and do not come
    back to an earlier state. Fields as in Cache."""
    k: torch.Tensor
    v: torch.Tensor
    real: torch.Tensor
    length: int


def append(cache, k, v, real):
    """Full attention: the new keys and values stand behind all others."""
    return Cache(torch.cat([cache.k, k], dim=2), torch.cat([cache.v, v], dim=2), torch.cat([cache.real, real], dim=1),
                 cache.length + k.shape[2])


def overwrite(cache, k, v, real, window):
    """Sliding window: position p goes to slot p % w, over the token that nobody may look at any more."""
    length, n = cache.length + k.shape[2], min(window, k.shape[2])
    slots = (length - n + torch.arange(n, device=k.device)) % window
    return Cache(cache.k.index_copy(2, slots, k[:, :, -n:]), cache.v.index_copy(2, slots, v[:, :, -n:]),
                 cache.real.index_copy(1, slots, real[:, -n:]), length)


def fill(room, k, v, real):
    """Full attention with room: into the next empty slots, in place."""
    slots = room.length + torch.arange(k.shape[2], device=k.device)
    return Room(room.k.index_copy_(2, slots, k), room.v.index_copy_(2, slots, v), room.real.index_copy_(1, slots, real),
                room.length + k.shape[2])


def remember(cache, k, v, real, window=None):
    """The cache after the next positions, k: (b, g, t, d), v: (b, g, t, e), real: (b, t), by one of the three ways."""
    k, v = k.to(cache.k.dtype), v.to(cache.v.dtype)
    if window is not None:
        return overwrite(cache, k, v, real, window)
    return (fill if isinstance(cache, Room) else append)(cache, k, v, real)


def in_order(cache, window=None):
    """The cache with its oldest key first and nothing empty: what a new block of targets is put behind."""
    if window is None:
        kept = slice(cache.length)
    else:
        kept = torch.arange(cache.length - min(cache.length, window), cache.length, device=cache.k.device) % window
    return Cache(cache.k[:, :, kept], cache.v[:, :, kept], cache.real[:, kept], cache.length)


def recurrent_attention(q, k, v, cache, real, window=None):
    """A loop over time: write a key and a value, then read all that the cache holds. Returns (b, h, t, e), cache."""
    o = []
    for i in range(q.shape[2]):
        now = slice(i, i + 1)
        cache = remember(cache, k[:, :, now], v[:, :, now], real[:, now], window)
        o.append(look_up(q[:, :, now], cache))                                               # (b, h, 1, e)
    return torch.cat(o, dim=2), cache


def look_up(q, cache):
    """One target reads all that the cache holds, q: (b, h, 1, d) -> (b, h, 1, e): parallel_attention, with the h / g
    heads that share keys as the rows of one matrix product, so that no key is copied."""
    rows = q.reshape(len(q), cache.k.shape[1], -1, q.shape[3]) * q.shape[3] ** -0.5          # (b, g, h/g, d)
    scores = rows @ cache.k.mT                                                               # (b, g, h/g, s)
    scores, see = scores.to(torch.promote_types(scores.dtype, torch.float32)), cache.real[:, None, None]
    weights = hide(scores, see, torch.finfo(scores.dtype).min).softmax(dim=-1) * see         # 0 where nothing is real
    return (weights.to(cache.v.dtype) @ cache.v).view(*q.shape[:3], -1)


def rope(x, start=0, base=10000.0, theta=None):
    """Rotary positions [S21, eq. 34]: turn the pair (x_i, x_{i + d/2}) at position p by the angle p theta_i, theta_i =
    base^(-2i/d), so that q . k depends on the difference of positions only. (The paper pairs neighbours: the same up
    to the order of the columns of W_Q and W_K.) x: (b, h, t, d), d even; its first position is `start`. theta: other
    angles, (d/2,)."""
    t, d = x.shape[-2:]
    exact = torch.float32 if x.device.type in NO_FLOAT64 else torch.float64
    if theta is None:
        theta = base ** (-torch.arange(0, d, 2, device=x.device, dtype=exact) / d)               # (d/2,)
    theta = torch.as_tensor(theta, device=x.device, dtype=exact)
    angle = (start + torch.arange(t, device=x.device, dtype=exact))[:, None] * theta             # (t, d/2)
    cos, sin = (f(angle).to(torch.promote_types(x.dtype, torch.float32)) for f in (torch.cos, torch.sin))
    return (x * torch.cat([cos, cos], -1) + x.roll(d // 2, -1) * torch.cat([-sin, sin], -1)).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------- mixers
#
# Every mixer of every lesson is y = output(M(x) values(x), x): forward() applies M in a form, matrix() writes it out.


def split_heads(x, n):
    """(b, t, n d) -> (b, n, t, d)"""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def join_heads(x):
    """(b, n, t, d) -> (b, t, n d)"""
    return x.transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    """Causal multi-head softmax attention [V17]; rotary positions [S21]; groups of heads share keys and values [Ai23].

    d_model: width c, a multiple of n_heads. n_kv_heads: g, a divisor of n_heads (default: n_heads). window: how many
    tokens a token sees, itself included (default: all before it). rope: rotate q and k. n_positions: so many positions
    have a learned vector, added to x (default: none); a text cannot be longer. Pretrained models want more. head_dim:
    d (default: d_model / n_heads). qkv_bias, out_bias: biases. qk_norm: the eps of an RMSNorm of each q and each k,
    before they turn (default: no norm); with whole_norm, of all heads' q at once, and k. theta: rope's angles for one
    position, for as many pairs of the first numbers of a head; the others do not turn (default: rope's own, for all).
    gate: what the heads return is multiplied by sigmoid(W x), number by number [Qiu25].
    forward and prefill take real: (b, t) bool, False at padding, which no token then looks at; the kernel knows no
    padding, so there the chunked form runs. ValueError for sizes that do not fit."""
    forms = ("chunked", "parallel", "recurrent", "triton")
    causal = True

    def __init__(self, d_model, n_heads=4, n_kv_heads=None, window=None, rope=True, n_positions=None, head_dim=None,
                 qkv_bias=False, out_bias=False, qk_norm=None, whole_norm=False, theta=None, gate=False):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads < 1 or head_dim is None and d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of n_heads {n_heads}")
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_heads {n_heads} is not a multiple of n_kv_heads {n_kv_heads}")
        if window is not None and window < 1:
            raise ValueError(f"window {window} is below 1: a token sees at least itself")
        d = d_model // n_heads if head_dim is None else head_dim
        if rope and theta is None and d % 2:
            raise ValueError(f"rope turns pairs: the head dim {d} (default: d_model / n_heads) must be even")
        if d < 1 or theta is not None and not 1 <= len(theta) <= d // 2:
            raise ValueError(f"head_dim {d}, and angles for {len(theta or ())} pairs: a head has {d // 2}")
        if n_positions is not None and n_positions < 1:
            raise ValueError(f"n_positions {n_positions} is below 1")
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d
        self.window, self.rope, self.theta = window, rope, None if theta is None else tuple(theta)
        self.forms = type(self).forms if self.d_head <= 256 else type(self).forms[:-1]       # what the kernel holds
        self.qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * d, bias=qkv_bias)
        self.out = nn.Linear(n_heads * d, d_model, bias=out_bias)
        self.gate = nn.Linear(d_model, n_heads * d, bias=qkv_bias) if gate else None
        self.norms, self.whole_norm = None, whole_norm
        if qk_norm is not None:
            sizes = (n_heads * d, n_kv_heads * d) if whole_norm else (d, d)
            self.norms = nn.ModuleList(nn.RMSNorm(size, eps=qk_norm) for size in sizes)
        self.positions = nn.Parameter(0.02 * torch.randn(n_positions, d_model)) if n_positions else None

    def add_positions(self, x, start):
        """x: (b, t, c) and the vectors of positions start, start + 1, ... (In a CUDA graph start is a tensor.)"""
        if not torch.is_tensor(start):
            self.check_length(start + x.shape[1])
        return x + self.positions[start + torch.arange(x.shape[1], device=x.device)]

    def check_length(self, t):
        if self.positions is not None and t > len(self.positions):
            raise ValueError(f"a text of {t} tokens, where n_positions is {len(self.positions)}")

    def project(self, x, start=0):
        """q: (b, h, t, d), k, v: (b, g, t, d) for positions start, start + 1, ..."""
        h, g = self.n_heads, self.n_kv_heads
        x = x if self.positions is None else self.add_positions(x, start)
        qk, v = split_heads(self.qkv(x), h + 2 * g).split([h + g, g], dim=1)
        if self.norms:
            qk = torch.cat([self.normed(norm, y) for norm, y in
                            zip(self.norms, qk.split([h, g], dim=1), strict=True)], dim=1)
        q, k = (self.turn(qk, start) if self.rope else qk).split([h, g], dim=1)
        return q, k, v

    def normed(self, norm, y):
        return split_heads(norm(join_heads(y)), y.shape[1]) if self.whole_norm else norm(y)

    def turn(self, qk, start):
        n = 2 * len(self.theta or ())
        if n in (0, self.d_head):
            return rope(qk, start, theta=self.theta)
        return torch.cat([rope(qk[..., :n], start, theta=self.theta), qk[..., n:]], dim=-1)

    def forward(self, x, form=None, real=None):
        short = form is None and x.ndim == 3 and x.shape[1] <= 256 and not x.is_cuda
        form = pick_form(self, x, "parallel" if short else form)         # one small matrix is faster than its tiles
        q, k, v = self.project(blank(x, real))
        if form == "parallel":
            o = parallel_attention(q, k, v, self.window, real)
        elif form == "triton" and real is None:
            o = triton_attention(q, k, v, self.window)
        elif form == "recurrent":
            real = all_real(x) if real is None else real
            o, _ = recurrent_attention(q, k, v, self.init_state(len(x)), real, self.window)
        else:
            o = chunked_attention(q, k, v, self.window, real)
        return self.output(o, x)

    def output(self, o, x):
        o = join_heads(o)                                                                    # (b, t, h d)
        return self.out(o if self.gate is None else o * torch.sigmoid(self.gate(x)))         # (b, t, c)

    def init_state(self, batch_size):
        slots = self.window or 0
        empty = self.qkv.weight.new_zeros(batch_size, self.n_kv_heads, slots, self.d_head)
        return Cache(empty, empty, torch.zeros(batch_size, slots, dtype=torch.bool, device=empty.device), 0)

    def prefill(self, x, state=None, real=None):
        """A fresh text is read as forward() reads it; one that goes on also looks at what was kept before it."""
        kernel = pick_form(self, x) == "triton" and state is None and real is None
        state = self.init_state(len(x)) if state is None else state
        q, k, v = self.project(blank(x, real), state.length)
        real = all_real(x) if real is None else real
        seen = remember(in_order(state, self.window), k, v, real)
        if kernel:
            o = triton_attention(q, k, v, self.window)
        else:
            o = chunked_attention(q, seen.k, seen.v, self.window, seen.real)
        return self.output(o, x), seen if self.window is None else remember(state, k, v, real, self.window)

    def step(self, x_t, state):
        x = x_t[:, None]
        q, k, v = self.project(x, state.length)
        if pick_form(self, x) == "triton" and not torch.is_grad_enabled():
            state = remember(state, k, v, all_real(x), self.window)
            o = triton_step(q, state)
        else:
            o, state = recurrent_attention(q, k, v, state, all_real(x), self.window)
        return self.output(o, x)[:, 0], state

    def reserve(self, state, n):
        """The state with room for n more tokens, which step then writes in place. A ring has its room."""
        self.check_length(state.length + n)
        if self.window is not None:
            return state
        k, v = (F.pad(x, (0, 0, 0, n)) for x in (state.k, state.v))
        return Room(k, v, F.pad(state.real, (0, n)), state.length)

    def values(self, x):
        return share_groups(self.project(x)[2], self.n_heads)                                # (b, h, s, e)

    def matrix(self, x):
        q, k, _ = self.project(x)
        return attention_weights(q, k, self.window)                                          # (b, h, t, s)

    def state_size(self, t):
        return 2 * self.n_kv_heads * self.d_head * (t if self.window is None else self.window)


def all_real(x):
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def blank(x, real):
    """x with zeros at the padding: whatever stood there, NaN too, is in nobody's sum and in no gradient."""
    return x if real is None else x.masked_fill(~real[..., None], 0)


class SlidingWindow(Attention):
    """Attention to the last `window` tokens, with the token itself among them [B20]: a banded M, and a ring of fixed
    size to generate with. One layer sees w tokens, L layers together L (w - 1) + 1. (Libraries count differently:
    docs/comparing.md.)"""

    def __init__(self, d_model, n_heads=4, window=64, **options):
        super().__init__(d_model, n_heads, window=window, **options)


class Linformer(nn.Module):
    """softmax(Q (E K)^T / sqrt(d)) (F V) with E, F: (k, max_len) [W20, eq. 7]: t sources are mixed down to k before the
    softmax, so that M has rank k and costs t k. The mixing is over all positions at once: not causal, so no recurrence,
    and no length above max_len. E and F are learned, shared by the heads, and start as N(0, 1/k)."""
    forms = ("parallel",)
    causal = False

    def __init__(self, d_model, n_heads=4, k=64, max_len=1024):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of n_heads {n_heads}")
        self.n_heads, self.max_len = n_heads, max_len
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.E = nn.Parameter(torch.randn(k, max_len) * k ** -0.5)
        self.F = nn.Parameter(torch.randn(k, max_len) * k ** -0.5)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def project(self, x):
        if x.shape[1] > self.max_len:
            raise ValueError(f"a sequence of {x.shape[1]} is longer than this Linformer's max_len {self.max_len}")
        return (split_heads(y, self.n_heads) for y in self.qkv(x).chunk(3, dim=-1))

    def weights(self, q, k):
        """How much each target takes of each of the k mixtures of sources: (b, h, t, k)."""
        scores = (q * q.shape[-1] ** -0.5) @ (self.E[:, :k.shape[2]] @ k).mT
        return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(k.dtype)

    def forward(self, x, form=None):
        pick_form(self, x, form)
        q, k, v = self.project(x)
        return self.output(self.weights(q, k) @ (self.F[:, :x.shape[1]] @ v), x)

    def output(self, o, x):
        return self.out(join_heads(o))

    def values(self, x):
        return tuple(self.project(x))[2]

    def matrix(self, x):
        q, k, _ = self.project(x)
        return self.weights(q, k) @ self.F[:, :x.shape[1]]

    def state_size(self, t):
        return 0      # it keeps nothing, because it cannot go on


class NGram(nn.Module):
    """n-gram heads [Aky24]: head n finds earlier occurrences of the last n tokens and averages what stood behind them:
    A_ij = 1 if x[j-n : j] = x[i-n+1 : i+1] and j < i, its rows divided by their sums (0 / 0 = 0);
    y = W_1 x + sum_n W_0^n A^n x.
    Attention has to learn this pattern (an induction head is n = 1); here it is built in. All orders 1 to max_order
    stand in one layer (the authors use a layer each), and n_heads is not used: there is one head for each order.
    Differs: W_0 and W_1 have no biases, the authors' code has.

    Which tokens are equal is read from ids: (b, t), an argument more for every method. A model hands it to the mixers
    that list it in `reads`. Without ids, rows of x that are equal to the bit count as the same token."""
    forms = ("parallel", "recurrent")
    causal = True
    reads = ("ids",)

    def __init__(self, d_model, n_heads=None, max_order=3):
        super().__init__()
        if max_order < 1:
            raise ValueError(f"max_order {max_order} is below 1: an n-gram has at least one token")
        self.orders = range(1, max_order + 1)
        self.W0 = nn.Linear(max_order * d_model, d_model, bias=False)
        self.W1 = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, form=None, ids=None):
        if pick_form(self, x, form) == "recurrent":
            return self.prefill(x, ids=ids)[0]
        return self.output(self.matrix(x, ids).to(x.dtype) @ self.values(x), x)

    def output(self, o, x):
        return self.W1(x) + self.W0(join_heads(o))

    def values(self, x, ids=None):
        return x[:, None].expand(-1, len(self.orders), -1, -1)                               # (b, n, s, c)

    def matrix(self, x, ids=None):
        ids = hash_rows(x) if ids is None else ids
        same = ids[:, :, None] == ids[:, None, :]                                            # (b, t, s)
        match, heads = same, []
        for _ in self.orders:
            heads.append(F.pad(match, (1, -1)).tril(-1))         # the n-gram ending at i also ends at j - 1; j < i
            match = same & F.pad(match, (1, -1, 1, -1))          # n + 1 tokens match: the last, and the n before
        A = torch.stack(heads, dim=1).to(x.dtype)                                            # (b, n, t, s)
        return A / A.sum(dim=-1, keepdim=True).clamp(min=1)

    def init_state(self, batch_size):
        """For each sequence: its last tokens, and a hash table n-gram -> (how often, sum of the rows that followed)."""
        return [((), {}) for _ in range(batch_size)]

    def step(self, x_t, state, ids=None):
        ids = (hash_rows(x_t) if ids is None else ids).tolist()
        heads, after = [], []
        for row, token, (recent, table) in zip(x_t, ids, state, strict=True):
            table, nothing = dict(table), (0, torch.zeros_like(row))       # a copy: a state may be gone on from twice
            now = (recent + (token,))[-len(self.orders):]
            for n in self.orders:                                # look up the n-gram that ends here ...
                count, total = table.get(now[-n:], nothing) if len(now) >= n else nothing
                heads.append(total / max(count, 1))
            for n in self.orders:                                # ... then file this row under the n-gram before it
                if len(recent) >= n:
                    count, total = table.get(recent[-n:], nothing)
                    table[recent[-n:]] = (count + 1, total + row)
            after.append((now, table))
        o = torch.stack(heads).unflatten(0, (len(x_t), -1))                                  # (b, n, c)
        return self.output(o[:, :, None], x_t[:, None])[:, 0], after

    def prefill(self, x, state=None, ids=None):
        pick_form(self, x)
        state = self.init_state(len(x)) if state is None else state
        ids = hash_rows(x) if ids is None else ids
        y = []
        for i in range(x.shape[1]):
            y_t, state = self.step(x[:, i], state, ids[:, i])
            y.append(y_t)
        return torch.stack(y, dim=1), state

    def state_size(self, t):
        return len(self.orders) * t * (self.W1.in_features + 1)      # at most: every n-gram different


GOLDEN = -7046029254386353131        # 2^64 / golden ratio as a signed number, Knuth's multiplicative hash


def hash_rows(x):
    """Equal rows, equal number: the bits of each row of x: (..., c) as a 64-bit linear hash (...)."""
    bits = x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).long()
    odd = 2 * torch.arange(x.shape[-1], device=x.device) + 1
    return (bits * (odd * GOLDEN)).sum(dim=-1)         # wraps around, as a hash should


# ---------------------------------------------------------------------------------------------------------------- tasks
#
# A task makes a batch: ids (b, t), targets (b, t) with -100 where nothing is asked, and possibly a dict of more.


def induction(batch_size=32, generator=None, length=128, vocab_size=256):
    """Copying [Ol22]: different tokens in random order, then the same again and again.
    From the second round on every token can be told: find the last occurrence of the current one, say what followed
    it. The period of each sequence is drawn from length/4 to length/2, so that counting positions does not help.
    Returns ids and targets, (b, length) int64; -100 where nothing is asked."""
    if not 8 <= length <= 2 * vocab_size:
        raise ValueError(f"induction needs 8 <= length <= 2 vocab_size, not {length} with vocab_size {vocab_size}")
    order = torch.rand(batch_size, vocab_size, generator=generator).argsort(dim=1)
    period = torch.randint(length // 4, length // 2 + 1, (batch_size, 1), generator=generator)
    i = torch.arange(length + 1)
    tokens = order.gather(1, i % period)                                               # (b, length + 1)
    return tokens[:, :-1], tokens[:, 1:].masked_fill(i[1:] <= period, -100)


def icll(batch_size=32, generator=None, length=256, vocab_size=19):
    """In-context language learning [Aky24]: each sequence has a random finite automaton of its own and consists of
    strings that it wrote, joined by the separator vocab_size - 1. Only the strings before tell which letters may come
    next; any of those counts as right: the third result is {"valid": (b, t, vocab_size) bool}. Separators are
    not asked for. With letters a to d and | between the strings, a sequence may begin: abac|ab|acad|abab|ac ...: after
    an a comes b, c or d, after b and after c an a, and two such strings are enough to see it. Sizes as in the authors'
    code: 4 to 12 states, 4 to 18 letters, strings of 1 to 49 letters; from each state 1 to 3 ways, equally likely, with
    different letters to different other states. (They also merge equivalent states, and draw 10 to 19 strings; here
    strings fill the length.)"""
    if vocab_size < 5:
        raise ValueError(f"icll needs at least 4 letters and a separator: vocab_size {vocab_size} is below 5")
    b, n_letters, max_states = batch_size, vocab_size - 1, 12

    def rand(*shape):
        return torch.rand(b, *shape, generator=generator)

    def uniform(low, high, *shape):
        return (low + rand(*shape) * (high + 1 - low)).long()

    n_states, alphabet = uniform(4, max_states, 1, 1), uniform(4, n_letters, 1)
    in_alphabet = rand(n_letters).argsort(dim=1) < alphabet                                            # (b, letter)
    letters = rand(max_states, n_letters).masked_fill(~in_alphabet[:, None], 2).argsort(dim=2)[..., :3]
    state = torch.arange(max_states)
    cannot = (state == state[:, None]) | (state >= n_states)                            # no way to itself
    targets = rand(max_states, max_states).masked_fill(cannot, 2).argsort(dim=2)[..., :3]      # (b, state, way)
    ways = uniform(1, 3, max_states)                                                      # (b, state)
    ends = torch.zeros(b, 50 * (length + 1), dtype=torch.bool)                            # where a separator stands
    ends = ends.scatter(1, (uniform(1, 49, length + 1) + 1).cumsum(dim=1) - 1, True)[:, :length + 1]
    row, chance, steps = torch.arange(b), rand(length + 1), []
    now = torch.zeros(b, dtype=torch.long)
    for i in range(length + 1):
        way = (chance[:, i] * ways[row, now]).long()
        steps.append((now, way))
        now = targets[row, now, way].masked_fill(ends[:, i], 0)
    now, way = (torch.stack(x, dim=1) for x in zip(*steps, strict=True))                  # (b, length + 1)
    open_letters = letters[row[:, None], now]                                             # (b, length + 1, way)
    tokens = open_letters.gather(2, way[..., None])[..., 0].masked_fill(ends, n_letters)
    is_open = torch.arange(3) < ways.gather(1, now)[..., None]
    valid = torch.zeros(b, length + 1, vocab_size, dtype=torch.bool).scatter_(2, open_letters, is_open)
    return tokens[:, :-1], tokens[:, 1:].masked_fill(tokens[:, 1:] == n_letters, -100), {"valid": valid[:, 1:]}


MIXERS = {"attention": Attention, "window": SlidingWindow, "linformer": Linformer, "ngram": NGram}
TASKS = {"induction": induction, "icll": icll}


# ------------------------------------------------------------------------------------------------------------- plumbing


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


# ------------------------------------------------------------------------------------------------------- look and check


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
    x = torch.randn(2, t, d_model, dtype=torch.float64)
    print(f"{'mixer':12}{'form':12}{'time':>10}   largest difference from the forms above (float64, t = {t})")
    with torch.no_grad():
        for name, make in MIXERS.items():
            mixer, done = make(d_model).double(), {}
            for form in (form for form in mixer.forms if form != "triton"):
                y, ms = timed(mixer, x, form)
                gaps = "   ".join(f"{other} {(y - z).abs().max():.0e}" for other, z in done.items())
                print(f"{'' if done else name:12}{form:12}{ms:>7.1f} ms   {gaps}")
                done[form] = y


def plot_matrices(path, text="to be or not to be that is the question so to be or not to be is what we ask"):
    """Draw M for a line of words. Q and K are set equal, so that equal words attract each other."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    torch.manual_seed(0)
    words = text.split()
    ids = torch.tensor([[sorted(set(words)).index(w) for w in words]])
    x = F.normalize(torch.randn(ids.max() + 1, 64), dim=-1)[ids] * 8               # a random vector for each word
    options = {"attention": {"n_heads": 1}, "window": {"n_heads": 1, "window": 4}, "ngram": {},
               "linformer": {"n_heads": 1, "k": 6, "max_len": len(words)}}
    titles = {"attention": "softmax attention", "window": "sliding window, w = 4", "linformer": "Linformer, rank 6",
              "ngram": "1-gram head: what followed this word?"}
    figure, axes = plt.subplots(1, 4, figsize=(16, 4.6), constrained_layout=True)
    with torch.no_grad():
        for ax, (name, make) in zip(axes, MIXERS.items(), strict=True):
            mixer = make(64, **options[name])
            if hasattr(mixer, "qkv"):
                mixer.qkv.weight[:128] = torch.eye(64).repeat(2, 1) * 0.55
            M = mixer.matrix(x)[0, 0]
            limit = M.abs().max()
            ax.imshow(M, cmap="RdBu_r", vmin=-limit, vmax=limit)
            ax.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
            ax.set_yticks(range(len(words)), words, fontsize=8)
            ax.set_title(titles[name])
    axes[0].set_ylabel("target")
    axes[0].set_xlabel("source")
    figure.suptitle("Y = M V: which earlier word (column) each word (row) reads, red positive, blue negative")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lesson 01: attention. Compares every form of every mixer.")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the mixing matrices instead")
    args = parser.parse_args()
    if args.plot:
        try:
            plot_matrices(args.plot)
        except (OSError, ValueError) as e:               # a folder that is not there, an ending that is no picture's
            parser.error(f"--plot {args.plot}: {e}")
    else:
        first()
        compare_forms()

"""Generation: one token through the recurrence in one launch: read the state, update it, look up, write it back.

    S' = e^g S + k v^T,  o = S'^T q                     linear attention, any decay; lesson 02's state
    the same with phi(k), phi(q), and divided           Based's linear part; lesson 04's state (F, e + 1)
    softmax over the last w keys                        Based's window, which moves on by one token
    softmax over all keys of a cache                    attention; lesson 01's cache, read only

Two FLOPs for a number of the state that is read and written: bound by memory. In float32 a head of Based with d = 16,
e = 64, w = 64 has 153 x 65 + 64 x (64 + 64) numbers, 72 KB: 0.05 microseconds of an H100. A step as PyTorch
operations would move the features and the sums several times, and start a dozen kernels. A cache that is long and of
few heads is cut into parts, one program each, so that the GPU is full; each part's softmax has its own sum, by whose
share its output counts (flash decoding: Dao, Haziza, Massa, Sizov 2023).

The states that come in are left as they are. No gradients: training runs the other kernels.

    python -m kernels.step      check, then a table
"""
import functools

import torch
import triton
import triton.language as tl

from kernels.taylor_attention import feature_table, features
from kernels.tiles import cdiv, next_power_of_2, run


def reference(q, k, v, g, state):
    """q, k: (b, h, d), v: (b, h, e), g: (b, h, 1 or d) or None, state: (b, h, d, e). Returns o: (b, h, e), the
    state."""
    S = (state if g is None else g[..., None].exp() * state) + k[..., None] * v[..., None, :]
    return (q[..., None, :] @ S)[..., 0, :], S


def based_reference(q, k, v, S, q_window, k_window, past_k, past_v, window):
    """q, k: (b, h, f), v: (b, h, e), S: (b, h, F, e + 1); the window's q, k: (b, h, d), past: (b, h, n, d or e),
    oldest first. Returns o: (b, h, e), S, and the window's keys and values after."""
    S = S + features(k)[..., None] * torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)[..., None, :]
    o = (features(q)[..., None, :] @ S)[..., 0, :]
    past_k = torch.cat([past_k, k_window[:, :, None]], dim=2)[:, :, -window:]
    past_v = torch.cat([past_v, v[:, :, None]], dim=2)[:, :, -window:]
    weights = (past_k @ q_window[..., None] * q_window.shape[-1] ** -0.5).softmax(dim=2)     # (b, h, n, 1)
    return o[..., :-1] / o[..., -1:] + (weights * past_v).sum(dim=2), S, past_k, past_v


def attention_reference(q, k, v, real):
    """q: (b, h, d), k: (b, g, s, d), v: (b, g, s, e) where g divides h, real: (b, s) bool, at least one True in each
    row. Returns o: (b, h, e)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (k @ q[..., None])[..., 0] * q.shape[-1] ** -0.5                                # (b, h, s)
    return (scores.masked_fill(~real[:, None], -torch.inf).softmax(dim=-1)[..., None, :] @ v)[..., 0, :]


@triton.jit
def linear_kernel(q, k, v, g, S, o, new, D: tl.constexpr, E: tl.constexpr, GD: tl.constexpr, BD: tl.constexpr,
                  BE: tl.constexpr):
    head, d, e = tl.program_id(0).to(tl.int64), tl.arange(0, BD), tl.program_id(1) * BE + tl.arange(0, BE)
    at, inside = (head * D + d[:, None]) * E + e[None, :], (d[:, None] < D) & (e[None, :] < E)
    S_i = tl.load(S + at, mask=inside, other=0.0)
    if g is not None:
        S_i *= tl.exp(tl.load(g + head * GD + d % GD, mask=d < D, other=0.0).to(tl.float32))[:, None]
    k_i = tl.load(k + head * D + d, mask=d < D, other=0.0).to(tl.float32)
    S_i += k_i[:, None] * tl.load(v + head * E + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    q_i = tl.load(q + head * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(new + at, S_i, mask=inside)
    tl.store(o + head * E + e, tl.sum(q_i[:, None] * S_i, axis=0), mask=e < E)


@triton.jit
def based_kernel(q, k, v, S, q_window, k_window, past_k, past_v, first, second, weights, o, new, new_k, new_v, n, kept,
                 D: tl.constexpr, E: tl.constexpr, DW: tl.constexpr, FEATURES: tl.constexpr, BE: tl.constexpr,
                 BDW: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr):
    """n: tokens in the window before; kept: after."""
    head, e, dw, w = tl.program_id(0).to(tl.int64), tl.arange(0, BE), tl.arange(0, BDW), tl.arange(0, BW)
    v_i = tl.load(v + head * E + e, mask=e < E, other=0.0).to(tl.float32)
    o_i, z = tl.zeros((BE,), tl.float32), 0.0
    for start in range(0, FEATURES, ROWS):
        r = start + tl.arange(0, ROWS)
        i, j = tl.load(first + r), tl.load(second + r)                                       # below 0: a factor of 1
        weight = tl.load(weights + r)
        phi_k = tl.load(k + head * D + i, mask=i >= 0, other=1.0).to(tl.float32) * weight
        phi_k *= tl.load(k + head * D + j, mask=j >= 0, other=1.0).to(tl.float32)
        phi_q = tl.load(q + head * D + i, mask=i >= 0, other=1.0).to(tl.float32) * weight
        phi_q *= tl.load(q + head * D + j, mask=j >= 0, other=1.0).to(tl.float32)
        row = (head * FEATURES + r) * (E + 1)
        inside = (r[:, None] < FEATURES) & (e[None, :] < E)
        S_i = tl.load(S + row[:, None] + e[None, :], mask=inside, other=0.0) + phi_k[:, None] * v_i[None, :]
        z_i = tl.load(S + row + E, mask=r < FEATURES, other=0.0) + phi_k
        tl.store(new + row[:, None] + e[None, :], S_i, mask=inside)
        tl.store(new + row + E, z_i, mask=r < FEATURES)
        o_i += tl.sum(phi_q[:, None] * S_i, axis=0)
        z += tl.sum(phi_q * z_i)
    o_i /= z
    old = w + (n + 1 - kept)                                     # the token in slot w was in this slot before
    before, last = (w < kept - 1)[:, None], (w == kept - 1)[:, None]
    k_in, v_in = dw[None, :] < DW, e[None, :] < E
    k_w = tl.load(past_k + (head * n + old[:, None]) * DW + dw[None, :], mask=before & k_in, other=0.0).to(tl.float32)
    k_w += tl.load(k_window + head * DW + dw[None, :] + 0 * old[:, None], mask=last & k_in, other=0.0).to(tl.float32)
    q_w = tl.load(q_window + head * DW + dw, mask=dw < DW, other=0.0).to(tl.float32)
    s = tl.where(w < kept, tl.sum(k_w * q_w[None, :], axis=1) * (1 / tl.sqrt(DW * 1.0)), -float("inf"))
    p = tl.exp(s - tl.max(s))
    v_w = tl.load(past_v + (head * n + old[:, None]) * E + e[None, :], mask=before & v_in, other=0.0).to(tl.float32)
    v_w = tl.where(last, v_i[None, :], v_w)
    tl.store(new_k + (head * kept + w[:, None]) * DW + dw[None, :], k_w, mask=(before | last) & k_in)
    tl.store(new_v + (head * kept + w[:, None]) * E + e[None, :], v_w, mask=(before | last) & v_in)
    tl.store(o + head * E + e, o_i + tl.sum(p[:, None] * v_w, axis=0) / tl.sum(p), mask=e < E)


@triton.jit
def cache_kernel(q, k, v, real, o, logsum, n, size, heads, HEADS_OF_A_KEY: tl.constexpr, D: tl.constexpr,
                 E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr):
    """o: (b h, parts, e) of one softmax for each part of the n slots; logsum: (b h, parts), the log of its sum."""
    head, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    d, e, key_head = tl.arange(0, BD), tl.arange(0, BE), head // HEADS_OF_A_KEY
    q_i = tl.load(q + head * D + d, mask=d < D, other=0.0).to(tl.float32) * (1 / tl.sqrt(D * 1.0))
    m, z, o_i = -1e30, 0.0, tl.zeros((BE,), tl.float32)                  # largest score, sum, weighted sum of values
    for start in range(part * size, tl.minimum(part * size + size, n), BN):
        slot = start + tl.arange(0, BN)
        see = tl.load(real + head // heads * n + slot, mask=slot < n, other=0) != 0
        row = key_head * n + slot[:, None]                               # what is not seen is not read either
        k_i = tl.load(k + row * D + d[None, :], mask=see[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
        v_i = tl.load(v + row * E + e[None, :], mask=see[:, None] & (e[None, :] < E), other=0.0).to(tl.float32)
        s = tl.where(see, tl.sum(k_i * q_i[None, :], axis=1), -1e30)
        new = tl.maximum(m, tl.max(s))
        p, old = tl.where(see, tl.exp(s - new), 0.0), tl.exp(m - new)
        m, z, o_i = new, z * old + tl.sum(p), o_i * old + tl.sum(p[:, None] * v_i, axis=0)
    tl.store(o + (head * parts + part) * E + e, o_i / tl.maximum(z, 1e-30), mask=e < E)
    tl.store(logsum + head * parts + part, m + tl.log(tl.maximum(z, 1e-30)))


def attention_step(q, k, v, real, parts=None):
    """q: (b, h, d), and a cache with at least one real slot in each row: k: (b, g, s, d), v: (b, g, s, e), real: (b, s)
    bool. Returns o: (b, h, e) of v's dtype. parts: into how many the cache is cut (default: enough to fill a GPU)."""
    (b, h, d), (g, n, e) = q.shape, v.shape[1:]
    q, k, v, real = q.contiguous(), k.contiguous(), v.contiguous(), real.contiguous()
    BN = 64
    parts = min(cdiv(n, 4 * BN), max(1, 1024 // (b * h))) if parts is None else parts
    size = BN * cdiv(n, parts * BN)
    o = torch.empty(b, h, parts, e, dtype=torch.float32 if parts > 1 else v.dtype, device=v.device)
    logsum = torch.empty(b, h, 1, parts, device=v.device)
    run(cache_kernel, (b * h, parts), q, k, v, real, o, logsum, n, size, h, HEADS_OF_A_KEY=h // g, D=d, E=e,
        BD=next_power_of_2(d), BE=next_power_of_2(e), BN=BN, num_warps=4)
    return o[:, :, 0] if parts == 1 else (logsum.softmax(dim=-1) @ o)[:, :, 0].to(v.dtype)


def linear_step(q, k, v, g, state):
    """q, k: (b, h, d), v: (b, h, e), g: log decay (b, h, 1 or d) or None, state: (b, h, d, e), float32. Returns o:
    (b, h, e) of v's dtype, and the state after."""
    (b, h, d), e = q.shape, v.shape[-1]
    q, k, v, state = q.contiguous(), k.contiguous(), v.contiguous(), state.contiguous()
    g = None if g is None else g.expand(b, h, -1).contiguous()
    o, new, BD = torch.empty_like(v), torch.empty_like(state), next_power_of_2(d)
    BE = min(next_power_of_2(e), max(16, 4096 // BD))
    run(linear_kernel, (b * h, cdiv(e, BE)), q, k, v, g, state, o, new, D=d, E=e,
        GD=1 if g is None else g.shape[-1], BD=BD, BE=BE, num_warps=4)
    return o, new


@functools.cache
def factor_table(d, device):
    """The indices i, j of each feature's factors, -1 where there is none, the weights, and how many features there
    are."""
    E, weights, n = feature_table(d, torch.float32, device)
    return *(torch.where(E_i.sum(dim=0) > 0, E_i.argmax(dim=0), -1) for E_i in E), weights, n


def based_step(q, k, v, S, q_window, k_window, past_k, past_v, window):
    """Shapes as in based_reference; S float32, the window's keys and values of any dtype. Returns o, S, keys,
    values."""
    (b, h, d), e, n = q.shape, v.shape[-1], past_k.shape[2]
    kept = min(n + 1, window)
    first, second, weights, n_features = factor_table(d, q.device)
    q, k, v, S, q_window, k_window, past_k, past_v = (
        x.contiguous() for x in (q, k, v, S, q_window, k_window, past_k, past_v))
    o, new = torch.empty_like(v), torch.empty_like(S)
    new_k, new_v = (x.new_empty(b, h, kept, x.shape[-1]) for x in (past_k, past_v))
    run(based_kernel, (b * h,),
        q, k, v, S, q_window, k_window, past_k, past_v, first, second, weights, o, new, new_k, new_v, n, kept, D=d, E=e,
        DW=q_window.shape[-1], FEATURES=n_features, BE=next_power_of_2(e),
        BDW=next_power_of_2(q_window.shape[-1]), BW=next_power_of_2(window), ROWS=32, num_warps=4)
    return o, new, new_k, new_v


if __name__ == "__main__":
    from kernels import tables
    tables.step()

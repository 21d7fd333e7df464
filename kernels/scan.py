"""The diagonal scan: h_t = a_t h_{t-1} + b_t, real or complex, one row of time for each channel, one pass over memory.

A step h -> a h + b followed by another is again such a step: (a_1, b_1) then (a_2, b_2) is (a_1 a_2, a_2 b_1 + b_2).
A program owns one row. It scans a tile of time steps in log rounds on chip, lets the state before the tile in, writes
the tile's states, and goes on from the last. Memory sees a, b and h once: 12 bytes a number in float32, for 3 FLOPs.
Rows lie along time, (b, c, t): then a tile is one piece of memory, and W @ x.mT has that layout.

The gradient of b is the same scan back in time, g_t = dh_t + conj(a_{t+1}) g_{t+1}; that of a is g_t conj(h_{t-1}).

RWKV-4's ratio of sums [Pe23], o_t = (P_{t-1} + e^{u + k_t} v_t) / (Q_{t-1} + e^{u + k_t}) with P_t = e^w P_{t-1} +
e^{k_t} v_t and Q_t = e^w Q_{t-1} + e^{k_t}, is a scan, too, of sums p = P e^-m and q = Q e^-m with their exponent m: of
two exponents the larger one stays, so none that is taken is above 0. Memory sees k, v and o once.

    python -m kernels.scan [--peers]      check, then a table; with --peers, RWKV-4's beside flash-linear-attention's
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import tiles
from kernels.tiles import cdiv, check_dtypes, next_power_of_2, run

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)        # the exponent of an empty sum


def reference(a, b, h0=None):
    """The same in PyTorch by doubling [HS86]: log t rounds over all of memory. Shapes as in scan."""
    h0 = torch.zeros_like(b[..., 0]) if h0 is None else h0
    b, n = torch.cat([b[..., :1] + a[..., :1] * h0[..., None], b[..., 1:]], dim=-1), 1
    while n < b.shape[-1]:
        b, a = b + a * F.pad(b, (n, 0))[..., :-n], a * F.pad(a, (n, 0))[..., :-n]
        n *= 2
    return b, b[..., -1]


@triton.jit
def after(a_1, b_1, a_2, b_2):
    return a_1 * a_2, a_2 * b_1 + b_2


@triton.jit
def after_complex(a_1, ai_1, b_1, bi_1, a_2, ai_2, b_2, bi_2):
    return (a_1 * a_2 - ai_1 * ai_2, a_1 * ai_2 + ai_1 * a_2,
            a_2 * b_1 - ai_2 * bi_1 + b_2, a_2 * bi_1 + ai_2 * b_1 + bi_2)


@triton.jit
def load(x, at, mask, other, COMPLEX: tl.constexpr):
    """Real and imaginary parts, in float32; the imaginary part of a real number is 0."""
    if COMPLEX:
        re, im = tl.load(x + 2 * at, mask=mask, other=other), tl.load(x + 2 * at + 1, mask=mask, other=0.0)
    else:
        re, im = tl.load(x + at, mask=mask, other=other).to(tl.float32), 0.0
    return re, im


@triton.jit
def store(x, at, mask, re, im, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(x + 2 * at, re, mask=mask)
        tl.store(x + 2 * at + 1, im, mask=mask)
    else:
        tl.store(x + at, re, mask=mask)


@triton.jit
def scan_kernel(a, b, start, h, end, states, da, T, BLOCK: tl.constexpr, BACK: tl.constexpr, COMPLEX: tl.constexpr):
    """From `start` on, h_t = a_t h_{t-1} + b_t for one row; the last goes to `end`. BACK: h_t = conj(a_{t+1}) h_{t+1} +
    b_t, backwards (and loaded backwards: the scan itself only goes one way), and da_t = h_t conj(states_{t-1})."""
    i, row = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64)
    s, si = 0.0, 0.0
    if start is not None:
        s, si = load(start, row, True, 0.0, COMPLEX)
    for n in range(tl.cdiv(T, BLOCK)):
        place = n * BLOCK + i
        inside = place < T
        at = row * T + (T - 1 - place if BACK else place)
        a_t, ai_t = load(a, at + BACK, inside & (place >= BACK), 1.0, COMPLEX)
        b_t, bi_t = load(b, at, inside, 0.0, COMPLEX)
        last = i == BLOCK - 1
        if COMPLEX:
            ai_t = -ai_t if BACK else ai_t
            A, Ai, B, Bi = tl.associative_scan((a_t, ai_t, b_t, bi_t), 0, after_complex)
            h_t, hi_t = A * s - Ai * si + B, A * si + Ai * s + Bi
            s, si = tl.sum(tl.where(last, h_t, 0.0)), tl.sum(tl.where(last, hi_t, 0.0))
        else:
            A, B = tl.associative_scan((a_t, b_t), 0, after)
            h_t, hi_t = A * s + B, 0.0
            s = tl.sum(tl.where(last, h_t, 0.0))
        store(h, at, inside, h_t, hi_t, COMPLEX)
        if da is not None:
            x, xi = load(states, at - 1, inside & (place < T - 1), 0.0, COMPLEX)         # da_0 has no state before it
            store(da, at, inside, h_t * x + hi_t * xi, hi_t * x - h_t * xi, COMPLEX)
    if end is not None:
        store(end, row, True, s, si, COMPLEX)


def tile(t, is_complex):
    """Steps in a tile, and warps: the fastest on an H100."""
    block = min(next_power_of_2(t), 512 if is_complex else 1024)
    return block, max(1, block // 256)


def launch(a, b, start, h, end, states=None, da=None, back=False):
    T, pairs = b.shape[-1], b.is_complex()
    block, warps = tile(T, pairs)
    tensors = (torch.view_as_real(x) if pairs and x is not None else x for x in (a, b, start, h, end, states, da))
    run(scan_kernel, (b.numel() // T,), *tensors, T, BLOCK=block, BACK=back, COMPLEX=pairs, num_warps=warps)


def differentiable_gradients(a, h, h0, dh, dend):
    """Those of a, b and h0, by a Scan that is known to autograd, from the last step to the first."""
    g = torch.zeros_like(h) if dh is None else dh
    if dend is not None:
        g = torch.cat([g[..., :-1], g[..., -1:] + dend[..., None].to(g.dtype)], dim=-1)
    g, _ = Scan.apply(plain(F.pad(a[..., 1:], (0, 1)).conj().flip(-1)), plain(g.flip(-1)), None)
    g, before = g.flip(-1), torch.zeros_like(h[..., 0]) if h0 is None else h0.to(h.dtype)
    before = torch.cat([before[..., None], h[..., :-1]], dim=-1)
    return (g * before.conj()).to(a.dtype), g, None if h0 is None else (a[..., 0].conj() * g[..., 0]).to(h0.dtype)


class Scan(torch.autograd.Function):

    @staticmethod
    def forward(ctx, a, b, h0):
        h, end = torch.empty_like(b), b.new_empty(b.shape[:-1], dtype=state_dtype(b))
        launch(a, b, h0, h, end)
        ctx.save_for_backward(a, h, h0)
        ctx.set_materialize_grads(False)
        return h, end

    @staticmethod
    def backward(ctx, dh, dend):
        a, h, h0 = ctx.saved_tensors
        if torch.is_grad_enabled():                              # gradients that will be differentiated themselves
            return differentiable_gradients(a, h, h0, dh, dend)
        dh = torch.zeros_like(h) if dh is None else plain(dh)
        g, da = torch.empty_like(h), torch.empty_like(a)
        launch(a, dh, None if dend is None else plain(dend), g, None, h, da, back=True)
        if h0 is None:
            return da, g, None
        da[..., 0] = g[..., 0] * h0.conj()
        return da, g, a[..., 0].conj() * g[..., 0]


def plain(x):
    """In one piece, without a conj or a minus that is still to be done."""
    return x.resolve_conj().resolve_neg().contiguous()


def state_dtype(x):
    return torch.complex64 if x.is_complex() else torch.float32


def scan(a, b, h0=None):
    """h_t = a_t h_{t-1} + b_t along the last axis, from h0 (0 if None), and the last state.

    a, b: (..., t), both real (float32 or 16 bits, each) or both complex64, |a| at most about 1: products of many are
    taken, which must not overflow; h0: (...). The shapes of a and h0 broadcast to b's. Returns h: (..., t) in b's dtype
    and h_t: (...) in float32 or complex64. ValueError for a real and a complex one, other dtypes, or no time step."""
    kinds = {x.is_complex() for x in (a, b, h0) if x is not None}
    if len(kinds) > 1 or b.ndim < 1 or b.shape[-1] < 1:
        dtypes = ", ".join(f"{name} of {x.dtype}" for name, x in (("a", a), ("b", b), ("h0", h0)) if x is not None)
        raise ValueError(f"{dtypes}: all must be real, or all complex; and b {tuple(b.shape)} must have a time step")
    if a.dtype != torch.complex64 or b.dtype != torch.complex64:
        check_dtypes(a=a, b=b)
    if h0 is not None:
        h0 = plain(h0.to(state_dtype(b)).expand(b.shape[:-1]))
    return Scan.apply(plain(a.expand_as(b)), plain(b), h0)


def gateloop(q, k, v, g, state=None):
    """GateLoop's recurrence [Ka23, eq. 6], lesson 02's form for heads of width 1: o = q Re(S), S_t = e^{g_t} S_{t-1} +
    k_t v_t. q, k, v: (b, c, t, 1), real; g: the same, complex64, of real part at most 0; state: (b, c, 1, 1), complex,
    or None. Returns o in v's dtype, and the state after."""
    S, end = scan(g[..., 0].exp(), (k * v)[..., 0].to(torch.complex64), None if state is None else state[..., 0, 0])
    return (q * S.real[..., None]).to(v.dtype), end[..., None, None]


# ------------------------------------------------------------------------------------------------------------- RWKV-4


def add_sums(p, q, m, p2, q2, m2):
    """Sums in units of e^m, and others in units of e^m2. The unit is a constant to autograd: a change of it would
    change nothing that p, q and m say together."""
    top = torch.maximum(m, m2).detach()
    old, new = (m - top).exp(), (m2 - top).exp()
    return old * p + new * p2, old * q + new * q2, top


def rwkv_reference(k, v, w, u, p, q, m):
    """The same in PyTorch by doubling. k, v: (b, c, t), w, u: (c,), p, q, m: (b, c). Returns o: (b, c, t), and p, q, m
    after."""
    one, unit = (k - k.detach()).exp(), (m - m.detach()).exp()                       # 1, with a gradient
    P, Q, M = (torch.cat([x[..., None], y], dim=-1) for x, y in ((p * unit, v * one), (q * unit, one),
                                                                 (m.detach(), k.detach())))
    n, lowest = 1, torch.finfo(M.dtype).min
    while n < P.shape[-1]:
        earlier = F.pad(P, (n, -n)), F.pad(Q, (n, -n)), F.pad(M, (n, -n), value=lowest) + n * w[:, None]
        P, Q, M = add_sums(*earlier, P, Q, M)
        n *= 2
    top = torch.maximum(M[..., :-1], u[:, None] + k).detach()
    old, own = (M[..., :-1] - top).exp(), (u[:, None] + k - top).exp()
    o = (old * P[..., :-1] + own * v) / (old * Q[..., :-1] + own)
    return o, P[..., -1], Q[..., -1], M[..., -1]


@triton.jit
def after_sums(w_1, m_1, p_1, q_1, w_2, m_2, p_2, q_2):
    """Sums p and q in units of e^m; then a decay w_2 and more sums."""
    top = tl.maximum(m_1 + w_2, m_2)
    old, new = tl.exp(m_1 + w_2 - top), tl.exp(m_2 - top)
    return w_1 + w_2, top, old * p_1 + new * p_2, old * q_1 + new * q_2


@triton.jit
def after_both(a_1, p_1, q_1, a_2, p_2, q_2):
    return a_1 * a_2, a_2 * p_1 + p_2, a_2 * q_1 + q_2


@triton.jit
def chosen(x, which):
    return tl.sum(tl.where(which, x, 0.0))


@triton.jit
def tokens(k, v, at, inside):
    """Keys and values there, in float32; elsewhere those that add nothing. (16 bits have no LOWEST.)"""
    k_i = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, k_i, LOWEST), tl.load(v + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sums_before(k, v, w, m, p, q, start, row, T, BLOCK: tl.constexpr):
    """The sums before each step of a tile, from those before its first: of the tokens one step back."""
    i = tl.arange(0, BLOCK)
    inside = (i > 0) & (start + i <= T)
    k_i, v_i = tokens(k, v, row * T + start + i - 1, inside)
    own = tl.where(i > 0, w, 0.0), k_i, v_i, tl.where(inside, 1.0, 0.0)
    own = tl.associative_scan(own, 0, after_sums)
    return after_sums(0.0, m, p, q, own[0], own[1], own[2], own[3])


@triton.jit
def read(m, p, q, k, v, u):
    """The ratio, its denominator, and the shares e^(..) of the past and of the token itself, all in one unit."""
    top = tl.maximum(m, u + k)
    old, own = tl.exp(m - top), tl.exp(u + k - top)
    z = old * q + own
    return (old * p + own * v) / z, z, old, own


@triton.jit
def rwkv_kernel(k, v, w, u, p0, q0, m0, o, p_T, q_T, m_T, kept, T, CH, BLOCK: tl.constexpr):
    """One row of time. The sums before each tile stay in `kept`, (rows, tiles, 3)."""
    i, row = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64)
    w, u = tl.load(w + row % CH), tl.load(u + row % CH)
    m, p, q = tl.load(m0 + row), tl.load(p0 + row), tl.load(q0 + row)
    for n in range(tl.cdiv(T, BLOCK)):
        at = kept + 3 * (row * tl.cdiv(T, BLOCK) + n)
        tl.store(at, m)
        tl.store(at + 1, p)
        tl.store(at + 2, q)
        t = n * BLOCK + i
        _, M, P, Q = sums_before(k, v, w, m, p, q, n * BLOCK, row, T, BLOCK)
        k_t, v_t = tokens(k, v, row * T + t, t < T)
        o_t, _, _, _ = read(M, P, Q, k_t, v_t, u)
        tl.store(o + row * T + t, o_t, mask=t < T)
        _, M, P, Q = after_sums(0.0, M, P, Q, w, k_t, v_t, 1.0)
        last = t == tl.minimum((n + 1) * BLOCK, T) - 1
        m, p, q = chosen(M, last), chosen(P, last), chosen(Q, last)
    tl.store(m_T + row, m)
    tl.store(p_T + row, p)
    tl.store(q_T + row, q)


@triton.jit
def rwkv_back_kernel(k, v, w, u, do, kept, dp_T, dq_T, dk, dv, dw, du, dp0, dq0, T, CH, BLOCK: tl.constexpr):
    """The sums of each tile once more, then back in time the gradients of p_t and q_t at a constant unit, with a_t what
    of p_{t-1} is left in p_t:

        dp_t = a_{t+1} dp_{t+1} + old y_{t+1}      dq_t = a_{t+1} dq_{t+1} - old y_{t+1} o_{t+1}       y = do / z"""
    i, row = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64)
    w, u = tl.load(w + row % CH), tl.load(u + row % CH)
    dp, dq, dw_sum, du_sum = 0.0, 0.0, 0.0, 0.0
    if dp_T is not None:
        dp += tl.load(dp_T + row)
    if dq_T is not None:
        dq += tl.load(dq_T + row)
    tiles = tl.cdiv(T, BLOCK)
    for back in range(tiles):
        n = tiles - 1 - back
        at, t = kept + 3 * (row * tiles + n), n * BLOCK + i
        _, M, P, Q = sums_before(k, v, w, tl.load(at), tl.load(at + 1), tl.load(at + 2), n * BLOCK, row, T, BLOCK)
        k_t, v_t = tokens(k, v, row * T + t, t < T)
        o_t, z, old, own = read(M, P, Q, k_t, v_t, u)
        y = tl.load(do + row * T + t, mask=t < T, other=0.0).to(tl.float32) / z
        _, M_t, P_t, Q_t = after_sums(0.0, M, P, Q, w, k_t, v_t, 1.0)
        a, b = tl.exp(M + w - M_t), tl.exp(k_t - M_t)
        following = t + 1 < T
        k_next, v_next = tokens(k, v, row * T + t + 1, following)
        o_next, z_next, old_next, _ = read(M_t, P_t, Q_t, k_next, v_next, u)
        y_next = tl.load(do + row * T + t + 1, mask=following, other=0.0).to(tl.float32) / z_next * old_next
        a_next = tl.where(following, tl.exp(M_t + w - tl.maximum(M_t + w, k_next)), 1.0)
        A, DP, DQ = tl.associative_scan((a_next, y_next, -y_next * o_next), 0, after_both, reverse=True)
        DP, DQ = A * dp + DP, A * dq + DQ
        tl.store(dv + row * T + t, b * DP + own * y, mask=t < T)
        tl.store(dk + row * T + t, b * (v_t * DP + DQ) + own * (v_t - o_t) * y, mask=t < T)
        dw_sum += chosen(a * (P * DP + Q * DQ), t < T)
        du_sum += chosen(own * (v_t - o_t) * y, t < T)
        dp, dq = chosen(DP, i == 0), chosen(DQ, i == 0)
        if n == 0:
            tl.store(dp0 + row, chosen(a * DP + old * y, i == 0))
            tl.store(dq0 + row, chosen(a * DQ - old * y * o_t, i == 0))
    tl.store(dw + row, dw_sum)
    tl.store(du + row, du_sum)


class RWKV(torch.autograd.Function):
    """k, v: (b, c, t); w, u: (c,) and p, q, m: (b, c) in float32; all in one piece."""

    @staticmethod
    def forward(ctx, k, v, w, u, p, q, m):
        T, (block, warps) = k.shape[-1], tile(k.shape[-1], True)
        o, *end = torch.empty_like(v), *(torch.empty_like(p) for _ in "pqm")
        kept = p.new_empty(p.numel(), cdiv(T, block), 3)
        run(rwkv_kernel, (p.numel(),), k, v, w, u, p, q, m, o, *end, kept, T, len(w), BLOCK=block, num_warps=warps)
        ctx.save_for_backward(k, v, w, u, p, q, m, kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(end[2])
        return o, *end

    @staticmethod
    def backward(ctx, do, dp_T, dq_T, _):
        *tensors, kept = ctx.saved_tensors
        if torch.is_grad_enabled():                              # a gradient of the gradient may be asked for
            return tiles.differentiable_gradients(rwkv_reference, tensors, (do, dp_T, dq_T, None))
        k, v, w, u, p, q, m = tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dp_T, dq_T = (None if x is None else x.contiguous() for x in (dp_T, dq_T))
        (dk, dv), (dw, du, dp, dq) = (torch.empty_like(x) for x in (k, v)), (torch.empty_like(p) for _ in "wupq")
        block, warps = tile(k.shape[-1], True)
        run(rwkv_back_kernel, (p.numel(),), k, v, w, u, do, kept, dp_T, dq_T, dk, dv, dw, du, dp, dq, k.shape[-1],
            len(w), BLOCK=block, num_warps=warps)
        return dk, dv, dw.sum(dim=0), du.sum(dim=0), dp, dq, p * dp + q * dq


def rwkv(k, v, w, u, state=None):
    """RWKV-4's ratio, lesson 02's form. k, v: (b, c, t), float32 or 16 bits; w, the log decay, below 0, and u: (c,);
    state: (b, 3, c), the sums p and q and the exponent m that both are divided by, or None. Returns o: (b, c, t) in v's
    dtype, and the state after, float32, through whose m no gradient goes back: p and q have it all."""
    check_dtypes(k=k, v=v)
    if k.shape != v.shape or k.ndim != 3 or k.shape[-1] < 1 or w.shape != u.shape or w.shape != k.shape[1:2]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} should be (b, c, t) with a time step, w "
                         f"{tuple(w.shape)} and u {tuple(u.shape)} (c,)")
    if state is None:
        state = k.new_zeros(len(k), 3, k.shape[1], dtype=torch.float32)
        state[:, 2] = torch.finfo(torch.float32).min             # nothing, in any unit
    p, q, m = (x.contiguous() for x in state.float().unbind(1))
    o, *end = RWKV.apply(k.contiguous(), v.contiguous(), w.float().contiguous(), u.float().contiguous(), p, q, m)
    return o, torch.stack(end, dim=1)


def rwkv_peers():
    """flash-linear-attention's: k and v are (b, t, c), w is -e^w."""
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    def called(k, v, w, u):
        state = F.pad(k.new_zeros(len(k), 2, 1, k.shape[1]), (0, 0, 0, 0, 0, 1), value=-1e30)
        return fused_recurrent_rwkv4((-w).log(), u, k.mT, v.mT, state)[0].mT
    return called


if __name__ == "__main__":
    from kernels import tables
    tables.scan()

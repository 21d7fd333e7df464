"""Gated linear attention: a decay for each key channel and token. The linear attention of GLA and RWKV-6.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t                     forms and names as in lesson 02

In chunks of 64 tokens, with G the sum of g from the start of the chunk, up to and including its row, and `whole` that
of all its rows,

    O = M V + (Q e^G) S      S <- e^{whole} S + (K e^{whole - G})^T V      M_ts = sum_d q_td k_sd e^{G_t - G_s}, s <= t

What a vector gate makes hard is M: q e^{G_t} times k e^{-G_s} would overflow where a channel forgets fast. Halving
takes care of it: cut the chunk in two; with r the last row before the cut, all pairs (t, s) across it are

    (q_t e^{G_t - G_r}) . (k_s e^{G_r - G_s})                                         no exponent is above 0

then cut each half in two, and so on: blocks of 32, 16, ... 1. At a cut a token is either a target or a source, so one
tile Z has all that is multiplied, q e^{G_t - G_r} in the targets' rows and k e^{G_r - G_s} in the sources', and Z Z^T,
masked to the pairs that are cut, is their part of M. Each of the log2(64) = 6 levels is one exponential a number and
one product. The same tile gives both gradients: with dM_ts = do_t . v_s, symmetrically filled and masked, (dM Z)
e^{...} is dq in the targets' rows and dk in the sources'.

All chunks are done at once but for the state, which an elementwise walk takes from chunk to chunk: adds_kernel (what
each chunk adds to the state), walk_kernel (the state before each chunk), outputs_kernel. dV is the same backwards in
time, with K, Q, dO for Q, K, V; gradients_kernel makes dq, dk and dg.

Bytes for a token and head, d = e = 64 in bfloat16: 768 for q, k, v, o and g (float32); with the states, and G in
between, 2048, half of the time that it takes on an H200. FLOPs: 12 products of 64 x 64 x 64 for a chunk. What bounds it
beside the bytes is waiting, for one small product after the other, in two programs a multiprocessor: registers leave no
room for more.

    python -m kernels.gla [--peers]      check, then a table; with --peers beside flash-linear-attention's
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.tiles import (
    differentiable_gradients,
    in_one_piece,
    load,
    place,
    run,
    state_without_zeros,
    store,
    without_zeros,
)

CHUNK = 64


def cuts(n, device):
    """For n tokens, at each cut h = 1, 2, 4, ...: which tokens are targets: (n, 1), W, with (W g)_i the exponent of
    token i, as a target or as a source, and which pairs (t, s) are cut."""
    i = torch.arange(n, device=device)
    t, s, h = i[:, None], i[None, :], 1
    while h < n:
        target = t // h % 2 == 1
        yield target, (t // h == s // h) & torch.where(target, s <= t, s > t), target & (t // h == s // h + 1)
        h *= 2


def reference(q, k, v, g, state=None):
    """The kernels' loops over chunks; in 16 bits, what is added up is in float32, and what is multiplied is not. q, k,
    g: (b, h, t, d), v: (b, h, t, e), state: (b, h, d, e) or None. Returns o: (b, h, t, e) and the state after."""
    more, o = torch.promote_types(q.dtype, torch.float32), []
    S = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=more) if state is None else state
    for i in range(0, q.shape[2], CHUNK):
        q_i, k_i, v_i, g_i = (x[:, :, i:i + CHUNK] for x in (q, k, v, g))
        M = (q_i @ k_i.mT) * torch.eye(q_i.shape[2], device=q.device)
        for target, W, cut in cuts(q_i.shape[2], q.device):
            Z = (torch.where(target, q_i, k_i) * (W.to(g.dtype) @ g_i).exp()).to(q.dtype)
            M = M + (Z @ Z.mT) * cut
        G = g_i.cumsum(dim=2)
        whole = G[:, :, -1:]
        o.append(M.to(v.dtype) @ v_i + (q_i * G.exp()).to(q.dtype) @ S.to(q.dtype))
        S = whole.exp().mT * S + (k_i * (whole - G).exp()).to(k.dtype).mT @ v_i
    return torch.cat(o, dim=2), S


@triton.jit
def sums(W, x, like, PRECISION: tl.constexpr):
    """W x for a matrix W of zeros and ones; in 16 bits, x is given in two parts, its first digits and the rest."""
    if like.dtype == tl.float32:
        y = tl.dot(W.to(tl.float32), x, input_precision=PRECISION)
    else:
        first = x.to(like.dtype)
        y = tl.dot(W.to(like.dtype), (x - first.to(tl.float32)).to(like.dtype), acc=tl.dot(W.to(like.dtype), first))
    return y


@triton.jit
def last_of(G, n, d, T, stride, D: tl.constexpr, C: tl.constexpr):
    """The sum of g over chunk n, or over each of several."""
    return tl.load(G + (tl.minimum((n + 1) * C, T) - 1) * stride + d, mask=d < D, other=0.0)


@triton.jit
def state_at(states, n, d, e, BD: tl.constexpr, BE: tl.constexpr):
    """Pointers to rows d and columns e of state n."""
    return states + n * BD * BE + d[:, None] * BE + e[None, :]


@triton.jit(do_not_specialize=["T"])
def adds_kernel(k, v, g, G, adds, T, H, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
                C: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """What each chunk adds to the state behind it: k v^T, decayed since their row (REVERSE: to the state's gradient
    before it, up to their row); and G, of a g in powers of 2. A decay by less than e^-40 is made one by e^-40: nothing,
    too, but it costs the sums that go over it fewer digits."""
    n, b_h = tl.program_id(1), tl.program_id(0).to(tl.int64)
    i, d, e = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BE)
    rows, key = n * C + i, place(b_h, H, H, T, D)
    k_i, v_i = load(k + key, rows, d, T, H * D, D), load(v + place(b_h, H, H, T, E), rows, e, T, H * E, E)
    g_i = tl.maximum(load(g + key, rows, d, T, H * D, D), -40.0) * 1.4426950408889634
    G_i = sums(i[:, None] >= i[None, :], g_i, k_i, PRECISION)
    store(G + key, G_i, rows, d, T, H * D, D)
    whole = tl.sum(tl.where((i == C - 1)[:, None], G_i, 0.0), axis=0)
    exponent = G_i if REVERSE else tl.minimum(whole[None, :] - G_i, 0.0)
    added = tl.dot(tl.trans((k_i * tl.exp2(exponent)).to(k_i.dtype)), v_i, input_precision=PRECISION)
    tl.store(state_at(adds, b_h * tl.num_programs(1) + n, d, e, BD, BE), added.to(k_i.dtype))


@triton.jit(do_not_specialize=["T"])
def walk_kernel(states, G, S0, S_T, T, H, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
                C: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr):
    """S <- e^{whole} S + what the chunk adds, in whose place the state before the chunk is put (REVERSE: behind)."""
    b_h, chunks = tl.program_id(0).to(tl.int64), tl.cdiv(T, C)
    d, e = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, BE)
    inside, S = (d[:, None] < D) & (e[None, :] < E), tl.zeros((ROWS, BE), tl.float32)
    if S0 is not None:
        S += tl.load(state_at(S0, b_h, d, e, D, E), mask=inside, other=0.0)
    for step in tl.range(0, chunks, num_stages=4):
        n = chunks - 1 - step if REVERSE else step
        at = state_at(states, b_h * chunks + n, d, e, BD, BE)
        added = tl.load(at)
        tl.store(at, S.to(added.dtype))
        S = S * tl.exp2(last_of(G + place(b_h, H, H, T, D), n, d, T, H * D, D, C))[:, None] + added
    if S_T is not None:
        tl.store(state_at(S_T, b_h, d, e, D, E), S, mask=inside)


@triton.constexpr_function
def levels_of(C):
    return C.bit_length() - 1


@triton.jit
def at_level(level, q, k, G, G_i, rows, d, T, stride, D: tl.constexpr, C: tl.constexpr):
    """At the cut h = 2^level: Z; the decay from each token to the cut of its block of 2h, or from the cut to it; which
    tokens are targets; and which pairs are cut, (t, s) as well as (s, t)."""
    h, block = 1 << level, tl.arange(0, C) >> level
    target = (block % 2 == 1)[:, None]
    decay = tl.exp2(-tl.abs(G_i - load(G, (rows & -(2 * h)) + h - 1, d, T, stride, D)))
    return (tl.where(target, q, k) * decay).to(q.dtype), decay, target, (block ^ 1)[:, None] == block[None, :]


@triton.jit(do_not_specialize=["T"])
def outputs_kernel(q, k, v, G, states, o, T, H, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
                   C: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """O = M V + (Q e^G) S;  REVERSE: O = M^T V + (K e^{whole - G}) S."""
    n, b_h = tl.program_id(1), tl.program_id(0).to(tl.int64)
    i, d, e = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BE)
    t, s, rows, key, value = i[:, None], i[None, :], n * C + i, place(b_h, H, H, T, D), place(b_h, H, H, T, E)
    q_i, k_i = load(q + key, rows, d, T, H * D, D), load(k + key, rows, d, T, H * D, D)
    G_i = load(G + key, rows, d, T, H * D, D)
    if REVERSE:
        whole = last_of(G + key, n, d, T, H * D, D, C)
        read = k_i * tl.exp2(tl.minimum(whole[None, :] - G_i, 0.0))
    else:
        read = q_i * tl.exp2(G_i)
    S = tl.load(state_at(states, b_h * tl.num_programs(1) + n, d, e, BD, BE))
    o_i = tl.dot(read.to(q_i.dtype), S, input_precision=PRECISION)
    M = tl.dot(q_i, tl.trans(k_i), input_precision=PRECISION)                                # its diagonal
    for level in range(levels_of(C)):
        Z, _, _, cut = at_level(level, q_i, k_i, G + key, G_i, rows, d, T, H * D, D, C)
        M = tl.where(cut, tl.dot(Z, tl.trans(Z), input_precision=PRECISION), M)
    M = tl.where(t <= s if REVERSE else t >= s, M, 0.0).to(q_i.dtype)
    o_i = tl.dot(M, load(v + value, rows, e, T, H * E, E), acc=o_i, input_precision=PRECISION)
    store(o + value, o_i, rows, e, T, H * E, E)


@triton.jit(do_not_specialize=["T"])
def gradients_kernel(q, k, v, G, do, states, dstates, dq, dk, dg, T, H, D: tl.constexpr, E: tl.constexpr,
                     BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """dQ = e^G dO S^T,  dK = e^{whole - G} V R^T,  with R the gradient of the state behind the chunk, and what dM gives
    at each level. g enters as e^{G_t - G_s}, s < t, alone, so

        dg_u = sum_{t >= u} q_t dq_t  of the pairs with s before the chunk  +  sum_{s < u} k_s dk_s  with t behind it
               + e^{whole} S R  with both outside  +  sum_{i >= u} (q_i dq_i - k_i dk_i)  of those inside

    of which the last cancels where t and s are both at u or later. It does so exactly, whatever is rounded, with both
    sides taken from the rounded Z: Z_i (dM Z)_i."""
    n, b_h = tl.program_id(1), tl.program_id(0).to(tl.int64)
    i, d, e = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BE)
    t, s, rows, key, value = i[:, None], i[None, :], n * C + i, place(b_h, H, H, T, D), place(b_h, H, H, T, E)
    do_i, v_i = load(do + value, rows, e, T, H * E, E), load(v + value, rows, e, T, H * E, E)
    dM = tl.dot(do_i, tl.trans(v_i), input_precision=PRECISION)
    own = tl.sum(tl.where(t == s, dM, 0.0), axis=1)[:, None]
    dM = tl.where(t >= s, dM, tl.dot(v_i, tl.trans(do_i), input_precision=PRECISION)).to(do_i.dtype)
    q_i, k_i = load(q + key, rows, d, T, H * D, D), load(k + key, rows, d, T, H * D, D)
    G_i, whole = load(G + key, rows, d, T, H * D, D), last_of(G + key, n, d, T, H * D, D, C)
    this = b_h * tl.num_programs(1) + n
    S, R = tl.load(state_at(states, this, d, e, BD, BE)), tl.load(state_at(dstates, this, d, e, BD, BE))
    dq_i = tl.exp2(G_i) * tl.dot(do_i, tl.trans(S), input_precision=PRECISION)
    dk_i = tl.dot(v_i, tl.trans(R), input_precision=PRECISION) * tl.exp2(tl.minimum(whole[None, :] - G_i, 0.0))
    read, written = q_i * dq_i, k_i * dk_i
    over = tl.exp2(whole) * tl.sum(S.to(tl.float32) * R, axis=1) + tl.sum(written, axis=0)
    x = read - written
    dq_i += own * k_i
    dk_i += own * q_i
    for level in range(levels_of(C)):
        Z, decay, target, cut = at_level(level, q_i, k_i, G + key, G_i, rows, d, T, H * D, D, C)
        dZ = tl.dot(tl.where(cut, dM, 0.0).to(Z.dtype), Z, input_precision=PRECISION)
        to_q = target.to(tl.float32)
        dq_i += to_q * (decay * dZ)
        dk_i += (1.0 - to_q) * (decay * dZ)
        x += (2.0 * to_q - 1.0) * (Z * dZ)
    store(dq + key, dq_i, rows, d, T, H * D, D)
    store(dk + key, dk_i, rows, d, T, H * D, D)
    store(dg + key, sums(t <= s, x, q_i, PRECISION) + over[None, :], rows, d, T, H * D, D)


def settings(q, v):
    """Sizes, what the products need besides, shape and grid. All tiles are 64 wide: for some that were narrower, and
    lay in shared memory where a wider one had been, ptxas 12.8 (Triton 3.6, 3.7) hands the tensor cores an address that
    it has never computed."""
    (b, t, h, d), e = q.shape, v.shape[-1]
    C, products = CHUNK, {"PRECISION": "tf32", "num_warps": 4, "num_stages": 1}
    if q.dtype == torch.float32:                                 # exact and slow: no tensor cores, smaller tiles
        C, products = CHUNK // 2, products | {"PRECISION": "ieee", "num_warps": 8}
    return {"D": d, "E": e, "BD": 64, "BE": 64, "C": C}, products, (t, h), (b * h, -(-t // C))


def states_of(k, v, g, S0, S_T, reverse):
    """G, and the state before each chunk, beginning with S0, in k's dtype; the last one is put in S_T. Reverse: the
    gradient of the state behind each."""
    sizes, products, shape, grid = settings(k, v)
    G, states = torch.empty_like(g), k.new_empty(*grid, 64, 64)
    run(adds_kernel, grid, k, v, g, G, states, *shape, **sizes, **products, REVERSE=reverse)
    run(walk_kernel, (grid[0], 16), states, G, S0, S_T, *shape, **sizes, ROWS=4, REVERSE=reverse, num_warps=1)
    return G, states


def twin(q, k, v, g, S0):
    """The reference, for arguments as GLA takes them."""
    o, S = reference(*(x.transpose(1, 2) for x in (q, k, v, g)), S0)
    return o.transpose(1, 2), S


class GLA(torch.autograd.Function):
    """q, k, v: (b, t, h, d) in one piece; g: the same, float32; S0: (b, h, d, e) or None."""

    @staticmethod
    def forward(ctx, q, k, v, g, S0):
        sizes, products, shape, grid = settings(q, v)
        o, S_T = torch.empty_like(v), q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
        G, states = states_of(k, v, g, S0, S_T, False)
        run(outputs_kernel, grid, q, k, v, G, states, o, *shape, **sizes, **products, REVERSE=False)
        ctx.save_for_backward(q, k, v, g, S0, states)
        ctx.set_materialize_grads(False)
        return o, S_T

    @staticmethod
    def backward(ctx, do, dS_T):
        q, k, v, g, S0, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(twin, (q, k, v, g, S0), (do, dS_T))
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dS_T = None if dS_T is None else dS_T.contiguous()
        sizes, products, shape, grid = settings(q, v)
        dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, g))
        dS0 = None if S0 is None else torch.empty_like(S0)
        G, dstates = states_of(q, do, g, dS_T, dS0, True)
        run(outputs_kernel, grid, q, k, do, G, dstates, dv, *shape, **sizes, **products, REVERSE=True)
        run(gradients_kernel, grid, q, k, v, G, do, states, dstates, dq, dk, dg, *shape, **sizes, **products)
        return dq, dk, dv, dg, dS0


def gla(q, k, v, g, state=None):
    """o_t = sum_{s <= t} sum_d q_td k_sd e^{g_{s+1,d} + ... + g_t,d} v_s, and the state after: lesson 02's form.

    q, k: (b, h, t, d), v: (b, h, t, e), of one dtype, float32 or 16 bits; g: log decay, at most 0, four axes that
    broadcast to (b, h, t, d); state: (b, h, d, e) or None. Returns o: (b, h, t, e) and the state, float32. A chunk's
    state is on chip, 64 x 64 numbers; wider heads are done in parts, as in kernels.linear_attention."""
    d, e, g = q.shape[-1], v.shape[-1], g.expand(q.shape)
    if d > 64:
        parts = [gla(q[..., i], k[..., i], v, g[..., i], None if state is None else state[:, :, i])
                 for i in (slice(0, 64), slice(64, d))]
        return parts[0][0] + parts[1][0], torch.cat([S for _, S in parts], dim=2)
    if e > 64:
        parts = [gla(q, k, v[..., i], g, None if state is None else state[..., i])
                 for i in (slice(0, 64), slice(64, e))]
        return tuple(torch.cat(pair, dim=-1) for pair in zip(*parts, strict=True))
    q, k, v, g = (in_one_piece(x, 16) for x in (q, k, v, g.float()))
    if state is not None:
        state = F.pad(state.float(), (0, v.shape[-1] - e, 0, q.shape[-1] - d)).contiguous()
    o, S = GLA.apply(q, k, v, g, state)
    return without_zeros(o, e), state_without_zeros(S, d, e)


if __name__ == "__main__":
    from kernels import tables
    tables.gla()

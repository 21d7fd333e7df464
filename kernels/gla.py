"""Gated linear attention: a decay for each key channel and token. The linear attention of GLA and RWKV-6.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t                     forms and names as in lesson 02

A walk over chunks of 64 tokens with the state on chip, as in kernels.linear_attention. What a vector gate makes hard
is the matrix in a chunk, M_ts = sum_d q_td k_sd e^{g_{s+1,d} + ... + g_t,d}: q e^{G_t} times k e^{-G_s} would
overflow where a channel forgets fast. Halving takes care of it: cut the chunk in two; with r the cut, all pairs (t,
s) across it are

    (q_t e^{g_{r+1} + ... + g_t}) . (k_s e^{g_{s+1} + ... + g_r})                     no exponent is above 0

one matrix product; then cut each half in two, and so on: 32, 16, ... 1. A token is a target or a source at a cut, so
each of the log2(64) = 6 levels needs one exponential X a number, and one product of 64 x 64 x d, masked to the pairs
that it cuts. The exponents are sums of g, found by a product with a matrix of zeros and ones (g in two halves of its
digits).

Memory sees q, k, g, v and o once; tensor cores do some 20 products of 64 x 64 x d for a chunk.

    python -m kernels.gla      check, then a table
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.tiles import decay_gradient, differentiable_gradients, in_one_piece, load, place, store, without_zeros

CHUNK = 64


def levels(t, device):
    """For a chunk of t tokens, at each cut h = 1, 2, 4, ...: W, (W g)_i the exponent of token i as a target or a
    source, and which pairs (t, s) are cut."""
    i = torch.arange(t, device=device)
    t, s = i[:, None], i[None, :]
    h = 1
    while h < len(i):
        odd = t // h % 2 == 1
        yield (t // h == s // h) & torch.where(odd, s <= t, s > t), odd & (t // h == s // h + 1)
        h *= 2


def reference(q, k, v, g, state=None):
    """The kernel's loop over chunks. q, k, g: (b, h, t, d), v: (b, h, t, e), state: (b, h, d, e) or None. Returns o:
    (b, h, t, e) and the state after."""
    more, o = torch.promote_types(q.dtype, torch.float32), []
    S = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=more) if state is None else state
    for i in range(0, q.shape[2], CHUNK):
        q_i, k_i, v_i, g_i = (x[:, :, i:i + CHUNK] for x in (q, k, v, g))
        M = (q_i @ k_i.mT) * torch.eye(q_i.shape[2], device=q.device)
        for W, cut in levels(q_i.shape[2], q.device):
            X = (W.to(g.dtype) @ g_i).exp()
            M = M + ((q_i * X).to(q.dtype) @ (k_i * X).to(k.dtype).mT) * cut
        G = g_i.cumsum(dim=2)
        whole = G[:, :, -1:]
        o.append(M.to(v.dtype) @ v_i + (q_i * G.exp()).to(q.dtype) @ S.to(q.dtype))
        S = whole.exp().mT * S + (k_i * (whole - G).exp()).to(k.dtype).mT @ v_i
    return torch.cat(o, dim=2), S


@triton.jit
def sums(W, g, like, PRECISION: tl.constexpr):
    """W g for a matrix W of zeros and ones; in 16 bits, g is given in two parts, its first digits and the rest."""
    if like.dtype == tl.float32:
        s = tl.dot(W.to(tl.float32), g, input_precision=PRECISION)
    else:
        first = g.to(like.dtype)
        s = tl.dot(W.to(like.dtype), first)
        s = tl.dot(W.to(like.dtype), (g - first.to(tl.float32)).to(like.dtype), acc=s)
    return s


@triton.jit
def cut(level, C: tl.constexpr):
    """W and the pairs of the cut h = 2^level, as levels() yields them: t and s are cut where that is their first bit
    that differs."""
    t, s, h = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :], 1 << level
    W = ((t ^ s) < h) & (((t & h) != 0) == (s <= t))
    return W, (t > s) & ((t ^ s) >= h) & ((t ^ s) < 2 * h)


@triton.jit
def matrix(q, k, g, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """M: (t, s)"""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    M = tl.where(t == s, tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
    for level in range(LEVELS):
        W, pairs = cut(level, C)
        X = tl.exp(sums(W, g, q, PRECISION))
        M += tl.where(pairs, tl.dot((q * X).to(q.dtype), tl.trans((k * X).to(k.dtype)), input_precision=PRECISION), 0.0)
    return M


@triton.jit
def upto(g, like, C: tl.constexpr, AFTER: tl.constexpr, PRECISION: tl.constexpr):
    """g_1 + ... + g_t for each row of a chunk, its own included; or what comes after it."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return sums(s > t if AFTER else s <= t, g, like, PRECISION)


@triton.jit
def absorb(S, k, v, g, C: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """The state behind a chunk: decayed by all of g, and with k v^T decayed since their row (REVERSE: up to it)."""
    k = (k * tl.exp(upto(g, k, C, not REVERSE, PRECISION))).to(k.dtype)
    return tl.dot(tl.trans(k), v, acc=S * tl.exp(tl.sum(g, axis=0))[:, None], input_precision=PRECISION)


@triton.jit
def enter(S0, states, decays, d, e, n, head, N, D: tl.constexpr, E: tl.constexpr, REVERSE: tl.constexpr):
    """The state in which segment n of N begins: S0, then what each segment before it (behind it) adds."""
    inside = (d[:, None] < D) & (e[None, :] < E)
    at = d[:, None] * E + e[None, :]
    S = tl.zeros((d.shape[0], e.shape[0]), tl.float32)
    if S0 is not None:
        S += tl.load(S0 + head * D * E + at, mask=inside, other=0.0)
    if states is not None:
        for j in range(N - 1 - n if REVERSE else n):
            segment = head * N + (N - 1 - j if REVERSE else j)
            S *= tl.exp(tl.load(decays + segment * D + d, mask=d < D, other=0.0))[:, None]
            S += tl.load(states + segment * D * E + at, mask=inside, other=0.0)
    return S


@triton.jit
def segment_kernel(k, v, g, states, decays, T, H, segment, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr,
                   BE: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, REVERSE: tl.constexpr,
                   PRECISION: tl.constexpr):
    """What each segment adds to the state, and the sum of its g."""
    n, b_h = tl.program_id(1), tl.program_id(0).to(tl.int64)
    d, e, end = tl.arange(0, BD), tl.arange(0, BE), tl.minimum(T, (n + 1) * segment)
    key, value = place(b_h, H, H, T, D), place(b_h, H, H, T, E)
    S, total = tl.zeros((BD, BE), tl.float32), tl.zeros((BD,), tl.float32)
    chunks = tl.cdiv(end - n * segment, C)
    for step in range(chunks):
        rows = n * segment + (chunks - 1 - step if REVERSE else step) * C + tl.arange(0, C)
        g_i = load(g + key, rows, d, end, H * D, D)
        S = absorb(S, load(k + key, rows, d, end, H * D, D), load(v + value, rows, e, end, H * E, E), g_i, C, REVERSE,
                   PRECISION)
        total += tl.sum(g_i, axis=0)
    this = b_h * tl.num_programs(1) + n
    tl.store(states + this * D * E + d[:, None] * E + e[None, :], S, mask=(d[:, None] < D) & (e[None, :] < E))
    tl.store(decays + this * D + d, total, mask=d < D)


@triton.jit
def forward_kernel(q, k, v, g, S0, states, decays, o, S_T, T, H, segment, D: tl.constexpr, E: tl.constexpr,
                   BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    n, N, b_h = tl.program_id(1), tl.num_programs(1), tl.program_id(0).to(tl.int64)
    d, e, end = tl.arange(0, BD), tl.arange(0, BE), tl.minimum(T, (n + 1) * segment)
    key, value = place(b_h, H, H, T, D), place(b_h, H, H, T, E)
    S = enter(S0, states, decays, d, e, n, b_h, N, D, E, False)
    for step in range(tl.cdiv(end - n * segment, C)):
        rows = n * segment + step * C + tl.arange(0, C)
        q_i, k_i = load(q + key, rows, d, end, H * D, D), load(k + key, rows, d, end, H * D, D)
        g_i, v_i = load(g + key, rows, d, end, H * D, D), load(v + value, rows, e, end, H * E, E)
        read = (q_i * tl.exp(upto(g_i, q_i, C, False, PRECISION))).to(q_i.dtype)
        o_i = tl.dot(read, S.to(q_i.dtype), input_precision=PRECISION)
        M = matrix(q_i, k_i, g_i, C, LEVELS, PRECISION)
        o_i = tl.dot(M.to(v_i.dtype), v_i, acc=o_i, input_precision=PRECISION)
        store(o + value, o_i, rows, e, end, H * E, E)
        S = absorb(S, k_i, v_i, g_i, C, False, PRECISION)
    if n == N - 1:
        tl.store(S_T + b_h * D * E + d[:, None] * E + e[None, :], S, mask=(d[:, None] < D) & (e[None, :] < E))


@triton.jit
def dq_kernel(k, v, g, do, S0, states, decays, dq, T, H, segment, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr,
              BE: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """dQ = (dM with decay) K + e^{G} dO S^T, with dM_ts = do_t . v_s: forwards, as forward."""
    n, N, b_h = tl.program_id(1), tl.num_programs(1), tl.program_id(0).to(tl.int64)
    d, e, end = tl.arange(0, BD), tl.arange(0, BE), tl.minimum(T, (n + 1) * segment)
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    key, value = place(b_h, H, H, T, D), place(b_h, H, H, T, E)
    S = enter(S0, states, decays, d, e, n, b_h, N, D, E, False)
    for step in range(tl.cdiv(end - n * segment, C)):
        rows = n * segment + step * C + tl.arange(0, C)
        do_i, v_i = load(do + value, rows, e, end, H * E, E), load(v + value, rows, e, end, H * E, E)
        g_i, k_i = load(g + key, rows, d, end, H * D, D), load(k + key, rows, d, end, H * D, D)
        dq_i = tl.dot(do_i, tl.trans(S.to(do_i.dtype)), input_precision=PRECISION)
        dq_i *= tl.exp(upto(g_i, k_i, C, False, PRECISION))
        dM = tl.dot(do_i, tl.trans(v_i), input_precision=PRECISION)
        dq_i = tl.dot(tl.where(t == s, dM, 0.0).to(k_i.dtype), k_i, acc=dq_i, input_precision=PRECISION)
        for level in range(LEVELS):
            W, pairs = cut(level, C)
            X = tl.exp(sums(W, g_i, k_i, PRECISION))
            dq_i += X * tl.dot(tl.where(pairs, dM, 0.0).to(k_i.dtype), (k_i * X).to(k_i.dtype),
                               input_precision=PRECISION)
        store(dq + key, dq_i, rows, d, end, H * D, D)
        S = absorb(S, k_i, v_i, g_i, C, False, PRECISION)


@triton.jit
def dkv_kernel(q, k, v, g, do, dS_T, states, decays, dk, dv, dS0, T, H, segment, D: tl.constexpr, E: tl.constexpr,
               BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """dV = M^T dO + (K e^{G - G_s}) R,  dK = (dM with decay)^T Q + e^{G - G_s} V R^T,  with R the state of q and do:
    backwards."""
    n, N, b_h = tl.program_id(1), tl.num_programs(1), tl.program_id(0).to(tl.int64)
    start, end = n * segment, tl.minimum(T, (n + 1) * segment)
    d, e, t, s = tl.arange(0, BD), tl.arange(0, BE), tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    key, value = place(b_h, H, H, T, D), place(b_h, H, H, T, E)
    R = enter(dS_T, states, decays, d, e, n, b_h, N, D, E, True)
    chunks = tl.cdiv(end - start, C)
    for step in range(chunks):
        rows = start + (chunks - 1 - step) * C + tl.arange(0, C)
        q_i, k_i = load(q + key, rows, d, end, H * D, D), load(k + key, rows, d, end, H * D, D)
        do_i, v_i = load(do + value, rows, e, end, H * E, E), load(v + value, rows, e, end, H * E, E)
        g_i = load(g + key, rows, d, end, H * D, D)
        after = tl.exp(upto(g_i, k_i, C, True, PRECISION))
        dv_i = tl.dot((k_i * after).to(k_i.dtype), R.to(k_i.dtype), input_precision=PRECISION)
        M = matrix(q_i, k_i, g_i, C, LEVELS, PRECISION)
        dv_i = tl.dot(tl.trans(M.to(do_i.dtype)), do_i, acc=dv_i, input_precision=PRECISION)
        store(dv + value, dv_i, rows, e, end, H * E, E)
        dk_i = after * tl.dot(v_i, tl.trans(R.to(v_i.dtype)), input_precision=PRECISION)
        dM = tl.dot(v_i, tl.trans(do_i), input_precision=PRECISION)                          # (s, t)
        dk_i = tl.dot(tl.where(t == s, dM, 0.0).to(q_i.dtype), q_i, acc=dk_i, input_precision=PRECISION)
        for level in range(LEVELS):
            W, pairs = cut(level, C)
            X = tl.exp(sums(W, g_i, k_i, PRECISION))
            dk_i += X * tl.dot(tl.where(tl.trans(pairs), dM, 0.0).to(q_i.dtype), (q_i * X).to(q_i.dtype),
                               input_precision=PRECISION)
        store(dk + key, dk_i, rows, d, end, H * D, D)
        R = absorb(R, q_i, do_i, g_i, C, True, PRECISION)
    if dS0 is not None:
        if n == 0:
            tl.store(dS0 + b_h * D * E + d[:, None] * E + e[None, :], R, mask=(d[:, None] < D) & (e[None, :] < E))


def settings(q, v):
    """Sizes and segments, and the launch options that were fastest on an H100. A state is always a tile of 64 x 64:
    with narrower ones, Triton 3.6 makes wrong gradients of 16-bit inputs."""
    b, t, h, d, e = *q.shape, v.shape[-1]
    sizes = {"D": d, "E": e, "BD": 64, "BE": 64, "C": CHUNK, "LEVELS": CHUNK.bit_length() - 1, "PRECISION": "tf32",
             "num_stages": 2, "num_warps": 4}
    if q.dtype == torch.float32:                                 # exact and slow: no tensor cores, smaller tiles
        sizes |= {"C": CHUNK // 2, "LEVELS": sizes["LEVELS"] - 1, "PRECISION": "ieee", "num_stages": 1, "num_warps": 8}
    segments = max(1, min(256 // (b * h), t // 512))
    segment = triton.cdiv(triton.cdiv(t, segments), CHUNK) * CHUNK
    return sizes, (t, h, segment), (b * h, triton.cdiv(t, segment))


def segment_states(k, v, g, reverse):
    """The states that the segments leave from zero: (b h, segments, d, e), and the sums of g in each. None for
    one."""
    sizes, shape, grid = settings(k, v)
    if grid[1] == 1:
        return None, None
    states = torch.empty(*grid, k.shape[-1], v.shape[-1], device=k.device)
    decays = torch.empty(*grid, k.shape[-1], device=k.device)
    segment_kernel[grid](k, v, g, states, decays, *shape, REVERSE=reverse, **sizes)
    return states, decays


def twin(q, k, v, g, S0):
    """The reference, for arguments as GLA takes them."""
    o, S = reference(*(x.transpose(1, 2) for x in (q, k, v, g)), S0)
    return o.transpose(1, 2), S


class GLA(torch.autograd.Function):
    """q, k, v: (b, t, h, d) in one piece; g: the same, float32."""

    @staticmethod
    def forward(ctx, q, k, v, g, S0):
        sizes, shape, grid = settings(q, v)
        o, S_T = torch.empty_like(v), q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
        states, decays = segment_states(k, v, g, False)
        forward_kernel[grid](q, k, v, g, S0, states, decays, o, S_T, *shape, **sizes)
        ctx.save_for_backward(q, k, v, g, S0, states, decays, S_T)
        ctx.set_materialize_grads(False)
        return o, S_T

    @staticmethod
    def backward(ctx, do, dS_T):
        q, k, v, g, S0, states, decays, S_T = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(twin, (q, k, v, g, S0), (do, dS_T))
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dS_T = None if dS_T is None else dS_T.contiguous()
        sizes, shape, grid = settings(q, v)
        dq, dk = (torch.empty_like(x, dtype=torch.float32) for x in (q, k))      # dg is a sum of small differences
        dv, dS0 = torch.empty_like(v), None if S0 is None else torch.empty_like(S0)
        dstates, ddecays = segment_states(q, do, g, True)
        dq_kernel[grid](k, v, g, do, S0, states, decays, dq, *shape, **sizes)
        dkv_kernel[grid](q, k, v, g, do, dS_T, dstates, ddecays, dk, dv, dS0, *shape, **sizes)
        last = None if dS_T is None else (S_T * dS_T).sum(dim=-1)                            # (b, h, d)
        return dq.to(q.dtype), dk.to(k.dtype), dv, decay_gradient(q, dq, k, dk, last, True), dS0


def gla(q, k, v, g, state=None):
    """o_t = sum_{s <= t} sum_d q_td k_sd e^{g_{s+1,d} + ... + g_t,d} v_s, and the state after: lesson 02's form.

    q, k: (b, h, t, d), v: (b, h, t, e), of one dtype, float32 or 16 bits; g: log decay, at most 0, four axes that
    broadcast to (b, h, t, d); state: (b, h, d, e) or None. Returns o: (b, h, t, e) and the state, float32. The
    state of a head is on chip, up to 64 x 64 numbers of it; wider heads are done in parts, as in
    kernels.linear_attention."""
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
    return without_zeros(o, e), S[:, :, :d, :e]


def main():
    from kernels import bench
    rates = bench.print_machine()

    def shapes(t, b=1, h=4):
        q, k, v = bench.random(*[(b, h, t, 64)] * 3)
        return q * 0.125, k, v, -bench.random((b, h, t, 64), dtype=torch.float32, seed=2)[0].abs() / 16

    def output(f):
        return lambda *x: f(*x)[0]
    bench.check(output(gla), output(reference), ("twin", output(reference)), shapes, "qkvg", loose="g")
    rows = []
    for t in (2048, 8192, 32768):
        tensors = shapes(t, 32768 // t, 16)
        size, others = tensors[0].numel(), {"twin": output(reference)} if t == 8192 else {}
        rows.append((f"b {32768 // t} h 16 t {t} d 64", {"kernel": output(gla)} | others, tensors, 12 * size,
                     size // 64 * (20 * 2 * CHUNK * 64)))
    bench.compare(rows, rates)


if __name__ == "__main__":
    main()

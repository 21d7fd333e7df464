"""Linear attention, with no decay, a constant one, or one number for each token: one pass over memory.

    S_t = e^{g_t} S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t                    forms and names as in lesson 02

(beta, a factor of what is written, is Mamba-2's dt; where it is not given it is 1, and left out below.)

A program owns one head and a block of value columns. It walks over chunks of 64 tokens with the state S: (d, block)
on chip. With G the sum of g from the start of the chunk, up to and including its row,

    P = (Q K^T) * e^{G_t - G_s}, s <= t      O = P V + e^{G_t} Q S      S <- e^{G} S + (K e^{G - G_s})^T V

so memory sees q, k, v once and o once: 8 d bytes for a token and head in bfloat16 (d = e), against 4 d (64 + d) FLOPs
on tensor cores, a quarter of what an H100 could do meanwhile: bound by memory.

The gradients are the same walk, with the arguments in other places. From dP_ts = do_t . v_s,

    dV = walk(K, Q, dO) backwards in time      dK = walk(V, dO, Q) backwards      dQ = walk(dO, V, K) forwards

and dbeta = k . dk / beta, dg_t = sum_{t' >= t} (q . dq - k . dk)_{t'}, because g enters as e^{G_t - G_s} alone. dg is a
small difference of large sums, in which the rounding of 16 bits would grow with the sequence: it is taken over 256
tokens, at whose end the state and its gradient say what is behind them.

Few heads leave most of the GPU idle. Then the sequence is cut into segments: a first pass finds the state that each
segment would leave from zero; in a second, each starts from those before it, added up, and all segments run at once.

    python -m kernels.linear_attention [--peers]      check, then tables; with --peers, Mamba-2's beside mamba-ssm's
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.tiles import (
    cdiv,
    differentiable_gradients,
    in_one_piece,
    load,
    next_power_of_2,
    place,
    run,
    state_without_zeros,
    store,
    without_zeros,
)

CHUNK = 64
SPAN = tl.constexpr(256)         # tokens over which g's gradient is summed up
LEAST = tl.constexpr(1e-30)      # what beta is made at least: its gradient is a quotient


def reference(q, k, v, g=None, state=None, beta=None):
    """The kernel's loop over chunks; in 16 bits, what is added up is in float32, and what is multiplied is not. q, k:
    (b, h, t, d), v: (b, h, t, e), g: log decay and beta: (b, h, t, 1) or None, state: (b, h, d, e) or None. Returns
    o: (b, h, t, e) and the state after."""
    more = torch.promote_types(q.dtype, torch.float32)
    S = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=more) if state is None else state
    g, o = q.new_zeros(*q.shape[:3], 1, dtype=more) if g is None else g, []
    v = v if beta is None else (v * beta).to(v.dtype)
    for i in range(0, q.shape[2], CHUNK):
        q_i, k_i, v_i, g_i = (x[:, :, i:i + CHUNK] for x in (q, k, v, g))
        G = g_i.cumsum(dim=2)
        P = ((q_i @ k_i.mT) * (G - G.mT).tril().exp()).tril()
        o.append((P.to(v.dtype) @ v_i + G.exp() * (q_i @ S.to(q.dtype))).to(v.dtype))
        whole = G[:, :, -1:]
        S = whole.exp() * S + (k_i * (whole - G).exp()).to(k.dtype).mT @ v_i
    return torch.cat(o, dim=2), S


@triton.jit
def state_tile(S, d, e, rows, cols, D: tl.constexpr, E: tl.constexpr):
    """Pointers to a tile of a state in memory, and which of them are inside. rows, cols: strides."""
    return S + d[:, None] * rows + e[None, :] * cols, (d[:, None] < D) & (e[None, :] < E)


@triton.jit
def walk(q, k, v, g, beta, o, S, e, start, end, HK, HV, H, g_stride, x, xo, kept, D: tl.constexpr, E: tl.constexpr,
         BD: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr, READ: tl.constexpr, PRECISION: tl.constexpr):
    """o_t = sum_{s <= t} e^{G_t - G_s} (q_t . k_s) v_s for rows start to end, from the state S: (BD, len(e)).
    q and k have HK heads, v and x HV, o H. REVERSE: the sum is over s >= t, with e^{G_s - G_t}. beta, if given, is a
    factor of v_s, or, REVERSE, of o_t. If xo is given, x_t . o_t goes there; if kept is, the state at every SPAN rows:
    before them, REVERSE behind them. Returns the state behind the last row, and the sum of g."""
    i, d = tl.arange(0, C), tl.arange(0, BD)
    total = 0.0
    chunks = tl.cdiv(end - start, C)
    for n in range(chunks):
        first_row = start + (chunks - 1 - n if REVERSE else n) * C
        rows = first_row + i
        if kept is not None:
            at, inside = state_tile(kept + (first_row // SPAN).to(tl.int64) * D * E, d, e, E, 1, D, E)
            edge = SPAN - C if REVERSE else 0
            tl.store(at, S.to(kept.dtype.element_ty), mask=inside & (first_row % SPAN == edge))
        k_i = load(k, rows, d, end, HK * D, D)
        v_i = load(v, rows, e, end, HV * E, E)
        written = k_i
        if g is not None:
            g_i = tl.load(g + rows * g_stride, mask=rows < end, other=0.0)
            G, whole = tl.cumsum(g_i), tl.sum(g_i)
            first, last = (whole - G, G) if REVERSE else (G, whole - G)      # from the side that the walk comes from
            of_source, of_target = tl.exp(last), tl.exp(first)
            if beta is not None:
                beta_i = tl.maximum(tl.load(beta + rows * g_stride, mask=rows < end, other=0.0), LEAST)
                of_source, of_target = (of_source, of_target * beta_i) if REVERSE else (of_source * beta_i, of_target)
            written = (k_i * of_source[:, None]).to(k_i.dtype)
        if READ:
            q_i = load(q, rows, d, end, HK * D, D)
            if xo is not None:
                x_i = load(x, rows, e, end, HV * E, E)                                       # asked for early
            P = tl.dot(q_i, tl.trans(k_i), input_precision=PRECISION)                        # (t, s)
            seen = i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :]
            o_i = tl.dot(q_i, S.to(q_i.dtype), input_precision=PRECISION)
            if g is not None:
                P *= tl.exp(tl.where(seen, first[:, None] - first[None, :], 0.0))
                if beta is not None:
                    P *= beta_i[:, None] if REVERSE else beta_i[None, :]             # rounded alike in dk and dq
                o_i *= of_target[:, None]
            P = tl.where(seen, P, 0.0).to(v_i.dtype)
            o_i = tl.dot(P, v_i, acc=o_i, input_precision=PRECISION)
            store(o, o_i, rows, e, end, H * E, E)
            if xo is not None:
                tl.store(xo + rows, tl.sum(o_i * x_i, axis=1), mask=rows < end)
        if g is not None:
            S *= tl.exp(whole)
            total += whole
        S = tl.dot(tl.trans(written), v_i, acc=S, input_precision=PRECISION)
    return S, total


@triton.jit
def enter(S0, states, decays, d, e, n, head, N, rows, cols, D: tl.constexpr, E: tl.constexpr, REVERSE: tl.constexpr):
    """The state in which segment n of N begins: S0, then what each segment before it (behind it) adds."""
    S = tl.zeros((d.shape[0], e.shape[0]), tl.float32)
    if S0 is not None:
        at, inside = state_tile(S0 + head * D * E, d, e, rows, cols, D, E)
        S += tl.load(at, mask=inside, other=0.0)
    if states is not None:
        for j in range(N - 1 - n if REVERSE else n):
            segment = head * N + (N - 1 - j if REVERSE else j)
            at, inside = state_tile(states + segment * D * E, d, e, rows, cols, D, E)
            S = S * tl.exp(tl.load(decays + segment)) + tl.load(at, mask=inside, other=0.0)
    return S


@triton.jit(do_not_specialize=["T"])
def segment_kernel(k, v, g, beta, states, decays, T, H, segment, HK, g_b, g_h, g_t, D: tl.constexpr, E: tl.constexpr,
                   BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr,
                   PRECISION: tl.constexpr):
    """What each segment adds to the state."""
    n, b_h = tl.program_id(1), tl.program_id(0).to(tl.int64)
    d, e = tl.arange(0, BD), tl.program_id(2) * BE + tl.arange(0, BE)
    if g is not None:
        g += b_h // H * g_b + b_h % H * g_h
    if beta is not None:
        beta += b_h // H * g_b + b_h % H * g_h
    k, v, S = k + place(b_h, H, HK, T, D), v + place(b_h, H, H, T, E), tl.zeros((BD, BE), tl.float32)
    S, total = walk(k, k, v, g, beta, v, S, e, n * segment, tl.minimum(T, (n + 1) * segment), HK, H, H, g_t, None, None,
                    None, D, E, BD, C, REVERSE, False, PRECISION)
    this = b_h * tl.num_programs(1) + n
    at, inside = state_tile(states + this * D * E, d, e, E, 1, D, E)
    tl.store(at, S, mask=inside)
    tl.store(decays + this, total)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(q, k, v, g, beta, S0, states, decays, o, S_T, kept, T, H, segment, HK, g_b, g_h, g_t,
                   D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr,
                   PRECISION: tl.constexpr):
    n, N, b_h = tl.program_id(1), tl.num_programs(1), tl.program_id(0).to(tl.int64)
    d, e = tl.arange(0, BD), tl.program_id(2) * BE + tl.arange(0, BE)
    if g is not None:
        g += b_h // H * g_b + b_h % H * g_h
    if beta is not None:
        beta += b_h // H * g_b + b_h % H * g_h
    key, value = place(b_h, H, HK, T, D), place(b_h, H, H, T, E)
    if kept is not None:
        kept += b_h * tl.cdiv(T, SPAN) * D * E
    S = enter(S0, states, decays, d, e, n, b_h, N, E, 1, D, E, False)
    S, _ = walk(q + key, k + key, v + value, g, beta, o + value, S, e, n * segment, tl.minimum(T, (n + 1) * segment),
                HK, H, H, g_t, None, None, kept, D, E, BD, C, False, True, PRECISION)
    if n == N - 1:
        at, inside = state_tile(S_T + b_h * D * E, d, e, E, 1, D, E)
        tl.store(at, S, mask=inside)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(q, k, v, g, beta, do, S0, dS_T, states, decays, dstates, dq, dk, dv, dS0, x, kept, T, H, segment,
                    HK, g_b, g_h, g_t, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
                    BLOCK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Three walks at once, over blocks of the E columns of dv, the D columns of dk, and those of dq. The states of dk
    and dq are those of dv and o, transposed. If x is given, k . dk and q . dq of a block go there, (blocks, b h, t),
    and the gradients of the states behind every SPAN tokens to kept."""
    n, N, b_h = tl.program_id(1), tl.num_programs(1), tl.program_id(0).to(tl.int64)
    start, end, of_dv, of_dk = n * segment, tl.minimum(T, (n + 1) * segment), tl.cdiv(E, BLOCK), tl.cdiv(D, BLOCK)
    p = tl.program_id(2)
    role = (p >= of_dv).to(tl.int32) + (p >= of_dv + of_dk).to(tl.int32)
    block = (p - (role >= 1) * of_dv - (role == 2) * of_dk) * BLOCK + tl.arange(0, BLOCK)
    if g is not None:
        g += b_h // H * g_b + b_h % H * g_h
    if beta is not None:
        beta += b_h // H * g_b + b_h % H * g_h
    if x is not None:
        x += ((p - of_dv) * tl.num_programs(0).to(tl.int64) + b_h) * T
        kept += b_h * tl.cdiv(T, SPAN) * D * E
    d, e, key, value = tl.arange(0, BD), tl.arange(0, BE), place(b_h, H, HK, T, D), place(b_h, H, H, T, E)
    if role == 0:
        R = enter(dS_T, dstates, decays, d, block, n, b_h, N, E, 1, D, E, True)
        R, _ = walk(k + key, q + key, do + value, g, beta, dv + value, R, block, start, end, HK, H, H, g_t, None, None,
                    kept, D, E, BD, C, True, True, PRECISION)
        if dS0 is not None:
            if n == 0:
                at, inside = state_tile(dS0 + b_h * D * E, d, block, E, 1, D, E)
                tl.store(at, R, mask=inside)
    elif role == 1:
        R_T = enter(dS_T, dstates, decays, e, block, n, b_h, N, 1, E, E, D, True)
        walk(v + value, do + value, q + key, g, beta, dk + place(b_h, H, H, T, D), R_T, block, start, end, H, HK, H,
             g_t, k + key, x, None, E, D, BE, C, True, True, PRECISION)
    else:
        S_T = enter(S0, states, decays, e, block, n, b_h, N, 1, E, E, D, False)
        walk(do + value, v + value, k + key, g, beta, dq + place(b_h, H, H, T, D), S_T, block, start, end, H, HK, H,
             g_t, q + key, x, None, E, D, BE, C, False, True, PRECISION)


@triton.jit(do_not_specialize=["T"])
def decay_kernel(x, S, R, S_T, dS_T, beta, dg, dbeta, T, H, blocks, g_b, g_h, g_t, SIZE: tl.constexpr,
                 PART: tl.constexpr):
    """dg_t = sum_{t' >= t} (q . dq - k . dk)_{t'}, of the rest of a span of tokens only; all that is behind it is
    S . R, the state at its end and the gradient of that. (Summed up to the end of the text, what rounding leaves would
    grow.) And dbeta. x: k . dk and q . dq, (2, blocks, b h, T); S: before each span, R: behind it, (b h, spans,
    SIZE)."""
    b_h, n, spans = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    rows, i = n * SPAN + tl.arange(0, SPAN), tl.arange(0, PART)
    k_dk, q_dq, behind = tl.zeros((SPAN,), tl.float32), tl.zeros((SPAN,), tl.float32), tl.zeros((PART,), tl.float32)
    for j in range(blocks):
        of_k = j * tl.num_programs(0) + b_h
        of_q = of_k + blocks * tl.num_programs(0)
        k_dk += tl.load(x + of_k * T + rows, mask=rows < T, other=0.0)
        q_dq += tl.load(x + of_q * T + rows, mask=rows < T, other=0.0)
    if n < spans - 1:
        at = (b_h * spans + n) * SIZE
        for start in range(0, SIZE, PART):
            inside = start + i < SIZE
            S_i = tl.load(S + at + SIZE + start + i, mask=inside, other=0.0).to(tl.float32)
            behind += S_i * tl.load(R + at + start + i, mask=inside, other=0.0)
    elif dS_T is not None:
        for start in range(0, SIZE, PART):
            inside, at = start + i < SIZE, b_h * SIZE + start + i
            behind += tl.load(S_T + at, mask=inside, other=0.0) * tl.load(dS_T + at, mask=inside, other=0.0)
    tl.store(dg + b_h * T + rows, tl.cumsum(q_dq - k_dk, reverse=True) + tl.sum(behind), mask=rows < T)
    if beta is not None:
        beta_i = tl.load(beta + b_h // H * g_b + b_h % H * g_h + rows * g_t, mask=rows < T, other=1.0)
        tl.store(dbeta + b_h * T + rows, k_dk / tl.maximum(beta_i, LEAST), mask=rows < T)


def settings(q, v, g):
    """Sizes, strides and segments, and the blocks of value columns and launch options that were fastest on an
    H100."""
    (b, t, h, e), (hk, d) = v.shape, q.shape[2:]
    block = 32 if g is None and b * h * cdiv(e, 64) < 128 or max(d, e) > 128 else 64
    stages = 2 if max(d, e) > 64 else 4 if block == 32 else 3
    if g is None and max(d, e) > 128:                            # two would be more than an H100's shared memory
        stages = 1
    sizes = {"D": d, "E": e, "BD": max(16, next_power_of_2(d)), "C": CHUNK, "PRECISION": "tf32", "num_warps": 4,
             "num_stages": stages}
    if q.dtype == torch.float32:                                 # exact and slow: no tensor cores, smaller tiles
        block, sizes = 32, sizes | {"C": CHUNK // 2, "PRECISION": "ieee", "num_warps": 8, "num_stages": 1}
    segments = max(1, min((128 if g is None else 256) // (b * h * cdiv(e, block)), t // 1024))
    segment = cdiv(cdiv(t, segments), SPAN.value) * SPAN.value
    strides = (0, 0, 0) if g is None else g.stride()[:3]
    return block, sizes, (t, h, segment, hk, *strides), (b * h, cdiv(t, segment))


def segment_states(k, v, g, beta, block, sizes, shape, grid, reverse):
    """The states that the segments leave from zero: (b h, segments, d, e), and the sums of g in each. None for
    one."""
    if grid[1] == 1:
        return None, None
    states = torch.empty(*grid, k.shape[-1], v.shape[-1], device=k.device)
    decays = torch.empty(*grid, device=k.device)
    blocks = cdiv(v.shape[-1], block)
    run(segment_kernel, (*grid, blocks), k, v, g, beta, states, decays, *shape, BE=block, REVERSE=reverse, **sizes)
    return states, decays


def twin(q, k, v, g, beta, S0):
    """The reference, for arguments as LinearAttention takes them."""
    g, beta = (x if x is None else x[..., None] for x in (g, beta))
    o, S = reference(*(x.transpose(1, 2) for x in (q, k, v)), g, S0, beta)
    return o.transpose(1, 2), S


def spans(q, v):
    """Room for a state every SPAN tokens: (b, h, spans, d, e)."""
    return q.new_empty(*v.shape[:3:2], cdiv(v.shape[1], SPAN.value), q.shape[3], v.shape[3])


class LinearAttention(torch.autograd.Function):
    """q, k: (b, t, h or 1, d), v: (b, t, h, e), in one piece; g, beta: (b, h, t), of the same strides."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, S0):
        block, sizes, shape, grid = settings(q, v, g)
        o, S_T = torch.empty_like(v), q.new_empty(*v.shape[::2], q.shape[3], v.shape[3], dtype=torch.float32)
        states, decays = segment_states(k, v, g, beta, block, sizes, shape, grid, False)
        blocks, kept = cdiv(v.shape[-1], block), spans(q, v) if any(ctx.needs_input_grad[3:5]) else None
        run(forward_kernel, (*grid, blocks), q, k, v, g, beta, S0, states, decays, o, S_T, kept, *shape, BE=block,
            **sizes)
        ctx.save_for_backward(q, k, v, g, beta, S0, states, decays, S_T, kept)
        ctx.set_materialize_grads(False)
        return o, S_T

    @staticmethod
    def backward(ctx, do, dS_T):
        q, k, v, g, beta, S0, states, decays, S_T, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(twin, (q, k, v, g, beta, S0), (do, dS_T))
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dS_T = None if dS_T is None else dS_T.contiguous()
        block, sizes, shape, grid = settings(q, v, g)
        dstates, _ = segment_states(q, do, g, None, block, sizes, shape, grid, True)
        dq, dk = (q.new_empty(*v.shape[:3], q.shape[3]) for _ in "qk")
        dv, dS0 = torch.empty_like(v), None if S0 is None else torch.empty_like(S0)
        block = block if q.dtype == torch.float32 or max(q.shape[-1], v.shape[-1]) > 128 else 64
        sizes["num_stages"] = min(sizes["num_stages"], 4 if g is None else 2)
        of_dk = cdiv(q.shape[-1], block)
        x, dkept = None, None
        if kept is not None:
            x, dkept = torch.empty(2, of_dk, *g.shape, device=q.device), torch.empty_like(kept)      # of dk, of dq
        run(backward_kernel, (*grid, cdiv(v.shape[-1], block) + 2 * of_dk), q, k, v, g, beta, do, S0, dS_T, states,
            decays, dstates, dq, dk, dv, dS0, x, dkept, *shape, BLOCK=block, BE=max(16, next_power_of_2(v.shape[-1])),
            **sizes)
        dg, dbeta = None, None
        if x is not None:
            (b, h, t), dg = g.shape, torch.empty(g.shape, device=g.device)
            dbeta = None if beta is None else torch.empty_like(dg)
            run(decay_kernel, (b * h, cdiv(t, SPAN.value)), x, kept, dkept, S_T, dS_T, beta, dg, dbeta, t, h, of_dk,
                *g.stride(), SIZE=kept.shape[3] * kept.shape[4], PART=1024, num_warps=4)
        if q.shape[2] < v.shape[2]:                                      # shared by the heads
            dq, dk = (x.sum(dim=2, keepdim=True, dtype=torch.float32) for x in (dq, dk))
        return dq.to(q.dtype), dk.to(k.dtype), dv, dg, dbeta, dS0


def linear_attention(q, k, v, g=None, state=None, beta=None):
    """o_t = sum_{s <= t} e^{g_{s+1} + ... + g_t} (q_t . k_s) beta_s v_s, not normalised, and the state after: lesson
    02's form.

    q, k: (b, h, t, d), or (b, 1, t, d), which all heads share, v: (b, h, t, e), of one dtype, float32 or 16 bits; g:
    log decay, at most 0, and beta, at least 0: four axes that broadcast to (b, h, t, 1), or None; state: (b, h, d, e)
    or None. Returns o: (b, h, t, e) and the state, float32. ValueError for a decay of each channel: see kernels.gla.
    The state of a head is on chip, up to 256 x 256 numbers of it (128 x 128 in float32); o is a sum over key channels,
    and value channels do not meet, so wider heads are done in parts."""
    if g is not None and g.shape[-1] != 1:
        raise ValueError(f"g of shape {tuple(g.shape)}: a decay of each channel is kernels.gla's")
    d, e = q.shape[-1], v.shape[-1]
    most = 128 if q.dtype == torch.float32 else 256
    if d > most:
        parts = [linear_attention(q[..., i], k[..., i], v, g, None if state is None else state[:, :, i], beta)
                 for i in (slice(0, most), slice(most, d))]
        return parts[0][0] + parts[1][0], torch.cat([S for _, S in parts], dim=2)
    if e > most:
        parts = [linear_attention(q, k, v[..., i], g, None if state is None else state[..., i], beta)
                 for i in (slice(0, most), slice(most, e))]
        return tuple(torch.cat(pair, dim=-1) for pair in zip(*parts, strict=True))
    if q.shape != k.shape or q.shape[1] not in (1, v.shape[1]):
        raise ValueError(f"q of shape {tuple(q.shape)} and k of {tuple(k.shape)} should be one, with 1 head or as many "
                         f"as v, {v.shape[1]}")
    g = torch.zeros_like(beta) if g is None and beta is not None else g
    g, beta = (x if x is None else x.squeeze(-1).float() for x in (g, beta))
    g, beta = (x if x is None or x.shape == v.shape[:3] else x.expand(v.shape[:3]) for x in (g, beta))
    if beta is not None and g.stride() != beta.stride():
        g, beta = g.contiguous(), beta.contiguous()
    q, k, v = (in_one_piece(x, 16) for x in (q, k, v))                                       # loads of 32 bytes
    if state is not None:
        state = F.pad(state.float(), (0, v.shape[-1] - e, 0, q.shape[-1] - state.shape[2])).contiguous()
    o, S = LinearAttention.apply(q, k, v, g, beta, state)
    return without_zeros(o, e), state_without_zeros(S, d, e)


def mamba_2(x, dt, A, B, C):
    """Mamba-2's recurrence as mamba-ssm has it. x: (b, t, h, e), dt: (b, t, h), A: (h,), B and C: (b, t, 1, d)."""
    (q, k, v), dt = (z.transpose(1, 2) for z in (C, B, x)), dt.mT.float().contiguous()[..., None]
    return linear_attention(q, k, v, A[:, None, None] * dt, beta=dt)[0].transpose(1, 2)


if __name__ == "__main__":
    from kernels import tables
    tables.linear_attention()

"""The delta rule, with no decay, one number for each token, or one for each key channel: DeltaNet [Y24],
gated DeltaNet [Y25] and Kimi Delta Attention (arXiv:2510.26692).

    S' = e^{g_t} S_{t-1}      N_t = v_t - k_t^T S'      S_t = S' + beta_t k_t N_t^T      o_t = q_t^T S_t

N is what is new in v: what the state does not yet hold under k. (Lesson 02's D is beta N; other names are lesson
02's.) Over a chunk of 64 tokens that begins in the state S, with G the sum of g from its start, up to and including
its row, and `whole` that of all its rows,

    A_ts = (k_t . k_s) e^{G_t - G_s} beta_s, s < t        P_ts = (q_t . k_s) e^{G_t - G_s} beta_s, s <= t
    (1 + A) N = V - e^G K S                               K' = beta e^{whole - G} K
    O = P N + e^G Q S                                     S <- e^{whole} S + K'^T N

so N = U - W S with U = (1 + A)^-1 V and W = (1 + A)^-1 e^G K, neither of which knows the state. Three steps, then:
chunks() makes P, U and W of all chunks at once; the walk goes from chunk to chunk with the state on chip, N and then
S, and leaves both in memory for the backward, where the gradients of N and S come of a walk back,

    dN = P^T dO + K' R                                    R <- e^{whole} R + (e^G Q)^T dO - W^T dN

and the others of all chunks at once, first those of V, P and A, then those of what P and A are made of.

(1 + A)^-1 is found on chip by blocks: that of [[a, 0], [c, b]] is [[a^-1, 0], [-b^-1 c a^-1, b^-1]], so from blocks of
1 to 2, 4, ... 64, all of a size in two products. (A power series would be as short, but its terms can grow to 10^18.)
With a decay of each channel the pairs (t, s) are parted by such cuts, too: at each, e^{G_t - G_s} is e^{G_t - G_cut}
e^{G_cut - G_s}, and no exponent is above 0 (kernels.gla). But one of the two may grow, too, as long as it cannot
overflow: blocks that decay by less than e^72 in each half are not cut any more, so that of mild gates one cut of the
whole chunk takes all pairs, and of strong ones, blocks of 8 and three cuts above them.

Bytes for a token and head, d = e = 64 in bfloat16: P, U and W are 128 each, written once and read once, q and k read
twice, v and o once, 1536 in all; with gradients 5120. FLOPs: 18 products of 64 x 64 x 64 for a chunk, 0.1 ms of an H200
for 32768 tokens and 16 heads, where the bytes take 0.19, with gradients 0.64. What is left (0.42 and 1.13 ms measured)
is waiting: in chunks() each product needs the one before, and in the walk each chunk.

    python -m kernels.delta_rule [--peers]      check, then a table; with --peers beside flash-linear-attention's
"""


import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.tiles import (
    cdiv,
    check_dtypes,
    differentiable_gradients,
    in_one_piece,
    load,
    next_power_of_2,
    place,
    run,
    shared_memory,
    state_without_zeros,
    store,
    without_zeros,
)

CHUNK = 64
LEAST = tl.constexpr(-18.0)      # e^-18 is a quarter of float32's spacing: a smaller decay is made one by it
MOST = tl.constexpr(72.0)        # e^72 times a token's numbers is far from float32's and bfloat16's largest, 3e38


def cuts(n, device):
    """For n tokens, at each cut h = 1, 2, 4, ...: the row before the cut of each token's own block of 2h, and which
    pairs (t, s) it parts."""
    i = torch.arange(n, device=device)
    t, s, h = i[:, None], i[None, :], 1
    while h < n:
        yield (i // (2 * h) * 2 * h + h - 1).clamp(max=n - 1), (t // h == s // h + 1) & (t // h % 2 == 1)
        h *= 2


def reference(q, k, v, g, beta, state=None):
    """The kernels' loops: all that a chunk does, then the walk; in 16 bits, what is added up is in float32, and what
    is multiplied is not. q, k: (b, h, t, d), v: (b, h, t, e), g: log decay (b, h, t, 1 or d) or None, beta: (b, h, t,
    1), state: (b, h, d, e) or None. Returns o: (b, h, t, e) and the state after."""
    more, o = torch.promote_types(q.dtype, torch.float32), []
    S = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=more) if state is None else state
    g = q.new_zeros(*q.shape[:3], 1, dtype=more) if g is None else g
    for i in range(0, q.shape[2], CHUNK):
        q_i, k_i, v_i, g_i, beta_i = (x[:, :, i:i + CHUNK] for x in (q, k, v, g, beta))
        G = g_i.cumsum(dim=2)
        whole = G[:, :, -1:]
        P = (q_i * k_i).sum(dim=-1).to(more).diag_embed()
        A = torch.zeros_like(P)
        inverse = torch.eye(G.shape[2], dtype=more, device=q.device)
        for at, pairs in cuts(G.shape[2], q.device):
            behind = (torch.arange(len(at), device=at.device) > at)[:, None]
            E = torch.where(behind, G - G[:, :, at], G[:, :, at] - G).exp()                  # no exponent above 0
            q_E, k_E = (q_i * E).to(q.dtype), (k_i * E).to(q.dtype)
            P, A = P + pairs * (q_E @ k_E.mT), A + pairs * (k_E @ k_E.mT)
        P, A = P * beta_i.mT, A * beta_i.mT
        for _, pairs in cuts(G.shape[2], q.device):
            inverse = inverse - inverse @ (A * pairs) @ inverse
        P, inverse = P.to(q.dtype), inverse.to(q.dtype)
        read, write = (q_i * G.exp()).to(q.dtype), (k_i * (whole - G).exp() * beta_i).to(q.dtype)    # e^G Q, K'
        U, W, S_i = (inverse @ v_i).to(q.dtype), (inverse @ (k_i * G.exp()).to(q.dtype)).to(q.dtype), S.to(q.dtype)
        N = (U - W @ S_i).to(q.dtype)
        o.append(P @ N + read @ S_i)
        S = whole.exp().mT * S + write.mT @ N
    return torch.cat(o, dim=2), S


@triton.jit
def sums_kernel(g, G, lowest, T, H, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr):
    """G, the sum of g from the start of its chunk; and of each chunk and 64 channels the largest level at which no half
    of a block decays by more than e^-MOST: with LEAST at least 2."""
    chunk, b_h, block = tl.program_id(1), tl.program_id(0).to(tl.int64), tl.program_id(2)
    rows, d, at = chunk * C + tl.arange(0, C), block * BD + tl.arange(0, BD), place(b_h, H, H, T, D)
    g_i, level = tl.maximum(load(g + at, rows, d, T, H * D, BD), LEAST), 2
    store(G + at, tl.cumsum(g_i, axis=0), rows, d, T, H * D, D)
    if lowest is not None:
        for larger in tl.static_range(3, LEVELS):
            halves = tl.sum(tl.reshape(g_i, (C >> larger, 1 << larger, BD)), axis=1)
            level = tl.where(tl.min(halves) >= -MOST, larger, level)
        tl.store(lowest + (b_h * tl.num_programs(1) + chunk) * tl.num_programs(2) + block, level)


@triton.jit
def sums(G, b_h, rows, d, T, H, D: tl.constexpr, VECTOR: tl.constexpr):
    """G of these rows, the last one in place of those behind it, and channels: (rows, 64); or, of one decay for all
    channels, (rows, 1)."""
    rows = tl.minimum(rows, T - 1)
    if VECTOR:
        at = G + place(b_h, H, H, T, D) + rows[:, None] * (H * D) + d[None, :]
    else:
        at = G + place(b_h, H, H, T, 1) + rows[:, None] * H
    return tl.load(at)


@triton.jit
def whole_of(G, b_h, chunk, d, T, H, D: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr):
    """`whole` of a chunk: (channels,) or a number."""
    last = tl.minimum(chunk * C + C, T) - 1
    if VECTOR:
        at = G + place(b_h, H, H, T, D) + last * (H * D) + d
    else:
        at = G + place(b_h, H, H, T, 1) + last * H
    return tl.load(at)


@triton.jit
def decays(G, b_h, chunk, rows, d, T, H, D: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr):
    """G, and `whole` - G, of a chunk: (C, 64) or (C, 1)."""
    G_i = sums(G, b_h, rows, d, T, H, D, VECTOR)
    whole = whole_of(G, b_h, chunk, d, T, H, D, C, VECTOR)
    return G_i, (whole[None, :] if VECTOR else whole) - G_i


@triton.jit
def pairs_at(level, C: tl.constexpr):
    """The pairs (t, s) that the cut h = 2^level parts, as cuts() yields them: s in a block of h, t in the odd next."""
    block = tl.arange(0, C) >> level
    return tl.where(block % 2 == 1, block - 1, -1)[:, None] == block[None, :]


@triton.jit
def at_cut(level, lowest, G, b_h, rows, d, T, H, D: tl.constexpr, C: tl.constexpr):
    """Of the cuts h = 2^level in blocks of 2 h: the decay from the cut to each token as a target, and from each token
    to it as a source, and the pairs (t, s) that they part; at the lowest level all pairs of a block. What the decays
    make of other pairs means nothing, and may be infinite."""
    t, s, h = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :], 1 << level
    x = sums(G, b_h, rows, d, T, H, D, True) - sums(G, b_h, (rows & -(2 * h)) + h - 1, d, T, H, D, True)
    pairs = ((t ^ s) < 2 * h) & tl.where(level == lowest, s <= t, (t & h) > (s & h))
    return tl.exp(tl.minimum(x, MOST)), tl.exp(tl.minimum(-x, MOST)), pairs


@triton.jit
def again(rows, n):
    """These rows, in a loop over n = 0, 1, ...: as a compiler sees it, others in each round, which it has to load then;
    else it loads them before the loop and keeps them in registers, of which there are too few."""
    return rows + tl.minimum(n, 0)


@triton.jit
def lowest_of(lowest, n, block, D: tl.constexpr, VECTOR: tl.constexpr):
    """The lowest level of chunk n for a block of 64 channels."""
    return tl.load(lowest + n * (D // 64) + block) if VECTOR else 0


@triton.jit
def ranged(x, like):
    """Rounded as the numbers that are multiplied; in bfloat16 where those are float16, which has not the range."""
    return x.to(tl.bfloat16 if like.dtype == tl.float16 else like.dtype)


@triton.jit
def decay_between(G):
    """e^{G_t - G_s} for s <= t, of one decay for all channels; elsewhere 1."""
    return tl.exp(tl.minimum(G - tl.trans(G), 0.0))


@triton.jit
def scores(P, A, q, k, G, lowest, b_h, rows, d, T, H, D: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
           VECTOR: tl.constexpr, PRECISION: tl.constexpr):
    """Add these channels' (q_t . k_s) e^{G_t - G_s} for s <= t, and (k_t . k_s) e^{G_t - G_s} for s < t; what they say
    of other pairs means nothing."""
    if VECTOR:
        for level in range(lowest, LEVELS):
            here = again(rows, level)
            E, E_source, pairs = at_cut(level, lowest, G, b_h, here, d, T, H, D, C)
            q_i, k_i = load(q, here, d, T, H * D, 64), load(k, here, d, T, H * D, 64)
            source = tl.trans(ranged(k_i * E_source, k_i))
            P += tl.where(pairs, tl.dot(ranged(q_i * E, k_i), source, input_precision=PRECISION), 0.0)
            A += tl.where(pairs, tl.dot(ranged(k_i * E, k_i), source, input_precision=PRECISION), 0.0)
    else:
        E = decay_between(sums(G, b_h, rows, d, T, H, D, VECTOR))
        q_i, k_i = load(q, rows, d, T, H * D, 64), load(k, rows, d, T, H * D, 64)
        P += tl.dot(q_i, tl.trans(k_i), input_precision=PRECISION) * E
        A += tl.dot(k_i, tl.trans(k_i), input_precision=PRECISION) * E
    return P, A


@triton.jit
def inverse_of(A, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(1 + A)^-1 for A below the diagonal: from the inverses of blocks of 2^level to those of blocks twice as large.
    What is multiplied has 11 bits (float16; in float32, all)."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    inverse = tl.where(t == s, 1.0, 0.0) - tl.where(pairs_at(0, C), A, 0.0)
    digits = tl.float32 if PRECISION == "ieee" else tl.float16
    A = (-A).to(digits)
    for level in range(1, LEVELS):
        blocks = inverse.to(digits)
        between = tl.dot(tl.where(pairs_at(level, C), A, 0.0).to(digits), blocks, input_precision=PRECISION)
        inverse = tl.dot(blocks, between.to(digits), acc=inverse, input_precision=PRECISION)
    return inverse


@triton.jit
def matrix(x, n, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers to these rows and columns of matrix n of many in one piece, ROWS x COLS each."""
    return x + n * ROWS * COLS + rows[:, None] * COLS + cols[None, :]


@triton.jit
def put(at, x):
    tl.store(at, x.to(at.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def chunks_kernel(q, k, v, G, lowest, beta, read, write, U_, W_, P_, inverse_, T, H, D: tl.constexpr, E: tl.constexpr,
                  C: tl.constexpr, LEVELS: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr):
    """Of each chunk P, (1 + A)^-1, U and W; with a decay of each channel also e^G Q (read) and K' (write). 64 key
    channels at a time."""
    chunk, b_h = tl.program_id(1), tl.program_id(0).to(tl.int64)
    n = b_h * tl.num_programs(1) + chunk
    i, e = tl.arange(0, C), tl.arange(0, E)
    rows, key, value = chunk * C + i, place(b_h, H, H, T, D), place(b_h, H, H, T, E)
    beta_i = tl.load(beta + place(b_h, H, H, T, 1) + rows * H, mask=rows < T, other=0.0).to(tl.float32)
    P, A = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for first in range(0, D, 64):
        d = first + tl.arange(0, 64)
        P, A = scores(P, A, q + key, k + key, G, lowest_of(lowest, n, first // 64, D, VECTOR), b_h, rows, d, T, H, D, C,
                      LEVELS, VECTOR, PRECISION)
    P = tl.where(i[:, None] >= i[None, :], P * beta_i[None, :], 0.0).to(q.dtype.element_ty)
    put(matrix(P_, n, i, i, C, C), P)
    inverse = inverse_of(A * beta_i[None, :], C, LEVELS, PRECISION)
    if inverse_ is not None:
        put(matrix(inverse_, n, i, i, C, C), inverse)
    inverse = inverse.to(P.dtype)
    put(matrix(U_, n, i, e, C, E), tl.dot(inverse, load(v + value, rows, e, T, H * E, E), input_precision=PRECISION))
    for first in range(0, D, 64):
        d = first + tl.arange(0, 64)
        k_i = load(k + key, rows, d, T, H * D, 64)
        G_i, left = decays(G, b_h, chunk, rows, d, T, H, D, C, VECTOR)
        known = (k_i * tl.exp(G_i)).to(P.dtype)
        put(matrix(W_, n, i, d, C, D), tl.dot(inverse, known, input_precision=PRECISION))
        if VECTOR:
            store(read + key, load(q + key, rows, d, T, H * D, 64) * tl.exp(G_i), rows, d, T, H * D, D)
            store(write + key, k_i * tl.exp(left) * beta_i[:, None], rows, d, T, H * D, D)


@triton.jit
def of_rows(G, beta, b_h, chunk, C: tl.constexpr, T, H, VECTOR: tl.constexpr):
    """Of one decay for all channels e^G of the rows of a chunk, and beta e^{whole - G}: (C, 1). With a decay of each
    channel they are in `read` and `write` already, and this is 1."""
    if VECTOR:
        of_read, of_write = 1.0, 1.0
    else:
        rows, one = chunk * C + tl.arange(0, C), place(b_h, H, H, T, 1)
        G_i, left = decays(G, b_h, chunk, rows, rows, T, H, 1, C, VECTOR)
        beta_i = tl.load(beta + one + rows * H, mask=rows < T, other=0.0).to(tl.float32)[:, None]
        of_read, of_write = tl.exp(G_i), tl.exp(left) * beta_i
    return of_read, of_write


@triton.jit
def decay_of(G, b_h, chunk, d, T, H, D: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr):
    """e^{whole} of a chunk: (D, 1) or a number."""
    whole = tl.exp(whole_of(G, b_h, chunk, d, T, H, D, C, VECTOR))
    return whole[:, None] if VECTOR else whole


@triton.jit(do_not_specialize=["T"])
def walk_kernel(G, beta, read, write, U, W, P, S0, o, new, states, S_T, T, H, D: tl.constexpr, E: tl.constexpr,
                BE: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr):
    """N = U - W S,  O = P N + e^G Q S,  S <- e^{whole} S + K'^T N: a program takes a block of the state's columns
    through the chunks, and leaves N of each in `new` and the state before it in `states`. What products multiply Triton
    asks for early by itself; the rest is asked for one chunk early here."""
    b_h, i, d, e = tl.program_id(0).to(tl.int64), tl.arange(0, C), tl.arange(0, D), tl.arange(0, BE)
    e += tl.program_id(1) * BE
    key, o = place(b_h, H, H, T, D), o + place(b_h, H, H, T, E)
    chunks = tl.cdiv(T, C)
    n = b_h * chunks
    S = tl.zeros((D, BE), tl.float32)
    if S0 is not None:
        S += tl.load(matrix(S0, b_h, d, e, D, E))
    decay, U_i = decay_of(G, b_h, 0, d, T, H, D, C, VECTOR), tl.load(matrix(U, n, i, e, C, E))
    of_read, of_write = of_rows(G, beta, b_h, 0, C, T, H, VECTOR)
    for chunk in range(chunks):
        following, rows = tl.minimum(chunk + 1, chunks - 1), chunk * C + i
        next_decay = decay_of(G, b_h, following, d, T, H, D, C, VECTOR)
        next_U = tl.load(matrix(U, n + following, i, e, C, E))
        next_read, next_write = of_rows(G, beta, b_h, following, C, T, H, VECTOR)
        S_i = S.to(U_i.dtype)
        N = U_i - tl.dot(tl.load(matrix(W, n + chunk, i, d, C, D)), S_i, input_precision=PRECISION)
        N_i, write_i = N.to(U_i.dtype), load(write + key, rows, d, T, H * D, D)
        if states is not None:
            put(matrix(states, n + chunk, d, e, D, E), S_i)
            put(matrix(new, n + chunk, i, e, C, E), N_i)
        S = tl.dot(tl.trans(write_i), (N * of_write).to(U_i.dtype), acc=S * decay, input_precision=PRECISION)
        o_i = of_read * tl.dot(load(read + key, rows, d, T, H * D, D), S_i, input_precision=PRECISION)
        o_i = tl.dot(tl.load(matrix(P, n + chunk, i, i, C, C)), N_i, acc=o_i, input_precision=PRECISION)
        store(o, o_i, rows, e, T, H * E, E)
        decay, U_i, of_read, of_write = next_decay, next_U, next_read, next_write
    tl.store(matrix(S_T, b_h, d, e, D, E), S)


@triton.jit(do_not_specialize=["T"])
def walk_back_kernel(G, beta, read, write, W, P, do, dS_T, dnew, dstates, dS0, T, H, D: tl.constexpr, E: tl.constexpr,
                     BE: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr):
    """dN = P^T dO + K' R,  R <- e^{whole} R + (e^G Q)^T dO - W^T dN, backwards in time: dN of each chunk, and the
    gradient R of the state after it."""
    b_h, i, d, e = tl.program_id(0).to(tl.int64), tl.arange(0, C), tl.arange(0, D), tl.arange(0, BE)
    e += tl.program_id(1) * BE
    key, do = place(b_h, H, H, T, D), do + place(b_h, H, H, T, E)
    chunks = tl.cdiv(T, C)
    R = tl.zeros((D, BE), tl.float32)
    if dS_T is not None:
        R += tl.load(matrix(dS_T, b_h, d, e, D, E))
    decay = decay_of(G, b_h, chunks - 1, d, T, H, D, C, VECTOR)
    of_read, of_write = of_rows(G, beta, b_h, chunks - 1, C, T, H, VECTOR)
    for step in range(chunks):
        chunk = chunks - 1 - step
        n, rows, following = b_h * chunks + chunk, chunk * C + i, tl.maximum(chunk - 1, 0)
        next_decay = decay_of(G, b_h, following, d, T, H, D, C, VECTOR)
        next_read, next_write = of_rows(G, beta, b_h, following, C, T, H, VECTOR)
        R_i, do_i = R.to(do.dtype.element_ty), load(do, rows, e, T, H * E, E)
        put(matrix(dstates, n, d, e, D, E), R_i)
        dN = of_write * tl.dot(load(write + key, rows, d, T, H * D, D), R_i, input_precision=PRECISION)
        dN = tl.dot(tl.trans(tl.load(matrix(P, n, i, i, C, C))), do_i, acc=dN, input_precision=PRECISION)
        dN_i, read_i = dN.to(do_i.dtype), load(read + key, rows, d, T, H * D, D)
        put(matrix(dnew, n, i, e, C, E), dN_i)
        R = tl.dot(tl.trans(read_i), (do_i * of_read).to(do_i.dtype), acc=R * decay, input_precision=PRECISION)
        R -= tl.dot(tl.trans(tl.load(matrix(W, n, i, d, C, D))), dN_i, input_precision=PRECISION)
        decay, of_read, of_write = next_decay, next_read, next_write
    if dS0 is not None:
        tl.store(matrix(dS0, b_h, d, e, D, E), R)


@triton.jit
def of_pairs(dq, dk, dbeta, x, dP, dA, q, k, beta, E, E_source, VECTOR: tl.constexpr, PRECISION: tl.constexpr):
    """Add what pairs (t, s) give to the gradients of q, k and beta, where a target has the decay E and a source
    E_source; and to x, which is made of the same rounded numbers, so that what a pair gives at t and takes at s is the
    same."""
    q_E, k_E, source = (q * E).to(dP.dtype), (k * E).to(dP.dtype), (k * (E_source * beta)).to(dP.dtype)
    to_q = tl.dot(dP, source, input_precision=PRECISION)
    dq += E * to_q
    x += given(q_E * to_q, VECTOR)
    to_k = tl.dot(dA, source, input_precision=PRECISION)
    dk += E * to_k
    x += given(k_E * to_k, VECTOR)
    by = tl.dot(tl.trans(dP), q_E, input_precision=PRECISION)
    by = tl.dot(tl.trans(dA), k_E, acc=by, input_precision=PRECISION)
    x -= given(source * by, VECTOR)
    by *= E_source
    return dq, dk + beta * by, dbeta + tl.sum(k * by, axis=1), x


@triton.jit
def given(x, VECTOR: tl.constexpr):
    """To the decay of each channel, or of all: (C, 64) or (C, 1)."""
    return x if VECTOR else tl.sum(x, axis=1)[:, None]


@triton.jit(do_not_specialize=["T"])
def pairs_kernel(G, do, inverse_, new, dnew, dv, dP_, dA_, T, H, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
                 LEVELS: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr):
    """Of each chunk dV = (1 + A)^-T dN, dP_ts = do_t . N_s and dA_ts = - dv_t . N_s. With the inverse's 8 bits of
    bfloat16 alone dbeta would be lost where one key is written again and again: 8 more come from what they leave."""
    chunk, b_h = tl.program_id(1), tl.program_id(0).to(tl.int64)
    n = b_h * tl.num_programs(1) + chunk
    i, e = tl.arange(0, C), tl.arange(0, E)
    t, s, rows, value = i[:, None], i[None, :], chunk * C + i, place(b_h, H, H, T, E)
    do_i, N = load(do + value, rows, e, T, H * E, E), tl.load(matrix(new, n, i, e, C, E))
    inverse, dN = tl.load(matrix(inverse_, n, i, i, C, C)).to(tl.float32), tl.load(matrix(dnew, n, i, e, C, E))
    rounded = inverse.to(dN.dtype)
    dv_i = tl.dot(tl.trans(rounded), dN, input_precision=PRECISION)
    if dN.dtype == tl.bfloat16:
        dv_i = tl.dot(tl.trans((inverse - rounded).to(dN.dtype)), dN, acc=dv_i, input_precision=PRECISION)
    dv_i = dv_i.to(do_i.dtype)
    store(dv + value, dv_i, rows, e, T, H * E, E)
    dP = tl.dot(do_i, tl.trans(N), input_precision=PRECISION)
    dA = -tl.dot(dv_i, tl.trans(N), input_precision=PRECISION)
    if not VECTOR:
        between = decay_between(sums(G, b_h, rows, e, T, H, D, VECTOR))
        dP, dA = dP * between, dA * between
    put(matrix(dP_, n, i, i, C, C), tl.where(t >= s, dP, 0.0))
    put(matrix(dA_, n, i, i, C, C), tl.where(t > s, dA, 0.0))


@triton.jit(do_not_specialize=["T"])
def gradients_kernel(q, k, G, lowest, beta, do, dv, new, dP_, dA_, states, dstates, dq, dk, dg, dbeta, T, H,
                     D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, VECTOR: tl.constexpr,
                     PRECISION: tl.constexpr):
    """A key is a source in P, A and K', where beta stands beside it (`written`: the gradient of beta k), and a target
    in A and e^G K. beta's gradient is k . written, and g's the sum from t on of x = q dq + k dk (target) - k dk
    (source). A program has 64 key channels of a chunk; what they give to beta and to a decay of all goes to a place of
    their own."""
    chunk, b_h, block = tl.program_id(1), tl.program_id(0).to(tl.int64), tl.program_id(2)
    n = b_h * tl.num_programs(1) + chunk
    i, e, d = tl.arange(0, C), tl.arange(0, E), block * 64 + tl.arange(0, 64)
    rows, key, value = chunk * C + i, place(b_h, H, H, T, D), place(b_h, H, H, T, E)
    one = place(b_h, H, H, T, 1) + rows * H
    beta_i = tl.load(beta + one, mask=rows < T, other=0.0).to(tl.float32)[:, None]
    one += block * tl.num_programs(0).to(tl.int64) * T
    G_i, left = decays(G, b_h, chunk, rows, d, T, H, D, C, VECTOR)
    S, R = tl.load(matrix(states, n, d, e, D, E)), tl.load(matrix(dstates, n, d, e, D, E))
    after = tl.exp(whole_of(G, b_h, chunk, d, T, H, D, C, VECTOR)) * tl.sum(S.to(tl.float32) * R, axis=1)
    written = tl.exp(left) * tl.dot(tl.load(matrix(new, n, i, e, C, E)), tl.trans(R), input_precision=PRECISION)
    k_i = load(k + key, rows, d, T, H * D, 64)
    dbeta_i = tl.sum(k_i * written, axis=1)
    written *= beta_i
    after += tl.sum(k_i * written, axis=0)
    dk_i = -tl.exp(G_i) * tl.dot(load(dv + value, rows, e, T, H * E, E), tl.trans(S), input_precision=PRECISION)
    x = given(k_i * (dk_i - written), VECTOR)
    dk_i += written
    dq_i = tl.exp(G_i) * tl.dot(load(do + value, rows, e, T, H * E, E), tl.trans(S), input_precision=PRECISION)
    q_i = load(q + key, rows, d, T, H * D, 64)
    x += given(q_i * dq_i, VECTOR)
    if VECTOR:
        start = lowest_of(lowest, n, block, D, VECTOR)
        for level in range(start, LEVELS):
            here, row = again(rows, level), again(i, level)
            E_t, E_s, pairs = at_cut(level, start, G, b_h, here, d, T, H, D, C)
            q_i, k_i = load(q + key, here, d, T, H * D, 64), load(k + key, here, d, T, H * D, 64)
            dP = ranged(tl.where(pairs, tl.load(matrix(dP_, n, row, i, C, C)), 0.0), q_i)
            dA = ranged(tl.where(pairs, tl.load(matrix(dA_, n, row, i, C, C)), 0.0), q_i)
            dq_i, dk_i, dbeta_i, x = of_pairs(dq_i, dk_i, dbeta_i, x, dP, dA, q_i, k_i, beta_i, E_t, E_s, VECTOR,
                                              PRECISION)
        store(dg + key, tl.cumsum(x, axis=0, reverse=True) + after[None, :], rows, d, T, H * D, D)
    else:
        dP, dA = tl.load(matrix(dP_, n, i, i, C, C)), tl.load(matrix(dA_, n, i, i, C, C))
        dq_i, dk_i, dbeta_i, x = of_pairs(dq_i, dk_i, dbeta_i, x, dP, dA, q_i, k_i, beta_i, 1.0, 1.0, VECTOR, PRECISION)
        tl.store(dg + one, tl.cumsum(tl.sum(x, axis=1), axis=0, reverse=True) + tl.sum(after), mask=rows < T)
    store(dq + key, dq_i, rows, d, T, H * D, D)
    store(dk + key, dk_i, rows, d, T, H * D, D)
    tl.store(dbeta + one, dbeta_i, mask=rows < T)


def settings(q, v, g):
    """Sizes and launch options, of the kernels for all chunks at once and of the walks; the grid of the former. Tiles
    are 64 wide but for the walks': where a narrower one takes the place of a 64-wide one in shared memory, ptxas 12.8
    (of Triton 3.6 and 3.7) may read a register that nothing has written, and gradients are wrong."""
    (b, t, h, d), e = q.shape, v.shape[-1]
    sizes = {"D": d, "E": e, "C": CHUNK, "VECTOR": g.shape[-1] > 1, "PRECISION": "tf32", "num_warps": 4}
    walk = {"BE": min(e, 64) if d > 64 else 32,
            "num_stages": 3 if d <= 64 else 2 if shared_memory(q.device) > 120000 else 1}
    if q.dtype == torch.float32:                                 # exact and slow: no tensor cores, smaller tiles
        sizes |= {"C": CHUNK // 2, "PRECISION": "ieee", "num_warps": 8}
        walk = {"BE": 32, "num_stages": 3 if d <= 64 else 1}
    chunks = {"LEVELS": sizes["C"].bit_length() - 1, "num_stages": 1}
    return sizes | chunks, sizes | walk, (b * h, cdiv(t, sizes["C"]))


def chunks(q, k, v, g, beta, sizes, grid, keep):
    """G and, with a decay of each channel, the lowest levels, e^G Q and K'; without, Q and K themselves; U, W, P, and
    (1 + A)^-1 to `keep`."""
    C, d, e = sizes["C"], sizes["D"], sizes["E"]
    G, read, write = torch.empty_like(g), q, k
    blocks, lowest = (d // 64 if sizes["VECTOR"] else 1), None
    if sizes["VECTOR"]:
        lowest = torch.empty(*grid, blocks, device=q.device, dtype=torch.int32)
    run(sums_kernel, (*grid, blocks), g, G, lowest, *q.shape[1:3], D=g.shape[-1], BD=g.shape[-1] // blocks, C=C,
        LEVELS=sizes["LEVELS"], num_warps=1)
    if sizes["VECTOR"]:
        read, write = torch.empty_like(q), torch.empty_like(k)
    U, W, P = (q.new_empty(*grid, C, n) for n in (e, d, C))
    inverse = torch.empty_like(P, dtype=torch.float32 if q.dtype == torch.float32 else torch.float16) if keep else None
    registers = 168 if d == 64 and C == CHUNK and not sizes["VECTOR"] else None          # three programs for two
    run(chunks_kernel, grid, q, k, v, G, lowest, beta, read, write, U, W, P, inverse, *q.shape[1:3], maxnreg=registers,
        **sizes)
    return G, lowest, read, write, U, W, P, inverse


def twin(q, k, v, g, beta, state):
    """The reference for tensors as DeltaRule has them."""
    o, S = reference(*(x.transpose(1, 2) for x in (q, k, v, g, beta)), state)
    return o.transpose(1, 2), S


class DeltaRule(torch.autograd.Function):
    """q, k, v: (b, t, h, d) in one piece; g: the same or (b, t, h, 1), float32; beta: (b, t, h, 1)."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, S0, keep):
        sizes, walk, grid = settings(q, v, g)
        (b, t, h, d), e = q.shape, v.shape[-1]
        G, lowest, read, write, U, W, P, inverse = chunks(q, k, v, g, beta, sizes, grid, keep)
        o, S_T = torch.empty_like(v), torch.empty(b, h, d, e, device=q.device)
        new, states = (torch.empty_like(U), q.new_empty(*grid, d, e)) if keep else (None, None)
        run(walk_kernel, (grid[0], e // walk["BE"]), G, beta, read, write, U, W, P, S0, o, new, states, S_T, t, h,
            **walk)
        ctx.save_for_backward(q, k, v, g, beta, S0, G, lowest, read, write, W, P, inverse, new, states)
        ctx.set_materialize_grads(False)
        return o, S_T

    @staticmethod
    def backward(ctx, do, dS_T):
        q, k, v, g, beta, S0, G, lowest, read, write, W, P, inverse, new, states = ctx.saved_tensors
        if torch.is_grad_enabled():                              # a gradient of the gradient may be asked for
            return *differentiable_gradients(twin, (q, k, v, g, beta, S0), (do, dS_T)), None
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dS_T = None if dS_T is None else dS_T.contiguous()
        sizes, walk, grid = settings(q, v, g)
        shape, dnew, dstates = q.shape[1:3], torch.empty_like(new), torch.empty_like(states)
        dS0 = None if S0 is None else torch.empty_like(S0)
        columns = (grid[0], v.shape[-1] // walk["BE"])
        run(walk_back_kernel, columns, G, beta, read, write, W, P, do, dS_T, dnew, dstates, dS0, *shape, **walk)
        dq, dk, dv, dP, dA = (torch.empty_like(x) for x in (q, k, v, P, P))
        blocks = q.shape[-1] // 64
        dg, dbeta = (x.new_empty(1 if x.shape[-1] > 1 else blocks, *x.shape, dtype=torch.float32) for x in (g, beta))
        run(pairs_kernel, grid, G, do, inverse, new, dnew, dv, dP, dA, *shape, **sizes)
        warps = 8 if sizes["VECTOR"] and q.shape[-1] > 64 else sizes["num_warps"]
        run(gradients_kernel, (*grid, blocks), q, k, G, lowest, beta, do, dv, new, dP, dA, states, dstates, dq, dk, dg,
            dbeta, *shape, **sizes | {"num_warps": warps})
        dg, dbeta = (x[0] if len(x) == 1 else x.sum(dim=0) for x in (dg, dbeta))
        return dq, dk, dv, dg, dbeta.to(beta.dtype), dS0, None


def delta_rule(q, k, v, g, beta, state=None):
    """The recurrence at the top of this file: lesson 02's delta rule, all tokens.

    q, k: (b, h, t, d), v: (b, h, t, e), of one dtype, float32 or 16 bits; g: log decay, at most 0, four axes that
    broadcast to (b, h, t, 1) or (b, h, t, d), or None; beta: (b, h, t, 1); state: (b, h, d, e) or None. Keys should be
    of length 1, or so short that beta |k|^2 is at most 2: what is longer makes the state grow. Returns o: (b, h, t, e)
    and the state, float32. ValueError for more than 128 key channels, which one chunk's products have to see at
    once."""
    check_dtypes(q=q, k=k, v=v, g=g, beta=beta, state=state)
    d, e = q.shape[-1], v.shape[-1]
    if d > 128:
        raise ValueError(f"{d} key channels: the kernel takes up to 128; use the chunked form")
    most = 64 if q.dtype == torch.float32 else 128
    if e > most:                                                 # value channels do not meet
        parts = [delta_rule(q, k, v[..., i], g, beta, None if state is None else state[..., i])
                 for i in (slice(0, most), slice(most, e))]
        return tuple(torch.cat(pair, dim=-1) for pair in zip(*parts, strict=True))
    g = q.new_zeros(1, 1, 1, 1) if g is None else g
    g = g.float().expand(*q.shape[:3], g.shape[-1])
    g = in_one_piece(g, 64 if g.shape[-1] > 1 else 1)
    q, k, v, beta = *(in_one_piece(x, 64) for x in (q, k, v)), in_one_piece(beta)            # tiles are 64 or 128 wide
    if state is not None:
        state = F.pad(state.float(), (0, v.shape[-1] - e, 0, q.shape[-1] - d)).contiguous()
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, beta, state))
    o, S = DeltaRule.apply(q, k, v, g, beta, state, keep)
    return without_zeros(o, e), state_without_zeros(S, d, e)


@triton.jit
def step_kernel(q, k, v, g, beta, S, o, new, D: tl.constexpr, E: tl.constexpr, GD: tl.constexpr, BD: tl.constexpr,
                BE: tl.constexpr):
    head, d, e = tl.program_id(0).to(tl.int64), tl.arange(0, BD), tl.program_id(1) * BE + tl.arange(0, BE)
    at, inside = (head * D + d[:, None]) * E + e[None, :], (d[:, None] < D) & (e[None, :] < E)
    S_i = tl.load(S + at, mask=inside, other=0.0)
    if g is not None:
        S_i *= tl.exp(tl.load(g + head * GD + d % GD, mask=d < D, other=0.0).to(tl.float32))[:, None]
    k_i = tl.load(k + head * D + d, mask=d < D, other=0.0).to(tl.float32)[:, None]
    N = tl.load(v + head * E + e, mask=e < E, other=0.0).to(tl.float32) - tl.sum(k_i * S_i, axis=0)
    S_i += k_i * (tl.load(beta + head).to(tl.float32) * N)[None, :]
    q_i = tl.load(q + head * D + d, mask=d < D, other=0.0).to(tl.float32)[:, None]
    tl.store(new + at, S_i, mask=inside)
    tl.store(o + head * E + e, tl.sum(q_i * S_i, axis=0), mask=e < E)


def delta_step(q, k, v, g, beta, state):
    """One token, for generation: the state is read and written once, and no gradients. q, k: (b, h, d), v: (b, h, e),
    g: log decay (b, h, 1 or d) or None, beta: (b, h, 1), state: (b, h, d, e), float32. Returns o: (b, h, e) of v's
    dtype, and the state after; the one that came in is left as it is."""
    (b, h, d), e = q.shape, v.shape[-1]
    g = None if g is None else g.expand(b, h, -1).contiguous()
    q, k, v, beta, state = (x.contiguous() for x in (q, k, v, beta, state))
    o, new, BD = torch.empty_like(v), torch.empty_like(state), next_power_of_2(d)
    BE = min(next_power_of_2(e), max(16, 4096 // BD))
    run(step_kernel, (b * h, cdiv(e, BE)), q, k, v, g, beta, state, o, new, D=d, E=e, BD=BD, BE=BE, num_warps=4, GD=1 if
        g is None else g.shape[-1])
    return o, new


def peers(wanted):
    """{kind: {name: flash-linear-attention's function with our arguments}}; empty where it is not wanted or not
    installed."""
    if not wanted:
        return {}
    try:
        from fla.ops.common import chunk_o
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.kda import chunk_kda
    except ImportError as missing:
        print(f"no peers: {missing}; pip install flash-linear-attention==0.6.0 einops")
        return {}

    if chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1:
        print("flash-linear-attention refuses the gated backward here, as this Triton compiled it wrongly (its issue "
              "640); for the table it may: see how far off its gradients are")
        chunk_o.IS_NVIDIA_HOPPER = False

    def heads_last(f):
        def called(q, k, v, *gates):
            q, k, v, *gates = (x.transpose(1, 2) for x in (q, k, v, *gates))
            gates = [x[..., 0] if x.shape[-1] == 1 else x for x in gates]
            return f(q, k, v, *gates, scale=1.0)[0].transpose(1, 2)
        return {"fla": called}
    return {"none": heads_last(chunk_delta_rule), "scalar": heads_last(chunk_gated_delta_rule),
            "vector": heads_last(chunk_kda)}


if __name__ == "__main__":
    from kernels import tables
    tables.delta_rule()

"""Based's linear attention: weights 1 + s + s^2 / 2 with s = q . k / sqrt(d), normalised; features never in memory.

    phi(x) = [1, x d^{-1/4}, x_i x_j (i <= j, weighted)]      1 + d + d (d + 1) / 2 features; d = 16: 153
    o_t = phi(q_t)^T S_t / phi(q_t)^T z_t,   S_t = sum_{s <= t} phi(k_s) v_s^T,   z_t = sum_{s <= t} phi(k_s)

A program owns a head and walks over chunks of 64 tokens. Inside a chunk the weights are a polynomial of Q K^T.
Between chunks there is the state, on chip in tiles of 64 features (d = 16: three). A tile of features is the product
of two selections of columns, phi(X) = w * (X E_i) * (X E_j), with E of zeros and ones: two small matrix products put
the numbers where the next product wants them, which no indexing could.

`first_kernel` has the chunks and the state, but all d^2 products x_i x_j as they are, without tiles and selections; z
is what it makes of columns of ones among the values: read it first.

Memory sees q, k, v and o once, 2 (2 d + 2 e) bytes a token and head in bfloat16; a chunk multiplies 2 x 64 x (64 d +
64 e + 2 F e + 4 F d) FLOPs with F = 192. At d = 16, e = 64 an H100 could move the bytes of 32768 tokens x 16 heads in
0.06 ms and do the FLOPs in as much; registers (a state of 192 x 64 numbers) and waiting for matrix products are what
bounds it.

Gradients, with dN = do / z and da = -dN . o, so that A_ts = dN_t . v_s + da_t is the gradient of the weight of (t,
s):

    dv_s = sum_{t >= s} weight_ts dN_t                           the same walk backwards, q and k exchanged
    dq_t = sum_{s <= t} A_ts (1 + s_ts) k_s / sqrt(d)            in a chunk; from the state by the product rule on
    dk_s = sum_{t >= s} A_ts (1 + s_ts) q_t / sqrt(d)            w * (X E_i) * (X E_j); dk is dq walking backwards

JRT's prefix is a sum over other keys and values (state_of), in one pass; the causal walk starts from it.

    python -m kernels.taylor_attention      check, then a table
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
    no_room,
    place,
    run,
    store,
)

CHUNK = 64                       # tokens
TILE = tl.constexpr(64)          # features in a tile
TABLES = {}


@torch.compiler.assume_constant_result       # made once, also when torch.compile looks on
def feature_table(d, dtype, device):
    """Feature r is weight_r x_i x_j, where x_i or both may be missing. E: (2, BD, tiles x 64), 1 at (0, i, r) and (1,
    j, r); weights: (tiles x 64,), 0 for rows that fill up the last tile. Also how many features there are."""
    if (d, dtype, device) in TABLES:
        return TABLES[d, dtype, device]
    i, j = torch.triu_indices(d, d)
    n = 1 + d + len(i)
    E = torch.zeros(2, max(16, next_power_of_2(d)), cdiv(n, 64) * 64)
    E[0, torch.cat([torch.arange(d), i]), torch.arange(1, n)] = 1
    E[1, j, torch.arange(1 + d, n)] = 1
    half = torch.where(i == j, 0.5, 1.0).double()
    weights = torch.cat([torch.ones(1), torch.full((d,), d ** -0.25, dtype=half.dtype), half.sqrt() * d ** -0.5])
    weights = F.pad(weights, (0, -n % 64)).to(device, torch.promote_types(dtype, torch.float32))
    TABLES[d, dtype, device] = E.to(device, dtype), weights, n
    return TABLES[d, dtype, device]


def features(x):
    """phi(x) as the kernels make it: (..., d) -> (..., F)."""
    d = x.shape[-1]
    E, weights, n = feature_table(d, x.dtype, x.device)
    r = torch.arange(E.shape[2], device=x.device)
    one, two = torch.where(r == 0, 1.0, x @ E[0, :d]), torch.where(r <= d, 1.0, x @ E[1, :d])
    return (one * two * weights.to(x.dtype))[..., :n]


def reference(q, k, v, state=None):
    """The kernel's loop over chunks; in 16 bits, what is added up is in float32, and what is multiplied is not. q, k:
    (b, h, t, d), v: (b, h, t, e), state: (b, h, F, e + 1), z in its last column, or None. Returns o: (b, h, t, e) and
    the state after."""
    more, v, o = torch.promote_types(q.dtype, torch.float32), F.pad(v, (0, 1), value=1.0), []
    S = features(k[:, :, :1].to(more)).mT @ v[:, :, :1].to(more) * 0 if state is None else state.to(more)
    for i in range(0, q.shape[2], CHUNK):
        q_i, k_i, v_i = (x[:, :, i:i + CHUNK] for x in (q, k, v))
        s = (q_i @ k_i.mT).to(more) * q.shape[-1] ** -0.5
        P = (1 + s + s * s / 2).tril()
        o_i = (P.to(v.dtype) @ v_i).to(more) + features(q_i) @ S.to(q.dtype)
        z_i = P.sum(dim=-1, keepdim=True) + features(q_i.to(more)) @ S[..., -1:]
        o.append((o_i[..., :-1] / z_i).to(v.dtype))
        S = S + features(k_i).mT @ v_i
    return torch.cat(o, dim=2), S


# ----------------------------------------------------------------------------------------------------- read this first


@triton.jit
def squares(x, D: tl.constexpr):
    """x_i x_j for all i, j: (C, D) -> (C, D D)."""
    return (x[:, :, None] * x[:, None, :]).reshape(x.shape[0], D * D)


@triton.jit
def first_kernel(q, k, v, o, T, D: tl.constexpr, E: tl.constexpr):
    """The idea alone: o = weights V for one head of T tokens, a multiple of 64, not divided by the sum of the weights.
    D and E: the widths of keys and values. The state has a part for each term of 1 + s + s^2 / 2, as (q . k)^2 =
    squares(q) . squares(k)."""
    head, c, d, e = tl.program_id(0), tl.arange(0, 64), tl.arange(0, D), tl.arange(0, E)
    S_0, S_1, S_2 = tl.zeros((E,), tl.float32), tl.zeros((D, E), tl.float32), tl.zeros((D * D, E), tl.float32)
    for start in range(0, T, 64):
        rows = head * T + start + c
        q_i, k_i = tl.load(q + rows[:, None] * D + d[None, :]), tl.load(k + rows[:, None] * D + d[None, :])
        v_i = tl.load(v + rows[:, None] * E + e[None, :])                                    # (C, E)
        q_i /= tl.sqrt(D * 1.0)
        s = tl.dot(q_i, tl.trans(k_i))                                                       # (t, s)
        P = tl.where(c[:, None] >= c[None, :], 1 + s + s * s / 2, 0.0)
        o_i = tl.dot(P, v_i)                                                                 # this chunk's tokens
        o_i += S_0[None, :] + tl.dot(q_i, S_1) + tl.dot(squares(q_i, D), S_2) / 2            # those before it
        tl.store(o + rows[:, None] * E + e[None, :], o_i)
        S_0 += tl.sum(v_i, axis=0)
        S_1 += tl.dot(tl.trans(k_i), v_i)
        S_2 += tl.dot(tl.trans(squares(k_i, D)), v_i)


def first_taylor_attention(q, k, v):
    """As taylor_attention, without the state. q, k: (b, h, t, 16), v: (b, h, t, e), in one piece, float32; t a multiple
    of 64. On a GPU the products are of TF32: right to a thousandth."""
    b, h, t, e = v.shape
    E = max(16, next_power_of_2(e + 1))
    v = F.pad(v, (0, E - e), value=1.0)                          # columns of ones: there the weights are added up
    o = torch.empty_like(v)
    first_kernel[(b * h,)](q, k, v, o, t, D=q.shape[-1], E=E, num_warps=8)
    return o[..., :e] / o[..., -1:]


# ------------------------------------------------------------------------------------------------- as fast as it can be


@triton.jit
def weights_of_rows(w, rows, end, H):
    """w at these rows, or 1 where there is none; 0 outside."""
    if w is None:
        w_i = tl.where(rows < end, 1.0, 0.0)
    else:
        w_i = tl.load(w + rows * H, mask=rows < end, other=0.0)
    return w_i


@triton.jit
def selections(E_ij, all_weights, BD: tl.constexpr, TILES: tl.constexpr):
    """E_i and E_j of all tiles of features, in turns: (BD, 64), with at most a single 1 in a column; and their
    weights."""
    E, weights = (), ()
    for n in tl.static_range(TILES):
        r = n * TILE + tl.arange(0, TILE)
        at = E_ij + tl.arange(0, BD)[:, None] * (TILES * TILE) + r[None, :]
        E, weights = E + (tl.load(at), tl.load(at + BD * TILES * TILE)), weights + (tl.load(all_weights + r),)
    return E, weights


@triton.jit
def factors(a, b, r, D: tl.constexpr, FIRST: tl.constexpr):
    """Feature 0 has no factors, features 1 to D have one."""
    if FIRST:
        a, b = tl.where(r == 0, 1.0, a), tl.where(r <= D, 1.0, b)
    return a, b


@triton.jit
def write(S, Z, k, v, w, E, weights, D: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr):
    """S + phi(K)^T V and z + phi(K)^T w, by tiles; the features are made transposed, as the product wants them. Their
    weights are squared: those of phi(Q) are in here, too."""
    newS, newZ = (), ()
    for n in tl.static_range(TILES):
        a = tl.dot(tl.trans(E[2 * n]), tl.trans(k), input_precision=PRECISION)
        b = tl.dot(tl.trans(E[2 * n + 1]), tl.trans(k), input_precision=PRECISION)
        a, b = factors(a, b, tl.arange(0, TILE)[:, None], D, n == 0)
        phi = a * b * (weights[n] * weights[n])[:, None]                                     # (64, C)
        newZ = newZ + (Z[n] + tl.sum(phi * w[None, :], axis=1),)
        newS = newS + (tl.dot(phi.to(v.dtype), v, acc=S[n], input_precision=PRECISION),)
    return newS, newZ


@triton.jit
def attend(q, k, v, o, z, S, Z, E, weights, e, start, end, H, D: tl.constexpr, VALUES: tl.constexpr, BD: tl.constexpr,
           C: tl.constexpr, TILES: tl.constexpr, REVERSE: tl.constexpr, CAUSAL: tl.constexpr, DIVIDE: tl.constexpr,
           PRECISION: tl.constexpr):
    """O = weights V for rows start to end, from the state S, z; divided by the sum of the weights, or not. Without
    CAUSAL only the state is read: it stays as it is. Returns the state."""
    c, d = tl.arange(0, C), tl.arange(0, BD)
    chunks = tl.cdiv(end - start, C)
    for step in range(chunks):
        rows = start + (chunks - 1 - step if REVERSE else step) * C + c
        q_i = load(q, rows, d, end, H * D, D)
        o_i, z_i = tl.zeros((C, e.shape[0]), tl.float32), tl.zeros((C,), tl.float32)
        for n in tl.static_range(TILES):
            a = tl.dot(q_i, E[2 * n], input_precision=PRECISION)
            b = tl.dot(q_i, E[2 * n + 1], input_precision=PRECISION)
            a, b = factors(a, b, tl.arange(0, TILE)[None, :], D, n == 0)
            phi = a * b                                                                      # (C, 64)
            o_i = tl.dot(phi.to(q_i.dtype), S[n].to(q_i.dtype), acc=o_i, input_precision=PRECISION)
            if DIVIDE:
                z_i += tl.sum(phi * Z[n][None, :], axis=1)
        if CAUSAL:
            k_i, v_i = load(k, rows, d, end, H * D, D), load(v, rows, e, end, H * VALUES, VALUES)
            s = tl.dot(q_i, tl.trans(k_i), input_precision=PRECISION) * (1 / tl.sqrt(D * 1.0))
            seen = c[:, None] <= c[None, :] if REVERSE else c[:, None] >= c[None, :]
            P = tl.where(seen, 1 + s + s * s * 0.5, 0.0)
            o_i = tl.dot(P.to(v_i.dtype), v_i, acc=o_i, input_precision=PRECISION)
            if DIVIDE:
                z_i += tl.sum(P, axis=1)
        if DIVIDE:
            o_i /= z_i[:, None]
            tl.store(z + rows * H, z_i, mask=rows < end)
        store(o, o_i, rows, e, end, H * VALUES, VALUES)
        if CAUSAL:
            S, Z = write(S, Z, k_i, v_i, weights_of_rows(None, rows, end, H), E, weights, D, TILES, PRECISION)
    return S, Z


@triton.jit
def differentiate(q, k, do, v, a, w, dq, S, Z, E, weights, start, end, H, D: tl.constexpr, VALUES: tl.constexpr,
                  BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr, REVERSE: tl.constexpr,
                  CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """dQ for A_ts = do_t . v_s + a_t w_s, the gradient of the weight of (t, s), from S = sum phi(k) v^T, Z = sum
    phi(k) w."""
    c, d, e = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BE)
    chunks = tl.cdiv(end - start, C)
    for step in range(chunks):
        rows = start + (chunks - 1 - step if REVERSE else step) * C + c
        q_i, do_i = load(q, rows, d, end, H * D, D), load(do, rows, e, end, H * VALUES, VALUES)
        a_i = weights_of_rows(a, rows, end, H)
        dq_i = tl.zeros((C, BD), tl.float32)
        for n in tl.static_range(TILES):                                                     # the product rule
            dphi = tl.dot(do_i, tl.trans(S[n].to(do_i.dtype)), input_precision=PRECISION) + a_i[:, None] * Z[n][None, :]
            f = tl.dot(q_i, E[2 * n], input_precision=PRECISION)
            f2 = tl.dot(q_i, E[2 * n + 1], input_precision=PRECISION)
            f, f2 = factors(f, f2, tl.arange(0, TILE)[None, :], D, n == 0)
            dq_i = tl.dot((dphi * f2).to(q_i.dtype), tl.trans(E[2 * n]), acc=dq_i, input_precision=PRECISION)
            dq_i = tl.dot((dphi * f).to(q_i.dtype), tl.trans(E[2 * n + 1]), acc=dq_i, input_precision=PRECISION)
        if CAUSAL:
            k_i, v_i = load(k, rows, d, end, H * D, D), load(v, rows, e, end, H * VALUES, VALUES)
            w_i = weights_of_rows(w, rows, end, H)
            s = tl.dot(q_i, tl.trans(k_i), input_precision=PRECISION) * (1 / tl.sqrt(D * 1.0))
            A = tl.dot(do_i, tl.trans(v_i), input_precision=PRECISION) + a_i[:, None] * w_i[None, :]
            seen = c[:, None] <= c[None, :] if REVERSE else c[:, None] >= c[None, :]
            A = tl.where(seen, A * (1 + s), 0.0) * (1 / tl.sqrt(D * 1.0))
            dq_i = tl.dot(A.to(k_i.dtype), k_i, acc=dq_i, input_precision=PRECISION)
        store(dq, dq_i, rows, d, end, H * D, D)
        if CAUSAL:
            S, Z = write(S, Z, k_i, v_i, w_i, E, weights, D, TILES, PRECISION)
    return S, Z


@triton.jit
def read_state(S, Z, at, e, weights, FEATURES: tl.constexpr, VALUES: tl.constexpr, TILES: tl.constexpr):
    """S and Z and what stands at `at`: a state (FEATURES, VALUES + 1), z in its last column, without the weights of
    q."""
    newS, newZ = (), ()
    for n in tl.static_range(TILES):
        r = n * TILE + tl.arange(0, TILE)
        here = at + r[:, None] * (VALUES + 1) + e[None, :]
        more = tl.load(here, mask=(r[:, None] < FEATURES) & (e[None, :] < VALUES), other=0.0)
        newS = newS + (S[n] + more * weights[n][:, None],)
        newZ = newZ + (Z[n] + tl.load(at + r * (VALUES + 1) + VALUES, mask=r < FEATURES, other=0.0) * weights[n],)
    return newS, newZ


@triton.jit
def store_state(S, Z, at, e, weights, FEATURES: tl.constexpr, VALUES: tl.constexpr, TILES: tl.constexpr):
    for n in tl.static_range(TILES):
        r = n * TILE + tl.arange(0, TILE)
        here, w = at + r[:, None] * (VALUES + 1) + e[None, :], tl.where(r < FEATURES, weights[n], 1.0)
        tl.store(here, S[n] / w[:, None], mask=(r[:, None] < FEATURES) & (e[None, :] < VALUES))
        tl.store(at + r * (VALUES + 1) + VALUES, Z[n] / w, mask=r < FEATURES)


@triton.jit
def enter(S0, states, head, segment, N, e, weights, FEATURES: tl.constexpr, VALUES: tl.constexpr, TILES: tl.constexpr,
          REVERSE: tl.constexpr):
    """The state in which a segment of N begins: S0, and what the segments before it (behind it) add."""
    S, Z = (), ()
    for _ in tl.static_range(TILES):
        S, Z = S + (tl.zeros((TILE, e.shape[0]), tl.float32),), Z + (tl.zeros((TILE,), tl.float32),)
    if S0 is not None:
        S, Z = read_state(S, Z, S0 + head * FEATURES * (VALUES + 1), e, weights, FEATURES, VALUES, TILES)
    if states is not None:
        for j in range(N - 1 - segment if REVERSE else segment):
            at = states + (head * N + (N - 1 - j if REVERSE else j)) * FEATURES * (VALUES + 1)
            S, Z = read_state(S, Z, at, e, weights, FEATURES, VALUES, TILES)
    return S, Z


@triton.jit(do_not_specialize=["T"])
def segment_kernel(k, v, w, E_ij, all_weights, states, T, H, segment, D: tl.constexpr, VALUES: tl.constexpr,
                   BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, FEATURES: tl.constexpr, TILES: tl.constexpr,
                   PRECISION: tl.constexpr):
    """What each segment adds to the state."""
    n, N, b_h = tl.program_id(1), tl.num_programs(1), tl.program_id(0).to(tl.int64)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    end = tl.minimum(T, (n + 1) * segment)
    if w is not None:
        w += place(b_h, H, H, T, 1)
    E, weights = selections(E_ij, all_weights, BD, TILES)
    S, Z = enter(None, None, b_h, n, N, e, weights, FEATURES, VALUES, TILES, False)
    for step in range(tl.cdiv(end - n * segment, C)):
        rows = n * segment + step * C + tl.arange(0, C)
        k_i = load(k + place(b_h, H, H, T, D), rows, d, end, H * D, D)
        v_i = load(v + place(b_h, H, H, T, VALUES), rows, e, end, H * VALUES, VALUES)
        S, Z = write(S, Z, k_i, v_i, weights_of_rows(w, rows, end, H), E, weights, D, TILES, PRECISION)
    store_state(S, Z, states + (b_h * N + n) * FEATURES * (VALUES + 1), e, weights, FEATURES, VALUES, TILES)


@triton.jit(do_not_specialize=["T"])
def attend_kernel(q, k, v, S0, states, E_ij, all_weights, o, z, S_T, T, H, segment, D: tl.constexpr,
                  VALUES: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, FEATURES: tl.constexpr,
                  TILES: tl.constexpr, REVERSE: tl.constexpr, CAUSAL: tl.constexpr, DIVIDE: tl.constexpr,
                  PRECISION: tl.constexpr):
    n, N, b_h = tl.program_id(1), tl.num_programs(1), tl.program_id(0).to(tl.int64)
    e, key, value = tl.arange(0, BE), place(b_h, H, H, T, D), place(b_h, H, H, T, VALUES)
    E, weights = selections(E_ij, all_weights, BD, TILES)
    S, Z = enter(S0, states, b_h, n, N, e, weights, FEATURES, VALUES, TILES, REVERSE)
    S, Z = attend(q + key, k + key, v + value, o + value, z + place(b_h, H, H, T, 1), S, Z, E, weights, e, n * segment,
                  tl.minimum(T, (n + 1) * segment), H, D, VALUES, BD, C, TILES, REVERSE, CAUSAL, DIVIDE, PRECISION)
    if S_T is not None:
        if n == (0 if REVERSE else N - 1):
            store_state(S, Z, S_T + b_h * FEATURES * (VALUES + 1), e, weights, FEATURES, VALUES, TILES)


@triton.jit(do_not_specialize=["T"])
def differentiate_kernel(q, k, do, v, a, w, S0, states, E_ij, all_weights, dq, S_T, T, H, segment, D: tl.constexpr,
                         VALUES: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr,
                         FEATURES: tl.constexpr, TILES: tl.constexpr, REVERSE: tl.constexpr, CAUSAL: tl.constexpr,
                         PRECISION: tl.constexpr):
    n, N, b_h, e = tl.program_id(1), tl.num_programs(1), tl.program_id(0).to(tl.int64), tl.arange(0, BE)
    key, value, one = place(b_h, H, H, T, D), place(b_h, H, H, T, VALUES), place(b_h, H, H, T, 1)
    if a is not None:
        a += one
    if w is not None:
        w += one
    E, weights = selections(E_ij, all_weights, BD, TILES)
    S, Z = enter(S0, states, b_h, n, N, e, weights, FEATURES, VALUES, TILES, REVERSE)
    S, Z = differentiate(q + key, k + key, do + value, v + value, a, w, dq + key, S, Z, E, weights, n * segment,
                         tl.minimum(T, (n + 1) * segment), H, D, VALUES, BD, BE, C, TILES, REVERSE, CAUSAL, PRECISION)
    if S_T is not None:
        if n == (0 if REVERSE else N - 1):
            store_state(S, Z, S_T + b_h * FEATURES * (VALUES + 1), e, weights, FEATURES, VALUES, TILES)


@triton.jit
def normaliser_kernel(do, o, z, dN, da, n, VALUES: tl.constexpr, BE: tl.constexpr, ROWS: tl.constexpr):
    """dN = do / z and da = -dN . o."""
    rows, e = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BE)
    do_i = load(do, rows, e, n, VALUES, VALUES).to(tl.float32) / tl.load(z + rows, mask=rows < n, other=1.0)[:, None]
    tl.store(da + rows, -tl.sum(do_i * load(o, rows, e, n, VALUES, VALUES).to(tl.float32), axis=1), mask=rows < n)
    store(dN, do_i, rows, e, n, VALUES, VALUES)


def settings(q, v, stages=3):
    """Tables, sizes and segments, and the launch options that were fastest on an H100."""
    b, t, h, d, e = *q.shape, v.shape[-1]
    E, weights, features = feature_table(d, q.dtype, q.device)
    sizes = {"D": d, "VALUES": e, "BD": E.shape[1], "BE": max(16, next_power_of_2(e)), "C": CHUNK,
             "FEATURES": features, "TILES": E.shape[2] // 64, "PRECISION": "tf32", "num_warps": 4 if d <= 16 else 8,
             "num_stages": stages if d <= 16 else 2}
    if q.dtype == torch.float32:                                 # exact and slow: no tensor cores, smaller tiles
        sizes |= {"C": CHUNK // 2, "PRECISION": "ieee", "num_warps": 8, "num_stages": 1}
    segments = max(1, min(256 // (b * h), t // 1024))
    segment = cdiv(cdiv(t, segments), CHUNK) * CHUNK
    return (E, weights), sizes, (t, h, segment), (b * h, cdiv(t, segment))


def segment_states(k, v, w):
    """The states that the segments leave from zero: (b h, segments, F, e + 1)."""
    table, sizes, shape, grid = settings(k, v)
    states = torch.empty(*grid, sizes["FEATURES"], v.shape[-1] + 1, device=k.device)
    run(segment_kernel, grid, k, v, w, *table, states, *shape, **sizes)
    return states


def attend_with(q, k, v, S0, states=None, z=None, S_T=None, *, REVERSE=False, CAUSAL=True, DIVIDE=False):
    table, sizes, shape, grid = settings(q, v, 2 if DIVIDE else 3)
    o = torch.empty_like(v)
    run(attend_kernel, grid, q, k, v, S0, states, *table, o, o if z is None else z, S_T, *shape, REVERSE=REVERSE,
        CAUSAL=CAUSAL, DIVIDE=DIVIDE, **sizes)
    return o


def differentiate_with(q, k, do, v, a, w, S0, states=None, S_T=None, *, REVERSE=False, CAUSAL=True):
    table, sizes, shape, grid = settings(q, v)
    dq = torch.empty_like(q)
    run(differentiate_kernel, grid, q, k, do, v, a, w, S0, states, *table, dq, S_T, *shape, REVERSE=REVERSE,
        CAUSAL=CAUSAL, **sizes)
    return dq


def twin(q, k, v, S0):
    """The reference, for arguments as TaylorAttention takes them."""
    o, S = reference(*(x.transpose(1, 2) for x in (q, k, v)), S0)
    return o.transpose(1, 2), S


def state_twin(k, v, w):
    """What StateOf computes, in PyTorch: for arguments as it takes them."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    one = torch.ones_like(v[..., :1]) if w is None else w.transpose(1, 2)[..., None]
    return features(k).mT @ torch.cat([v, one], dim=-1)


class TaylorAttention(torch.autograd.Function):
    """q, k, v: (b, t, h, d) in one piece; S0: (b, h, F, e + 1) or None."""

    @staticmethod
    def forward(ctx, q, k, v, S0):
        b, t, h, _ = q.shape
        _, sizes, _, grid = settings(q, v)
        z = torch.empty(b, t, h, device=q.device)
        S_T = torch.empty(b, h, sizes["FEATURES"], v.shape[-1] + 1, device=q.device)
        states = segment_states(k, v, None) if grid[1] > 1 else None
        o = attend_with(q, k, v, S0, states, z, S_T, DIVIDE=True)
        ctx.save_for_backward(q, k, v, S0, states, o, z)
        ctx.set_materialize_grads(False)
        return o, S_T

    @staticmethod
    def backward(ctx, do, dS):
        q, k, v, S0, states, o, z = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(twin, (q, k, v, S0), (do, dS))
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dS = None if dS is None else dS.contiguous()
        dN, da, e = torch.empty_like(v), torch.empty_like(z), v.shape[-1]
        run(normaliser_kernel, (cdiv(z.numel(), 64),), do, o, z, dN, da, z.numel(), VALUES=e,
            BE=next_power_of_2(e), ROWS=64)
        dstates = None if states is None else segment_states(q, dN, da)
        dS0 = None if S0 is None else torch.empty_like(S0)
        dq = differentiate_with(q, k, dN, v, da, None, S0, states)
        dk = differentiate_with(k, q, v, dN, None, da, dS, dstates, dS0, REVERSE=True)
        dv = attend_with(k, q, dN, dS, dstates, REVERSE=True)
        return dq, dk, dv, dS0


class StateOf(torch.autograd.Function):
    """sum_t phi(k_t) [v_t, w_t]^T. k, v: (b, t, h, d) in one piece; w: (b, t, h) or None."""

    @staticmethod
    def forward(ctx, k, v, w):
        ctx.save_for_backward(k, v, w)
        return segment_states(k, v, w).sum(dim=1).view(k.shape[0], k.shape[2], -1, v.shape[-1] + 1)

    @staticmethod
    def backward(ctx, dS):
        k, v, w = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(state_twin, (k, v, w), (dS,))
        dS = dS.contiguous()
        dk = differentiate_with(k, k, v, v, w, None, dS, CAUSAL=False)
        return dk, attend_with(k, k, v, dS, CAUSAL=False), None


def fits(q):
    """Has the device room for the tables and states of as many features? ValueError if none has."""
    if q.shape[-1] > 24:
        raise ValueError(f"q and k of {q.shape[-1]} numbers: this kernel holds the features of up to 24 on chip")
    most = 208896 if q.dtype == torch.float32 else 163840                    # of 17 to 24, see tests/test_launches.py
    return q.shape[-1] <= 16 or not no_room(f"features of 17 to 24 numbers in {q.dtype}", most, q.device)


def part_of(state, i):
    """Some value channels of a state, and its last column, z."""
    return None if state is None else torch.cat([state[..., :-1][..., i], state[..., -1:]], dim=-1)


def joined(parts):
    """z is the same in all parts; its gradient comes from all."""
    return torch.cat([*(S[..., :-1] for S in parts), sum(S[..., -1:] for S in parts) / len(parts)], dim=-1)


def taylor_attention(q, k, v, state=None):
    """o_t = sum_{s <= t} (1 + s + s^2 / 2) v_s / (the same with v = 1), s = q_t . k_s / sqrt(d), and the state
    after.

    q, k: (b, h, t, d), v: (b, h, t, e), of one dtype, float32 or 16 bits; state: (b, h, F, e + 1), sums of phi(k)
    [v, 1]^T in the order of lesson 04's taylor(), or None. Returns o: (b, h, t, e) and the state, float32.
    ValueError for d above 24: the state would not fit on chip. More than 64 value channels, which do not meet, are
    done in parts."""
    if not fits(q):
        return reference(q, k, v, state)
    if v.shape[-1] > 64:
        parts = [taylor_attention(q, k, v[..., i], part_of(state, i)) for i in (slice(0, 64), slice(64, v.shape[-1]))]
        return torch.cat([o for o, _ in parts], dim=-1), joined([S for _, S in parts])
    state = None if state is None else state.float().contiguous()
    o, S = TaylorAttention.apply(in_one_piece(q), in_one_piece(k), in_one_piece(v), state)
    return o.transpose(1, 2), S


def state_of(k, v, inside=None):
    """sum_t phi(k_t) [v_t, 1]^T, over the tokens where `inside` is 1 and not 0: JRT's encoder. k: (b, h, t, d), v:
    (b, h, t, e), inside: broadcasts to (b, h, t), without a gradient. Returns (b, h, F, e + 1), float32."""
    if v.shape[-1] > 64 and fits(k):
        return joined([state_of(k, v[..., i], inside) for i in (slice(0, 64), slice(64, v.shape[-1]))])
    if inside is not None:
        v = v * inside[..., None].to(v.dtype)
        inside = inside.float().expand(k.shape[:3]).transpose(1, 2).contiguous()
    if not fits(k):
        return state_twin(*(x.transpose(1, 2).float() for x in (k, v)), inside)
    return StateOf.apply(in_one_piece(k), in_one_piece(v), inside)


if __name__ == "__main__":
    from kernels import tables
    tables.taylor_attention()

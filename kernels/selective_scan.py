"""Mamba's selective scan: n states for each channel, in registers, and none of them in memory but one in 64.

    h_t = e^{dt_t A} h_{t-1} + dt_t B_t u_t,   y_t = sum_n C_t h_t + D u_t         [GD23, algorithm 2]

u, dt: (b, c, t); A: (c, n); B, C: (b, n, t), shared by all channels; D: (c,). Written out, h has n times the size of u,
and a scan in PyTorch reads and writes it in each of its rounds. Here a program (one warp) owns a block of channels with
all their states, and does what the formula says: it walks over time, token after token, in PyTorch's `reference` as in
the kernel. It reads tiles of a few tokens at once. Nothing is scanned: a walk needs a quarter of a scan's arithmetic.
What bounds it is the exponential of each state, channel and token, 16 a clock in each of the GPU's multiprocessors.

A walk is as long as the text, and few texts are few walks, which leave most of the GPU idle. Then time is cut into
segments: a first kernel finds the state h that each segment would leave from zero, and the sum of its dt. As
e^{dt A} e^{dt' A} = e^{(dt + dt') A}, the state that a segment starts from follows from those before it, and all
segments are walked at once.

Backward the walk is from the last token to the first, with g_t = C_t dy_t + a_{t+1} g_{t+1}, a_t = e^{dt_t A}, and

    du_t += dt_t sum_n B g    d(dt)_t = sum_n (A g a h_{t-1} + B u g)    dA = sum_t dt g a h_{t-1}
    dB_t = sum_c dt u g       dC_t = sum_c h dy                          added up over channels in memory

It needs the states h in reverse order. The forward pass has kept each 64th; from there a block of 64 is walked again,
keeping each 4th, and from there each four, in registers.

    python -m kernels.selective_scan [--peers]      check, then a table; with --peers, beside mamba-ssm's
"""
import torch
import triton
import triton.language as tl

from kernels.tiles import cdiv, check_dtypes, differentiable_gradients, next_power_of_2, run

KEPT = 64                                        # of so many states one is in memory
PROGRAMS = 1024                                  # that fill an H100: two warps for each of its schedulers
BACK = 512, 4                                    # backward: states of a program, tokens of a tile
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


def reference(u, dt, A, B, C, D, h0=None):
    """The same in PyTorch, in float32 or better. Shapes as in selective_scan."""
    more = torch.promote_types(u.dtype, torch.float32)
    h, ys = u.new_zeros(*u.shape[:2], A.shape[1], dtype=more) if h0 is None else h0, []
    for u_t, dt_t, B_t, C_t in zip(*(x.to(more).unbind(-1) for x in (u, dt, B, C)), strict=True):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * B_t[:, None]      # (b, c, n)
        ys.append((C_t[:, None] * h).sum(dim=-1) + D * u_t)
    return torch.stack(ys, dim=-1).to(u.dtype), h


@triton.jit
def tile(x, rows, t, ROWS, T, end):
    """Of a (ROWS, T) matrix these rows and columns, in float32; 0 outside, and from column `end` on."""
    inside = (rows < ROWS)[:, None] & (t < end)[None, :]
    return tl.load(x + rows[:, None] * T + t[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def column(X, i, k):
    """Of a tile whose columns are i, column k: (rows,). A thread has whole rows, so that this is no work: k is known
    when it is compiled, and -0 is what can be added without an addition."""
    return tl.sum(tl.where(i[None, :] == k, X, -0.0), axis=1)


@triton.jit
def place(channels, T, N, BC: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """This program's channels, the tokens of a tile and the states; where its text begins in u and in B; where the
    states lie in A, and which of them exist; the text, and the numbers of a state."""
    c, i, n = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BT), tl.arange(0, BN)
    batch, real = tl.program_id(2).to(tl.int64), (c < channels)[:, None] & (n < N)[None, :]
    return c, i, n, batch * channels * T, batch * N * T, c[:, None] * N + n[None, :], real, batch, channels * N


@triton.jit
def walk(S, rate, x, B_t, A_c, i, REVERSE: tl.constexpr):
    """The state S: (channels, n) after the tokens of a tile: S <- a S + x B, or from the last one S <- a (S + x B)."""
    order = i.shape[0] - 1 - i if REVERSE else i
    for k in tl.static_range(i.shape[0]):
        a = tl.exp2(column(rate, order, k)[:, None] * A_c)
        b = column(x, order, k)[:, None] * column(B_t, order, k)[None, :]
        S = a * (S + b) if REVERSE else a * S + b
    return S


@triton.jit
def enter(S0, ends, sums, A_c, c, state, real, segment, SEGMENTS, batch, channels, size, REVERSE: tl.constexpr):
    """The state in which a segment begins: S0, and what each segment before it (behind it) adds."""
    S = tl.zeros_like(A_c)
    if S0 is not None:
        S += tl.load(S0 + batch * size + state, mask=real, other=0.0)
    if ends is not None:
        for j in range(SEGMENTS - 1 - segment if REVERSE else segment):
            other = batch * SEGMENTS + (SEGMENTS - 1 - j if REVERSE else j)
            a = tl.exp2(tl.load(sums + other * channels + c, mask=c < channels, other=0.0)[:, None] * A_c)
            S = a * S + tl.load(ends + other * size + state, mask=real, other=0.0)
    return S


@triton.jit
def ends_kernel(x, dt, A, B, ends, sums, channels, T, N, length, SEGMENTS, BC: tl.constexpr, BT: tl.constexpr,
                BN: tl.constexpr, REVERSE: tl.constexpr):
    """What each segment but the last one (the first) leaves from zero, and the sum of its dt."""
    c, i, n, row, time, state, real, batch, size = place(channels, T, N, BC, BT, BN)
    segment = tl.program_id(1) + (1 if REVERSE else 0)
    first, end = segment * length, tl.minimum(T, (segment + 1) * length)
    A_c, S = tl.load(A + state, mask=real, other=0.0), tl.zeros((BC, BN), tl.float32)
    total, blocks = tl.zeros((BC,), tl.float32), tl.cdiv(end - first, BT)
    for j in range(blocks):
        t = first + (blocks - 1 - j if REVERSE else j) * BT + i
        x_t, dt_t = tile(x + row, c, t, channels, T, end), tile(dt + row, c, t, channels, T, end)
        rate = dt_t * LOG2_E
        S = walk(S, rate, x_t if REVERSE else dt_t * x_t, tile(B + time, n, t, N, T, end), A_c, i, REVERSE)
        total += tl.sum(rate, axis=1)
    this = batch * SEGMENTS + segment
    tl.store(ends + this * size + state, S, mask=real)
    tl.store(sums + this * channels + c, total, mask=c < channels)


@triton.jit
def forward_kernel(u, dt, A, B, C, D, h0, ends, sums, y, kept, h_T, channels, T, N, length, SEGMENTS, BC: tl.constexpr,
                   BT: tl.constexpr, BN: tl.constexpr, KEPT: tl.constexpr):
    c, i, n, row, time, state, real, batch, size = place(channels, T, N, BC, BT, BN)
    segment = tl.program_id(1)
    first, end = segment * length, tl.minimum(T, (segment + 1) * length)
    A_c, D_c = tl.load(A + state, mask=real, other=0.0), tl.load(D + c, mask=c < channels, other=0.0)
    h = enter(h0, ends, sums, A_c, c, state, real, segment, SEGMENTS, batch, channels, size, False)
    for start in range(first, end, BT):
        if kept is not None:
            if start % KEPT == 0:
                tl.store(kept + (batch * tl.cdiv(T, KEPT) + start // KEPT) * size + state, h, mask=real)
        t = start + i
        u_t, dt_t = tile(u + row, c, t, channels, T, end), tile(dt + row, c, t, channels, T, end)
        B_t, C_t = tile(B + time, n, t, N, T, end), tile(C + time, n, t, N, T, end)
        rate, x, y_t = dt_t * LOG2_E, dt_t * u_t, D_c[:, None] * u_t
        for k in tl.static_range(BT):
            h = tl.exp2(column(rate, i, k)[:, None] * A_c) * h + column(x, i, k)[:, None] * column(B_t, i, k)[None, :]
            y_t += tl.where(i[None, :] == k, tl.sum(h * column(C_t, i, k)[None, :], axis=1)[:, None], 0.0)
        tl.store(y + row + c[:, None] * T + t[None, :], y_t, mask=(c < channels)[:, None] & (t < end)[None, :])
    if segment == SEGMENTS - 1:
        tl.store(h_T + batch * size + state, h, mask=real)


@triton.jit
def backward_kernel(u, dt, A, B, C, D, kept, dh_T, ends, sums, dy, du, ddt, dA, dB, dC, dD, dh0, states, channels, T, N,
                    length, SEGMENTS, BC: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, KEPT: tl.constexpr):
    c, i, n, row, time, state, real, batch, size = place(channels, T, N, BC, BT, BN)
    segment = tl.program_id(1)
    first, end = segment * length, tl.minimum(T, (segment + 1) * length)
    A_c, D_c = tl.load(A + state, mask=real, other=0.0), tl.load(D + c, mask=c < channels, other=0.0)
    G = enter(dh_T, ends, sums, A_c, c, state, real, segment, SEGMENTS, batch, channels, size, True)
    dA_c, dD_c = tl.zeros((BC, BN), tl.float32), tl.zeros((BC,), tl.float32)
    states += (batch * SEGMENTS + segment) * (KEPT // BT) * size
    blocks = tl.cdiv(end - first, KEPT)
    for block in range(blocks):
        begin = first + (blocks - 1 - block) * KEPT
        parts = tl.cdiv(tl.minimum(end - begin, KEPT), BT)
        h = tl.load(kept + (batch * tl.cdiv(T, KEPT) + begin // KEPT) * size + state, mask=real, other=0.0)
        for j in range(parts):
            tl.store(states + j * size + state, h, mask=real)
            t = begin + j * BT + i
            u_t, dt_t = tile(u + row, c, t, channels, T, end), tile(dt + row, c, t, channels, T, end)
            B_t, A_c = tile(B + time, n, t, N, T, end), tl.load(A + state, mask=real, other=0.0)
            h = walk(h, dt_t * LOG2_E, dt_t * u_t, B_t, A_c, i, False)
        tl.debug_barrier()                                       # written by one thread, read by another
        for j in range(parts - 1, -1, -1):
            start = begin + j * BT
            t = start + i
            u_t, dt_t = tile(u + row, c, t, channels, T, end), tile(dt + row, c, t, channels, T, end)
            dy_t, B_t = tile(dy + row, c, t, channels, T, end), tile(B + time, n, t, N, T, end)
            C_t, h = tile(C + time, n, t, N, T, end), tl.load(states + j * size + state, mask=real, other=0.0)
            A_c = tl.load(A + state, mask=real, other=0.0)       # loaded last: all tiles lie in threads as this one
            rate, x, hs = dt_t * LOG2_E, dt_t * u_t, (h,)
            for k in tl.static_range(BT):
                a, x_k = tl.exp2(column(rate, i, k)[:, None] * A_c), column(x, i, k)[:, None]
                h = a * h + x_k * column(B_t, i, k)[None, :]
                hs = hs + (h,)
            tl.debug_barrier()                                   # so that a is computed again: no registers to keep it
            A_c = tl.load(A + state, mask=real, other=0.0)
            dx, ddt_t = tl.zeros((BC, BT), tl.float32), tl.zeros((BC, BT), tl.float32)
            for k in tl.static_range(BT - 1, -1, -1):
                rate_k, x_k, dy_k = column(rate, i, k)[:, None], column(x, i, k)[:, None], column(dy_t, i, k)[:, None]
                B_k, C_k = column(B_t, i, k)[None, :], column(C_t, i, k)[None, :]
                g = G + C_k * dy_k
                at, inside = time + (start + k) * N + n, n < tl.where(start + k < end, N, 0)
                tl.atomic_add(dB + at, tl.sum(g * x_k, axis=0), mask=inside, sem="relaxed")
                tl.atomic_add(dC + at, tl.sum(hs[k + 1] * dy_k, axis=0), mask=inside, sem="relaxed")
                dx += tl.where(i[None, :] == k, tl.sum(g * B_k, axis=1)[:, None], 0.0)
                G = tl.exp2(rate_k * A_c) * g
                da = G * hs[k]                                                               # g a h_{t-1}
                ddt_t += tl.where(i[None, :] == k, tl.sum(A_c * da, axis=1)[:, None], 0.0)
                dA_c += rate_k * da
            at, inside = row + c[:, None] * T + t[None, :], (c < channels)[:, None] & (t < end)[None, :]
            tl.store(du + at, dx * dt_t + D_c[:, None] * dy_t, mask=inside)
            tl.store(ddt + at, ddt_t + dx * u_t, mask=inside)
            dD_c += tl.sum(u_t * dy_t, axis=1)
        tl.debug_barrier()
    tl.atomic_add(dA + state, dA_c * LN_2, mask=real, sem="relaxed")
    tl.atomic_add(dD + c, dD_c, mask=c < channels, sem="relaxed")
    if segment == 0:
        tl.store(dh0 + batch * size + state, G, mask=real)


def settings(u, A, back):
    """The grid, sizes, and block sizes and launch options: the fastest on an H100. All kernels of a pass have the same
    segments. Fewer states in a program are more programs, more states have the same B and C to read."""
    (b, c, t), n = u.shape, A.shape[1]
    BN = next_power_of_2(n)
    states, BT = BACK if back else ((16 if b * c >= 16 * PROGRAMS else 32) * min(BN, 64), 16 if BN <= 16 else 8)
    BC = max(1, min(32, states // BN, next_power_of_2(c)))
    segments = max(1, min(PROGRAMS // (b * cdiv(c, BC)), t // 256))
    length = cdiv(cdiv(t, segments), KEPT) * KEPT
    segments = cdiv(t, length)
    sizes = {"BC": BC, "BT": BT, "BN": BN, "num_warps": 1}
    return (cdiv(c, BC), segments, b), (c, t, n, length, segments), sizes


def segment_ends(x, dt, A, B, shape, reverse):
    """What the segments leave from zero: (b, segments, c, n), and the sums of dt in each. None for one segment."""
    (blocks, _, b), _, sizes = settings(x, A, back=False)
    segments = shape[-1]
    if segments == 1:
        return None, None
    ends, sums = A.new_empty(b, segments, *A.shape), A.new_empty(b, segments, len(A))
    run(ends_kernel, (blocks, segments - 1, b), x, dt, A, B, ends, sums, *shape, REVERSE=reverse, **sizes)
    return ends, sums


class SelectiveScan(torch.autograd.Function):

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, h0, keep):
        grid, shape, sizes = settings(u, A, back=False)
        ends, sums = segment_ends(u, dt, A, B, shape, False)
        y, h_T = torch.empty_like(u), A.new_empty(u.shape[0], *A.shape)
        kept = A.new_empty(u.shape[0], cdiv(u.shape[2], KEPT), *A.shape) if keep else None
        run(forward_kernel, grid, u, dt, A, B, C, D, h0, ends, sums, y, kept, h_T, *shape, KEPT=KEPT, **sizes)
        ctx.save_for_backward(u, dt, A, B, C, D, h0, kept)
        ctx.set_materialize_grads(False)
        return y, h_T

    @staticmethod
    def backward(ctx, dy, dh_T):
        *tensors, kept = ctx.saved_tensors
        if torch.is_grad_enabled():                              # gradients that will be differentiated themselves
            return *differentiable_gradients(reference, tensors, (dy, dh_T)), None
        u, dt, A, B, C, D, _ = tensors
        dy = torch.zeros_like(u) if dy is None else dy.contiguous()
        dh_T = None if dh_T is None else dh_T.contiguous()
        grid, shape, sizes = settings(u, A, back=True)
        ends, sums = segment_ends(dy, dt, A, C, shape, True)
        du, ddt, dh0 = torch.empty_like(u), torch.empty_like(dt), A.new_empty(u.shape[0], *A.shape)
        dA, dB, dC, dD = (torch.zeros(x.shape, device=u.device) for x in (A, B.mT, C.mT, D))
        states = A.new_empty(u.shape[0], grid[1], KEPT // sizes["BT"], *A.shape)
        run(backward_kernel, grid, u, dt, A, B, C, D, kept, dh_T, ends, sums, dy, du, ddt, dA, dB, dC, dD, dh0, states,
                              *shape, KEPT=KEPT, **sizes)
        dh0 = dh0 if ctx.needs_input_grad[6] else None
        return du, ddt, dA, dB.mT.to(B.dtype), dC.mT.to(C.dtype), dD, dh0, None


def selective_scan(u, dt, A, B, C, D, h0=None):
    """h_t = e^{dt_t A} h_{t-1} + dt_t B_t u_t from h0 (0 if None), y_t = sum_n C_t h_t + D u_t; and the last state.

    u, dt: (b, c, t), dt positive; A: (c, n), negative; B, C: (b, n, t); D: (c,); h0: (b, c, n). u, dt, B and C in
    float32 or 16 bits, each; the rest is computed in float32. Returns y: (b, c, t) in u's dtype and h_t: (b, c, n) in
    float32. ValueError if the shapes do not agree, for other dtypes, and for sequences too large to be counted. (dB and
    dC are added up in no fixed order: their last bits vary.)"""
    if u.ndim != 3 or A.ndim != 2 or 0 in u.shape:
        raise ValueError(f"u of shape {tuple(u.shape)} and A of {tuple(A.shape)} should be (b, c, t) and (c, n), with "
                         "at least one of each")
    check_dtypes(u=u, dt=dt, A=A, B=B, C=C, D=D, h0=h0)
    (b, c, t), n = u.shape, A.shape[-1]
    if max(c, n) * t >= 2 ** 31 or b >= 2 ** 16:
        raise ValueError(f"{b} sequences of {max(c, n)} x {t} numbers: the kernel counts to 2^16 sequences, to 2^31 in "
                         "one; split them, and go on from the state")
    shapes = {"dt": (dt, (b, c, t)), "A": (A, (c, n)), "B": (B, (b, n, t)), "C": (C, (b, n, t)), "D": (D, (c,)),
              "h0": (h0, (b, c, n))}
    for name, (x, shape) in shapes.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} of shape {tuple(x.shape)} should be {shape} for u of shape {(b, c, t)}")
    A, D, h0 = (x if x is None else x.float().contiguous() for x in (A, D, h0))
    return SelectiveScan.apply(*(x.contiguous() for x in (u, dt)), A, *(x.contiguous() for x in (B, C)), D, h0,
                               torch.is_grad_enabled())


if __name__ == "__main__":
    from kernels import tables
    tables.selective_scan()

"""Mamba's selective scan: n states for each channel, and none of them ever in memory but at chunk boundaries.

    h_t = e^{dt_t A} h_{t-1} + dt_t B_t u_t,   y_t = sum_n C_t h_t + D u_t         [GD23, algorithm 2]

u, dt: (b, c, t); A: (c, n); B, C: (b, n, t), shared by all channels; D: (c,). Written out, h has n times the size of u,
and a scan in PyTorch reads and writes it in each of its rounds. Here a program owns a few channels and walks over
chunks of time. For one state after the other it makes a chunk of a = e^{dt A} and b = dt u B, scans them on chip
(kernels/scan.py explains how), adds C h to the output, and keeps the last h. Memory sees u, dt, y once and B, C once
for each block of channels: what is left is arithmetic, n exponentials and some 10 n operations for a token and channel.

Backward, a chunk's states are scanned again from the state before it, which the forward pass has kept, and g_t = C_t
dy_t + a_{t+1} g_{t+1} is scanned the other way, chunks from the last to the first. Then

    du_t += dt_t sum_n B g    d(dt)_t = sum_n (A g a h_{t-1} + B u g)    dA = sum_t dt g a h_{t-1}    a h_{t-1} = h - b

and dB_t = sum_c dt u g, dC_t = sum_c h dy, added up over channels in memory.

    python -m kernels.selective_scan      check, then a table
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.scan import after
from kernels.tiles import check_dtypes

CHUNK = 64


def one_chunk(h, u, dt, A, B, C, D):
    """From the state h, all states of a chunk by doubling: y, and the last state."""
    a = torch.exp(dt[:, :, None] * A[..., None])                                             # (b, c, n, t)
    b = (dt * u)[:, :, None] * B[:, None]
    b, n = torch.cat([b[..., :1] + a[..., :1] * h[..., None], b[..., 1:]], dim=-1), 1
    while n < b.shape[-1]:
        b, a = b + a * F.pad(b, (n, 0))[..., :-n], a * F.pad(a, (n, 0))[..., :-n]
        n *= 2
    return (C[:, None] * b).sum(dim=2) + D[:, None] * u, b[..., -1]


def reference(u, dt, A, B, C, D, h0=None, step=one_chunk):
    """The same in PyTorch, with a loop from chunk to chunk, in float32 or better. Shapes as in selective_scan."""
    more = torch.promote_types(u.dtype, torch.float32)
    h, y = u.new_zeros(*u.shape[:2], A.shape[1], dtype=more) if h0 is None else h0, []
    for i in range(0, u.shape[2], CHUNK):
        u_i, dt_i, B_i, C_i = (x[..., i:i + CHUNK].to(more) for x in (u, dt, B, C))
        y_i, h = step(h, u_i, dt_i, A, B_i, C_i, D)
        y.append(y_i)
    return torch.cat(y, dim=-1).to(u.dtype), h


@triton.jit
def chunk_of(x, c, t, inside, T):
    """A tile of a (c, t) matrix: rows c, columns t, in float32, 0 outside."""
    return tl.load(x + c[:, None] * T + t[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def scan_chunk(dt, x, A, B, s):
    """All h of a chunk for one state of each channel, from s; and b = dt u B, x = dt u. (BC, BT) from (BC,), (BT,)."""
    b = x * B[None, :]
    a, h = tl.associative_scan((tl.exp(dt * A[:, None]), b), 1, after)
    return a * s[:, None] + h, b


@triton.jit
def column(X, n, k):
    """Column k of a tile, whose columns are n: (rows,)."""
    return tl.sum(tl.where(n[None, :] == k, X, 0.0), axis=1)


@triton.jit
def forward_kernel(u, dt, A, B, C, D, h0, y, kept, h_T, channels, T, N, BC: tl.constexpr, BT: tl.constexpr,
                   BN: tl.constexpr):
    c, i, n = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BT), tl.arange(0, BN)
    batch, chunks = tl.program_id(1).to(tl.int64), tl.cdiv(T, BT)
    row, time, state = batch * channels * T, batch * N * T, c[:, None] * N + n[None, :]
    real = (c < channels)[:, None] & (n < N)[None, :]
    S = tl.zeros((BC, BN), tl.float32)
    if h0 is not None:
        S += tl.load(h0 + batch * channels * N + state, mask=real, other=0.0)
    D_c = tl.load(D + c, mask=c < channels, other=0.0)
    for chunk in range(chunks):
        t = chunk * BT + i
        inside = (c < channels)[:, None] & (t < T)[None, :]
        tl.store(kept + (batch * chunks + chunk) * channels * N + state, S, mask=real)
        u_t, dt_t = chunk_of(u + row, c, t, inside, T), chunk_of(dt + row, c, t, inside, T)
        x, y_t = dt_t * u_t, D_c[:, None] * u_t
        for k in range(N):
            A_k = tl.load(A + c * N + k, mask=c < channels, other=0.0)
            B_k = tl.load(B + time + k * T + t, mask=t < T, other=0.0).to(tl.float32)
            C_k = tl.load(C + time + k * T + t, mask=t < T, other=0.0).to(tl.float32)
            h, _ = scan_chunk(dt_t, x, A_k, B_k, column(S, n, k))
            y_t += C_k[None, :] * h
            S = tl.where(n[None, :] == k, column(h, i, BT - 1)[:, None], S)
        tl.store(y + row + c[:, None] * T + t[None, :], y_t, mask=inside)
    tl.store(h_T + batch * channels * N + state, S, mask=real)


@triton.jit
def backward_kernel(u, dt, A, B, C, D, kept, dy, dh_T, du, ddt, dA, dB, dC, dD, dh0, channels, T, N, BC: tl.constexpr,
                    BT: tl.constexpr, BN: tl.constexpr):
    c, i, n = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BT), tl.arange(0, BN)
    batch, chunks = tl.program_id(1).to(tl.int64), tl.cdiv(T, BT)
    row, time, state = batch * channels * T, batch * N * T, c[:, None] * N + n[None, :]
    real = (c < channels)[:, None] & (n < N)[None, :]
    G, dA_c, dD_c = tl.zeros((BC, BN), tl.float32), tl.zeros((BC, BN), tl.float32), tl.zeros((BC,), tl.float32)
    if dh_T is not None:
        G += tl.load(dh_T + batch * channels * N + state, mask=real, other=0.0)
    D_c = tl.load(D + c, mask=c < channels, other=0.0)
    for chunk in range(chunks - 1, -1, -1):
        t = chunk * BT + i
        inside = (c < channels)[:, None] & (t < T)[None, :]
        S = tl.load(kept + (batch * chunks + chunk) * channels * N + state, mask=real, other=0.0)
        u_t, dt_t, dy_t = (chunk_of(u + row, c, t, inside, T), chunk_of(dt + row, c, t, inside, T),
                           chunk_of(dy + row, c, t, inside, T))
        dt_next = chunk_of(dt + row, c, t + 1, inside & (t + 1 < T)[None, :], T)             # 0: a = 1, g enters whole
        x, dx, ddt_t = dt_t * u_t, tl.zeros((BC, BT), tl.float32), tl.zeros((BC, BT), tl.float32)
        for k in range(N):
            A_k = tl.load(A + c * N + k, mask=c < channels, other=0.0)
            B_k = tl.load(B + time + k * T + t, mask=t < T, other=0.0).to(tl.float32)
            C_k = tl.load(C + time + k * T + t, mask=t < T, other=0.0).to(tl.float32)
            h, b = scan_chunk(dt_t, x, A_k, B_k, column(S, n, k))
            a, g = tl.associative_scan((tl.exp(dt_next * A_k[:, None]), C_k[None, :] * dy_t), 1, after, reverse=True)
            g += a * column(G, n, k)[:, None]
            G = tl.where(n[None, :] == k, column(g, i, 0)[:, None], G)
            da = g * (h - b)                                                                 # g a h_{t-1}
            ddt_t += A_k[:, None] * da
            dA_c += tl.where(n[None, :] == k, tl.sum(dt_t * da, axis=1)[:, None], 0.0)
            dx += g * B_k[None, :]
            tl.atomic_add(dB + time + k * T + t, tl.sum(g * x, axis=0), mask=t < T, sem="relaxed")
            tl.atomic_add(dC + time + k * T + t, tl.sum(h * dy_t, axis=0), mask=t < T, sem="relaxed")
        at = row + c[:, None] * T + t[None, :]
        tl.store(du + at, dx * dt_t + D_c[:, None] * dy_t, mask=inside)
        tl.store(ddt + at, ddt_t + dx * u_t, mask=inside)
        dD_c += tl.sum(u_t * dy_t, axis=1)
    tl.atomic_add(dA + state, dA_c, mask=real, sem="relaxed")
    tl.atomic_add(dD + c, dD_c, mask=c < channels, sem="relaxed")
    first = tl.load(dt + row + c * T, mask=c < channels, other=0.0).to(tl.float32)
    a = tl.exp(first[:, None] * tl.load(A + state, mask=real, other=0.0))
    tl.store(dh0 + batch * channels * N + state, a * G, mask=real)


def settings(u, A):
    """The grid, and block sizes and launch options: the fastest on an H100."""
    b, c, t = u.shape
    sizes = {"BC": 2, "BT": min(256, max(16, triton.next_power_of_2(t))), "BN": triton.next_power_of_2(A.shape[1])}
    return (triton.cdiv(c, sizes["BC"]), b), (c, t, A.shape[1]), sizes | {"num_warps": 1}


class SelectiveScan(torch.autograd.Function):

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, h0):
        grid, shape, sizes = settings(u, A)
        kept = A.new_empty(u.shape[0], triton.cdiv(u.shape[2], sizes["BT"]), *A.shape)
        y, h_T = torch.empty_like(u), A.new_empty(u.shape[0], *A.shape)
        forward_kernel[grid](u, dt, A, B, C, D, h0, y, kept, h_T, *shape, **sizes)
        ctx.save_for_backward(u, dt, A, B, C, D, kept)
        ctx.set_materialize_grads(False)
        return y, h_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh_T):
        u, dt, A, B, C, D, kept = ctx.saved_tensors
        dy = torch.zeros_like(u) if dy is None else dy.contiguous()
        dh_T = None if dh_T is None else dh_T.contiguous()
        grid, shape, sizes = settings(u, A)
        du, ddt, dh0 = torch.empty_like(u), torch.empty_like(dt), torch.empty_like(kept[:, 0])
        dA, dB, dC, dD = (torch.zeros_like(x, dtype=torch.float32) for x in (A, B, C, D))
        backward_kernel[grid](u, dt, A, B, C, D, kept, dy, dh_T, du, ddt, dA, dB, dC, dD, dh0, *shape, **sizes)
        return du, ddt, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dh0 if ctx.needs_input_grad[6] else None


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
    if c * t >= 2 ** 31 or b >= 2 ** 16:
        raise ValueError(f"{b} sequences of {c} x {t} numbers: the kernel counts to 2^16 sequences, and to 2^31 in "
                         "one; split them, and go on from the state")
    shapes = {"dt": (dt, (b, c, t)), "A": (A, (c, n)), "B": (B, (b, n, t)), "C": (C, (b, n, t)), "D": (D, (c,)),
              "h0": (h0, (b, c, n))}
    for name, (x, shape) in shapes.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} of shape {tuple(x.shape)} should be {shape} for u of shape {(b, c, t)}")
    A, D, h0 = (x if x is None else x.float().contiguous() for x in (A, D, h0))
    return SelectiveScan.apply(*(x.contiguous() for x in (u, dt)), A, *(x.contiguous() for x in (B, C)), D, h0)


def main():
    from kernels import bench
    rates = bench.print_machine()

    def inputs(t, b=1, c=64, n=16, dtype=torch.bfloat16):
        u, dt, B, C = (x[:, :, 0] for x in bench.random((b, c, 1, t), (b, c, 1, t), (b, n, 1, t), (b, n, 1, t),
                                                        dtype=torch.float32))
        A = -torch.arange(1.0, n + 1, device="cuda").repeat(c, 1)
        dt = F.softplus(dt - 3).contiguous()
        return u.to(dtype).contiguous(), dt, A, B.to(dtype).contiguous(), C.to(dtype).contiguous(), A[:, 0] * -1.0

    def output(f):
        return lambda *x: f(*x)[0]
    names = ("u", "dt", "A", "B", "C", "D")
    for dtype, floor in ((torch.bfloat16, 2 ** -7), (torch.float32, 2e-6)):
        bench.check(output(selective_scan), output(reference), ("twin", output(reference)),
                    lambda t: inputs(t, dtype=dtype), names, floor=floor)                    # noqa: B023
    step, rows = torch.compile(one_chunk), []

    def compiled(*x):
        return reference(*x, step=step)[0]
    for b, t in ((16, 2048), (4, 8192), (1, 32768)):
        tensors = inputs(t, b, 1024)
        others = {"compiled twin": compiled} if t == 8192 else {}
        rows.append((f"bfloat16, b {b} c 1024 n 16 t {t}", {"kernel": output(selective_scan)} | others, tensors,
                     2 * tensors[0].nbytes + tensors[1].nbytes, 0))
    bench.compare(rows, rates)
    print("memory, forward + backward, b 4 c 1024 n 16 t 8192: " + ", ".join(
        f"{name} {bench.memory(f, inputs(8192, 4, 1024)) / 2 ** 30:.2f} GiB"
        for name, f in (("kernel", output(selective_scan)), ("compiled twin", compiled))))


if __name__ == "__main__":
    main()

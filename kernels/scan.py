"""The diagonal scan: h_t = a_t h_{t-1} + b_t, real or complex, one row of time for each channel, one pass over memory.

A step h -> a h + b followed by another is again such a step: (a_1, b_1) then (a_2, b_2) is (a_1 a_2, a_2 b_1 + b_2).
A program owns one row. It scans a tile of time steps in log rounds on chip, lets the state before the tile in, writes
the tile's states, and goes on from the last. Memory sees a, b and h once: 12 bytes a number in float32, for 3 FLOPs.
Rows lie along time, (b, c, t): then a tile is one piece of memory, and W @ x.mT has that layout.

The gradient of b is the same scan back in time, g_t = dh_t + conj(a_{t+1}) g_{t+1}; that of a is g_t conj(h_{t-1}).

    python -m kernels.scan      check, then a table
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.tiles import check_dtypes


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
    block = min(triton.next_power_of_2(t), 512 if is_complex else 1024)
    return block, max(1, block // 256)


def launch(a, b, start, h, end, states=None, da=None, back=False):
    T, pairs = b.shape[-1], b.is_complex()
    block, warps = tile(T, pairs)
    tensors = (torch.view_as_real(x) if pairs and x is not None else x for x in (a, b, start, h, end, states, da))
    scan_kernel[(b.numel() // T,)](*tensors, T, BLOCK=block, BACK=back, COMPLEX=pairs, num_warps=warps)


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


def main():
    from kernels import bench
    rates = bench.print_machine()

    def inputs(b, c, t, dtype=torch.float32):
        a, b = bench.random((b, c, 1, t), (b, c, 1, t), dtype=torch.float32)
        return [x[:, :, 0].contiguous().to(dtype) for x in (a.sigmoid(), b)]

    def output(f):
        return lambda *x: f(*x)[0]

    def as_complex(f):
        """Of real pairs: |a| < 1 and an angle, and b."""
        def g(r, angle, b, bi):
            h = f(torch.polar(r, angle), torch.complex(b, bi))[0]
            return torch.cat([h.real, h.imag], dim=-1)
        return g

    bench.check(output(scan), output(reference), ("twin", output(reference)), lambda t: inputs(2, 8, t), "ab",
                (1, 17, 1000, 8192, 65536), floor=2e-6)
    print("complex")
    bench.check(as_complex(scan), as_complex(reference), ("twin", as_complex(reference)),
                lambda t: [*inputs(2, 8, t), *inputs(2, 8, t)[::-1]], ("a", "angle", "b", "bi"),
                (1, 17, 1000, 8192, 65536), floor=2e-6)
    rows = []
    for b, t in ((16, 2048), (4, 8192), (1, 32768)):
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            tensors = inputs(b, 1024, t, dtype)
            others = {"twin": output(reference)} if t == 8192 else {}
            rows.append((f"{name}, b {b} c 1024 t {t}", {"kernel": output(scan)} | others, tensors,
                         3 * tensors[0].nbytes, 0))
    r, angle = inputs(4, 1024, 8192)
    rows.append(("complex64, b 4 c 1024 t 8192", {"kernel": output(scan), "twin": output(reference)},
                 [torch.polar(r, angle), torch.complex(angle, r)], 24 * r.numel(), 0))
    bench.compare(rows, rates)


if __name__ == "__main__":
    main()

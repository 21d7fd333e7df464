"""The long convolution y_t = sum_{s <= t} K_{t-s} u_s, as four matrix products on tensor cores, gates included.

In frequencies a convolution is a product, number by number: transform u, multiply by the transform of K, transform
back. A Fourier transform of N numbers is an N x N matrix, too large to be multiplied by. Written row by row as a matrix
of N1 rows and N2 columns, N = N1 N2, u needs two small ones, with a factor between them (a Monarch matrix [F23c]):

    1.  A = F u            F: (N1, N1)    down each column
    2.  U = (A . T) G      G: (N2, N2)    along each row; T: (N1, N2); a dot is a product number by number
        V = U . K^         K^ (K hat) is the same of K, times sqrt(N): here the convolution happens
    3.  B = V G*           back along the rows; * is conj, without transposing: F and G are symmetric and unitary, so
    4.  y = Re F* (B . T*) it is the inverse; back down the columns

(Unitary transforms divide by sqrt(N) each, and a product of two needs but one of them.)

A Fourier transform convolves in a circle: of the 2 N - 1 numbers of u * K, we want N, and the others wrap around, onto
the beginning. Padding with N zeros would help, at twice the work. Here u and K are multiplied as polynomials mod X^N -
i, that is, X^N = i: what wraps around comes back times i. Of real u and K, the causal convolution is then the real
part, and what wrapped around is the imaginary part, which is dropped ("right-angle" convolution). Weighted by w^j, with
w^N = i, u and K convolve in an ordinary circle again. The weights are in F and T, and as |w| = 1, F* and T* take them
off again. With j = N2 j1 + j2, k = k1 + N1 k2, e(x) = e^{2 pi i x}, w = e(1 / (4 N)), steps 1 and 2 together are

    U_k = sum_j w^j u_j e(-j k / N) / sqrt(N)                     F_{k1 j1} = e(-(k1 - 1/4) (j1 - 1/4) / N1) / sqrt(N1)
        = sum_j u_j e(-(k - 1/4) j / N) / sqrt(N)                 T_{k1 j2} = e(-(k1 - 1/4) (1 / (4 N1) + j2 / N))
                                                                  G_{j2 k2} = e(-j2 k2 / N2) / sqrt(N2)

Only k is shifted by a quarter. F shifts j1 as well, to be symmetric, and the 1 / (4 N1) in T takes that back.

`first_kernel` is this and no more: read it first. The kernels after it lay complex columns as pairs of real ones, so
that G acts as a real matrix of twice the size. A program of theirs owns a channel and does all this for one sequence
after the other: memory sees u and y once, 4 bytes a number in 16 bits, for 8 N1 + 16 N2 FLOPs a number (u and y being
real). Tiles are scaled by their largest number, so that float16 holds all that is in between. The gradient of u is the
same with conj(K^); that of K is sum conj(U) D, D of dy, transformed back.

Sequences that are longer than the filter are cut into blocks of N, each transformed once, there and back. What of the
filter and block n wraps around belongs to block n + 1, where times -i it is real: V_n = K^ . (U_n - i U_{n-1}). Filters
too long for a program's memory (more than 8192 taps in 16 bits on an H100) are torch.fft's. (Cut into blocks, too, each
to meet each of the sequence, they would take a third of its time, and sixty lines more.)

    python -m kernels.fft_conv      check, then a table
"""
import functools
import math

import torch
import triton
import triton.language as tl

from kernels.tiles import cdiv, check_dtypes, differentiable_gradients, next_power_of_2, run, shared_memory

MEMORY = {"16 bits": {1024: 28672, 2048: 49152, 4096: 114688, 8192: 196608},     # bytes of shared memory, at most, for
          "float32": {1024: 90112, 2048: 147456}}                                # which a program of so many steps asks
TABLES = {}


# --------------------------------------------------------------------------------------------------------- in PyTorch


def factors(n1, n2):
    """F: (n1, n1), T: (n1, n2), G: (n2, n2), unitary, complex128, with w."""
    def e(turns):
        return torch.polar(torch.ones_like(turns), 2 * math.pi * turns)

    a, b = (torch.arange(n, dtype=torch.float64) for n in (n1, n2))
    k = a[:, None] - 1 / 4
    return e(-k * k.mT / n1) / n1 ** 0.5, e(-k * (1 / (4 * n1) + b / (n1 * n2))), e(-b[:, None] * b / n2) / n2 ** 0.5


@functools.cache
def kept(n1, n2, dtype, device):
    with torch.inference_mode(False):                            # tensors made in inference mode can't meet autograd
        return [x.to(device, dtype) for x in factors(n1, n2)]


def reference(u, K, pre=None, post=None):
    """The same in complex numbers, with t filled up to a power of two; in float32 or float64. Shapes as in fft_conv."""
    dtype, t = torch.promote_types(u.dtype, torch.float32), u.shape[-1]
    bits = max(2, math.ceil(math.log2(t)))
    n1, n2 = 2 ** (bits - bits // 2), 2 ** (bits // 2)
    F, T, G = kept(n1, n2, dtype.to_complex(), u.device)

    def transform(x):
        x = torch.nn.functional.pad(x.to(dtype), (0, n1 * n2 - x.shape[-1])).unflatten(-1, (n1, n2))
        return ((F @ x.to(F.dtype)) * T) @ G

    V = transform(u if pre is None else pre.to(dtype) * u) * transform(K[..., :t]) * (n1 * n2) ** 0.5
    y = (F.conj() @ ((V @ G.conj()) * T.conj())).real.flatten(-2)[..., :t]
    return (y if post is None else post * y).to(u.dtype)


@torch.compiler.assume_constant_result       # made once, also when torch.compile looks on
def tables(n1, n2, dtype, device):
    """For the kernels after the first: F and T, real and imaginary part one behind the other; G and conj(G): (2 n2,
    2 n2), for pairs of real columns, eight real parts before their eight imaginary ones."""
    key = n1, n2, dtype, device
    if key not in TABLES:
        F, T, G = factors(n1, n2)
        G = torch.stack([torch.view_as_real(G), torch.view_as_real(1j * G)], dim=1)          # (j, re im, k, re im)
        order = torch.arange(2 * n2).view(-1, 8, 2).mT.flatten()
        G = G.flatten(2).flatten(0, 1)[order][:, order]
        G = torch.stack([G, G.mT])                                                           # G is symmetric
        TABLES[key] = [x.to(device, dtype).contiguous() for x in (torch.stack([F.real, F.imag]),
                                                                  torch.stack([T.real, T.imag]), G)]
    return TABLES[key]


# ----------------------------------------------------------------------------------------------------- read this first


@triton.jit
def table(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.load(x + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :])


@triton.jit
def matrix_product(A_r, A_i, B_r, B_i):
    """Of complex matrices, each given as its real and its imaginary part."""
    return tl.dot(A_r, B_r) - tl.dot(A_i, B_i), tl.dot(A_r, B_i) + tl.dot(A_i, B_r)


@triton.jit
def first_kernel(u, K, y, F, T, G, C, N1: tl.constexpr, N2: tl.constexpr):
    """The idea alone: one sequence of one channel, N1 N2 steps long. u, y: (b, c, N); K, the filters' transforms times
    sqrt(N): (2, c, N), and F, T, G: a real part (_r), then an imaginary one (_i). All these are pointers."""
    N: tl.constexpr = N1 * N2
    sequence, channel = u + tl.program_id(0) * N, tl.program_id(0) % C
    F_r, F_i = table(F, N1, N1), table(F + N1 * N1, N1, N1)
    T_r, T_i = table(T, N1, N2), table(T + N, N1, N2)
    G_r, G_i = table(G, N2, N2), table(G + N2 * N2, N2, N2)
    K_r, K_i = table(K + channel * N, N1, N2), table(K + (C + channel) * N, N1, N2)
    x = table(sequence, N1, N2)                                      # (j1, j2): step N2 j1 + j2, real
    A_r, A_i = matrix_product(F_r, F_i, x, tl.zeros_like(x))         # (k1, j2): 1. F x, down the columns
    A_r, A_i = A_r * T_r - A_i * T_i, A_r * T_i + A_i * T_r          # times T, number by number
    U_r, U_i = matrix_product(A_r, A_i, G_r, G_i)                    # (k1, k2): 2. A G, along the rows
    V_r, V_i = U_r * K_r - U_i * K_i, U_r * K_i + U_i * K_r          # frequency by frequency, k = k1 + N1 k2
    B_r, B_i = matrix_product(V_r, V_i, G_r, -G_i)                   # (k1, j2): 3. V G*, back along the rows
    B_r, B_i = B_r * T_r + B_i * T_i, B_i * T_r - B_r * T_i          # times T*, number by number
    y_r, _ = matrix_product(F_r, -F_i, B_r, B_i)                     # (j1, j2): 4. F* B, back down the columns
    at = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tl.store(y + tl.program_id(0) * N + at, y_r)                                 # the wrapped part is imaginary


def first_fft_conv(u, K, n1=16):
    """y_t = sum_{s <= t} K_{t-s} u_s. u: (b, c, t), K: (c, t), in one piece, float32; t = n1 n2, powers of two, 16 or
    more. On a GPU the products are of TF32: right to some thousandths."""
    b, c, t = u.shape
    F, T, G = kept(n1, t // n1, torch.complex64, u.device)
    K = (F @ K.view(c, n1, -1).to(F.dtype) * T @ G) * t ** 0.5
    tables, y = [torch.stack([x.real, x.imag]) for x in (K, F, T, G)], torch.empty_like(u)
    first_kernel[(b * c,)](u, tables[0], y, *tables[1:], c, N1=n1, N2=t // n1)
    return y


# --------------------------------------------------------------------------------------------------- parts of a kernel


@triton.jit
def pairs(x_r, x_i):
    """Complex columns as real ones, the parts in turns of 8 columns, as the numbers of a product lie in a thread."""
    x = tl.join(x_r, x_i).reshape(x_r.shape[0], x_r.shape[1] // 8, 8, 2)
    return x.permute(0, 1, 3, 2).reshape(x_r.shape[0], 2 * x_r.shape[1])


@triton.jit
def parts(x):
    """Undo pairs: real and imaginary part."""
    x = x.reshape(x.shape[0], x.shape[1] // 16, 2, 8).permute(0, 1, 3, 2)
    return tl.split(x.reshape(x.shape[0], x.shape[1] * 8, 2))


@triton.jit
def times(x, y, CONJ: tl.constexpr):
    """The product of two tiles of pairs; CONJ: of conj(x) and y."""
    x_r, x_i = parts(x)
    y_r, y_i = parts(y)
    if CONJ:
        x_i = -x_i
    return pairs(x_r * y_r - x_i * y_i, x_r * y_i + x_i * y_r)


@triton.jit
def turned(x):
    """i x"""
    x_r, x_i = parts(x)
    return pairs(-x_i, x_r)


@triton.jit
def unit(x):
    """x scaled to a largest number of 1, and the scale: 0 for zeros."""
    scale = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    return x * over(scale), scale


@triton.jit
def over(scale):
    """1 / scale, or 1 where that would not be a number: there is nothing to be scaled."""
    return 1 / tl.where(scale > 1e-37, scale, 1.0)


@triton.jit
def transform(x, F_r, F_i, T_r, T_i, G, PRECISION: tl.constexpr):
    """((F x) * T) G: (N1, N2), real -> pairs (N1, 2 N2)."""
    A_r = tl.dot(F_r, x, input_precision=PRECISION).to(x.dtype)
    A_i = tl.dot(F_i, x, input_precision=PRECISION).to(x.dtype)
    A = pairs(A_r * T_r - A_i * T_i, A_r * T_i + A_i * T_r)
    return tl.dot(A, G, input_precision=PRECISION)


@triton.jit
def transform_back(V, F_r, F_i, T_r, T_i, G_conj, PRECISION: tl.constexpr):
    """The real part of F* ((V G*) * T*): pairs (N1, 2 N2) -> (N1, N2)."""
    B_r, B_i = parts(tl.dot(V, G_conj, input_precision=PRECISION).to(V.dtype))
    B_r, B_i = B_r * T_r + B_i * T_i, B_i * T_r - B_r * T_i
    return tl.dot(F_i, B_i, acc=tl.dot(F_r, B_r, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def read(x, gate, x_at, gate_at, at, inside):
    """gate * x in float32, 0 outside; a sequence of theirs begins at x_at, gate_at."""
    x_t = tl.load(x + x_at + at, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        x_t *= tl.load(gate + gate_at + at, mask=inside, other=0.0).to(tl.float32)
    return x_t


@triton.jit
def block_of(x, gate, b, row, n, T, x_b, gate_b, F, N1: tl.constexpr, N2: tl.constexpr):
    """Block n of a sequence as a tile (N1, N2), scaled, and its scale."""
    at = n * N1 * N2 + tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    x_t, scale = unit(read(x, gate, b * x_b + row * T, b * gate_b + row * T, at, at < T))
    return x_t.to(F.dtype.element_ty), scale


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def spectrum(K, row, taps, F, F_r, F_i, T_r, T_i, G, N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr):
    """The transform of a filter, its norm made sqrt(N1 N2), so that no product is too large or small; and its scale."""
    x, scale = block_of(K, None, 0, row, 0, taps, 0, 0, F, N1, N2)
    U, more = unit(transform(x, F_r, F_i, T_r, T_i, G, PRECISION))           # so that no square is, either
    norm = tl.sqrt(tl.sum(tl.sum(U * U, axis=1), axis=0))
    root = tl.sqrt(1.0 * N1 * N2)
    return (U * (root * over(norm))).to(x.dtype), scale * more * norm


@triton.jit
def conv_kernel(u, pre, K, y, post, y2, post2, F, T, G, batches, steps, blocks, taps, u_b, pre_b, y_b, post_b,
                post2_b, N1: tl.constexpr, N2: tl.constexpr, CONJ: tl.constexpr, MANY: tl.constexpr,
                PRECISION: tl.constexpr):
    """y = post (K * (pre u)), and y2 = post2 (K * (pre u)), or with CONJ the transposed convolution; for one channel of
    every num_programs(1)-th sequence. MANY: sequences of several blocks."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    F_r, F_i, G_ = table(F, N1, N1), table(F + N1 * N1, N1, N1), table(G, 2 * N2, 2 * N2)
    T_r, T_i = table(T, N1, N2), table(T + N1 * N2, N1, N2)
    G_conj = table(G + 4 * N2 * N2, 2 * N2, 2 * N2)
    K_hat, K_scale = spectrum(K, row, taps, F, F_r, F_i, T_r, T_i, G_, N1, N2, PRECISION)
    before = tl.zeros((N1, 2 * N2), tl.float32)
    count = tl.cdiv(batches - tl.program_id(1), tl.num_programs(1)) * blocks
    for j in range(count):
        b, i = (tl.program_id(1) + j // blocks * tl.num_programs(1)).to(tl.int64), j % blocks
        n = blocks - 1 - i if CONJ else i
        x, scale = block_of(u, pre, b, row, n, steps, u_b, pre_b, F, N1, N2)
        U = transform(x, F_r, F_i, T_r, T_i, G_, PRECISION)
        if MANY:
            U *= scale
            before = tl.where(i == 0, 0.0, before)               # what the block before (behind) it left over
            both, before = U + turned(before) if CONJ else U - turned(before), U
            V, scale = unit(times(K_hat, both, CONJ))
        else:
            V = times(K_hat, U.to(x.dtype), CONJ)
        y_t = transform_back(V.to(x.dtype), F_r, F_i, T_r, T_i, G_conj, PRECISION) * (scale * K_scale)
        write(y_t, row * steps, n * N1 * N2 + tile, steps, b, y, post, y2, post2, y_b, post_b, post2_b)


@triton.jit
def write(y_t, start, at, steps, b, y, post, y2, post2, y_b, post_b, post2_b):
    """y = post y_t, y2 = post2 y_t"""
    gated = y_t
    if post is not None:
        gated = y_t * tl.load(post + b * post_b + start + at, mask=at < steps, other=0.0)
    tl.store(y + b * y_b + start + at, gated.to(y.dtype.element_ty), mask=at < steps)
    if y2 is not None:
        gated = y_t * tl.load(post2 + b * post2_b + start + at, mask=at < steps, other=0.0)
        tl.store(y2 + b * y_b + start + at, gated.to(y2.dtype.element_ty), mask=at < steps)


@triton.jit
def filter_kernel(u, pre, dy, post, dK, F, T, G, batches, steps, blocks, taps, root, u_b, pre_b, dy_b, post_b,
                  N1: tl.constexpr, N2: tl.constexpr, MANY: tl.constexpr, PRECISION: tl.constexpr):
    """dK_l = sum over sequences and t of (post dy)_t (pre u)_{t-l}."""
    row = tl.program_id(0).to(tl.int64)
    F_r, F_i, G_ = table(F, N1, N1), table(F + N1 * N1, N1, N1), table(G, 2 * N2, 2 * N2)
    T_r, T_i = table(T, N1, N2), table(T + N1 * N2, N1, N2)
    dK_hat, behind = tl.zeros((N1, 2 * N2), tl.float32), tl.zeros((N1, 2 * N2), tl.float32)
    for j in range(batches * blocks):
        b, i = (j // blocks).to(tl.int64), j % blocks
        n = blocks - 1 - i
        x, scale = block_of(u, pre, b, row, n, steps, u_b, pre_b, F, N1, N2)
        U = transform(x, F_r, F_i, T_r, T_i, G_, PRECISION).to(x.dtype)
        x, dy_scale = block_of(dy, post, b, row, n, steps, dy_b, post_b, F, N1, N2)
        D = transform(x, F_r, F_i, T_r, T_i, G_, PRECISION)
        if MANY:
            D *= dy_scale
            behind = tl.where(i == 0, 0.0, behind)
            dK_hat += times(U, D + turned(behind), True) * scale
            behind = D
        else:
            dK_hat += times(U, D.to(x.dtype), True) * (scale * dy_scale)
    V, scale = unit(dK_hat)
    G_conj = table(G + 4 * N2 * N2, 2 * N2, 2 * N2)
    y = transform_back(V.to(F.dtype.element_ty), F_r, F_i, T_r, T_i, G_conj, PRECISION) * (scale * root)
    l = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tl.store(dK + row * taps + l, y, mask=l < taps)


# ------------------------------------------------------------------------------------------------------------ launching


def options(n):
    """N1 for a transform of length n, and warps for a convolution and a filter's gradient: the fastest on an H100."""
    return (128, 8, 8) if n == 8192 else (min(64, n // 16), 4, 8 if n == 4096 else 4)


@torch.compiler.assume_constant_result
def longest(digits, device):
    """The most steps for which a program has the memory on this device."""
    return max((n for n, asked in MEMORY[digits].items() if asked <= shared_memory(device)), default=0)


def length(u, taps):
    """How long a transform is for filters of so many taps; None, if no program on this device has the memory for it."""
    n = max(1024, next_power_of_2(taps))
    return n if n <= longest("float32" if u.dtype == torch.float32 else "16 bits", u.device) else None


class Plan:
    """How a convolution with so many taps is done: N = n1 n2."""
    programs = 528               # at least, if there are as many sequences: four for each multiprocessor of an H100

    def __init__(self, u, taps):
        self.n, exact = length(u, taps), u.dtype == torch.float32
        n1, warps, self.filter_warps = options(self.n)
        self.dtype, precision = (torch.float32, "tf32x3") if exact else (torch.float16, "tf32")
        self.tables = tables(n1, self.n // n1, self.dtype, u.device)
        self.sizes = {"N1": n1, "N2": self.n // n1, "PRECISION": precision, "num_warps": warps, "num_stages": 1}

    def convolve(self, u, gate, K, outputs, conj=False):
        """[post (K * (gate u)) for post in outputs], one or two."""
        (b, c, t), y, post = u.shape, [torch.empty_like(u) for _ in outputs] + [None], [*outputs, None]
        blocks = cdiv(t, self.n)
        run(conv_kernel, (c, min(b, cdiv(self.programs, c))), u, gate, K, y[0], post[0], y[1], post[1],
            *self.tables, b, t, blocks, K.shape[1], *map(stride, (u, gate, y[0], post[0], post[1])), CONJ=conj,
            MANY=blocks > 1, **self.sizes)
        return y[:len(outputs)]

    def filter_gradient(self, u, pre, dy, post, taps):
        """dK: (c, taps), float32."""
        (b, c, t), dK = u.shape, u.new_empty(u.shape[1], taps, dtype=torch.float32)
        blocks = cdiv(t, self.n)
        run(filter_kernel, (c,), u, pre, dy, post, dK, *self.tables, b, t, blocks, taps, self.n ** 0.5, stride(u),
            stride(pre), stride(dy), stride(post), MANY=blocks > 1, **self.sizes | {"num_warps": self.filter_warps})
        return dK


def stride(x):
    return 0 if x is None else x.stride(0)


class FFTConv(torch.autograd.Function):

    @staticmethod
    def forward(ctx, u, K, pre, post):
        ctx.save_for_backward(u, K, pre, post)
        return Plan(u, K.shape[-1]).convolve(u, pre, K, [post])[0]

    @staticmethod
    def backward(ctx, dy):
        u, K, pre, post = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(reference, (u, K, pre, post), (dy,))
        plan, dy, dK = Plan(u, K.shape[-1]), in_rows(dy), None
        du, *dpre = plan.convolve(dy, post, K, [pre] if pre is None else [pre, u], conj=True)
        dpost = None if post is None else plan.convolve(u, pre, K, [dy])[0]
        if ctx.needs_input_grad[1]:
            dK = plan.filter_gradient(u, pre, dy, post, K.shape[-1]).to(K.dtype)
        return du, dK, dpre[0] if dpre else None, dpost


def in_rows(x):
    """x itself, if each sequence (c, t) lies in one piece; or a copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def fft_conv(u, K, pre=None, post=None):
    """y_t = post_t sum_{s <= t} K_{t-s} pre_s u_s for each channel.

    u: (b, c, t); K: (c, taps), taps beyond t do nothing; pre, post: (b, c, t) or None. u, pre, post of one dtype,
    float32 or 16 bits, K of any of these. Returns y: (b, c, t) in u's dtype. Filters too long for this device's memory
    (see above) are done by torch.fft. ValueError if the shapes do not agree, or for other dtypes. As with any FFT,
    rounding, infinities and what is not a number get from the future into the past."""
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(f"u of shape {tuple(u.shape)} should be (b, c, t), with at least one of each")
    check_dtypes(u=u, K=K)
    b, c, t = u.shape
    for name, x in (("pre", pre), ("post", post)):
        if x is not None and (x.shape != u.shape or x.dtype != u.dtype):
            raise ValueError(f"{name} of {x.dtype} {tuple(x.shape)} should be like u, {u.dtype} {tuple(u.shape)}")
    if K.ndim != 2 or len(K) != c or K.shape[1] < 1:
        raise ValueError(f"K of shape {tuple(K.shape)} should be ({c}, taps) for u of shape {tuple(u.shape)}")
    if length(u, min(t, K.shape[1])) is None:
        return by_torch_fft(u, K, pre, post)
    u, pre, post = (x if x is None else in_rows(x) for x in (u, pre, post))
    return FFTConv.apply(u, K[:, :t].contiguous(), pre, post)


def by_torch_fft(u, K, pre=None, post=None):
    """The same, padded to twice the length, in float32."""
    t = u.shape[-1]
    v = u.float() if pre is None else pre.float() * u
    y = torch.fft.irfft(torch.fft.rfft(v, n=2 * t) * torch.fft.rfft(K[:, :t].float(), n=2 * t), n=2 * t)[..., :t]
    return (y if post is None else post * y).to(u.dtype)


if __name__ == "__main__":
    from kernels import tables
    tables.fft_conv()

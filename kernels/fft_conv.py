"""The long convolution y_t = sum_{s <= t} K_{t-s} u_s, by matrix products on tensor cores, gates included.

Products of polynomials mod X^N - i. Of two real ones, what is below X^N comes out as the real part, and what wraps
around comes back times i, as the imaginary part: the real part is the causal convolution. So nothing is padded to 2 N
("right-angle" convolution). With w^N = i it is a cyclic one of w^j u_j, whose transform is two matrix products with a
factor between them, a Monarch matrix [F23c]: for N = N1 N2, j = N2 j1 + j2,
k = k1 + N1 k2, and e(x) = e^{2 pi i x}, w = e(1 / (4 N)),

    U_k = sum_j w^j u_j e(-j k / N)       U = ((F u) * T) G       F_{k1 j1} = e(-(k1 - 1/4) (j1 - 1/4) / N1)
                                                                  T_{k1 j2} = e(-(k1 - 1/4) (1 / (4 N1) + j2 / N))
    y = Re F* ((V G*) * T*),  V = U * transform of K              G_{j2 k2} = e(-j2 k2 / N2)

where * is conj: F and G are symmetric. Complex columns lie as pairs of real ones, so G acts as a real matrix of twice
the size. A program owns a channel and does all this for one sequence after the other: memory sees u and y once, 4 bytes
a number in 16 bits, for 8 N1 + 16 N2 FLOPs a number. F, T, G are unitary and tiles are scaled by their largest number,
so that float16 holds all that is in between. The gradient of u is the same with conj(K); that of K is sum conj(U) dY,
transformed back.

A filter shorter than the sequence (partial convolution): blocks of N. What wraps around belongs to the next block, and
-i makes it real: U_n becomes U_n - i U_{n-1}. Nothing else changes.

Above 8192: N = 16 M. A first pass over memory is the transform (with w) of 16 pieces, a last one undoes it; between
them there are 16 complex transforms of length M, without w.

    python -m kernels.fft_conv      check, then a table
"""
import functools
import math

import torch
import triton
import triton.language as tl

from kernels.tiles import check_dtypes, differentiable_gradients, no_room, shared_memory

PIECES = tl.constexpr(16)                                  # of a sequence that is too long for one program
MEMORY = {"16 bits": {1024: 32768, 2048: 57344, 4096: 114688, 8192: 196608},     # bytes of shared memory, at most, for
          "float32": {1024: 90112, 2048: 147456}}                                # which a program of so many steps asks
LONGEST = 8192                                             # of its steps
TABLES = {}


# --------------------------------------------------------------------------------------------------------- in PyTorch


def factors(n1, n2, weights=True):
    """F: (n1, n1), T: (n1, n2), G: (n2, n2), unitary, complex128; weights=False: without w."""
    def e(turns):
        return torch.polar(torch.ones_like(turns), 2 * math.pi * turns)

    a, b = (torch.arange(n, dtype=torch.float64) for n in (n1, n2))
    w = weights / 4
    k = a[:, None] - w
    return e(-k * k.mT / n1) / n1 ** 0.5, e(-k * (w / n1 + b / (n1 * n2))), e(-b[:, None] * b / n2) / n2 ** 0.5


@functools.cache
def kept(n1, n2, dtype, device):
    with torch.inference_mode(False):                            # whoever asks first, a gradient may pass them later
        return [x.to(device, dtype) for x in factors(n1, n2)]


def reference(u, K, pre=None, post=None):
    """The same in complex numbers, for a power of two above t; in float32 or float64. Shapes as in fft_conv."""
    dtype, t = torch.promote_types(u.dtype, torch.float32), u.shape[-1]
    bits = max(2, math.ceil(math.log2(t)))
    n1, n2 = 2 ** (bits - bits // 2), 2 ** (bits // 2)
    F, T, G = kept(n1, n2, dtype.to_complex(), u.device)

    def transform(x):
        x = torch.nn.functional.pad(x.to(dtype), (0, n1 * n2 - x.shape[-1])).unflatten(-1, (n1, n2))
        return F @ x.to(F.dtype) * T @ G

    V = transform(u if pre is None else pre.to(dtype) * u) * transform(K[..., :t]) * (n1 * n2) ** 0.5
    y = (F.conj() @ (V @ G.conj() * T.conj())).real.flatten(-2)[..., :t]
    return (y if post is None else post * y).to(u.dtype)


@torch.compiler.assume_constant_result       # made once, also when torch.compile looks on
def tables(n1, n2, weights, dtype, device):
    """F and T: real and imaginary part, one behind the other; G and conj(G): (2 n2, 2 n2), for pairs."""
    key = n1, n2, weights, dtype, device
    if key not in TABLES:
        F, T, G = factors(n1, n2, weights)
        G = torch.stack([torch.view_as_real(G), torch.view_as_real(1j * G)], dim=1)          # (j, re im, k, re im)
        turns = torch.arange(2 * n2).view(-1, 8, 2).mT.flatten()                             # the kernels' pairs
        G = G.flatten(2).flatten(0, 1)[turns][:, turns]
        G = torch.stack([G, G.mT])                                                           # G is symmetric
        TABLES[key] = [x.to(device, dtype).contiguous() for x in (torch.stack([F.real, F.imag]),
                                                                  torch.stack([T.real, T.imag]), G)]
    return TABLES[key]


# --------------------------------------------------------------------------------------------------- parts of a kernel


@triton.jit
def table(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.load(x + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :])


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
def transform(x, xi, F_r, F_i, T_r, T_i, G, COMPLEX: tl.constexpr, PRECISION: tl.constexpr):
    """((F x) * T) G: (N1, N2), real or complex -> pairs (N1, 2 N2)."""
    A_r, A_i = tl.dot(F_r, x, input_precision=PRECISION), tl.dot(F_i, x, input_precision=PRECISION)
    if COMPLEX:
        A_r -= tl.dot(F_i, xi, input_precision=PRECISION)
        A_i = tl.dot(F_r, xi, acc=A_i, input_precision=PRECISION)
    A_r, A_i = A_r.to(x.dtype), A_i.to(x.dtype)
    A = pairs(A_r * T_r - A_i * T_i, A_r * T_i + A_i * T_r)
    return tl.dot(A, G, input_precision=PRECISION)


@triton.jit
def transform_back(V, F_r, F_i, T_r, T_i, G_conj, COMPLEX: tl.constexpr, PRECISION: tl.constexpr):
    """F* ((V G*) * T*): pairs (N1, 2 N2) -> the real part, (N1, N2), and, if COMPLEX, the imaginary one."""
    B_r, B_i = parts(tl.dot(V, G_conj, input_precision=PRECISION).to(V.dtype))
    B_r, B_i = B_r * T_r + B_i * T_i, B_i * T_r - B_r * T_i
    y = tl.dot(F_i, B_i, acc=tl.dot(F_r, B_r, input_precision=PRECISION), input_precision=PRECISION)
    yi = y
    if COMPLEX:
        yi = tl.dot(F_r, B_i, input_precision=PRECISION) - tl.dot(F_i, B_r, input_precision=PRECISION)
    return y, yi


@triton.jit
def read(x, gate, x_at, gate_at, at, inside):
    """gate * x in float32, 0 outside; a sequence of theirs begins at x_at, gate_at."""
    x_t = tl.load(x + x_at + at, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        x_t *= tl.load(gate + gate_at + at, mask=inside, other=0.0).to(tl.float32)
    return x_t


@triton.jit
def block_of(x, gate, scales, b, row, n, T, x_b, gate_b, F, N1: tl.constexpr, N2: tl.constexpr):
    """Block n of a sequence as a tile (N1, N2), scaled, and its scale. Or, where there are scales already, a piece that
    `split` made: real and imaginary part."""
    at = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    if scales is None:
        at += n * N1 * N2
        x_t, scale = unit(read(x, gate, b * x_b + row * T, b * gate_b + row * T, at, at < T))
        x_t = x_t.to(F.dtype.element_ty)
        xi_t = x_t
    else:
        x += b * x_b + row * (2 * N1 * N2)
        x_t, xi_t = tl.load(x + at), tl.load(x + N1 * N2 + at)
        scale = tl.load(scales + b * (tl.num_programs(0) // PIECES) + row // PIECES)
    return x_t, xi_t, scale


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def spectrum_kernel(K, scales, out, out_scale, F, T, G, taps, root, most, N1: tl.constexpr, N2: tl.constexpr,
                    PRECISION: tl.constexpr):
    """The transform of a filter / (most * its largest number), times root."""
    row = tl.program_id(0).to(tl.int64)
    COMPLEX: tl.constexpr = scales is not None
    F_r, F_i, G_ = table(F, N1, N1), table(F + N1 * N1, N1, N1), table(G, 2 * N2, 2 * N2)
    T_r, T_i = table(T, N1, N2), table(T + N1 * N2, N1, N2)
    x, xi, scale = block_of(K, None, scales, 0, row, 0, taps, 0, 0, F, N1, N2)
    U = transform(x, xi, F_r, F_i, T_r, T_i, G_, COMPLEX, PRECISION)
    at = tl.arange(0, N1)[:, None] * (2 * N2) + tl.arange(0, 2 * N2)[None, :]
    tl.store(out + row * (2 * N1 * N2) + at, (U * (root / most)).to(out.dtype.element_ty))
    tl.store(out_scale + (row // PIECES if COMPLEX else row), scale * most)


@triton.jit
def conv_kernel(u, pre, scales, K, K_scale, y, post, y2, post2, F, T, G, batches, steps, blocks, u_b, pre_b, y_b,
                post_b, post2_b, N1: tl.constexpr, N2: tl.constexpr, CONJ: tl.constexpr, MANY: tl.constexpr,
                PRECISION: tl.constexpr):
    """y = post (K * (pre u)), and y2 = post2 (K * (pre u)), or with CONJ the transposed convolution; for one channel,
    or one piece of it, of every num_programs(1)-th sequence. K: from spectrum_kernel."""
    row = tl.program_id(0).to(tl.int64)
    COMPLEX: tl.constexpr = scales is not None
    tile = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    F_r, F_i, G_ = table(F, N1, N1), table(F + N1 * N1, N1, N1), table(G, 2 * N2, 2 * N2)
    T_r, T_i = table(T, N1, N2), table(T + N1 * N2, N1, N2)
    G_conj = table(G + 4 * N2 * N2, 2 * N2, 2 * N2)
    K_hat, before = table(K + row * (2 * N1 * N2), N1, 2 * N2), tl.zeros((N1, 2 * N2), tl.float32)
    count = tl.cdiv(batches - tl.program_id(1), tl.num_programs(1)) * blocks
    for i in range(count):
        b = (tl.program_id(1) + i // blocks * tl.num_programs(1)).to(tl.int64)
        n = blocks - 1 - i % blocks if CONJ else i % blocks
        x, xi, scale = block_of(u, pre, scales, b, row, n, steps, u_b, pre_b, F, N1, N2)
        U = transform(x, xi, F_r, F_i, T_r, T_i, G_, COMPLEX, PRECISION)
        if MANY:                                                 # what the block before (behind) it left over
            U *= scale
            before = tl.where(i % blocks == 0, 0.0, before)
            both = U + turned(before) if CONJ else U - turned(before)
            before = U
            V, scale = unit(times(K_hat, both, CONJ))
        else:
            V = times(K_hat, U.to(x.dtype), CONJ)
        y_t, yi_t = transform_back(V.to(x.dtype), F_r, F_i, T_r, T_i, G_conj, COMPLEX, PRECISION)
        if COMPLEX:
            at = y + b * y_b + row * (2 * N1 * N2)
            tl.store(at + tile, y_t.to(y.dtype.element_ty))
            tl.store(at + N1 * N2 + tile, yi_t.to(y.dtype.element_ty))
        else:
            y_t *= scale * tl.load(K_scale + row)
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
def filter_kernel(u, pre, u_scales, dy, post, dy_scales, out, out_scale, F, T, G, batches, steps, blocks, root,
                  most, u_b, pre_b, dy_b, post_b, N1: tl.constexpr, N2: tl.constexpr, MANY: tl.constexpr,
                  PRECISION: tl.constexpr):
    """Of dK_l = sum over sequences and t of (post dy)_t (pre u)_{t-l} the transform, as conv_kernel takes a filter's,
    and the scale."""
    row = tl.program_id(0).to(tl.int64)
    COMPLEX: tl.constexpr = u_scales is not None
    F_r, F_i, G_ = table(F, N1, N1), table(F + N1 * N1, N1, N1), table(G, 2 * N2, 2 * N2)
    T_r, T_i = table(T, N1, N2), table(T + N1 * N2, N1, N2)
    dK_hat, behind, total = tl.zeros((N1, 2 * N2), tl.float32), tl.zeros((N1, 2 * N2), tl.float32), 0.0
    for i in range(batches * blocks):
        b, n = (i // blocks).to(tl.int64), blocks - 1 - i % blocks
        x, xi, scale = block_of(u, pre, u_scales, b, row, n, steps, u_b, pre_b, F, N1, N2)
        U = transform(x, xi, F_r, F_i, T_r, T_i, G_, COMPLEX, PRECISION).to(x.dtype)
        x, xi, dy_scale = block_of(dy, post, dy_scales, b, row, n, steps, dy_b, post_b, F, N1, N2)
        D = transform(x, xi, F_r, F_i, T_r, T_i, G_, COMPLEX, PRECISION)
        if MANY:
            D *= dy_scale
            behind = tl.where(i % blocks == 0, 0.0, behind)
            dK_hat += times(U, D + turned(behind), True) * scale
            behind = D
        else:
            dK_hat += times(U, D.to(x.dtype), True) * (scale * dy_scale)
        total += scale * dy_scale
    if COMPLEX:                                                  # one scale for all pieces
        total *= most                                            # no number of dK_hat / total is above N / most
    else:
        total = tl.max(tl.max(tl.abs(dK_hat), axis=1), axis=0)
    at = tl.arange(0, N1)[:, None] * (2 * N2) + tl.arange(0, 2 * N2)[None, :]
    tl.store(out + row * (2 * N1 * N2) + at, dK_hat * (root * over(total)))
    tl.store(out_scale + (row // PIECES if COMPLEX else row), total * root)


@triton.jit
def split_kernel(u, pre, out, scales, F, T, C, steps, u_b, pre_b, M: tl.constexpr, BLOCK: tl.constexpr,
                 PRECISION: tl.constexpr):
    """The transform of the 16 pieces of a sequence, (16, M): a complex piece for each frequency, (16, 2, M), and the
    sequence's scale."""
    b, row = (tl.program_id(0) // C).to(tl.int64), (tl.program_id(0) % C).to(tl.int64)
    i, j, top = tl.arange(0, PIECES), tl.arange(0, BLOCK), 0.0
    for m in range(0, M, BLOCK):
        at = i[:, None] * M + m + j[None, :]
        x = read(u, pre, b * u_b + row * steps, b * pre_b + row * steps, at, at < steps)
        top = tl.maximum(top, tl.max(tl.max(tl.abs(x), axis=1), axis=0))
    tl.store(scales + tl.program_id(0), top)
    F_r, F_i = table(F, PIECES, PIECES), table(F + PIECES * PIECES, PIECES, PIECES)
    for m in range(0, M, BLOCK):
        at = i[:, None] * M + m + j[None, :]
        x = read(u, pre, b * u_b + row * steps, b * pre_b + row * steps, at, at < steps)
        x = (x * over(top)).to(F.dtype.element_ty)
        A_r, A_i = tl.dot(F_r, x, input_precision=PRECISION), tl.dot(F_i, x, input_precision=PRECISION)
        T_r, T_i = tl.load(T + at), tl.load(T + PIECES * M + at)
        to = out + tl.program_id(0).to(tl.int64) * (2 * PIECES * M) + i[:, None] * (2 * M) + m + j[None, :]
        tl.store(to, (A_r * T_r - A_i * T_i).to(out.dtype.element_ty))
        tl.store(to + M, (A_r * T_i + A_i * T_r).to(out.dtype.element_ty))


@triton.jit
def join_kernel(x, scales, K_scale, y, post, y2, post2, F, T, C, steps, y_b, post_b, post2_b, M: tl.constexpr,
                BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Back from the pieces (16, 2, M) to a sequence; its first `steps` numbers."""
    b, row = (tl.program_id(0) // C).to(tl.int64), (tl.program_id(0) % C).to(tl.int64)
    at = tl.arange(0, PIECES)[:, None] * M + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    source = x + tl.program_id(0).to(tl.int64) * (2 * PIECES * M) + at + tl.arange(0, PIECES)[:, None] * M
    x_r, x_i, T_r, T_i = tl.load(source), tl.load(source + M), tl.load(T + at), tl.load(T + PIECES * M + at)
    B_r = (x_r * T_r.to(tl.float32) + x_i * T_i.to(tl.float32)).to(x.dtype.element_ty)
    B_i = (x_i * T_r.to(tl.float32) - x_r * T_i.to(tl.float32)).to(x.dtype.element_ty)
    F_r, F_i = table(F, PIECES, PIECES), table(F + PIECES * PIECES, PIECES, PIECES)
    y_t = tl.dot(F_i, B_i, acc=tl.dot(F_r, B_r, input_precision=PRECISION), input_precision=PRECISION)
    y_t *= tl.load(scales + tl.program_id(0)) * tl.load(K_scale + row)
    write(y_t, row * steps, at, steps, b, y, post, y2, post2, y_b, post_b, post2_b)


# ------------------------------------------------------------------------------------------------------------ launching


def options(n):
    """N1 for a transform of length n, and warps for a convolution and a filter's gradient: the fastest on an H100."""
    return (128, 8, 8) if n == 8192 else (min(64, n // 16), 4, 8 if n == 4096 else 4)


@torch.compiler.assume_constant_result
def longest(digits, device):
    """The most steps for which a program has the memory on this device."""
    return max((n for n, asked in MEMORY[digits].items() if asked <= shared_memory(device)), default=0)


def cut(u, taps):
    """How long a transform is, and whether it is of 16 pieces: where it is too long for a program on this device. Or
    None, where it is too long for that, too. ValueError for filters and sequences too long for any device."""
    t, n = u.shape[-1], max(1024, triton.next_power_of_2(taps))
    digits = "float32" if u.dtype == torch.float32 else "16 bits"
    if n <= longest(digits, u.device):
        return n, False
    most = LONGEST // 4 if digits == "float32" else LONGEST
    piece = max(16 * 256, triton.next_power_of_2(t)) // 16
    if n > most and piece > most:
        raise ValueError(f"a convolution of {t} steps with {taps} taps in {u.dtype}: up to {16 * most} steps, or "
                         f"{most} taps of a filter")
    asked = MEMORY[digits][max(1024, piece) if piece <= most else n]
    what = f"a convolution of up to {16 * piece} steps with up to {n} taps in {digits}"
    return None if no_room(what, asked, u.device) else (16 * piece, True)


class Plan:
    """How a convolution of t steps and so many taps is done: N = n1 n2 in one program, over `blocks` of it, or 16
    pieces of N."""
    programs = 528               # at least, if there are as many sequences: four for each multiprocessor of an H100

    def __init__(self, u, taps):
        t, exact, (n, self.pieces) = u.shape[-1], u.dtype == torch.float32, cut(u, taps)
        self.root, n = n ** 0.5, n // 16 if self.pieces else n
        self.n, self.blocks = n, 1 if self.pieces else triton.cdiv(t, n)
        n1, warps, self.filter_warps = options(n)
        self.dtype, precision = (torch.float32, "tf32x3") if exact else (torch.float16, "tf32")
        self.tables = tables(n1, n // n1, not self.pieces, self.dtype, u.device)
        self.sizes = {"N1": n1, "N2": n // n1, "PRECISION": precision, "num_warps": warps, "num_stages": 1}
        if self.pieces:
            self.outer = tables(16, n, True, self.dtype, u.device)[:2]
            self.outer_sizes = {"M": n, "BLOCK": 128, "PRECISION": precision, "num_warps": 4}

    def split(self, x, gate):
        """x, gate -> what the kernels take as (tensor, gate, scales)."""
        if not self.pieces:
            return x, gate, None
        b, c, t = x.shape
        out = x.new_empty(b, c, 16, 2, self.n, dtype=self.dtype)
        scales = x.new_empty(b, c, dtype=torch.float32)
        split_kernel[(b * c,)](x, gate, out, scales, *self.outer, c, t, stride(x), stride(gate), **self.outer_sizes)
        return out, None, scales

    def spectrum(self, K):
        """The filter's transform, and its scale. Its norm is then at most 1, or 1/8 for pieces, of which more are
        added up: so a product with it fits float16."""
        (c, taps), rows = K.shape, len(K) * (16 if self.pieces else 1)
        most = taps ** 0.5 * (8 if self.pieces else 1)
        out, scale = K.new_empty(rows, 2 * self.n, dtype=self.dtype), K.new_empty(c, dtype=torch.float32)
        K, _, scales = self.split(K[None], None)
        spectrum_kernel[(rows,)](K, scales, out, scale, *self.tables, taps, self.root, most, **self.sizes)
        return out, scale

    def convolve(self, u, gate, K, outputs, conj=False, blocks=None):
        """[post (K * (gate u)) for post in outputs], one or two; K: from spectrum."""
        blocks = blocks or self.blocks
        (b, c, t), (K, K_scale) = u.shape, K
        y = [torch.empty(b, c, t, device=u.device, dtype=u.dtype) for _ in outputs] + [None] * (2 - len(outputs))
        post = [*outputs, None][:2]
        x, gate, scales = self.split(u, gate)
        rows = len(K)
        out = torch.empty_like(x) if self.pieces else y[0]
        parts = min(b, triton.cdiv(self.programs, rows))
        inner = (None, None, None) if self.pieces else (post[0], y[1], post[1])
        conv_kernel[(rows, parts)](
            x, gate, scales, K, K_scale, out, *inner, *self.tables, b, t, blocks, stride(x), stride(gate),
            stride(out), stride(post[0]), stride(post[1]), CONJ=conj, MANY=blocks > 1, **self.sizes)
        if self.pieces:
            self.join(out, scales, K_scale, y, post)
        return y[:len(outputs)]

    def join(self, x, scales, K_scale, y, post):
        b, c, t = y[0].shape
        join_kernel[(b * c, self.n // 128)](x, scales, K_scale, y[0], post[0], y[1], post[1], *self.outer, c, t,
                                            stride(y[0]), stride(post[0]), stride(post[1]), **self.outer_sizes)

    def filter_gradient(self, u, pre, dy, post, taps):
        """dK: (c, taps), float32; from its transform by a convolution with 1, 0, 0, ..."""
        b, c, t = u.shape
        rows, impulse = c * (16 if self.pieces else 1), u.new_zeros(1, c, taps, dtype=torch.float32)
        impulse[..., 0] = 1
        u, pre, u_scales = self.split(u, pre)
        dy, post, dy_scales = self.split(dy, post)
        dK_hat, scales = impulse.new_empty(rows, 2 * self.n), impulse.new_empty(c)
        filter_kernel[(rows,)](u, pre, u_scales, dy, post, dy_scales, dK_hat, scales, *self.tables, b, t, self.blocks,
                               self.root, 8 if self.pieces else 1, stride(u), stride(pre), stride(dy), stride(post),
                               MANY=self.blocks > 1, **self.sizes | {"num_warps": self.filter_warps})
        return self.convolve(impulse, None, (dK_hat, scales), [None], blocks=1)[0][0]


def stride(x):
    return 0 if x is None else x.stride(0)


class FFTConv(torch.autograd.Function):

    @staticmethod
    def forward(ctx, u, K, pre, post):
        plan = Plan(u, K.shape[-1])
        K_hat = plan.spectrum(K)
        y, = plan.convolve(u, pre, K_hat, [post])
        ctx.save_for_backward(u, K, pre, post, *K_hat)
        return y

    @staticmethod
    def backward(ctx, dy):
        u, K, pre, post, *K_hat = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(reference, (u, K, pre, post), (dy,))
        plan, dy, dK = Plan(u, K.shape[-1]), in_rows(dy), None
        du, *dpre = plan.convolve(dy, post, K_hat, [pre] if pre is None else [pre, u], conj=True)
        dpost = None if post is None else plan.convolve(u, pre, K_hat, [dy])[0]
        if ctx.needs_input_grad[1]:
            dK = plan.filter_gradient(u, pre, dy, post, K.shape[-1]).to(K.dtype)
        return du, dK, dpre[0] if dpre else None, dpost


def in_rows(x):
    """x itself, if each sequence (c, t) lies in one piece; or a copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def fft_conv(u, K, pre=None, post=None):
    """y_t = post_t sum_{s <= t} K_{t-s} pre_s u_s for each channel.

    u: (b, c, t); K: (c, taps), taps beyond t do nothing; pre, post: (b, c, t) or None. u, pre, post of one dtype,
    float32 or 16 bits, K of any of these. Returns y: (b, c, t) in u's dtype. ValueError if the shapes do not agree, for
    other dtypes, or for more than 131072 steps with more than 8192 taps (a quarter of both in float32). As with any
    FFT, rounding, infinities and what is not a number get from the future into the past."""
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(f"u of shape {tuple(u.shape)} should be (b, c, t), with at least one of each")
    check_dtypes(u=u, K=K)
    b, c, t = u.shape
    for name, x in (("pre", pre), ("post", post)):
        if x is not None and (x.shape != u.shape or x.dtype != u.dtype):
            raise ValueError(f"{name} of {x.dtype} {tuple(x.shape)} should be like u, {u.dtype} {tuple(u.shape)}")
    if K.ndim != 2 or len(K) != c or K.shape[1] < 1:
        raise ValueError(f"K of shape {tuple(K.shape)} should be ({c}, taps) for u of shape {tuple(u.shape)}")
    if cut(u, min(t, K.shape[1])) is None:
        return by_torch_fft(u, K, pre, post)
    u, pre, post = (x if x is None else in_rows(x) for x in (u, pre, post))
    return FFTConv.apply(u, K[:, :t].contiguous(), pre, post)


def by_torch_fft(u, K, pre=None, post=None):
    """The same, padded to twice the length, in float32."""
    t = u.shape[-1]
    v = u.float() if pre is None else pre.float() * u
    y = torch.fft.irfft(torch.fft.rfft(v, n=2 * t) * torch.fft.rfft(K[:, :t].float(), n=2 * t), n=2 * t)[..., :t]
    return (y if post is None else post * y).to(u.dtype)


def main():
    from kernels import bench
    rates = bench.print_machine()

    def inputs(t, b=2, c=16, dtype=torch.bfloat16, taps=None, gates=0):
        tensors = bench.random(*[(b, c, 1, t)] * (1 + gates), dtype=torch.float32)
        u, *gates = (x[:, :, 0].contiguous().to(dtype) for x in tensors)
        K, l = bench.random((1, 1, c, taps or t), dtype=torch.float32, seed=3)[0][0, 0], taps or t
        return [u, K * torch.exp(-torch.arange(l, device="cuda") * 8 / l), *gates]

    def check(what, shapes, names, lengths, **more):
        print(what)
        bench.check(fft_conv, reference, ("torch.fft", by_torch_fft), shapes, names, lengths, **more)
    check("no gates", inputs, "uK", (1, 17, 1000, 2048, 8192, 20000, 32768))
    check("exact", lambda t: inputs(t, dtype=torch.float32), "uK", (1, 17, 1000, 2048, 8192, 32768), floor=2e-6)
    check("two gates", lambda t: inputs(t, gates=2), ("u", "K", "pre", "post"), (1000, 8192, 20000))
    check("a filter of 1000 taps", lambda t: inputs(t, taps=1000), "uK", (3000, 20000))
    rows = []

    def row(name, tensors, passes=2, t=None):
        """t: of the tensor cores' FLOPs."""
        others = {"torch.fft": by_torch_fft} | ({"twin": reference} if t == 8192 else {})
        n1 = 128 if t and (t if t <= LONGEST else t // 16) == 8192 else 64
        inner = t and (t if t <= LONGEST else t // 16)
        flops = 2 * tensors[0].numel() * (4 * n1 + 8 * inner // n1) if t else 0
        rows.append((name, {"kernel": fft_conv} | others, tensors, passes * tensors[0].nbytes, flops))
    for t in (1024, 2048, 4096, 8192, 16384, 32768):
        row(f"b {32768 // t} c 1024 t {t}", inputs(t, 32768 // t, 1024), t=t)
    for t in (2048, 8192):
        row(f"two gates, t {t}", inputs(t, 32768 // t, 1024, gates=2), passes=4)
    row("2048 taps, b 1 t 32768", inputs(32768, 1, 1024, taps=2048))
    row("float32, b 16 t 2048", inputs(2048, 16, 1024, dtype=torch.float32))
    bench.compare(rows, rates)


if __name__ == "__main__":
    main()

"""FlashAttention: causal softmax attention, an optional window, shared key heads; the matrix is never in memory.

    P = 2^(S - m),  S = log2(e) Q K^T / sqrt(d);   l <- 2^(m - m') l + rowsum P;   O <- 2^(m - m') O + P V    m: rowmax

A program owns a block of targets and walks over the blocks of sources that they see: first those that are seen whole,
then those on the diagonal (and at the window's edge), which need a mask. Two products of 2 d FLOPs for a pair (t, s),
half of all pairs: at t = 8192 an H100 could do them in 0.76 ms (32768 tokens, 16 heads of 64), and the t^2 / 2
powers of two of each head in 0.58, on a unit of their own. Bound by arithmetic, not by each token's 8 d bytes.

Backward, with L = m + log2 l and D = rowsum(dO * O):  P = 2^(S - L),  dS = P * (dO V^T - D),

    dV = P^T dO      dK = dS^T Q      one program for a block of sources, walking over the targets that see it
    dQ = dS K                         one program for a block of targets, as forward

Seven products, where keeping dQ in memory and adding to it from many programs would take five, whose sums come in any
order. Written in Triton, where a program waits for each product, those five take longer: 4.3 ms against 4.2 at t = 8192
and d = 64, 4.6 against 3.8 at d = 128 (on an H200). Where the waiting is done by other warps they take 3.4 and 2.8:
flash_hopper.py, which a Hopper takes in 16 bits.

    python -m kernels.flash_attention      check, then a table
"""
import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.tiles import (
    cdiv,
    differentiable_gradients,
    in_one_piece,
    load,
    next_power_of_2,
    place,
    properties,
    run,
    shared_memory,
    store,
    without_zeros,
)

LOG2E, LN2 = 1.4426950408889634, tl.constexpr(0.6931471805599453)
LENGTHS = ["T", "S", "window"]                   # a kernel is compiled once for all of them


def reference(q, k, v, window=None, block=64):
    """The kernel's loop over blocks. q: (b, h, t, d), k: (b, g, s, d), v: (b, g, s, e). Returns o: (b, h, t, e)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    t, s = q.shape[2], k.shape[2]
    back = torch.arange(s - t, s, device=q.device)[:, None] - torch.arange(s, device=q.device)
    see = (back >= 0) & (back < (window or s))
    o = []
    for rows in torch.arange(t).split(block):
        m, l, acc = q.new_full((*q.shape[:2], len(rows), 1), -1e30), 0.0, 0.0
        for cols in torch.arange(int(rows[-1]) + 1 + s - t).split(block):
            S = q[:, :, rows] @ k[:, :, cols].mT * (q.shape[-1] ** -0.5 * LOG2E)
            S = S.masked_fill(~see[rows][:, cols], -1e30)
            new = torch.maximum(m, S.amax(dim=-1, keepdim=True))
            P, shrink, m = torch.exp2(S - new), torch.exp2(m - new), new
            l, acc = shrink * l + P.sum(dim=-1, keepdim=True), shrink * acc + P @ v[:, :, cols]
        o.append(acc / l)
    return torch.cat(o, dim=2)


@triton.jit
def hidden(targets, sources, window):
    """May these targets not see these sources? targets: positions as a column (row), sources: as a row (column)."""
    return (sources > targets) | (sources <= targets - window)


@triton.jit
def block_of(x, b, start, h, H, T, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr):
    """Rows from `start` on of head h of H, zeros from row T on. TMA: x is a tensor descriptor of (b, t, h, d)."""
    if TMA:
        x_i = x.load([b, start, h, 0]).reshape(ROWS, BD)
    else:
        x_i = load(x + place(b * H + h, H, H, T, D), start + tl.arange(0, ROWS), tl.arange(0, BD), T, H * D, D)
    return x_i


@triton.jit
def filled_up(T):
    """Rows of L and delta: whole blocks, so that none is read under a mask."""
    return tl.cdiv(T, 128) * 128


@triton.jit
def sources_of(first, last, window, S, BN: tl.constexpr):
    """Where three stretches of sources begin and the last one ends, for targets at positions first to last: those on
    the window's edge, those that every target sees, those on the diagonal. All but the end: multiples of BN."""
    begin, seen_by_first = tl.maximum(0, first - window + 1) // BN * BN, tl.minimum(tl.maximum(0, first + 1), S)
    diagonal = tl.maximum(begin, seen_by_first // BN * BN)
    whole = tl.minimum(tl.maximum(begin, tl.cdiv(last - window + 1, BN) * BN), diagonal)
    return begin, whole, diagonal, tl.minimum(S, last + 1)


@triton.jit
def targets_of(first, last, window, T, BM: tl.constexpr):
    """The same for the targets that see the sources first to last, both counted from the first target: three stretches,
    those on the diagonal, those that see every source, those that the window's edge meets."""
    begin, end = tl.maximum(0, first) // BM * BM, tl.minimum(T, last + window)
    diagonal = tl.minimum(tl.cdiv(tl.maximum(0, last), BM) * BM, end)
    return begin, diagonal, tl.maximum(diagonal, tl.minimum(end, first + window) // BM * BM), end


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(q, k, v, o, L, T, S, H, G, window, SCALE: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
                   BD: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
                   TMA: tl.constexpr):
    blocks = tl.cdiv(T, BM)
    block, b_h = blocks - 1 - tl.program_id(0) % blocks, tl.program_id(0) // blocks          # the longest first
    b, g = b_h // H, b_h % H // (H // G)
    rows, e = block * BM + tl.arange(0, BM), tl.arange(0, BE)
    targets = rows + S - T
    q_i = block_of(q, b, block * BM, b_h % H, H, T, D, BD, BM, TMA)
    m, l, acc = tl.full((BM,), -1e30, tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM, BE), tl.float32)
    stretches = sources_of(block * BM + S - T, block * BM + BM - 1 + S - T, window, S, BN)
    for i in tl.static_range(3):                                 # the one in the middle needs no mask
        for start in range(stretches[i], stretches[i + 1], BN):
            s = tl.dot(q_i, block_of(k, b, start, g, G, S, D, BD, BN, TMA).T, input_precision=PRECISION)   # (BM, BN)
            if i != 1:
                s = tl.where(hidden(targets[:, None], start + tl.arange(0, BN)[None, :], window), float("-inf"), s)
            new = tl.maximum(m, tl.max(s, axis=1) * SCALE)       # finite, as m is from the start: no inf - inf
            p, shrink, m = tl.exp2(s * SCALE - new[:, None]), tl.exp2(m - new), new
            v_i = block_of(v, b, start, g, G, S, E, BE, BN, TMA)
            l, acc = l * shrink + tl.sum(p, axis=1), acc * shrink[:, None]
            acc = tl.dot(p.to(v_i.dtype), v_i, acc=acc, input_precision=PRECISION)
    l = tl.maximum(l, 1e-30)                                     # rows behind the end may see nothing
    store(o + place(b_h, H, H, T, E), acc / l[:, None], rows, e, T, H * E, E)
    tl.store(L + b_h * filled_up(T) + rows, m + tl.log2(l))


@triton.jit(do_not_specialize=["T"])
def rowsum_kernel(do, o, delta, sums, T, H, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """delta = rowsum(dO * O), (b h, t), 0 from row T on; and sums, if given, of q's shape: zeros, for dQ."""
    blocks = filled_up(T) // 128
    b_h, rows, e = tl.program_id(0) // blocks, tl.program_id(0) % blocks * 128 + tl.arange(0, 128), tl.arange(0, BE)
    at = place(b_h, H, H, T, E)
    x = load(do + at, rows, e, T, H * E, E).to(tl.float32) * load(o + at, rows, e, T, H * E, E).to(tl.float32)
    tl.store(delta + b_h * filled_up(T) + rows, tl.sum(x, axis=1))
    if sums is not None:
        store(sums + place(b_h, H, H, T, D), tl.zeros((128, BD), tl.float32), rows, tl.arange(0, BD), T, H * D, D)


@triton.jit(do_not_specialize=LENGTHS)
def dq_kernel(q, k, v, do, L, delta, dq, T, S, H, G, window, SCALE: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
              BD: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
              TMA: tl.constexpr):
    blocks = tl.cdiv(T, BM)
    block, b_h = blocks - 1 - tl.program_id(0) % blocks, tl.program_id(0) // blocks          # the longest first
    b, g = b_h // H, b_h % H // (H // G)
    rows, d, e = block * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BE)
    targets = rows + S - T
    q_i = load(q + place(b_h, H, H, T, D), rows, d, T, H * D, D)
    do_i = load(do + place(b_h, H, H, T, E), rows, e, T, H * E, E)
    L_i, delta_i = tl.load(L + b_h * filled_up(T) + rows), tl.load(delta + b_h * filled_up(T) + rows)
    dq_i = tl.zeros((BM, BD), tl.float32)
    stretches = sources_of(block * BM + S - T, block * BM + BM - 1 + S - T, window, S, BN)
    for i in tl.static_range(3):
        for start in range(stretches[i], stretches[i + 1], BN):
            k_i = block_of(k, b, start, g, G, S, D, BD, BN, TMA)
            p = tl.exp2(tl.dot(q_i, k_i.T, input_precision=PRECISION) * SCALE - L_i[:, None])
            if i != 1:
                p = tl.where(hidden(targets[:, None], start + tl.arange(0, BN)[None, :], window), 0.0, p)
            dp = tl.dot(do_i, block_of(v, b, start, g, G, S, E, BE, BN, TMA).T, input_precision=PRECISION)
            dq_i = tl.dot((p * (dp - delta_i[:, None])).to(k_i.dtype), k_i, acc=dq_i, input_precision=PRECISION)
    store(dq + place(b_h, H, H, T, D), dq_i * (SCALE * LN2), rows, d, T, H * D, D)


@triton.jit(do_not_specialize=LENGTHS)
def dkv_kernel(q, k, v, do, L, delta, dk, dv, T, S, H, G, window, GROUP: tl.constexpr, SCALE: tl.constexpr,
               D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
               PRECISION: tl.constexpr, TMA: tl.constexpr):
    """The tiles are transposed: sources down, targets across."""
    blocks = tl.cdiv(S, BN)
    block, b_g = tl.program_id(0) % blocks, tl.program_id(0) // blocks                       # the longest first
    sources, d, e = block * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BE)
    key, value = place(b_g, G, G, S, D), place(b_g, G, G, S, E)
    k_i, v_i = load(k + key, sources, d, S, G * D, D), load(v + value, sources, e, S, G * E, E)
    dk_i, dv_i = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BE), tl.float32)
    stretches = targets_of(block * BN + T - S, block * BN + BN - 1 + T - S, window, T, BM)
    for head in range(GROUP):                                    # of the heads that share these keys
        b, h = b_g // G, b_g % G * GROUP + head
        for i in tl.static_range(3):
            for start in range(stretches[i], stretches[i + 1], BM):
                rows = start + tl.arange(0, BM)
                q_i = block_of(q, b, start, h, H, T, D, BD, BM, TMA)
                do_i = block_of(do, b, start, h, H, T, E, BE, BM, TMA)
                at = (b * H + h) * filled_up(T) + rows                   # behind T, q and do are 0
                L_i, delta_i = tl.load(L + at), tl.load(delta + at)
                p = tl.exp2(tl.dot(k_i, q_i.T, input_precision=PRECISION) * SCALE - L_i[None, :])    # (BN, BM)
                if i != 1:
                    p = tl.where(hidden(rows[None, :] + S - T, sources[:, None], window), 0.0, p)
                dv_i = tl.dot(p.to(do_i.dtype), do_i, acc=dv_i, input_precision=PRECISION)
                dp = tl.dot(v_i, do_i.T, input_precision=PRECISION)
                dk_i = tl.dot((p * (dp - delta_i[None, :])).to(q_i.dtype), q_i, acc=dk_i, input_precision=PRECISION)
    store(dk + key, dk_i * (SCALE * LN2), sources, d, S, G * D, D)
    store(dv + value, dv_i, sources, e, S, G * E, E)


def settings(q, k, v, window, width):
    """Sizes, and the blocks and launch options that were fastest on an H100."""
    (_, t, h, d), (_, s, g, e) = q.shape, v.shape
    shape = (t, s, h, g, s if window is None else min(window, s))
    sizes = {"SCALE": width ** -0.5 * LOG2E, "D": d, "E": e, "BD": max(16, next_power_of_2(d)),
             "BE": max(16, next_power_of_2(e)), "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
             "TMA": copies_blocks(q.device, window)}
    return shape, sizes, blocks_of(q, v, window)


def blocks_of(q, v, window):
    """(BM, BN, warps, stages) of the three kernels: forward, dq, dk and dv."""
    width = max(q.shape[-1], v.shape[-1])
    if q.dtype == torch.float32 or width > 128:                      # float32: exact and slow, no tensor cores
        row, memory = next_power_of_2(width) * q.element_size(), shared_memory(q.device)
        return [halved(*blocks, row, memory) for blocks in ((64, 32, 8, 1), (64, 32, 8, 1), (32, 64, 8, 1))]
    if width > 64:
        return (64, 64, 4, 3 if copies_blocks(q.device, window) else 2), (64, 64, 4, 2), (32, 64, 4, 2)
    if window is not None and window <= 256:
        return (64, 32, 4, 3), (64, 32, 4, 3), (64, 64, 4, 1)
    return (64, 64, 4, 3), (64, 64, 4, 3), (32, 128, 4, 3)


def halved(BM, BN, warps, stages, row, memory):
    """The larger block halved, until there is room for q, k, v and do, in rows of so many bytes, and two products."""
    while max(BM, BN) > 16 and 2 * (BM + BN) * row + 8 * BM * BN > memory:
        BM, BN = (BM // 2, BN) if BM >= BN else (BM, BN // 2)
    return BM, BN, warps, stages


def launch(blocks):
    BM, BN, warps, stages = blocks
    return {"BM": BM, "BN": BN, "num_warps": warps, "num_stages": stages}


@torch.compiler.assume_constant_result
def capability(device):
    """9 for a Hopper; 0 for what is no GPU."""
    return properties(device).major if device.type == "cuda" else 0


def copies_blocks(device, window):
    """Does a unit of the device copy blocks by itself (TMA), told where by a descriptor? Hopper and later have one; in
    short windows it is slower than loads, and each descriptor costs the host as much as a launch."""
    return capability(device) >= 9 and (window is None or window > 256)


def on_hopper(q, v, window):
    """Is it flash_hopper.py's? It is for Hopper alone, and for 16 bits; its blocks are too long for windows."""
    return (capability(q.device) == 9 and q.dtype != torch.float32 and max(q.shape[-1], v.shape[-1]) <= 128
            and (window is None or window > 2048))


def described(x, rows, TMA):
    """x (b, t, h, d), or its descriptor, for blocks of rows of a head."""
    if not TMA:
        return x
    if not torch.compiler.is_compiling() and x.storage_offset() % 8:         # it must begin at a multiple of 16 bytes
        x = x.clone()
    return TensorDescriptor.from_tensor(x, [1, rows, 1, max(16, next_power_of_2(x.shape[-1]))])


def twin(q, k, v, window, width):
    """The reference, for arguments as FlashAttention takes them."""
    return reference(*(x.transpose(1, 2) for x in (q[..., :width], k[..., :width], v)), window).transpose(1, 2)


class FlashAttention(torch.autograd.Function):
    """q: (b, t, h, d), k, v: (b, s, g, d) in one piece. width: d without the zeros that fill it up."""

    @staticmethod
    def forward(ctx, q, k, v, window, width):
        (b, t, h, _), e = q.shape, v.shape[-1]
        shape, sizes, (blocks, *_) = settings(q, k, v, window, width)
        o, L = q.new_empty(b, t, h, e), torch.empty(b, h, 128 * cdiv(t, 128), device=q.device)
        ctx.save_for_backward(q, k, v, o, L)
        ctx.window, ctx.width = window, width
        if on_hopper(q, v, window):
            from kernels import flash_hopper
            flash_hopper.forward(q, k, v, o, L, shape[-1], sizes["SCALE"])
            return o
        q_d, (k_d, v_d) = described(q, blocks[0], sizes["TMA"]), (described(x, blocks[1], sizes["TMA"]) for x in (k, v))
        run(forward_kernel, (cdiv(t, blocks[0]) * b * h,), q_d, k_d, v_d, o, L, *shape, **sizes, **launch(blocks))
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, L = ctx.saved_tensors
        if torch.is_grad_enabled():
            own_twin = functools.partial(twin, window=ctx.window, width=ctx.width)
            return *differentiable_gradients(own_twin, (q, k, v), (do,)), None, None
        do, (b, t, h, _), (_, s, g, e) = do.contiguous(), q.shape, v.shape
        shape, sizes, (_, for_dq, for_dkv) = settings(q, k, v, ctx.window, ctx.width)
        delta, dq, dk, dv = torch.empty_like(L), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        hopper = on_hopper(q, v, ctx.window) and not torch.are_deterministic_algorithms_enabled()
        sums = torch.empty_like(q, dtype=torch.float32) if hopper else None
        run(rowsum_kernel, (cdiv(t, 128) * b * h,), do, o, delta, sums, t, h, D=q.shape[-1], BD=sizes["BD"], E=e,
            BE=sizes["BE"])
        if hopper:
            from kernels import flash_hopper
            flash_hopper.backward(q, k, v, do, L, delta, sums, dk, dv, shape[-1], sizes["SCALE"])
            return torch.mul(sums, ctx.width ** -0.5, out=dq), dk, dv, None, None
        q_d, do_d = (described(x, for_dkv[0], sizes["TMA"]) for x in (q, do))
        run(dkv_kernel, (cdiv(s, for_dkv[1]) * b * g,), q_d, k, v, do_d, L, delta, dk, dv, *shape, h // g, **sizes,
            **launch(for_dkv))
        k_d, v_d = (described(x, for_dq[1], sizes["TMA"]) for x in (k, v))
        run(dq_kernel, (cdiv(t, for_dq[0]) * b * h,), q, k_d, v_d, do, L, delta, dq, *shape, **sizes, **launch(for_dq))
        return dq, dk, dv, None, None


def flash_attention(q, k, v, window=None):
    """softmax(Q K^T / sqrt(d)) V, causal; a target sees the last `window` sources, its own included, or all before
    it.

    q: (b, h, t, d), k: (b, g, s, d), v: (b, g, s, e) of one dtype, float32 or 16 bits, g a divisor of h, s >= t:
    the last target stands at the last source. Returns o: (b, h, t, e). ValueError for sizes that do not fit, and
    for heads wider than 256."""
    (_, h, t, d), (_, g, s, e) = q.shape, v.shape
    if h % g or s < t or k.shape[1:] != (g, s, d):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: g must divide h, and s be t or "
                         "more")
    if max(d, e) > 256:
        raise ValueError(f"heads of {d} keys, {e} values: this kernel holds up to 256 of each")
    return without_zeros(FlashAttention.apply(*(in_one_piece(x, 8) for x in (q, k, v)), window, d), e)


if __name__ == "__main__":
    from kernels import tables
    tables.flash_attention()

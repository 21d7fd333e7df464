"""Softmax attention on Hopper (H100, H200), its warps each with a job: flash_attention.py's mathematics in Gluon.

In Triton a program's warps all do the same: multiply, wait, take exponentials, wait. Here one warp only asks for blocks
of memory (TMA), and two groups of four warps own 64 rows each: targets forward, sources backward. A group has two or
more products under way at a time: while its exponentials are taken, the tensor cores still multiply the block before
with its values, or work for the other group. Who may go on is said by barriers in shared memory: a ring of N blocks
has for each of them `full`, on which those wait who read, and `free`, on which the one waits who writes.

    loader       k_0 v_0 k_1 v_1 k_2 v_2 ...
    a group      S_0 = Q k_0^T | S_1 = Q k_1^T, O += P_0 v_0 | S_2 = Q k_2^T, O += P_1 v_1 | ...
                               P_0                           P_1                          P_2          exponentials

Backward, five products: both groups' dS meet in shared memory, and dQ is added up in memory by the TMA unit, which adds
where it would store. Such sums come in any order: where torch.use_deterministic_algorithms asks for one,
flash_attention.py's seven products are taken.
"""
import functools

import torch
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.tiles import cdiv, next_power_of_2, run

ROWS = gl.constexpr(64)                          # of a group: as many as one instruction multiplies
LN2 = gl.constexpr(0.6931471805599453)
LENGTHS = ["T", "S", "window", "tiles"]          # a kernel is compiled once for all of them


@gluon.jit
def ring(x, N: gl.constexpr, READERS: gl.constexpr):
    """N blocks of what the descriptor x describes, with their barriers."""
    blocks = gl.allocate_shared_memory(x.dtype, [N] + x.block_type.shape, x.layout)
    full = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=READERS)
    return blocks, full, free


@gluon.jit
def fetch(x, b, row, head, to, i, N: gl.constexpr):
    """Ask for a block, the i-th of the ring's: as soon as its place is free."""
    blocks, full, free = to
    mbarrier.wait(free.index(i % N), (i // N & 1) ^ 1)
    mbarrier.expect(full.index(i % N), x.block_type.nbytes)
    tma.async_copy_global_to_shared(x, [b, row, head, 0], full.index(i % N), blocks.index(i % N))


@gluon.jit
def arrived(of, i, N: gl.constexpr, LENGTH: gl.constexpr, WIDTH: gl.constexpr):
    """The i-th block, when it is there: (LENGTH, WIDTH)."""
    blocks, full, _ = of
    mbarrier.wait(full.index(i % N), i // N & 1)
    return blocks.index(i % N).reshape([LENGTH, WIDTH])


@gluon.jit
def done(of, i, N: gl.constexpr):
    mbarrier.arrive(of[2].index(i % N), count=1)


# ------------------------------------------------------------------------------------------------------------- forward


@gluon.jit
def tile_of(tile, T, H):
    """(b, head, first target) of a tile, two groups' targets: every second head from its end, so that long and short
    tiles take turns."""
    tiles = gl.cdiv(T, 2 * ROWS)
    b_h, i = tile // tiles, tile % tiles
    return b_h // H, b_h % H, gl.where(b_h % 2 == 0, tiles - 1 - i, i) * (2 * ROWS)


@gluon.jit
def stretches_of(first, window, S, BN: gl.constexpr):
    """Sources for a tile whose first target stands at `first`, in blocks of BN, from the last to the first: where the
    blocks end that hold its diagonal, those that all its targets see whole, and those on the window's edge. The three
    stretches are between these."""
    last = first + 2 * ROWS - 1
    end, begin = gl.cdiv(gl.minimum(S, last + 1), BN) * BN, gl.maximum(0, first - window + 1) // BN * BN
    whole = gl.maximum(begin, gl.minimum(gl.maximum(0, first + 1) // BN * BN, end - BN))
    edge = gl.minimum(whole, gl.maximum(begin, gl.cdiv(last - window + 1, BN) * BN))
    return end, whole, edge, begin


@gluon.jit
def loader(q, k, v, rings, T, S, H, G, window, tiles, BN: gl.constexpr, N: gl.constexpr):
    q_ring, k_ring, v_ring = rings
    i = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, h, first = tile_of(tile, T, H)
        fetch(q, b, first, h, q_ring, turn, 1)
        end, _, _, begin = stretches_of(first + S - T, window, S, BN)
        for start in range(end - BN, begin - 1, -BN):
            fetch(k, b, start, h // (H // G), k_ring, i, N)
            fetch(v, b, start, h // (H // G), v_ring, i, N)
            i += 1
        turn += 1


@gluon.jit
def softmax(s, m, l, first, start, window, SCALE: gl.constexpr, BN: gl.constexpr, MASK: gl.constexpr):
    """The running maximum and sum with one block of scores more, its P, and what the output so far shrinks by.
    first: the position of the first target."""
    if MASK:
        targets = first + gl.arange(0, ROWS, gl.SliceLayout(1, s.type.layout))
        sources = start + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
        back = targets[:, None] - sources[None, :]
        s = gl.where((back < 0) | (back >= window), float("-inf"), s)
    new = gl.maximum(m, gl.max(s, axis=1) * SCALE)               # finite, as m is from the start: no inf - inf
    p, shrink = gl.exp2(s * SCALE - new[:, None]), gl.exp2(m - new)
    return new, l * shrink + gl.sum(p, axis=1), p, shrink


@gluon.jit
def group(rings, o, L, T, S, H, window, tiles, SCALE: gl.constexpr, D: gl.constexpr, E: gl.constexpr, BD: gl.constexpr,
          BE: gl.constexpr, BN: gl.constexpr, N: gl.constexpr, I: gl.constexpr):
    q_ring, k_ring, v_ring = rings
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BE, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    nothing = gl.zeros([ROWS, BN], gl.float32, SCORES)
    i = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, h, first = tile_of(tile, T, H)
        at = first + I * ROWS + S - T
        end, whole, edge, begin = stretches_of(first + S - T, window, S, BN)
        m = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
        l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([ROWS, BE], gl.float32, OUTPUT)
        q_i = arrived(q_ring, turn, 1, 2 * ROWS, BD).slice(I * ROWS, ROWS)
        s = warpgroup_mma(q_i, arrived(k_ring, i, N, BN, BD).permute((1, 0)), nothing, use_acc=False)
        done(k_ring, i, N)
        m, l, p, shrink = softmax(s, m, l, at, end - BN, window, SCALE, BN, True)
        stretches = end - BN, whole, edge, begin
        for j in gl.static_range(3):                                     # the one in the middle needs no mask
            for start in range(stretches[j] - BN, stretches[j + 1] - 1, -BN):
                factor = gl.convert_layout(p.to(q_i.dtype), FACTOR)
                k_i = arrived(k_ring, i + 1, N, BN, BD)
                scores = warpgroup_mma(q_i, k_i.permute((1, 0)), nothing, use_acc=False, is_async=True)
                v_i = arrived(v_ring, i, N, BN, BE)
                output = warpgroup_mma(factor, v_i, acc, is_async=True)
                s = warpgroup_mma_wait(1, [scores])                      # one may still be under way
                done(k_ring, i + 1, N)
                m, l, p, shrink = softmax(s, m, l, at, start, window, SCALE, BN, j != 1)
                acc = warpgroup_mma_wait(0, [output])
                done(v_ring, i, N)
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
                i += 1
        done(q_ring, turn, 1)
        v_i = arrived(v_ring, i, N, BN, BE)
        acc = warpgroup_mma(gl.convert_layout(p.to(q_i.dtype), FACTOR), v_i, acc)
        done(v_ring, i, N)
        i += 1
        turn += 1
        l = gl.maximum(l, 1e-30)                                         # rows behind the end may see nothing
        acc = acc / gl.convert_layout(l, gl.SliceLayout(1, OUTPUT))[:, None]
        store(o, acc, b, first + I * ROWS, h, T, H, E)
        rows = first + I * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        gl.store(L + (b * H + h) * filled_up(T) + rows, m + gl.log2(l))


@gluon.jit
def filled_up(T):
    """Rows of L and delta: whole tiles."""
    return gl.cdiv(T, 2 * ROWS) * (2 * ROWS)


@gluon.jit
def store(x, x_i, b, first, h, T, H, WIDTH: gl.constexpr):
    """64 rows of a head into x: (b, t, h, WIDTH), in its dtype."""
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, x_i.type.layout))[:, None]
    d = gl.arange(0, x_i.shape[1], gl.SliceLayout(0, x_i.type.layout))[None, :]
    x += (b.to(gl.int64) * T + rows) * (H * WIDTH) + h * WIDTH + d
    gl.store(x, x_i.to(x.dtype.element_ty), mask=(rows < T) & (d < WIDTH))


@gluon.jit(do_not_specialize=LENGTHS)
def forward_kernel(q, k, v, o, L, T, S, H, G, window, tiles, SCALE: gl.constexpr, D: gl.constexpr, E: gl.constexpr,
                   BD: gl.constexpr, BE: gl.constexpr, BN: gl.constexpr, N: gl.constexpr):
    """Each program takes tiles until there are none. 240 registers for a thread of a group, 24 for the loader's."""
    rings = ring(q, 1, 2), ring(k, N, 2), ring(v, N, 2)
    fence_async_shared()
    gl.warp_specialize([(group, (rings, o, L, T, S, H, window, tiles, SCALE, D, E, BD, BE, BN, N, 0)),
                        (group, (rings, o, L, T, S, H, window, tiles, SCALE, D, E, BD, BE, BN, N, 1)),
                        (loader, (q, k, v, rings, T, S, H, G, window, tiles, BN, N))], [4, 1], [240, 24])


# ------------------------------------------------------------------------------------------------------------ backward


@gl._core.builtin
def add_to_memory(x, place, block, _semantic=None):
    """Add a block in shared memory to that at x[place]: the TMA unit's, which Gluon has no word for."""
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, x.handle, place, block.handle)


@gluon.jit
def targets_of(first, T, S, window, BM: gl.constexpr):
    """Where the targets begin that see any of a program's sources, from `first` on, and where they end."""
    return gl.maximum(0, first + T - S) // BM * BM, gl.minimum(T, first + 2 * ROWS - 1 + T - S + window)


@gluon.jit
def sources_of(S, G):
    """(b, head of keys, first source) of this program: those of the longest walk first."""
    blocks = gl.cdiv(S, 2 * ROWS)
    b_g = gl.program_id(0) // blocks
    return b_g // G, b_g % G, gl.program_id(0) % blocks * (2 * ROWS)


@gluon.jit
def backward_loader(q, k, v, do, rings, T, S, G, window, GROUP: gl.constexpr, BM: gl.constexpr, N: gl.constexpr):
    q_ring, k_ring, v_ring, do_ring = rings
    b, g, first = sources_of(S, G)
    fetch(k, b, first, g, k_ring, 0, 1)
    fetch(v, b, first, g, v_ring, 0, 1)
    begin, end = targets_of(first, T, S, window, BM)
    i = 0
    for head in range(GROUP):
        for start in range(begin, end, BM):
            fetch(q, b, start, g * GROUP + head, q_ring, i, N)
            fetch(do, b, start, g * GROUP + head, do_ring, i, N)
            i += 1
    fetch(q, b, begin, g * GROUP, q_ring, i, N)                  # one more than is used: scores are a block ahead


@gluon.jit
def backward_group(rings, exchange, sums, dq, dk, dv, T, S, G, window, GROUP: gl.constexpr, SCALE: gl.constexpr,
                   D: gl.constexpr, E: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, BM: gl.constexpr,
                   N: gl.constexpr, I: gl.constexpr):
    """Tiles are transposed: 64 sources down, BM targets across. dQ = dS K takes both groups' dS, so they exchange it in
    shared memory, and each computes half of the columns."""
    q_ring, k_ring, v_ring, do_ring = rings
    dS, dS_full, dS_free, dQ = exchange
    L, delta = sums
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BE, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD // 2, 16])
    b, g, first = sources_of(S, G)
    begin, end = targets_of(first, T, S, window, BM)
    nothing, no_dq = gl.zeros([ROWS, BM], gl.float32, SCORES), gl.zeros([BM, BD // 2], gl.float32, HALF)
    dk_i, dv_i = gl.zeros([ROWS, BD], gl.float32, KEYS), gl.zeros([ROWS, BE], gl.float32, VALUES)
    keys = arrived(k_ring, 0, 1, 2 * ROWS, BD)
    k_i, v_i = keys.slice(I * ROWS, ROWS), arrived(v_ring, 0, 1, 2 * ROWS, BE).slice(I * ROWS, ROWS)
    at = first + I * ROWS + T - S                                # its first source, counted in targets
    i = 0
    s = warpgroup_mma(k_i, arrived(q_ring, 0, N, BM, BD).permute((1, 0)), nothing, use_acc=False)
    for head in range(GROUP):
        h = g * GROUP + head
        row = (b * G * GROUP + h) * filled_up(T)
        for start in range(begin, end, BM):
            targets = start + gl.arange(0, BM, gl.SliceLayout(0, SCORES))
            L_i = gl.load(L + row + targets)
            q_i = q_ring[0].index(i % N).reshape([BM, BD])
            do_i = arrived(do_ring, i, N, BM, BE)
            dp_t = warpgroup_mma(v_i, do_i.permute((1, 0)), nothing, use_acc=False, is_async=True)
            p = gl.exp2(s * SCALE - L_i[None, :])
            if (start < at + ROWS - 1) | (start + BM - 1 >= at + window):
                sources = at + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
                back = targets[None, :] - sources[:, None]
                p = gl.where((back < 0) | (back >= window), 0.0, p)
            delta_i = gl.load(delta + row + targets)
            factor = gl.convert_layout(p.to(q_i.dtype), FACTOR)
            dp = warpgroup_mma_wait(0, [dp_t])
            mbarrier.wait(dS_free, (i & 1) ^ 1)
            dS.slice(I * ROWS, ROWS).store((p * (dp - delta_i[None, :])).to(q_i.dtype))
            fence_async_shared()
            mbarrier.arrive(dS_full, count=1)
            dv_t = warpgroup_mma(factor, do_i, dv_i, is_async=True)
            dk_t = warpgroup_mma(dS.slice(I * ROWS, ROWS), q_i, dk_i, is_async=True)
            q_next = arrived(q_ring, i + 1, N, BM, BD)
            scores = warpgroup_mma(k_i, q_next.permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(dS_full, i & 1)
            half = keys.slice(I * (BD // 2), BD // 2, 1)
            dq_t = warpgroup_mma(dS.permute((1, 0)), half, no_dq, use_acc=False, is_async=True)
            dv_i = warpgroup_mma_wait(3, [dv_t])
            done(do_ring, i, N)
            dk_i = warpgroup_mma_wait(2, [dk_t])
            done(q_ring, i, N)
            s, dq_i = warpgroup_mma_wait(0, [scores, dq_t])
            mbarrier.arrive(dS_free, count=1)
            tma.store_wait(0)                                    # until the last dQ has been read
            dQ.index(I).reshape([BM, BD // 2]).store(dq_i)
            fence_async_shared()
            add_to_memory(dq, [b, start, h, I * (BD // 2)], dQ.index(I))
            i += 1
    tma.store_wait(0)
    store(dk, dk_i * (SCALE * LN2), b, first + I * ROWS, g, S, G, D)
    store(dv, dv_i, b, first + I * ROWS, g, S, G, E)


@gluon.jit(do_not_specialize=LENGTHS)
def backward_kernel(q, k, v, do, L, delta, dq, dk, dv, T, S, G, window, GROUP: gl.constexpr, SCALE: gl.constexpr,
                    D: gl.constexpr, E: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, BM: gl.constexpr,
                    N: gl.constexpr):
    rings = ring(q, N, 2), ring(k, 1, 2), ring(v, 1, 2), ring(do, N, 2)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * ROWS, BM], q.dtype)
    dS = gl.allocate_shared_memory(q.dtype, [2 * ROWS, BM], LAYOUT)
    dS_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    dS_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    dQ = gl.allocate_shared_memory(gl.float32, [2] + dq.block_type.shape, dq.layout)
    mbarrier.init(dS_full, count=2)
    mbarrier.init(dS_free, count=2)
    fence_async_shared()
    exchange, sums = (dS, dS_full, dS_free, dQ), (L, delta)
    gl.warp_specialize([
        (backward_group, (rings, exchange, sums, dq, dk, dv, T, S, G, window, GROUP, SCALE, D, E, BD, BE, BM, N, 0)),
        (backward_group, (rings, exchange, sums, dq, dk, dv, T, S, G, window, GROUP, SCALE, D, E, BD, BE, BM, N, 1)),
        (backward_loader, (q, k, v, do, rings, T, S, G, window, GROUP, BM, N))], [4, 1], [240, 24])


# ------------------------------------------------------------------------------------------------------------ launches


def wide(d):
    """The width of a block that holds d numbers."""
    return max(32, next_power_of_2(d))


@functools.cache
def layout_of(block, dtype):
    return gl.NVMMASharedLayout.get_default_for(block, getattr(gl, str(dtype).split(".")[-1]))


def described(x, rows, columns=None):
    """A descriptor of x (b, t, h, d), for blocks of rows of a head."""
    x = x.clone() if x.data_ptr() % 16 else x                            # it must begin at a multiple of 16 bytes
    block = [1, rows, 1, columns or wide(x.shape[-1])]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout_of(tuple(block), x.dtype))


@torch.library.custom_op("kernels::flash_hopper_forward", mutates_args=("o", "L"))
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, L: torch.Tensor, window: int,
            scale: float) -> None:
    """q: (b, t, h, d), k: (b, s, g, d), v: (b, s, g, e), in one piece, of 16 bits. Writes o: (b, t, h, e) and L."""
    (b, t, h, d), (_, s, g, e) = q.shape, v.shape
    tiles = cdiv(t, 128) * b * h
    programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    run(forward_kernel, (programs,), described(q, 128), described(k, 128), described(v, 128), o, L, t, s, h, g, window,
        tiles, SCALE=scale, D=d, E=e, BD=wide(d), BE=wide(e), BN=128, N=2)


@torch.library.custom_op("kernels::flash_hopper_backward", mutates_args=("dq", "dk", "dv"))
def backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, L: torch.Tensor, delta: torch.Tensor,
             dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, window: int, scale: float) -> None:
    """Writes dk and dv; adds dS K to dq: (b, t, h, d), float32."""
    (b, t, h, d), (_, s, g, e) = q.shape, v.shape
    run(backward_kernel, (cdiv(s, 128) * b * g,), described(q, 64), described(k, 128), described(v, 128),
        described(do, 64), L, delta, described(dq, 64, wide(d) // 2), dk, dv, t, s, g, window, GROUP=h // g,
        SCALE=scale, D=d, E=e, BD=wide(d), BE=wide(e), BM=64, N=2)

"""Softmax attention on Hopper (H100, H200), its warps each with a job: flash_attention.py's mathematics in Gluon.

In Triton a program's warps all do the same: multiply, wait, take exponentials, wait. Here one warp only asks for blocks
of memory (TMA), and groups of four warps own 64 rows each: targets forward, sources backward. A group has two or more
products under way at a time: while its exponentials are taken, the tensor cores still multiply the block before with
its values, or work for another group. Who may go on is said by barriers in shared memory: a ring of N blocks has for
each of them `full`, on which those wait who read, and `free`, on which the one waits who writes.

    loader       k_0 v_0 k_1 v_1 k_2 v_2 ...
    a group      S_0 = Q k_0^T | S_1 = Q k_1^T, O += P_0 v_0 | S_2 = Q k_2^T, O += P_1 v_1 | ...
                               P_0                           P_1                          P_2          exponentials

Backward, five products where flash_attention.py does seven: two groups' dS meet in shared memory, and dQ is added up in
memory by the TMA unit, which adds where it would store. Such sums come in any order: where
torch.use_deterministic_algorithms asks for one, the seven products are taken.
"""
import functools
import math

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

from kernels.tiles import cdiv, next_power_of_2, properties, run

ROWS = gl.constexpr(64)                          # of a group: as many as one instruction multiplies
LN2 = gl.constexpr(0.6931471805599453)
LENGTHS = ["T", "S", "window", "tiles"]          # a kernel is compiled once for all of them


@gluon.jit
def memory(x, N: gl.constexpr):
    """Shared memory for N blocks of what the descriptor x describes."""
    return gl.allocate_shared_memory(x.dtype, [N] + x.block_type.shape, x.layout)


@gluon.jit
def barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N barriers, each of which lets go once so many have arrived."""
    b = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(b.index(i), count=COUNT)
    return b


@gluon.jit
def ring(x, N: gl.constexpr, READERS: gl.constexpr):
    return memory(x, N), barriers(N, 1), barriers(N, READERS)


@gluon.jit
def fetch(x, place, to, i, N: gl.constexpr):
    """Ask for the block of x at this place, the i-th of the ring's: as soon as there is room."""
    blocks, full, free = to
    mbarrier.wait(free.index(i % N), (i // N & 1) ^ 1)
    mbarrier.expect(full.index(i % N), x.block_type.nbytes)
    tma.async_copy_global_to_shared(x, place, full.index(i % N), blocks.index(i % N))


@gluon.jit
def arrived(of, i, N: gl.constexpr, LENGTH: gl.constexpr, WIDTH: gl.constexpr):
    """The i-th block, when it is there: (LENGTH, WIDTH)."""
    blocks, full, _ = of
    mbarrier.wait(full.index(i % N), i // N & 1)
    return blocks.index(i % N).reshape([LENGTH, WIDTH])


@gluon.jit
def done(of, i, N: gl.constexpr):
    mbarrier.arrive(of[2].index(i % N), count=1)


@gluon.jit
def filled_up(T):
    """Rows of L and delta."""
    return gl.cdiv(T, 128) * 128


@gluon.jit
def write(x, x_i, through, b, first, h):
    """64 rows of a head to x, (b, t, h, d), in its dtype, through shared memory: by the TMA unit, while the group goes
    on. What lies behind x's rows and columns is left out."""
    tma.store_wait(0)                                                    # until what was there has been read
    through.reshape(x_i.shape).store(x_i.to(x.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(x, [b, first, h, 0], through)


# ------------------------------------------------------------------------------------------------------------ schedule
#
# A program takes tiles until there are none: while one is written, the next one's blocks are fetched. Tiles of a head
# differ in length, and no program should get the longer ones again and again.


@gluon.jit
def nth(turn):
    """The number of a program's tile: rows of as many as there are programs, dealt to and fro."""
    programs, p = gl.num_programs(0), gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, p, programs - 1 - p)


@gluon.jit
def turns_of(tiles, HEADS: gl.constexpr):
    """How many tiles a program takes."""
    programs, p = gl.num_programs(0), gl.program_id(0)
    if HEADS > 0:
        rows = tiles // programs
        turns = rows + gl.where(nth(rows) < tiles, 1, 0)
    else:
        pairs = gl.cdiv(tiles, 2)
        last_has_one = (tiles % 2 == 1) & ((pairs - 1) % programs == p)
        turns = 2 * gl.cdiv(pairs - p, programs) - gl.where(last_has_one, 1, 0)
    return turns


@gluon.jit
def tile_of(turn, tiles, of_head, HEADS: gl.constexpr):
    """(head of all heads, place among its of_head tiles, the longest first) of a program's tile. So many HEADS at a
    time, all their longest tiles first. Or, HEADS = 0, one head after the other, which leaves more room in the cache,
    in pairs of a long and a short tile: the longest and the shortest, the next ones, ..."""
    if HEADS > 0:
        n = nth(turn)
        head, n = n // (HEADS * of_head) * HEADS, n % (HEADS * of_head)
        heads = gl.minimum(HEADS, tiles // of_head - head)
        head, i = head + n % heads, n // heads
    else:
        n = 2 * (gl.program_id(0) + turn // 2 * gl.num_programs(0)) + turn % 2
        head, i = n // of_head, n % of_head
        i = gl.where(i % 2 == 0, i // 2, of_head - 1 - i // 2)
    return head, i


# ------------------------------------------------------------------------------------------------------------- forward


@gluon.jit
def targets_of(turn, tiles, T, H, GROUPS: gl.constexpr, HEADS: gl.constexpr):
    """(b, head, first target) of a program's tile, 64 targets for each group."""
    of_head = gl.cdiv(T, GROUPS * ROWS)
    b_h, i = tile_of(turn, tiles, of_head, HEADS)
    return b_h // H, b_h % H, (of_head - 1 - i) * (GROUPS * ROWS)


@gluon.jit
def stretch(first, window, S, BN: gl.constexpr, GROUPS: gl.constexpr):
    """Where the sources begin that a tile's targets see, and where they end; the first target stands at `first`."""
    end = gl.minimum(S, first + GROUPS * ROWS)
    return gl.maximum(0, first - window + 1) // BN * BN, gl.cdiv(end, BN) * BN


@gluon.jit
def loader(q, k, v, rings, T, S, H, G, window, tiles, BN: gl.constexpr, N: gl.constexpr, QUERIES: gl.constexpr,
           HEADS: gl.constexpr, GROUPS: gl.constexpr):
    q_rings, k_ring, v_ring = rings
    i = 0
    for turn in range(turns_of(tiles, HEADS)):
        b, h, first = targets_of(turn, tiles, T, H, GROUPS, HEADS)
        for j in gl.static_range(GROUPS):
            fetch(q, [b, first + j * ROWS, h, 0], q_rings[j], turn, QUERIES)
        begin, end = stretch(first + S - T, window, S, BN, GROUPS)
        for start in range(end - BN, begin - 1, -BN):
            fetch(k, [b, start, h // (H // G), 0], k_ring, i, N)
            fetch(v, [b, start, h // (H // G), 0], v_ring, i, N)
            i += 1


@gluon.jit
def softmax(s, m, l, first, start, window, SCALE: gl.constexpr, BN: gl.constexpr):
    """The running maximum and sum with one block of scores more, its P, and what the output so far shrinks by.
    first: the position of the first target."""
    if (start + BN - 1 > first) | (start <= first + ROWS - 1 - window):
        targets = first + gl.arange(0, ROWS, gl.SliceLayout(1, s.type.layout))
        sources = start + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
        back = targets[:, None] - sources[None, :]
        s = gl.where((back < 0) | (back >= window), float("-inf"), s)
    new = gl.maximum(m, gl.max(s, axis=1) * SCALE)                       # finite, as m is from the start: no inf - inf
    p, shrink = gl.exp2(s * SCALE - new[:, None]), gl.exp2(m - new)
    return new, l * shrink + gl.sum(p, axis=1), p, shrink


@gluon.jit
def group(rings, out, o, L, T, S, H, window, tiles, SCALE: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr,
          BN: gl.constexpr, N: gl.constexpr, QUERIES: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr,
          I: gl.constexpr):
    q_rings, k_ring, v_ring = rings
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BE, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    nothing = gl.zeros([ROWS, BN], gl.float32, SCORES)
    i = 0
    for turn in range(turns_of(tiles, HEADS)):
        b, h, first = targets_of(turn, tiles, T, H, GROUPS, HEADS)
        first += I * ROWS
        begin, end = stretch(first - I * ROWS + S - T, window, S, BN, GROUPS)
        own_end = gl.cdiv(gl.minimum(S, first + ROWS + S - T), BN) * BN
        for _ in range(own_end, end, BN):                                # those that only other groups' targets see
            arrived(v_ring, i, N, BN, BE)
            done(k_ring, i, N)
            done(v_ring, i, N)
            i += 1
        m = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
        l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([ROWS, BE], gl.float32, OUTPUT)
        q_i, k_i = arrived(q_rings[I], turn, QUERIES, ROWS, BD), arrived(k_ring, i, N, BN, BD)
        s = warpgroup_mma(q_i, k_i.permute((1, 0)), nothing, use_acc=False)
        done(k_ring, i, N)
        m, l, p, shrink = softmax(s, m, l, first + S - T, own_end - BN, window, SCALE, BN)
        for start in range(own_end - 2 * BN, begin - 1, -BN):
            factor = gl.convert_layout(p.to(q_i.dtype), FACTOR)
            k_i = arrived(k_ring, i + 1, N, BN, BD)
            scores = warpgroup_mma(q_i, k_i.permute((1, 0)), nothing, use_acc=False, is_async=True)
            v_i = arrived(v_ring, i, N, BN, BE)
            output = warpgroup_mma(factor, v_i, acc, is_async=True)
            s = warpgroup_mma_wait(1, [scores])                          # one may still be under way
            done(k_ring, i + 1, N)
            m, l, p, shrink = softmax(s, m, l, first + S - T, start, window, SCALE, BN)
            acc = warpgroup_mma_wait(0, [output])
            done(v_ring, i, N)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
            i += 1
        done(q_rings[I], turn, QUERIES)
        v_i = arrived(v_ring, i, N, BN, BE)
        acc = warpgroup_mma(gl.convert_layout(p.to(q_i.dtype), FACTOR), v_i, acc)
        done(v_ring, i, N)
        i += 1
        l = gl.maximum(l, 1e-30)                                         # rows behind the end may see nothing
        acc = acc / gl.convert_layout(l, gl.SliceLayout(1, OUTPUT))[:, None]
        write(o, acc, out.index(I), b, first, h)
        rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        gl.store(L + (b * H + h) * filled_up(T) + rows, m + gl.log2(l), mask=rows < filled_up(T))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=LENGTHS)
def forward_kernel(q, k, v, o, L, T, S, H, G, window, tiles, SCALE: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr,
                   BN: gl.constexpr, N: gl.constexpr, QUERIES: gl.constexpr, HEADS: gl.constexpr,
                   GROUPS: gl.constexpr):
    """A thread of a group has 240 or 160 registers, the loader's 24."""
    q_rings, out = (ring(q, QUERIES, 1), ring(q, QUERIES, 1), ring(q, QUERIES, 1)), memory(o, GROUPS)
    rings = q_rings, ring(k, N, GROUPS), ring(v, N, GROUPS)
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize([
            (group, (rings, out, o, L, T, S, H, window, tiles, SCALE, BD, BE, BN, N, QUERIES, HEADS, 2, 0)),
            (group, (rings, out, o, L, T, S, H, window, tiles, SCALE, BD, BE, BN, N, QUERIES, HEADS, 2, 1)),
            (loader, (q, k, v, rings, T, S, H, G, window, tiles, BN, N, QUERIES, HEADS, 2))], [4, 1], [240, 24])
    else:
        gl.warp_specialize([
            (group, (rings, out, o, L, T, S, H, window, tiles, SCALE, BD, BE, BN, N, QUERIES, HEADS, 3, 0)),
            (group, (rings, out, o, L, T, S, H, window, tiles, SCALE, BD, BE, BN, N, QUERIES, HEADS, 3, 1)),
            (group, (rings, out, o, L, T, S, H, window, tiles, SCALE, BD, BE, BN, N, QUERIES, HEADS, 3, 2)),
            (loader, (q, k, v, rings, T, S, H, G, window, tiles, BN, N, QUERIES, HEADS, 3))], [4, 4, 1], [160, 160, 24])


# ------------------------------------------------------------------------------------------------------------ backward


@gl._core.builtin
def add_to_memory(x, place, block, _semantic=None):
    """Add a block in shared memory to that of x at this place: the TMA unit's, which Gluon has no word for."""
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, x.handle, place, block.handle)


@gluon.jit
def sources_of(turn, tiles, T, S, G, window, BM: gl.constexpr, HEADS: gl.constexpr):
    """(b, head of keys, first source) of a program's tile of 128 sources; where the targets begin that see any of
    them, and how many blocks of BM they are."""
    b_g, i = tile_of(turn, tiles, gl.cdiv(S, 2 * ROWS), HEADS)
    first = i * (2 * ROWS)
    begin = gl.maximum(0, first + T - S) // BM * BM
    end = gl.minimum(T, first + 2 * ROWS - 1 + T - S + window)
    return b_g // G, b_g % G, first, begin, gl.maximum(0, gl.cdiv(end - begin, BM))


@gluon.jit
def step_of(i, g, begin, steps, GROUP: gl.constexpr, BM: gl.constexpr):
    """(first target, head) of a program's i-th block of targets; behind the last one, the last one again."""
    i, head = gl.maximum(0, gl.minimum(i, GROUP * steps - 1)), g * GROUP
    if GROUP > 1:
        head += i // gl.maximum(1, steps)
        i = i % gl.maximum(1, steps)
    return begin + i * BM, head


@gluon.jit
def backward_loader(q, k, v, do, L, delta, k_ring, v_ring, targets, T, S, G, window, tiles, GROUP: gl.constexpr,
                    BM: gl.constexpr, N: gl.constexpr, KEYS: gl.constexpr, HEADS: gl.constexpr, AHEAD: gl.constexpr):
    """A block of targets: q, do, and their L and delta, of (b h, t), which share their barriers."""
    q_s, do_s, L_s, delta_s, full, free = targets
    n = 0
    for turn in range(turns_of(tiles, HEADS)):
        b, g, first, begin, steps = sources_of(turn, tiles, T, S, G, window, BM, HEADS)
        fetch(k, [b, first, g, 0], k_ring, turn, KEYS)
        fetch(v, [b, first, g, 0], v_ring, turn, KEYS)
        for i in range(GROUP * steps + AHEAD):
            start, h = step_of(i, g, begin, steps, GROUP, BM)
            row, here = b * (G * GROUP) + h, full.index(n % N)
            mbarrier.wait(free.index(n % N), (n // N & 1) ^ 1)
            mbarrier.expect(here, q.block_type.nbytes + do.block_type.nbytes + 2 * L.block_type.nbytes)
            tma.async_copy_global_to_shared(q, [b, start, h, 0], here, q_s.index(n % N))
            tma.async_copy_global_to_shared(L, [row, start], here, L_s.index(n % N))
            tma.async_copy_global_to_shared(do, [b, start, h, 0], here, do_s.index(n % N))
            tma.async_copy_global_to_shared(delta, [row, start], here, delta_s.index(n % N))
            n += 1


@gluon.jit
def weights(s, L_i, start, first, window, SCALE: gl.constexpr, BM: gl.constexpr):
    """P^T: (64, BM) of the targets from `start` on, and the sources from `first` on, counted in targets."""
    p = gl.exp2(s * SCALE - L_i)
    if (start < first + ROWS - 1) | (start + BM - 1 >= first + window):
        targets = start + gl.arange(0, BM, gl.SliceLayout(0, s.type.layout))
        sources = first + gl.arange(0, ROWS, gl.SliceLayout(1, s.type.layout))
        back = targets[None, :] - sources[:, None]
        p = gl.where((back < 0) | (back >= window), 0.0, p)
    return p


@gluon.jit
def show(ds, exchange, i, I: gl.constexpr):
    """A group's dS to both. There is room for two: once the other has shown the next one, it has read the last."""
    dS, shown, _ = exchange
    dS.index(i % 2).slice(I * ROWS, ROWS).store(ds)
    fence_async_shared()
    mbarrier.arrive(shown, count=1)


@gluon.jit
def add(dq, dq_i, through, b, start, h, I: gl.constexpr):
    """A group's half of dQ's columns to those in memory."""
    tma.store_wait(0)                                                    # until the last one has been read
    through.reshape(dq_i.shape).store(dq_i)
    fence_async_shared()
    add_to_memory(dq, [b, start, h, I * dq_i.shape[1]], through)


@gluon.jit
def backward_group(k_ring, v_ring, blocks, exchange, dq, dk, dv, T, S, G, window, tiles, GROUP: gl.constexpr,
                   SCALE: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, BM: gl.constexpr, N: gl.constexpr,
                   KEYS: gl.constexpr, HEADS: gl.constexpr, AHEAD: gl.constexpr, I: gl.constexpr):
    """Tiles are transposed: 64 sources down, BM targets across. dQ = dS K takes both groups' dS, so they show it to
    each other, and each computes half of the columns. AHEAD: the scores of the next block are computed, and their
    exponentials taken, while dQ is; there must be registers for both, and behind a tile's last block is one more."""
    q_s, do_s, L_s, delta_s, full, free = blocks
    dS, shown, sums = exchange
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    OF_KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    OF_VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BE, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD // 2, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, OF_VALUES, 2)
    nothing, no_dq = gl.zeros([ROWS, BM], gl.float32, SCORES), gl.zeros([BM, BD // 2], gl.float32, HALF)
    n = 0                                                                # blocks of targets so far
    for turn in range(turns_of(tiles, HEADS)):
        b, g, first, begin, steps = sources_of(turn, tiles, T, S, G, window, BM, HEADS)
        first += I * ROWS
        dk_i, dv_i = gl.zeros([ROWS, BD], gl.float32, OF_KEYS), gl.zeros([ROWS, BE], gl.float32, OF_VALUES)
        keys = arrived(k_ring, turn, KEYS, 2 * ROWS, BD)
        k_i, half = keys.slice(I * ROWS, ROWS), keys.slice(I * (BD // 2), BD // 2, 1)
        v_i = arrived(v_ring, turn, KEYS, 2 * ROWS, BE).slice(I * ROWS, ROWS)
        if AHEAD:
            start, h = step_of(0, g, begin, steps, GROUP, BM)
            mbarrier.wait(full.index(n % N), n // N & 1)
            s = warpgroup_mma(k_i, q_s.index(n % N).reshape([BM, BD]).permute((1, 0)), nothing, use_acc=False)
            dp = warpgroup_mma(v_i, do_s.index(n % N).reshape([BM, BE]).permute((1, 0)), nothing, use_acc=False)
            p = weights(s, L_s.index(n % N).load(SCORES), start, first + T - S, window, SCALE, BM)
            for i in range(1, GROUP * steps + 1):
                q_i, do_i, m = q_s.index(n % N).reshape([BM, BD]), do_s.index(n % N).reshape([BM, BE]), n - turn
                show((p * (dp - delta_s.index(n % N).load(SCORES))).to(q_i.dtype), exchange, m, I)
                dv_t = warpgroup_mma(gl.convert_layout(p.to(q_i.dtype), FACTOR), do_i, dv_i, is_async=True)
                dk_t = warpgroup_mma(dS.index(m % 2).slice(I * ROWS, ROWS), q_i, dk_i, is_async=True)
                n += 1
                mbarrier.wait(full.index(n % N), n // N & 1)
                q_j, do_j = q_s.index(n % N).reshape([BM, BD]), do_s.index(n % N).reshape([BM, BE])
                scores = warpgroup_mma(k_i, q_j.permute((1, 0)), nothing, use_acc=False, is_async=True)
                mbarrier.wait(shown, m & 1)
                dq_t = warpgroup_mma(dS.index(m % 2).permute((1, 0)), half, no_dq, use_acc=False, is_async=True)
                dp_t = warpgroup_mma(v_i, do_j.permute((1, 0)), nothing, use_acc=False, is_async=True)
                dv_i, dk_i, s = warpgroup_mma_wait(2, [dv_t, dk_t, scores])
                mbarrier.arrive(free.index((n - 1) % N), count=1)
                row, head = start, h
                start, h = step_of(i, g, begin, steps, GROUP, BM)
                p = weights(s, L_s.index(n % N).load(SCORES), start, first + T - S, window, SCALE, BM)
                dq_i = warpgroup_mma_wait(1, [dq_t])
                add(dq, dq_i, sums.index(I), b, row, head, I)
                dp = warpgroup_mma_wait(0, [dp_t])
            mbarrier.arrive(free.index(n % N), count=1)
            n += 1
        else:
            for i in range(GROUP * steps):
                j = n + i
                start, h = step_of(i, g, begin, steps, GROUP, BM)
                mbarrier.wait(full.index(j % N), j // N & 1)
                q_i, do_i = q_s.index(j % N).reshape([BM, BD]), do_s.index(j % N).reshape([BM, BE])
                scores = warpgroup_mma(k_i, q_i.permute((1, 0)), nothing, use_acc=False, is_async=True)
                dp_t = warpgroup_mma(v_i, do_i.permute((1, 0)), nothing, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(1, [scores])
                p = weights(s, L_s.index(j % N).load(SCORES), start, first + T - S, window, SCALE, BM)
                dv_t = warpgroup_mma(gl.convert_layout(p.to(q_i.dtype), FACTOR), do_i, dv_i, is_async=True)
                dp = warpgroup_mma_wait(1, [dp_t])
                show((p * (dp - delta_s.index(j % N).load(SCORES))).to(q_i.dtype), exchange, j, I)
                mbarrier.wait(shown, j & 1)
                dq_t = warpgroup_mma(dS.index(j % 2).permute((1, 0)), half, no_dq, use_acc=False, is_async=True)
                dk_t = warpgroup_mma(dS.index(j % 2).slice(I * ROWS, ROWS), q_i, dk_i, is_async=True)
                dv_i, dq_i = warpgroup_mma_wait(1, [dv_t, dq_t])
                add(dq, dq_i, sums.index(I), b, start, h, I)
                dk_i = warpgroup_mma_wait(0, [dk_t])
                mbarrier.arrive(free.index(j % N), count=1)
            n += GROUP * steps
        done(k_ring, turn, KEYS)
        done(v_ring, turn, KEYS)
        out = sums.index(I)                                              # as many bytes as 64 rows of dk or dv
        write(dv, dv_i, out._reinterpret(dv.dtype, dv.block_type.shape, dv.layout), b, first, g)
        write(dk, dk_i * (SCALE * LN2), out._reinterpret(dk.dtype, dk.block_type.shape, dk.layout), b, first, g)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=LENGTHS)
def backward_kernel(q, k, v, do, L, delta, dq, dk, dv, T, S, G, window, tiles, GROUP: gl.constexpr,
                    SCALE: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, BM: gl.constexpr, N: gl.constexpr,
                    KEYS: gl.constexpr, HEADS: gl.constexpr, AHEAD: gl.constexpr):
    k_r, v_r = ring(k, KEYS, 2), ring(v, KEYS, 2)
    blocks = memory(q, N), memory(do, N), memory(L, N), memory(delta, N), barriers(N, 1), barriers(N, 2)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * ROWS, BM], q.dtype)
    dS = gl.allocate_shared_memory(q.dtype, [2, 2 * ROWS, BM], LAYOUT)
    exchange = dS, barriers(1, 2).index(0), memory(dq, 2)
    fence_async_shared()
    gl.warp_specialize([
        (backward_group, (k_r, v_r, blocks, exchange, dq, dk, dv, T, S, G, window, tiles, GROUP, SCALE, BD, BE, BM, N,
                          KEYS, HEADS, AHEAD, 0)),
        (backward_group, (k_r, v_r, blocks, exchange, dq, dk, dv, T, S, G, window, tiles, GROUP, SCALE, BD, BE, BM, N,
                          KEYS, HEADS, AHEAD, 1)),
        (backward_loader, (q, k, v, do, L, delta, k_r, v_r, blocks, T, S, G, window, tiles, GROUP, BM, N, KEYS, HEADS,
                           AHEAD))], [4, 1], [240, 24])


# ------------------------------------------------------------------------------------------------------------ launches


def wide(d):
    """The width of a block that holds d numbers."""
    return max(32, next_power_of_2(d))


@functools.cache
def layout_of(block, dtype):
    return gl.NVMMASharedLayout.get_default_for(block, getattr(gl, str(dtype).split(".")[-1]))


def described(x, rows, columns=None):
    """A descriptor of x (b, t, h, d), for blocks of rows of a head, filled up with zeros."""
    x = x.clone() if x.data_ptr() % 16 else x                            # it must begin at a multiple of 16 bytes
    block = [1, rows, 1, columns or wide(x.shape[-1])]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout_of(tuple(block), x.dtype))


def described_row(x, rows):
    """A descriptor of x (b, h, t), for blocks of one head."""
    x = x.view(-1, x.shape[-1])
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows], layout)


@torch.compiler.assume_constant_result
def multiprocessors(device):
    return properties(device).multi_processor_count if device.type == "cuda" else 132


def sizes(q, v, scale, backward=False):
    """What was fastest. Heads of 128 leave no registers for a third group, nor, backward, for two blocks of scores. A
    quarter of the multiprocessors is a good number of HEADS: rows are whole then for 4 tiles a head, 8, 16, ..."""
    t, d, e = q.shape[1], q.shape[-1], v.shape[-1]
    narrow, heads, width = max(d, e) <= 64, multiprocessors(q.device) // 4, wide(max(d, e))
    if backward:                                                         # dQ's blocks serve dK and dV in the end
        return {"SCALE": scale, "BD": width, "BE": width, "BM": 64, "N": 3 if narrow else 2,
                "KEYS": 2 if narrow else 1, "HEADS": heads if t <= 8192 else 1, "AHEAD": narrow}
    short = narrow and t <= 2048
    return {"SCALE": scale, "BD": wide(d), "BE": wide(e), "BN": 128, "N": 4 if narrow else 2,
            "QUERIES": 2 if narrow else 1, "HEADS": heads if short else 0, "GROUPS": 3 if narrow and not short else 2}


@torch.library.custom_op("kernels::flash_hopper_forward", mutates_args=("o", "L"))
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, L: torch.Tensor, window: int,
            scale: float) -> None:
    """q: (b, t, h, d), k: (b, s, g, d), v: (b, s, g, e), in one piece, of 16 bits. Writes o: (b, t, h, e) and L."""
    (b, t, h, _), (_, s, g, _), own = q.shape, k.shape, sizes(q, v, scale)
    of_head, programs = cdiv(t, 64 * own["GROUPS"]), multiprocessors(q.device)
    if of_head % 2 and math.gcd(of_head, programs) > 1:  # then pairs lie across heads, are not all alike, and the same
        programs -= 1                                    # programs would get the longer ones again and again
    tiles = of_head * b * h
    run(forward_kernel, (min(programs, tiles if own["HEADS"] else cdiv(tiles, 2)),), described(q, 64),
        described(k, 128), described(v, 128), described(o, 64), L, t, s, h, g, window, tiles, **own)


@torch.library.custom_op("kernels::flash_hopper_backward", mutates_args=("dq", "dk", "dv"))
def backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, L: torch.Tensor, delta: torch.Tensor,
             dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, window: int, scale: float) -> None:
    """Writes dk and dv; adds dS K to dq: (b, t, h, d), float32."""
    (b, t, h, _), (_, s, g, _), own = q.shape, k.shape, sizes(q, v, scale, backward=True)
    width, tiles = own["BD"], cdiv(s, 128) * b * g
    programs = multiprocessors(q.device) if own["HEADS"] > 1 else tiles
    q, k, v, do, dk, dv = (described(x, rows, width) for x, rows in ((q, 64), (k, 128), (v, 128), (do, 64), (dk, 64),
                                                                     (dv, 64)))
    run(backward_kernel, (min(programs, tiles),), q, k, v, do, described_row(L, 64), described_row(delta, 64),
        described(dq, 64, width // 2), dk, dv, t, s, g, window, tiles, GROUP=h // g, **own)

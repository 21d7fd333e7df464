"""Every kernel against its twin, the twin against the lesson; on a CPU in Triton's interpreter, on a GPU
compiled."""
import importlib
import pkgutil
import runpy
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from harness import D_MODEL, MIXERS, check_close, inputs, make, run

import kernels
from kernels import __main__ as all_tables
from kernels import (
    delta_rule,
    fft_conv,
    flash_attention,
    gla,
    linear_attention,
    scan,
    selective_scan,
    step,
    tables,
    taylor_attention,
    tiles,
)
from kernels.tiles import cdiv, in_one_piece

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LENGTHS = (1, 17, 64, 100, 1000) if GPU else (1, 64, 100)
LONG = 70 if GPU else 40                         # of a mixer's test: more than one chunk
WITH_KERNEL = [name for name in MIXERS if "triton" in MIXERS[name].forms]
LIKE_S4D = "lssl s4 dss s4d_inv s4d_legs lru ema sgconv liquid_s4 gss modal qrnn sru".split()     # the same two calls
attention, linear, ssm, based = map(importlib.import_module, ("01_attention", "02_linear_attention", "03_ssm",
                                                              "04_based"))


def random(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def values_and_gradients(f, tensors, dtype, device):
    """Outputs of f, and the gradients of a fixed function of them for all tensors."""
    tensors = [x if x is None else x.to(device, dtype).requires_grad_() for x in tensors]
    outputs = f(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    directions = random(*(o.shape for o in outputs), seed=9)
    loss = sum((o.double() * d.to(o.device)).sum() for o, d in zip(outputs, directions, strict=True))
    gradients = torch.autograd.grad(loss, [x for x in tensors if x is not None])
    return [x.detach().double().cpu() for x in (*outputs, *gradients)]


DTYPES = (torch.float32, torch.bfloat16) if GPU else (torch.float32,)


def check_kernel(kernel, twin, tensors, tolerance=2e-5, in_16_bits=0.03, dtypes=DTYPES):
    """The kernel in float32 (on a GPU also in bfloat16) against its twin in float64: outputs and every gradient."""
    for dtype in dtypes:
        if dtype == torch.bfloat16:
            tensors = [x if x is None else x.to(dtype).double() for x in tensors]
        results = values_and_gradients(kernel, tensors, dtype, DEVICE)
        twins = values_and_gradients(twin, tensors, torch.float64, DEVICE)
        for i, (a, b) in enumerate(zip(results, twins, strict=True)):
            gap = ((a - b).norm() / b.norm().clamp(min=0.1 * b.numel() ** 0.5)).item()         # some are 0
            assert gap <= (tolerance if dtype == torch.float32 else in_16_bits), f"result {i} in {dtype}: {gap:.1e} off"


def in_segments(monkeypatch, module, place):
    """Make the kernel cut short sequences into segments of 128 tokens, as it cuts long ones on a GPU. place: of the
    shape (t, h, segment, ...) among the settings; the grid comes behind it."""
    settings = module.settings

    def cut(*args):
        results = list(settings(*args))
        (t, h, _, *more), (programs, _) = results[place:place + 2]
        results[place:place + 2] = (t, h, 128, *more), (programs, -(-t // 128))
        return results
    monkeypatch.setattr(module, "settings", cut)


def with_the_memory_of_an_rtx_card(monkeypatch):
    for module in (tiles, fft_conv, flash_attention):
        monkeypatch.setattr(module, "shared_memory", lambda device: 101376)
    monkeypatch.setattr(flash_attention, "on_hopper", lambda *_: False)


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 33])
def test_flash_attention(t, window):
    q, k, v = random((1, 2, t, 16), (1, 2, t, 16), (1, 2, t, 24))
    twin = flash_attention.reference(q, k, v, window)
    check_close(twin, attention.parallel_attention(q, k, v, window), 1e-12, "the twin and the lesson")
    check_kernel(lambda *x: flash_attention.flash_attention(*x, window),
                 lambda *x: flash_attention.reference(*x, window), (q, k, v))


@pytest.mark.parametrize("t, s, h, g, d, e, window", [(130, 130, 2, 1, 16, 24, None), (30, 130, 2, 2, 16, 16, 40),
                                                      (65, 65, 1, 1, 13, 5, None)])
@pytest.mark.parametrize("copies", [False, True])
def test_flash_attention_reads_blocks_with_and_without_descriptors(monkeypatch, copies, t, s, h, g, d, e, window):
    """Also heads of a width that a descriptor does not take, and a tensor that begins in the middle of another."""
    if copies and GPU and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no unit that copies blocks")
    monkeypatch.setattr(flash_attention, "copies_blocks", lambda *_: copies)
    monkeypatch.setattr(flash_attention, "on_hopper", lambda *_: False)

    def inside_another(x):
        y = torch.cat((x.new_zeros(3), x.transpose(1, 2).flatten()))[3:].view(x.shape[0], x.shape[2], x.shape[1], -1)
        return y.transpose(1, 2)
    check_kernel(lambda q, k, v: flash_attention.flash_attention(q, inside_another(k), inside_another(v), window),
                 lambda *x: flash_attention.reference(*x, window), random((2, h, t, d), (2, g, s, d), (2, g, s, e)))


@pytest.mark.skipif(flash_attention.capability(torch.device(DEVICE)) != 9, reason="flash_hopper.py is for Hopper")
@pytest.mark.parametrize("t, s, h, g, d, e, window", [(130, 130, 2, 2, 64, 64, None), (70, 200, 4, 2, 64, 64, None),
                                                      (1100, 1100, 2, 1, 128, 128, 300), (65, 65, 2, 2, 24, 40, None),
                                                      (200, 200, 1, 1, 128, 64, None), (1, 1, 1, 1, 64, 64, None),
                                                      (40, 900, 2, 1, 64, 64, 257), (2200, 2200, 1, 1, 64, 64, None),
                                                      (300, 300, 100, 50, 64, 64, None)])
def test_flash_attention_by_warps_with_roles(monkeypatch, t, s, h, g, d, e, window):
    """Lengths that fit no tile, shared heads, a cache, sources that no target sees, three groups, more tiles than
    programs."""
    monkeypatch.setattr(flash_attention, "on_hopper", lambda *_: True)
    tensors = random((2, h, t, d), (2, g, s, d), (2, g, s, e))
    check_kernel(lambda *x: flash_attention.flash_attention(*x, window),
                 lambda *x: flash_attention.reference(*x, window), tensors, in_16_bits=0.008, dtypes=[torch.bfloat16])


@pytest.mark.parametrize("heads", [0, 1, 4, 33])
@pytest.mark.parametrize("tiles, of_head", [(16 * 256, 16), (3 * 50, 3), (1, 1), (7 * 19, 7), (131, 131)])
def test_each_tile_of_flash_hopper_is_taken_once(monkeypatch, heads, tiles, of_head):
    """And where programs go from tile to tile, none does much more than the others."""
    from kernels import flash_hopper as fh
    here = [0, 0]
    monkeypatch.setattr(fh, "gl", SimpleNamespace(
        num_programs=lambda _: here[1], program_id=lambda _: here[0], cdiv=cdiv, minimum=min,
        where=lambda condition, a, b: a if condition else b))
    monkeypatch.setattr(fh, "nth", fh.nth.fn)
    for programs in {min(132, tiles if heads else cdiv(tiles, 2)), min(114, tiles), tiles}:
        taken, work = [], []
        for here[:] in ([p, programs] for p in range(programs)):
            own = [fh.tile_of.fn(turn, tiles, of_head, heads) for turn in range(fh.turns_of.fn(tiles, heads))]
            taken += own
            work.append(sum(of_head - i for _, i in own))
        assert sorted(taken) == [(head, i) for head in range(tiles // of_head) for i in range(of_head)]
        if heads in (0, 33) and programs == 132 and of_head == 16:
            assert max(work) < (1.01 if heads else 1.04) * sum(work) / programs


@pytest.mark.parametrize("t, h, d, forward, backward", [
    (2048, 16, 64, (132, 256, 33, 2), (132, 136, 33)), (2049, 16, 64, (88, 176, 0, 3), (132, 144, 33)),
    (4096, 1, 64, (11, 22, 0, 3), (33, 33, 33)), (4800, 16, 64, (132, 400, 0, 3), (132, 312, 33)),
    (6336, 16, 64, (131, 528, 0, 3), (132, 408, 33)), (300, 2, 64, (6, 6, 33, 2), (4, 4, 33)),
    (8192, 4, 128, (128, 256, 0, 2), (130, 130, 33)), (8200, 6, 128, (132, 390, 0, 2), (198, 198, 1))])
def test_programs_of_flash_hopper(monkeypatch, t, h, d, forward, backward):
    """How many, for how many tiles, of how many heads at a time, in how many groups; two heads share keys and values,
    which are of 128 tokens more. No program more than a device with 132 multiprocessors holds, nor than there are
    tiles, or pairs of them where heads come one after the other. One less where the pairs of an odd number of tiles
    would meet the same programs again and again. Backward, over long texts, each tile has its own."""
    from kernels import flash_hopper as fh
    launched = []

    def note(kernel, grid, *args, **sizes):                                                  # tiles: the last of args
        launched.append((*grid, args[-1], *(sizes[name] for name in ("HEADS", "GROUPS") if name in sizes)))
    monkeypatch.setattr(fh, "run", note)
    monkeypatch.setattr(fh, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(fh, "described", lambda x, *_: x)
    monkeypatch.setattr(fh, "described_row", lambda x, *_: x)
    q, k, L = torch.zeros(1, t, h, d), torch.zeros(1, t + 128, max(1, h // 2), d), torch.zeros(1, h, 8)
    fh.forward(q, k, k.clone(), q.clone(), L, t, 0.1)
    fh.backward(q, k, k.clone(), q.clone(), L, L.clone(), q.float(), k.clone(), k.clone(), t, 0.1)
    assert launched == [forward, backward]


def test_what_flash_hopper_does(monkeypatch):
    def done(major, dtype=torch.bfloat16, d=64, window=None):
        monkeypatch.setattr(flash_attention, "capability", lambda device: major)
        return flash_attention.on_hopper(torch.zeros(1, 8, 1, d, dtype=dtype), torch.zeros(1, 8, 1, 64), window)
    assert done(9) and done(9, d=128) and done(9, torch.float16, window=4096)
    assert not any((done(8), done(10), done(9, torch.float32), done(9, d=136), done(9, window=1024)))


@pytest.mark.parametrize("major, window, copies", [(9, None, True), (9, 257, True), (9, 256, False), (10, None, True),
                                                   (8, None, False), (8, 1000, False)])
def test_where_blocks_are_copied_by_a_unit_of_the_device(monkeypatch, major, window, copies):
    monkeypatch.setattr(flash_attention, "capability", lambda _: major)
    assert flash_attention.copies_blocks(None, window) == copies


@pytest.mark.skipif(not GPU, reason="programs of the interpreter run one after the other")
def test_the_gradients_of_attention_are_the_same_each_time_where_pytorch_is_told_to(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    q, k, v, do = (x.to(DEVICE, torch.bfloat16).requires_grad_() for x in random(*[(2, 4, 1000, 64)] * 4))
    first, second = (torch.autograd.grad(flash_attention.flash_attention(q, k, v), (q, k, v), do) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_attentions_backward_begins_with_zeros_where_nothing_is_known():
    do, o = (x.float().to(DEVICE) for x in random((2, 150, 3, 24), (2, 150, 3, 24)))
    delta, sums = (torch.full(shape, torch.nan, device=DEVICE) for shape in ((2, 3, 256), (2, 150, 3, 40)))
    tiles.run(flash_attention.rowsum_kernel, (2 * 2 * 3,), do, o, delta, sums, 150, 3, D=40, BD=64, E=24, BE=32)
    check_close(delta[..., :150], (do * o).sum(dim=-1).mT, 1e-5, "delta")
    assert (delta[..., 150:] == 0).all() and (sums == 0).all()


@pytest.mark.parametrize("t, s, h, g, window", [(70, 70, 4, 2, None), (30, 130, 2, 1, None), (65, 200, 4, 1, 50),
                                                (1, 90, 2, 2, 7)])
def test_flash_attention_with_a_cache_and_shared_heads(t, s, h, g, window):
    tensors = random((2, h, t, 16), (2, g, s, 16), (2, g, s, 16))
    twin = flash_attention.reference(*tensors, window)
    check_close(twin, attention.parallel_attention(*tensors, window), 1e-12, "the twin and the lesson")
    check_kernel(lambda *x: flash_attention.flash_attention(*x, window),
                 lambda *x: flash_attention.reference(*x, window), tensors)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 34, 63, 64, 65, 66, 127, 128, 129, 130])
@pytest.mark.parametrize("s", [130, 160])
def test_windows_about_as_wide_as_blocks(monkeypatch, window, s):
    """Blocks of 32 and 64, also where a target stands elsewhere in its block than its source."""
    blocks = (64, 32, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1)
    monkeypatch.setattr(flash_attention, "blocks_of", lambda *_: blocks)
    monkeypatch.setattr(flash_attention, "on_hopper", lambda *_: False)
    check_kernel(lambda *x: flash_attention.flash_attention(*x, window),
                 lambda *x: attention.parallel_attention(*x, window), random((1, 1, 130, 8), *[(1, 1, s, 8)] * 2))


@pytest.mark.parametrize("d, e, blocks", [(256, 16, (16, 16)), (128, 16, (32, 32)), (16, 72, (32, 32)),
                                          (16, 64, (64, 32))])
def test_flash_attention_on_a_device_with_less_memory(monkeypatch, d, e, blocks):
    with_the_memory_of_an_rtx_card(monkeypatch)
    q, k, v = random((1, 1, 70, d), (1, 1, 70, d), (1, 1, 70, e))
    assert flash_attention.blocks_of(q.float(), v, None)[0][:2] == blocks
    check_kernel(flash_attention.flash_attention, attention.parallel_attention, (q, k, v))


@pytest.mark.skipif(GPU, reason="sizes of no launch: to be compiled, which takes a minute, they need no GPU")
@pytest.mark.parametrize("blocks", [(128, 64), (64, 128), (32, 64)])
def test_flash_attention_in_blocks_of_other_sizes(monkeypatch, blocks):
    monkeypatch.setattr(flash_attention, "blocks_of", lambda *_: ((*blocks, 4, 1),) * 3)
    monkeypatch.setattr(flash_attention, "on_hopper", lambda *_: False)
    for window in (None, 90):
        check_kernel(lambda *x: flash_attention.flash_attention(*x, window),                      # noqa: B023
                     lambda *x: flash_attention.reference(*x, window), random(*[(1, 1, 260, 16)] * 3))    # noqa: B023


def test_flash_attention_names_what_does_not_fit():
    q, k, v = (x.float() for x in random((1, 3, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16)))
    with pytest.raises(ValueError, match="g must divide h"):
        flash_attention.flash_attention(q, k, v)
    with pytest.raises(ValueError, match="s be t or more"):
        flash_attention.flash_attention(k, k[:, :, :5], v[:, :, :5])
    with pytest.raises(ValueError, match="up to 256"):
        flash_attention.flash_attention(*(torch.zeros(1, 1, 4, 300) for _ in range(3)))


# ----------------------------------------------------------------------------------------------------- linear attention


STRONG, WEAK = 1.0, 0.01                         # gates: after a chunk nothing is left, or a half to a third


def gate(kind, b, h, t, d, seed=5, strength=STRONG):
    shape = {"none": None, "constant": (1, h, 1, 1), "scalar": (b, h, t, 1), "vector": (b, h, t, d)}[kind]
    return None if shape is None else -strength * random(shape, seed=seed)[0].abs()


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("kind, strength", [("none", STRONG), *[(kind, strength) for strength in (STRONG, WEAK)
                                                                for kind in ("constant", "scalar", "vector")]])
def test_linear_attention(t, kind, strength):
    b = 2 if t < 100 else 1
    q, k, v, S = random((b, 2, t, 16), (b, 2, t, 16), (b, 2, t, 24), (b, 2, 16, 24))
    g = gate(kind, b, 2, t, 16, strength=strength)
    wide = None if g is None else g.expand(b, 2, t, -1)
    kernel, twin = (gla.gla, gla.reference) if kind == "vector" else (linear_attention.linear_attention,
                                                                       linear_attention.reference)
    for a, b in zip(twin(q, k, v, wide, S), linear.recurrent(q, k, v, g, S), strict=True):
        check_close(a, b, 1e-11, "the twin and the lesson")
    check_kernel(kernel, twin, (q, k, v, wide, S if t != 64 else None), 1e-4, 0.1)     # for g's gradient


@pytest.mark.skipif(not GPU, reason="errors of 16 bits are those of a GPU")
@pytest.mark.parametrize("t", [1000, 8192])
def test_the_gradient_of_a_decay_does_not_drift(t):
    """In bfloat16, over a long text, and its sum, which is what a decay's own parameter gets (Mamba-2's A)."""
    q, k, v = (x.bfloat16().double() for x in random((1, 2, t, 64), (1, 2, t, 64), (1, 2, t, 64)))
    g = -0.1 * random((1, 2, t, 1), seed=1)[0].abs().float().double()

    def dg_of(f, *numbers):
        def output(q, k, v, g):
            return f(*(x.to(dtype) for x, dtype in zip((q, k, v, g), numbers, strict=False)))[0]
        return values_and_gradients(output, (q, k, v, g), torch.float64, DEVICE)[-1]
    half, exact = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32), (torch.float64,) * 4
    mine, twins, exact = (dg_of(f, *numbers) for f, numbers in (
        (linear_attention.linear_attention, half), (linear_attention.reference, half),
        (linear_attention.reference, exact)))
    for f, allowed in ((lambda dg: dg, 0.01), (lambda dg: dg.sum(dim=2), 0.05)):
        a, b = ((f(dg) - f(exact)).norm() / f(exact).norm() for dg in (mine, twins))
        assert a <= allowed + 3 * b, f"{a:.1e} off, the twin {b:.1e}"


@pytest.mark.parametrize("kind", ["none", "scalar"])
@pytest.mark.parametrize("segments", [1, 2])
def test_linear_attention_with_shared_queries_and_keys(monkeypatch, kind, segments):
    """As Mamba-2 has them: of one head, for all heads of the values."""
    t = 260 if segments == 2 else 70
    if segments == 2:
        in_segments(monkeypatch, linear_attention, 2)
    tensors = [*random((1, 1, t, 16), (1, 1, t, 16), (1, 2, t, 24)), gate(kind, 1, 2, t, 16, strength=WEAK),
               *random((1, 2, 16, 24), seed=1)]

    def expanded(q, k, *rest):
        return linear_attention.reference(q.expand(1, 2, t, 16), k.expand(1, 2, t, 16), *rest)
    check_kernel(linear_attention.linear_attention, expanded, tensors, 1e-4)


@pytest.mark.parametrize("segments, t, e", [(1, 70, 24), (2, 260, 24), (1, 30, 300)])
def test_linear_attention_with_a_factor_of_what_is_written(monkeypatch, segments, t, e):
    """Mamba-2's dt: beta is to the kernel what a factor of v is to the lesson."""
    if segments == 2:
        in_segments(monkeypatch, linear_attention, 2)
    q, k, v, S = random((1, 1, t, 16), (1, 1, t, 16), (1, 2, t, e), (1, 2, 16, e))
    g, beta = gate("scalar", 1, 2, t, 16, strength=WEAK), random((1, 2, t, 1), seed=3)[0].sigmoid()
    for a, b in zip(linear_attention.reference(q.expand(1, 2, t, 16), k.expand(1, 2, t, 16), v, g, S, beta),
                    linear.recurrent(q, k, beta * v, g, S), strict=True):
        check_close(a, b, 1e-11, "the twin and the lesson")

    def expanded(q, k, *rest):
        return linear_attention.reference(q.expand(1, 2, t, 16), k.expand(1, 2, t, 16), *rest)
    check_kernel(linear_attention.linear_attention, expanded, (q, k, v, g, S, beta), 1e-4, 0.1)      # for g's gradient


@pytest.mark.parametrize("kind, t", [("scalar", 9), ("vector", 9), ("scalar", 1), ("vector", 1)])
def test_the_lessons_kernel_takes_a_factor_with_every_decay(kind, t):
    """Many tokens and a single one, for which there are kernels that know no factor: it is then in the values."""
    q, k, v, S = (x.float() for x in random((1, 2, t, 16), (1, 2, t, 16), (1, 2, t, 16), (1, 2, 16, 16)))
    g, beta = gate(kind, 1, 2, t, 16, strength=WEAK).float(), random((1, 2, t, 1), seed=3)[0].sigmoid().float()
    with torch.no_grad():
        for a, b in zip(linear.triton(*(x.to(DEVICE) for x in (q, k, v, g, S, beta))),
                        linear.recurrent(q, k, beta * v, g, S), strict=True):
            check_close(a.cpu(), b, 1e-4, "a factor")


def test_a_factor_of_what_is_written_costs_no_digits():
    """The gradient of Mamba-2's dt in 16 bits is nearer than with the factor in the values, which are rounded once more
    then. And what is rounded here is rounded alike in dk and dq, from whose difference a decay's gradient comes."""
    q, k, v = (x.half().double() for x in random((1, 1, 520, 16), (1, 1, 520, 16), (1, 2, 520, 16)))
    dt = torch.nn.functional.softplus(random((1, 2, 520, 1), seed=2)[0] - 3)

    def gradient(f, *numbers):
        def output(q, k, v, dt):
            q, k, v, dt = (x.to(dtype) for x, dtype in zip((q, k, v, dt), numbers, strict=True))
            return f(q, k, v, dt, -dt)[0]
        return values_and_gradients(output, (q, k, v, dt), torch.float64, DEVICE)[-1]

    def in_the_values(f):
        return lambda q, k, v, dt, g: f(q, k, v * dt.to(v.dtype), g)
    half = (torch.float16, torch.float16, torch.float16, torch.float32)
    exact = gradient(in_the_values(linear.parallel), *[torch.float64] * 4)
    mine = gradient(lambda q, k, v, dt, g: linear_attention.linear_attention(q, k, v, g, beta=dt), *half)
    other = gradient(in_the_values(linear_attention.linear_attention), *half)
    a, b = ((x - exact).norm() / exact.norm() for x in (mine, other))
    assert a <= 0.85 * b, f"{a:.1e} off, with the factor in the values {b:.1e}"


def test_a_factor_of_nothing_has_its_gradient():
    q, k, v = (x.float().to(DEVICE) for x in random((1, 2, 20, 16), (1, 2, 20, 16), (1, 2, 20, 16)))
    beta = (torch.arange(20) % 3 > 0).float()[:, None].expand(1, 2, 20, 1).to(DEVICE).requires_grad_()
    found, exact = (torch.autograd.grad(o.sin().sum(), beta)[0] for o in (
        linear_attention.linear_attention(q, k, v, beta=beta)[0], linear.parallel(q, k, beta * v)[0]))
    check_close(found, exact, 1e-4, "the gradient of beta")


def test_mamba_2_as_its_own_package_calls_it():
    x, dt, B, C = (z.float().to(DEVICE) for z in random((1, 70, 2, 16), (1, 70, 2), (1, 70, 1, 16), (1, 70, 1, 16)))
    dt, A = dt.abs(), torch.tensor([-0.5, -1.0], device=DEVICE)
    wanted, _ = linear.recurrent(*(z.transpose(1, 2) for z in (C, B, x * dt[..., None])), (dt * A).mT[..., None])
    check_close(linear_attention.mamba_2(x, dt, A, B, C), wanted.transpose(1, 2), 1e-4, "Mamba-2")


@pytest.mark.parametrize("kind, strength", [("none", STRONG), ("scalar", STRONG), ("vector", STRONG), ("scalar", WEAK),
                                            ("vector", WEAK)])
def test_linear_attention_over_many_chunks(monkeypatch, kind, strength):
    """In segments of two where the kernel has them; what the first one leaves reaches the third where gates are
    weak."""
    module, kernel = (gla, gla.gla) if kind == "vector" else (linear_attention, linear_attention.linear_attention)
    if kind != "vector":
        in_segments(monkeypatch, linear_attention, 2)
    tensors = [*random(*[(1, 2, 260, 16)] * 3), gate(kind, 1, 2, 260, 16, strength=strength),
               *random((1, 2, 16, 16), seed=1)]
    check_kernel(kernel, module.reference, tensors, 1e-4)


@pytest.mark.parametrize("kind, d, e", [("none", 300, 16), ("scalar", 16, 300), ("vector", 140, 16),
                                        ("vector", 16, 140), ("scalar", 5, 3), ("none", 64, 32), ("none", 64, 128),
                                        ("scalar", 32, 64), ("scalar", 128, 64)])
def test_linear_attention_of_any_width(kind, d, e):
    module, kernel = (gla, gla.gla) if kind == "vector" else (linear_attention, linear_attention.linear_attention)
    q, k, v, S = random((1, 1, 20, d), (1, 1, 20, d), (1, 1, 20, e), (1, 1, d, e))
    tensors = q, k, v, gate(kind, 1, 1, 20, d), S
    check_kernel(kernel, module.reference, tensors, 1e-4)


@pytest.mark.parametrize("kernel", [linear_attention.linear_attention, gla.gla])
def test_what_is_too_long_to_count_is_refused(kernel):
    x = torch.zeros(1, 1, 1, 1).expand(1, 4, 2 ** 28, 16)
    with pytest.raises(ValueError, match="count to 2.31"):
        kernel(x, x, x, None if kernel is linear_attention.linear_attention else x)


def test_nothing_is_copied_where_heads_lie_as_a_lesson_makes_them():
    x = torch.randn(2, 5, 64).unflatten(-1, (4, 16)).transpose(1, 2)
    assert in_one_piece(x).data_ptr() == x.data_ptr() == in_one_piece(x, 16).data_ptr()
    assert in_one_piece(x[..., :9], 16).shape == (2, 5, 4, 16)


class Launches:
    """In a kernel's place: notes how often it is looked for, and what the compiled one is given."""
    params = [SimpleNamespace(name=name, default=7) for name in ("x", "y", "n", "BLOCK", "MORE")]

    def __init__(self):
        self.found, self.given = 0, []

    def __getitem__(self, grid):
        def look_for(*args, **sizes):
            self.found += 1
            return self.compiled(grid)
        return look_for

    def compiled(self, grid):
        class Compiled:
            def __getitem__(_, grid):                                                        # noqa: N805
                return lambda *args: self.given.append((grid, args))
        return Compiled()


def test_a_compiled_kernel_is_found_again(monkeypatch):
    """By all that it depends on: dtypes, what is None, addresses not divisible by 16, numbers, sizes, the device."""
    monkeypatch.setattr(triton, "JITFunction", Launches)
    device = [0]
    monkeypatch.setattr(tiles, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: device[0])))
    kernel, x = Launches(), torch.zeros(64)
    assert x.data_ptr() % 16 == 0
    different = [(x, x, 1, 16), (x, None, 1, 16), (x, x.half(), 1, 16), (x[1:], x, 1, 16), (x, x, 2, 16), (x, x, 1, 32)]
    for i, (*args, size) in enumerate(different):
        for _ in range(3):
            tiles.run(kernel, (4,), *args, BLOCK=size)
            assert kernel.found == i + 1
        grid, given = kernel.given[-1]
        assert grid[:3] == (4, 1, 1) and len(kernel.given) == 2 * (i + 1)
        assert all(a is b for a, b in zip(given, (*args, size, 7), strict=True))
    device[0] = 1
    tiles.run(kernel, (4,), x, x, 1, BLOCK=16)
    assert kernel.found == len(different) + 1


@pytest.mark.skipif(not GPU, reason="needs a GPU: 70,000 programs are too many to interpret")
def test_more_heads_than_a_grids_second_axis_can_have():
    q, k, v = (x.float() for x in random(*[(17500, 4, 3, 16)] * 3))
    exact = {"linear": linear.parallel(q, k, v)[0], "flash": attention.parallel_attention(q, k, v)}
    for name, kernel in (("linear", lambda *x: linear_attention.linear_attention(*x)[0]),
                         ("flash", flash_attention.flash_attention)):
        check_close(kernel(q.cuda(), k.cuda(), v.cuda()).cpu(), exact[name], 1e-4, name)
    state = torch.zeros(17500, 4, 16, 16).cuda()
    o, _ = step.linear_step(*(x[:, :, 0].cuda() for x in (q, k, v)), None, state)
    check_close(o.cpu(), exact["linear"][:, :, 0], 1e-4, "a step")


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_strong_forgetting_does_not_overflow(kind):
    """A gate that forgets all at some tokens and nothing at others, for which e^G and e^-G would not be numbers."""
    q, k, v = random((1, 1, 100, 16), (1, 1, 100, 16), (1, 1, 100, 16))
    g = gate(kind, 1, 1, 100, 16)
    g[:, :, ::7] *= 1e3
    g[:, :, 3::7] = 0
    kernel, twin = (gla.gla, gla.reference) if kind == "vector" else (linear_attention.linear_attention,
                                                                       linear_attention.reference)
    check_close(twin(q, k, v, g)[0], linear.recurrent(q, k, v, g)[0], 1e-11, "the twin and the lesson")
    check_kernel(kernel, twin, (q, k, v, g), 1e-3)


@pytest.mark.skipif(GPU, reason="it is the interpreter that is watched")
def test_no_exponent_of_gla_is_above_0(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    largest = []

    def watched(exponential):
        def watch(builder, x):
            largest.append(x.data.max())
            return exponential(builder, x)
        return watch
    for name in ("create_exp", "create_exp2"):
        monkeypatch.setattr(InterpreterBuilder, name, watched(getattr(InterpreterBuilder, name)))
    q, k, v, S = (x.float().requires_grad_() for x in random(*[(1, 1, 70, 16)] * 3, (1, 1, 16, 16)))
    g = gate("vector", 1, 1, 70, 16).float()
    g[:, :, ::7] *= 1e3
    o, S = gla.gla(q, k, v, g.requires_grad_(), S)
    (o.sum() + S.sum()).backward()
    assert len(largest) > 20 and max(largest) == 0


def test_the_gradient_of_glas_gate_does_not_get_worse_with_the_text():
    """In 16 bits it is as good as the twin's, although a gate's gradient sums up all that comes after it."""
    t, dtype = (4096, torch.bfloat16) if GPU else (420, torch.float16)
    q, k, v = random(*[(1, 1, t, 16)] * 3)
    tensors = [x.to(dtype).double() for x in (q / 4, k, v)]
    tensors.append(gate("vector", 1, 1, t, 16, strength=1 / 16).float().double())
    exact = values_and_gradients(gla.reference, tensors, torch.float64, DEVICE)[-1]

    def in_16_bits(f):
        return lambda q, k, v, g: f(*(x.to(dtype) for x in (q, k, v)), g)
    kernel, twin = (values_and_gradients(in_16_bits(f), tensors, torch.float32, DEVICE)[-1]
                    for f in (gla.gla, gla.reference))
    assert (kernel - exact).norm() < 2 * (twin - exact).norm() < 0.02 * exact.norm()


# -------------------------------------------------------------------------------------------------------------- based


def taylor_state(b, h, d, e):
    k, v = random((b, h, 9, d), (b, h, 9, e), seed=3)
    return based.Taylor().write(torch.zeros((), dtype=torch.float64), k, v)


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("d, e", [(16, 16 if GPU else 64), (8, 16), (5, 33)])
def test_taylor_attention(t, d, e):
    """(In float32 a kernel for 64 values takes a GPU's compiler a minute: there they are done in 16 bits, below.)"""
    q, k, v = random((1, 2, t, d), (1, 2, t, d), (1, 2, t, e))
    S = taylor_state(1, 2, d, e)
    check_close(taylor_attention.features(q), based.taylor(q), 1e-12, "features, and their order")
    o, after = taylor_attention.reference(q, k, v, S)
    check_close(o, based.chunked(based.Taylor(), q, k, v, S)[0], 1e-11, "the twin and the lesson")
    check_close(after, based.Taylor().write(S, k, v), 1e-11, "the state")
    check_kernel(taylor_attention.taylor_attention, taylor_attention.reference, (q, k, v, S if t != 64 else None))


@pytest.mark.parametrize("e", [7, 33])
def test_the_first_taylor_attention(e):
    """That one reads first: it is not what the lessons run."""
    q, k, v = random(*[(2, 2, 128, 16)] * 2, (2, 2, 128, e))
    o = taylor_attention.first_taylor_attention(*(x.float().to(DEVICE) for x in (q, k, v))).double().cpu()
    gap = (o - taylor_attention.reference(q, k, v)[0]).norm() / o.norm()
    assert gap < (5e-3 if GPU else 1e-6), f"{gap:.1e}"


@pytest.mark.skipif(not GPU, reason="16 bits are a GPU's")
@pytest.mark.parametrize("t", [1, 64, 1000])
def test_taylor_attention_in_16_bits(t):
    """The first token's output is its value, whatever its query and key: their gradients are nothing but rounding."""
    check_kernel(taylor_attention.taylor_attention, taylor_attention.reference,
                 (*random((1, 2, t, 16), (1, 2, t, 16), (1, 2, t, 64)), None), in_16_bits=0.1 if t == 1 else 0.03,
                 dtypes=(torch.bfloat16,))


def test_taylor_attention_in_segments_and_parts(monkeypatch):
    in_segments(monkeypatch, taylor_attention, 2)
    for e in (16, 72):
        tensors = [*random((1, 2, 260, 8), (1, 2, 260, 8), (1, 2, 260, e)), taylor_state(1, 2, 8, e)]
        check_kernel(taylor_attention.taylor_attention, taylor_attention.reference, tensors)


@pytest.mark.parametrize("e", [24, 80])
def test_the_encoders_state(e):
    k, v = random((2, 2, 100, 16), (2, 2, 100, e))
    inside = (torch.arange(100) < torch.tensor([[40], [100]]))[:, None]

    def twin(k, v):
        return taylor_attention.features(k).mT @ (based.with_one(v) * inside[..., None].to(k.device))
    check_kernel(lambda k, v: taylor_attention.state_of(k, v, inside.to(k.device)), twin, (k, v))


def test_the_twin_takes_a_state_of_16_bits():
    """Which is done by the twin on a GPU with less memory."""
    tensors = *random((1, 2, 70, 20), (1, 2, 70, 20), (1, 2, 70, 80)), taylor_state(1, 2, 20, 80)
    tensors = [x.bfloat16() for x in tensors]
    exact = taylor_attention.reference(*(x.double() for x in tensors))
    for x, y in zip(taylor_attention.reference(*tensors), exact, strict=True):
        assert (x.double() - y).norm() < 0.03 * y.norm()


def test_taylor_attention_names_what_does_not_fit():
    with pytest.raises(ValueError, match="up to 24"):
        taylor_attention.taylor_attention(*(torch.zeros(1, 1, 4, 32) for _ in range(3)))


# --------------------------------------------------------------------------------------------------------------- scans


@pytest.mark.parametrize("t", (1, 17, 1000, 8192, 65536) if GPU else (1, 17, 100))
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("gates", [0, 5])
def test_scan(t, state, gates):
    """Gates of about a half; and, at 5, of about 1, so that hundreds of steps are seen."""
    a, b, h0 = random((2, 3, t), (2, 3, t), (2, 3))
    a, h0 = (a + gates).sigmoid(), h0 if state else None
    lesson = ssm.loop(*(x[..., None] for x in (a[..., :100], b[..., :100])), None if h0 is None else h0[..., None])
    check_close(scan.reference(a, b, h0)[0][..., :100], lesson[..., 0], 1e-12, "the twin and the lesson")
    check_kernel(scan.scan, scan.reference, (a, b, h0))


@pytest.mark.parametrize("t", (1, 17, 1000, 65536) if GPU else (1, 100))
def test_complex_scan(t):
    r, angle, b, bi, h, hi = random(*[(2, 3, t)] * 4, (2, 3), (2, 3))

    def parts(f):
        def g(r, angle, b, bi, h, hi):
            r, angle, b, bi, h, hi = (ssm.at_least_float32(x) for x in (r, angle, b, bi, h, hi))
            h, end = f(torch.polar(r, angle), torch.complex(b, bi), torch.complex(h, hi))
            return h.real, h.imag, end.real, end.imag
        return g
    tensors = r.sigmoid(), angle, b, bi, h, hi
    check_kernel(parts(scan.scan), parts(scan.reference), tensors, 1e-4 if t > 1000 else 2e-5)


def test_scan_in_tiles(monkeypatch):
    monkeypatch.setattr(scan, "tile", lambda *_: (32, 1))
    a, b, h0 = random((3, 100), (3, 100), (3,))
    for gates in (0, 5):
        check_kernel(scan.scan, scan.reference, ((a + gates).sigmoid(), b, h0))
    a, b, h0 = (torch.complex(x, x.flip(-1)) / 2 for x in (a, b, h0))
    results = scan.scan(*(x.to(DEVICE, torch.complex64) for x in (a, b, h0)))
    for x, y in zip(results, scan.reference(a, b, h0), strict=True):
        check_close(x.cpu().to(y.dtype), y, 1e-5, "complex")


def test_scan_names_what_does_not_fit():
    x = torch.zeros(2, 3)
    for a, b, h0 in ((x, x + 0j, None), (x, x, x[:, 0] + 0j)):
        with pytest.raises(ValueError, match="all must be real, or all complex"):
            scan.scan(a, b, h0)
    for b in (x[:, :0], x[0, 0]):
        with pytest.raises(ValueError, match="have a time step"):
            scan.scan(b, b)
    for dtype in (torch.float64, torch.int64, torch.complex128):
        with pytest.raises(ValueError, match=f"of {dtype}: the kernels take"):
            scan.scan(x.to(dtype), x.to(dtype))
    z = torch.randn(2, 3, dtype=torch.complex64)
    check_close(scan.scan(x.to(DEVICE) + 0.5, z.conj().imag.to(DEVICE))[0].cpu(),
                scan.reference(x + 0.5, z.conj().imag)[0], 1e-6, "a minus that is still to be done")


@pytest.mark.parametrize("t", (1, 17, 1000, 8192) if GPU else (1, 17, 100))
def test_gateloop(t):
    """The kernel's complex scan against the lesson's loop, from a state and to one, with every gradient."""
    size, turn, q, k, v, S, Si = random(*[(2, 3, t, 1)] * 5, *[(2, 3, 1, 1)] * 2)

    def parts(f):
        def called(size, turn, q, k, v, S, Si):
            size, turn, S, Si = (linear.at_least_float32(x) for x in (size, turn, S, Si))
            o, end = f(q, k, v, torch.complex(torch.nn.functional.logsigmoid(size), turn), state=torch.complex(S, Si))
            return o, end.real, end.imag
        return called
    check_kernel(parts(scan.gateloop), parts(partial(linear.real_part, linear.scanned)),
                 (size + 3, turn, q, k, v, S, Si), 1e-4)


def rwkv_inputs(t, b=2, c=3, size=3.0, fastest=1.0):
    k, v, w, u, p, q, m = random((b, c, t), (b, c, t), (c,), (c,), (b, c), (b, c), (b, c))
    return size * k, v, -fastest * w.exp(), u, p, q.exp(), m


def rwkv_kernel(k, v, w, u, p, q, m):
    o, state = scan.rwkv(k, v, w, u, torch.stack([p, q, m], dim=1))
    return o, *state.unbind(1)[:2]                               # m, the unit, has no gradient


def rwkv_twin(*tensors):
    return scan.rwkv_reference(*tensors)[:3]


def rwkv_result(f):
    """What does not depend on the unit."""
    def called(*tensors):
        o, p, q = f(*tensors)
        return o, p / q
    return called


@pytest.mark.parametrize("size, fastest", [(1.0, 0.01), (30.0, 1.0), (1.0, 1000.0)])
@pytest.mark.parametrize("t", (1, 17, 1000, 8192) if GPU else (1, 17, 100))
def test_rwkv(t, size, fastest):
    """With sums that outlive hundreds of tokens, keys of a size that e^k does not have, and sums that fade at once."""
    k, v, w, u, p, q, m = tensors = rwkv_inputs(t, size=size, fastest=fastest)
    state = torch.stack([p, q, m], dim=1)
    for x, y in zip((scan.rwkv_reference(*tensors)[0], torch.stack(scan.rwkv_reference(*tensors)[1:], dim=1)),
                    linear.rwkv_recurrent(k, v, w, u, state), strict=True):
        check_close(x, y, 1e-11, "the twin and the lesson")
    check_kernel(rwkv_kernel, rwkv_twin, tensors, 1e-4)


def test_rwkv_in_tiles(monkeypatch):
    monkeypatch.setattr(scan, "tile", lambda *_: (32, 1))
    for t in (31, 32, 33, 64, 100):
        check_kernel(rwkv_kernel, rwkv_twin, rwkv_inputs(t, fastest=0.1), 1e-4)


def test_rwkv_in_16_bits():
    """Which do not have float32's lowest number, the exponent of nothing."""
    for t in (1, 17):
        tensors = [x.half().double() if i < 2 else x.float().double() for i, x in enumerate(rwkv_inputs(t))]
        exact = values_and_gradients(rwkv_twin, tensors, torch.float64, DEVICE)
        found = values_and_gradients(lambda k, v, *more: rwkv_kernel(k.half(), v.half(), *more), tensors, torch.float32,
                                     DEVICE)
        for x, y in zip(found, exact, strict=True):
            check_close(x, y, 5e-3, f"t = {t}")


def test_rwkvs_gradients_are_the_lessons():
    """Also through a state that is carried on, whose unit tells autograd nothing; and from no state."""
    k, v, w, u, *_ = rwkv_inputs(40)

    def in_two(f, empty):
        def called(k, v, w, u):
            o, state = f(k[..., :23], v[..., :23], w, u, empty(k))
            return torch.cat([o, f(k[..., 23:], v[..., 23:], w, u, state)[0]], dim=-1)
        return called

    def nothing(k):
        return torch.stack([torch.zeros_like(k[..., 0])] * 2 + [torch.full_like(k[..., 0], -1e30)], dim=1)
    check_kernel(in_two(scan.rwkv, lambda k: None), in_two(linear.rwkv_recurrent, nothing), (k, v, w, u), 1e-4)


def test_rwkv_names_what_does_not_fit():
    k, v, w, u, *_ = (x.float() for x in rwkv_inputs(5))
    with pytest.raises(ValueError, match=r"should be \(b, c, t\) with a time step"):
        scan.rwkv(k, v[..., :4], w, u)
    with pytest.raises(ValueError, match="k of torch.float64"):
        scan.rwkv(k.double(), v, w, u)


def selective_inputs(t, b=2, c=6, n=5, steps=1.0):
    """Of steps dt of about 0.4 times `steps`, by which the n states decay at rates of 0.1 to 10."""
    u, dt, A, B, C, D, h0 = random((b, c, t), (b, c, t), (c, n), (b, n, t), (b, n, t), (c,), (b, c, n))
    return u, steps * torch.nn.functional.softplus(dt - 1), -A.exp(), B, C, D, h0


@pytest.mark.parametrize("t, steps", [(1, 1.0), (17, 0.01), (17, 30.0), (70, 0.01),
                                      *([(1000, 0.01), (1000, 30.0), (4096, 1.0)] if GPU else [])])
def test_selective_scan(t, steps):
    """With states that outlive hundreds of tokens, a few, and none."""
    u, dt, A, B, C, D, h0 = inputs = selective_inputs(t, 2 if t < 70 else 1, steps=steps)
    mixer = ssm.Mamba(3, n_state=5).double()
    mixer.log_A.data, mixer.D.data = (-A).log(), D
    lesson = mixer.mix("recurrent", u, ssm.Signals(u, dt, B, C), h0)
    for x, y in zip(selective_scan.reference(*inputs), lesson, strict=True):
        check_close(x, y, 1e-11, "the twin and the lesson")
    inputs = inputs if t != 17 else (*inputs[:6], None)
    check_kernel(selective_scan.selective_scan, selective_scan.reference, inputs, 1e-4)


@pytest.mark.parametrize("t, steps", [(65, 1.0), (96, 0.01), (97, 0.01)])
def test_selective_scan_in_segments(monkeypatch, t, steps):
    """Of 32 tokens each, with every 16th state kept; what the first one leaves reaches the last one where steps are
    small."""
    settings = selective_scan.settings

    def short(u, A, back):
        (blocks, _, b), (c, t, n, _, _), sizes = settings(u, A, back)
        return (blocks, -(-t // 32), b), (c, t, n, 32, -(-t // 32)), sizes
    monkeypatch.setattr(selective_scan, "settings", short)
    monkeypatch.setattr(selective_scan, "KEPT", 16)
    check_kernel(selective_scan.selective_scan, selective_scan.reference, selective_inputs(t, 1, 3, 3, steps), 1e-4)


@pytest.mark.parametrize("c, n", [(1, 1), (3, 2), (40, 16), (3, 70)])
def test_selective_scan_of_many_sizes(c, n):
    check_kernel(selective_scan.selective_scan, selective_scan.reference, selective_inputs(9, 1, c, n), 1e-4)


def test_selective_scan_without_gradients():
    """Nothing is kept for a backward pass, and the outputs are the same."""
    inputs = [x.to(DEVICE, torch.float32) for x in selective_inputs(20)]
    y, h = selective_scan.selective_scan(*(x.requires_grad_() for x in inputs))
    with torch.no_grad():
        for x, z in zip(selective_scan.selective_scan(*inputs), (y, h), strict=True):
            assert torch.equal(x, z)


def test_selective_scan_names_what_does_not_fit():
    u, dt, A, B, C, D, _ = selective_inputs(8)
    with pytest.raises(ValueError, match=r"B of shape \(2, 4, 8\) should be \(2, 5, 8\)"):
        selective_scan.selective_scan(*(x.float() for x in (u, dt, A, B[:, 1:], C, D)))
    with pytest.raises(ValueError, match="should be .b, c, t. and .c, n."):
        selective_scan.selective_scan(u[0], dt, A, B, C, D)
    with pytest.raises(ValueError, match="u of torch.float64: the kernels take"):
        selective_scan.selective_scan(u, dt, A, B, C, D)
    u, A, D = torch.zeros(1, 1, 1).expand(1, 2 ** 11, 2 ** 20), torch.zeros(2 ** 11, 1), torch.zeros(2 ** 11)
    with pytest.raises(ValueError, match="counts to .* 2.31 in one"):
        selective_scan.selective_scan(u, u, A, u[:, :1], u[:, :1], D)


# --------------------------------------------------------------------------------------------------- long convolutions


@pytest.mark.parametrize("t, taps, gates", [(1, 1, False), (17, 17, True), (100, 300, False), (1500, 1500, False),
                                            (2500, 700, True), (9000, 9000, True),
                                            *([(5000, 5000, True), (8192, 8192, True), (20000, 8000, False),
                                               (32768, 32768, True), (50000, 2000, True)] if GPU else [])])
def test_fft_conv(t, taps, gates):
    """With a filter whose last taps count, too."""
    b = 2 if GPU or t < 5000 else 1
    u, K, pre, post = random((b, 2, t), (2, taps), (b, 2, t), (b, 2, t))
    K = K * (torch.exp(-torch.arange(taps) / 50) + torch.exp(-torch.arange(taps) / taps))
    tensors = (u, K, pre, post) if gates else (u, K)
    v, one = (u * pre, post) if gates else (u, 1)
    exact = one * ssm.fft_conv(v, torch.nn.functional.pad(K, (0, max(0, t - taps)))[:, :t])
    check_close(fft_conv.reference(*tensors), exact, 1e-11, "the twin and the lesson")
    check_kernel(fft_conv.fft_conv, fft_conv.reference, tensors, 1e-5)
    if not GPU:                                                  # the interpreter multiplies float16, not bfloat16
        y = fft_conv.fft_conv(*(x.half() for x in tensors))
        check_close(y.double(), exact, 1e-2, "in float16")


@pytest.mark.parametrize("t, n1", [(256, 16), (512, 16), (1024, 32)])
def test_the_first_convolution(t, n1):
    """That one reads first: it is not what the lessons run."""
    u, K = random((2, 3, t), (3, t))
    y = fft_conv.first_fft_conv(u.float().to(DEVICE), K.float().to(DEVICE), n1)
    gap = (y.double().cpu() - fft_conv.reference(u, K)).norm() / y.double().norm().cpu()
    assert gap < (5e-3 if GPU else 1e-6), f"{gap:.1e}"


@pytest.mark.parametrize("programs, taps", [(1, 1300), (4, 500), (1, 500)])
def test_a_program_convolves_several_sequences(monkeypatch, programs, taps):
    """One after the other, as where there are many channels; in blocks, too."""
    monkeypatch.setattr(fft_conv.Plan, "programs", programs)
    u, K, pre = random((3, 2, 2048), (2, taps), (3, 2, 2048))
    check_kernel(fft_conv.fft_conv, fft_conv.reference, (u, K * torch.exp(-torch.arange(taps) / 50), pre), 1e-5)


@pytest.mark.skipif(not GPU, reason="needs a GPU: too long to interpret")
@pytest.mark.parametrize("t, taps", [(8192, 8192), (131072, 8192)])
def test_what_does_not_change_does_not_overflow(t, taps):
    """Constant sequences and filters: all that is added up has one sign."""
    tensors = torch.ones(1, 2, t), torch.ones(2, taps)
    exact = values_and_gradients(fft_conv.reference, tensors, torch.float64, DEVICE)
    for a, b in zip(values_and_gradients(fft_conv.fft_conv, tensors, torch.bfloat16, DEVICE), exact, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


def test_fft_conv_takes_numbers_of_any_size():
    """What is far above or below float16's range in between, and rows of zeros."""
    u, K = random((2, 3, 1500), (3, 1500))
    for scale_u, scale_K in ((1e30, 1e-20), (1e-30, 1e20), (1e5, 1e5)):
        exact = fft_conv.reference(u * scale_u, K * scale_K) / (scale_u * scale_K)
        dtype = torch.bfloat16 if GPU else torch.float32
        y = fft_conv.fft_conv((u * scale_u).to(DEVICE, dtype), (K * scale_K).float().to(DEVICE))
        check_close(y.double().cpu() / (scale_u * scale_K), exact, 2e-2 if GPU else 1e-5, f"{scale_u}, {scale_K}")
    assert (fft_conv.fft_conv(torch.zeros(1, 3, 1500, device=DEVICE), K.float().to(DEVICE)) == 0).all()


@pytest.mark.parametrize("size", [1.0, 1e-7, 1e-25])
@pytest.mark.parametrize("where", ["a sequence of zeros", "a block of zeros", "blocks of other sizes"])
def test_a_filters_gradient_keeps_its_digits(size, where):
    """In 16 bits, where parts of what it is a sum of are much larger than others, or nothing."""
    u, dy = random((2, 1, 2048), (2, 1, 2048))
    if where == "a sequence of zeros":
        dy[0] = 0
    elif where == "a block of zeros":
        dy[..., :1024] = 0
    else:
        u[..., :1024], dy[..., 1024:] = 1e4 * u[..., :1024], 1e4 * dy[..., 1024:]
    K = random((1, 1000), seed=1)[0] * torch.exp(-torch.arange(1000) / 100)
    u, dy, results = u.bfloat16(), (size * dy).bfloat16(), []
    for f, dtype in ((fft_conv.fft_conv, torch.bfloat16), (fft_conv.reference, torch.float64)):
        taps = K.to(DEVICE, torch.promote_types(dtype, torch.float32)).requires_grad_()
        results += torch.autograd.grad(f(u.to(DEVICE, dtype), taps), taps, dy.to(DEVICE, dtype))
    gap = (results[0].double() - results[1]).norm() / results[1].norm()
    assert gap < 5e-3, f"{where}: {gap:.1e}"


@pytest.mark.parametrize("u, dy", [(1e-40, 1.0), (1.0, 1e-39), (1e-20, 1e-20)])
def test_the_smallest_numbers_make_no_nan(u, dy):
    x, K, d = random((1, 2, 100), (2, 100), (1, 2, 100))
    leaves = [(x * u).float().to(DEVICE).requires_grad_(), K.float().to(DEVICE).requires_grad_()]
    y = fft_conv.fft_conv(*leaves)
    for result in (y, *torch.autograd.grad(y, leaves, (d * dy).float().to(DEVICE))):
        assert result.isfinite().all()


def test_what_a_test_makes_does_not_hinder_a_training():
    fft_conv.kept.cache_clear()
    u, K = torch.zeros(1, 1, 20), torch.zeros(1, 20)
    with torch.inference_mode():
        fft_conv.reference(u, K)
    fft_conv.reference(u.requires_grad_(), K).sum().backward()
    assert u.grad.shape == u.shape


@pytest.mark.parametrize("t, taps, transformed", [(1000, 1000, 1024), (1000, 3000, 1024), (5000, 900, 1024),
                                                  (3000, 3000, None), (3000, 5000, None)])
def test_fft_conv_on_a_device_with_less_memory(monkeypatch, recwarn, t, taps, transformed):
    """Long sequences in blocks, long filters by torch.fft."""
    with_the_memory_of_an_rtx_card(monkeypatch)
    monkeypatch.setattr(fft_conv, "by_torch_fft", None if transformed else fft_conv.by_torch_fft)
    u, K, pre = random((2, 1, t), (1, taps), (2, 1, t))
    K = K * torch.exp(-torch.arange(taps) * 3 / taps)
    assert fft_conv.length(u.float().to(DEVICE), min(t, taps)) == transformed
    check_kernel(fft_conv.fft_conv, fft_conv.reference, (u, K, pre), 1e-5, dtypes=[torch.float32])
    assert not recwarn


@pytest.mark.parametrize("memory, in_16_bits, in_float32", [(232448, 8192, 2048), (166912, 4096, 2048),
                                                            (101376, 2048, 1024), (16384, 0, 0)])
def test_how_long_a_filter_a_program_has_the_memory_for(monkeypatch, memory, in_16_bits, in_float32):
    """On an H100, an A100, an RTX card and one that there is not."""
    monkeypatch.setattr(fft_conv, "shared_memory", lambda _: memory)
    assert [fft_conv.longest(digits, None) for digits in ("16 bits", "float32")] == [in_16_bits, in_float32]


def test_filters_too_long_for_a_program_are_torch_ffts(monkeypatch):
    """Where a text is longer than the memory of an H100 allows, with and without gates."""
    def no_plan(*_):
        raise AssertionError("a kernel was to do it")
    monkeypatch.setattr(fft_conv, "Plan", no_plan)
    u, K, pre, post = random((1, 1, 8200), (1, 9000), *[(1, 1, 8200)] * 2)
    K = K * torch.exp(-torch.arange(9000) / 3000)
    for tensors in ((u, K), (u, K, pre, post)):
        check_kernel(fft_conv.fft_conv, fft_conv.reference, tensors, 1e-5)


def test_what_a_device_has_no_room_for_is_done_by_pytorch_and_said_once(monkeypatch):
    with_the_memory_of_an_rtx_card(monkeypatch)
    monkeypatch.setattr(tiles, "SAID", set())
    q, k, v = random((1, 2, 70, 20), (1, 2, 70, 20), (1, 2, 70, 80))
    inside = torch.ones(1, 2, 70, device=DEVICE)

    def both(k, v):
        return taylor_attention.state_of(k, v), taylor_attention.state_of(k, v, inside)
    for what, times, kernel, twin, tensors in (
            ("features of 17 to 24", 1 + GPU, taylor_attention.taylor_attention, taylor_attention.reference,
             (q, k, v, taylor_state(1, 2, 20, 80))),                                         # in 16 bits, too
            (None, 0, both, lambda k, v: (encoder(k, v),) * 2, (k, v))):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                check_kernel(kernel, twin, tensors, 1e-4)
        said = [str(w.message) for w in said if "shared memory" in str(w.message)]
        assert len(said) == times, said
        assert all(what in text and "of which this device has 101376; PyTorch" in text for text in said)


def test_fft_conv_names_what_does_not_fit():
    u, K = torch.zeros(1, 2, 40, dtype=torch.float16), torch.zeros(2, 40)
    with pytest.raises(ValueError, match=r"K of shape \(2, 40\) should be \(1, taps\)"):
        fft_conv.fft_conv(u[:, :1], K)
    with pytest.raises(ValueError, match="pre of torch.float64"):
        fft_conv.fft_conv(u, K, u.double())
    for pair in ((u[:, :, :0], K), (u[0], K), (u[:, :0], K[:0])):
        with pytest.raises(ValueError, match="should be .b, c, t., with at least one of each"):
            fft_conv.fft_conv(*pair)
    u = torch.zeros(1, 1, 4)
    for name, pair in (("u", (u.double(), u[0])), ("u", (u.long(), u[0])), ("K", (u, u[0] + 0j))):
        with pytest.raises(ValueError, match=f"{name} of torch.*: the kernels take"):
            fft_conv.fft_conv(*pair)


# --------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("d, e, gates", [(16, 16, None), (20, 33, 1), (32, 65, 32)])
def test_a_step_of_linear_attention(d, e, gates):
    q, k, v, S = random((2, 3, d), (2, 3, d), (2, 3, e), (2, 3, d, e))
    g = None if gates is None else -random((2, 3, gates))[0].abs()
    one = None if g is None else g[:, :, None]
    twin = step.reference(q, k, v, g, S)
    lesson = linear.recurrent(q[:, :, None], k[:, :, None], v[:, :, None], one, S)
    check_close(twin[0], lesson[0][:, :, 0], 1e-12, "the twin and the lesson")
    results = step.linear_step(*(x if x is None else x.float().to(DEVICE) for x in (q, k, v, g, S)))
    for a, b in zip(results, twin, strict=True):
        check_close(a.double().cpu(), b, 1e-5, "a step")


@pytest.mark.parametrize("h, g, d, e, n, parts", [(4, 2, 16, 24, 70, None), (2, 2, 16, 16, 300, 3),
                                                  (2, 1, 33, 16, 200, 7), (1, 1, 16, 16, 1, 1)])
def test_a_step_of_attention(h, g, d, e, n, parts):
    """Over a cache with slots that hold nothing, also whole parts of it."""
    q, k, v = random((2, h, d), (2, g, n, d), (2, g, n, e))
    real = torch.arange(n) % 3 != 1
    real = torch.stack([real, real & (torch.arange(n) < 70)])
    hidden = ~real[:, None, :, None]
    k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)
    twin = step.attention_reference(q, k.nan_to_num(), v.nan_to_num(), real)
    lesson = attention.parallel_attention(q[:, :, None], k.nan_to_num(), v.nan_to_num(), real=real)
    check_close(twin, lesson[:, :, 0], 1e-12, "the twin and the lesson")
    o = step.attention_step(*(x.float().to(DEVICE) for x in (q, k, v)), real.to(DEVICE), parts)
    check_close(o.double().cpu(), twin, 1e-5, "a step")


@pytest.mark.parametrize("f, e, n, window", [(16, 64, 0, 64), (16, 64, 10, 64), (8, 24, 5, 5), (8, 16, 7, 8),
                                             (5, 16, 1, 1), (8, 16, 2, 2), (8, 16, 7, 7), (8, 16, 8, 8), (8, 16, 9, 9)])
def test_a_step_of_based(f, e, n, window):
    q, k, v, q_w, k_w, past_k, past_v = random(*[(2, 2, f)] * 2, *[(2, 2, e)] * 3, *[(2, 2, n, e)] * 2)
    tensors = (q, k, v, taylor_state(2, 2, f, e), q_w, k_w, past_k, past_v)
    results = step.based_step(*(x.float().to(DEVICE) for x in tensors), window)
    for a, b in zip(results, step.based_reference(*tensors, window), strict=True):
        check_close(a.double().cpu(), b, 1e-5, "a step")


# ----------------------------------------------------------------------------------------------- gradients of gradients


def step_by_step(a, b, h):
    """A scan in plain PyTorch."""
    states = []
    for a_t, b_t in zip(a.unbind(-1), b.unbind(-1), strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, dim=-1), h


def gated_conv(u, K, pre, post):
    return post * ssm.fft_conv(pre * u, K)


def encoder(k, v):
    return based.taylor(k).mT @ based.with_one(v)


def twice_differentiated():
    """Of each autograd.Function in kernels/: a kernel that uses it, the same in plain PyTorch, and tensors."""
    q, k, v, S = random(*[(1, 2, 7, 4)] * 3, (1, 2, 4, 4))
    g, g_d = -random((1, 2, 7, 1), seed=5)[0].abs(), -random((1, 2, 7, 4), seed=6)[0].abs()
    u, K, pre, post, h0 = random(*[(2, 3, 9)], (3, 9), *[(2, 3, 9)] * 2, (2, 3))
    beta = random((1, 2, 7, 1), seed=7)[0].sigmoid()
    return {
        "FlashAttention": (lambda *x: flash_attention.flash_attention(*x, 3),
                           lambda *x: attention.parallel_attention(*x, 3), (q, k[:, :1], v[:, :1])),
        "LinearAttention": (linear_attention.linear_attention, lambda q, k, v, g, S, beta: linear.parallel(
            q, k, beta * v, g, S), (q, k, v, g, S, beta)),
        "GLA": (gla.gla, linear.parallel, (q, k, v, g_d, S)),
        "TaylorAttention": (taylor_attention.taylor_attention,
                            lambda q, k, v, S: (based.chunked(based.Taylor(), q, k, v, S)[0], S + encoder(k, v)),
                            (q, k, v, taylor_state(1, 2, 4, 4))),
        "StateOf": (taylor_attention.state_of, encoder, (k, v)),
        "DeltaRule": (delta_rule.delta_rule, linear.delta_parallel, (q, k, v, g, beta, S)),
        "Scan": (scan.scan, step_by_step, (u.sigmoid(), pre, h0)),
        "RWKV": (rwkv_result(rwkv_kernel), rwkv_result(rwkv_twin), rwkv_inputs(6, 1, 2, 1.0)),
        "SelectiveScan": (selective_scan.selective_scan, selective_scan.reference, selective_inputs(7, n=3)),
        "FFTConv": (fft_conv.fft_conv, gated_conv, (u, K, pre, post))}


def functions_of_the_kernels():
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"kernels.{name}") for name in names if name != "cross_entropy"]  # test_train.py
    return [x.__name__ for module in modules for x in vars(module).values() if isinstance(x, type) and
            issubclass(x, torch.autograd.Function) and x.__module__ == module.__name__]


def with_gradients(f, n):
    """The function whose values are the gradients of f's outputs for its n tensors, as training with a penalty on
    gradients takes them; its last arguments are the gradients of the outputs. Where it can be, a tensor is made from
    the one before it."""
    def gradients(*tensors):
        made = list(tensors[:n])
        for i in range(1, n):
            if made[i].shape == made[i - 1].shape:
                made[i] = made[i] + made[i - 1] / 4
        outputs = f(*made)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, made, [x.to(o.dtype) for o, x in zip(outputs, tensors[n:], strict=True)],
                                   create_graph=True)
    return gradients


@pytest.mark.parametrize("name", functions_of_the_kernels())
def test_a_gradient_of_a_gradient(name):
    """Against plain PyTorch in float64, whose gradients of gradients are checked by finite differences."""
    kernel, plain, tensors = twice_differentiated()[name]
    outputs = plain(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    n, tensors = len(tensors), (*tensors, *random(*(o.shape for o in outputs), seed=7))
    leaves = [x.clone().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(with_gradients(plain, n), leaves, fast_mode=True)
    check_kernel(with_gradients(kernel, n), with_gradients(plain, n), tensors, 2e-5, 0.05)


@pytest.mark.parametrize("name", functions_of_the_kernels())
def test_a_gradient_that_is_not_differentiated_again_is_the_kernels(monkeypatch, name):
    """Values with and without create_graph agree; without it, nothing of the plain form is run or kept."""
    kernel, _, tensors = twice_differentiated()[name]
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in tensors]
    outputs = kernel(*leaves)
    loss = sum(o.sin().sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    for module in (tiles, fft_conv, flash_attention, gla, linear_attention, scan, taylor_attention):
        monkeypatch.setattr(module, "differentiable_gradients", None, raising=False)
    for x, y in zip(torch.autograd.grad(loss, leaves), again, strict=True):
        assert not x.requires_grad
        check_close(x, y.detach(), 1e-4, name)


# ------------------------------------------------------------------------------------------------------------- mixers


@pytest.mark.parametrize("name", [name for name in WITH_KERNEL if name not in LIKE_S4D])
def test_the_kernels_form_is_the_others(name):
    """In values and all gradients; and what prefill and steps give on a GPU."""
    small = {"n_state": 2, "expand": 1} if name == "mamba" and not GPU else {}    # scans are slow in the interpreter
    mixer = make(name, torch.float32, **small).to(DEVICE)
    x, extras = inputs(mixer, LONG, b=1, dtype=torch.float32)
    x, extras = x.to(DEVICE), {key: value.to(DEVICE) for key, value in extras.items()}
    results = [run(mixer, form, x, extras) for form in ("triton", mixer.forms[0])]
    assert results[0].keys() == results[1].keys()
    for what, exact in results[1].items():
        kernels = torch.zeros_like(exact) if results[0][what] is None else results[0][what]          # not used
        check_close(kernels, exact, 5e-4, f"{name}: {what}")
    if GPU and mixer.causal:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            y, state = mixer.prefill(x[:, :LONG - 10])
            for i in range(LONG - 10, LONG):
                y_t, state = mixer.step(x[:, i], state)
                check_close(y_t, mixer(x, mixer.forms[0])[:, i], 3e-2, f"{name}: step to {i}")


@pytest.mark.parametrize("name, options", [
    ("attention", {}), ("window", {"window": 9}), ("linear_attention", {}), ("mamba2", {}), ("gla", {}), ("rwkv6", {}),
    ("based", {"window": 9}), ("based", {"window": 10 ** 9}), ("based", {"window": None}), ("jrt", {}),
    ("mamba", {"n_state": 2}), ("rglru", {}), ("s5", {}), ("h3", {}), ("hyena", {}), ("deltanet", {"beta_max": 2.0}),
    ("gated_deltanet", {}), ("kda", {})])
def test_generation_where_the_kernels_are_the_default(monkeypatch, name, options):
    """What a GPU does in bfloat16, prefill and steps by kernels, done wherever the tests run, in float32."""
    torch.manual_seed(0)
    mixer, x = MIXERS[name](D_MODEL, **options).to(DEVICE), torch.randn(1, 15, D_MODEL, device=DEVICE)
    y = mixer(x, mixer.forms[0])
    module = importlib.import_module(type(mixer).__module__)
    monkeypatch.setattr(module, "pick_form", lambda mixer, x, form=None: form or "triton")
    with torch.no_grad():
        first, state = mixer.prefill(x[:, :7])
        second, state = mixer.prefill(x[:, 7:12], state)
        check_close(torch.cat([first, second], dim=1), y[:, :12], 1e-4, f"{name}: prefill, in two blocks")
        for i in range(12, 15):
            y_t, state = mixer.step(x[:, i], state)
            check_close(y_t, y[:, i], 1e-4, f"{name}: step to {i}")


@pytest.mark.parametrize("name", ["hyena", "lssl", "ema", "bigs"])
def test_filters_are_made_without_autocast(name):
    """As in the other forms; sines of large numbers do not survive 16 bits."""
    mixer, x = make(name, torch.float32).to(DEVICE), torch.randn(1, 100, D_MODEL, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        check_close(mixer(x, "triton").float(), mixer(x, "conv").float(), 3e-2, name)


def test_the_kernels_form_reads_a_prefix():
    mixer = make("jrt", torch.float32).to(DEVICE)
    x, _ = inputs(mixer, LONG, dtype=torch.float32)
    for prefix in ((0, 1, 40, 70, torch.tensor([20, 64])) if GPU else (0, torch.tensor([7, LONG]))):
        results = [run(mixer, form, x.to(DEVICE), {"prefix": prefix}) for form in ("triton", "chunked")]
        for what, exact in results[1].items():
            kernels = torch.zeros_like(exact) if results[0][what] is None else results[0][what]
            check_close(kernels, exact, 5e-4, f"prefix {prefix}: {what}")


def test_the_kernels_form_is_refused_where_it_cannot_run(monkeypatch):
    mixer = make("attention")
    with pytest.raises(ValueError, match="does not do float64"):
        mixer(torch.zeros(1, 4, D_MODEL, dtype=torch.float64), "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU"):
        mixer.float()(torch.zeros(1, 4, D_MODEL), "triton")
    assert "triton" not in MIXERS["attention"](1024, n_heads=2).forms
    assert "triton" not in MIXERS["deltanet"](512, n_heads=2).forms and "triton" in MIXERS["deltanet"](256).forms
    assert "triton" not in MIXERS["based"](32, feature_dim=32).forms and "triton" in MIXERS["based"](32).forms


@pytest.mark.skipif(not GPU, reason="needs a GPU: torch.compile does not look into the interpreter")
@pytest.mark.parametrize("name", [name for name in WITH_KERNEL if name not in LIKE_S4D])
def test_the_kernels_form_compiles_to_one_graph(name):
    mixer = make(name, torch.float32).cuda()
    x = inputs(mixer, LONG, dtype=torch.float32)[0].cuda()
    torch._dynamo.reset()
    with torch.autocast("cuda", torch.bfloat16):
        y = torch.compile(lambda x: mixer(x, "triton"), fullgraph=True, backend="aot_eager")(x)
        check_close(y, mixer(x, "triton"), 1e-2, name)
        y.sum().backward()


class Nothing:
    """A kernel that does nothing: for what stands around it."""

    def __getitem__(self, grid):
        return lambda *_, **__: None


@pytest.mark.skipif(GPU, reason="a GPU runs the kernels themselves")
@pytest.mark.parametrize("name", "attention mamba2 gla gated_deltanet kda based mamba h3 lru baseconv rwkv4 gateloop "
                                 "jrt".split())
def test_what_stands_around_the_kernels_compiles(monkeypatch, name):
    """Forward and backward, with the strides that a compiler expects."""
    for module in (flash_attention, linear_attention, gla, delta_rule, taylor_attention, scan, selective_scan, fft_conv,
                   tiles):
        monkeypatch.setattr(module, "differentiable_gradients", None, raising=False)     # nothing of it is traced
        for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Nothing())
    mixer, x = make(name, torch.float32), torch.randn(2, LONG, D_MODEL, requires_grad=True)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(lambda x: mixer(x, "triton"), fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert x.grad.shape == x.shape


@triton.jit
def copy_kernel(x, y, start, MASKED: tl.constexpr):
    i = start + tl.arange(0, 8)
    tl.store(y + tl.arange(0, 8), tl.load(x + i, mask=i < 8, other=0.0) if MASKED else tl.load(x + i))


@pytest.mark.skipif(GPU, reason="it is the interpreter that is watched")
def test_the_interpreter_watches_where_kernels_read():
    x, y = torch.arange(8.0), torch.zeros(8)
    copy_kernel[1,](x, y, 1, True)
    assert y.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    with pytest.raises(Exception, match="1 of 8 addresses are of no argument"):
        copy_kernel[1,](x, y, 1, False)
    with pytest.raises(Exception, match="1 of 8 addresses are of no argument"):
        copy_kernel[1,](x, y[1:].clone(), 0, True)


@pytest.mark.skipif(GPU, reason="for a machine without a GPU")
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", [name for name, f in vars(tables).items() if hasattr(kernels, name)
                                  and getattr(f, "__module__", None) == tables.__name__])
def test_a_table_needs_a_gpu(name):
    assert name in all_tables.NAMES
    with pytest.raises(SystemExit, match="on a GPU, and there is none here"):
        runpy.run_module(f"kernels.{name}", run_name="__main__")


def test_all_tables_in_one_go(monkeypatch, tmp_path, capsys):
    """A table that fails says where, and does not take the others along; without a GPU no file is touched."""
    def fails():
        print("a row")
        raise AssertionError("too far off")
    monkeypatch.setattr(all_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "gla", fails)
    monkeypatch.setattr(tables, "scan", lambda: print("rows"))
    if not GPU:
        with pytest.raises(SystemExit, match="there is none here"):
            all_tables.main(["scan"])
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert all_tables.main(["gla", "scan"]) and not all_tables.main(["scan"])
    assert (tmp_path / "gla.txt").read_text() == "a row\ngla stopped here: AssertionError: too far off\n"
    assert (tmp_path / "scan.txt").read_text() == "rows\n" and "scan took" in capsys.readouterr().out

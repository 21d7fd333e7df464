"""What the kernels are checked and timed on: `python -m kernels.NAME` is the function NAME here. kernels/results/ has
what they printed."""
import sys

import torch
import torch.nn.functional as F

from kernels import bench


def output(f):
    """The first of a function's outputs."""
    return lambda *x: f(*x)[0]


def sdpa(*x):
    """PyTorch's softmax attention on the last three tensors."""
    return F.scaled_dot_product_attention(*x[-3:], is_causal=True)


def taylor_attention():
    from kernels.taylor_attention import CHUNK, features, reference, state_of, taylor_attention
    rates = bench.print_machine()

    def shapes(t, b=1, h=4, d=16, e=64):
        return bench.random((b, h, t, d), (b, h, t, d), (b, h, t, e))

    def causal(q, k, v, *_):
        return taylor_attention(q, k, v)[0]

    def prefix(q, k, v, k_enc, v_enc, *_):
        return taylor_attention(q, k, v, state_of(k_enc, v_enc))[0]

    def prefix_twin(q, k, v, k_enc, v_enc):
        k_enc, v_enc = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (k_enc, v_enc))
        return reference(q, k, v, features(k_enc).mT @ F.pad(v_enc, (0, 1), value=1.0))[0]

    for d in (8, 16, 24):
        bench.check(causal, output(reference), ("twin", output(reference)), lambda t: shapes(t, d=d), "qkv",  # noqa: B023
                    what=f"d = {d}")
    bench.check(prefix, prefix_twin, ("twin", prefix_twin), lambda t: [*shapes(t), *shapes(t)[1:]],
                ("q", "k", "v", "k'", "v'"), what="with a prefix of the whole length")
    rows = []
    for t in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072):
        n = max(32768, t)
        q, k, v = shapes(t, n // t, 16)
        heads = [torch.randn_like(v) for _ in range(3)]                  # of 64, for SDPA
        others = {"SDPA": sdpa} | ({"twin": lambda q, k, v, *_: reference(q, k, v)[0]} if t == 8192 else {})
        tokens, flops = 16 * n, 2 * 16 * n * (CHUNK * (16 + 64) + 2 * 192 * 64 + 4 * 192 * 16)
        rows.append((f"b {n // t} h 16 t {t} d 16 e 64", {"kernel": causal} | others, (q, k, v, *heads), tokens * 320,
                     flops))
        if t in (8192, 32768):
            rows.append((f"prefix of all, t {t}", {"kernel": prefix, "SDPA": sdpa}, (q, k, v, k, v, *heads),
                         tokens * 480, 1.5 * flops))
    bench.compare(rows, rates)


def selective_scan():
    from kernels.selective_scan import reference, selective_scan
    rates = bench.print_machine()

    def inputs(t, b=1, c=64, n=16, dtype=torch.bfloat16):
        u, dt, B, C = (x[:, :, 0] for x in bench.random((b, c, 1, t), (b, c, 1, t), (b, n, 1, t), (b, n, 1, t),
                                                        dtype=torch.float32))
        A = -torch.arange(1.0, n + 1, device="cuda").repeat(c, 1)
        u, dt, B, C = (x.to(dtype).contiguous() for x in (u, F.softplus(dt - 3), B, C))
        return u, dt, A, B, C, torch.ones(c, device="cuda")

    def mamba_ssm():
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        return selective_scan_fn

    for dtype, floor in ((torch.bfloat16, 2 ** -7), (torch.float32, 2e-6)):
        bench.check(output(selective_scan), output(reference), ("twin", output(reference)),
                    lambda t: inputs(t, dtype=dtype), ("u", "dt", "A", "B", "C", "D"), floor=floor)          # noqa: B023
    candidates = {"kernel": output(selective_scan)} | bench.peers("mamba-ssm", mamba_ssm)
    for n in (16, 64):
        bench.agree(f"n {n} t 2048", candidates, inputs(2048, 2, 1024, n))
    bench.compare(((f"bfloat16, b {b} c 1024 n {n} t {t}", candidates, x, 3 * x[0].nbytes, 0) for n in (16, 64)
                   for b, t in ((16, 2048), (4, 8192), (1, 32768)) for x in [inputs(t, b, 1024, n)]), rates)


def fft_conv():
    from kernels.fft_conv import by_torch_fft, fft_conv, options, reference
    rates = bench.print_machine()

    def inputs(t, b=2, c=16, dtype=torch.bfloat16, taps=None, gates=0):
        tensors = bench.random(*[(b, c, 1, t)] * (1 + gates), dtype=torch.float32)
        u, *gates = (x[:, :, 0].contiguous().to(dtype) for x in tensors)
        K, l = bench.random((1, 1, c, taps or t), dtype=torch.float32, seed=3)[0][0, 0], taps or t
        return [u, K * torch.exp(-torch.arange(l, device="cuda") * 8 / l), *gates]

    def check(what, shapes, names, lengths, **more):
        bench.check(fft_conv, reference, ("torch.fft", by_torch_fft), shapes, names, lengths, what=what, **more)
    check("no gates", inputs, "uK", (1, 17, 1000, 2048, 8192))
    check("exact", lambda t: inputs(t, dtype=torch.float32), "uK", (1, 17, 1000, 2048), floor=2e-6)
    check("two gates", lambda t: inputs(t, gates=2), ("u", "K", "pre", "post"), (1000, 8192))
    check("a filter of 1000 taps", lambda t: inputs(t, taps=1000), "uK", (3000, 20000))
    rows = []

    def row(name, tensors, passes=2, n=0):
        """n: the length of a transform, for the tensor cores' FLOPs."""
        t, n1 = tensors[0].shape[-1], options(n)[0]
        others = {"torch.fft": by_torch_fft} | ({"twin": reference} if t == 8192 and len(tensors) == 2 else {})
        rows.append((name, {"kernel": fft_conv} | others, tensors, passes * tensors[0].nbytes,
                     2 * tensors[0].numel() * (4 * n1 + 8 * n // n1) if n else 0))
    for t in (1024, 2048, 4096, 8192):
        row(f"b {32768 // t} c 1024 t {t}", inputs(t, 32768 // t, 1024), n=t)
    for t in (2048, 8192):
        row(f"two gates, t {t}", inputs(t, 32768 // t, 1024, gates=2), passes=4)
    for taps in (2048, 8192):
        row(f"{taps} taps, b 1 t 32768", inputs(32768, 1, 1024, taps=taps), n=taps)
    row("float32, b 16 t 2048", inputs(2048, 16, 1024, dtype=torch.float32))
    bench.compare(rows, rates)


def step():
    from kernels.step import (
        attention_reference,
        attention_step,
        based_reference,
        based_step,
        features,
        linear_step,
        reference,
    )
    rates = bench.print_machine()
    (b, h, d, e, w), rows = (128, 16, 16, 64, 64), []

    def random(*shape):
        return torch.randn(shape, device="cuda")

    def errors(what, results, exact):
        print(f"{what}:", *(f"{bench.error(x, y):.1e}" for x, y in zip(results, exact, strict=True)))
    S = features(random(b, h, 99, d)).mT @ random(b, h, 99, e + 1).abs()
    tensors = [random(b, h, d), random(b, h, d), random(b, h, e), S, random(b, h, e),
               random(b, h, e), random(b, h, w, e), random(b, h, w, e)]
    errors("Based: relative errors of o, S, keys, values in float32", based_step(*tensors, w),
           based_reference(*(x.double() for x in tensors), w))
    rows.append((f"Based, b {b} h {h} f {d} e {e} w {w}", {"kernel": lambda *x: based_step(*x, w)[0],
                 "PyTorch": lambda *x: based_reference(*x, w)[0]}, tensors, 8 * sum(x.numel() for x in tensors[3:]), 0))
    for d in (64, 128):
        tensors = [random(b, h, d), random(b, h, d), random(b, h, d), -random(b, h, 1).abs(), random(b, h, d, d)]
        errors("linear attention: relative errors of o and S", linear_step(*tensors),
               reference(*(x.double() for x in tensors)))
        rows.append((f"linear attention, b {b} h {h} d {d}", {"kernel": output(linear_step),
                     "PyTorch": output(reference)}, tensors, 8 * tensors[-1].numel(), 0))
    for b, h, n in ((128, 16, 2048), (16, 6, 32768), (1, 16, 32768)):
        q, k, v = (random(b, h, *shape).bfloat16() for shape in ((64,), (n, 64), (n, 64)))
        real = torch.arange(n, device="cuda").expand(b, n) < 3 * n // 4                      # the rest is room
        errors(f"attention, {n} slots: relative error of o", [attention_step(q, k, v, real)[:1]],
               [attention_reference(q[:1].double(), k[:1].double(), v[:1].double(), real[:1])])
        rows.append((f"attention, b {b} h {h} d 64, {3 * n // 4} of {n}", {
            "kernel": lambda q, k, v, real=real: attention_step(q, k, v, real),
            "SDPA": lambda q, k, v, real=real: F.scaled_dot_product_attention(
                q[:, :, None], k, v, attn_mask=real[:, None, None]),
            "PyTorch": lambda q, k, v, real=real: attention_reference(q, k, v, real)},
            [q, k, v], 3 * n // 4 * b * h * 64 * 4, 0))
    bench.compare(rows, rates, gradients=False)


def gla():
    from kernels.gla import CHUNK, gla, reference
    rates = bench.print_machine()

    def inputs(t, b=1, h=4, strength=1 / 16, dtype=torch.bfloat16):
        q, k, v = bench.random(*[(b, h, t, 64)] * 3, dtype=dtype)
        return q * 0.125, k, v, -strength * bench.random((b, h, t, 64), dtype=torch.float32, seed=2)[0].abs()

    def fla():
        from fla.ops.gla import chunk_gla
        return lambda *x: chunk_gla(*(z.transpose(1, 2) for z in x), scale=1.0)[0].transpose(1, 2)
    kernel, twin = (lambda *x, f=f: f(*x)[0] for f in (gla, reference))
    for strength, dtype, floor in ((1 / 16, torch.bfloat16, 2 ** -7), (3, torch.bfloat16, 2 ** -7),
                                   (1 / 16, torch.float32, 1e-5)):
        print(f"gates of about -{strength}")
        bench.check(kernel, twin, ("twin", twin), lambda t: inputs(t, strength=strength, dtype=dtype),     # noqa: B023
                    "qkvg", floor=floor)
    others = bench.peers("fla", fla)
    candidates, (q, k, v, g) = {"kernel": kernel} | others, inputs(2048, 2, 16)
    bench.agree("t 2048", {name: lambda *x, f=f: f(*x, g) for name, f in candidates.items()}, (q, k, v))
    for name, f in others.items():
        bench.check(kernel, twin, (name, f), lambda t: inputs(t, 1, 16), "qkvg", lengths=(4096,))
    bench.compare(((f"b {b} h 16 t {t} d 64", candidates, x, 12 * x[0].numel(), 12 * 2 * CHUNK * x[0].numel())
                   for b, t in ((16, 2048), (4, 8192), (1, 32768)) for x in [inputs(t, b, 16)]), rates)


def compare_mamba_2(rates):
    from kernels.linear_attention import mamba_2, reference

    def recurrence(x, dt, A, B, C):
        """mamba_2() by the twin."""
        q, k, v = (z.transpose(1, 2) for z in (C.expand(-1, -1, 16, -1), B.expand(-1, -1, 16, -1), x * dt[..., None]))
        return reference(q, k, v, (dt * A).mT[..., None])[0].transpose(1, 2)

    def inputs(b, t):
        x, dt, B, C = (z.transpose(1, 2).contiguous() for z in bench.random(
            (b, 16, t, 64), (b, 16, t, 1), (b, 1, t, 64), (b, 1, t, 64)))
        return x, F.softplus(dt[..., 0] - 3), torch.linspace(-2, -1, 16, device="cuda"), B, C

    def mamba_ssm():
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        return lambda *x: mamba_chunk_scan_combined(*x, chunk_size=256)
    candidates = {"kernel": mamba_2} | bench.peers("mamba-ssm", mamba_ssm)
    if "--time" not in sys.argv:
        x = inputs(2, 2048)
        exact = bench.values_and_gradients(recurrence, x, torch.float64)
        for name, f in candidates.items():
            gaps = [bench.error(a, b) for a, b in zip(bench.values_and_gradients(f, x, torch.bfloat16), exact,
                                                      strict=True)]
            print(f"Mamba-2, t 2048, relative errors of o, dx, ddt, dA, dB, dC: {name} "
                  f"{', '.join(f'{gap:.1e}' for gap in gaps)}", flush=True)
            assert max(gaps[:3]) < 0.02, f"{name} computes something else"
    bench.compare([(f"Mamba-2, b {32768 // t} h 16 t {t} n 64 d 64", candidates, x, 2 * x[0].nbytes, 0)
                   for t in (2048, 8192) for x in [inputs(32768 // t, t)]], rates)


def linear_attention():
    from kernels.linear_attention import CHUNK, linear_attention, reference
    rates = bench.print_machine()

    def shapes(t, b=1, h=4):
        q, k, v = bench.random(*[(b, h, t, 64)] * 3)
        return q * 0.125, k, v

    def decays(t, b=1, h=4):
        return -bench.random((b, h, t, 1), dtype=torch.float32, seed=2)[0].abs() / 10

    bench.check(output(linear_attention), output(reference), ("twin", output(reference)), shapes, "qkv")
    print("with a decay for each token")
    bench.check(output(linear_attention), output(reference), ("twin", output(reference)),
                lambda t: (*shapes(t), decays(t)), "qkvg", loose="g")
    gamma, rows = (1 - 2.0 ** (-5 - torch.arange(16, device="cuda") / 4)).log()[None, :, None, None], []
    for t in (2048, 8192, 32768):
        qkv, g = shapes(t, 32768 // t, 16), decays(t, 32768 // t, 16)
        size, others = qkv[0].numel(), {"SDPA": sdpa} | ({"twin": output(reference)} if t == 8192 else {})
        n_bytes, flops = 8 * size, size // 64 * (4 * CHUNK * 64 + 4 * 64 * 64)
        mine = {"kernel": output(linear_attention)}
        rows += [(f"no decay, b {32768 // t} h 16 t {t} d 64", mine | others, qkv, n_bytes, flops),
                 (f"constant decay, t {t}", {"kernel": lambda *x: linear_attention(*x, gamma)[0]}, qkv, n_bytes, flops),
                 (f"decay of each token, t {t}", mine, (*qkv, g), n_bytes + 4 * g.numel(), flops)]
    bench.compare(rows, rates)
    compare_mamba_2(rates)


def compare_mixers(rates):
    """RWKV-4 and GateLoop."""
    from kernels.scan import gateloop, reference, rwkv, rwkv_peers, rwkv_reference

    def inputs(b, t, c=1024):
        k, v = (x[:, :, 0].contiguous() for x in bench.random((b, c, 1, t), (b, c, 1, t)))
        w, u = (x.flatten() for x in bench.random((1, c, 1, 1), (1, c, 1, 1), dtype=torch.float32, seed=1))
        return [k, v, -w.exp(), u]

    def plain(k, v, w, u):
        nothing = torch.zeros(*k.shape[:2], device=k.device, dtype=torch.promote_types(w.dtype, torch.float32))
        k, v = k.to(nothing.dtype), v.to(nothing.dtype)
        return rwkv_reference(k, v, w, u, nothing, nothing, nothing - 1e30)[0]

    def loop(q, k, v, size, turn):
        return gateloop(*(x[..., None] for x in (q, k, v)), torch.complex(F.logsigmoid(size), turn)[..., None])[0]

    def plain_loop(q, k, v, size, turn):
        S, _ = reference(torch.complex(F.logsigmoid(size), turn).exp(), (k * v).to(torch.complex64))
        return (q * S.real).to(v.dtype)[..., None]
    print("RWKV-4")
    bench.check(lambda *x: rwkv(*x)[0], plain, ("twin", plain), lambda t: inputs(2, t, 8), "kvwu")
    ours, twin = {"kernel": lambda *x: rwkv(*x)[0]}, {"twin": plain}
    others = bench.peers("fla", rwkv_peers)
    bench.agree("RWKV-4, t 2048, float32", ours | others, [x.float() for x in inputs(16, 2048)])
    rows = [(f"RWKV-4, bfloat16, b {32768 // t} c 1024 t {t}", ours | others | (twin if t == 8192 else {}), x,
             3 * x[0].nbytes, 0) for t in (2048, 8192, 32768) for x in [inputs(32768 // t, t)]]
    q, k, v, size, turn = (x[:, :, 0].contiguous() for x in bench.random(*[(4, 1024, 1, 8192)] * 5))
    rows.append(("GateLoop, bfloat16, b 4 c 1024 t 8192", {"kernel": loop, "twin": plain_loop},
                 [q, k, v, size.float() + 3, turn.float()], 4 * q.nbytes + 8 * q.numel(), 0))
    bench.compare(rows, rates)


def scan():
    from kernels.scan import reference, scan
    rates = bench.print_machine()

    def inputs(b, c, t, dtype=torch.float32):
        a, b = bench.random((b, c, 1, t), (b, c, 1, t), dtype=torch.float32)
        return [x[:, :, 0].contiguous().to(dtype) for x in (a.sigmoid(), b)]

    def as_complex(f):
        """Of real pairs: |a| < 1 and an angle, and b."""
        def g(r, angle, b, bi):
            h = f(torch.polar(r, angle), torch.complex(b, bi))[0]
            return torch.cat([h.real, h.imag], dim=-1)
        return g

    compare_mixers(rates)
    print("the scan")
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


def delta_rule():
    from kernels.delta_rule import CHUNK, delta_rule, peers, reference
    rates, others = bench.print_machine(), peers("--peers" in sys.argv)

    def shapes(kind, t, b=1, h=4, d=64):
        q, k, v = bench.random(*[(b, h, t, d)] * 3)
        k, beta = F.normalize(k.float(), dim=-1).to(k.dtype), bench.random((b, h, t, 1), dtype=torch.float32, seed=2)[0]
        g = -bench.random((b, h, t, d if kind == "vector" else 1), dtype=torch.float32, seed=3)[0].abs() / 10
        return q * d ** -0.5, k, v, *([] if kind == "none" else [g]), beta.sigmoid()

    def called(f):                                               # with g or without
        return lambda q, k, v, *gates: f(q, k, v, *(gates if len(gates) == 2 else (None, *gates)))[0]

    def compared(kind, d, t, tensors):
        """The peers that do this, too; their outputs and gradients are compared on the way."""
        if "--time" in sys.argv:
            return others.get(kind, {})
        mine = bench.values_and_gradients(kernel, tensors, torch.bfloat16)
        for name, f in others.get(kind, {}).items():
            gaps = [bench.error(x, y.double()) for x, y in
                    zip(bench.values_and_gradients(f, tensors, torch.bfloat16), mine, strict=True)]
            print(f"  decay {kind}, t {t} d {d}: {name}'s output and gradients are off by "
                  f"{', '.join(f'{x:.1e}' for x in gaps)}", flush=True)
        return others.get(kind, {})
    kernel, plain, tokens = called(delta_rule), called(reference), 32768
    for kind in ("none", "scalar", "vector"):
        print(f"decay: {kind}")
        bench.check(kernel, plain, ("twin", plain), lambda t: shapes(kind, t),                    # noqa: B023
                    ("q", "k", "v", *(["g"] if kind != "none" else []), "beta"), loose="g")
        for d in (64, 128):
            rows = []
            for t in (2048, 8192):
                tensors = shapes(kind, t, tokens // t, 16, d)
                rows.append((f"decay {kind}, b {tokens // t} h 16 t {t} d {d}",
                             {"kernel": kernel} | compared(kind, d, t, tensors), tensors,
                             8 * tensors[0].numel() + 4 * sum(x.numel() for x in tensors[3:]),
                             tokens * 16 * 2 * (10 * CHUNK ** 2 + 5 * CHUNK * d + 3 * d ** 2)))
            bench.compare(rows, rates)


def flash_attention():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from kernels.flash_attention import flash_attention, reference
    rates = bench.print_machine()
    flex = torch.compile(flex_attention, dynamic=False)

    def sdpa(backend):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                                        enable_gqa=k.shape[1] != q.shape[1])
        return attend

    def flash_attn_4():
        from flash_attn.cute import flash_attn_func
        return lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)[0].transpose(1, 2)

    def shapes(t, b=1, h=4, g=4, d=64):
        return bench.random((b, h, t, d), (b, g, t, d), (b, g, t, d))
    others = {"cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION), "FlashAttention-2": sdpa(SDPBackend.FLASH_ATTENTION)}
    for what, sizes in (("4 heads of 64", {}), ("that share keys", {"g": 1}), ("4 heads of 128", {"d": 128})):
        print(f"{what}, SDPA by FlashAttention-2")
        bench.check(flash_attention, reference, ("SDPA", others["FlashAttention-2"]),
                    lambda t, sizes=sizes: shapes(t, **sizes), "qkv", (1000,) if sizes else bench.LENGTHS)
    candidates = {"kernel": flash_attention, **others, **bench.peers("flash-attn-4", flash_attn_4)}
    rows, n = [], 32768
    for h, d in ((16, 64), (8, 128)):
        bench.agree(f"t = 2048, d = {d}", candidates, shapes(2048, 2, h, h, d))
        for t in (2048, 8192, n):
            tensors = shapes(t, n // t, h, h, d)
            rows.append((f"b {n // t} h {h} t {t} d {d}", candidates, tensors, 8192 * n, 2048 * n * t))
    for window in (64, 256, 1024):
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None, 8192, 8192)  # noqa: B023
        rows.append((f"window {window}, b 4 h 16 t 8192 d 64",
                     {"kernel": lambda q, k, v, window=window: flash_attention(q, k, v, window),
                      "flex": lambda q, k, v, mask=mask: flex(q, k, v, block_mask=mask)}, shapes(8192, 4, 16, 16),
                     8192 * n, 4096 * n * window))
    rows.append(("4 heads share keys, b 4 h 16 t 8192", candidates, shapes(8192, 4, 16, 4), 5120 * n, 2048 * n * 8192))
    bench.compare(rows, rates)


def called():
    """A forward and a backward pass of every kernel, microseconds: of the GPU (CUDA graphs), and as called from Python,
    also with the backward pass in the calling thread, and not in one that autograd keeps for a device."""
    from triton.testing import do_bench_cudagraph

    from kernels import (
        delta_rule,
        fft_conv,
        flash_attention,
        gla,
        linear_attention,
        scan,
        selective_scan,
        taylor_attention,
    )
    bench.print_machine()

    def heads(t, *widths):
        return bench.random(*[(32768 // t, 16, t, d) for d in widths])

    def channels(t, c=1024):
        return torch.randn(32768 // t, c, t, device="cuda").bfloat16()
    linear, g = output(linear_attention.linear_attention), -torch.rand(4, 16, 8192, 1, device="cuda") / 10
    u, K, (q, k, v) = channels(2048), torch.randn(1024, 8192, device="cuda") / 100, heads(8192, 64, 64, 64)
    ssm = (F.softplus(u - 3), -torch.ones(1024, 16, device="cuda"), channels(2048, 16), channels(2048, 16),
           torch.ones(1024, device="cuda"))
    rows = [("linear t 8192", linear, (q, k, v)), ("linear t 2048", linear, heads(2048, 64, 64, 64)),
            ("linear g t 8192", linear, (q, k, v, g)),
            ("mamba 2 t 8192", linear_attention.mamba_2, (v.transpose(1, 2), -g[..., 0].mT.contiguous(), -torch.ones(
                16, device="cuda"), *(x[:, :1].transpose(1, 2).contiguous() for x in (q, k)))),
            ("window 64 t 8192", lambda *x: flash_attention.flash_attention(*x, 64), (q, k, v)),
            ("attention t 2048", flash_attention.flash_attention, heads(2048, 64, 64, 64)),
            ("taylor t 8192", output(taylor_attention.taylor_attention), heads(8192, 16, 16, 64)),
            ("gla t 8192", output(gla.gla), (q, k, v, g.expand(q.shape).contiguous())),
            ("delta t 8192", lambda q, k, v, beta: delta_rule.delta_rule(q, k, v, None, beta)[0],
             (q, F.normalize(k.float(), dim=-1).to(k.dtype), v, torch.rand(4, 16, 8192, 1, device="cuda"))),
            ("conv t 2048", fft_conv.fft_conv, (u, K[:, :2048].contiguous())),
            ("conv two gates t 2048", fft_conv.fft_conv, (u, K[:, :2048].contiguous(), u.flip(0), u.flip(1))),
            ("conv t 8192", fft_conv.fft_conv, (channels(8192), K)),
            ("scan bf16 t 2048", output(scan.scan), (u.sigmoid(), u)),
            ("rwkv 4 t 2048", output(scan.rwkv), (u, u.flip(1), *(-torch.rand(1024, device="cuda") for _ in "wu"))),
            ("selective t 2048", output(selective_scan.selective_scan), (u, *ssm))]
    for name, f, tensors in rows:
        _, both = bench.forward_and_backward(f, tensors)
        gpu, python = do_bench_cudagraph(both, rep=20, return_mode="median"), bench.called(both)
        with torch.autograd.set_multithreading_enabled(False):
            one = bench.called(both)
        print(f"{name:22} gpu {1e3 * gpu:7.1f} called {1e3 * python:7.1f} (in one thread {1e3 * one:7.1f}) over "
              f"{1e3 * (python - gpu):7.1f}", flush=True)

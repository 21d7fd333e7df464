"""What the kernels are checked and timed on: `python -m kernels.NAME` is the function NAME here. kernels/results/ has
what they printed."""
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
    for n in (16, 64):
        print(f"memory, forward + backward, b 4 c 1024 n {n} t 8192: " + ", ".join(
            f"{name} {bench.memory(f, inputs(8192, 4, 1024, n)) / 2 ** 30:.2f} GiB" for name, f in candidates.items()))


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
    check("no gates", inputs, "uK", (1, 17, 1000, 2048, 8192, 20000, 32768))
    check("exact", lambda t: inputs(t, dtype=torch.float32), "uK", (1, 17, 1000, 2048, 8192, 32768), floor=2e-6)
    check("two gates", lambda t: inputs(t, gates=2), ("u", "K", "pre", "post"), (1000, 8192, 20000))
    check("a filter of 1000 taps", lambda t: inputs(t, taps=1000), "uK", (3000, 20000))
    rows = []

    def row(name, tensors, passes=2, n=0):
        """n: the length of a transform, for the tensor cores' FLOPs."""
        t, n1 = tensors[0].shape[-1], options(n)[0]
        others = {"torch.fft": by_torch_fft} | ({"twin": reference} if t == 8192 and len(tensors) == 2 else {})
        rows.append((name, {"kernel": fft_conv} | others, tensors, passes * tensors[0].nbytes,
                     2 * tensors[0].numel() * (4 * n1 + 8 * n // n1) if n else 0))
    for t in (1024, 2048, 4096, 8192, 16384, 32768):
        row(f"b {32768 // t} c 1024 t {t}", inputs(t, 32768 // t, 1024), n=min(t, 8192))
    row("b 1 c 1024 t 131072", inputs(131072, 1, 1024), n=8192)
    for t in (2048, 8192):
        row(f"two gates, t {t}", inputs(t, 32768 // t, 1024, gates=2), passes=4)
    row("2048 taps, b 1 t 32768", inputs(32768, 1, 1024, taps=2048), n=2048)
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

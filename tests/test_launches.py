"""What the kernels' launches ask of a GPU's shared memory, without a GPU: they are compiled for one, as far as to where
Triton gives out this memory, and must find room.

    python tests/test_launches.py 89 [NAME]     a table for compute capability 8.9, of all launches or those with a NAME
    LAUNCHES=all pytest tests/test_launches.py  all launches for all capabilities, which takes minutes

A process of its own compiles: the tests run under Triton's interpreter, which must be chosen before triton is imported.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

ROOM = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}     # bytes for a program, by compute capability
BF16, FP32 = torch.bfloat16, torch.float32
NO_GPU = pytest.mark.skipif(torch.cuda.is_available() and "LAUNCHES" not in os.environ,
                            reason="needs no GPU, whose own tests take long enough: LAUNCHES=tight does it here, too")


def launches():
    """{name: (a function, its tensors)}: the tightest of each kernel, and others."""
    from kernels import step
    from kernels.fft_conv import fft_conv
    from kernels.flash_attention import flash_attention
    from kernels.gla import gla
    from kernels.linear_attention import linear_attention
    from kernels.scan import scan
    from kernels.taylor_attention import state_of, taylor_attention

    def z(*shape, dtype=BF16):
        return torch.zeros(shape, dtype=dtype)

    def attention(d, e, dtype, t=1024, window=None):
        return lambda *x: flash_attention(*x, window), [z(1, 2, t, n, dtype=dtype) for n in (d, d, e)]

    def linear(d, dtype, t=4096, gates=0):
        g = [z(1, 2, t, gates, dtype=FP32)] if gates else []
        return gla if gates > 1 else linear_attention, [*(z(1, 2, t, d, dtype=dtype) for _ in range(3)), *g]

    def taylor(d, e, dtype):
        return taylor_attention, [z(1, 2, 4096, n, dtype=dtype) for n in (d, d, e)]

    def encoder(d, e, dtype):
        return state_of, [z(1, 2, 4096, n, dtype=dtype) for n in (d, e)]

    def conv(t, dtype, taps=None, gates=0):
        return fft_conv, [z(2, 2, t, dtype=dtype), z(2, taps or t, dtype=FP32), *[z(2, 2, t, dtype=dtype)] * gates]

    def scanned(dtype):
        return lambda a, b: scan(a, b)[0], [z(2, 4096, dtype=dtype) for _ in range(2)]

    def linear_step(d):
        return step.linear_step, [z(1, 2, d), z(1, 2, d), z(1, 2, d), z(1, 2, d), z(1, 2, d, d, dtype=FP32)]

    def attention_step(d):
        return step.attention_step, [z(1, 2, d), z(1, 2, 999, d), z(1, 2, 999, d), torch.ones(1, 999, dtype=torch.bool)]

    def based_step(e, w):
        S = z(1, 2, 153, e + 1, dtype=FP32)
        return (lambda *x: step.based_step(*x, w)), [z(1, 2, 16), z(1, 2, 16), z(1, 2, e), S, z(1, 2, e), z(1, 2, e),
                                                     z(1, 2, w, e), z(1, 2, w, e)]
    tight = {
        "attention 256 bf16": attention(256, 256, BF16), "attention 256 fp32": attention(256, 256, FP32),
        "attention 128 fp32": attention(128, 128, FP32), "attention 128 bf16": attention(128, 128, BF16),
        "linear 64 bf16": linear(64, BF16), "linear 256 bf16 gated": linear(256, BF16, gates=1),
        "linear 128 fp32 gated": linear(128, FP32, gates=1),
        "gla 64 fp32": linear(64, FP32, gates=64), "taylor 16 64 bf16": taylor(16, 64, BF16),
        "encoder 16 64 fp32": encoder(16, 64, FP32), "taylor 24 64 bf16": taylor(24, 64, BF16),
        "encoder 24 64 bf16": encoder(24, 64, BF16),
        "conv 3000 bf16": conv(3000, BF16), "conv 8192 bf16": conv(8192, BF16), "conv 2048 fp32": conv(2048, FP32),
        "conv 1000 fp32": conv(1000, FP32),
        "scan complex": scanned(torch.complex64), "linear step 128": linear_step(128),
        "attention step 256": attention_step(256), "based step 256 128": based_step(256, 128)}
    others = {f"attention {d} {e} {name}": attention(d, e, dtype) for name, dtype in (("bf16", BF16), ("fp32", FP32))
              for d, e in ((16, 16), (32, 32), (64, 64), (96, 96), (192, 192), (16, 256), (64, 128), (256, 16))}
    others |= {"attention 64 32768 bf16": attention(64, 64, BF16, 32768), "attention 64 window": attention(
        64, 64, BF16, window=64)}
    for name, dtype in (("bf16", BF16), ("fp32", FP32)):
        others |= {f"linear {d} {name} {t} {g}": linear(d, dtype, t, g) for d in (16, 32, 64, 128, 256)
                   for t in (1000, 4096) for g in (0, 1)}
        others |= {f"gla {d} {name} {t}": linear(d, dtype, t, d) for d in (16, 64) for t in (500, 4096)}
        others |= {f"{f.__name__} {d} {e} {name}": f(d, e, dtype) for f in (taylor, encoder) for d in (8, 16, 20, 24)
                   for e in (16, 64)}
        others |= {f"conv {t} {name}": conv(t, dtype) for t in (2048, 4096)}
        others |= {f"conv gates {name}": conv(5000, dtype, 2048, 2), f"conv taps {name}": conv(20000, dtype, 1000)}
        others[f"scan {name}"] = scanned(dtype)
    others |= {"conv taps 8192": conv(65536, BF16, 8192)}
    others |= {f"linear step {d}": linear_step(d) for d in (16, 64, 256)}
    others |= {f"attention step {d}": attention_step(d) for d in (64, 128)}
    others |= {f"based step {e} {w}": based_step(e, w) for e, w in ((64, 64), (64, 128), (128, 64))}
    return tight, others


class Given(Exception):                          # noqa: N818
    """Shared memory has been given out; the argument is the pass manager that did it."""


class Card:
    """What triton asks a driver for, before it launches."""

    def __init__(self, capability):
        from triton.backends.compiler import GPUTarget
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def watch(capability):
    """From here on a launch compiles its kernel for this capability, and runs nothing. Returns the list of (kernel,
    bytes) that will grow."""
    from triton._C.libtriton import nvidia
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from kernels import tiles
    asked, run, make_llir = [], JITFunction.run, CUDABackend.make_llir

    def stop(passes, *_):
        raise Given(passes)

    def as_far_as_the_memory(backend, module, metadata, *args):
        """The rest takes most of the time, and asks for no more."""
        try:
            return make_llir(backend, module, metadata, *args)
        except Given as given:
            given.args[0].run(module, "make_llir")
            metadata["shared"] = module.get_int_attr("ttg.shared")
            return ""

    def compiled(kernel, *args, grid, warmup, **options):
        asked.append((kernel.__name__, run(kernel, *args, grid=grid, warmup=True, **options).metadata.shared))
    driver.set_active(Card(capability))
    nvidia.passes.ttgpuir.add_to_llvmir, CUDABackend.make_llir = stop, as_far_as_the_memory
    CUDABackend.make_ptx = lambda backend, module, metadata, *_: metadata.update(name="") or ""
    CUDABackend.make_cubin, JITFunction.run = lambda *_: b"", compiled
    tiles.ROOM = ROOM[capability]
    return asked


def asked_for(capability, chosen):
    """Yields (name, {kernel: bytes}, what was said) of the launches whose names are chosen."""
    from kernels import tiles
    asked, (tight, others) = watch(capability), launches()
    for name, (f, tensors) in (tight | others).items():
        if not chosen(name, tight):
            continue
        asked.clear()
        tiles.SAID.clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trained = "step" not in name
            leaves = [x.requires_grad_(trained and x.dtype != torch.bool) for x in tensors]
            outputs = f(*leaves)
            if trained:
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
        most = {kernel: max(n for other, n in asked if other == kernel) for kernel, _ in asked}
        yield name, most, [str(w.message) for w in said if "shared memory" in str(w.message)]


@NO_GPU
@pytest.mark.parametrize("capability", ROOM if os.environ.get("LAUNCHES") == "all" else (80, 89))
def test_launches_find_room(capability, tmp_path):
    which = "all" if os.environ.get("LAUNCHES") == "all" else "tight"
    env = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, __file__, str(capability), f"--{which}"], env=env, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) >= 18
    for name, kernels, said in rows:
        assert kernels or said or "conv" in name, f"{name}: nothing was launched, and nothing said"
        for kernel, n_bytes in kernels.items():
            assert n_bytes <= ROOM[capability], f"{name}: {kernel} asks for {n_bytes} bytes of {ROOM[capability]}"
    assert max(max(kernels.values(), default=0) for _, kernels, _ in rows) > 0.8 * ROOM[capability], "not the tightest"
    convolutions = [name for name, kernels, _ in rows if "conv" in name and kernels]         # long filters: torch.fft's
    assert "conv 8192 bf16" in convolutions if capability == 90 else convolutions, convolutions


@NO_GPU
@pytest.mark.parametrize("d, t", [(64, 1024), (64, 8192), (128, 8192)])
def test_attention_on_hopper_compiles_as_it_was_meant(d, t, tmp_path):
    """In Triton's newest release, too. It finds room; no product waits for the one before because a register was short
    or read too early, of which only the assembler tells; of its loops only some counters are in slow memory."""
    env = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, __file__, "hopper", str(d), str(t)], env=env, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for name, shared, said in map(json.loads, result.stdout.splitlines()):
        assert shared <= ROOM[90], f"{name} asks for {shared} bytes"
        assert "serialized" not in said, said
        assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= 160, said


def hopper(d, t):
    """Prints of flash_hopper.py's kernels: name, bytes of shared memory, what the assembler says."""
    import triton
    from triton.runtime import driver

    from kernels import flash_hopper as fh
    driver.set_active(Card(90))
    q, L = torch.zeros(1, t, 2, d, dtype=BF16), torch.zeros(1, 2, t)
    short, long, rows, sums = fh.described(q, 64), fh.described(q, 128), fh.described_row(L, 64), fh.described(
        q.float(), 64, d // 2)
    compiled = (fh.forward_kernel.warmup(short, long, long, short, L, t, t, 2, 2, t, 64, grid=(1,),
                                         **fh.sizes(q, q, 0.1)),
                fh.backward_kernel.warmup(short, long, long, short, rows, rows, sums, short, short, t, t, 2, t, 64,
                                          GROUP=1, grid=(1,), **fh.sizes(q, q, 0.1, backward=True)))
    for kernel in compiled:
        ptx, ptxas = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.ptx", Path(triton.__file__).parent
        ptx.write_text(kernel.asm["ptx"])
        said = subprocess.run([ptxas / "backends/nvidia/bin/ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", os.devnull],
                              capture_output=True, text=True).stderr
        print(json.dumps([kernel.metadata.name, kernel.metadata.shared, said]))


def main(capability, *which):
    sys.path.insert(0, str(Path(__file__).parent.parent))
    if capability == "hopper":
        return hopper(*map(int, which))
    which = which[0] if which else "--all"
    for row in asked_for(int(capability), lambda name, tight: name in tight if which == "--tight" else
                         which == "--all" or which in name):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:            # what is compiled here would not run
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        main(*sys.argv[1:])

"""Registers that our kernels' machine code reads and nothing has written, for a Hopper GPU and without one.

ptxas 12.8, of Triton 3.6 and 3.7, makes such code where a 32 columns wide operand of a product takes the place of a 64
columns wide one in shared memory: the tensor cores' address of it comes from a uniform register with anything in it.
Compiling is done by a process of its own, as in test_launches.

    python tests/test_machine_code.py linear        of all launches of test_launches with `linear` in their names
    LAUNCHES=all pytest tests/test_machine_code.py  of all launches, which takes minutes
"""
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import triton
import triton.language as tl
from test_launches import NO_GPU

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*(.*?);")
CHOSEN = ("linear 64 bf16", "delta 64 scalar")   # of all launches, which take longer


def registers(text, n=1):
    """The uniform registers that these operands name; n: as wide as so many."""
    found = set()
    for first, wide in re.findall(r"UR(\d+)(\.64)?", text):
        found |= {int(first) + i for i in range(2 if wide else n)}
    return found


def operands(op, text):
    """What an instruction writes and what it reads of the uniform registers. A product's descriptor is four of them,
    of which the first two are its first operand, if that is not in other registers; a pointer's is two."""
    base, args, to = op.split(".")[0], re.split(r",\s*", text), set()
    if base.startswith("U") and not base.startswith(("UISETP", "UPLOP3")) or base in ("S2UR", "R2UR", "REDUX"):
        place = next((i for i, arg in enumerate(args) if not re.fullmatch(r"!?UP\w+", arg)), 0)
        if re.fullmatch(r"UR\d+", args[place]):
            to, args = registers(args[place], 2 if ".64" in op or "WIDE" in op else 1), args[place + 1:]
    rest, read = ", ".join(args), set()
    for first in re.findall(r"gdesc\[UR(\d+)\]", rest):
        in_registers = re.search(r"R\d+(\.reuse)?, R\d+(\.reuse)?, gdesc", text)
        read |= {int(first) + i for i in range(2 if in_registers else 0, 4)}
    for pointer in re.findall(r"(?<!g)desc\[(UR\d+)\]", rest):
        read |= registers(pointer, 2)
    return to, read | registers(re.sub(r"g?desc\[UR\d+\]", "", rest), 2 if op == "UIADD3.64" else 1)


def unwritten(sass):
    """The instructions that read what none above them writes."""
    written, found = set(), []
    for at, op, text in INSTRUCTION.findall(sass):
        to, read = operands(op, text)
        if read - written:
            found.append(f"{at}: {op} {text}")
        written |= to | read
    return found


def machine_code(compiled):
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([program, "-sass", file.name], capture_output=True, text=True, check=True).stdout


@triton.jit
def narrow_kernel(a, b, z, o, N, NARROW: tl.constexpr):
    i, n = tl.arange(0, 64), tl.arange(0, NARROW)
    wide, narrow = i[:, None] * 64 + i[None, :], i[:, None] * NARROW + n[None, :]
    P = tl.dot(tl.load(a + wide), tl.trans(tl.load(b + wide))).to(tl.bfloat16)
    z_i, total = tl.load(z + narrow), tl.zeros((64, NARROW), tl.float32)
    for h in range(N):
        masked = tl.where(i[:, None] > i[None, :] + h, P, 0.0).to(tl.bfloat16)
        total += tl.dot(masked, (z_i * (h + 1.0)).to(tl.bfloat16))
    tl.store(o + narrow, total)


def of_narrow_tiles(target):
    """{columns: what is unwritten} of the kernel above."""
    from triton.compiler import ASTSource
    types = {"a": "*bf16", "b": "*bf16", "z": "*bf16", "o": "*fp32", "N": "i32", "NARROW": "constexpr"}
    return {n: unwritten(machine_code(triton.compile(
        ASTSource(narrow_kernel, types, {"NARROW": n}, {(i,): [["tt.divisibility", 16]] for i in range(4)}),
        target=target, options={"num_stages": 1}))) for n in (64, 32)}


def of_launches(chosen):
    """Yields (kernel, what is unwritten) of the launches whose names are chosen; each compiled for a Hopper GPU."""
    import torch
    from test_launches import Card, launches
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from kernels.delta_rule import delta_rule
    found, run = [], JITFunction.run

    def compiled(kernel, *args, grid, warmup, **options):
        code = machine_code(run(kernel, *args, grid=grid, warmup=True, **options))
        found.append((kernel.__name__, len(re.findall("HGMMA", code)), unwritten(code)))
    driver.set_active(Card(90))
    JITFunction.run = compiled
    tight, others = launches()
    q, beta = torch.zeros(1, 2, 70, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 70, 1)
    for kind, g in (("scalar", beta), ("vector", q.float())):
        others[f"delta 64 {kind}"] = lambda *x: delta_rule(*x)[0], [q, q, q, g, beta]
    for name, (f, tensors) in (tight | others).items():
        if not chosen(name):
            continue
        leaves = [x.detach().requires_grad_("step" not in name and x.dtype != torch.bool) for x in tensors]
        outputs = f(*leaves)
        if "step" not in name:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
        yield from ((name, *kernel) for kernel in found)
        found.clear()


def main(word="--chosen"):
    from triton.backends.compiler import GPUTarget
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parent.parent))
    for n, what in of_narrow_tiles(GPUTarget("cuda", 90, 32)).items():
        print(f"columns {n}:", what or "fine", flush=True)
    for name, kernel, products, what in of_launches(
            lambda name: name in CHOSEN if word == "--chosen" else word in name and "fp32" not in name):
        print(f"{name}: {kernel}, {products} products:", what or "fine", flush=True)


@NO_GPU
def test_no_register_is_read_that_nothing_has_written(tmp_path):
    env = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    which = "" if os.environ.get("LAUNCHES") == "all" else "--chosen"
    result = subprocess.run([sys.executable, __file__, which], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    wide, narrow, *ours = result.stdout.splitlines()
    assert len(ours) >= 10 and sum(int(re.search(r"(\d+) products", line)[1]) for line in ours) > 100
    for line in (wide, *ours):
        assert line.endswith("fine"), line
    if narrow.endswith("fine"):
        pytest.skip("this ptxas compiles narrow tiles as it should: they may be allowed again")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        main(*sys.argv[1:])

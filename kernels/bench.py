"""How kernels are checked and timed; on what, kernels/tables.py says. Run on a GPU; with --check or --time, only one of
the two is done; with --peers, beside the libraries that are installed. `python -m kernels` does all tables.

Timings are medians of triton.testing.do_bench_cudagraph, the candidates in turns in one process, on random inputs.
Recorded as CUDA graphs, they are the GPU's time. `called` is what a forward and a backward pass take as called from
Python, one after the other: the longer of the GPU's time and of what Python spends on launches, which a model hides by
running ahead, by torch.compile, or by a graph of its own. `limit` is the time that the device would need at least, for
the bytes at its copy bandwidth or the FLOPs at its matmul rate, whichever is longer. `memory` is the most that a
forward and a backward pass take beside their arguments.
"""
import functools
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import triton
from triton.testing import do_bench, do_bench_cudagraph

LENGTHS = (1, 17, 64, 100, 1000, 4096)


@functools.cache
def limits():
    """Copy bandwidth in bytes/s (read + write) and bfloat16 matmul rate in FLOP/s, measured."""
    x = torch.randn(2 ** 28, device="cuda")
    copy = do_bench(lambda: x.clone(), return_mode="median") / 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = do_bench(lambda: a @ b, return_mode="median") / 1e3
    return 2 * x.numel() * 4 / copy, 2 * 8192 ** 3 / matmul


def need_a_gpu():
    if not torch.cuda.is_available():
        sys.exit("this checks and times kernels on a GPU, and there is none here; python -m pytest "
                 "tests/test_kernels.py runs them in Triton's interpreter")


def print_machine():
    """The machine, the versions and the command; returns the limits."""
    need_a_gpu()
    rates, name = limits(), Path(sys.argv[0]).stem
    command = " ".join([f"kernels{'' if name == '__main__' else '.' + name}", *sys.argv[1:]])
    print(f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, torch {torch.__version__}, triton "
          f"{triton.__version__}; copy {rates[0] / 1e12:.2f} TB/s, bfloat16 matmul {rates[1] / 1e12:.0f} TFLOP/s\n"
          f"$ python -m {command}", flush=True)
    return rates


def random(*shapes, dtype=torch.bfloat16, seed=0):
    """Normal numbers, (b, h, t, d), laid out as a lesson's heads are: (b, t, h, d) in memory."""
    g = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(b, t, h, d, generator=g, device="cuda").to(dtype).transpose(1, 2) for b, h, t, d in shapes]


def values_and_gradients(f, tensors, dtype):
    """The output of f, and the gradients of all tensors, for one random gradient of the output."""
    tensors = [x.to(dtype if x.dtype == torch.bfloat16 else torch.promote_types(dtype, x.dtype)) for x in tensors]
    tensors = [x.detach().requires_grad_() for x in tensors]
    o = f(*tensors)
    do = torch.randn(o.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(o.dtype)
    return [o, *torch.autograd.grad(o, tensors, do)]


def error(x, exact):
    """||x - exact|| / ||exact||; of numbers that should all be 0, their size."""
    size = exact.norm()
    return ((x.double() - exact).norm() / (size if size > 1e-3 else exact.numel() ** 0.5)).item()


def check(kernel, twin, rival, shapes, names, lengths=LENGTHS, loose=(), floor=2 ** -7, what=""):
    """Print errors in the dtype of the tensors that `shapes` makes, against the twin in float64, of the kernel and of
    a rival (name, function), for outputs and gradients. Raises AssertionError where the kernel's is above 1.5 times
    the rival's and above `floor`, by default bfloat16's spacing; for the gradients named in `loose`, above 0.05. With
    --time, nothing is done."""
    if "--time" in sys.argv:
        return
    dtype = str(shapes(1)[0].dtype).split(".")[-1]
    print(f"{what}{', ' if what else ''}relative errors in {dtype}, kernel / {rival[0]}: "
          + ", ".join(["o", *("d" + name for name in names)]))
    for t in lengths:
        tensors = shapes(t)
        exact = values_and_gradients(twin, tensors, torch.float64)
        pairs = [[error(x, y) for x, y in zip(values_and_gradients(f, tensors, torch.bfloat16), exact, strict=True)]
                 for f in (kernel, rival[1])]
        print(f"  t = {t:5}  " + "  ".join(f"{a:.1e} / {b:.1e}" for a, b in zip(*pairs, strict=True)), flush=True)
        for name, a, b in zip(["o", *names], *pairs, strict=True):
            allowed = max(1.5 * b, 0.05 if name in loose else floor)
            assert a <= allowed, f"t = {t}, {name}: error {a:.1e}, {rival[0]} {b:.1e}"


def by_the_clock(f):
    """Milliseconds of a second call: the first one may compile."""
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def timed(candidates, rounds=2, ms=10):
    """{name: median ms} of functions without arguments, measured in turns, in rounds of ten graphs of so many ms; what
    takes 20 ms or more once, by the clock."""
    times = {name: [by_the_clock(f)] for name, f in candidates.items()}
    for _ in range(rounds):
        for name, f in candidates.items():
            if times[name][0] < 20:
                times[name].append(do_bench_cudagraph(f, rep=ms, return_mode="median"))
    times = {name: ms[1:] or ms for name, ms in times.items()}
    return {name: statistics.median(t) for name, t in times.items()}


def called(f, times=20):
    """Milliseconds of a call from Python, of many one after the other: the median of three rounds."""
    rounds = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            f()
        torch.cuda.synchronize()
        rounds.append(1e3 * (time.perf_counter() - start) / times)
    return statistics.median(rounds[1:])


def forward_and_backward(f, tensors):
    """Two functions to time: f without gradients, and f with those of all tensors that it takes."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    do = torch.randn_like(f(*leaves))

    def forward():
        with torch.no_grad():
            return f(*tensors)
    return forward, lambda: torch.autograd.grad(f(*leaves), leaves, do, allow_unused=True)


def memory(f, tensors):
    """The most memory that a forward and a backward pass of f take beside its arguments, in bytes."""
    _, both = forward_and_backward(f, tensors)
    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    return torch.cuda.max_memory_allocated() - before


def peers(package, load):
    """{package: load()} with --peers, for a table's candidates; {} without, or if load() cannot import it, which is
    said."""
    if "--peers" not in sys.argv:
        return {}
    try:
        return {package: load()}
    except ImportError as error:
        print(f"{package} is not installed ({error}): the tables are without it", flush=True)
        return {}


def agree(name, candidates, tensors):
    """Print how far the output and the gradients of the other candidates are from the first one's; AssertionError above
    2%. With --time, nothing is done."""
    if "--time" in sys.argv:
        return
    first, *others = (values_and_gradients(f, tensors, torch.bfloat16) for f in candidates.values())
    for other, results in zip(list(candidates)[1:], others, strict=True):
        gaps = [error(x, y.double()) for x, y in zip(results, first, strict=True)]
        print(f"{name}: output and gradients of {other} are off by {', '.join(f'{x:.1e}' for x in gaps)}", flush=True)
        assert max(gaps) < 0.02, f"{other} computes something else"


def line_of(times):
    """What candidates take, the others also as multiples of what the first one takes."""
    mine = next(iter(times.values()), None)
    return "  ".join(f"{name} {t:.3f}" + (f" ({t / mine:.2f}x)" if t != mine else "") for name, t in times.items())


def compare(rows, rates, gradients=True):
    """Print a table, a line as soon as it is measured. A row: (name, {candidate: function}, tensors, bytes, FLOPs of
    the forward pass); the first candidate is the kernel, its time is given as a share of the limit, and what the others
    take as multiples of it. Called from Python are those that take less than 3 ms, memory is of those below 20. With
    --check, nothing is done."""
    if "--check" in sys.argv:
        return
    titles = ["forward, ms", *(["forward + backward, ms"] if gradients else []), "the same, called from Python, ms",
              *(["memory, GiB"] if gradients else [])]
    print(f"{'':38}{'limit':>8}{'share':>7} | " + " | ".join(f"{title:55}" for title in titles).rstrip())
    for name, candidates, tensors, n_bytes, flops in rows:
        pairs = {c: forward_and_backward(f, tensors) for c, f in candidates.items()}
        columns = [timed({c: pair[i] for c, pair in pairs.items()}) for i in range(1 + gradients)]
        spent = columns[-1]
        columns.append({c: called(pairs[c][gradients]) for c, ms in spent.items() if ms < 3})
        if gradients:
            columns.append({c: memory(candidates[c], tensors) / 2 ** 30 for c, ms in spent.items() if ms < 20})
        limit = 1e3 * max(n_bytes / rates[0], flops / rates[1])
        print(f"{name:38}{limit:8.3f}{limit / next(iter(columns[0].values())):7.0%} | "
              + " | ".join(f"{line_of(times):55}" for times in columns).rstrip(), flush=True)

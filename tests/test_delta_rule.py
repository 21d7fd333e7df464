"""The delta rule's kernels against their twin, the twin against the lesson."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import check_close
from test_kernels import DEVICE, DTYPES, GPU, check_kernel, random

from kernels import delta_rule
from kernels.tiles import in_one_piece

linear = importlib.import_module("02_linear_attention")
KINDS = ("none", "scalar", "vector")
LENGTHS = (1, 2, 63, 64, 65, 130)


def tensors_of(kind, t, d=16, e=24, b=1, h=2, strength=1.0, largest=2.0):
    """q, k, v, g, beta, state: keys of length 1, beta up to `largest`, g of size `strength`."""
    q, k, v, S, beta, g = random((b, h, t, d), (b, h, t, d), (b, h, t, e), (b, h, d, e), (b, h, t, 1),
                                 (b, h, t, d if kind == "vector" else 1))
    return q, F.normalize(k, dim=-1), v, None if kind == "none" else -strength * g.abs(), largest * beta.sigmoid(), S


def check_against_lesson(tensors, tolerance=2e-5, in_16_bits=0.1, dtypes=DTYPES):
    """The twin is the lesson's recurrence, the kernel is the twin. (0.1 is for g's gradient.)"""
    for a, b in zip(delta_rule.reference(*tensors), linear.delta_recurrent(*tensors), strict=True):
        check_close(a, b, 1e-11, "the twin and the lesson")
    check_kernel(delta_rule.delta_rule, delta_rule.reference, tensors, tolerance, in_16_bits, dtypes)


def test_a_decay_of_exactly_nothing_has_its_gradient():
    """g = 0 at some tokens: the exponents of a chunk's cuts are 0 there, which is no place to bend."""
    torch.manual_seed(0)
    q, v = (torch.randn(1, 1, 20, 4, dtype=torch.float64) for _ in range(2))
    k = F.normalize(torch.randn(1, 1, 20, 4, dtype=torch.float64), dim=-1)
    g = -torch.rand(1, 1, 20, 4, dtype=torch.float64) * (torch.arange(20) % 3 > 0)[:, None]
    tensors = [x.requires_grad_() for x in (q, k, v, g, torch.rand(1, 1, 20, 1, dtype=torch.float64))]
    found, wanted = (torch.autograd.grad(f(*tensors)[0].sin().sum(), tensors)
                     for f in (delta_rule.reference, linear.delta_recurrent))
    for a, b, name in zip(found, wanted, "qkvg", strict=False):
        assert (a - b).abs().max() < 1e-10, name


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_delta_rule(kind, t):
    *tensors, S = tensors_of(kind, t, b=2 if t < 60 else 1)
    check_against_lesson((*tensors, S if t != 64 else None))


@pytest.mark.skipif(not GPU, reason="takes minutes in the interpreter")
@pytest.mark.parametrize("kind", KINDS)
def test_many_heads(kind):
    check_against_lesson(tensors_of(kind, 70, 64, 64, b=16, h=20))


@pytest.mark.parametrize("kind, d, e", [("scalar", 80, 64), ("vector", 128, 24), ("vector", 16, 130), ("none", 33, 65)])
def test_delta_rule_of_any_width(kind, d, e):
    check_against_lesson(tensors_of(kind, 70, d, e, h=1))


@pytest.mark.parametrize("kind", KINDS)
def test_delta_rule_in_the_chunks_of_16_bits(monkeypatch, kind):
    settings = delta_rule.settings

    def of_64(*args):
        sizes, walk, (heads, _) = settings(*args)
        return sizes | {"C": 64, "LEVELS": 6}, walk | {"C": 64, "BE": 64}, (heads, -(-args[0].shape[1] // 64))
    monkeypatch.setattr(delta_rule, "settings", of_64)
    for t in (64, 130):
        check_kernel(delta_rule.delta_rule, delta_rule.reference, tensors_of(kind, t, h=1), in_16_bits=0.1)


@pytest.mark.parametrize("strength", [1e-6, 30.0, 1e4])
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_gates_near_0_and_strong_ones(kind, strength):
    """Every third gate is of this strength, the others are small: what is small must not be lost behind what is
    large."""
    q, k, v, g, beta, S = tensors_of(kind, 70, h=1, strength=0.1)
    g[:, :, ::3] *= 10 * strength
    check_against_lesson((q, k, v, g, beta, S), 1e-3 if strength > 1e3 else 5e-5)


@pytest.mark.parametrize("strength, level", [(1.0, 4), (4.0, 4), (6.0, 3), (12.0, 2), (1e4, 2)])
def test_a_chunk_is_cut_as_often_as_its_gates_ask(monkeypatch, strength, level):
    """One cut in the middle where a half decays by less than e^72; where a channel decays faster, cuts down to blocks
    whose halves do not."""
    chunks, lowest = delta_rule.chunks, []

    def seen(*args):
        results = chunks(*args)
        lowest.append(results[1].unique().tolist())
        return results
    monkeypatch.setattr(delta_rule, "chunks", seen)
    q, k, v, g, beta, S = tensors_of("vector", 64, h=1, strength=0.1)
    g[:, :, :, 3] = -strength
    check_against_lesson((q, k, v, g, beta, S), 2e-4)
    assert lowest[0] == [level]


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_the_same_key_again_and_again(beta):
    """(1 + A)^-1 has entries of 1 and 2 then, but A's powers grow to 10^18. (At 2 nothing is ever forgotten, no
    rounding either: in bfloat16 the twin is up to 0.26 off, and the kernel's gradient of the first state is lost.)"""
    q, k, v, _, beta_like, S = tensors_of("none", 64, h=1)
    check_against_lesson((q, k[:, :, :1].expand_as(k).clone(), v, None, torch.full_like(beta_like, beta), S), 5e-5,
                         dtypes=DTYPES if beta < 2 else (torch.float32,))


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_carries_on(kind):
    *tensors, S = (x if x is None else x.float().to(DEVICE) for x in tensors_of(kind, 100))
    whole, end = delta_rule.delta_rule(*tensors, S)
    parts = []
    for i in (slice(0, 37), slice(37, 99), slice(99, 100)):
        o, S = delta_rule.delta_rule(*(x if x is None else x[:, :, i] for x in tensors), S)
        parts.append(o)
    check_close(torch.cat(parts, dim=2), whole, 1e-5, "in parts and at once")
    check_close(S, end, 1e-5, "the states")


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_a_gradient(kind):
    def second(f, tensors):
        tensors = [x if x is None else x.to(DEVICE, torch.float32).requires_grad_() for x in tensors]
        wanted = [x for x in tensors if x is not None]
        o, S = f(*tensors)
        first = torch.autograd.grad(o.square().sum() + S.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), wanted)
    tensors = tensors_of(kind, 40, h=1)
    for a, b in zip(*(second(f, tensors) for f in (delta_rule.delta_rule, linear.delta_recurrent)), strict=True):
        check_close(a, b, 1e-3, "second gradients")


def test_gradients_of_some_inputs():
    q, k, v, g, beta, _ = (x.float().to(DEVICE) for x in tensors_of("scalar", 40, h=1))
    v.requires_grad_()
    o, _ = delta_rule.delta_rule(q, k, v, g, beta)
    exact, _ = linear.delta_recurrent(q, k, v, g, beta)
    for create_graph in (False, True):
        dv, = torch.autograd.grad(o.sum(), v, retain_graph=True, create_graph=create_graph)
        check_close(dv, torch.autograd.grad(exact.sum(), v, retain_graph=True)[0], 1e-4, "dv")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d, e", [(16, 16), (24, 80), (128, 128)])
def test_a_step(kind, d, e):
    tensors = [x if x is None else x.float().to(DEVICE) for x in tensors_of(kind, 1, d, e, b=2)]
    before = tensors[-1].clone()
    o, S = delta_rule.delta_step(*(x if x is None else x[:, :, 0] for x in tensors[:-1]), tensors[-1])
    exact_o, exact_S = linear.delta_recurrent(*tensors)
    check_close(o, exact_o[:, :, 0], 1e-5, "o")
    check_close(S, exact_S, 1e-5, "the state")
    assert torch.equal(before, tensors[-1])


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda"])
def test_the_lessons_form_is_the_kernel(monkeypatch, name):
    """Of a text from the start and of one that goes on; a single token is the step."""
    seen = []
    for f in (delta_rule.delta_rule, delta_rule.delta_step):
        monkeypatch.setattr(delta_rule, f.__name__, lambda *x, f=f: seen.append(f.__name__) or f(*x))
    monkeypatch.setattr(linear, "pick_form", lambda mixer, x, form=None: form or "triton")
    mixer, x = linear.MIXERS[name](32, n_heads=2).to(DEVICE), torch.randn(1, 6, 32, device=DEVICE)
    mixer(x, "triton").sum().backward()
    with torch.no_grad():
        _, state = mixer.prefill(x[:, :3])
        _, state = mixer.prefill(x[:, 3:5], state)
        mixer.step(x[:, 5], state)
    assert seen == ["delta_rule"] * 3 + ["delta_step"]


def test_nothing_is_copied_where_heads_are_64_wide():
    x = torch.randn(2, 40, 3, 64)
    assert in_one_piece(x.transpose(1, 2), 64).data_ptr() == x.data_ptr()


def test_what_does_not_fit_is_named():
    q, k, v, _, beta, _ = (x if x is None else x.float() for x in tensors_of("none", 4, 160, 16))
    with pytest.raises(ValueError, match="up to 128"):
        delta_rule.delta_rule(q, k, v, None, beta)
    with pytest.raises(ValueError, match="q of torch.float64"):
        delta_rule.delta_rule(q.double(), k, v, None, beta)


LAUNCH = """
import torch
from test_launches import watch
asked = watch({capability})
from kernels.delta_rule import delta_rule
for d in (64, 128):
    for dtype in (torch.bfloat16, torch.float32):
        for channels, h in ((1, 2), (1, 300), (d, 2)):
            q, k, v = (torch.zeros(1, h, 70, d, dtype=dtype, requires_grad=True) for _ in range(3))
            o, S = delta_rule(q, k, v, torch.zeros(1, h, 70, channels), torch.zeros(1, h, 70, 1))
            torch.autograd.grad(o.sum(), q)
print(len(asked), max(asked, key=lambda launch: launch[1])[1])
"""


@pytest.mark.parametrize("capability, room", [(80, 166912), (89, 101376)])
def test_launches_find_room(capability, room, tmp_path):
    """The shared memory that they ask for on smaller GPUs, as in test_launches."""
    here = Path(__file__).parent
    env = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    result = subprocess.run([sys.executable, "-c", LAUNCH.format(capability=capability)], env=env, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    launches, most = map(int, result.stdout.split())
    assert launches == 90 and 0 < most <= room, f"{launches} launches, of up to {most} bytes"


@pytest.mark.skipif(not GPU, reason="errors of 16 bits are those of a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, d, strength", [("none", 64, 0.0), ("none", 128, 0.0), ("scalar", 64, 0.1),
                                               ("scalar", 64, 3.0), ("scalar", 128, 0.1), ("vector", 64, 0.1),
                                               ("vector", 64, 3.0), ("vector", 128, 0.1)])
def test_errors_in_16_bits_are_the_twins(kind, d, strength, dtype):
    """A long text; every gradient at most three times as far off as the twin's. (In float16 a decay of each channel is
    taken in bfloat16, which has the range.)"""
    from test_kernels import values_and_gradients
    tensors = [x if x is None else x.to(dtype).double() if i < 3 else x.float().double() for i, x in
               enumerate(tensors_of(kind, 2048, d, d, h=2, strength=strength, largest=1.0))]

    def in_16_bits(f):
        def called(q, k, v, *more):
            o, S = f(q.to(dtype), k.to(dtype), v.to(dtype), *(x if x is None else x.float() for x in more))
            return o, S
        return [x for x in values_and_gradients(called, tensors, torch.float64, DEVICE)]
    exact = values_and_gradients(delta_rule.reference, tensors, torch.float64, DEVICE)
    for i, (a, b, x) in enumerate(zip(in_16_bits(delta_rule.delta_rule), in_16_bits(delta_rule.reference), exact,
                                      strict=True)):
        mine, twins = ((y - x).norm() / x.norm() for y in (a, b))
        assert mine <= max(3 * twins, 2 ** -7 if kind == "vector" and dtype == torch.float16 else 2 ** -8), (
            f"result {i}: {mine:.1e}, the twin {twins:.1e}")

"""What a user of the mixers meets that no equation says: gradients of gradients, extreme parameters, devices without
float64, saving a whole model, another default dtype, NaN in the padding."""
import contextlib
import importlib
import inspect
import io

import pytest
import torch
from harness import MIXERS, check_close, cut, inputs, make, plain_forms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LESSONS = [importlib.import_module(name) for name in (
    "01_attention", "02_linear_attention", "03_ssm", "04_based", "05_jrt")]


# ------------------------------------------------------------------------------------------- a gradient of a gradient


def gradient_penalty(f, x, wanted):
    """d/d wanted of |df/dx|^2, for a fixed function of f(x)."""
    y = f(x)
    y = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()).sum()
    (g,) = torch.autograd.grad(y, [x], create_graph=True)
    return torch.autograd.grad(g.square().sum(), wanted, allow_unused=True) if g.requires_grad else [None] * len(wanted)


@pytest.mark.parametrize("name", MIXERS)
def test_a_gradient_of_the_gradient_is_right_in_every_form(name):
    """By torch.autograd.grad, which walks round an error that .backward() would meet. Against finite differences of the
    gradient, along a random direction."""
    mixer = make(name)
    x, extras = inputs(mixer, 9, b=1)
    x.requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    results = {}
    for form in plain_forms(mixer):
        def f(z, form=form):
            return mixer(z, form, **extras)
        (found,) = gradient_penalty(f, x, [x])                   # None: f is linear in x
        results[form] = torch.zeros(()).double() if found is None else (found * direction).sum()

        def penalty(z, f=f):
            z = z.detach().requires_grad_()
            y = f(z)
            y = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()).sum()
            return torch.autograd.grad(y, [z])[0].square().sum()
        step = 1e-5
        exact = (penalty(x + step * direction) - penalty(x - step * direction)) / (2 * step)
        size = exact.abs().clamp(min=1)
        check_close(results[form][None] / size, exact[None] / size, 1e-4, f"{name}, {form}")


@pytest.mark.parametrize("window", [None, 64])
def test_attention_in_blocks_can_be_differentiated_twice(window):
    """300 tokens, more than one tile, and the form that is chosen by itself."""
    mixer = MIXERS["attention"](16, 2, window=window).double()
    x = torch.randn(1, 300, 16, dtype=torch.float64, requires_grad=True)
    wanted = [x, *mixer.parameters()]
    referee = gradient_penalty(lambda z: mixer(z, "parallel"), x, wanted)
    for form in (None, "chunked"):
        for ours, other in zip(gradient_penalty(lambda z, form=form: mixer(z, form), x, wanted), referee, strict=True):
            check_close(ours, other, 1e-9, str(form))


def test_every_hand_written_gradient_of_the_lessons_is_known_here():
    """FlashAttention: above. Loop: in every recurrent form of lesson 03."""
    functions = {name for lesson in LESSONS for name, entry in vars(lesson).items()
                 if inspect.isclass(entry) and issubclass(entry, torch.autograd.Function)}
    assert functions == {"FlashAttention", "Loop"}


# ------------------------------------------------------------------------------------------------- extreme parameters


@pytest.mark.parametrize("name", MIXERS)
def test_extreme_parameters_leave_outputs_and_gradients_finite(name):
    """Each parameter in turn is moved by 100 up and down, vectors (gates' biases, rates, decays) wholly, a matrix in
    one row; logarithms, which stand for factors, by 15."""
    logarithms = ("log_dt", "log_A_real", "log_real", "nu", "theta", "log_gamma", "log_decay", "A_log", "log_A",
                  "decay", "w", "dt_bias")
    mixer = make(name, torch.float32)
    for p_name, p in mixer.named_parameters():
        for sign in (-1, 1):
            kept = p.detach().clone()
            by = sign * (15 if p_name.split(".")[-1] in logarithms else 100)
            with torch.no_grad():
                (p if p.ndim <= 1 else p[0]).add_(by)
            for form in plain_forms(mixer):
                x, extras = inputs(mixer, 12, dtype=torch.float32)
                x.requires_grad_()
                mixer.zero_grad()
                y = mixer(x, form, **extras)
                assert y.isfinite().all(), (p_name, by, form)
                (y * torch.linspace(-1, 1, y.numel()).view_as(y)).mean().backward()
                for what, q in (("x", x), *mixer.named_parameters()):
                    assert q.grad is None or q.grad.isfinite().all(), (p_name, by, form, what)
            with torch.no_grad():
                p.copy_(kept)


def test_an_average_that_forgets_everything_at_once_has_gradients():
    """EMA's decay 1 - alpha delta with both at 1: a = 0, which has no logarithm."""
    mixer = MIXERS["ema"](8)
    with torch.no_grad():
        mixer.alpha.fill_(40.0)
        mixer.delta.fill_(40.0)
    for form in plain_forms(mixer):
        mixer.zero_grad()
        y = mixer(torch.randn(1, 6, 8), form)
        y.sum().backward()
        assert y.isfinite().all() and all(p.grad.isfinite().all() for p in mixer.parameters()), form


# ------------------------------------------------------------------------------- dtypes, devices, saving, and padding


class NoFloat64(TorchDispatchMode):
    """A device, here the CPU, that has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{function} makes {x.dtype}, which this device has not")
        return result


@pytest.mark.parametrize("name", MIXERS)
def test_a_device_without_float64_is_enough(name, monkeypatch):
    mixer = make(name, torch.float32)
    assert not any(p.dtype == torch.float64 for p in tree_leaves(mixer.state_dict()))
    for lesson in LESSONS:
        if hasattr(lesson, "NO_FLOAT64"):
            monkeypatch.setattr(lesson, "NO_FLOAT64", {"cpu"})
    x, extras = inputs(mixer, 20, dtype=torch.float32)
    with torch.no_grad():
        expected = mixer(x, **extras)
        with NoFloat64():
            for form in plain_forms(mixer):
                check_close(mixer(x, form, **extras), expected, 1e-3, form)
            mixer.matrix(x, **extras)
            if mixer.causal:
                _, state = mixer.prefill(x[:, :9], **cut(extras, slice(0, 9)))
                mixer.step(x[:, 9], state, **cut(extras, 9))


@pytest.mark.parametrize("name", MIXERS)
def test_a_whole_mixer_can_be_saved(name):
    mixer, file = make(name, torch.float32), io.BytesIO()
    torch.save(mixer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)                 # our own file, a moment old
    x, extras = inputs(mixer, 5, dtype=torch.float32)
    check_close(again(x, **extras), mixer(x, **extras), 0.0, name)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", MIXERS)
def test_another_default_dtype(name):
    """Made and run where float64 is the default: as a mixer that is made and then converted."""
    with default_dtype(torch.float64):
        torch.manual_seed(0)
        mixer = MIXERS[name](32).double()
        x, extras = inputs(mixer, 9)
        mixer(x, **extras).sum().backward()
        results = [mixer(x, form, **extras) for form in plain_forms(mixer)]
        mixer.matrix(x, **extras)
        if mixer.causal:
            mixer.step(x[:, 0], mixer.init_state(len(x)), **cut(extras, 0))
    for y in results:
        check_close(y, results[0], 1e-9, name)


@pytest.mark.parametrize("form", ["chunked", "parallel", "recurrent"])
def test_nan_in_the_padding_stays_there(form):
    mixer = MIXERS["attention"](32).double()
    x, real = torch.randn(2, 9, 32, dtype=torch.float64), torch.ones(2, 9, dtype=torch.bool)
    real[0, :3] = False
    clean, results = torch.where(real[..., None], x, 0), []
    for y in (clean, torch.where(real[..., None], x, torch.nan)):
        mixer.zero_grad()
        o = mixer(y, form, real=real)[real]
        o.square().sum().backward()
        results.append((o, mixer.qkv.weight.grad, mixer.prefill(y, real=real)[0][real]))
    for a, b in zip(*results, strict=True):
        check_close(b, a, 1e-12, form)

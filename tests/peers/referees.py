"""Referees: code that nobody wrote for this repository, or a paper's formula, which every form of a mixer is held to.

A referee is a function of p and x. p: the mixer's parameters and buffers by name, nothing else of it, so that a referee
cannot lean on the mixer's own parts; x: (b, t, c), 32 channels wide, 4 heads unless its options say otherwise. It must
be differentiable: gradients for x and for every parameter are compared, too."""
import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from harness import cut, inputs, make, plain_forms

WANTED = Path(__file__).parent.parent / "requirements-peers.txt"
REFEREES = []
ERRORS = {}              # (mixer, who is referee) -> the largest relative error of this run


class Referee(NamedTuple):
    name: str            # of the mixer
    by: str              # whose code, or which equation of which paper
    y: Callable          # (p, x) -> y, and the mixer's extras by name
    needs: tuple         # packages
    options: dict        # with which the mixer is made
    extras: Callable     # t -> what the mixer reads besides x and ids
    tolerance: float
    cached: Callable     # (p, x, s) -> y by the peer's own cache: a prompt of s tokens, then one token after the other
    shortest: int        # tokens that it takes
    gradients: bool      # does it compute in torch?


def referee(*names, by, needs=(), options=None, extras=lambda t: {}, tolerance=1e-9, cached=None,
            shortest=1, gradients=True):
    """Enter a function as the referee of these mixers."""
    def enter(y):
        needed = (needs,) if isinstance(needs, str) else needs
        for name in names:
            REFEREES.append(Referee(name, by, y, needed, options or {}, extras, tolerance, cached, shortest,
                                    gradients))
        return y
    return enter


DISTRIBUTIONS = {"fla": "flash-linear-attention", "s5": "s5-pytorch"}      # where they are not called as their packages


def amiss(package):
    """What is wrong with an installed peer: it is not there, or not of the version that the tests were written for."""
    if importlib.machinery.PathFinder.find_spec(package) is None:
        return f"{package} is not installed"
    name = DISTRIBUTIONS.get(package, package.replace("_", "-"))
    wanted = dict(re.findall(r"^([\w-]+)==([\w.]+)", WANTED.read_text(), re.M)).get(name.lower())
    found = importlib.metadata.version(name) if wanted else None
    return None if found == wanted else f"{name} is {found}, not {wanted}"


def require(*packages):
    """Skip where a peer is not installed, or of another version; fail where all of them must be (in .ci/run)."""
    if wrong := [reason for reason in map(amiss, packages) if reason]:
        reason = f"{', '.join(wrong)}: pip install -r tests/{WANTED.name}"
        (pytest.fail if os.environ.get("PEERS") == "required" else pytest.skip)(reason)


@contextlib.contextmanager
def hidden(*packages):
    """As if these were not installed, for what is imported meanwhile."""
    before = {name: sys.modules.get(name) for name in packages}
    sys.modules.update(dict.fromkeys(packages))
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def peer(name):
    """A module of a package. Without fla in sight: with it, transformers would call its kernels, which want a GPU."""
    with hidden("fla"):
        return importlib.import_module(name)


def file_of(package, path):
    """A single file of a package as a module, without the package's own imports."""
    folder = importlib.machinery.PathFinder.find_spec(package).submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(f"{package}_{path.replace('/', '_')}", Path(folder) / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def in_double():
    """Many a peer turns everything into float32 before it computes. Meanwhile that means float64."""
    float32, single, default = torch.float32, torch.Tensor.float, torch.get_default_dtype()
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32 = torch.float = float32
        torch.Tensor.float = single
        torch.set_default_dtype(default)


def tensors(mixer):
    return dict(mixer.named_parameters()) | dict(mixer.named_buffers())


def outcome(f, mixer, x, gradients=True):
    """f(x), and the gradients of a fixed function of it for x and all of the mixer's parameters."""
    x, named = x.clone().requires_grad_(), dict(mixer.named_parameters())
    y = f(x)
    if not gradients:
        return {"output": y.detach()}
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()).sum()
    gradients = torch.autograd.grad(loss, [x, *named.values()], allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g
                 for g, p in zip(gradients, [x, *named.values()], strict=True)]
    return {"output": y.detach()} | dict(zip(["gradient of x", *(f"gradient of {n}" for n in named)], gradients,
                                             strict=True))


def compare(name, by, got, wanted, tolerance, what):
    """Equal up to tolerance, relative to the largest number wanted where that is above 1. NaN is never close. Counted
    among the referees' errors."""
    assert got.shape == wanted.shape, f"{name}, {what}: {tuple(got.shape)}, but {by} has {tuple(wanted.shape)}"
    if wanted.numel():
        error = (got - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
        assert error <= tolerance, f"{name} is not what {by} says: {what} differs by {error:.1e}"
        ERRORS[name, by] = max(error, ERRORS.get((name, by), 0.0))


def by_steps(mixer, x, s, extras):
    """prefill to s, then token by token."""
    y, state = mixer.prefill(x[:, :s], **cut(extras, slice(0, s)))
    y = [y]
    for i in range(s, x.shape[1]):
        y_t, state = mixer.step(x[:, i], state, **cut(extras, i))
        y.append(y_t[:, None])
    return torch.cat(y, dim=1)


def hold(r, t):
    """Every form of the mixer to its referee at t tokens, in values and all gradients; then prefill and steps."""
    require(*r.needs)
    mixer = make(r.name, **r.options)
    x, extras = inputs(mixer, t)
    extras |= r.extras(t)
    p = tensors(mixer)
    wanted = outcome(lambda x: r.y(p, x, **extras), mixer, x, r.gradients)
    for form in plain_forms(mixer):
        got = outcome(lambda x, form=form: mixer(x, form, **extras), mixer, x)
        for what, value in wanted.items():
            compare(r.name, r.by, got[what], value, r.tolerance, f"{what}, form {form}, {t} tokens")
    if mixer.causal and t > 1 and not r.extras(t):
        with torch.no_grad():
            y = by_steps(mixer, x, t // 2, extras)
            compare(r.name, r.by, y, wanted["output"], r.tolerance, f"prefill and step, {t} tokens")
            if r.cached is not None:
                stepped = r.cached(p, x, t // 2)
                compare(r.name, r.by, y, stepped, r.tolerance, f"prefill and step beside the peer's, {t} tokens")



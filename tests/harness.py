"""What every mixer owes, as functions that assert it. The tests apply them to all MIXERS, and to broken ones."""
import itertools

import torch

import train

MIXERS = train.from_lessons("MIXERS")
TASKS = train.from_lessons("TASKS")
D_MODEL = 32
LENGTHS = (1, 2, 7, 64, 65, 130)


def make(name, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    mixer = MIXERS[name](D_MODEL, **options)
    with torch.no_grad():                    # parameters that start at zero would hide what they multiply
        for p in mixer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return mixer.to(dtype)


def inputs(mixer, t, b=2, dtype=torch.float64, seed=1):
    """x: (b, t, c), and what the mixer reads besides: few token ids, so that they repeat."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, t, D_MODEL, generator=g, dtype=torch.float64).to(dtype)
    more = {"ids": torch.randint(0, 4, (b, t), generator=g)}
    return x, {name: more[name] for name in getattr(mixer, "reads", ()) if name in more}


def cut(extras, *where):
    """The same part of everything that comes with x."""
    return {name: value[(slice(None), *where)] for name, value in extras.items()}


def plain_forms(mixer):
    """The forms in PyTorch; the kernels are tested in test_kernels.py."""
    return [form for form in mixer.forms if form != "triton"]


def check_close(a, b, tolerance, what):
    """Equal up to tolerance, relative to the size of b where that is above 1. NaN is never close."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    gap = (a - b).abs().max().item() / max(1.0, b.abs().max().item())
    assert gap <= tolerance, f"{what}: differ by {gap:.1e}, more than {tolerance:.0e}"


def run(mixer, form, x, extras):
    """The output of a form, and the gradients of a fixed function of it for x and all parameters."""
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    y = mixer(x, form, **extras)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y).sin()).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in mixer.named_parameters()}
    return {"output": y.detach(), "gradient of x": x.grad} | gradients


def check_forms(mixer, t, tolerance=1e-9, dtype=torch.float64):
    """Every form equals every other, in values and all gradients."""
    x, extras = inputs(mixer, t, dtype=dtype)
    results = {form: run(mixer, form, x, extras) for form in plain_forms(mixer)}
    for a, b in itertools.combinations(results, 2):
        assert results[a].keys() == results[b].keys()
        for what in results[a]:
            one, other = results[a][what], results[b][what]
            if one is None or other is None:         # a parameter that this length does not use
                one, other = (torch.zeros(1) if g is None else g.abs().max()[None] for g in (one, other))
            check_close(one, other, tolerance, f"{type(mixer).__name__} t={t}: {what}, {a} and {b}")


def check_split(mixer, t, s, u, tolerance=1e-9):
    """prefill to s, on to u, then step by step to t: what forward gives. Going on from a state leaves it as it was."""
    x, extras = inputs(mixer, t)
    y = mixer(x, **extras)
    y1, s1 = mixer.prefill(x[:, :s], **cut(extras, slice(0, s)))
    y2, s2 = mixer.prefill(x[:, s:u], s1, **cut(extras, slice(s, u)))
    parts, state = [y1, y2], s2
    for i in range(u, t):
        y_t, state = mixer.step(x[:, i], state, **cut(extras, i))
        parts.append(y_t[:, None])
    check_close(torch.cat(parts, 1), y, tolerance, f"{type(mixer).__name__}: prefill {s}, prefill to {u}, steps to {t}")
    again, _ = mixer.prefill(x[:, s:u], s1, **cut(extras, slice(s, u)))
    check_close(again, y2, 0.0, f"{type(mixer).__name__}: a state that was gone on from before")
    state, steps = mixer.init_state(len(x)), []
    for i in range(t):
        y_t, state = mixer.step(x[:, i], state, **cut(extras, i))
        steps.append(y_t)
    check_close(torch.stack(steps, 1), y, tolerance, f"{type(mixer).__name__}: steps from init_state")


def sees_future(mixer, form, t=70, at=40, tolerance=1e-12):
    """Does anything before position `at` move when x (and all that comes with it) changes from there on?"""
    (x, extras), (x2, extras2) = inputs(mixer, t), inputs(mixer, t, seed=2)
    x2 = torch.cat([x[:, :at], 3 * x2[:, at:]], 1)
    extras2 = {name: torch.cat([value[:, :at], extras2[name][:, at:]], 1) for name, value in extras.items()}
    return not ((mixer(x, form, **extras) - mixer(x2, form, **extras2))[:, :at].abs().max() <= tolerance)


def check_matrix(mixer, t, tolerance=1e-9):
    """output(matrix(x) values(x), x) = forward(x); of a causal mixer, nothing above the diagonal."""
    x, extras = inputs(mixer, t)
    M = mixer.matrix(x, **extras)
    assert M.shape[0] == len(x) and M.shape[-2:] == (t, t)
    y = mixer.output(M @ mixer.values(x, **extras), x)
    check_close(y, mixer(x, **extras), tolerance, f"{type(mixer).__name__}: matrix, t={t}")
    if mixer.causal:
        check_close(M.triu(1), torch.zeros_like(M), 0.0, f"{type(mixer).__name__}: matrix above the diagonal")


def floats_in(state):
    """How many floating-point numbers a state holds, however it is put together."""
    if torch.is_tensor(state):
        return state.numel() * (2 if state.is_complex() else state.is_floating_point())
    if isinstance(state, dict):
        return sum(map(floats_in, state.values())) + len(state)      # a count for each n-gram
    return sum(map(floats_in, state)) if isinstance(state, (list, tuple)) else 0

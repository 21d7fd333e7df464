"""Before attention: an LSTM, a linear recurrence with a random A, and the same layer with HiPPO's A.

    python experiments/history.py [--only "LSTM,S4D"] [--jobs 6] [--quick]

Digits, drawn by fonts at changing places, sizes and angles, are read pixel by pixel, 144 tokens, and named after the
last: as sequential MNIST (784), with which the state spaces began, but without a download. Two layers, 32 wide, 1000
steps of 64. One layer (LSSL, lesson 03) with three A: HiPPO's; a random one of the same size, which dt slows down as it
does HiPPO's; and a random one as a plain linear RNN has it, h_t = A h_{t-1} + B u_t. Beside: how much of an input l
steps back each of them still has in its state as it starts. Writes history.csv, .txt and .png.
"""
import functools
import importlib
import pathlib
from contextlib import contextmanager
from unittest.mock import patch

import lab
import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from lab import train
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath

lesson = importlib.import_module("03_ssm")
LEVELS, CHOOSING, SEEDS = 16, 100, (0, 1, 2)
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold",
         "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10")
MODELS = {"HiPPO's A": "lssl:n_state=32", "random A with steps dt": "lssl:n_state=32:random_A=true",
          "linear RNN with random A": "linear_rnn:n_state=32", "S4D": "s4d", "LSTM": "lstm", "Mamba": "mamba",
          "attention": "attention"}
PAPER = {"HiPPO's A": 0.98, "linear RNN with random A": 0.60}                                 # [G22], section 2.2


# ------------------------------------------------------------------------------------------------ two older recurrences


class LSTM(nn.Module):
    """Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000: all gates read the state before, so
    there is no form but the loop. f starts at 1 and more: at first it remembers (Jozefowicz et al. 2015)."""
    forms, causal = ("recurrent",), True

    def __init__(self, d_model, n_heads=None):
        super().__init__()
        self.W, self.U = nn.Linear(d_model, 4 * d_model), nn.Linear(d_model, 4 * d_model, bias=False)
        with torch.no_grad():
            self.W.bias[d_model:2 * d_model] += 1

    def forward(self, x, form=None):
        return self.prefill(x)[0]

    def init_state(self, batch_size):
        zeros = self.U.weight.new_zeros(batch_size, self.U.in_features)
        return zeros, zeros

    def prefill(self, x, state=None):
        """i, f, o = sigmoid(W x_t + U h_{t-1}), g = tanh(of the same), c_t = f c_{t-1} + i g, h_t = o tanh(c_t)"""
        (h, c), y = self.init_state(len(x)) if state is None else state, []
        for Wx in self.W(x).unbind(1):                                                       # (b, 4 c)
            i, f, g, o = (Wx + self.U(h)).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            y.append(h)
        return torch.stack(y, dim=1), (h, c)

    def step(self, x_t, state):
        y, state = self.prefill(x_t[:, None], state)
        return y[:, 0], state

    def state_size(self, t):
        return 2 * self.U.in_features


class LinearRNN(lesson.LSSL):
    """h_t = A h_{t-1} + B u_t, y_t = C h_t + D u_t: LSSL without a step size. A: random, its largest eigenvalue of
    size 1 at first: with a larger one long texts overflow, with a smaller one nothing is left after them."""

    def __init__(self, d_model, n_heads=None, n_state=32):
        super().__init__(d_model, n_state=n_state)
        with torch.no_grad():
            A = torch.randn(n_state, n_state)
            self.A.copy_(A / torch.linalg.eigvals(A).abs().max())
            self.B.copy_(torch.randn(n_state) * n_state ** -0.5)
        self.log_dt = None

    def discrete(self):
        c, n = self.C.shape
        A, B, C = (lesson.at_least_float32(x) for x in (self.A, self.B, self.C))
        return A.expand(c, n, n), B.expand(c, n), C


# -------------------------------------------------------------------------------------------------------- drawn digits


@functools.cache
def glyphs(size=48):
    """Every digit in every font, filled, in the middle of a square: (10, fonts, size, size), 0 or 1."""
    folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    at = (np.arange(size) + 0.5) / size
    places = np.stack(np.meshgrid(at, at[::-1]), axis=-1).reshape(-1, 2)                     # x to the right, y up
    found = np.zeros((10, len(FONTS), size * size), np.float32)
    for digit in range(10):
        for i, name in enumerate(FONTS):
            path = TextPath((0, 0), str(digit), size=1, prop=FontProperties(fname=str(folder / f"{name}.ttf")))
            low, high = path.vertices.min(axis=0), path.vertices.max(axis=0)
            middle, scale = (low + high) / 2, 0.9 / (high - low).max()
            outlines = [Path(outline) for outline in path.to_polygons()]               # those inside are holes
            inside = sum(outline.contains_points((places - 0.5) / scale + middle).astype(int) for outline in outlines)
            found[digit, i] = inside % 2
    return torch.from_numpy(found).view(10, len(FONTS), size, size)


def draw(batch_size, generator=None, size=16):
    """Drawings (b, size, size), from 0 to 1, and the digits (b,): turned by up to 20 degrees, slanted, of 55% to 85% of
    the picture, shifted as far as that leaves room, with noise."""
    def between(low, high, *shape):
        return low + (high - low) * torch.rand(batch_size, *shape, generator=generator)

    digit = torch.randint(10, (batch_size,), generator=generator)
    font = torch.randint(len(FONTS), (batch_size,), generator=generator)
    angle, slant, scale = between(-0.35, 0.35), between(-0.3, 0.3), between(0.55, 0.85)
    shift = between(-1, 1, 2) * (1 - scale[:, None])
    turn = torch.stack([torch.stack([angle.cos(), slant + angle.sin()], -1),
                        torch.stack([-angle.sin(), angle.cos()], -1)], dim=1) / scale[:, None, None]
    where = torch.cat([turn, -(turn @ shift[..., None])], dim=-1)                            # (b, 2, 3)
    grid = F.affine_grid(where, (batch_size, 1, 2 * size, 2 * size), align_corners=False)
    ink = F.avg_pool2d(F.grid_sample(glyphs()[digit, font][:, None], grid, align_corners=False), 2)[:, 0]
    return (ink * between(0.7, 1.0, 1, 1) + 0.08 * torch.randn(ink.shape, generator=generator)).clamp(0, 1), digit


def digits(batch_size=32, generator=None, size=16, vocab_size=LEVELS + 10):
    """The drawings as texts: a grey level a pixel, row by row; asked for after the last is the digit."""
    ink, digit = draw(batch_size, generator, size)
    ids = (ink * (LEVELS - 1)).round().long().flatten(1)
    return ids, torch.full_like(ids, -100).index_fill(1, torch.tensor(size * size - 1), 0) + F.pad(
        (LEVELS + digit)[:, None], (size * size - 1, 0))


@contextmanager
def known():
    """Inside, train.py knows the two mixers and the task by name."""
    with patch.dict(lesson.MIXERS, lstm=LSTM, linear_rnn=LinearRNN), patch.dict(lesson.TASKS, digits=digits):
        yield


# ------------------------------------------------------------------------------------------------------------- measure


def cells(quick, only=None):
    common = {"n_layers": 2, "d_model": 32, "batch_size": 64, "steps": 1000, "warmup": 100}
    size, n, models, lrs, seeds = 12, 20000, MODELS, (3e-3, 1e-2), (CHOOSING, *SEEDS)
    if quick:
        common |= {"d_model": 32, "steps": 60, "warmup": 10}
        size, n, models, lrs, seeds = 10, 2000, list(MODELS)[:3], (3e-3,), (0,)
    return [{"model": name, "mixer": MODELS[name], "task": f"digits:size={size} {n}",
             "test": f"digits:size={size} {n // 10}"} | common | {"lr": lr, "seed": seed}
            for name in (only.split(",") if only else models) for seed in seeds for lr in lrs]


@torch.no_grad()
def remembered(name, t, seed=0, error=1e-3, d_model=64):
    """How much of the input l steps back can be read off the state of the layer as it starts, l = 0 ... t - 1, if each
    of its numbers has an error of 0.1% of its usual size: the share of the variance of white noise that the best linear
    readout explains, 1 for all. The sum over l is the number of inputs that the state keeps apart."""
    torch.manual_seed(seed)
    with known():
        (make, options), = train.pattern(MODELS[name])
    a, b, _ = make(d_model, **options).double().discrete()
    K = lesson.krylov(a, b, t).flatten(0, 1)                                 # h = sum_l K[:, l] u_l: (c n, t)
    K = K / K.norm(dim=1, keepdim=True)
    values, V = torch.linalg.eigh(K.mT @ K)                                  # (t,), (t, t)
    return (V.square() * (values.clamp(min=0) / (values.clamp(min=0) + error ** 2))).sum(dim=1)


def draw_accuracy(ax, results, names):
    for i, name in enumerate(names):
        mean, low, high = results[name,]
        ax.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="o", ms=7, capsize=4, color=f"C{i}")
        ax.annotate(f"{mean:.2f}", (mean, i), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=9)
        if name in PAPER:
            ax.plot(PAPER[name], i, "D", color="gray", mfc="none", label="on sequential MNIST (the S4 paper)"
                    if name == next(n for n in names if n in PAPER) else None)
    ax.axvline(0.1, color="black", lw=0.8, ls=":", label="guessing")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlim=(0, 1.05), ylim=(len(names) - 0.4, -0.7), xlabel="digits named right, drawings never seen before")
    ax.grid(alpha=0.3, axis="x")
    ax.legend(fontsize=8, loc="lower left")


def draw_memory(ax, size, say):
    """The three A: the mean of three seeds, and the smallest and largest."""
    for i, name in enumerate(name for name in MODELS if MODELS[name].startswith(("lssl", "linear_rnn"))):
        kept = torch.stack([remembered(name, size * size, seed) for seed in SEEDS])                  # (seed, l)
        total = kept.sum(dim=1)
        ax.plot(kept.mean(dim=0).numpy(), color=f"C{i}", label=f"{name}: {total.mean():.0f} of {size * size}")
        low, high = kept.amin(dim=0).numpy(), kept.amax(dim=0).numpy()
        ax.fill_between(range(size * size), low, high, color=f"C{i}", alpha=0.2)
        all_of, one = (lab.spread(*(f(x).item() for f in (torch.mean, torch.min, torch.max)), form)
                       for x, form in ((total, ".1f"), (kept[:, 32], ".2f")))
        say(f"{name}: {all_of} of {size * size} inputs kept apart as it starts, and {one} of the one 32 steps back")
    ax.set(xlabel="steps back", ylabel="share of an input that the state gives back", ylim=(-0.02, 1.02),
           title="One layer as it starts: what it remembers")
    ax.legend(fontsize=9)
    ax.grid(alpha=0.3)


if __name__ == "__main__":
    args = lab.options(__doc__, only=("these models, a,b,c", MODELS))
    by, score = ("model",), "val_accuracy"
    with known():
        rows = lab.sweep(args, "history", cells(args.quick, args.only), lab.packed, by, score, pack=4, enough=0.99)
    say, results = lab.reporter(args.out / "history.txt"), lab.best(rows, by, "accuracy", judge=score)
    names = [name for name in MODELS if (name,) in results]
    size = int(rows[0]["task"].split()[0].split("=")[1])
    fig, axes = lab.figure(11, 5.5, rows=2, columns=10, height_ratios=(1, 5))
    for ax, picture in zip(axes[0], draw(10, torch.Generator().manual_seed(5), size)[0], strict=True):
        ax.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1)
    for ax in axes.flat:
        ax.axis("off")
    grid = axes[0, 0].get_gridspec()
    if len(names) > 1:
        draw_accuracy(fig.add_subplot(grid[1, :5]), results, names)
    draw_memory(fig.add_subplot(grid[1, 5 if len(names) > 1 else 0:]), size, say)
    for name in names:
        say(f"{name:26}{lab.spread(*results[name,])}")
    lab.save(fig, args.out / "history.png")

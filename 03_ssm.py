"""Lesson 03. State spaces: one linear system as a loop, as a long convolution, as a scan; gates; selection.

    h_t = a * h_{t-1} + b u_t          a state of n numbers for each channel; here a is diagonal, often complex
    y_t = Re(C h_t) + D u_t

Unrolled, y = K * u with K_l = Re(C a^l b): the same a at all times makes M a Toeplitz matrix, one row shifted along. So
a convolution by FFT trains it in t log t, the loop generates with a state that does not grow, and because a step
h -> a_1 h + b_1 followed by h -> a_2 h + b_2 is again such a step, a scan finds all states in log t rounds. S4, DSS,
S4D, S5, LRU, EMA, SGConv and Hyena differ in how they make K. A Toeplitz M cannot look at the content: gates before and
after (GSS, H3, Hyena) make M_ts = q_t K_{t-s} k_s, and letting a, b, C depend on the token (Mamba, RG-LRU, QRNN, SRU)
gives up the convolution and keeps the scan.

Papers  [G20] Gu et al. 2020, HiPPO  arXiv:2008.07669         [G21]  Gu et al. 2021, LSSL  arXiv:2110.13985
        [G22] Gu et al. 2022, S4  arXiv:2111.00396            [G22b] Gu et al. 2022, S4D  arXiv:2206.11893
        [Gup22] Gupta 2022, DSS  arXiv:2203.14343              [Sm23] Smith et al. 2023, S5  arXiv:2208.04933
        [O23] Orvieto et al. 2023, LRU  arXiv:2303.06349      [Ma23] Ma et al. 2023, MEGA  arXiv:2209.10655
        [L23] Li et al. 2023, SGConv  arXiv:2210.09298        [H23]  Hasani 2023, Liquid-S4  arXiv:2209.12951
        [Me23] Mehta et al. 2023, GSS  arXiv:2206.13947       [W22]  Wang et al. 2022, BiGS  arXiv:2212.10544
        [F23] Fu et al. 2023, H3  arXiv:2212.14052            [P23]  Poli et al. 2023, Hyena  arXiv:2302.10866
        [M23] Massaroli 2023, Laughing Hyena  2310.18780      [F23b]  Fu et al. 2023, Monarch Mixer  2310.12109
        [GD23] Gu, Dao 2023, Mamba  arXiv:2312.00752          [De24] De et al. 2024, Griffin  arXiv:2402.19427
        [B17] Bradbury et al. 2017, QRNN  arXiv:1611.01576    [Le18] Lei et al. 2018, SRU  arXiv:1709.02755

Axes    b batch, t time (target), s source, l lag t - s, c channels, n state dim, k tap of a short filter.

mixer                    what makes K, or a          forms                             state per sequence
s4d s4d_inv s4d_legs dss diagonal A, ZOH             conv recurrent scan parallel      c n (n / 2 complex numbers)
lssl s4                  dense A, bilinear           conv recurrent parallel           c n; 2 c n
s5                       diagonal, mixes channels    recurrent scan parallel           n
lru                      a on a ring                 conv recurrent scan parallel      2 c n
ema                      damped averages             conv recurrent scan parallel      c n
gss                      S4D in a gated bottleneck   conv recurrent scan parallel      c n / 4
h3 modal                 S4D or modes, two gates     conv recurrent scan parallel      c n, and the short filters' past
sgconv                   random, multi-scale         conv parallel                     none: the past inputs, c t
hyena                    an MLP of the position      conv parallel                     none: the past inputs, c t
monarch_mixer            products of polynomials     conv parallel                     none: the past inputs, c t
bigs monarch             (see there)                 conv parallel                     not causal
liquid_s4                a of the token              recurrent scan parallel           c n
mamba                    a, b, C of the token        recurrent chunked scan parallel   2 c n, and 3 inputs of the filter
rglru qrnn sru           a of the token              recurrent scan parallel           c, and the short filter's past
(all but monarch and monarch_mixer also triton: a kernel for the convolution or the scan, the default on a GPU in
bfloat16)

    python 03_ssm.py                  every form against every other, with times; HiPPO's reconstruction errors
    python 03_ssm.py --plot FILE.png  mixing matrices, kernels at initialisation, HiPPO's reconstruction
"""
import argparse
import math
import os
import time
from pathlib import Path
from random import Random

import torch
import torch.nn as nn
import torch.nn.functional as F

KERNELS = Path(__file__).with_name("kernels").is_dir()       # a lesson also runs alone, without its kernels

# --------------------------------------------------------------------------------------- one linear system, three ways


def fft_conv(u, K):
    """y_t = sum_{s <= t} K_{t-s} u_s. u: (b, c, t), K: (c, t). Padded to 2t, so that nothing wraps around; float32 or
    better."""
    n = 2 * u.shape[-1]
    U, V = (torch.fft.rfft(at_least_float32(x), n=n) for x in (u, K))
    return torch.fft.irfft(U * V, n=n)[..., :u.shape[-1]].to(u.dtype)


def triton_conv(u, kernel, pre=None, post=None):
    """post * (K * (pre * u)), K = kernel(t), as matrix products, on a GPU: kernels/fft_conv.py. u, pre and post in the
    dtype of autocast, if it is on; K as ever without it."""
    from kernels.fft_conv import fft_conv
    autocast = u.is_cuda and torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else u.dtype
    u, pre, post = (x if x is None else x.to(dtype) for x in (u, pre, post))
    with torch.autocast(u.device.type, enabled=False):
        return fft_conv(u, kernel(u.shape[-1]), pre, post)


def toeplitz(K):
    """The matrix of that convolution, T_ts = K_{t-s} for s <= t: (c, t) -> (c, t, s)."""
    t = torch.arange(K.shape[-1], device=K.device)
    return K[:, (t[:, None] - t).clamp(min=0)].tril()


def scan(a, b):
    """h_t = a_t h_{t-1} + b_t along axis 2 by doubling [HS86]: log t rounds, sums of 2^j terms."""
    n = 1
    while n < b.shape[2]:
        pad = (0, 0) * (b.ndim - 3) + (n, -n)
        b, a = b + a * F.pad(b, pad), a * F.pad(a, pad)
        n *= 2
    return b


def scan_from(a, b, h=None):
    """The same from a state h, without the time axis."""
    return scan(a, b if h is None else torch.cat([b[:, :, :1] + (a[:, :, 0] * h)[:, :, None], b[:, :, 1:]], dim=2))


class Loop(torch.autograd.Function):
    """The gradient of a recurrence is one too, backwards: G_t = dh_t + a*_{t+1} G_{t+1}, and db_t = G_t, da_t = G_t
    h*_{t-1} (*: conjugate). Autograd would find the same, but add up a tensor of all steps at every step."""

    @staticmethod
    def forward(ctx, a, b, h):
        states = torch.empty_like(b)
        ctx.save_for_backward(a, states, h)
        for t in range(b.shape[2]):
            h = torch.addcmul(b[:, :, t], a[:, :, t], h, out=states[:, :, t])
        return states

    @staticmethod
    def backward(ctx, dh):
        a, states, h = ctx.saved_tensors
        G, later = torch.empty_like(states), torch.zeros_like(h)
        for t in reversed(range(states.shape[2])):
            torch.add(dh[:, :, t], later, out=G[:, :, t])
            later = a[:, :, t].conj() * G[:, :, t]
        before = torch.cat([h[:, :, None], states[:, :, :-1]], dim=2)
        return G * before.conj(), G, later


def loop(a, b, h=None):
    """The same one step at a time: on a CPU the fastest, for a step's numbers stay in the cache."""
    return Loop.apply(a, b, torch.zeros_like(b[:, :, 0]) if h is None else h)


def chunks(a, b, h=None, chunk=32):
    """The same by scans of a chunk, and a loop from chunk to chunk: fewer rounds, and memory for one scan only."""
    out = []
    for i in range(0, b.shape[2], chunk):
        out.append(scan_from(a[:, :, i:i + chunk], b[:, :, i:i + chunk], h))
        h = out[-1][:, :, -1]
    return torch.cat(out, dim=2)


def triton_scan(a, b, h=None):
    """The same in one pass over memory, on a GPU: kernels/scan.py."""
    from kernels.scan import scan
    return scan(a.movedim(2, -1), b.movedim(2, -1), h)[0].movedim(-1, 2)


# A continuous system h' = A h + B u, diagonal A, sampled at steps dt, as (log a, b). Elementwise; Re A < 0.


def zoh(A, dt):
    """Zero-order hold, exact for inputs constant over a step: a = e^{dt A}, b = (e^{dt A} - 1) / A."""
    return dt * A, torch.expm1(dt * A) / A


def bilinear(A, dt):
    """Trapezoidal rule: a = (1 + dt A / 2) / (1 - dt A / 2), b = dt / (1 - dt A / 2)."""
    return torch.log((1 + dt * A / 2) / (1 - dt * A / 2)), dt / (1 - dt * A / 2)


def euler(A, dt):
    """What Mamba does to B: a = e^{dt A}, but b = dt."""
    return dt * A, dt + 0 * A


# --------------------------------------------------------------------------------------------------------------- HiPPO


def hippo_legs(n):
    """HiPPO-LegS [G20, eq. 29]: A, B of the system whose state are the Legendre coefficients of the whole past."""
    q = torch.arange(n, dtype=torch.float64)
    root = (2 * q + 1).sqrt()
    A = -(root[:, None] * root).tril(-1) - torch.diag(q + 1)
    return A, root


def hippo_legt(n):
    """HiPPO-LegT [G20, eq. 1, with the scaling of the S4 code]: a sliding window of length 1, in Legendre
    polynomials."""
    q = torch.arange(n, dtype=torch.float64)
    root = (2 * q + 1).sqrt()
    sign = (-1.0) ** (q[:, None] - q)
    return -(root[:, None] * root) * torch.where(q[:, None] >= q, 1.0, sign), root


def hippo_fout(n):
    """HiPPO-FouT [G22c, theorem 7]: a sliding window of length 1
    in the Fourier basis 1, sqrt2 sin 2 pi x, sqrt2 cos 2 pi x, sqrt2 sin 4 pi x, ...: A, B."""
    B = torch.full((n,), 2.0, dtype=torch.float64)               # cosines weigh 2, sines 0, the constant sqrt 2
    B[1::2], B[0] = 0.0, 2 ** 0.5
    A = -B[:, None] * B
    for sine in range(1, n - 1, 2):
        turn = math.pi * (sine + 1)                              # 2 pi times the frequency (sine + 1) / 2
        A[sine, sine + 1], A[sine + 1, sine] = A[sine, sine + 1] + turn, A[sine + 1, sine] - turn
    return A, B


def legendre(n, x):
    """sqrt(2k + 1) P_k(2x - 1), k < n, on 0 <= x <= 1, by the three-term recurrence: (n, len x), orthonormal."""
    z, P = 2 * x - 1, [torch.ones_like(x), 2 * x - 1]
    for k in range(1, n - 1):
        P.append(((2 * k + 1) * z * P[k] - k * P[k - 1]) / (k + 1))
    return torch.stack(P[:n]) * (2 * torch.arange(n, dtype=x.dtype) + 1).sqrt()[:, None]


def hippo_online(u, n):
    """Feed a signal u: (t,) through LegS, h' = A h / t + B u / t, [G20, theorem 2], bilinear: the state after the last
    step. (The paper's eq. 4 takes Euler steps.)"""
    A, B = hippo_legs(n)
    h, one = torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    for k in range(1, len(u) + 1):
        right = h + A @ h / (2 * k) + B * u[k - 1] / k
        h = torch.linalg.solve_triangular(one - A / (2 * k), right[:, None], upper=False)[:, 0]
    return h


def reconstruct(h, t):
    """The past that the state h remembers: sum_k h_k sqrt(2k + 1) P_k at t points."""
    x = (torch.arange(t, dtype=torch.float64) + 0.5) / t
    return h @ legendre(len(h), x)


def smooth_signal(t, seed=0):
    """White noise through a low-pass filter of second order, from 3 periods on; of standard deviation 1, from 0 on."""
    g = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft(torch.randn(t, generator=g, dtype=torch.float64))
    u = torch.fft.irfft(spectrum / (1 + (torch.arange(t // 2 + 1) / 3) ** 2), n=t)
    return (u - u[0]) / u.std()


# Diagonal A for S4D [G22b, section 4]: n / 2 eigenvalues of positive imaginary part, the others are their conjugates.


def s4d_lin(n):
    """-1/2 + i pi k"""
    return torch.complex(torch.full((n // 2,), -0.5), math.pi * torch.arange(n // 2))


def s4d_inv(n):
    """-1/2 + i (n / pi) (n / (2k + 1) - 1)"""
    return torch.complex(torch.full((n // 2,), -0.5), n / math.pi * (n / (2 * torch.arange(n // 2) + 1) - 1))


def s4d_legs(n):
    """The eigenvalues of HiPPO-LegS + P P^T, P = sqrt(k + 1/2): the normal part of A."""
    P = (torch.arange(n, dtype=torch.float64) + 0.5).sqrt()
    z = torch.linalg.eigvals(hippo_legs(n)[0] + P[:, None] * P)
    return z[z.imag > 0][z[z.imag > 0].imag.argsort()].to(torch.complex64)


DIAGONALS = {"lin": s4d_lin, "inv": s4d_inv, "legs": s4d_legs}


# ------------------------------------------------------------------------------------------------------ shared helpers


def pick_form(mixer, x, form=None):
    """The form to run: the one asked for, or the fastest on x's device. Raises ValueError if the mixer lacks it, if it
    cannot run there, or if x is not (b, t, c) with t >= 1."""
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be (batch, time, width) with at least one of each, not {tuple(x.shape)}")
    if form is None:
        autocast = x.dtype == torch.float32 and torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype    # float16 could not hold a long text's sums
        fast = x.is_cuda and dtype == torch.bfloat16 and KERNELS and "triton" in mixer.forms
        if fast and x.shape[1] <= getattr(mixer, "longest", x.shape[1]):
            return "triton"
        slow = ("recurrent",) if x.is_cuda or torch.compiler.is_compiling() else ()      # many launches, or much code
        return ([form for form in mixer.forms if form not in slow] or mixer.forms)[0]
    if form not in mixer.forms:
        raise ValueError(f"{type(mixer).__name__} has no form {form!r}; it has {', '.join(mixer.forms)}")
    if form == "triton" and (x.dtype == torch.float64 or not (x.is_cuda or os.environ.get("TRITON_INTERPRET"))):
        raise ValueError("the form 'triton' needs a GPU (or TRITON_INTERPRET=1, to try it), and does not do float64")
    return form


def at_least_float32(x):
    return x if x.is_complex() else x.to(torch.promote_types(x.dtype, torch.float32))


def linear(d_in, d_out, bias=False):
    return nn.Linear(d_in, d_out, bias=bias)


def slow(*parameters):
    """Mark parameters of a state space: train.py gives them a small learning rate and no weight decay."""
    for p in parameters:
        p.optim = {"lr": 1e-3, "weight_decay": 0.0}


def log_uniform(*shape, low=1e-3, high=1e-1):
    return torch.empty(*shape).uniform_(math.log(low), math.log(high))


class ShortConv(nn.Module):
    """A causal filter of `width` taps for each channel. x: (b, c, t), and the width - 1 inputs before it."""

    def __init__(self, channels, width, bias=False):
        super().__init__()
        self.width = width
        self.conv = nn.Conv1d(channels, channels, width, groups=channels, bias=bias)

    def forward(self, x, past):
        x = torch.cat([past.to(x.dtype), x], dim=2)
        return self.conv(x), x[..., x.shape[2] - self.width + 1:]

    def init_carry(self, batch_size):
        return self.conv.weight.new_zeros(batch_size, self.conv.in_channels, self.width - 1)


# ----------------------------------------------------------------------------------------------- time-invariant mixers


class ConvMixer(nn.Module):
    """y = post * (K * (pre * v)), channel by channel: what all time-invariant mixers here share. A mixer defines

    kernel(t)         -> K: (c, t), with D in its first tap
    project(x, carry) -> v: (b, c, t), pre and post (the same shape, or None), carry: what projecting needs of the past
    finish(y, x)      -> (b, t, c)

    M_ts = post_t K_{t-s} pre_s. Without a finite state, prefill and step keep all inputs u = pre v and sum over
    them."""
    forms = ("conv", "parallel", "triton")
    causal = True
    longest = 2 ** 17        # that the kernel takes

    def project(self, x, carry):
        return x.mT, None, None, carry

    def finish(self, y, x):
        return self.out(F.gelu(y.mT))

    def init_carry(self, batch_size):
        return next(self.parameters()).new_zeros(batch_size, 0)

    def convolve(self, form, u):
        K = at_least_float32(self.kernel(u.shape[-1]))
        if form == "conv":
            return fft_conv(u, K)
        return (toeplitz(K) @ u[..., None])[..., 0]

    def run(self, x, carry, inner):
        """project, inner(u) -> y, after, finish; outside autocast where the system runs."""
        v, pre, post, carry = self.project(x, carry)
        with torch.autocast(x.device.type, enabled=False):
            v, pre, post = (z if z is None else at_least_float32(z) for z in (v, pre, post))
            y, after = inner(v if pre is None else pre * v)
            y = y if post is None else post * y
        return self.finish(y.to(x.dtype), x), (carry, after)

    def forward(self, x, form=None):
        form = pick_form(self, x, form)
        if form == "triton":
            v, pre, post, _ = self.project(x, self.init_carry(len(x)))
            return self.finish(triton_conv(v, self.kernel, pre, post), x)
        return self.run(x, self.init_carry(len(x)), lambda u: (self.convolve(form, u), None))[0]

    def init_state(self, batch_size):
        like = at_least_float32(next(self.parameters()))
        return self.init_carry(batch_size), like.new_zeros(batch_size, self.channels, 0)

    def prefill(self, x, state=None):
        pick_form(self, x)
        carry, past = self.init_state(len(x)) if state is None else state

        def inner(u):
            both = torch.cat([past.to(u.dtype), u], dim=-1)
            return self.convolve("conv", both)[..., past.shape[-1]:], both
        return self.run(x, carry, inner)

    def step(self, x_t, state):
        carry, past = state

        def inner(u):
            both = torch.cat([past.to(u.dtype), u], dim=-1)                          # y_t = sum_s K_{t-s} u_s
            K = at_least_float32(self.kernel(both.shape[-1])).flip(-1)
            return (K * both).sum(dim=-1, keepdim=True), both
        y, state = self.run(x_t[:, None], carry, inner)
        return y[:, 0], state

    def values(self, x):
        return self.project(x, self.init_carry(len(x)))[0][..., None]                # (b, c, s, 1)

    def output(self, o, x):
        return self.finish(o[..., 0], x)

    def matrix(self, x):
        _, pre, post, _ = self.project(x, self.init_carry(len(x)))
        M = toeplitz(at_least_float32(self.kernel(x.shape[1])))[None]                # (1, c, t, s)
        M = M if pre is None else M * pre[:, :, None, :]
        return (M if post is None else M * post[..., None]).expand(len(x), -1, -1, -1)

    def state_size(self, t):
        return self.channels * t + self.init_carry(1).numel()


class DiagonalMixer(ConvMixer):
    """A time-invariant mixer with a diagonal state: discrete() -> log a, b, C: (c, n) each, D: (c,), Re(log a) <= 0,
    and y_t = Re(C h_t) + D u_t with h_t = a h_{t-1} + b u_t. Hence K_l = Re(C a^l b), and two forms more."""
    forms = ("conv", "recurrent", "scan", "parallel", "triton")

    def powers(self, t, step=1):
        """a^0, a^step, ..., t of them: (c, n, t)"""
        log_a = self.discrete()[0]
        return torch.exp(log_a[..., None] * (step * torch.arange(t, device=log_a.device)))

    def kernel(self, t):
        """With l = m i + j, K_l = Re sum_n (C b a^{m i}) a^j: two short tables of powers instead of a long one."""
        _, b, C, D = self.discrete()
        m = math.ceil(t ** 0.5)
        K = ((C * b)[..., None] * self.powers(-(-t // m), m)).mT @ self.powers(m)            # (c, i, j)
        return K.real.flatten(1)[:, :t] + F.pad(D[:, None], (0, t - 1))

    def convolve(self, form, u):
        if form in ("conv", "parallel"):
            return super().convolve(form, u)
        return self.states(u, scan_from if form == "scan" else loop)[0]

    def states(self, u, how, h=None):
        """y, and the state after it, by going through all states."""
        log_a, b, C, D = self.discrete()
        bu = b[:, None] * u[..., None]                                               # (b, c, t, n)
        h = how(torch.exp(log_a)[:, None].expand_as(bu), bu, h)
        return (h * C[:, None]).sum(dim=-1).real + D[:, None] * u, h[:, :, -1]

    def init_state(self, batch_size):
        b = self.discrete()[1]
        return self.init_carry(batch_size), torch.zeros(batch_size, *b.shape, dtype=b.dtype, device=b.device)

    def prefill(self, x, state=None):
        """The block by convolution; the state before it enters as C a^{l+1} h, the state after it is sum_s a^{t-1-s}
        b u_s."""
        pick_form(self, x)
        carry, h = self.init_state(len(x)) if state is None else state

        def inner(u):
            log_a, b, C, _ = self.discrete()
            powers, a = self.powers(u.shape[-1]), torch.exp(log_a)
            y = self.convolve("conv", u) + torch.einsum("bcn,cnt->bct", C * a * h, powers).real
            after = torch.einsum("cnt,bct->bcn", b[..., None] * powers.flip(-1), u.to(powers.dtype))
            return y, after + a * powers[..., -1] * h
        return self.run(x, carry, inner)

    def step(self, x_t, state):
        y, state = self.run(x_t[:, None], state[0], lambda u: self.states(u, loop, state[1]))
        return y[:, 0], state

    def state_size(self, t):
        b = self.discrete()[1]
        return b.numel() * (2 if b.is_complex() else 1) + self.init_carry(1).numel()


class GLU(nn.Module):
    """The output of an S4 layer: one linear layer gates another."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.linear = linear(d_in, 2 * d_out, bias=True)

    def forward(self, y):
        return F.glu(self.linear(y), dim=-1)


class S4D(DiagonalMixer):
    """S4D [G22b]: A = -e^alpha + i beta for each channel and half of the n states, zero-order hold, B = 1 in C. init:
    where the eigenvalues start, lin, inv or legs. dt: seconds a step, log-uniform at first. GELU and a gated linear
    layer after."""
    init = "lin"

    def __init__(self, d_model, n_heads=None, n_state=64, init=None):
        super().__init__()
        if n_state < 2 or n_state % 2:
            raise ValueError(f"n_state {n_state} is not an even number above 0: states come in conjugate pairs")
        if (init or self.init) not in DIAGONALS:
            raise ValueError(f"unknown init {init!r}; there are {', '.join(DIAGONALS)}")
        self.channels = d_model
        self.make_system(d_model, DIAGONALS[init or self.init](n_state))
        self.out = GLU(d_model, d_model)

    def make_system(self, c, A):
        A = A.expand(c, -1)
        self.log_dt = nn.Parameter(log_uniform(c))
        self.log_A_real, self.A_imag = nn.Parameter((-A.real).log()), nn.Parameter(A.imag.clone())
        self.C = nn.Parameter(torch.randn(*A.shape, 2) * 0.5 ** 0.5)
        self.D = nn.Parameter(torch.ones(c))
        slow(self.log_dt, self.log_A_real, self.A_imag)

    def discrete(self):
        A = torch.complex(*(at_least_float32(x) for x in (-self.log_A_real.exp(), self.A_imag)))
        log_a, b = zoh(A, at_least_float32(self.log_dt).exp()[:, None])
        return log_a, b, 2 * torch.view_as_complex(at_least_float32(self.C)), at_least_float32(self.D)


class S4DInv(S4D):
    """S4D whose eigenvalues start as s4d_inv says."""
    init = "inv"


class S4DLegS(S4D):
    """S4D whose eigenvalues start as those of HiPPO-LegS's normal part."""
    init = "legs"


class DSS(S4D):
    """DSS [Gup22, prop. 1b]: K = Re(w / Lambda softmax_l(Lambda dt l)), the softmax over max_len positions (the
    authors: over the length at hand, so that their loop agrees at that length only). The softmax is a scale of b: 1 /
    sum_l a^l."""
    init = "legs"

    def __init__(self, d_model, n_heads=None, n_state=64, init=None, max_len=1024):
        super().__init__(d_model, n_heads, n_state, init)
        self.max_len = max_len

    def discrete(self):
        log_a, _, C, D = super().discrete()
        A = log_a / at_least_float32(self.log_dt).exp()[:, None]
        return log_a, torch.expm1(log_a) / torch.expm1(self.max_len * log_a) / A, C, D


class LRU(DiagonalMixer):
    """Linear recurrent unit [O23, section 3]: a = exp(-e^nu + i e^theta), |a|^2 uniform on a ring at first; inputs
    scaled by gamma = sqrt(1 - |a|^2), so that long memories do not blow up. (Here B and C are diagonal, one system a
    channel.)"""

    def __init__(self, d_model, n_heads=None, n_state=16, r_min=0.9, r_max=0.999):
        super().__init__()
        self.channels = d_model
        radius2 = torch.rand(d_model, n_state) * (r_max ** 2 - r_min ** 2) + r_min ** 2
        self.nu = nn.Parameter((-0.5 * radius2.log()).log())
        self.theta = nn.Parameter((torch.rand(d_model, n_state) * math.pi / 10 + 1e-3).log())
        self.B = nn.Parameter(torch.randn(d_model, n_state, 2) * 0.5 ** 0.5)
        self.C = nn.Parameter(torch.randn(d_model, n_state, 2) * (0.5 / n_state) ** 0.5)
        self.D = nn.Parameter(torch.ones(d_model))
        self.out = GLU(d_model, d_model)
        slow(self.nu, self.theta)

    def discrete(self):
        nu, theta, D = (at_least_float32(x) for x in (self.nu, self.theta, self.D))
        B, C = (torch.view_as_complex(at_least_float32(x)) for x in (self.B, self.C))
        gamma = torch.sqrt(-torch.expm1(-2 * nu.exp()))
        return torch.complex(-nu.exp(), theta.exp()), gamma * B, C, D


class EMA(DiagonalMixer):
    """MEGA's damped moving average [Ma23, eq. 3-5]: n averages a channel, a = 1 - alpha delta, b =
    alpha beta, alpha, delta in (0, 1); silu(y + omega x) after. Real and positive: it can only smooth."""

    def __init__(self, d_model, n_heads=None, n_state=16):
        super().__init__()
        self.channels = d_model
        self.alpha, self.delta = (nn.Parameter(0.2 * torch.randn(d_model, n_state)) for _ in range(2))
        self.beta = nn.Parameter(0.02 * torch.randn(d_model, n_state) + (-1.0) ** torch.arange(n_state))
        self.gamma, self.D = nn.Parameter(torch.randn(d_model, n_state)), nn.Parameter(torch.randn(d_model))
        self.out = linear(d_model, d_model)
        slow(self.alpha, self.delta)

    def discrete(self):
        alpha, delta, beta = (at_least_float32(x) for x in (self.alpha, self.delta, self.beta))
        gamma, D = at_least_float32(self.gamma), at_least_float32(self.D)
        alpha = alpha.sigmoid()
        return torch.log1p(-alpha * delta.sigmoid()), alpha * beta, gamma * gamma.shape[1] ** -0.5, D

    def finish(self, y, x):
        return self.out(F.silu(y.mT))


class DenseMixer(ConvMixer):
    """A time-invariant mixer with one dense system for all channels: discrete() -> a: (n, n), b: (n,), C: (c, n), D:
    (c,). h: (b, c, n). The kernel is K_l = C a^l b, by making a^0 b, a^1 b, ... twice as many at a time (Krylov)."""
    forms = ("conv", "recurrent", "parallel", "triton")

    def krylov(self, a, b, t):
        """b, a b, ..., a^{t-1} b: (n, t)"""
        columns = b[:, None]
        while columns.shape[1] < t:
            columns, a = torch.cat([columns, a @ columns], dim=1), a @ a
        return columns[:, :t]

    def kernel(self, t):
        a, b, C, D = self.discrete()
        return (C @ self.krylov(a, b, t)).real + F.pad(D[:, None], (0, t - 1))

    def convolve(self, form, u):
        return self.states(u, None)[0] if form == "recurrent" else super().convolve(form, u)

    def states(self, u, h):
        a, b, C, D = self.discrete()
        h, y = torch.zeros(*u.shape[:2], len(b), dtype=b.dtype, device=b.device) if h is None else h, []
        for t in range(u.shape[2]):
            h = h @ a.mT + b * u[:, :, t, None]
            y.append((h * C).sum(dim=-1).real + D * u[:, :, t])
        return torch.stack(y, dim=2), h

    def init_state(self, batch_size):
        b = self.discrete()[1]
        return self.init_carry(batch_size), b.new_zeros(batch_size, self.channels, len(b))

    def prefill(self, x, state=None):
        pick_form(self, x)
        carry, h = self.init_state(len(x)) if state is None else state
        return self.run(x, carry, lambda u: self.states(u, h))

    def step(self, x_t, state):
        y, state = self.prefill(x_t[:, None], state)
        return y[:, 0], state

    def state_size(self, t):
        b = self.discrete()[1]
        return self.channels * len(b) * (2 if b.is_complex() else 1) + self.init_carry(1).numel()


def solve(A, B):
    """torch.linalg.solve for an A known to be invertible: to look whether it is would wait for the GPU."""
    return torch.linalg.solve_ex(A, B)[0]


class LSSL(DenseMixer):
    """The first of them [G21]: a dense A = HiPPO-LegS, bilinear, its kernel by Krylov's powers: n^2 t. Everything
    after it is about not paying that. random_A: the same with a random A, with which the paper finds it
    to learn far worse (not measured here)."""

    def __init__(self, d_model, n_heads=None, n_state=16, random_A=False):
        super().__init__()
        self.channels = d_model
        A, B = hippo_legs(n_state)
        if random_A:
            A = torch.randn(n_state, n_state, dtype=A.dtype) / n_state ** 0.5 - torch.eye(n_state, dtype=A.dtype)
        self.A, self.B = nn.Parameter(A.float()), nn.Parameter(B.float())
        self.log_dt = nn.Parameter(log_uniform(1, low=1e-2))
        self.C, self.D = nn.Parameter(torch.randn(d_model, n_state) / n_state), nn.Parameter(torch.ones(d_model))
        self.out = GLU(d_model, d_model)
        slow(self.A, self.B, self.log_dt)

    def discrete(self):
        A, B, C, D, log_dt = (at_least_float32(x) for x in (self.A, self.B, self.C, self.D, self.log_dt))
        half, one = log_dt.exp() / 2 * A, torch.eye(len(A), dtype=A.dtype, device=A.device)
        ab = solve(one - half, torch.cat([one + half, (log_dt.exp() * B)[:, None]], dim=1))
        return ab[:, :-1], ab[:, -1], C, D


def s4_kernel(Lambda, P, B, C, dt, t):
    """S4's kernel [G22, theorem 3] for A = diag(Lambda) - P P^*, bilinear: K is the inverse FFT of its generating
    function at the roots of unity w, where (w-domain resolvent) is a Cauchy product and the rank-one part a Woodbury
    correction. With C~ = C (1 - a^t), and the denominator (2/dt) (1 - w) - lambda (1 + w), which has no singularity
    at w = -1."""
    a, _ = dplr_discrete(Lambda, P, B, dt)
    C = C @ (torch.eye(len(B), dtype=a.dtype, device=a.device) - torch.linalg.matrix_power(a, t))
    w = torch.exp(-2j * math.pi * torch.arange(t, device=B.device, dtype=torch.float64) / t).to(B.dtype)
    resolvent = 1 / (2 / dt * (1 - w) - Lambda[:, None] * (1 + w))                   # (n, t), times (1 + w)
    k00, k01 = (C * B) @ resolvent, (C * P) @ resolvent                              # (c, t)
    k10, k11 = (P.conj() * B) @ resolvent, (P.conj() * P) @ resolvent                # (t,)
    spectrum = 2 * (k00 - k01 * (1 + w) / (1 + (1 + w) * k11) * k10)
    return torch.fft.ifft(spectrum, n=t).real


def dplr_discrete(Lambda, P, B, dt):
    """The bilinear a: (n, n) and b: (n,) of A = diag(Lambda) - P P^*, B."""
    A, one = torch.diag(Lambda) - P[:, None] * P.conj(), torch.eye(len(B), dtype=B.dtype, device=B.device)
    ab = solve(one - dt / 2 * A, torch.cat([one + dt / 2 * A, dt * B[:, None]], dim=1))
    return ab[:, :-1], ab[:, -1]


class S4(DenseMixer):
    """S4 [G22]: A = V (diag(Lambda) - P P^*) V^* of HiPPO-LegS, so that the kernel costs n t + t log t in place of
    n^2 t, once a^t is there (n^3 log t here). One system for all channels, with a C for each (the authors: a system
    for each channel)."""

    def __init__(self, d_model, n_heads=None, n_state=16):
        super().__init__()
        self.channels = d_model
        A, B = hippo_legs(n_state)
        P = (torch.arange(n_state, dtype=torch.float64) + 0.5).sqrt()
        Lambda, V = torch.linalg.eigh(1j * (A + P[:, None] * P + 0.5 * torch.eye(n_state)))  # skew part: -i times real
        Lambda, Vh = torch.complex(torch.full_like(Lambda, -0.5), -Lambda), V.mH
        self.log_real, self.imag = nn.Parameter((-Lambda.real).log().float()), nn.Parameter(Lambda.imag.float())
        self.P, self.B = (nn.Parameter(torch.view_as_real(Vh @ x.to(V.dtype)).float()) for x in (P, B))
        self.C = nn.Parameter(torch.view_as_real(torch.randn(d_model, n_state).to(V.dtype) @ V).float() / n_state)
        self.log_dt, self.D = nn.Parameter(log_uniform(1, low=1e-2)), nn.Parameter(torch.ones(d_model))
        self.out = GLU(d_model, d_model)
        slow(self.log_real, self.imag, self.P, self.B, self.log_dt)

    def system(self):
        real, imag = at_least_float32(self.log_real).exp(), at_least_float32(self.imag)
        P, B, C = (torch.view_as_complex(at_least_float32(x)) for x in (self.P, self.B, self.C))
        return torch.complex(-real, imag), P, B, C, at_least_float32(self.log_dt).exp()

    def discrete(self):
        Lambda, P, B, C, dt = self.system()
        return *dplr_discrete(Lambda, P, B, dt), C, at_least_float32(self.D)

    def kernel(self, t):
        return s4_kernel(*self.system(), t) + F.pad(at_least_float32(self.D)[:, None], (0, t - 1))


class SGConv(ConvMixer):
    """SGConv [L23, section 3.2]: a kernel of log2(max_len / d) + 1 scales, d random taps each, stretched to twice the
    last scale's length and half as large. Convolution only: no system stands behind it. No text may be longer than
    max_len."""

    def __init__(self, d_model, n_heads=None, d=64, max_len=1024):
        super().__init__()
        self.channels, self.max_len = d_model, max_len
        self.n_scales = max(1, math.ceil(math.log2(max_len / d)) + 1)
        self.taps = nn.Parameter(torch.randn(self.n_scales, d_model, d))
        self.D = nn.Parameter(torch.randn(d_model))
        self.out = GLU(d_model, d_model)
        with torch.no_grad():
            self.register_buffer("norm", self.stretched().norm(dim=-1, keepdim=True))

    def stretched(self):
        taps = at_least_float32(self.taps)
        parts = [F.interpolate(taps[i:i + 1], scale_factor=2 ** max(0, i - 1), mode="linear")[0] * 0.5 ** i
                 for i in range(self.n_scales)]
        return torch.cat(parts, dim=-1)

    def kernel(self, t):
        if t > self.max_len:
            raise ValueError(f"a sequence of {t} is longer than this SGConv's max_len {self.max_len}")
        K = (self.stretched() / self.norm)[:, :t]
        return K + F.pad(at_least_float32(self.D)[:, None], (0, t - 1))


# -------------------------------------------------------------------------------------------------- gated convolutions


class GSS(S4D):
    """Gated state space [Me23, figure 1]: the system runs in a bottleneck of a quarter of the width, with random A, B
    = 1 and dt = 1; a GELU branch gates its output."""

    def __init__(self, d_model, n_heads=None, n_state=64):
        nn.Module.__init__(self)
        self.channels = narrow = max(1, d_model // 4)
        real, imag = -torch.rand(narrow, n_state // 2) - 0.01, torch.randn(narrow, n_state // 2)
        self.make_system(narrow, torch.complex(real, imag))
        with torch.no_grad():
            self.log_dt.zero_()
        self.down, self.gate = linear(d_model, narrow), linear(d_model, 2 * d_model)
        self.up, self.out = linear(narrow, 2 * d_model), linear(2 * d_model, d_model)

    def project(self, x, carry):
        return F.gelu(self.down(x)).mT, None, None, carry

    def finish(self, y, x):
        return self.out(self.up(y.mT) * F.gelu(self.gate(x)))


class H3(S4D):
    """H3 [F23, section 3]: q * SSM_diag(SSM_shift(k) * v). The shift system with B = e_1 is a short filter, here of
    64 taps on k. With the first gate it writes v where k is, with the second it reads: made for recall. head_dim d >
    1: k and v of a head meet in an outer product, M_ts = (q_t . k_s) K_{t-s}: linear attention whose decay is a long
    convolution; d times the state."""

    def __init__(self, d_model, n_heads=None, n_state=64, shift=64, head_dim=1):
        super().__init__(d_model, n_heads, n_state)
        if head_dim < 1 or d_model % head_dim:
            raise ValueError(f"d_model {d_model} is not a multiple of head_dim {head_dim}")
        self.channels, self.head_dim = d_model * head_dim, head_dim
        self.make_system(d_model // head_dim, DIAGONALS[self.init](n_state))         # a system for each head
        self.qkv, self.out = linear(d_model, 3 * d_model), linear(d_model, d_model)
        self.shift = ShortConv(d_model, shift)

    def discrete(self):
        return tuple(x.repeat_interleave(self.head_dim ** 2, dim=0) for x in super().discrete())

    def project(self, x, carry):
        q, k, v = (self.qkv.weight @ x.mT).chunk(3, dim=1)
        k, carry = self.shift(k, carry)
        q, k, v = (y.unflatten(1, (-1, self.head_dim)) for y in (q, k, v))           # (b, h, d, t)
        grid = (-1, -1, self.head_dim, self.head_dim, -1)                            # (b, h, d of k, d of v, t)
        v, k, q = (y.expand(grid).flatten(1, 3) for y in (v[:, :, None], k[:, :, :, None], q[:, :, :, None]))
        return v, k, q, carry

    def finish(self, y, x):
        y = y.unflatten(1, (-1, self.head_dim, self.head_dim)).sum(dim=2)            # over d of q and k
        return self.out(y.flatten(1, 2).mT)

    def init_carry(self, batch_size):
        return self.shift.init_carry(batch_size)


class HyenaGates:
    """q * (K * (k * v)) as Hyena has it [P23, section 3]: three projections, a short filter on each, no activation.
    For the mixers that differ in K only."""

    def make_gates(self, d_model):
        self.qkv, self.short = linear(d_model, 3 * d_model), ShortConv(3 * d_model, 3)
        self.out = linear(d_model, d_model)

    def project(self, x, carry):
        qkv, carry = self.short(self.qkv.weight @ x.mT, carry)
        q, k, v = qkv.chunk(3, dim=1)                                                # (b, c, t)
        return v, k, q, carry

    def finish(self, y, x):
        return self.out(y.mT)

    def init_carry(self, batch_size):
        return self.short.init_carry(batch_size)


class Modal(HyenaGates, DiagonalMixer):
    """The modal filter of StripedHyena [M23, section 3]: K_l = Re sum_n R_n lambda_n^l, between Hyena's gates:
    Hyena's filter family with a finite state, so that it also recurs. |lambda| starts between 0.8 and 0.999."""

    def __init__(self, d_model, n_heads=None, n_state=16):
        super().__init__()
        self.channels = d_model
        radius = 0.8 + 0.199 * torch.rand(d_model, n_state)
        self.log_decay = nn.Parameter((-radius.log()).log())
        self.angle = nn.Parameter(math.pi * torch.rand(d_model, n_state))
        self.R, self.D = nn.Parameter(torch.randn(d_model, n_state, 2) / n_state), nn.Parameter(torch.ones(d_model))
        self.make_gates(d_model)
        slow(self.log_decay, self.angle)

    def discrete(self):
        decay, angle, R, D = (at_least_float32(x) for x in (self.log_decay, self.angle, self.R, self.D))
        log_a = torch.complex(-decay.exp(), angle)
        return log_a, torch.ones_like(log_a), torch.view_as_complex(R), D


class Hyena(HyenaGates, ConvMixer):
    """Hyena of order 2 [P23, section 3]: q * (K * (k * v)), K an MLP with sine activations of the position, times an
    exponential window whose speed differs from channel to channel. No system stands behind K; positions go up to
    max_len."""

    def __init__(self, d_model, n_heads=None, max_len=1024, d_filter=64, n_bands=8, frequency=14.0):
        super().__init__()
        self.channels, self.max_len, self.n_bands = d_model, max_len, n_bands
        self.make_gates(d_model)
        widths = [2 * n_bands + 1, d_filter, d_filter, d_filter]
        self.layers = nn.ModuleList(linear(a, b, bias=True) for a, b in zip(widths, widths[1:], strict=False))
        self.last, self.frequency = linear(d_filter, d_model), nn.Parameter(frequency * torch.ones(d_filter))
        slowest, fastest = (math.log(1e-2) / share for share in (1.5, 0.3))
        self.register_buffer("delta", torch.linspace(slowest, fastest, d_model).abs())
        self.D = nn.Parameter(torch.randn(d_model))

    def kernel(self, t):
        if t > self.max_len:
            raise ValueError(f"a sequence of {t} is longer than this Hyena's max_len {self.max_len}")
        def float32(layer):
            return [None if p is None else at_least_float32(p) for p in (layer.weight, layer.bias)]
        place = torch.arange(t, device=self.delta.device, dtype=torch.float64) / self.max_len
        bands = 2 * math.pi * place[:, None] * torch.arange(1, self.n_bands + 1, device=place.device)
        z = torch.cat([place[:, None], bands.cos(), bands.sin()], dim=1).to(at_least_float32(self.D).dtype)
        for layer in self.layers:
            z = torch.sin(at_least_float32(self.frequency) * F.linear(z, *float32(layer)))
        K = F.linear(z, *float32(self.last)).mT * torch.exp(-self.delta[:, None] * place.to(z.dtype))     # (c, t)
        return K + F.pad(at_least_float32(self.D)[:, None], (0, t - 1))


class BiGS(nn.Module):
    """Bidirectional gated SSM [W22]: one system runs forward, one backward, their outputs are multiplied and gated.
    Not causal, so no recurrence. (M here is the forward system's; the backward one is a gate on what it gives.)"""
    forms = ("conv", "parallel", "triton")
    causal = False
    longest = 2 ** 17

    def __init__(self, d_model, n_heads=None, n_state=64):
        super().__init__()
        self.ahead, self.back = S4D(d_model, n_state=n_state), S4D(d_model, n_state=n_state)
        self.ahead.out = self.back.out = None
        self.v, self.gate, self.up_ahead, self.up_back, self.out = (linear(d_model, d_model) for _ in range(5))

    def values(self, x):
        return F.gelu(self.v(x)).mT[..., None]

    def output(self, o, x, form="conv"):
        back = self.one_way(self.back, form, self.values(x)[..., 0].flip(-1)).flip(-1)
        o, back = (y.to(x.dtype).mT for y in (o[..., 0], back))
        return self.out(self.up_ahead(o) * self.up_back(back) * F.gelu(self.gate(x)))

    def forward(self, x, form=None):
        form = pick_form(self, x, form)
        o = self.one_way(self.ahead, form, self.values(x)[..., 0])
        return self.output(o[..., None], x, form)

    def one_way(self, system, form, v):
        if form == "triton":
            return triton_conv(v, system.kernel)
        with torch.autocast(v.device.type, enabled=False):
            return system.convolve(form, at_least_float32(v))

    def matrix(self, x):
        return toeplitz(at_least_float32(self.ahead.kernel(x.shape[1])))[None].expand(len(x), -1, -1, -1)

    def state_size(self, t):
        return 0      # it keeps nothing, because it cannot go on


# ---------------------------------------------------------------------------------------------------- Monarch matrices


def monarch_fft(x, n1):
    """The discrete Fourier transform of length n = n1 n2 as two matrix products with a twiddle between [D22b;
    F23b]: x: (..., n) -> (..., k1, k2), frequency k1 + n1 k2. Left in this order: the inverse undoes it, so no
    permutation is needed."""
    n2 = x.shape[-1] // n1
    F1, twiddle, F2 = monarch_factors(n1, n2, x.device)
    return (F1 @ x.to(F1.dtype).unflatten(-1, (n1, n2)) * twiddle) @ F2


def monarch_ifft(X):
    """The inverse: (..., k1, k2) -> (..., n)."""
    F1, twiddle, F2 = (f.conj() for f in monarch_factors(*X.shape[-2:], X.device))
    return (F1 @ (X @ F2 * twiddle)).flatten(-2) / X.shape[-1] / X.shape[-2]


def monarch_factors(n1, n2, device):
    def roots(n, i, j):
        i, j = (torch.arange(m, device=device, dtype=torch.float64) for m in (i, j))
        return torch.exp(-2j * math.pi / n * (i[:, None] * j))
    return roots(n1, n1, n1), roots(n1 * n2, n1, n2), roots(n2, n2, n2)


class Monarch(nn.Module):
    """A plain Monarch block [F23b]: positions in an m x m grid, a learned m x m matrix for each row, then one for each
    column, for every channel alike: m^3 = t^{3/2} in place of t^2. Every position sees every other: not causal. Up to
    max_len = m^2."""
    forms = ("conv", "parallel")      # conv: the two block-diagonal products, as in the FFT

    causal = False

    def __init__(self, d_model, n_heads=None, max_len=256):
        super().__init__()
        self.m = math.ceil(max_len ** 0.5)
        self.R, self.L = (nn.Parameter(torch.randn(self.m, self.m, self.m) * self.m ** -0.5) for _ in range(2))
        self.out = linear(d_model, d_model)

    def mix(self, v):
        """v: (b, t, c), at most m^2 positions."""
        t, m = v.shape[1], self.m
        if t > m * m:
            raise ValueError(f"a sequence of {t} is longer than this Monarch block's m^2 = {m * m}")
        grid = F.pad(v, (0, 0, 0, m * m - t)).unflatten(1, (m, m))                   # (b, row, column, c)
        grid = torch.einsum("rij,brjc->bric", self.R, grid)                          # within each row
        return torch.einsum("cij,bjcd->bicd", self.L, grid).flatten(1, 2)[:, :t]     # within each column

    def forward(self, x, form=None):
        if pick_form(self, x, form) == "parallel":
            return self.output(self.matrix(x).to(x.dtype) @ self.values(x), x)
        return self.out(self.mix(x))

    def values(self, x):
        return x[:, None]                                                            # (b, 1, s, c)

    def output(self, o, x):
        return self.out(o[:, 0])

    def matrix(self, x):
        one = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
        return self.mix(one[None])[:, None].expand(len(x), 1, -1, -1)  # columns: what each position becomes

    def state_size(self, t):
        return 0


class MonarchMixer(HyenaGates, ConvMixer):
    """The causal gated Monarch mixer [F23b, section 4]: M_0^{-1}(M_1 k * M_2 u), products of polynomials in two
    variables. Position j1 m + j0 is X^{j1} times a learned polynomial of Y of degree j0 and more, below m; both
    degrees are kept below half of the transform, so that products do not wrap around, and no term of lower degree
    arises: exactly causal. It is not Toeplitz: the polynomials (lower triangular R) differ from block to block. Gates
    and projections as Hyena's."""
    forms = ("conv", "parallel")

    def __init__(self, d_model, n_heads=None, max_len=1024, m=32):
        super().__init__()
        self.channels, self.m, self.n_blocks = d_model, m, -(-max_len // m)
        fade = torch.exp(-torch.arange(self.n_blocks * m) / m)
        self.k = nn.Parameter(0.1 * fade * torch.randn(d_model, self.n_blocks * m))
        self.R1, self.R2 = (nn.Parameter(0.1 * torch.randn(self.n_blocks, m, m) / m ** 0.5) for _ in range(2))
        self.D = nn.Parameter(torch.ones(d_model))
        self.make_gates(d_model)

    def grid(self, x, R):
        """The polynomials of a sequence (..., t): (..., blocks, m), by a block-diagonal product."""
        R = torch.tril(at_least_float32(R), -1) + torch.eye(self.m, device=R.device)
        x = F.pad(x, (0, -x.shape[-1] % self.m)).unflatten(-1, (-1, self.m))
        return torch.einsum("bij,...bj->...bi", R[:x.shape[-2]].to(x.dtype), x)

    def convolve(self, form, u):
        t, m = u.shape[-1], self.m
        if t > self.n_blocks * m:
            raise ValueError(f"a sequence of {t} is longer than this MonarchMixer's max_len {self.n_blocks * m}")
        k, u1 = self.grid(at_least_float32(self.k)[:, :t], self.R1), self.grid(u, self.R2)
        if form == "parallel":
            return (self.mixing_matrix(t) @ u[..., None])[..., 0]
        size = 2 * k.shape[-2], 2 * m
        y = torch.fft.irfft2(torch.fft.rfft2(k, s=size) * torch.fft.rfft2(u1, s=size), s=size)[..., :k.shape[-2], :m]
        return y.flatten(-2)[..., :t] + at_least_float32(self.D)[:, None] * u

    def mixing_matrix(self, t):
        """Written out: H[(i1, i0), (j1, j0)] = (R_1 k)[i1 - j1, i0 - j0], times the block-diagonal R_2, plus D."""
        one = torch.eye(-(-t // self.m) * self.m, dtype=at_least_float32(self.k).dtype, device=self.k.device)
        k, u = self.grid(at_least_float32(self.k)[:, :t], self.R1), self.grid(one, self.R2).flatten(-2).mT
        i = torch.arange(len(one), device=k.device)
        i1, i0 = i // self.m, i % self.m
        d1, d0 = i1[:, None] - i1, i0[:, None] - i0
        H = torch.where((d1 >= 0) & (d0 >= 0), k[:, d1.clamp(min=0), d0.clamp(min=0)], 0)
        return (H @ u)[:, :t, :t] + torch.diag_embed(at_least_float32(self.D)[:, None].expand(-1, t))

    def step(self, x_t, state):
        y, state = self.prefill(x_t[:, None], state)
        return y[:, 0], state

    def matrix(self, x):
        _, pre, post, _ = self.project(x, self.init_carry(len(x)))
        return post[..., None] * self.mixing_matrix(x.shape[1]) * pre[:, :, None, :]


# ---------------------------------------------------------------------------------------------------- selective mixers


class SelectiveMixer(nn.Module):
    """h_t = e^{g_t} h_{t-1} + k_t v_t, y_t = sum_n q_t h_t + D v_t, where g, k, q depend on the token: no kernel, no
    convolution. A mixer defines

    project(x, carry)   -> inputs, more, carry
    discretise(*inputs) -> v: (b, c, t), g, k, q: broadcast to (b, c, t, n); by default the inputs are these
    finish(y, more)     -> (b, t, c)

    M_ts = sum_n q_tn e^{g_{s+1} + ... + g_t} k_sn: lesson 02's recurrence, with a head for each channel."""
    forms = ("recurrent", "scan", "parallel", "triton")
    causal = True
    hows = {"scan": scan_from, "recurrent": loop, "chunked": chunks, "triton": triton_scan}
    n_state = 1

    def skip(self):
        return None

    def discretise(self, *inputs):
        return inputs

    def system(self, form, inputs, h):
        """y, and the state after it."""
        if form == "recurrent" and inputs[0].shape[2] > 1:                           # a step's numbers side by side
            inputs = [z.movedim(2, 0).contiguous().movedim(0, 2) for z in inputs]
        v, g, k, q = (at_least_float32(z) for z in self.discretise(*inputs))
        if form == "parallel":
            return (self.weights(v, g, k, q) @ v[..., None])[..., 0], None
        u = k * v[..., None]                                                         # (b, c, t, n)
        h = self.hows[form](torch.exp(g).expand_as(u), u, h)
        y = (q * h).sum(dim=-1)
        return (y if self.skip() is None else y + self.skip()[:, None] * v), h[:, :, -1]

    def weights(self, v, g, k, q):
        t = v.shape[2]
        below = torch.ones(t, t, dtype=torch.bool, device=v.device).tril(-1)[..., None]
        G = torch.where(below, g.expand(*g.shape[:2], t, -1).unsqueeze(3), 0).cumsum(dim=2)          # (b, c, t, s, n)
        M = (q[:, :, :, None] * G.exp() * k[:, :, None]).sum(dim=-1).tril().expand(*v.shape[:2], t, t)
        return M if self.skip() is None else M + self.skip()[:, None, None] * torch.eye(t, device=v.device)

    def run(self, x, state, form):
        carry, h = self.init_state(len(x)) if state is None else state
        if len(h) != len(x):
            raise ValueError(f"the state is of {len(h)} sequences, x of {len(x)}")
        inputs, more, carry = self.project(x, carry)
        with torch.autocast(x.device.type, enabled=False):
            y, h = self.system(form, inputs, h)
        return self.finish(y if y.is_complex() else y.to(x.dtype), more), (carry, h)

    def forward(self, x, form=None):
        return self.run(x, None, pick_form(self, x, form))[0]

    def prefill(self, x, state=None):
        return self.run(x, state, pick_form(self, x))

    def step(self, x_t, state):
        y, state = self.run(x_t[:, None], state, "recurrent")
        return y[:, 0], state

    def init_carry(self, batch_size):
        return next(self.parameters()).new_zeros(batch_size, 0)

    def init_state(self, batch_size):
        like = at_least_float32(next(self.parameters()))
        return self.init_carry(batch_size), like.new_zeros(batch_size, self.channels, self.n_state)

    def values(self, x):
        return self.project(x, self.init_carry(len(x)))[0][0][..., None]

    def output(self, o, x):
        return self.finish(o[..., 0], self.project(x, self.init_carry(len(x)))[1])

    def matrix(self, x):
        inputs = self.project(x, self.init_carry(len(x)))[0]
        return self.weights(*(at_least_float32(z) for z in self.discretise(*inputs)))

    def state_size(self, t):
        return self.channels * self.n_state + self.init_carry(1).numel()


class Mamba(SelectiveMixer):
    """Mamba [GD23, algorithm 2]: h_t = e^{dt_t A} h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t, with dt =
    softplus(W_up W_down x + bias), B, C linear in x, A = -(1, ..., n) at first; a short filter and SiLU before, a
    SiLU gate after; inner width 2 c. The chunked form is the scan chunk by chunk: all states of one chunk at a
    time. Everything lies along time, (b, c, t), as convolution and kernel want it."""
    forms = ("recurrent", "chunked", "scan", "parallel", "triton")

    def __init__(self, d_model, n_heads=None, n_state=16, expand=2):
        super().__init__()
        self.channels, self.n_state, rank = expand * d_model, n_state, -(-d_model // 16)
        self.rank = rank
        self.x, self.gate = linear(d_model, self.channels), linear(d_model, self.channels)
        self.short = ShortConv(self.channels, 4, bias=True)
        self.dt_B_C, self.dt = linear(self.channels, rank + 2 * n_state), linear(rank, self.channels, bias=True)
        self.log_A = nn.Parameter(torch.arange(1.0, n_state + 1).log().repeat(self.channels, 1))
        self.D, self.out = nn.Parameter(torch.ones(self.channels)), linear(self.channels, d_model)
        with torch.no_grad():
            dt = log_uniform(self.channels).exp()
            self.dt.bias.copy_(dt + torch.log(-torch.expm1(-dt)))                    # softplus(bias) = dt
            nn.init.uniform_(self.dt.weight, -rank ** -0.5, rank ** -0.5)
        self.log_A.optim = {"weight_decay": 0.0}

    def skip(self):
        return self.D

    def project(self, x, carry):
        u, carry = self.short(self.x.weight @ x.mT, carry)
        u = F.silu(u)                                                                # (b, c, t)
        dt, B, C = (self.dt_B_C.weight @ u).split([self.rank, self.n_state, self.n_state], dim=1)    # (b, n, t)
        dt = F.softplus(at_least_float32(self.dt.weight @ dt + self.dt.bias[:, None]))               # (b, c, t)
        return (u, dt, B, C), F.silu(self.gate.weight @ x.mT), carry

    def discretise(self, u, dt, B, C):
        return u, -dt[..., None] * self.log_A.exp()[:, None], dt[..., None] * B.mT[:, None], C.mT[:, None]

    def system(self, form, inputs, h):
        if form == "triton":
            from kernels.selective_scan import selective_scan
            u, dt, B, C = inputs
            return selective_scan(u, dt, -self.log_A.exp(), B, C, self.D, h)
        return super().system(form, inputs, h)

    def finish(self, y, gate):
        return self.out((y * gate).mT)

    def init_carry(self, batch_size):
        return self.short.init_carry(batch_size)


def one(g):
    """q and k of a mixer that has none, and a last axis of one state."""
    return torch.ones_like(g[..., None])


class RGLRU(SelectiveMixer):
    """The recurrent block of Hawk and Griffin [De24, section 2.4]: log a_t = -8 softplus(Lambda) r_t, h_t = a_t
    h_{t-1} + sqrt(1 - a_t^2) (i_t * x_t), r and i sigmoids of block-diagonal layers, |a| from 0.9 to 0.999 at r = 1
    at first; a short filter before, a GELU branch gates. (The first input is scaled like the others, not by 1.)"""

    def __init__(self, d_model, n_heads=4):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of n_heads {n_heads}, the blocks of its gates")
        self.channels, self.n_heads = d_model, n_heads
        self.x, self.gate, self.out = (linear(d_model, d_model) for _ in range(3))
        self.short = ShortConv(d_model, 4, bias=True)
        d = d_model // n_heads
        self.W = nn.Parameter(torch.randn(2, n_heads, d, d) * d ** -0.5)
        self.bias = nn.Parameter(torch.zeros(2, d_model))
        a = torch.sqrt(torch.rand(d_model) * (0.999 ** 2 - 0.9 ** 2) + 0.9 ** 2)
        self.Lambda = nn.Parameter(torch.log(torch.expm1(-a.log() / 8)))             # softplus(Lambda) = -log(a) / 8
        self.Lambda.optim = {"weight_decay": 0.0}

    def project(self, x, carry):
        u, carry = self.short(self.x.weight @ x.mT, carry)
        blocks = u.unflatten(1, (self.n_heads, -1))                                  # (b, h, d, t)
        r, i = (torch.einsum("bhdt,hde->bhet", blocks, W).flatten(1, 2) for W in self.W)
        r, i = r + self.bias[0][:, None], i + self.bias[1][:, None]
        g = -8 * F.softplus(at_least_float32(self.Lambda))[:, None] * at_least_float32(r).sigmoid()
        k = torch.sqrt(-torch.expm1(2 * g)) * i.sigmoid()
        g, k = g[..., None], k[..., None]
        return (u, g, k, torch.ones_like(g)), F.gelu(self.gate.weight @ x.mT), carry

    def finish(self, y, gate):
        return self.out((y * gate).mT)

    def init_carry(self, batch_size):
        return self.short.init_carry(batch_size)


class QRNN(SelectiveMixer):
    """Quasi-recurrent network [B17, eq. 4, fo-pooling]: z = tanh, f, o = sigmoid of convolutions of two tokens;
    c_t = f_t c_{t-1} + (1 - f_t) z_t, output o_t c_t."""

    def __init__(self, d_model, n_heads=None):
        super().__init__()
        self.channels = d_model
        self.now, self.before = linear(d_model, 3 * d_model, bias=True), linear(d_model, 3 * d_model)
        self.out = linear(d_model, d_model)
        with torch.no_grad():
            self.now.bias[d_model:2 * d_model] = 1.0                                 # remember at first

    def project(self, x, carry):
        shifted = torch.cat([carry.to(x.dtype), x[:, :-1]], dim=1)
        z, f, o = (self.now(x) + self.before(shifted)).chunk(3, dim=-1)
        f = at_least_float32(f).mT[..., None]
        return (z.tanh().mT, F.logsigmoid(f), torch.sigmoid(-f), torch.ones_like(f)), o.sigmoid(), x[:, -1:]

    def finish(self, y, o):
        return self.out(y.mT * o)

    def init_carry(self, batch_size):
        return self.out.weight.new_zeros(batch_size, 1, self.channels)


class SRU(SelectiveMixer):
    """Simple recurrent unit [Le18] with gates of the token alone: f, r = sigmoid(W x + b), c_t = f_t c_{t-1} + (1 -
    f_t) W x_t, output r_t c_t + (1 - r_t) x_t. (Its later version adds v * c_{t-1} inside the gates: then a_t needs
    c_{t-1}, the composition of two steps is no longer of the form a c + b, and no scan exists.)"""

    def __init__(self, d_model, n_heads=None):
        super().__init__()
        self.channels = d_model
        self.z, self.gates = linear(d_model, d_model), linear(d_model, 2 * d_model, bias=True)
        self.out = linear(d_model, d_model)
        with torch.no_grad():
            self.gates.bias[:d_model] = 1.0

    def project(self, x, carry):
        f, r = at_least_float32(self.gates(x)).mT.chunk(2, dim=1)
        f, r = f[..., None], r.sigmoid().mT
        return (self.z(x).mT, F.logsigmoid(f), torch.sigmoid(-f), torch.ones_like(f)), (r.to(x.dtype), x), carry

    def finish(self, y, more):
        r, x = more
        return self.out(r * y.mT + (1 - r) * x)


class S5(SelectiveMixer):
    """S5 [Sm23]: one system for all channels, h_t = a h_{t-1} + b B u_t with B: (n, c), y = Re(C h) + D u: it mixes
    the channels too. Diagonal a from the eigenvalues of HiPPO-LegS in blocks, a dt for each state. Its scan is the
    selective mixers' with a, b that do not depend on the token; heads are its states."""

    def __init__(self, d_model, n_heads=None, n_state=64, blocks=4):
        super().__init__()
        if n_state % (2 * blocks):
            raise ValueError(f"n_state {n_state} is not a multiple of twice the {blocks} blocks")
        A = s4d_legs(n_state // blocks).repeat(blocks)
        self.channels = len(A)
        self.log_A_real, self.A_imag = nn.Parameter((-A.real).log()), nn.Parameter(A.imag.clone())
        self.log_dt = nn.Parameter(log_uniform(len(A)))
        self.B = nn.Parameter(torch.randn(len(A), d_model, 2) * (0.5 / d_model) ** 0.5)
        self.C = nn.Parameter(torch.randn(d_model, len(A), 2) * (0.5 / len(A)) ** 0.5)
        self.D, self.out = nn.Parameter(torch.randn(d_model)), GLU(d_model, d_model)
        slow(self.log_A_real, self.A_imag, self.log_dt)

    def project(self, x, carry):
        u = at_least_float32(x)
        A = torch.complex(*(at_least_float32(y) for y in (-self.log_A_real.exp(), self.A_imag)))
        log_a, b = zoh(A, at_least_float32(self.log_dt).exp())
        with torch.autocast(x.device.type, enabled=False):
            v = torch.view_as_complex(at_least_float32(self.B)) @ u.mT.to(log_a.dtype)             # (b, n, t)
        g, k = log_a[None, :, None, None], b[None, :, None, None]
        return (v, g, k, torch.ones_like(g)), x, carry

    def finish(self, y, x):
        with torch.autocast(x.device.type, enabled=False):
            y = 2 * (torch.view_as_complex(at_least_float32(self.C)) @ y).real.mT
            y = y + at_least_float32(self.D) * at_least_float32(x)
        return self.out(F.gelu(y.to(x.dtype)))

    def init_state(self, batch_size):
        real = at_least_float32(self.D)
        zero = real.new_zeros(batch_size, self.channels, 1)
        return self.init_carry(batch_size), torch.complex(zero, zero)

    def state_size(self, t):
        return 2 * self.channels


class LiquidS4(SelectiveMixer):
    """Liquid-S4 [H23, eq. 9]: the input also drives the decay, h_t = (a + b u_t) h_{t-1} + b u_t with S4D's a and b.
    As the selective scan that it is; |a + b u_t| is cut at 1, so that no length overflows (the authors truncate the
    kernel's expansion)."""

    def __init__(self, d_model, n_heads=None, n_state=16):
        super().__init__()
        self.channels, self.n_state, self.s4d = d_model, n_state // 2, S4D(d_model, n_state=n_state)

    def project(self, x, carry):
        log_a, b, C, D = self.s4d.discrete()
        v = at_least_float32(x).mT.to(log_a.dtype)                                   # (b, c, t)
        g = torch.log(log_a.exp()[:, None] + b[:, None] * v[..., None])              # (b, c, t, n)
        g = torch.complex(g.real.clamp(max=0), g.imag)
        return (v, g, b[None, :, None], C[None, :, None]), x.dtype, carry

    def skip(self):
        return at_least_float32(self.s4d.D)

    def finish(self, y, dtype):
        return self.s4d.out(F.gelu(y.real.mT.to(dtype)))

    def init_state(self, batch_size):
        b = self.s4d.discrete()[1]
        return self.init_carry(batch_size), b.new_zeros(batch_size, *b.shape)

    def state_size(self, t):
        return 2 * self.channels * self.n_state


MIXERS = {"lssl": LSSL, "s4": S4, "dss": DSS, "s4d": S4D, "s4d_inv": S4DInv, "s4d_legs": S4DLegS, "s5": S5, "lru": LRU,
          "ema": EMA, "sgconv": SGConv, "liquid_s4": LiquidS4, "gss": GSS, "bigs": BiGS, "h3": H3, "hyena": Hyena,
          "modal": Modal, "monarch": Monarch, "monarch_mixer": MonarchMixer, "mamba": Mamba, "rglru": RGLRU,
          "qrnn": QRNN, "sru": SRU}
# --------------------------------------------------------------------------------------------------------------- tasks
#
# A task makes a batch: ids (b, t), targets (b, t) with -100 where nothing is asked: here everywhere but at the end. The
# two of H3's table are trained on every token, as in the paper: progress is the share of the training that is done.


def ask_at_the_end(ids, answer, all_tokens=False):
    """all_tokens: every next token is asked for too, guessable or not."""
    targets = torch.full_like(ids, -100)
    targets[:, -1] = answer
    if all_tokens:
        targets[:, :-1] = ids[:, 1:]
    return ids, targets


def h3_recall(batch_size=32, generator=None, length=20, vocab_size=10, all_tokens=True, progress=1.0):
    """Associative recall as in H3's table 2 [F23]: key value key value ... key; the first half of the vocabulary are
    keys, the second values, each key keeps its value in a sequence. Asked for: the value of the last key, which
    occurred before. all_tokens: while training (progress < 1) every next token is in the loss, as in the paper: the
    value of every key that came before can be known, the rest only guessed. (How often a key comes back is chosen
    here; the paper gives the sizes.)"""
    if length < 3 or vocab_size < 2:
        raise ValueError(f"h3_recall needs length >= 3 and vocab_size >= 2, not {length} and {vocab_size}")
    n_keys, n_pairs = vocab_size // 2, (length - 1) // 2
    value_of = torch.randint(n_keys, vocab_size, (batch_size, n_keys), generator=generator)
    keys = torch.randint(n_keys, (batch_size, n_pairs), generator=generator)
    query = keys.gather(1, torch.randint(n_pairs, (batch_size, 1), generator=generator))
    pairs = torch.stack([keys, value_of.gather(1, keys)], dim=2).flatten(1)
    return ask_at_the_end(torch.cat([pairs, query], dim=1), value_of.gather(1, query)[:, 0],
                          all_tokens and progress < 1)


def h3_induction(batch_size=32, generator=None, length=30, vocab_size=20, all_tokens=True, progress=1.0):
    """Induction heads as in H3's table 2 [F23]: random tokens; a mark (the last of the vocabulary) once among them
    and again at the end. Asked for: the token that followed the mark. all_tokens as in h3_recall; of the others none
    can be known."""
    if length < 4 or vocab_size < 2:
        raise ValueError(f"h3_induction needs length >= 4 and vocab_size >= 2, not {length} and {vocab_size}")
    ids = torch.randint(vocab_size - 1, (batch_size, length), generator=generator)
    at = torch.randint(length - 3, (batch_size, 1), generator=generator)
    ids.scatter_(1, at, vocab_size - 1)
    ids[:, -1] = vocab_size - 1
    return ask_at_the_end(ids, ids.gather(1, at + 1)[:, 0], all_tokens and progress < 1)


LISTOPS = {10: min, 11: max, 12: lambda a: sorted(a)[(len(a) - 1) // 2], 13: lambda a: sum(a) % 10}     # MED, SUM-MOD
LISTOPS_END, LISTOPS_PAD = 14, 15


def listops(batch_size=32, generator=None, length=100, vocab_size=16, max_depth=10, max_args=10):
    """ListOps after Long Range Arena's generator [T21]: nested [MIN ...], [MAX ...],
    [MED ...], [SM ...] (the sum modulo 10) of digits; an argument is a digit with probability 0.75. [MAX 2 9 [MIN 4
    7] 0] is 9. Tokens: digits 0 to 9, opening operators 10 to 13, ] 14, padding 15 on the left. Expressions fill a
    quarter of `length` at least, all of it at most (the benchmark: 500 to 2000). Asked for at the end: the value.
    (The median of an even number is the lower one.)"""
    if vocab_size != 16 or length < 8 or max_args < 2:
        raise ValueError(f"listops needs length >= 8, its 16 tokens and max_args >= 2, not {length}, {vocab_size} and "
                         f"{max_args}")

    random = Random(int(torch.randint(2 ** 62, (), generator=generator))).random                 # one number at a time

    def expression(tokens, depth=1):
        """Write an expression behind the tokens and return its value: None, and no more, if it becomes too long."""
        if len(tokens) >= length:
            return None
        if depth > 1 and (depth == max_depth or random() < 0.75):
            tokens.append(int(10 * random()))
            return tokens[-1]
        op, values = 10 + int(4 * random()), []
        tokens.append(op)
        for _ in range(2 + int((max_args - 1) * random())):
            values.append(expression(tokens, depth + 1))
            if values[-1] is None:
                return None
        tokens.append(LISTOPS_END)
        return LISTOPS[op](values)

    ids, answers = torch.full((batch_size, length), LISTOPS_PAD), []
    for row in ids:
        tokens, value = [], None
        while value is None or not length // 4 <= len(tokens) <= length:
            tokens = []
            value = expression(tokens)
        row[length - len(tokens):] = torch.tensor(tokens)
        answers.append(value)
    return ask_at_the_end(ids, torch.tensor(answers))


TASKS = {"h3_recall": h3_recall, "h3_induction": h3_induction, "listops": listops}


# ------------------------------------------------------------------------------------------------------ look and check


def timed(f, *args, **more):
    """f's result, and its time in milliseconds: the shortest of up to five calls within a quarter of a second."""
    times = []
    while not times or len(times) < 5 and sum(times) < 0.25:
        start = time.perf_counter()
        y = f(*args, **more)
        times.append(time.perf_counter() - start)
    return y, 1e3 * min(times)


def compare_forms(t=128, d_model=32):
    """Print the time of every form of every mixer, and the largest difference between every two of them (float64)."""
    print(f"{'mixer':14}{'form':11}{'time':>10}   largest difference from the forms above (float64, t = {t})")
    with torch.no_grad():
        for name, make in MIXERS.items():
            torch.manual_seed(0)
            mixer, done = make(d_model).double(), {}
            x = torch.randn(2, t, d_model, dtype=torch.float64)
            for form in (form for form in mixer.forms if form != "triton"):
                y, ms = timed(mixer, x, form)
                gaps = "   ".join(f"{other} {(y - z).abs().max():.0e}" for other, z in done.items())
                print(f"{'' if done else name:14}{form:11}{ms:>7.1f} ms   {gaps}", flush=True)
                done[form] = y


def reconstruction_errors(t=2000, sizes=(8, 32, 64, 128)):
    """Root mean square error with which HiPPO-LegS's n numbers give back a smooth signal of t steps."""
    u = smooth_signal(t)
    return {n: (reconstruct(hippo_online(u, n), t) - u).square().mean().sqrt().item() for n in sizes}


def plot(path, t=64, d_model=16):
    """Above: mixing matrices. Middle: kernels at initialisation. Below: HiPPO's reconstruction of a signal."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(20, 10), constrained_layout=True)
    above, middle, below = figure.subfigures(3, 1, height_ratios=(3, 3, 2.5))
    torch.manual_seed(0)
    x = torch.randn(1, t, d_model)
    with torch.no_grad():
        shown = {"s4d": "Toeplitz", "hyena": "gated", "h3": "gated", "monarch_mixer": "gated", "mamba": "selective",
                 "rglru": "selective", "qrnn": "selective", "monarch": "not causal"}
        for ax, (name, kind) in zip(above.subplots(1, len(shown)), shown.items(), strict=True):
            M = MIXERS[name](d_model).matrix(x)[0]
            M = M[len(M) // 2]
            limit = M[M != 0].abs().quantile(0.95)
            ax.imshow(M, cmap="RdBu_r", vmin=-limit, vmax=limit)
            ax.set_title(f"{name}: {kind}")
            ax.set(xticks=[], yticks=[])
        kernels = [name for name, make in MIXERS.items() if issubclass(make, ConvMixer) and name != "monarch_mixer"]
        places = middle.subplots(2, 7).flat
        for ax in places[len(kernels):]:
            ax.axis("off")
        for ax, name in zip(places, kernels, strict=False):
            ax.plot(at_least_float32(MIXERS[name](d_model).kernel(400)[:3, 1:]).T, lw=0.8)
            ax.set_title(name, fontsize=9)
            ax.tick_params(labelsize=6)
        axes = below.subplots(1, 4)
        u = smooth_signal(2000)
        for ax, (n, error) in zip(axes, reconstruction_errors().items(), strict=True):
            ax.plot(u, lw=0.8, color="lightgray")
            ax.plot(reconstruct(hippo_online(u, n), 2000), lw=0.8)
            ax.set_title(f"HiPPO-LegS, n = {n}: RMSE {error:.3f}", fontsize=9)
            ax.set_ylim(-0.5, 4)
    above.suptitle("Mixing matrices at initialisation")
    middle.suptitle("Kernels at initialisation, three channels each (without the first tap)")
    figure.savefig(path, dpi=80)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lesson 03: state spaces, gated convolutions, selection.")
    parser.add_argument("--plot", metavar="FILE.png", help="draw matrices, kernels and a reconstruction instead")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot)
    else:
        compare_forms()
        print("\nHiPPO-LegS: n numbers for 2000 steps   " + "   ".join(
            f"n = {n}: RMSE {error:.3f}" for n, error in reconstruction_errors().items()))

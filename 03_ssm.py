"""Lesson 03. State spaces: one linear system as a loop, as a long convolution, as a scan; gates; selection.

    h_t = a * h_{t-1} + b u_t          a state of n numbers for each channel; here a is diagonal, often complex
    y_t = Re(C h_t) + D u_t

Unrolled, y = K * u with K_l = Re(C a^l b): the same a at all times makes M a Toeplitz matrix, one row shifted along. A
convolution by FFT trains it in t log t. The loop generates with a state that does not grow. And as a step h -> a_1 h +
b_1 followed by h -> a_2 h + b_2 is again such a step, a scan finds all states in log t rounds. DSS, S4D, LRU, EMA and
S5 differ in a, b and C. A Toeplitz M cannot look at the content. Gates before and after (GSS, H3, Hyena) make M_ts =
q_t K_{t-s} k_s. Letting a, b, C depend on the token (Mamba, RG-LRU, QRNN, SRU) gives up the convolution and keeps the
scan: a diagonal mixer is a selective one whose a, b, C ignore the token, and only then is there a K. Why a state of few
numbers can remember a long past at all is HiPPO's, LSSL's and S4's part, below.

Papers  [G20] Gu et al. 2020, HiPPO  arXiv:2008.07669         [G21]  Gu et al. 2021, LSSL  arXiv:2110.13985
        [G22] Gu et al. 2022, S4  arXiv:2111.00396            [G22b] Gu et al. 2022, S4D  arXiv:2206.11893
        [G22c] Gu et al. 2022, HTTYH  arXiv:2206.12037        [Gup22] Gupta 2022, DSS  arXiv:2203.14343
        [Sm23] Smith et al. 2023, S5  arXiv:2208.04933        [O23]  Orvieto et al. 2023, LRU  arXiv:2303.06349
        [Ma23] Ma et al. 2023, MEGA  arXiv:2209.10655         [L23]  Li et al. 2023, SGConv  arXiv:2210.09298
        [H23] Hasani 2023, Liquid-S4  arXiv:2209.12951        [Me23] Mehta et al. 2023, GSS  arXiv:2206.13947
        [W22] Wang et al. 2022, BiGS  arXiv:2212.10544        [F23]  Fu et al. 2023, H3  arXiv:2212.14052
        [P23] Poli et al. 2023, Hyena  arXiv:2302.10866       [M23]  Massaroli 2023, Laughing Hyena  arXiv:2310.18780
        [F23b] Fu et al. 2023, Monarch Mixer  2310.12109      [D22b] Dao et al. 2022, Monarch  arXiv:2204.00595
        [GD23] Gu, Dao 2023, Mamba  arXiv:2312.00752          [De24] De et al. 2024, Griffin  arXiv:2402.19427
        [B17] Bradbury et al. 2017, QRNN  arXiv:1611.01576    [Le18] Lei et al. 2018, SRU  arXiv:1709.02755
        [T21] Tay 2021, Long Range Arena  arXiv:2011.04006    [HS86] Hillis, Steele 1986, Data parallel algorithms

Axes    b batch, t time (target), s source, l lag t - s, c channels, n state dim, k tap of a short filter.
Letters A, B: of the continuous system; a, b (the papers' A-bar, B-bar): sampled at steps dt (Delta); in code g = log a,
        k = b, q = C as in lesson 02, and h (x in the papers on state spaces) is the state; K is a kernel, D a skip.

mixer                    what makes K, or a          forms                             state per sequence
s4d s4d_inv s4d_legs dss diagonal A, ZOH             conv recurrent scan parallel      c n (n / 2 complex numbers)
lru                      a on a ring                 conv recurrent scan parallel      2 c n
ema                      damped averages             conv recurrent scan parallel      c n
s5                       diagonal, mixes channels    recurrent scan parallel           n
gss                      S4D in a gated bottleneck   conv recurrent scan parallel      c n / 4
h3 modal                 S4D or modes, two gates     conv recurrent scan parallel      c n, and the short filters' past
liquid_s4                a of the token              recurrent scan parallel           c n
mamba                    a, b, C of the token        recurrent chunked scan parallel   2 c n, and 3 inputs of the filter
rglru qrnn sru           a of the token              recurrent scan parallel           c, and the short filter's past
lssl s4                  dense A, bilinear           conv recurrent parallel           c n; 2 c n
sgconv                   random, multi-scale         conv parallel                     none: the past inputs, c t
hyena                    an MLP of the position      conv parallel                     none: the past inputs, c t
monarch_mixer            products of polynomials     conv parallel                     none: the past inputs, c t
bigs monarch             (see there)                 conv parallel                     not causal
(all but monarch and monarch_mixer also triton: a kernel for the convolution or the scan, the default on a GPU in
bfloat16)

    python 03_ssm.py                  every form against every other, with times; S4's derivation; HiPPO's errors
    python 03_ssm.py --plot FILE.png  mixing matrices, kernels at initialisation, HiPPO's reconstruction
"""
import argparse
import math
import os
import time
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

KERNELS = Path(__file__).with_name("kernels").is_dir()       # a lesson also runs alone, without its kernels
NO_FLOAT64 = {"mps"}                                         # devices that have no float64


def first():
    """The lesson on four tokens, A c B A, with two channels and a state of n = 2 numbers for each: a = (1, -1), b = C =
    (1, 1). Then one state with b = C = 1 whose a the token chooses. Prints and returns u, a, b, C, the states, K, M,
    M u, the chosen a and its M."""
    A, B, c = (2.0, 0.0), (0.0, 2.0), (-1.0, -1.0)
    u = torch.tensor([A, c, B, A])                                                   # (t, c)
    a, b, C = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0])       # (n,) each

    # Token by token: h_t = a h_{t-1} + b u_t, y_t = C h_t.
    h, states, loop_ = torch.zeros(2, 2), [], []                                     # (c, n)
    for t in range(4):
        h = a * h + b * u[t][:, None]
        states.append(h)
        loop_.append(h @ C)

    # As a convolution: K_l = sum_n C a^l b, y_t = sum_{s <= t} K_{t-s} u_s.
    K = torch.stack([(C * a ** l * b).sum() for l in range(4)])                      # (t,)
    M = torch.tensor([[K[t - s].item() if s <= t else 0.0 for s in range(4)] for t in range(4)])   # (t, s)
    conv = F.conv1d(F.pad(u.T[None], (3, 0)), K.flip(0).repeat(2, 1, 1), groups=2)[0].T            # (t, c)

    # As a scan: first neighbours are joined, then pairs; "a, then a" is a a, "b u_1, then b u_2" is a b u_1 + b u_2.
    step_a, step_b = a.expand(4, 1, 2), u[:, :, None] * b                            # (t, 1, n), (t, c, n)
    for lag in (1, 2):
        earlier_a = torch.cat([torch.ones(lag, 1, 2), step_a[:-lag]])
        earlier_b = torch.cat([torch.zeros(lag, 2, 2), step_b[:-lag]])
        step_a, step_b = step_a * earlier_a, step_a * earlier_b + step_b

    assert torch.equal(M @ u, torch.stack(loop_)) and torch.equal(M @ u, conv)
    assert torch.equal(step_b, torch.stack(states))
    print(f"four tokens, A c B A, two channels: a = (1, -1), b = C = (1, 1), so K = {K.int().tolist()}")
    print("    h of each channel            M, one row shifted along   M u = loop = convolution = scan")
    for token, h, row, y in zip("AcBA", states, M.tolist(), (M @ u).tolist(), strict=True):
        rows = " ".join(f"({x:3g} {z:3g})" for x, z in h.tolist())
        print(f"    {token}  {rows}  " + "".join(f"{x:6g}" for x in row) + "   " + "".join(f"{x:6g}" for x in y))

    # Selection: a_t is 0 at B, which forgets all before it, and 1 elsewhere. No K can write this M.
    a_t, chosen = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.zeros(4, 4)
    for t in range(4):
        for s in range(t + 1):
            chosen[t, s] = a_t[s + 1:t + 1].prod()
    print("    with a = 0 at B, 1 elsewhere, M has the rows " + " ".join(str(row) for row in chosen.int().tolist())
          + ": not Toeplitz, so no convolution\n")
    return u, a, b, C, torch.stack(states), K, M, M @ u, a_t, chosen


# --------------------------------------------------------------------------------------- one linear system, four ways
#
# u: (b, c, t); g = log a, k = b, q = C: broadcast to (b, c, t, n), with a time axis of 1 if they are the same at all
# times; Re g <= 0. h: (b, c, n), the state before the first token, or None for zeros. Each way returns y: (b, c, t)
# and the state after the last token. D is added by the mixer.


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
        ctx.save_for_backward(a, b, states, h)
        for t in range(b.shape[2]):
            h = torch.addcmul(b[:, :, t], a[:, :, t], h, out=states[:, :, t])
        return states

    @staticmethod
    def backward(ctx, dh):
        a, b, states, h = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():        # a gradient of the gradient is wanted
            return tuple(gradients(scan_from, (a, b, h), dh))
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


def through_states(how, u, g, k, q, h):
    """All states h_t = e^g h_{t-1} + k u_t, by a loop or a scan; y_t = sum_n q h_t."""
    ku = k * u[..., None]                                                            # (b, c, t, n)
    h = how(torch.exp(g).expand_as(ku), ku, h)
    return real_like(u, (q * h).sum(dim=-1)), h[:, :, -1]


def kernel_of(g, k, q, t):
    """K_l = sum_n q e^{g l} k, (c, t), of a system that is the same at all times. With l = m i + j it is sum_n
    (q k e^{g m i}) e^{g j}: two short tables of powers instead of a long one."""
    g, qk, m = g[0, :, 0], (q * k)[0, :, 0], math.ceil(t ** 0.5)                     # (c, n)
    K = (qk[..., None] * powers(g, -(-t // m), m)).mT @ powers(g, m)                 # (c, i, j)
    return K.flatten(1)[:, :t]


def powers(g, t, step=1):
    """a^0, a^step, ..., t of them: (c, n, t)"""
    return torch.exp(g[..., None] * (step * torch.arange(t, device=g.device)))


def convolved(u, g, k, q, h):
    """K * u for the block; the state before it enters as q a^{l+1} h, the state after it is sum_s a^{t-1-s} k u_s."""
    t, y = u.shape[2], fft_conv(u, kernel_of(g, k, q, u.shape[2]).real)
    if h is None:
        return y, None
    g, k, q = (z[0, :, 0] for z in (g, k, q))                                        # (c, n)
    a, table = torch.exp(g), powers(g, t)                                            # (c, n, t)
    y = y + torch.einsum("bcn,cnt->bct", q * a * h, table).real
    after = torch.einsum("cnt,bct->bcn", k[..., None] * table.flip(-1), u.to(table.dtype))
    return y, after + a * table[..., -1] * h


def weights(g, k, q, t):
    """M_ts = sum_n q_tn e^{g_{s+1} + ... + g_t} k_sn: lesson 02's, with a head for each channel; (b or 1, c, t, s). If
    nothing depends on the token it is Toeplitz."""
    if all(z.shape[0] == z.shape[2] == 1 for z in (g, k, q)):
        return toeplitz(kernel_of(g, k, q, t))[None]
    below = torch.ones(t, t, dtype=torch.bool, device=g.device).tril(-1)[..., None]
    G = torch.where(below, g.expand(*g.shape[:2], t, -1).unsqueeze(3), 0).cumsum(dim=2)              # (b, c, t, s, n)
    return (q[:, :, :, None] * G.exp() * k[:, :, None]).sum(dim=-1).tril()


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


WAYS = {"recurrent": loop, "scan": scan_from, "chunked": chunks, "triton": triton_scan}      # through all states


# A continuous system h' = A h + B u, diagonal A, sampled at steps dt, as (log a, b / B). Elementwise; Re A < 0.


def zoh(A, dt):
    """Zero-order hold, exact for inputs constant over a step: a = e^{dt A}, b = (e^{dt A} - 1) / A."""
    z = dt * A
    tiny = z.abs() < 1e-6                                                            # there it is 1 + z / 2
    quotient = torch.where(tiny, 1 + z / 2, torch.expm1(z) / torch.where(tiny, 1, z))
    return z, dt * quotient


def bilinear(A, dt):
    """Trapezoidal rule: a = (1 + dt A / 2) / (1 - dt A / 2), b = dt / (1 - dt A / 2)."""
    return torch.log((1 + dt * A / 2) / (1 - dt * A / 2)), dt / (1 - dt * A / 2)


# ------------------------------------------------------------------------------------------- from a system to a mixer


class Signals(NamedTuple):
    """What a mixer makes of x for its system: y = post * (system(pre * v))."""
    v: torch.Tensor                        # (b, c, t)
    g: torch.Tensor = None                 # log a, b, C: to (b, c, t, n), see above; None without a diagonal system
    k: torch.Tensor = None
    q: torch.Tensor = None
    pre: torch.Tensor = None               # gates: (b, c, t), or None
    post: torch.Tensor = None


class StateSpace(nn.Module):
    """What every mixer of this lesson does. A mixer has

    project(x, carry) -> Signals, whatever finish wants, carry: what projecting needs of the past (a filter's inputs)
    system()          -> g, k, q, if they ignore the token
    finish(y, more)   -> (b, t, c)

    and channels, n_state, complex_state and possibly D: (c,). Then M_ts = post_t (weights_ts + D) pre_s. A state is
    (carry, h). Systems run in float32 or better, also under autocast. The first three are here as S4D needs them."""
    forms = ("conv", "recurrent", "scan", "parallel", "triton")
    causal = True
    complex_state = True
    goes_on_by = "conv"                    # the form of prefill; None: the fastest

    def project(self, x, carry):
        return Signals(x.mT, *self.system()), None, carry

    def system(self):
        return None, None, None

    def finish(self, y, _):
        return self.out(F.gelu(y.mT))

    def gates(self, s):
        """g, k, q of the signals, in float32 or better."""
        return [at_least_float32(z) for z in (s.g, s.k, s.q)]

    def mix(self, form, u, s, h):
        """y: (b, c, t), and the state after it."""
        if form == "recurrent" and u.shape[2] > 1:
            u, s = side_by_side(u), Signals(*map(side_by_side, s))
        g, k, q = self.gates(s)
        if form == "conv":
            y, h = convolved(u, g, k, q, h)
        elif form == "parallel":
            y, h = (real_like(u, weights(g, k, q, u.shape[2])) @ u[..., None])[..., 0], None
        else:
            y, h = through_states(WAYS[form], u, g, k, q, h)
        return self.with_skip(y, u), h

    def with_skip(self, y, u):
        return y + at_least_float32(self.D)[:, None] * u if hasattr(self, "D") else y

    def filter(self, t):
        """K without D: (c, t)"""
        return kernel_of(*self.system(), t).real

    def kernel(self, t):
        """K with D in its first tap: (c, t)"""
        return self.filter(t) + F.pad(at_least_float32(self.D)[:, None], (0, t - 1))

    def run(self, x, state, form):
        carry, h = (self.init_carry(len(x)), None) if state is None else state
        if h is not None and len(h) != len(x):
            raise ValueError(f"the state is of {len(h)} sequences, x of {len(x)}")
        s, more, carry = self.project(x, carry)
        with torch.autocast(x.device.type, enabled=False):
            v, pre, post = (z if z is None else at_least_float32(z) for z in (s.v, s.pre, s.post))
            u = v if pre is None else pre * v                                        # (b, c, t)
            y, h = self.mix(form, u, s, h)
            y = y if post is None else post * y
        return self.finish(y if y.is_complex() else y.to(x.dtype), more), (carry, h)

    def forward(self, x, form=None):
        form = pick_form(self, x, form)
        if form == "triton" and "conv" in self.forms:            # the gates are in the kernel
            s, more, _ = self.project(x, self.init_carry(len(x)))
            return self.finish(triton_conv(s.v, self.kernel, s.pre, s.post), more)
        return self.run(x, None, form)[0]

    def prefill(self, x, state=None):
        form = pick_form(self, x)
        return self.run(x, self.init_state(len(x)) if state is None else state, self.goes_on_by or form)

    def step(self, x_t, state):
        y, state = self.run(x_t[:, None], state, "recurrent")
        return y[:, 0], state

    def init_carry(self, batch_size):
        return self.short.init_carry(batch_size) if hasattr(self, "short") else next(self.parameters()).new_zeros(
            batch_size, 0)

    def init_state(self, batch_size):
        h = at_least_float32(next(self.parameters())).new_zeros(batch_size, self.channels, self.n_state)
        return self.init_carry(batch_size), torch.complex(h, h) if self.complex_state else h

    def state_size(self, t):
        return self.channels * self.n_state * (2 if self.complex_state else 1) + self.init_carry(1).numel()

    def values(self, x):
        return self.project(x, self.init_carry(len(x)))[0].v[..., None]              # (b, c, s, 1)

    def output(self, o, x):
        return self.finish(o[..., 0], self.project(x, self.init_carry(len(x)))[1])

    def matrix(self, x):
        s = self.project(x, self.init_carry(len(x)))[0]
        M = self.mixing_matrix(s, x.shape[1])                                        # (1 or b, c, t, s)
        M = M + torch.diag_embed(self.D[:, None].expand(-1, x.shape[1])) if hasattr(self, "D") else M
        M = M if s.pre is None else M * s.pre[:, :, None, :]
        return (M if s.post is None else M * s.post[..., None]).expand(len(x), -1, -1, -1)

    def mixing_matrix(self, s, t):
        return real_like(s.v, weights(*self.gates(s), t))


# ------------------------------------------------------------------------------------------------------ S4D, and kin


# Diagonal A for S4D [G22b, section 4]: n / 2 eigenvalues of imaginary part 0 or more. The others are their conjugates,
# whose terms have the same real part: hence the factor 2 in C.


def s4d_lin(n):
    """-1/2 + i pi k. (k = 0 is real, and counts twice.)"""
    k = torch.arange(n // 2, dtype=torch.float32)
    return torch.complex(torch.full_like(k, -0.5), math.pi * k)


def s4d_inv(n):
    """-1/2 + i (n / pi) (n / (2k + 1) - 1)"""
    k = torch.arange(n // 2, dtype=torch.float32)
    return torch.complex(torch.full_like(k, -0.5), n / math.pi * (n / (2 * k + 1) - 1))


def s4d_legs(n):
    """The eigenvalues of HiPPO-LegS + P P^T, P = sqrt(k + 1/2): the normal part of A."""
    return legs_normal_part(n)[0][n // 2:]


DIAGONALS = {"lin": s4d_lin, "inv": s4d_inv, "legs": s4d_legs}


class Diagonal(nn.Module):
    """The system of S4D [G22b]: A = -e^alpha + i beta of half of n states, for each channel or (1, n / 2) for all; B,
    or 1; C; dt in seconds a step, log-uniform at first, or 1. Returns g, k, q."""

    def __init__(self, channels, A, B=None, steps=(1e-3, 1e-1)):
        super().__init__()
        self.log_dt = nn.Parameter(log_uniform(channels, low=steps[0], high=steps[1])) if steps else None
        self.log_A_real, self.A_imag = nn.Parameter((-A.real).log()), nn.Parameter(A.imag.clone())
        self.C = nn.Parameter(torch.randn(channels, A.shape[-1], 2) * 0.5 ** 0.5)
        self.B = None if B is None else nn.Parameter(torch.view_as_real(B).repeat(channels, 1, 1))
        slow(*(p for p in (self.log_dt, self.log_A_real, self.A_imag, self.B) if p is not None))

    def forward(self, discretise=zoh):
        A = torch.complex(*(at_least_float32(x) for x in (-self.log_A_real.exp(), self.A_imag)))
        dt = torch.ones_like(A.real[:1, :1]) if self.log_dt is None else at_least_float32(self.log_dt).exp()[:, None]
        g, k = discretise(A, dt)                                                     # (c or 1, n)
        k = k if self.B is None else k * torch.view_as_complex(at_least_float32(self.B))
        q = 2 * torch.view_as_complex(at_least_float32(self.C))
        return tuple(z.expand_as(q)[None, :, None] for z in (g, k, q))               # (1, c, 1, n)


class GLU(nn.Module):
    """The output of an S4 layer: one linear layer gates another."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.linear = linear(d_in, 2 * d_out, bias=True)

    def forward(self, y):
        return F.glu(self.linear(y), dim=-1)


class S4D(StateSpace):
    """S4D [G22b]: a diagonal system for each channel, zero-order hold, then GELU and a gated linear layer. init: where
    the eigenvalues start, lin, inv or legs; with legs, B starts as HiPPO's (hippo_B), otherwise it is 1, in C."""
    init = "lin"

    def __init__(self, d_model, n_heads=None, n_state=64, init=None, hippo_B=True):
        super().__init__()
        if n_state < 2 or n_state % 2:
            raise ValueError(f"n_state {n_state} is not an even number above 0: states come in conjugate pairs")
        init = init or self.init
        if init not in DIAGONALS:
            raise ValueError(f"unknown init {init!r}; there are {', '.join(DIAGONALS)}")
        self.channels, self.n_state = d_model, n_state // 2
        A, B = DIAGONALS[init](n_state), None
        if init == "legs" and hippo_B:
            B = legs_normal_part(n_state)[1][n_state // 2:]
            B = B * (2 / B.abs()).clamp(max=1)                   # it goes up to 41 for n = 64; the authors cut it at 2
        self.diagonal = Diagonal(d_model, A.repeat(d_model, 1), B)
        self.D, self.out = nn.Parameter(torch.randn(d_model)), GLU(d_model, d_model)

    def system(self):
        return self.diagonal()


class S4DInv(S4D):
    """S4D whose eigenvalues start as s4d_inv says."""
    init = "inv"


class S4DLegS(S4D):
    """S4D whose eigenvalues and B start as those of HiPPO-LegS's normal part."""
    init = "legs"


class DSS(S4D):
    """DSS [Gup22, prop. 1b]: K = Re(w / Lambda softmax_l(Lambda dt l)): S4D with another b, of which the softmax is a
    scale, b = 1 / (Lambda sum_l a^l) over max_len positions.
    Differs: the authors take the softmax over the length at hand, so that their loop agrees at that length only; they
    share Lambda over the channels, and give its real and imaginary part a dt each."""
    init = "legs"

    def __init__(self, d_model, n_heads=None, n_state=64, max_len=1024):
        super().__init__(d_model, n_heads, n_state, hippo_B=False)
        self.max_len = max_len

    def system(self):
        def softmax(A, dt):
            g = dt * A
            return g, torch.expm1(g) / torch.expm1(self.max_len * g) / A
        return self.diagonal(softmax)


class LRU(StateSpace):
    """Linear recurrent unit [O23, section 3]: a = exp(-e^nu + i e^theta), at first uniform on the disc (or on a ring
    r_min to r_max, phases to max_phase); inputs scaled by gamma, which starts as sqrt(1 - |a|^2), so that long memories
    do not blow up, and is learned in the log.
    Differs: B and C are diagonal, one system a channel, where the paper has one system for all."""

    def __init__(self, d_model, n_heads=None, n_state=16, r_min=0.0, r_max=1.0, max_phase=2 * math.pi):
        super().__init__()
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"0 <= r_min < r_max <= 1 must hold, not r_min = {r_min} and r_max = {r_max}")
        self.channels, self.n_state = d_model, n_state
        radius2 = torch.rand(d_model, n_state) * (r_max ** 2 - r_min ** 2) + r_min ** 2
        self.nu = nn.Parameter((-0.5 * radius2.log()).log())
        self.theta = nn.Parameter((torch.rand(d_model, n_state) * max_phase).log())
        self.log_gamma = nn.Parameter(torch.log(1 - radius2) / 2)
        self.B = nn.Parameter(torch.randn(d_model, n_state, 2) * 0.5 ** 0.5)
        self.C = nn.Parameter(torch.randn(d_model, n_state, 2) * n_state ** -0.5)
        self.D, self.out = nn.Parameter(torch.randn(d_model)), GLU(d_model, d_model)
        slow(self.nu, self.theta, self.log_gamma)

    def system(self):
        nu, theta, log_gamma = (at_least_float32(x) for x in (self.nu, self.theta, self.log_gamma))
        B, C = (torch.view_as_complex(at_least_float32(x)) for x in (self.B, self.C))
        g = torch.complex(-nu.exp(), theta.exp())
        return tuple(z[None, :, None] for z in (g, log_gamma.exp() * B, C))          # (1, c, 1, n)


class EMA(StateSpace):
    """MEGA's damped moving average [Ma23, eq. 3-5]: n averages a channel, a = 1 - alpha delta, b = alpha beta, alpha
    and delta in (0, 1); silu(y + omega x) after (omega: D). Real and positive: it can only smooth."""
    complex_state = False

    def __init__(self, d_model, n_heads=None, n_state=16):
        super().__init__()
        self.channels, self.n_state = d_model, n_state
        self.alpha, self.delta = (nn.Parameter(0.2 * torch.randn(d_model, n_state)) for _ in range(2))
        self.beta = nn.Parameter(0.02 * torch.randn(d_model, n_state) + (-1.0) ** torch.arange(n_state))
        self.gamma, self.D = nn.Parameter(torch.randn(d_model, n_state)), nn.Parameter(torch.randn(d_model))
        self.out = linear(d_model, d_model)
        slow(self.alpha, self.delta)

    def system(self):
        alpha, delta, beta, gamma = (at_least_float32(x) for x in (self.alpha, self.delta, self.beta, self.gamma))
        alpha, delta = alpha.sigmoid(), delta.sigmoid()
        g = torch.log1p(-(alpha * delta).clamp(max=1 - 1e-6))    # a = 0 has no logarithm
        return tuple(z[None, :, None] for z in (g, alpha * beta, gamma * self.n_state ** -0.5))

    def finish(self, y, _):
        return self.out(F.silu(y.mT))


class S5(StateSpace):
    """S5 [Sm23]: one system for all channels, h_t = a h_{t-1} + b B u_t with B: (n, c), y = Re(C h) + D u: it mixes
    the channels too, so no kernel stands for it. Diagonal a from the eigenvalues of HiPPO-LegS in blocks, a dt for each
    state, zero-order hold. Its states take the place of the channels, with one number each."""
    forms = ("recurrent", "scan", "parallel", "triton")
    goes_on_by, n_state = None, 1

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
        self.skip, self.out = nn.Parameter(torch.randn(d_model)), GLU(d_model, d_model)      # D, of x and not of B x
        slow(self.log_A_real, self.A_imag, self.log_dt)

    def project(self, x, carry):
        A = torch.complex(*(at_least_float32(y) for y in (-self.log_A_real.exp(), self.A_imag)))
        g, k = (z[None, :, None, None] for z in zoh(A, at_least_float32(self.log_dt).exp()))         # (1, n, 1, 1)
        with torch.autocast(x.device.type, enabled=False):
            v = torch.view_as_complex(at_least_float32(self.B)) @ at_least_float32(x).mT.to(g.dtype)     # (b, n, t)
        return Signals(v, g, k, torch.ones_like(g)), x, carry

    def finish(self, y, x):
        with torch.autocast(x.device.type, enabled=False):
            y = 2 * (torch.view_as_complex(at_least_float32(self.C)) @ y).real.mT
            y = y + at_least_float32(self.skip) * at_least_float32(x)
        return self.out(F.gelu(y.to(x.dtype)))


# ------------------------------------------------------------------------------------------- gates before and after


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


class GSS(StateSpace):
    """Gated state space [Me23, figure 1]: S4D in a bottleneck of a quarter of the width, behind a LayerNorm, with
    random A that all channels share, B = 1 and dt = 1; a GELU branch of four times the width gates its output."""

    def __init__(self, d_model, n_heads=None, n_state=64):
        super().__init__()
        self.channels = narrow = max(1, d_model // 4)
        self.n_state = n_state // 2
        A = torch.complex(-torch.randn(1, self.n_state).exp(), torch.randn(1, self.n_state).exp())
        self.diagonal, self.D = Diagonal(narrow, A, steps=None), nn.Parameter(torch.randn(narrow))
        self.down, self.norm, self.up = linear(d_model, narrow), nn.LayerNorm(narrow), linear(narrow, 4 * d_model)
        self.gate, self.out = linear(d_model, 4 * d_model), linear(4 * d_model, d_model)

    def project(self, x, carry):
        return Signals(self.norm(F.gelu(self.down(x))).mT, *self.diagonal()), x, carry

    def system(self):
        return self.diagonal()

    def finish(self, y, x):
        return self.out(self.up(y.mT) * F.gelu(self.gate(x)))


class H3(StateSpace):
    """H3 [F23, section 3]: q * SSM_diag(SSM_shift(k) * v), the diagonal system by the trapezoidal rule. The shift
    system with B = e_1 is a short filter, here of 64 taps on k. With the first gate it writes v where k is, with the
    second it reads: made for recall. head_dim d > 1: k and v of a head meet in an outer product, M_ts = (q_t . k_s)
    K_{t-s}: linear attention whose decay is a long convolution; d times the state. (The authors' code takes heads as
    (h d) and returns them as (d h).)"""

    def __init__(self, d_model, n_heads=None, n_state=64, shift=64, head_dim=1):
        super().__init__()
        if head_dim < 1 or d_model % head_dim:
            raise ValueError(f"d_model {d_model} is not a multiple of head_dim {head_dim}")
        if n_state < 2 or n_state % 2:
            raise ValueError(f"n_state {n_state} is not an even number above 0: states come in conjugate pairs")
        self.channels, self.head_dim, self.n_state = d_model * head_dim, head_dim, n_state // 2
        heads = d_model // head_dim                                                  # a system for each head
        self.diagonal = Diagonal(heads, s4d_lin(n_state).repeat(heads, 1))
        self.skip = nn.Parameter(torch.randn(heads))
        self.qkv, self.out = linear(d_model, 3 * d_model, bias=True), linear(d_model, d_model, bias=True)
        self.short = ShortConv(d_model, shift)                                       # the shift system

    def system(self):
        return tuple(z.repeat_interleave(self.head_dim ** 2, dim=1) for z in self.diagonal(bilinear))

    @property
    def D(self):
        return self.skip.repeat_interleave(self.head_dim ** 2)

    def project(self, x, carry):
        q, k, v = in_time(self.qkv, x).chunk(3, dim=1)                               # (b, c, t)
        k, carry = self.short(k, carry)
        q, k, v = (y.unflatten(1, (-1, self.head_dim)) for y in (q, k, v))           # (b, h, d, t)
        grid = (-1, -1, self.head_dim, self.head_dim, -1)                            # (b, h, d of k, d of v, t)
        v, k, q = (y.expand(grid).flatten(1, 3) for y in (v[:, :, None], k[:, :, :, None], q[:, :, :, None]))
        return Signals(v, *self.system(), pre=k, post=q), None, carry

    def finish(self, y, _):
        y = y.unflatten(1, (-1, self.head_dim, self.head_dim)).sum(dim=2)            # over d of q and k
        return self.out(y.flatten(1, 2).mT)


class Gated(StateSpace):
    """Hyena's gates [P23, section 3], q * (K * (k * v)): three projections, a short filter on each, no activation. For
    the mixers that differ in K only."""

    def add_gates(self, d_model):
        self.qkv, self.short = linear(d_model, 3 * d_model, bias=True), ShortConv(3 * d_model, 3, bias=True)
        self.out = linear(d_model, d_model, bias=True)

    def project(self, x, carry):
        qkv, carry = self.short(in_time(self.qkv, x), carry)
        q, k, v = qkv.chunk(3, dim=1)                                                # (b, c, t)
        return Signals(v, *self.system(), pre=k, post=q), None, carry

    def finish(self, y, _):
        return self.out(y.mT)


class Modal(Gated):
    """The modal filter of StripedHyena [M23, section 3]: K_l = Re sum_n R_n lambda_n^l, between Hyena's gates:
    Hyena's filter family with a finite state, so that it also recurs. |lambda| starts between 0.8 and 0.999."""

    def __init__(self, d_model, n_heads=None, n_state=16):
        super().__init__()
        self.channels, self.n_state = d_model, n_state
        radius = 0.8 + 0.199 * torch.rand(d_model, n_state)
        self.log_decay = nn.Parameter((-radius.log()).log())
        self.angle = nn.Parameter(math.pi * torch.rand(d_model, n_state))
        self.R, self.D = nn.Parameter(torch.randn(d_model, n_state, 2) / n_state), nn.Parameter(torch.ones(d_model))
        self.add_gates(d_model)
        slow(self.log_decay, self.angle)

    def system(self):
        decay, angle, R = (at_least_float32(x) for x in (self.log_decay, self.angle, self.R))
        g = torch.complex(-decay.exp(), angle)
        return tuple(z[None, :, None] for z in (g, torch.ones_like(g), torch.view_as_complex(R)))


class BiGS(nn.Module):
    """Bidirectional gated SSM [W22]: one system runs forward, one backward, each on an input of its own; their outputs
    are multiplied, pass a layer with GELU, and are gated:
    out(gelu(up(W_f SSM(gelu(F x)) * flip(W_b SSM(gelu(B flip x))))) * gelu(V x)).
    Not causal, so no recurrence. (M here is the forward system's; the backward one is a gate on what it gives.)
    Differs: a system for each channel, where the authors share one over the channels."""
    forms = ("conv", "parallel", "triton")
    causal = False

    def __init__(self, d_model, n_heads=None, n_state=64):
        super().__init__()
        self.ahead, self.back = (Diagonal(d_model, s4d_lin(n_state).repeat(d_model, 1), steps=(1e-2, 1)) for _ in "12")
        self.D_ahead, self.D_back = (nn.Parameter(torch.ones(d_model)) for _ in "12")
        self.into_ahead, self.into_back, self.up_ahead, self.up_back = (linear(d_model, d_model, True) for _ in "1234")
        self.up, self.gate = linear(d_model, 3 * d_model, bias=True), linear(d_model, 3 * d_model, bias=True)
        self.out = linear(3 * d_model, d_model, bias=True)

    def one_way(self, system, D, form, v):
        """The system on v: (b, c, t)."""
        if form == "triton":
            return triton_conv(v, lambda t: self.kernel(system, D, t))
        with torch.autocast(v.device.type, enabled=False):
            v, K = at_least_float32(v), self.kernel(system, D, v.shape[2])
            return fft_conv(v, K) if form == "conv" else (toeplitz(K) @ v[..., None])[..., 0]

    def kernel(self, system, D, t):
        return kernel_of(*system(), t).real + F.pad(at_least_float32(D)[:, None], (0, t - 1))

    def forward(self, x, form=None):
        form = pick_form(self, x, form)
        o = self.one_way(self.ahead, self.D_ahead, form, self.values(x)[..., 0])
        return self.output(o[..., None], x, form)

    def values(self, x):
        return F.gelu(self.into_ahead(x)).mT[..., None]                              # (b, c, s, 1)

    def output(self, o, x, form="conv"):
        back = self.one_way(self.back, self.D_back, form, F.gelu(self.into_back(x)).mT.flip(-1)).flip(-1)
        o, back = (y.to(x.dtype).mT for y in (o[..., 0], back))                      # (b, t, c)
        return self.out(F.gelu(self.up(self.up_ahead(o) * self.up_back(back))) * F.gelu(self.gate(x)))

    def matrix(self, x):
        return toeplitz(self.kernel(self.ahead, self.D_ahead, x.shape[1]))[None].expand(len(x), -1, -1, -1)

    def state_size(self, t):
        return 0      # it keeps nothing, because it cannot go on


# ---------------------------------------------------------------------------------------------------- selective mixers


class Selective(StateSpace):
    """A system whose a, b or C depend on the token: no K, so no convolution; a text goes on by a scan."""
    forms = ("recurrent", "scan", "parallel", "triton")
    complex_state, n_state, goes_on_by = False, 1, None


class LiquidS4(Selective):
    """Liquid-S4 [H23, eq. 9]: the input also drives the decay, h_t = (a + b u_t) h_{t-1} + b u_t with S4D's a and b.
    cut: |a + b u_t| is at most 1, so that no length overflows.
    Differs: the cut is ours. At the start, for N(0, 1) inputs, it acts on 30% of the steps and changes outputs by 12%
    over 33 tokens, by 35% over 2048; cut=false is eq. 9 as it stands. The authors truncate the kernel's expansion."""
    complex_state = True

    def __init__(self, d_model, n_heads=None, n_state=16, cut=True):
        super().__init__()
        self.channels, self.n_state, self.cut = d_model, n_state // 2, cut
        self.diagonal = Diagonal(d_model, s4d_lin(n_state).repeat(d_model, 1))
        self.D, self.out = nn.Parameter(torch.randn(d_model)), GLU(d_model, d_model)

    def project(self, x, carry):
        g, k, q = self.diagonal()
        v = at_least_float32(x).mT                                                   # (b, c, t)
        a = g.exp() + k * v[..., None]                                               # (b, c, t, n)
        size = a.abs().clamp(min=torch.finfo(v.dtype).tiny ** 0.5).log()
        g = torch.complex(size.clamp(max=0) if self.cut else size, a.angle())
        return Signals(x.mT, g, k, q), None, carry


class Mamba(Selective):
    """Mamba [GD23, algorithm 2]: h_t = e^{dt_t A} h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t, with dt =
    softplus(W_up W_down x + bias), B, C linear in x, A = -(1, ..., n) at first; a short filter and SiLU before, a
    SiLU gate after; inner width 2 c. a is the zero-order hold's, b = dt B is Euler's. The chunked form is the scan
    chunk by chunk: all states of one chunk at a time. Everything lies along time, (b, c, t), as convolution and kernel
    want it."""
    forms = ("recurrent", "chunked", "scan", "parallel", "triton")

    def __init__(self, d_model, n_heads=None, n_state=16, expand=2):
        super().__init__()
        self.channels, self.n_state, rank = expand * d_model, n_state, -(-d_model // 16)
        self.rank = rank
        self.x, self.gate = linear(d_model, self.channels), linear(d_model, self.channels)
        self.short = ShortConv(self.channels, 4, bias=True)
        self.dt_B_C, self.dt = linear(self.channels, rank + 2 * n_state), linear(rank, self.channels, bias=True)
        self.log_A = nn.Parameter(torch.arange(1, n_state + 1).float().log().repeat(self.channels, 1))
        self.D, self.out = nn.Parameter(torch.ones(self.channels)), linear(self.channels, d_model)
        with torch.no_grad():
            dt = log_uniform(self.channels).exp()
            self.dt.bias.copy_(dt + torch.log(-torch.expm1(-dt)))                    # softplus(bias) = dt
            nn.init.uniform_(self.dt.weight, -rank ** -0.5, rank ** -0.5)
        self.log_A.optim = {"weight_decay": 0.0}

    def project(self, x, carry):
        u, carry = self.short(in_time(self.x, x), carry)
        u = F.silu(u)                                                                # (b, c, t)
        dt, B, C = (self.dt_B_C.weight @ u).split([self.rank, self.n_state, self.n_state], dim=1)    # (b, n, t)
        dt = F.softplus(at_least_float32(self.dt.weight @ dt + self.dt.bias[:, None]))               # (b, c, t)
        return Signals(u, dt, B, C), F.silu(in_time(self.gate, x)), carry

    def gates(self, s):
        dt, B, C = (at_least_float32(z) for z in (s.g, s.k, s.q))
        A = -at_least_float32(self.log_A).exp()                                      # (c, n)
        return dt[..., None] * A[:, None], dt[..., None] * B.mT[:, None], C.mT[:, None]              # (b, c, t, n)

    def mix(self, form, u, s, h):
        if form != "triton":
            return super().mix(form, u, s, h)
        from kernels.selective_scan import selective_scan  # never writes (b, c, t, n)
        return selective_scan(s.v, s.g, -self.log_A.exp(), s.k, s.q, self.D, h)

    def finish(self, y, gate):
        return self.out((y * gate).mT)


class RGLRU(Selective):
    """The recurrent block of Hawk and Griffin [De24, section 2.4]: log a_t = -8 softplus(Lambda) r_t, h_t = a_t
    h_{t-1} + sqrt(1 - a_t^2) (i_t * x_t), r and i sigmoids of block-diagonal layers, |a| from 0.9 to 0.999 at r = 1
    at first; a short filter before, a GELU branch gates.
    bias: biases in the three projections. gelu: "none" for GELU itself, "tanh" for its approximation. whole_first: the
    authors' code takes the first input of a text whole, without the root.
    Differs: whole_first is off, as in the paper."""

    def __init__(self, d_model, n_heads=4, bias=False, gelu="none", whole_first=False):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of n_heads {n_heads}, the blocks of its gates")
        self.channels, self.n_heads, self.gelu, self.whole_first = d_model, n_heads, gelu, whole_first
        self.x, self.gate, self.out = (linear(d_model, d_model, bias) for _ in range(3))
        self.short = ShortConv(d_model, 4, bias=True)
        nn.init.normal_(self.short.conv.weight, std=0.05)
        nn.init.zeros_(self.short.conv.bias)
        d = d_model // n_heads
        self.W = nn.Parameter(torch.randn(2, n_heads, d, d) * d ** -0.5)
        self.bias = nn.Parameter(torch.zeros(2, d_model))
        a = torch.sqrt(torch.rand(d_model) * (0.999 ** 2 - 0.9 ** 2) + 0.9 ** 2)
        self.Lambda = nn.Parameter(torch.log(torch.expm1(-a.log() / 8)))             # softplus(Lambda) = -log(a) / 8
        self.Lambda.optim = {"weight_decay": 0.0}

    def project(self, x, carry):
        past = carry[..., :self.short.width - 1]
        u, after = self.short(in_time(self.x, x), past)
        blocks = u.unflatten(1, (self.n_heads, -1))                                  # (b, h, d, t)
        r, i = (torch.einsum("bhdt,hde->bhet", blocks, W).flatten(1, 2) for W in self.W)
        r, i = r + self.bias[0][:, None], i + self.bias[1][:, None]                  # (b, c, t)
        g = -8 * F.softplus(at_least_float32(self.Lambda))[:, None] * at_least_float32(r).sigmoid()
        scale = root(-torch.expm1(2 * g))
        if self.whole_first:                                         # the carry's last column: has a token been seen?
            begun = carry[..., -1:].to(scale.dtype)
            scale = torch.cat([begun * scale[..., :1] + 1 - begun, scale[..., 1:]], dim=2)
            after = torch.cat([after, torch.ones_like(after[..., :1])], dim=2)
        g, k = g[..., None], (scale * i.sigmoid())[..., None]                        # (b, c, t, 1)
        return Signals(u, g, k, torch.ones_like(g)), F.gelu(in_time(self.gate, x), approximate=self.gelu), after

    def init_carry(self, batch_size):
        return F.pad(self.short.init_carry(batch_size), (0, int(self.whole_first)))

    def finish(self, y, gate):
        return self.out((y * gate).mT)


def root(x):
    """The square root, with a gradient of 0 at 0 in place of infinity. (RecurrentGemma bounds it at 1000.)"""
    return x.clamp(min=torch.finfo(x.dtype).tiny).sqrt()


class QRNN(Selective):
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
        z, f, o = (self.now(x) + self.before(shifted)).chunk(3, dim=-1)              # (b, t, c)
        f = at_least_float32(f).mT[..., None]                                        # (b, c, t, 1)
        return Signals(z.tanh().mT, F.logsigmoid(f), torch.sigmoid(-f), torch.ones_like(f)), o.sigmoid(), x[:, -1:]

    def finish(self, y, o):
        return self.out(y.mT * o)

    def init_carry(self, batch_size):
        return self.out.weight.new_zeros(batch_size, 1, self.channels)


class SRU(Selective):
    """Simple recurrent unit [Le18] with gates of the token alone: f, r = sigmoid(W x + b), c_t = f_t c_{t-1} + (1 -
    f_t) W x_t, output r_t c_t + (1 - r_t) sqrt(3) x_t, where sqrt(3) keeps the variance at the start. (Its later
    version adds v * c_{t-1} inside the gates: then a_t needs c_{t-1}, the composition of two steps is no longer of the
    form a c + b, and no scan exists.)"""

    def __init__(self, d_model, n_heads=None):
        super().__init__()
        self.channels = d_model
        self.z, self.f_r = linear(d_model, d_model), linear(d_model, 2 * d_model, bias=True)
        self.out = linear(d_model, d_model)
        nn.init.zeros_(self.f_r.bias)

    def project(self, x, carry):
        f, r = at_least_float32(self.f_r(x)).mT.chunk(2, dim=1)                 # (b, c, t)
        f, r = f[..., None], r.sigmoid().mT
        return (Signals(self.z(x).mT, F.logsigmoid(f), torch.sigmoid(-f), torch.ones_like(f)), (r.to(x.dtype), x),
                carry)

    def finish(self, y, more):
        r, x = more
        return self.out(r * y.mT + (1 - r) * 3 ** 0.5 * x)


# ------------------------------------------------------------------------- why so few numbers remember: HiPPO, LSSL, S4


def hippo_legs(n):
    """HiPPO-LegS [G20, theorem 2, its A with the other sign]: A, B of the system whose state are the Legendre
    coefficients of the whole past."""
    q = torch.arange(n, dtype=torch.float64)
    root = (2 * q + 1).sqrt()
    A = -(root[:, None] * root).tril(-1) - torch.diag(q + 1)
    return A, root


def hippo_legt(n):
    """HiPPO-LegT [G20, theorem 1]: a sliding window of length 1, in orthonormal Legendre polynomials, so that a
    constant input of 1 settles at (1, 0, 0, ...). (The authors' later code halves A and B: a window of length 2.)"""
    q = torch.arange(n, dtype=torch.float64)
    root = (2 * q + 1).sqrt()
    sign = (-1.0) ** (q[:, None] - q)
    return -(root[:, None] * root) * torch.where(q[:, None] >= q, 1.0, sign), root


def hippo_fout(n):
    """HiPPO-FouT [G22c, theorem 7]: a sliding window of length 1 in the Fourier basis 1, sqrt2 sin 2 pi x, sqrt2 cos 2
    pi x, sqrt2 sin 4 pi x, ... of the age x: A, B."""
    f = torch.full((n,), 2 ** 0.5, dtype=torch.float64)          # the basis at the window's end: 1, 0, sqrt2, 0, ...
    f[1::2], f[0] = 0.0, 1.0
    A = -2 * f[:, None] * f
    for sine in range(1, n - 1, 2):
        turn = math.pi * (sine + 1)                              # 2 pi times the frequency (sine + 1) / 2
        A[sine, sine + 1], A[sine + 1, sine] = A[sine, sine + 1] + turn, A[sine + 1, sine] - turn
    return A, 2 * f


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


def legs_normal_part(n):
    """HiPPO-LegS as V (diag(Lambda) - P P^*) V^* [G22, theorem 1]: A + P P^T with P = sqrt(k + 1/2) is normal, -1/2
    plus a skew part. Returns Lambda in ascending order of its imaginary parts, V^* B, V^* P and V, in complex64."""
    A, B = hippo_legs(n)
    P = (torch.arange(n, dtype=torch.float64) + 0.5).sqrt()
    skew = A + P[:, None] * P + 0.5 * torch.eye(n, dtype=torch.float64)
    imag, V = torch.linalg.eigh(-1j * skew)                      # i times a real skew matrix is Hermitian
    B, P = (V.mH @ x.to(V.dtype) for x in (B, P))
    return torch.complex(torch.full_like(imag, -0.5), imag).to(torch.complex64), *(
        x.to(torch.complex64) for x in (B, P, V))


class ByKernel(StateSpace):
    """A mixer whose K is made by filter(t): (c, t), and not of g, k and q."""
    forms = ("conv", "parallel", "triton")

    def convolve(self, form, u):
        K = at_least_float32(self.filter(u.shape[-1]))
        return fft_conv(u, K) if form == "conv" else (toeplitz(K) @ u[..., None])[..., 0]

    def mixing_matrix(self, s, t):
        return toeplitz(at_least_float32(self.filter(t)))[None]                      # (1, c, t, s)


class FromKernel(ByKernel):
    """A mixer of which only K is known. Without a finite state, prefill and step keep all inputs and sum over them."""

    def mix(self, form, u, s, past):
        both, t = u if past is None else torch.cat([past.to(u.dtype), u], dim=-1), u.shape[-1]
        if form == "recurrent":                                                      # one token: sum_s K_{t-s} u_s
            y = (at_least_float32(self.filter(both.shape[-1])).flip(-1) * both).sum(dim=-1, keepdim=True)
        else:
            y = self.convolve(form, both)[..., -t:]
        return self.with_skip(y, u), both

    def init_state(self, batch_size):
        like = at_least_float32(next(self.parameters()))
        return self.init_carry(batch_size), like.new_zeros(batch_size, self.channels, 0)

    def state_size(self, t):
        return self.channels * t + self.init_carry(1).numel()


class Dense(ByKernel):
    """A time-invariant mixer with a dense system: discrete() -> a: (c, n, n), b, C: (c, n). K_l = C a^l b, by making
    a^0 b, a^1 b, ... twice as many at a time (Krylov)."""
    forms = ("conv", "recurrent", "parallel", "triton")
    goes_on_by = "recurrent"

    def mix(self, form, u, s, h):
        return self.loop(u, h) if form == "recurrent" else (self.with_skip(self.convolve(form, u), u), None)

    def loop(self, u, h):
        a, b, C = self.discrete()
        h, y = torch.zeros(*u.shape[:2], b.shape[1], dtype=b.dtype, device=b.device) if h is None else h, []
        for t in range(u.shape[2]):
            h = (a @ h[..., None])[..., 0] + b * u[:, :, t, None]                    # (b, c, n)
            y.append((h * C).sum(dim=-1).real)
        return self.with_skip(torch.stack(y, dim=2), u), h

    def filter(self, t):
        a, b, C = self.discrete()
        return (C[:, None] @ krylov(a, b, t))[:, 0].real


def krylov(a, b, t):
    """b, a b, ..., a^{t-1} b: (c, n, t)"""
    columns = b[..., None]
    while columns.shape[-1] < t:
        columns, a = torch.cat([columns, a @ columns], dim=-1), a @ a
    return columns[..., :t]


def solve(A, B):
    """torch.linalg.solve for an A known to be invertible: to check that would wait for the GPU."""
    return torch.linalg.solve_ex(A, B)[0]


def bilinear_dense(A, B, dt):
    """a = (1 - dt A / 2)^{-1} (1 + dt A / 2), b = (1 - dt A / 2)^{-1} dt B. A: (n, n), B: (n,), dt: (c,)."""
    half, one = dt[:, None, None] / 2 * A, torch.eye(len(B), dtype=A.dtype, device=A.device)
    ab = solve(one - half, torch.cat([one + half, dt[:, None, None] * B[:, None]], dim=-1))
    return ab[..., :-1], ab[..., -1]                                                 # (c, n, n), (c, n)


class LSSL(Dense):
    """The first of them [G21]: a dense A = HiPPO-LegS, bilinear, its kernel by Krylov's powers: n^2 t. Everything
    after it is about not paying that. random_A: the same with a random A, with which the paper finds it to learn far
    worse.
    Differs: A and B are shared by the channels, each of which has its own dt and C."""
    complex_state = False

    def __init__(self, d_model, n_heads=None, n_state=16, random_A=False):
        super().__init__()
        self.channels, self.n_state = d_model, n_state
        A, B = hippo_legs(n_state)
        if random_A:
            A = torch.randn(n_state, n_state, dtype=A.dtype) / n_state ** 0.5 - torch.eye(n_state, dtype=A.dtype)
        self.A, self.B = nn.Parameter(A.float()), nn.Parameter(B.float())
        self.log_dt = nn.Parameter(log_uniform(d_model))
        self.C, self.D = nn.Parameter(torch.randn(d_model, n_state)), nn.Parameter(torch.randn(d_model))
        self.out = GLU(d_model, d_model)
        slow(self.A, self.B, self.log_dt)

    def discrete(self):
        A, B, C, log_dt = (at_least_float32(x) for x in (self.A, self.B, self.C, self.log_dt))
        return *bilinear_dense(A, B, log_dt.exp()), C


# S4's kernel [G22, theorem 3], step by step. We want K without all powers of a, and its Fourier transform is easier:
# the generating function K(w) = sum_{l<t} K_l w^l at the t roots of unity w, whose inverse FFT is K. a, b are sampled
# by the trapezoidal rule from A, B, and A = diag(Lambda) - P P^* (legs_normal_part, above). Each step is cheaper than
# the one before; of the powers one is left, a^t, and even that would go if C~ were learned in place of C.


def roots_of_unity(t, like):
    exact = torch.float32 if like.device.type in NO_FLOAT64 else torch.float64
    turn = -2 * math.pi / t * torch.arange(t, device=like.device, dtype=exact)
    return torch.polar(torch.ones_like(turn), turn).to(like.dtype)


def by_powers(a, b, C, w):
    """K(w) = sum_l C a^l b w^l: what is to be found, n^2 t."""
    return torch.fft.fft((C[:, None] @ krylov(a, b, len(w)))[:, 0])                  # (c, t)


def by_geometric_sum(a, b, C, w):
    """sum_{l<t} a^l w^l = (1 - a^t w^t) (1 - a w)^{-1}, and w^t = 1: K(w) = C~ (1 - a w)^{-1} b, C~ = C (1 - a^t)"""
    C = shortened(a, C, len(w))
    one = torch.eye(b.shape[1], dtype=a.dtype, device=a.device)
    return (C[:, None, None] @ solve(one - a[:, None] * w[:, None, None], b[:, None, :, None]))[..., 0, 0]


def by_resolvent(A, B, dt, a, C, w):
    """With a = (1 - dt A / 2)^{-1} (1 + dt A / 2) the inverse is one of A itself: (1 - a w)^{-1} b = 2 / (1 + w) (r -
    A)^{-1} B, r = 2 / dt (1 - w) / (1 + w). (Not for w = -1, where r is infinite: t odd.)"""
    C, one = shortened(a, C, len(w)), torch.eye(len(B), dtype=A.dtype, device=A.device)
    r = 2 / dt[:, None] * (1 - w) / (1 + w)                                          # (c, t)
    return (C[:, None, None] @ solve(r[..., None, None] * one - A, B[:, None]))[..., 0, 0] * 2 / (1 + w)


def by_woodbury(Lambda, P, B, dt, a, C, w):
    """A is diagonal but for a rank-one term, and R = (r - Lambda)^{-1} is a division [Woodbury]:
    (r - Lambda + P P^*)^{-1} = R - R P (1 + P^* R P)^{-1} P^* R, so that K(w) is made of four sums over n like
    sum_n C~_n B_n / (r - Lambda_n), the Cauchy products. Written with (1 + w) R, which is finite at w = -1 too."""
    C = shortened(a, C, len(w))
    R = 1 / (2 / dt[:, None, None] * (1 - w) - Lambda[:, None] * (1 + w))            # (c, n, t), divided by 1 + w
    CB, CP = ((C * x)[:, None] @ R for x in (B, P))                                  # (c, 1, t)
    PB, PP = ((P.conj() * x) @ R for x in (B, P))                                    # (c, t)
    return 2 * (CB[:, 0] - CP[:, 0] * (1 + w) / (1 + (1 + w) * PP) * PB)


def shortened(a, C, t):
    """C~ = C (1 - a^t): (c, n)"""
    return C - (C[:, None] @ torch.linalg.matrix_power(a, t))[:, 0]


class S4(Dense):
    """S4 [G22]: A = V (diag(Lambda) - P P^*) V^* of HiPPO-LegS, so that the kernel costs n t + t log t in place of
    n^2 t, once a^t is there (n^3 log t here). Each channel has its own dt and C.
    Differs: Lambda, P and B are shared by the channels (the authors: a system for each), all n states are kept, not one
    of each conjugate pair, and B is HiPPO's, which the authors' code cuts at 2."""

    def __init__(self, d_model, n_heads=None, n_state=16):
        super().__init__()
        self.channels, self.n_state = d_model, n_state
        Lambda, B, P, V = legs_normal_part(n_state)
        self.log_real, self.imag = nn.Parameter((-Lambda.real).log()), nn.Parameter(Lambda.imag.clone())
        self.P, self.B = nn.Parameter(torch.view_as_real(P)), nn.Parameter(torch.view_as_real(B))
        C = torch.randn(d_model, n_state).to(V.dtype) @ V                            # C V of a real C
        self.C, self.D = nn.Parameter(torch.view_as_real(C)), nn.Parameter(torch.randn(d_model))
        self.log_dt, self.out = nn.Parameter(log_uniform(d_model)), GLU(d_model, d_model)
        slow(self.log_real, self.imag, self.P, self.B, self.log_dt)

    def continuous(self):
        real, imag = at_least_float32(self.log_real).exp(), at_least_float32(self.imag)
        P, B, C = (torch.view_as_complex(at_least_float32(x)) for x in (self.P, self.B, self.C))
        return torch.complex(-real, imag), P, B, at_least_float32(self.log_dt).exp(), C

    def discrete(self):
        Lambda, P, B, dt, C = self.continuous()
        return *bilinear_dense(torch.diag(Lambda) - P[:, None] * P.conj(), B, dt), C

    def filter(self, t):
        Lambda, P, B, dt, C = self.continuous()
        return torch.fft.ifft(by_woodbury(Lambda, P, B, dt, self.discrete()[0], C, roots_of_unity(t, B))).real


# --------------------------------------------------------------------------------------- kernels without a system


class SGConv(FromKernel):
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

    def filter(self, t):
        if t > self.max_len:
            raise ValueError(f"a sequence of {t} is longer than this SGConv's max_len {self.max_len}")
        return (self.stretched() / self.norm)[:, :t]                                 # (c, t)


class Hyena(Gated, FromKernel):
    """Hyena of order 2 [P23, section 3]: q * (K * (k * v)), K an MLP with sine activations of the position i, times an
    exponential window whose speed differs from channel to channel. The MLP reads i / (L - 1), L = max_len, and the real
    and imaginary parts of e^{-2 pi f i / L} for n_bands frequencies f from 1e-4 to n_bands - 1 (16, as in the authors'
    configuration for the Pile). No system stands behind K; positions go up to max_len. As in the authors' code there is
    one long convolution; by the paper's recurrence there would be another one, on v."""

    def __init__(self, d_model, n_heads=None, max_len=1024, d_filter=64, n_bands=16, frequency=14.0):
        super().__init__()
        self.channels, self.max_len, self.n_bands = d_model, max_len, n_bands
        self.add_gates(d_model)
        widths = [2 * n_bands + 1, d_filter, d_filter, d_filter]
        self.layers = nn.ModuleList(linear(a, b, bias=True) for a, b in zip(widths, widths[1:], strict=False))
        self.last, self.frequency = linear(d_filter, d_model), nn.Parameter(frequency * torch.ones(d_filter))
        slowest, fastest = (math.log(1e-2) / share for share in (1.5, 0.3))
        self.register_buffer("delta", torch.linspace(slowest, fastest, d_model).abs())
        self.D = nn.Parameter(torch.randn(d_model))

    def filter(self, t):
        if t > self.max_len:
            raise ValueError(f"a sequence of {t} is longer than this Hyena's max_len {self.max_len}")
        device, dtype = self.delta.device, at_least_float32(self.D).dtype
        i = torch.arange(t, device=device, dtype=torch.float32 if device.type in NO_FLOAT64 else torch.float64)[:, None]
        place = i / max(1, self.max_len - 1)                                         # (t, 1)
        turn = 2 * math.pi / self.max_len * i * torch.linspace(
            1e-4, self.n_bands - 1, self.n_bands, device=device, dtype=i.dtype)
        z = torch.cat([place, turn.cos(), -turn.sin()], dim=1).to(dtype)             # (t, 2 n_bands + 1)
        for layer in self.layers:
            z = torch.sin(self.frequency.to(dtype) * F.linear(z, layer.weight.to(dtype), layer.bias.to(dtype)))
        return F.linear(z, self.last.weight.to(dtype)).mT * torch.exp(-self.delta[:, None] * place.mT.to(dtype))


class Monarch(nn.Module):
    """A plain Monarch block [D22b; F23b]: positions in an m x m grid, a learned m x m matrix for each row, then one
    for each column, for every channel alike: m^3 = t^{3/2} in place of t^2. Every position sees every other: not
    causal. Up to max_len = m^2."""
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


class MonarchMixer(Gated, FromKernel):
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
        self.add_gates(d_model)

    def grid(self, x, R):
        """The polynomials of a sequence (..., t): (..., blocks, m), by a block-diagonal product."""
        R = torch.tril(at_least_float32(R), -1) + torch.eye(self.m, device=R.device)
        x = F.pad(x, (0, -x.shape[-1] % self.m)).unflatten(-1, (-1, self.m))
        return torch.einsum("bij,...bj->...bi", R[:x.shape[-2]].to(x.dtype), x)

    def mix(self, form, u, s, past):
        """Without a shortcut for one token: it is the last of all that were kept."""
        return super().mix("conv" if form == "recurrent" else form, u, s, past)

    def convolve(self, form, u):
        t, m = u.shape[-1], self.m
        if t > self.n_blocks * m:
            raise ValueError(f"a sequence of {t} is longer than this MonarchMixer's max_len {self.n_blocks * m}")
        if form == "parallel":
            return (self.mixing_matrix(None, t) @ u[..., None])[..., 0]
        k, u = self.grid(at_least_float32(self.k)[:, :t], self.R1), self.grid(u, self.R2)
        size = 2 * k.shape[-2], 2 * m
        y = torch.fft.irfft2(torch.fft.rfft2(k, s=size) * torch.fft.rfft2(u, s=size), s=size)[..., :k.shape[-2], :m]
        return y.flatten(-2)[..., :t]

    def mixing_matrix(self, s, t):
        """Written out: H[(i1, i0), (j1, j0)] = (R_1 k)[i1 - j1, i0 - j0], times the block-diagonal R_2."""
        one = torch.eye(-(-t // self.m) * self.m, dtype=at_least_float32(self.k).dtype, device=self.k.device)
        k, u = self.grid(at_least_float32(self.k)[:, :t], self.R1), self.grid(one, self.R2).flatten(-2).mT
        i = torch.arange(len(one), device=k.device)
        i1, i0 = i // self.m, i % self.m
        d1, d0 = i1[:, None] - i1, i0[:, None] - i0
        H = torch.where((d1 >= 0) & (d0 >= 0), k[:, d1.clamp(min=0), d0.clamp(min=0)], 0)
        return (H @ u)[None, :, :t, :t]                                              # (1, c, t, s)


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
    """Associative recall as in H3 [F23, table 2]: key value key value ... key; the first half of the vocabulary are
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
    """Induction heads as in H3 [F23, table 2]: random tokens; a mark (the last of the vocabulary) once among them
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


# ------------------------------------------------------------------------------------------------------------ plumbing


def pick_form(mixer, x, form=None):
    """The form to run: the one asked for, or the fastest on x's device. Raises ValueError if the mixer lacks it, if it
    cannot run there, or if x is not (b, t, c) with t >= 1."""
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be (batch, time, width) with at least one of each, not {tuple(x.shape)}")
    if form is None:
        autocast = x.dtype == torch.float32 and torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype    # float16 could not hold a long text's sums
        if x.is_cuda and dtype == torch.bfloat16 and KERNELS and "triton" in mixer.forms:
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


def in_time(layer, x):
    """A linear layer whose result lies along time: (b, t, c) -> (b, c, t)."""
    y = layer.weight @ x.mT
    return y if layer.bias is None else y + layer.bias[:, None].to(y.dtype)


def real_like(u, y):
    """y, or its real part if u is real."""
    return y if u.is_complex() or not y.is_complex() else y.real


def side_by_side(z):
    """Along time outermost in memory, so that a step's numbers lie side by side: axis 2 of (b, c, t, ...)."""
    return z if z is None or z.shape[2] == 1 else z.movedim(2, 0).contiguous().movedim(0, 2)


def gradients(f, inputs, grad):
    """The gradients of f(*inputs), as functions that can be differentiated again; None where none is wanted."""
    wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    found = iter(torch.autograd.grad(f(*inputs), wanted, grad, create_graph=True))
    return [next(found) if torch.is_tensor(x) and x.requires_grad else None for x in inputs]


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


def print_s4(t=65):
    """How far each step of the derivation is from the first."""
    torch.manual_seed(0)
    mixer, w = MIXERS["s4"](4).double(), roots_of_unity(t, torch.zeros(1, dtype=torch.complex128))
    with torch.no_grad():
        (Lambda, P, B, dt, C), (a, b, _) = mixer.continuous(), mixer.discrete()
        A, K = torch.diag(Lambda) - P[:, None] * P.conj(), by_powers(a, b, C, w)
        steps = {"the geometric sum": by_geometric_sum(a, b, C, w),
                 "the resolvent of A": by_resolvent(A, B, dt, a, C, w),
                 "Woodbury, Cauchy": by_woodbury(Lambda, P, B, dt, a, C, w)}
    print("\nS4's kernel, largest difference from the powers of a:   " + "   ".join(
        f"{name} {(x - K).abs().max():.0e}" for name, x in steps.items()))


def reconstruction_errors(t=2000, sizes=(8, 32, 64, 128)):
    """Root mean square error with which HiPPO-LegS's n numbers give back a smooth signal of t steps."""
    u = smooth_signal(t)
    return {n: (reconstruct(hippo_online(u, n), t) - u).square().mean().sqrt().item() for n in sizes}


def plot(path, t=64, d_model=16):
    """Above: mixing matrices. Middle: kernels at initialisation. Below: HiPPO's reconstruction of a signal."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (above, middle, below) = plt.subplots(3, 4, figsize=(12, 9), constrained_layout=True)
    torch.manual_seed(0)
    x = torch.randn(1, t, d_model)
    with torch.no_grad():
        shown = {"s4d": "S4D: Toeplitz", "h3": "H3: gated", "mamba": "Mamba: selective", "rglru": "RG-LRU: selective"}
        for ax, (name, title) in zip(above, shown.items(), strict=True):
            M = MIXERS[name](d_model).matrix(x)[0]
            M = M[len(M) // 2]
            limit = M[M != 0].abs().quantile(0.95)
            ax.imshow(M, cmap="RdBu_r", vmin=-limit, vmax=limit)
            ax.set(title=title, xticks=[], yticks=[])
        for ax, name in zip(middle, ("s4", "s4d", "sgconv", "hyena"), strict=True):
            ax.plot(at_least_float32(MIXERS[name](d_model).kernel(300)[:3, 1:]).T, lw=1)
            ax.set(title=f"{MIXERS[name].__name__}'s kernel", xlabel="lag")
        u = smooth_signal(2000)
        for ax, (n, error) in zip(below, reconstruction_errors().items(), strict=True):
            ax.plot(u, lw=3, color="lightgray")
            ax.plot(reconstruct(hippo_online(u, n), 2000), lw=1)
            ax.set(title=f"HiPPO, n = {n}: error {error:.3f}", xlabel="step", ylim=(-0.5, 4))
    above[0].set(ylabel="target", xlabel="source")
    figure.suptitle("Matrices and kernels (three channels) at initialisation; a signal, gray, read back from n numbers")
    figure.savefig(path, dpi=90)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lesson 03: state spaces, gated convolutions, selection.")
    parser.add_argument("--plot", metavar="FILE.png", help="draw matrices, kernels and a reconstruction instead")
    args = parser.parse_args()
    if args.plot:
        try:
            plot(args.plot)
        except (OSError, ValueError) as e:               # a folder that is not there, an ending that is no picture's
            parser.error(f"--plot {args.plot}: {e}")
    else:
        first()
        compare_forms()
        print_s4()
        print("\nHiPPO-LegS: n numbers for 2000 steps   " + "   ".join(
            f"n = {n}: RMSE {error:.3f}" for n, error in reconstruction_errors().items()))

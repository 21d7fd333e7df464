"""Lesson 02. Linear attention: one recurrence, and what each paper puts into it.

    S_t = e^{g_t} * S_{t-1} + phi(k_t) v_t^T          a state of fixed size: d x e numbers for each head
    o_t = phi(q_t)^T S_t

Take the softmax out of attention and the sum over the past can be carried along: phi(q_t) . sum_s phi(k_s) v_s^T. What
is left to choose is phi, the feature map that stands in for exp(q . k), and g, the logarithm of the decay: nothing, a
constant, a number for each token, or a vector for each token (a number for each row of S). The matrix is M_ts = sum_d
phi(q_t)_d phi(k_s)_d e^{g_{s+1} + ... + g_t}; the loop carries S; a chunk is a small matrix inside and one step of the
loop from one to the next. Most mixers below are such a choice. Three things go further: a normaliser divides by the
same sum with v = 1, RWKV-4 to 6 read before they write (a bonus for the token itself), and the delta rule lets a new
value replace an old one; with beta up to 2 its state follows parity and swaps.

Papers  [K20]  Katharopoulos et al. 2020, Transformers are RNNs  arXiv:2006.16236
        [C20]  Choromanski et al. 2020, Performer  arXiv:2009.14794      [P21]  Peng et al. 2021, RFA  arXiv:2103.02143
        [Q22]  Qin et al. 2022, cosFormer  arXiv:2202.08791              [Z24]  Zhang 2024, Hedgehog  arXiv:2402.04347
        [Ar24] Arora et al. 2024, Based  arXiv:2402.18668                [Aks24] Aksenov, ReBased  arXiv:2402.10644
        [S23]  Sun et al. 2023, RetNet  arXiv:2307.08621                 [Y23]  Yang et al. 2023, GLA  arXiv:2312.06635
        [Ka23] Katsch 2023, GateLoop  arXiv:2311.01927                   [Pe23] Peng 2023, RWKV-4  arXiv:2305.13048
        [Pe24] Peng et al. 2024, RWKV-5 and 6  arXiv:2404.05892          [D24]  Dao, Gu 2024, Mamba-2  arXiv:2405.21060
        [Sch21] Schlag et al. 2021, delta rule  arXiv:2102.11174         [Y24]  Yang, DeltaNet  arXiv:2406.06484
        [Y25]  Yang et al. 2025, Gated DeltaNet  arXiv:2412.06464        [Ki25] Kimi Linear  arXiv:2510.26692
        [Pe25] Peng et al. 2025, RWKV-7  arXiv:2503.14456                [Be24] Beck et al., xLSTM  arXiv:2405.04517
        [Be25] Beck et al. 2025, xLSTM 7B  arXiv:2503.13427              [M25]  MiniMax-01  arXiv:2501.08313
        [Qi24] Qin et al. 2024, Lightning Attention-2  arXiv:2401.04658  [La26] Lahoti, Mamba-3  arXiv:2603.15569
        [Gr24] Grazzi et al. 2024, Negative eigenvalues  2411.12537      [HS86] Hillis, Steele 1986, Data parallel

Axes    b batch, t time (target), s source, h head, d key or feature dim, e value dim, c model width, n chunk.
Letters alpha, gamma, a, w of the papers (the decay) are e^g; Mamba-2's C, B, x are q, k, v; RWKV's r is q; z, the
        normaliser's state, is a last column of S; G_ts = g_{s+1} + ... + g_t. In the delta rule u is what the state
        holds under the key b (RWKV-7's kappa), and a is the key under which u is written.

mixer                             decay g             forms                            state per sequence
linear_attention relu performer   none                chunked parallel recurrent       h D (e + 1), D features
  rfa cosformer hedgehog taylor
  taylor_full rebased
gated_rfa                         scalar, data        chunked parallel recurrent       h D (e + 1)
retnet lightning_attention        scalar, constant    chunked parallel recurrent       h d e
gla                               vector, data        chunked parallel recurrent       h d e
mlstm                             scalar, data        chunked parallel recurrent       h d (e + 1) and h maxima
mamba2                            scalar, data        chunked parallel recurrent       h d e and 3 inputs of the conv
mamba3                            scalar, turns       chunked parallel recurrent       h d e and h (d / 4 + d + e)
deltanet gated_deltanet kda       none scalar vector  chunked parallel recurrent       h d e and 3 inputs of the convs
rwkv7                             vector, data        chunked parallel recurrent       h d e and the last token
rwkv6                             vector, data        chunked parallel recurrent       h d e and the last token
rwkv4                             vector, constant    scan parallel recurrent          3 c and the last token
gateloop                          complex, data       scan parallel recurrent          2 c
(all but rwkv7 and rebased also triton: one kernel, the default on a GPU in bfloat16)

    python 02_linear_attention.py                  forms compared and timed; how well each feature map mimics softmax
    python 02_linear_attention.py --plot FILE.png  the feature maps' weights beside softmax's, and the mixing matrices
"""
import argparse
import math
import os
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

KERNELS = Path(__file__).with_name("kernels").is_dir()       # a lesson also runs alone, without its kernels
NO_FLOAT64 = {"mps"}                                         # devices that have no float64


def first():
    """The lesson on four tokens, A c B A, with d = e = 2: what followed A? A token asks for itself (q); what it
    says is itself (v), and that lies under the token that stood before it (k). No feature map, no normaliser. Prints
    and returns q, k, v, g, the states S, M and M V: without a decay, with one decay for all of S (RetNet: 1/2), and
    with one for each of its rows (GLA: 1/4 and 1)."""
    A, B, c, nothing = (2.0, 0.0), (0.0, 2.0), (-1.0, -1.0), (0.0, 0.0)
    q = v = torch.tensor([A, c, B, A])                                               # (t, d), (t, e)
    k = torch.tensor([nothing, A, c, B])                                             # (t, d)
    decays = {"no decay": (1.0, 1.0), "RetNet, 1/2": (0.5, 0.5), "GLA, (1/4, 1)": (0.25, 1.0)}
    results = []
    print("four tokens, A c B A: the state S is 2 x 2 numbers, however many tokens there were")
    for name, decay in decays.items():
        a = torch.tensor(decay)                                                      # (d,), e^g

        # Token by token: S_t = a * S_{t-1} + k_t v_t^T, o_t = q_t^T S_t.
        S, states, recurrent = torch.zeros(2, 2), [], []
        for t in range(4):
            S = a[:, None] * S + k[t][:, None] * v[t]                                # (d, e)
            states.append(S)
            recurrent.append(q[t] @ S)

        # All at once: M_ts = sum_d q_td k_sd a_d^(t-s) for s <= t.
        M = torch.zeros(4, 4)
        for t in range(4):
            for s in range(t + 1):
                M[t, s] = (q[t] * k[s] * a ** (t - s)).sum()

        # In chunks of two: M inside the second chunk, and from the first only the state that it left.
        into = a ** torch.tensor([[1.0], [2.0]])                                     # decay since the first chunk
        chunked = torch.cat([M[:2, :2] @ v[:2], M[2:, 2:] @ v[2:] + (q[2:] * into) @ states[1]])

        assert torch.equal(M @ v, torch.stack(recurrent)) and torch.equal(M @ v, chunked)
        print(f"    {name:14} the rows of S after the token     M                         M V = loop = chunks")
        for token, S, row, y in zip("AcBA", states, M.tolist(), (M @ v).tolist(), strict=True):
            rows = " ".join(f"({x:6g} {z:6g})" for x, z in S.tolist())
            print(f"        {token}          {rows}  " + "".join(f"{x:6g}" for x in row) + "   "
                  + "".join(f"{x:6g}" for x in y))
        results.append((q, k, v, a.log(), torch.stack(states), M, M @ v))

    print("    the last A reads the first row of S alone, which fades fast in GLA, by half in RetNet. It finds c,\n"
          "    but also B, with a negative weight: feature maps and normalisers are against that")

    # Two learners of what belongs to a key. Hebb adds; the delta rule (least mean squares) looks the key up first, and
    # adds only the difference. The key is of length 1.
    k1 = k2 = torch.tensor((1.0, 0.0))
    S1 = k1[:, None] * torch.tensor(A)                                               # A under k1
    S2 = S1 + k2[:, None] * (torch.tensor(B) - k2 @ S1)                              # B under the same key
    print(f"    A, then B under one key: Hebb has {(S1 + k2[:, None] * torch.tensor(B)).tolist()[0]}, "
          f"the delta rule {S2.tolist()[0]}\n")
    return results


# ----------------------------------------------------------------------------------------- the recurrence, three forms
#
# q, k: (b, h, t, d), v: (b, h, t, e); g: log decay, at most 0 (or of real part at most 0), with four axes that
# broadcast to (b, h, t, d), or None. state: (b, h, d, e), or None for zeros. Every form returns o: (b, h, t, e) and
# the state after t.


def gates(g, q):
    """g with a time axis of its own: (1 or b, 1 or h, t, 1 or d); zeros for None."""
    return (q.new_zeros(1, 1, 1, 1) if g is None else g).expand(-1, -1, q.shape[2], -1)


def segment_sums(g):
    """G_ts = g_{s+1} + ... + g_t below the diagonal, 0 elsewhere: (..., t, d) -> (..., t, s, d). Summed from s on,
    not as a difference of two cumulative sums: that would lose a small gate behind large ones."""
    below = torch.ones(g.shape[-2], g.shape[-2], dtype=torch.bool, device=g.device).tril(-1)
    return torch.where(below[:, :, None], g.unsqueeze(-2), 0).cumsum(dim=-3)


def weights(q, k, G):
    """The mixing matrix M_ts = sum_d q_td k_sd e^{G_tsd}, s <= t: (b, h, t, s). A scalar decay comes out of the sum."""
    if G.shape[-1] == 1:
        return (q @ k.mT * G[..., 0].exp()).tril()
    return torch.einsum("bhtd,bhsd,bhtsd->bhts", q, k, G.exp()).tril()


def parallel(q, k, v, g=None, state=None):
    """o = M V + (q e^{g_1 + ... + g_t}) S_0, and the state after the block. Every exponent is a sum of g: at most 0."""
    g = gates(g, q)
    G, since = segment_sums(g), g.cumsum(dim=2).exp()                                # since: decay of what came before
    o = weights(q, k, G) @ v                                                         # (b, h, t, e)
    S = (k * G[:, :, -1].exp()).mT @ v                                               # (b, h, d, e)
    return (o, S) if state is None else (o + (q * since) @ state, S + since[:, :, -1, :, None] * state)


def chunked(q, k, v, g=None, *more, state=None, chunk=64, block=parallel):
    """Parallel inside a chunk, recurrent from one to the next. Time and memory O(t)."""
    g, o = gates(g, q), []
    chunk = chunk if g.shape[-1] == 1 else chunk // 4            # a vector decay makes (chunk, chunk, d) numbers
    for i in range(0, q.shape[2], chunk):
        now = slice(i, i + chunk)
        o_i, state = block(*(x[:, :, now] for x in (q, k, v, g, *more)), state=state)
        o.append(o_i)
    return torch.cat(o, dim=2), state


def recurrent(q, k, v, g=None, state=None):
    """The definition at the top of this file, token by token."""
    g, o = gates(g, q), []
    S = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state
    for t in range(q.shape[2]):
        S = g[:, :, t, :, None].exp() * S + k[:, :, t, :, None] * v[:, :, t, None, :]      # (b, h, d, e)
        o.append(q[:, :, t, None] @ S)                                               # (b, h, 1, e)
    return torch.cat(o, dim=2), S


def triton(q, k, v, g=None, state=None, beta=None):
    """The same as one kernel, on a GPU: kernels/linear_attention.py; kernels/gla.py for a decay of each channel;
    kernels/step.py for a single token. q and k are brought to v's dtype, which may be of 16 bits. beta: a factor of v,
    (b, h, t, 1)."""
    from kernels.gla import gla
    from kernels.linear_attention import linear_attention
    from kernels.step import linear_step
    q, k, vector = q.to(v.dtype), k.to(v.dtype), g is not None and g.shape[-1] > 1
    single = q.shape[2] == 1 and state is not None and not torch.is_grad_enabled()
    if beta is not None and (single or vector):                                      # these two kernels know no factor
        v, beta = (v * beta).to(v.dtype), None
    if single:
        q, k = (x.expand(-1, v.shape[1], -1, -1) for x in (q, k))                    # shared by the heads in Mamba-2
        o, state = linear_step(*(x[:, :, 0] for x in (q, k, v)), None if g is None else g[:, :, 0], state)
        return o[:, :, None], state
    return gla(q, k, v, g, state) if vector else linear_attention(q, k, v, g, state, beta)


FORMS = {"chunked": chunked, "parallel": parallel, "recurrent": recurrent, "triton": triton}


def with_normaliser(form, q, k, v, g=None, state=None, eps=1e-6):
    """Any of them, divided by the same sum with v = 1, which is carried along as a last column of v and of S."""
    o, S = form(q, k, F.pad(v, (0, 1), value=1.0), g, state=state)
    return o[..., :-1] / o[..., -1:].clamp(min=eps), S


# -------------------------------------------------------------------------------------- from the forms to a mixer


class LinearMixer(nn.Module):
    """What every mixer of this lesson does: make the inputs of the recurrence, run it in a form, finish. A mixer has

    project(x, carry) -> inputs of the form (q, k, v, g, ...), whatever finish wants, carry
    finish(o, more)   -> y

    where carry is what projecting needs of the past: the number of tokens so far, or the inputs that a convolution
    still sees. A state is (carry, S). Forms run in float32 or better, also under autocast; but the kernel takes q, k, v
    as they are, and sums in float32."""
    forms = ("chunked", "parallel", "recurrent", "triton")
    causal = True
    functions = FORMS

    def run(self, x, state, form):
        carry, S = self.init_state(len(x)) if state is None else state
        if len(S) != len(x):
            raise ValueError(f"the state is of {len(S)} sequences, x of {len(x)}")
        inputs, more, carry = self.project(x, carry)
        with torch.autocast(x.device.type, enabled=False):
            inputs = inputs if form == "triton" else [at_least_float32(y) for y in inputs]
            o, S = self.functions[form](*inputs, state=S)
        return self.finish(o.to(working_dtype(x)), more), (carry, S)

    def forward(self, x, form=None):
        return self.run(x, None, pick_form(self, x, form))[0]

    def prefill(self, x, state=None):
        return self.run(x, state, pick_form(self, x))

    def step(self, x_t, state):
        x = x_t[:, None]
        y, state = self.run(x, state, "triton" if pick_form(self, x) == "triton" else "recurrent")
        return y[:, 0], state

    def init_carry(self, batch_size):
        return 0                                                                     # the number of tokens so far

    def init_state(self, batch_size):
        like = at_least_float32(next(self.parameters()))
        return self.init_carry(batch_size), like.new_zeros(batch_size, *self.state_shape)

    def state_size(self, t):
        carry = self.init_carry(1)
        return math.prod(self.state_shape) + (carry.numel() if torch.is_tensor(carry) else 0)

    def inputs(self, x):
        """q, k, v, g, ... of a fresh text, and last what finish wants."""
        inputs, more, _ = self.project(x, self.init_carry(len(x)))
        return *inputs, more

    def values(self, x):
        return self.inputs(x)[2]                                                     # (b, h, s, e)

    def output(self, o, x):
        return self.finish(o, self.inputs(x)[-1])

    def matrix(self, x):
        q, k, _, g, *_ = (at_least_float32(y) for y in self.inputs(x)[:4])
        return weights(q, k, segment_sums(gates(g, q)))                              # (b, h, t, s)


# ------------------------------------------------------------------------------------ the first mixer, and its phi
#
# phi: (b, h, t, d) -> (b, h, t, D), so that phi(q) . phi(k) stands in for exp(q . k / sqrt(d)), or for something else
# that works. `start` is the position of the first token. shared: one map for q and k, or one for each.


class Elu(nn.Module):
    """elu(x) + 1 [K20, eq. 7]: positive, and nothing else."""
    shared = True

    def __init__(self, d, n_heads):
        super().__init__()
        self.dim = d

    def forward(self, x, start=0):
        return F.elu(x) + 1


class LinearAttention(LinearMixer):
    """Linear attention with any feature map, normalised: o_t = phi(q_t) S_t / phi(q_t) z_t [K20, eq. 12].

    feature_map: a name in FEATURE_MAPS. feature_dim: width of q and k that it is given (default: the head's; 16 where
    the features grow with its square). gated: decay by a gate a_t of the token, S_t = a_t S_{t-1} + (1 - a_t) phi(k)
    v^T [P21, eq. 7]. More options go to the feature map. ValueError for a width that the heads do not divide and for an
    unknown map.
    Differs: the sum that divides has a floor, 1e-6 (RFA's: 1e-3), which no paper has; it acts where all weights are 0.
    (fla's chunk form normalises by default, its recurrent and naive ones do not.)"""

    def __init__(self, d_model, n_heads=4, feature_map="elu", feature_dim=None, gated=False, **options):
        super().__init__()
        e = head_dim(d_model, n_heads)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"unknown feature_map {feature_map!r}; there are {', '.join(FEATURE_MAPS)}")
        d = (16 if feature_map in ("taylor", "taylor_full", "rebased") else e) if feature_dim is None else feature_dim
        self.n_heads = n_heads
        self.q, self.k = linear(d_model, n_heads * d), linear(d_model, n_heads * d)
        self.v, self.out = linear(d_model, d_model), linear(d_model, d_model)
        self.phi_q = FEATURE_MAPS[feature_map](d, n_heads, **options)
        self.phi_k = self.phi_q if self.phi_q.shared else FEATURE_MAPS[feature_map](d, n_heads, **options)
        self.gate = linear(d_model, n_heads, bias=True) if gated else None
        self.eps = 1e-3 if feature_map == "rfa" else 1e-6        # RFA's weights can be negative: keep away from 0
        self.functions = {name: partial(with_normaliser, form, eps=self.eps) for name, form in FORMS.items()}
        self.state_shape = (n_heads, self.phi_q.dim, e + 1)

    def project(self, x, carry):
        q, k, v = (split_heads(f(x), self.n_heads) for f in (self.q, self.k, self.v))
        with torch.autocast(x.device.type, enabled=False):
            q, k, g = self.phi_q(at_least_float32(q), carry), self.phi_k(at_least_float32(k), carry), None
        if self.gate is not None:
            a = at_least_float32(self.gate(x)).mT[..., None]                         # (b, h, t, 1), before the sigmoid
            k, g = k * torch.sigmoid(-a), F.logsigmoid(a)
        return (q, k, v, g), None, carry + x.shape[1]

    def finish(self, o, _):
        return self.out(join_heads(o))

    def matrix(self, x):
        M = super().matrix(x)
        return M / M.sum(dim=-1, keepdim=True).clamp(min=self.eps)


class Relu(Elu):
    """max(x, 0): the half of the space that q and k share."""

    def forward(self, x, start=0):
        return F.relu(x)


class Performer(nn.Module):
    """FAVOR+ [C20, lemma 1]: e^{x.y} = E_w[e^{w.x - |x|^2/2} e^{w.y - |y|^2/2}] for w ~ N(0, 1), estimated with m
    drawn w, whose directions are orthogonal in blocks of d; positive, unbiased. x = q d^{-1/4}.
    Differs: no stabiliser, the authors' maximum over all keys, which would look ahead; without it the exponent is still
    at most |w|^2 / 2. No 1e-4 added to the features, which at unit scale makes nearly all weights equal."""
    shared = True

    def __init__(self, d, n_heads, m=None):
        super().__init__()
        self.dim = m = m or 4 * d
        blocks = [Q * R.diagonal().sign() for Q, R in (torch.linalg.qr(torch.randn(d, d)) for _ in range(-(-m // d)))]
        norms = torch.randn(m, d).norm(dim=1, keepdim=True)
        self.register_buffer("w", torch.cat(blocks)[:m] * norms)  # (m, d); without the signs Q would lean to one side

    def forward(self, x, start=0):
        x = x * x.shape[-1] ** -0.25
        return torch.exp(x @ self.w.mT.to(x.dtype) - x.square().sum(dim=-1, keepdim=True) / 2) * self.dim ** -0.5


class RandomFourier(nn.Module):
    """RFA [P21, eq. 3]: [sin Wx, cos Wx] / sqrt(m), W ~ N(0, 1) / tau, x of length 1: e^{x.y / tau^2} up to a
    constant. The estimate is unbiased but can be negative.
    Differs: the authors' code scales the features by 0.1, clamps the normaliser at 1 (here 1e-3), draws a W for each
    head, and draws again in training; at the start their outputs are so divided by the clamp, not by the sum."""
    shared = True

    def __init__(self, d, n_heads, m=64, tau=1.0):
        super().__init__()
        if not tau > 0:
            raise ValueError(f"tau must be above 0, not {tau}")
        self.dim = 2 * m
        self.register_buffer("w", torch.randn(m, d) / tau)

    def forward(self, x, start=0):
        x = F.normalize(x, dim=-1) @ self.w.mT.to(x.dtype)
        return torch.cat([x.sin(), x.cos()], dim=-1) * (2 / self.dim) ** 0.5


class CosFormer(nn.Module):
    """relu(x) [sin(pi i / 2M), cos(pi i / 2M)] at position i [Q22, eq. 10]: weights fall with cos of the distance. M
    is fixed (the authors take the length at hand, with which the outputs change as the text grows); no text may be
    longer."""
    shared = True

    def __init__(self, d, n_heads, M=8192):
        super().__init__()
        self.dim, self.M = 2 * d, M

    def forward(self, x, start=0):
        if start + x.shape[2] > self.M:
            raise ValueError(f"position {start + x.shape[2]} is beyond M = {self.M} of this cosFormer")
        exact = torch.float32 if x.device.type in NO_FLOAT64 else torch.float64
        angle = torch.arange(start, start + x.shape[2], device=x.device, dtype=exact) * (math.pi / 2 / self.M)
        x = F.relu(x)
        return torch.cat([x * f(angle).to(x.dtype)[:, None] for f in (torch.sin, torch.cos)], dim=-1)


class Hedgehog(nn.Module):
    """[softmax(Wx), softmax(-Wx)] [Z24, eq. 6], W learned for each head, for q and k apart, the identity at first:
    spiky like softmax, and it learns to grow with q . k. (fla's map is one softmax over [2x, -2x] of a layer with a
    bias: its features sum to 1, these to 2.)"""
    shared = False

    def __init__(self, d, n_heads):
        super().__init__()
        self.dim = 2 * d
        self.W = nn.Parameter(torch.eye(d).repeat(n_heads, 1, 1))                    # (h, d, d)

    def forward(self, x, start=0):
        x = x @ self.W.mT.to(x.dtype)
        return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1)


def products(x):
    """The d (d + 1) / 2 different products x_i x_j, so weighted that products(x) . products(y) = (x . y)^2."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    pick = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)        # products with 0 and 1: faster than indexing
    return (x @ pick[:, i]) * (x @ pick[:, j]) * x.new_full(i.shape, 2 ** 0.5).masked_fill(i == j, 1.0)


class Taylor(nn.Module):
    """[1, x / d^{1/4}, x x^T / sqrt(2d)] [Ar24, eq. 4; 1 / sqrt(d) in the code]: with s = q . k / sqrt(d), phi(q) .
    phi(k) = 1 + s + s^2/2, at least 1/2. Each product is kept once: 1 + d + d (d + 1) / 2 features (d = 16: 153)."""
    shared = True

    def __init__(self, d, n_heads):
        super().__init__()
        self.dim = 1 + d + d * (d + 1) // 2

    def forward(self, x, start=0):
        x = x * x.shape[-1] ** -0.25
        return torch.cat([torch.ones_like(x[..., :1]), x, products(x) * 0.5 ** 0.5], dim=-1)


class TaylorFull(Taylor):
    """The same function with all d^2 products, as it is usually written (d = 16: 273 features)."""

    def __init__(self, d, n_heads):
        super().__init__(d, n_heads)
        self.dim = 1 + d + d * d

    def forward(self, x, start=0):
        x = x * x.shape[-1] ** -0.25
        square = (x[..., :, None] * x[..., None, :]).flatten(-2)
        return torch.cat([torch.ones_like(x[..., :1]), x, square * 0.5 ** 0.5], dim=-1)


class ReBased(nn.Module):
    """(q . k)^2 / d of q and k after a LayerNorm, over all heads at once, with a learned scale and shift each [Aks24,
    section 4]: a parabola that can move its minimum, 0, to where it ignores. Hence the normaliser needs its eps."""
    shared = False

    def __init__(self, d, n_heads):
        super().__init__()
        self.dim = d * (d + 1) // 2
        self.norm = nn.LayerNorm(n_heads * d)

    def forward(self, x, start=0):
        y, norm = join_heads(x), self.norm                                           # (b, t, h d)
        y = F.layer_norm(y, y.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype))
        return products(split_heads(y, x.shape[1])) * x.shape[-1] ** -0.5


FEATURE_MAPS = {"elu": Elu, "relu": Relu, "performer": Performer, "rfa": RandomFourier, "cosformer": CosFormer,
                "hedgehog": Hedgehog, "taylor": Taylor, "taylor_full": TaylorFull, "rebased": ReBased}


class ReluAttention(LinearAttention):
    """Linear attention with phi = relu. (Kasai et al. 2021, T2R, arXiv:2103.13076, has a learned layer before it.)"""

    def __init__(self, d_model, n_heads=4, **options):
        super().__init__(d_model, n_heads, "relu", **options)


class PerformerAttention(LinearAttention):
    """Linear attention with Performer's m random features (default: 4 d)."""

    def __init__(self, d_model, n_heads=4, m=None, **options):
        super().__init__(d_model, n_heads, "performer", m=m, **options)


class RFAttention(LinearAttention):
    """Random feature attention, with 2 m features of scale tau."""

    def __init__(self, d_model, n_heads=4, m=64, tau=1.0, **options):
        super().__init__(d_model, n_heads, "rfa", m=m, tau=tau, **options)


class GatedRFA(RFAttention):
    """RFA with a gate of the token [P21, eq. 7]: a running average that forgets."""

    def __init__(self, d_model, n_heads=4, gated=True, **options):
        super().__init__(d_model, n_heads, gated=gated, **options)


class CosFormerAttention(LinearAttention):
    """Linear attention with cosFormer's features; no text is longer than M."""

    def __init__(self, d_model, n_heads=4, M=8192, **options):
        super().__init__(d_model, n_heads, "cosformer", M=M, **options)


class HedgehogAttention(LinearAttention):
    """Linear attention with Hedgehog's learned features."""

    def __init__(self, d_model, n_heads=4, **options):
        super().__init__(d_model, n_heads, "hedgehog", **options)


class TaylorAttention(LinearAttention):
    """Linear attention with the Taylor series of the exponential: Based's, without its window (lesson 04)."""

    def __init__(self, d_model, n_heads=4, **options):
        super().__init__(d_model, n_heads, "taylor", **options)


class TaylorFullAttention(LinearAttention):
    """The same with all products of the features."""

    def __init__(self, d_model, n_heads=4, **options):
        super().__init__(d_model, n_heads, "taylor_full", **options)


class ReBasedAttention(LinearAttention):
    """Linear attention with ReBased's learned parabola. (Without the kernel: where q . k is near 0 its features cancel,
    and 16 bits leave nothing of the sum that is divided by.)"""
    forms = LinearAttention.forms[:-1]

    def __init__(self, d_model, n_heads=4, **options):
        super().__init__(d_model, n_heads, "rebased", **options)


# ----------------------------------------------------------------------------------------------------------- decays


def rms_norm(o, eps=1e-5):
    return o * torch.rsqrt(o.square().mean(dim=-1, keepdim=True) + eps)


def rope(x, start=0, base=10000.0):
    """Rotary positions (lesson 01): the pair (x_i, x_{i + d/2}) at position p turned by the angle p base^(-2i/d)."""
    t, d = x.shape[-2:]
    exact = torch.float32 if x.device.type in NO_FLOAT64 else torch.float64
    theta = base ** (-torch.arange(0, d, 2, device=x.device, dtype=exact) / d)                   # (d/2,)
    angle = (start + torch.arange(t, device=x.device, dtype=exact))[:, None] * theta
    cos, sin = (f(angle).to(torch.promote_types(x.dtype, torch.float32)) for f in (torch.cos, torch.sin))
    return (x * torch.cat([cos, cos], -1) + x.roll(d // 2, -1) * torch.cat([-sin, sin], -1)).to(x.dtype)


class RetNet(LinearMixer):
    """Retention [S23, eq. 5-8]: constant decays gamma_h = 1 - 2^{-5-h}, rotary q and k, values of twice the width, a
    norm for each head (its eps of 1e-6 counts: at the start o is so small that 1e-5 changes token 0 by 28%) and a swish
    gate in place of a normaliser. (torchscale's angles are base^{-linspace(0, 1, d/2)}, not rope's base^{-2i/d}.)"""

    def __init__(self, d_model, n_heads=4, expand_v=2):
        super().__init__()
        self.n_heads, d, d_value = n_heads, head_dim(d_model, n_heads), expand_v * d_model
        if d % 2:
            raise ValueError(f"rotary positions turn pairs: the head dim d_model / n_heads = {d} must be even")
        self.q, self.k = linear(d_model, d_model), linear(d_model, d_model)
        self.v, self.gate, self.out = linear(d_model, d_value), linear(d_model, d_value), linear(d_value, d_model)
        for layer in (self.q, self.k, self.v, self.gate):
            nn.init.xavier_uniform_(layer.weight, gain=2 ** -2.5)
        nn.init.xavier_uniform_(self.out.weight, gain=0.5)
        gamma = 1 - 2.0 ** (-5 - torch.arange(n_heads, dtype=torch.float64))
        self.register_buffer("g", gamma.log().float()[None, :, None, None])
        self.state_shape = (n_heads, d, d_value // n_heads)

    def project(self, x, carry):
        q, k, v = (split_heads(f(x), self.n_heads) for f in (self.q, self.k, self.v))
        inputs = rope(q, carry), rope(k, carry) * k.shape[-1] ** -0.5, v, self.g
        return inputs, F.silu(self.gate(x)), carry + x.shape[1]

    def finish(self, o, gate):
        return self.out(join_heads(rms_norm(o, eps=1e-6)) * gate)


class LightningAttention(LinearMixer):
    """MiniMax's lightning attention [M25; Qi24]: retention without rotary positions. Constant decays, slower in later
    layers, g_h = -2^{-8 (h + 1) / H} (1 - depth), depth from 0, the first layer, to 1; silu on q, k and v; no division
    by sqrt(d), for a norm over all heads follows; a sigmoid gate.
    ([M25]'s equations have no decay; [Qi24]'s and the code do.)
    Differs: the authors add 1e-5 to 1 - depth, which is the last layer's whole decay; so does this. Their depth is
    l / (L - 1 + 1e-5) in a model of L layers, the l-th."""

    def __init__(self, d_model, n_heads=4, depth=0.0):
        super().__init__()
        check_depth(depth)
        self.n_heads, d = n_heads, head_dim(d_model, n_heads)
        self.qkv, self.gate, self.out = linear(d_model, 3 * d_model), linear(d_model, d_model), linear(d_model, d_model)
        self.norm = nn.Parameter(torch.ones(d_model))
        rates = 2.0 ** (-8 * torch.arange(1, n_heads + 1, dtype=torch.float64) / n_heads) * (1 - depth + 1e-5)
        self.register_buffer("g", -rates.float()[None, :, None, None])
        self.state_shape = (n_heads, d, d)

    def project(self, x, carry):
        q, k, v = (split_heads(y, self.n_heads) for y in F.silu(self.qkv(x)).chunk(3, dim=-1))
        return (q, k, v, self.g), torch.sigmoid(self.gate(x)), carry + x.shape[1]

    def finish(self, o, gate):
        return self.out(rms_norm(join_heads(o), eps=1e-6) * self.norm * gate)


class GLA(LinearMixer):
    """Gated linear attention [Y23, section 4.4]: a decay for each key channel from the token, g = logsigmoid(W_2 W_1
    x + b) / 16. Without the 16th root nothing would be left after some 50 tokens at first."""

    def __init__(self, d_model, n_heads=4, gate_rank=16):
        super().__init__()
        self.n_heads, e, half = n_heads, head_dim(d_model, n_heads), d_model // 2
        d = head_dim(half, n_heads)
        self.q, self.k, self.v = linear(d_model, half), linear(d_model, half), linear(d_model, d_model)
        self.decay = nn.Sequential(linear(d_model, gate_rank), linear(gate_rank, half, bias=True))
        self.gate, self.out, self.norm = linear(d_model, d_model), linear(d_model, d_model), nn.Parameter(torch.ones(e))
        self.state_shape = (n_heads, d, e)

    def project(self, x, carry):
        q, k, v = (split_heads(f(x), self.n_heads) for f in (self.q, self.k, self.v))
        g = split_heads(F.logsigmoid(at_least_float32(self.decay(x))) / 16, self.n_heads)
        return (q * q.shape[-1] ** -0.5, k, v, g), F.silu(self.gate(x)), carry + x.shape[1]

    def finish(self, o, gate):
        return self.out(join_heads(rms_norm(o) * self.norm) * gate)


def running_maximum(i, g, last):
    """m_t = max(i_t, 0, g_t + m_{t-1}) after m_0 = last, with m_0 in front: log t rounds of doubling, as in scan().
    i, g: (b, h, t, 1), last: (b, h, 1, 1) -> (b, h, 1 + t, 1)."""
    m, g, n = torch.cat([last, i.clamp(min=0)], dim=2), F.pad(g, (0, 0, 1, 0)), 1
    while n < m.shape[2]:
        m = torch.maximum(m, g + F.pad(m, (0, 0, n, -n), value=-torch.inf))
        g = g + F.pad(g, (0, 0, n, -n))
        n *= 2
    return m


def with_floor(form, q, k, v, g, m, state=None):
    """A form with S in units of e^m, divided by max(|n . q|, 1), n the same sum with v = 1. There, 1 is e^{-m}."""
    o, S = form(q, k, F.pad(v, (0, 1), value=1.0), g, state=state)
    return o[..., :-1] / torch.maximum(o[..., -1:].abs(), (-m).exp()), S


class MLSTM(LinearMixer):
    """xLSTM's matrix memory [Be24, eq. 19-27], as the layer of the 7B model [Be25]: a forget gate g = logsigmoid(f), an
    input gate e^i that is free to grow, S_t = e^g S_{t-1} + e^i k_t v_t^T, and o = S^T q / max(|n . q|, 1). In units of
    e^{m_t}, m_t = max(i_t, 0, g_t + m_{t-1}), both gates are at most 1, i - m and g + m_{t-1} - m_t, and it is the
    recurrence of all others. m is in both parts of a fraction: no result and no gradient depends on it.
    Differs: the authors' m starts at 0 but may fall below, and then e^{-m} grows; no result depends on it. Their code
    adds 1e-6 to the divisor. (The norm's eps of 1e-6 counts: with i near -10 at the start, o is that small.)"""
    functions = {name: partial(with_floor, form) for name, form in FORMS.items()}

    def __init__(self, d_model, n_heads=4, cap=15.0):
        super().__init__()
        self.n_heads, self.cap, e, half = n_heads, cap, head_dim(d_model, n_heads), d_model // 2
        self.q, self.k, self.v = linear(d_model, half), linear(d_model, half), linear(d_model, d_model)
        self.i, self.f = linear(d_model, n_heads, bias=True), linear(d_model, n_heads, bias=True)
        self.gate, self.out = linear(d_model, d_model), linear(d_model, d_model)
        self.norm = nn.Parameter(torch.ones(d_model))
        for layer in (self.i, self.f):
            nn.init.zeros_(layer.weight)
        with torch.no_grad():
            self.i.bias.fill_(-10.0)
            self.f.bias.copy_(torch.linspace(3, 6, n_heads))
        self.state_shape = (n_heads, head_dim(half, n_heads), e + 1)

    def project(self, x, last):
        q, k, v = (split_heads(f(x), self.n_heads) for f in (self.q, self.k, self.v))
        i, f = (self.cap * torch.tanh(at_least_float32(f(x)) / self.cap).mT[..., None] for f in (self.i, self.f))
        g = F.logsigmoid(f)                                                          # (b, h, t, 1)
        m = running_maximum(i.detach(), g.detach(), last.to(g.dtype))
        before, m = m[:, :, :-1], m[:, :, 1:]
        inputs = q * q.shape[-1] ** -0.5, k * (i - m).exp(), v, (g + before - m).clamp(max=0), m
        return inputs, torch.sigmoid(self.gate(x)), m[:, :, -1:]

    def finish(self, o, gate):
        return self.out(join_heads(F.layer_norm(o, o.shape[-1:], eps=1e-6)) * self.norm * gate)

    def init_carry(self, batch_size):
        return self.out.weight.new_zeros(batch_size, self.n_heads, 1, 1)

    def matrix(self, x):
        m = self.inputs(x)[4]
        M = super().matrix(x)
        return M / torch.maximum(M.sum(dim=-1, keepdim=True).abs(), (-m).exp())


class ShortConv(nn.Module):
    """A causal filter of `width` taps for each channel, then SiLU. x: (b, t, c) and the width - 1 inputs before it."""

    def __init__(self, channels, width=4, bias=False):
        super().__init__()
        self.width = width
        self.conv = nn.Conv1d(channels, channels, width, groups=channels, bias=bias)

    def forward(self, x, past):
        x = torch.cat([past.to(x.dtype), x], dim=1)
        return F.silu(self.conv(x.mT).mT), x[:, x.shape[1] - self.width + 1:]

    def init_carry(self, batch_size):
        return self.conv.weight.new_zeros(batch_size, self.width - 1, self.conv.in_channels)


def inverse_softplus(x):
    return x + torch.log(-torch.expm1(-x))


def time_steps(n):
    """Biases whose softplus is log-uniform in [1e-3, 1e-1]."""
    return inverse_softplus(torch.exp(torch.empty(n).uniform_(math.log(1e-3), math.log(1e-1))))


def with_dt(form, q, k, v, g, dt, state=None):
    """S_t = e^{g_t} S_{t-1} + k_t (dt_t v_t)^T. dt: (b, h, t, 1). The kernel multiplies by dt itself."""
    return form(q, k, v, g, state, dt) if form is triton else form(q, k, v * dt, g, state=state)


class Mamba2(LinearMixer):
    """Mamba-2 [D24, section 7]: a scalar decay for each head, g = -dt e^{A_log}; C, B and x are q, k and v, with x
    scaled by dt; a short convolution before, a skip D, a gate and then a norm after. The chunked form is its SSD
    algorithm. C and B are shared by the heads; the inner width is 2 c. (transformers' Mamba2 starts A at 1, 2, ...,
    n_heads, not at U(1, 16).)"""
    functions = {name: partial(with_dt, form) for name, form in FORMS.items()}

    def __init__(self, d_model, n_heads=4, n_state=64, expand=2):
        super().__init__()
        self.n_heads, self.n_state, self.d_inner = n_heads, n_state, expand * d_model
        d_head = expand * head_dim(d_model, n_heads)
        self.z, self.xbc = linear(d_model, self.d_inner), linear(d_model, self.d_inner + 2 * n_state)
        self.dt, self.out = linear(d_model, n_heads), linear(self.d_inner, d_model)
        self.conv = ShortConv(self.d_inner + 2 * n_state, bias=True)
        self.dt_bias = nn.Parameter(time_steps(n_heads))
        self.A_log = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(n_heads))
        self.norm = nn.Parameter(torch.ones(self.d_inner))
        own_settings(self.dt_bias, self.A_log, self.skip)
        self.state_shape = (n_heads, n_state, d_head)

    def project(self, x, carry):
        xbc, carry = self.conv(self.xbc(x), carry)
        v, k, q = xbc.split([self.d_inner, self.n_state, self.n_state], dim=-1)
        dt = F.softplus(at_least_float32(self.dt.weight @ x.mT) + self.dt_bias[:, None])[..., None]  # (b, h, t, 1)
        g = -dt * self.A_log.exp()[:, None, None]                                    # (b, h, t, 1)
        v = split_heads(v, self.n_heads)                                             # (b, h, t, e)
        return (q[:, None], k[:, None], v, g, dt), (v, F.silu(self.z(x))), carry

    def values(self, x):
        _, _, v, _, dt, _ = self.inputs(x)
        return v * dt

    def finish(self, o, more):
        v, z = more
        return self.out(rms_norm(join_heads(o + self.skip[:, None, None] * v) * z) * self.norm)

    def init_carry(self, batch_size):
        return self.conv.init_carry(batch_size)


def turned(x, angle):
    """Neighbours (x_2i, x_2i+1) turned by angle_i, the rest as they are. x: (b, h, t, d); angle: (b, h, t, r)."""
    x, y = x.unflatten(-1, (-1, 2)).unbind(dim=-1)                                   # (b, h, t, d / 2) each
    angle = F.pad(angle, (0, x.shape[-1] - angle.shape[-1]))
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1).flatten(-2)


def with_the_last(form, q, k, v, g, k_last, v_last, state=None):
    """S_t = e^{g_t} S_{t-1} + k_t v_t^T + k'_t v_{t-1}^T: the same recurrence for each token and for the one before."""
    (o, S), (o_last, S_last) = form(q, k, v, g, state=state), form(q, k_last, v_last, g)
    return o + o_last, S + S_last


class Mamba3(LinearMixer):
    """Mamba-3 [La26]: Mamba-2 with a better step and a state that turns, and without the short convolution.
    The step: the integral over dt takes the input at both of its ends, a trapezoid of learned weights: S_t = e^{dt A}
    S_{t-1} + (1 - lambda) dt e^{dt A} B_{t-1} x_{t-1}^T + lambda dt B_t x_t^T, with lambda and A of the token.
    The turn: half of S's rows are pairs that turn by dt theta_t at each token. That is a complex decay (lesson 03's),
    and the same as turning B and C by the angles summed so far: rotary positions that the data makes. B and C are
    normed, then each head adds a bias of its own.
    Differs: n_state is 64, the authors' 128. One input a head: their option of four at once (MIMO) is left out."""
    functions = {name: partial(with_the_last, form) for name, form in FORMS.items()}

    def __init__(self, d_model, n_heads=4, n_state=64, expand=2):
        super().__init__()
        if n_state < 4 or n_state % 4:
            raise ValueError(f"n_state {n_state} is not a multiple of 4: half of it turns, in pairs")
        e, inner = expand * head_dim(d_model, n_heads), expand * d_model
        self.n_heads, self.n_state = n_heads, n_state
        self.sizes = inner, inner, n_state, n_state, 3 * n_heads, n_state // 4       # of z, x, B, C, three gates, theta
        self.all, self.out = linear(d_model, sum(self.sizes)), linear(inner, d_model)
        self.dt_bias, self.skip = nn.Parameter(time_steps(n_heads)), nn.Parameter(torch.ones(n_heads))
        self.norms = nn.Parameter(torch.ones(2, n_state))                            # of B, C
        self.biases = nn.Parameter(torch.ones(2, n_heads, 1, n_state))
        own_settings(self.dt_bias, self.skip)
        self.state_shape = (n_heads, n_state, e)

    def project(self, x, carry):
        z, v, B, C, gates, theta = self.all(x).split(self.sizes, dim=-1)
        v, theta = split_heads(v, self.n_heads), at_least_float32(theta)[:, None]    # (b, h, t, e), (b, 1, t, n / 4)
        dt, A, trap = at_least_float32(gates).mT.unflatten(1, (3, -1))[..., None].unbind(dim=1)      # (b, h, t, 1)
        dt, trap = F.softplus(dt + self.dt_bias[:, None, None]), torch.sigmoid(trap)
        g = -dt * (A.clamp(min=0) + 1 / (1 - A.clamp(max=0))).clamp(min=1e-4)        # 1 + A, below A = 0 1 / (1 - A)
        angle, k_last, v_last = carry.split([theta.shape[-1], self.n_state, v.shape[-1]], dim=-1)    # (b, h, 1, .)
        angle = angle + (dt * math.pi * torch.tanh(theta)).cumsum(dim=2)             # (b, h, t, n / 4)
        k, q = (turned(rms_norm(at_least_float32(y))[:, None] * norm + bias, angle)
                for y, norm, bias in zip((B, C), self.norms, self.biases, strict=True))              # (b, h, t, n)
        carry = torch.cat([angle.remainder(2 * math.pi), k, v], dim=-1)[:, :, -1:]
        k_last = torch.cat([k_last, k[:, :, :-1]], dim=2)
        v_last = torch.cat([v_last.to(v.dtype), v[:, :, :-1]], dim=2)
        return (q, trap * dt * k, v, g, (1 - trap) * dt * g.exp() * k_last, v_last), (v, F.silu(z)), carry

    def finish(self, o, more):
        v, z = more
        return self.out(join_heads(o + self.skip[:, None, None] * v) * z)

    def init_carry(self, batch_size):
        n, e = self.state_shape[1:]
        return at_least_float32(self.skip).new_zeros(batch_size, self.n_heads, 1, n // 4 + n + e)

    def matrix(self, x):
        q, k, _, g, k_last, _ = (at_least_float32(y) for y in self.inputs(x)[:6])
        G = segment_sums(g)
        return weights(q, k, G) + F.pad(weights(q, k_last, G), (-1, 1))              # column s of it is of v_{s-1}


# ------------------------------------------------------------------------------------------------------ the delta rule
#
# S_t = (diag(e^{g_t}) + a_t b_t^T) S_{t-1} + k_t v_t^T: what the state holds under one key, u_t = S_{t-1}^T b_t, is
# written once more, under another, a_t. With a_t = -b_t it is taken out.
#
#     linear attention, GLA           a = 0                             adds v under k             (Hebb's rule)
#     DeltaNet                        a = -beta k, b = k, k := beta k   replaces what was there    (least mean squares)
#     gated DeltaNet, KDA             the same, but b = e^g k           first forgets, then replaces
#     RWKV-7                          a = -r b, b, k of their own       takes out here, adds there
#
# As a learner: S shall answer v_t to k_t. Hebb adds k_t v_t^T whatever S says already. One step of size beta down the
# gradient of |v_t - S^T k_t|^2 / 2 is S + beta k_t (v_t - S^T k_t)^T: the delta rule. first() has both, on two tokens.
# For these, without a decay, from an empty state:
#
#     u_1 = 0                                           nothing was there
#     u_2 = (b_2 . k_1) v_1                             under b_2 the state finds what k_1 left there
#     u_3 = (b_3 . k_1) v_1 + (b_3 . k_2) v_2 + (b_3 . a_2) u_2


def read_before(b, k, G):
    """What b_t finds of k_s in S_{t-1}: sum_d b_td k_sd e^{g_{s+1} + ... + g_{t-1}} for s < t: (b, h, t, s)."""
    return weights(b, k, G.roll(1, dims=2)).tril(-1)             # row t of G is now that of t - 1


def delta_system(a, b, G):
    """1 - A. A_ts: the share of u_s, written under a_s, that the state still holds under b_t when token t comes."""
    return torch.eye(a.shape[2], dtype=a.dtype, device=a.device) - read_before(b, a, G)


def general_parallel(q, k, v, g, a, b, state=None):
    """The UT transform [Y24, eq. 10; Y25, eq. 6]: all u_t = S_{t-1}^T b_t of a block solve a triangular system, (1 - A)
    U = what b finds of V and of S_0. Then it is linear attention twice: to v under k, and to u under a."""
    g = gates(g, q)
    G = segment_sums(g)
    found = read_before(b, k, G) @ v                                                 # (b, h, t, e)
    if state is not None:
        before = F.pad(g.cumsum(dim=2)[:, :, :-1], (0, 0, 1, 0)).exp()               # decay of S_0 up to token t - 1
        found = found + (b * before) @ state
    U = torch.linalg.solve_triangular(delta_system(a, b, G), found, upper=False, unitriangular=True)
    (o, S), (o_u, S_u) = parallel(q, k, v, g, state), parallel(q, a, U, g)
    return o + o_u, S + S_u


def general_recurrent(q, k, v, g, a, b, state=None):
    g, o = gates(g, q), []
    S = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state
    for t in range(q.shape[2]):
        u = b[:, :, t, None] @ S                                                     # (b, h, 1, e)
        S = g[:, :, t, :, None].exp() * S + a[:, :, t, :, None] * u + k[:, :, t, :, None] * v[:, :, t, None]
        o.append(q[:, :, t, None] @ S)
    return torch.cat(o, dim=2), S


def general_matrix(q, k, v, g, a, b, state=None):
    """M(q, k) + M(q, a) (1 - A)^{-1} M(b, k): directly, and by way of what was read and written once more."""
    G = segment_sums(gates(g, q))
    return weights(q, k, G) + weights(q, a, G) @ torch.linalg.solve_triangular(
        delta_system(a, b, G), read_before(b, k, G), upper=False, unitriangular=True)


def with_beta(form, q, k, v, g, beta, state=None, **more):
    """A form of the general rule as the delta rule: S_t = (1 - beta_t k_t k_t^T) e^{g_t} S_{t-1} + beta_t k_t v_t^T.
    beta: (b, h, t, 1)."""
    b = k if g is None else k * g.exp()
    return form(q, beta * k, v, g, -beta * k, b, state=state, **more)


general_chunked = partial(chunked, block=general_parallel)
GENERAL = {"chunked": general_chunked, "parallel": general_parallel, "recurrent": general_recurrent}
delta_chunked, delta_parallel, delta_recurrent = (partial(with_beta, form) for form in GENERAL.values())


def delta_triton(q, k, v, g, beta, state=None):
    """The delta rule as one kernel, on a GPU: kernels/delta_rule.py, for heads up to 128 wide; a single token by its
    step."""
    from kernels.delta_rule import delta_rule, delta_step
    q, k = q.to(v.dtype), k.to(v.dtype)
    if q.shape[2] == 1 and state is not None and not torch.is_grad_enabled():
        o, state = delta_step(*(x if x is None else x[:, :, 0] for x in (q, k, v, g, beta)), state)
        return o[:, :, None], state
    return delta_rule(q, k, v, g, beta, state)


def unit_length(x):
    """x / |x|, with 1e-6 under the root as in the authors' code."""
    return x * torch.rsqrt(at_least_float32(x).square().sum(dim=-1, keepdim=True) + 1e-6)


class DeltaNet(LinearMixer):
    """The delta rule [Sch21], in chunks [Y24]: with keys of length 1 and beta = sigmoid(W x), writing under a key first
    takes out the share beta of what is there. q, k, v pass a short convolution; a norm for each head after. beta_max=2
    lets 1 - beta k k^T mirror the state, with an eigenvalue down to -1, which is what parity and swaps need [Gr24].
    d_key: the width of a head's key (default: d_model / n_heads)."""
    functions = {"chunked": delta_chunked, "parallel": delta_parallel, "recurrent": delta_recurrent,
                 "triton": delta_triton}

    def __init__(self, d_model, n_heads=4, expand_v=1, beta_max=1.0, d_key=None):
        super().__init__()
        if not 0 < beta_max <= 2:
            raise ValueError(f"beta_max must be above 0 and at most 2, not {beta_max}: beyond, the state grows")
        if d_key is not None and d_key < 1:
            raise ValueError(f"d_key, the width of a key, must be at least 1, not {d_key}")
        self.n_heads, d = n_heads, head_dim(d_model, n_heads) if d_key is None else d_key    # d: of a key
        self.beta_max, d_value = beta_max, n_heads * expand_v * d
        self.sizes = n_heads * d, n_heads * d, d_value                                       # of q, k, v
        self.qkv, self.conv = linear(d_model, sum(self.sizes)), ShortConv(sum(self.sizes))
        self.beta, self.out = linear(d_model, n_heads), linear(d_value, d_model)
        self.norm = nn.Parameter(torch.ones(d_value // n_heads))
        self.state_shape = (n_heads, d, d_value // n_heads)
        self.forms = tuple(form for form in type(self).forms if form != "triton" or d <= 128)   # the kernel

    def project(self, x, carry):
        qkv, carry = self.conv(self.qkv(x), carry)
        q, k, v = (split_heads(y, self.n_heads) for y in qkv.split(self.sizes, dim=-1))
        q, k = unit_length(q) * q.shape[-1] ** -0.5, unit_length(k)
        beta = self.beta_max * torch.sigmoid(at_least_float32(self.beta(x))).mT[..., None]   # (b, h, t, 1)
        return (q, k, v, None, beta), None, carry

    def finish(self, o, _):
        return self.out(join_heads(rms_norm(o) * self.norm))

    def init_carry(self, batch_size):
        return self.conv.init_carry(batch_size)

    def matrix(self, x):
        q, k, _, g, beta = (at_least_float32(y) for y in self.inputs(x)[:5])
        return with_beta(general_matrix, q, k, None, g, beta)


class GatedDeltaNet(DeltaNet):
    """DeltaNet whose state also decays, g = -e^{A_log} softplus(W x + dt_bias), with values of twice the keys' width
    and a swish gate behind the norm [Y25]. eps: the norm's. (Qwen3.5's is this with eps=1e-6, OLMo-hybrid's with
    beta_max=2.)"""

    def __init__(self, d_model, n_heads=4, expand_v=2, beta_max=1.0, d_key=None, eps=1e-5):
        super().__init__(d_model, n_heads, expand_v, beta_max, d_key)
        self.eps = eps
        self.decay, self.gate = linear(d_model, n_heads), linear(d_model, self.out.in_features)
        self.dt_bias = nn.Parameter(time_steps(n_heads))
        self.A_log = nn.Parameter(torch.empty(n_heads).uniform_(0, 16).log())
        own_settings(self.dt_bias, self.A_log)

    def project(self, x, carry):
        (q, k, v, _, beta), _, carry = super().project(x, carry)
        dt = F.softplus(at_least_float32(self.decay(x)) + self.dt_bias).mT[..., None]        # (b, h, t, 1)
        return (q, k, v, -dt * self.A_log.exp()[:, None, None], beta), F.silu(self.gate(x)), carry

    def finish(self, o, gate):
        return self.out(join_heads(rms_norm(o, self.eps) * self.norm) * gate)


class KDA(DeltaNet):
    """Kimi Delta Attention [Ki25]: gated DeltaNet with a decay for each key channel, g = -e^{A_log} softplus(W_2 W_1 x
    + dt_bias), and a sigmoid gate behind the norm, both gates of rank d."""

    def __init__(self, d_model, n_heads=4, beta_max=1.0):
        super().__init__(d_model, n_heads, beta_max=beta_max)
        d = head_dim(d_model, n_heads)
        self.decay, self.gate = (nn.Sequential(linear(d_model, d), linear(d, d_model)) for _ in range(2))
        self.dt_bias = nn.Parameter(time_steps(d_model))
        self.A_log = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())
        own_settings(self.dt_bias, self.A_log)

    def project(self, x, carry):
        (q, k, v, _, beta), _, carry = super().project(x, carry)
        dt = split_heads(F.softplus(at_least_float32(self.decay(x)) + self.dt_bias), self.n_heads)   # (b, h, t, d)
        return (q, k, v, -dt * self.A_log.exp()[:, None, None], beta), torch.sigmoid(self.gate(x)), carry

    def finish(self, o, gate):
        return self.out(join_heads(rms_norm(o) * self.norm) * gate)


# --------------------------------------------------------------------- further away: complex states, RWKV's bonus


def scan(a, b):
    """h_t = a_t h_{t-1} + b_t along axis 2 by doubling [HS86]: log t rounds, sums of 2^j terms."""
    n = 1
    while n < b.shape[2]:
        pad = (0, 0) * (b.ndim - 3) + (n, -n)
        b, a = b + a * F.pad(b, pad), a * F.pad(a, pad)
        n *= 2
    return b


def scanned(q, k, v, g=None, state=None):
    """All states at once by a scan: t d e numbers, so only for small d e."""
    a = gates(g, q)[..., None].exp()                                                 # (b, h, t, 1 or d, 1)
    S = k[..., None] * v[..., None, :]                                               # (b, h, t, d, e)
    a = a.expand_as(S)
    if state is not None:
        S = torch.cat([S[:, :, :1] + a[:, :, :1] * state[:, :, None], S[:, :, 1:]], dim=2)
    S = scan(a, S)
    return (q[..., None, :] @ S)[..., 0, :], S[:, :, -1]


def real_part(form, q, k, v, g, state=None):
    """A form with a complex decay: real q, k, v meet a complex state, of which the real part is read."""
    o, S = form(*(x.to(g.dtype) for x in (q, k, v)), g, state=state)
    return o.real, S


def gateloop_triton(q, k, v, g, state=None):
    """The scan as a kernel, on a GPU: kernels/scan.py."""
    from kernels.scan import gateloop
    return gateloop(q, k, v, g, state)


class GateLoop(LinearMixer):
    """[Ka23, eq. 6]: a complex decay for each channel from the token, g = logsigmoid(a) + i b, with heads of width 1:
    one complex number of state a channel, which can rotate as well as fade. o = q Re(S), then a swish gate.
    (gateloop-transformer's layer has |e^g| = sigmoid(|z|), so never below 1/2.)"""
    forms = ("scan", "parallel", "recurrent", "triton")          # for one number a chunk's matrix does not pay
    functions = {name: partial(real_part, form) for name, form in (FORMS | {"scan": scanned}).items()}
    functions["triton"] = gateloop_triton

    def __init__(self, d_model, n_heads=None):                   # n_heads is not used: each channel is one
        super().__init__()
        self.q, self.k, self.v, self.gate, self.out = (linear(d_model, d_model) for _ in range(5))
        self.decay = linear(d_model, 2 * d_model, bias=True)
        nn.init.uniform_(self.decay.bias[:d_model], 1, 5)                            # |decay| from 0.73 to 0.993
        self.state_shape = (d_model, 1, 1)

    def project(self, x, carry):
        q, k, v = (f(x).mT[..., None] for f in (self.q, self.k, self.v))             # (b, c, t, 1)
        size, turn = at_least_float32(self.decay(x)).mT.chunk(2, dim=1)
        g = torch.complex(F.logsigmoid(size), turn)[..., None]
        return (q, k, v, g), F.silu(self.gate(x)), carry + x.shape[1]

    def finish(self, o, gate):
        return self.out(o[..., 0].mT * gate)

    def init_state(self, batch_size):
        carry, S = super().init_state(batch_size)
        return carry, torch.complex(S, S)

    def state_size(self, t):
        return 2 * super().state_size(t)

    def matrix(self, x):
        q, k, _, g, _ = self.inputs(x)
        return weights(q.to(g.dtype), k.to(g.dtype), segment_sums(g)).real


def with_bonus(form, q, k, v, g, u, state=None):
    """RWKV reads before it writes: o_t = q_t^T (S_{t-1} + diag(u) k_t v_t^T). S_{t-1} is what any form gives for k, v
    and g one step late, so that the last token is written after it."""
    g = gates(g, q)
    o, S = form(q, *(F.pad(x, (0, 0, 1, -1)) for x in (k, v, g)), state=state)       # S: before the last token
    S = g[:, :, -1, :, None].exp() * S + (k[:, :, -1, :, None] * v[:, :, -1, None, :]).to(S.dtype)
    return o + (q * u * k).sum(dim=-1, keepdim=True) * v, S


def shifted(x, last):
    """Token shift: the token before each, and the last one to carry on. x: (b, t, c), last: (b, 1, c)."""
    return torch.cat([last.to(x.dtype), x[:, :-1]], dim=1), x[:, -1:]


class RWKV6(LinearMixer):
    """RWKV-6's time mixing [Pe24, section 4.2]: a vector decay from the token, g = -exp(w_0 + tanh(x A) B), and a bonus
    u for the token itself, which is read before it is written. Each of w, k, v, r, g sees its own, input-dependent mix
    of the token and the one before it. RWKV-5 is this with A = 0 and fixed mixes. `depth`: place of the layer, 0 to
    1, for the initial values."""

    functions = {name: partial(with_bonus, form) for name, form in FORMS.items()}

    def __init__(self, d_model, n_heads=4, depth=0.5, rank=32, decay_rank=64):
        super().__init__()
        check_depth(depth)
        self.n_heads, d = n_heads, head_dim(d_model, n_heads)
        i = torch.arange(d_model) / max(1, d_model - 1)
        share = torch.arange(d_model) / d_model                              # as the authors: not up to 1
        near, half = 1 - share ** (1 - depth), 1 - share ** ((1 - depth) / 2)
        self.mix_all = nn.Parameter(near.clone())
        self.mixes = nn.Parameter(torch.stack([near, near, near - 0.3 * depth, half, half]))       # of w, k, v, r, g
        self.mix_down = nn.Parameter(torch.zeros(d_model, 5 * rank))
        self.mix_up = nn.Parameter(torch.empty(5, rank, d_model).uniform_(-0.01, 0.01))
        self.w = nn.Parameter(-6 + 5 * i ** (0.7 + 1.3 * depth))
        self.w_down = nn.Parameter(torch.zeros(d_model, decay_rank))
        self.w_up = nn.Parameter(torch.empty(decay_rank, d_model).uniform_(-0.01, 0.01))
        zigzag = 0.1 * ((torch.arange(d_model) + 1) % 3 - 1)
        self.bonus = nn.Parameter((depth * (1 - i) + zigzag).view(n_heads, 1, d))
        self.r, self.k, self.v, self.gate, self.out = (linear(d_model, d_model) for _ in range(5))
        for layer, gain in ((self.r, 1.0), (self.k, 0.1), (self.v, 1.0), (self.gate, 0.1)):
            nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(self.out.weight)
        self.norm = nn.GroupNorm(n_heads, d_model, eps=64e-5)
        own_settings(self.mixes, self.mix_down, self.mix_up, self.w_down, self.w_up, self.bonus)
        self.state_shape = (n_heads, d, d)

    def project(self, x, carry):
        before, carry = shifted(x, carry)
        step = before - x
        low = torch.tanh((x + step * self.mix_all) @ self.mix_down).unflatten(-1, (5, -1))         # (b, t, 5, rank)
        mixes = self.mixes + torch.einsum("btnr,nrc->btnc", low, self.mix_up)
        w, k, v, r, gate = (x[:, :, None] + step[:, :, None] * mixes).unbind(dim=2)
        g = -torch.exp(at_least_float32(self.w + torch.tanh(w @ self.w_down) @ self.w_up))
        q, k, v, g = (split_heads(y, self.n_heads) for y in (self.r(r), self.k(k), self.v(v), g))
        return (q, k, v, g, self.bonus.to(q.dtype)), F.silu(self.gate(gate)), carry

    def finish(self, o, gate):
        o = join_heads(o)
        return self.out(self.norm(o.flatten(0, 1)).view_as(o) * gate)

    def init_carry(self, batch_size):
        return self.out.weight.new_zeros(batch_size, 1, self.out.in_features)

    def matrix(self, x):
        """What is read before the token is written: the matrix for keys one step late, moved back; u for the token."""
        q, k, _, g, u = (at_least_float32(y) for y in self.inputs(x)[:5])
        k_late, g_late = (F.pad(y, (0, 0, 1, -1)) for y in (k, g))
        M = F.pad(weights(q, k_late, segment_sums(g_late)), (-1, 1))                 # (b, h, t, s)
        return M + torch.diag_embed((q * u * k).sum(dim=-1))


class RWKV7(LinearMixer):
    """RWKV-7's time mixing [Pe25]: the general delta rule. A removal key b of length 1 apart from the key k; a rate r
    in (0, 1) for each channel (the paper's a), at which what stands under b is taken out, a = -r b; a vector decay that
    is never below e^{-e^{-1/2}} = 0.545: no eigenvalue of what multiplies S is below 0.545 - 1 (it is similar to a
    symmetric matrix), so one layer has no factor of -1. k is smaller where r is. A bonus adds v_t itself, behind the
    norm. Each input sees its own mix of the token and the one before it. `depth`: place of the layer, 0 to 1, for the
    initial values. Differs: no share of the first layer's values, for a mixer knows no other layer; the norm's scale
    starts at 1, the authors' at ((l + 1) / L)^0.7 in the l-th of L layers; all ranks are 32, theirs grow with the
    width."""
    forms = ("chunked", "parallel", "recurrent")
    functions = GENERAL

    def __init__(self, d_model, n_heads=4, depth=0.5, rank=32):
        super().__init__()
        check_depth(depth)
        self.n_heads, d = n_heads, head_dim(d_model, n_heads)
        i, share = torch.arange(d_model) / max(1, d_model - 1), torch.arange(d_model) / d_model
        zigzag = 2 * (torch.arange(d_model) % d) / max(1, d - 1) - 1
        zigzag = zigzag * zigzag.abs()
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None] * (1 - depth)
        self.mixes = nn.Parameter(1 - share ** powers)                                       # of q, g, k, v, r, gate
        self.q, self.k, self.v, self.out = (linear(d_model, d_model) for _ in range(4))
        self.down = nn.ModuleList(linear(d_model, rank) for _ in range(3))                   # of g, r, gate
        self.up = nn.ModuleList(linear(rank, d_model, bias=bias) for bias in (True, True, False))
        for layer, gain in ((self.q, 1.0), (self.k, 0.1), (self.v, 1.0), *((layer, 0.1) for layer in self.up)):
            nn.init.orthogonal_(layer.weight, gain)
        for layer in (self.out, *self.down):
            nn.init.zeros_(layer.weight)
        with torch.no_grad():
            self.up[0].bias.copy_(-5.5 + 6 * i ** (1 + depth ** 0.3) + 2.5 * zigzag)
            self.up[1].bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (i - 0.5))
        self.remove = nn.Parameter(0.71 - 0.1 * (i - 0.5))                                   # b from k
        self.keep = nn.Parameter(torch.full((d_model,), 1.02))                               # k from r
        self.bonus = nn.Parameter(torch.full((n_heads, 1, d), -0.04))
        self.norm = nn.GroupNorm(n_heads, d_model, eps=d * 1e-5)
        own_settings(self.mixes, self.remove, self.keep, self.bonus)
        self.state_shape = (n_heads, d, d)

    def project(self, x, carry):
        before, carry = shifted(x, carry)
        q, g, k, v, r, gate = (x + (before - x) * mix for mix in self.mixes)
        g = -math.exp(-0.5) * torch.sigmoid(at_least_float32(self.up[0](torch.tanh(self.down[0](g)))))
        r = torch.sigmoid(at_least_float32(self.up[1](self.down[1](r))))
        gate = self.up[2](torch.sigmoid(self.down[2](gate)))
        q, k, v = self.q(q), at_least_float32(self.k(k)), self.v(v)
        q, k, b, v, g, r = (split_heads(y, self.n_heads) for y in (
            q, k * (1 + (r - 1) * self.keep), k * self.remove, v, g, r))                     # (b, h, t, d)
        b = F.normalize(b, dim=-1)
        own = (q * k * self.bonus).sum(dim=-1, keepdim=True) * v                             # (b, h, t, e)
        return (q, k, v, g, -r * b, b), (own, gate), carry

    def finish(self, o, more):
        own, gate = more
        o = join_heads(o)
        o = self.norm(o.flatten(0, 1)).view_as(o)
        return self.out((o + join_heads(own).to(o.dtype)) * gate)

    def init_carry(self, batch_size):
        return self.out.weight.new_zeros(batch_size, 1, self.out.in_features)

    def matrix(self, x):
        """The recurrence's alone: the bonus is added behind the norm."""
        return general_matrix(*(at_least_float32(y) for y in self.inputs(x)[:6]))


# ------------------------------------------------------------------------------------------------------ RWKV-4's forms
#
# o_t = (sum_{s<t} e^{(t-1-s) w + k_s} v_s + e^{u + k_t} v_t) / (the same with v = 1): numerator and denominator are
# two linear recurrences, of e^k v and of e^k, with a bonus for the own token. k, v: (b, c, t); w: (c,) below 0; u:
# (c,).


def rwkv_ratio(k, v, w, u, form=chunked):
    """The ratio of two linear recurrences by the general form, with e^k as it is: the definition, but infinite over
    infinite for large k, so no mixer runs it."""
    k, v = k[..., None].exp(), torch.stack([v, torch.ones_like(v)], dim=-1)          # (b, c, t, 1), (b, c, t, 2)
    o, _ = with_bonus(form, torch.ones_like(k), k, v, w[None, :, None, None], u[None, :, None, None].exp(), None)
    return o[..., 0] / o[..., 1]


def rwkv_weights(k, w, u):
    """Read as a matrix it is a softmax over exponents: (b, c, t, s)."""
    t = torch.arange(k.shape[2], device=k.device)
    lag = t[:, None] - t - 1
    E = torch.where(lag < 0, u[:, None, None], lag * w[:, None, None]) + k[:, :, None, :]
    return E.masked_fill(lag < -1, -torch.inf).softmax(dim=-1)


def rwkv_parallel(k, v, w, u, state):
    """M v, from no state and to none."""
    return (rwkv_weights(k, w, u) @ v[..., None])[..., 0], state


def rwkv_read(p, q, m, k, v, u):
    """The ratio for one token after a state of sums p, q in units of e^m."""
    top = torch.maximum(m, u + k)
    old, own = (m - top).exp(), (u + k - top).exp()
    return (old * p + own * v) / (old * q + own)


def rwkv_add(p, q, m, p2, q2, m2):
    """Two pairs of sums, each in units of its own e^m: no exponent is above 0."""
    top = torch.maximum(m, m2)
    old, new = (m - top).exp(), (m2 - top).exp()
    return old * p + new * p2, old * q + new * q2, top


def rwkv_recurrent(k, v, w, u, state):
    """state: (b, 3, c), the sums p and q and the exponent m that both are divided by."""
    (p, q, m), o = state.unbind(1), []
    for t in range(k.shape[2]):
        o.append(rwkv_read(p, q, m, k[..., t], v[..., t], u))
        p, q, m = rwkv_add(p, q, m + w, v[..., t], torch.ones_like(p), k[..., t])
    return torch.stack(o, dim=2), torch.stack([p, q, m], dim=1)


def rwkv_scan(k, v, w, u, state):
    """The same sums by doubling: neighbours n apart are added, the earlier decayed by n w. O(t log t), nothing
    overflows."""
    first = state[..., None]                                                         # (b, 3, c, 1)
    p, q, m = (torch.cat([s, x], dim=2) for s, x in zip(first.unbind(1), (v, torch.ones_like(v), k), strict=True))
    n, lowest = 1, torch.finfo(m.dtype).min
    while n < p.shape[2]:
        earlier = F.pad(p, (n, -n)), F.pad(q, (n, -n)), F.pad(m + n * w[:, None], (n, -n), value=lowest)
        p, q, m = rwkv_add(*earlier, p, q, m)
        n *= 2
    o = rwkv_read(p[..., :-1], q[..., :-1], m[..., :-1], k, v, u[:, None])
    return o, torch.stack([p[..., -1], q[..., -1], m[..., -1]], dim=1)


def rwkv_triton(k, v, w, u, state):
    """The scan as one kernel, on a GPU: kernels/scan.py."""
    from kernels.scan import rwkv
    return rwkv(k, v, w, u, state)


class RWKV4(LinearMixer):
    """RWKV-4's time mixing [Pe23, eq. 11-13, 16, 17]: for each channel a weighted average of v with weights e^k that
    decay by e^w a step (w below 0; the paper's w is -w here), the token itself at e^{u+k}; times sigmoid(r). Forms with
    a running maximum, as exponents k are free to grow."""
    forms = ("scan", "parallel", "recurrent", "triton")
    functions = {"scan": rwkv_scan, "recurrent": rwkv_recurrent, "parallel": rwkv_parallel, "triton": rwkv_triton}

    def __init__(self, d_model, n_heads=None, depth=0.5):        # n_heads is not used: each channel is one
        super().__init__()
        check_depth(depth)
        i = torch.arange(d_model) / max(1, d_model - 1)
        near = (torch.arange(d_model) / d_model) ** (1 - depth)                      # as the authors: not up to 1
        self.mixes = nn.Parameter(torch.stack([near, near + 0.3 * depth, near ** 0.5]))              # of k, v, r
        self.decay = nn.Parameter(-5 + 8 * i ** (0.7 + 1.3 * depth))                 # w = -exp(decay)
        self.u = nn.Parameter(math.log(0.3) + 0.5 * ((torch.arange(d_model) + 1) % 3 - 1))
        self.k, self.v, self.r, self.out = (linear(d_model, d_model) for _ in range(4))
        for layer in (self.k, self.r, self.out):
            nn.init.zeros_(layer.weight)
        own_settings(self.mixes)
        self.state_shape = (3, d_model)

    def project(self, x, carry):
        before, carry = shifted(x, carry)
        k, v, r = (before + (x - before) * mix for mix in self.mixes)
        k, v = self.k(k).mT, self.v(v).mT                                            # (b, c, t)
        return (k, v, -self.decay.exp(), self.u), torch.sigmoid(self.r(r)), carry

    def finish(self, o, r):
        return self.out(o.view(*o.shape[:2], -1).mT * r)

    def init_state(self, batch_size):
        carry, state = super().init_state(batch_size)
        state[:, 2] = torch.finfo(state.dtype).min               # an empty sum, in units of e^-infinity as good as
        return carry, state

    def init_carry(self, batch_size):
        return self.out.weight.new_zeros(batch_size, 1, self.out.in_features)

    def values(self, x):
        return self.inputs(x)[1][..., None]                                          # (b, c, s, 1)

    def matrix(self, x):
        k, _, w, u, _ = self.inputs(x)
        return rwkv_weights(k, w, u)


# ------------------------------------------------------------------------------------------------ the task: a state
#
# A decay can forget, and a state that only fades cannot tell odd from even: what parity wants is a factor of -1. The
# delta rule has one, 1 - beta |k|^2, for beta up to 2 [Gr24]; rotations (Mamba-3, GateLoop) can count modulo n.


def moves(kind, n):
    """What each token does to each state: (states, tokens) int64."""
    states = torch.arange(n)
    if kind == "parity":
        return torch.tensor([[0, 1], [1, 0]])                                        # token 1 turns it over
    if kind == "count":
        return torch.stack([states, (states + 1) % n], dim=1)                        # token 1 adds one, modulo n
    if kind == "swaps":
        orders = [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1)]

        def swap(order, i, j):
            order = list(order)
            order[i], order[j] = order[j], order[i]
            return orders.index(tuple(order))
        return torch.tensor([[swap(order, i, j) for i, j in ((0, 1), (1, 2), (0, 2))] for order in orders])
    raise ValueError(f"state_tracking has the kinds parity, count and swaps, not {kind!r}")


def state_tracking(batch_size=32, generator=None, kind="parity", modulo=5, length=40, test_length=160,
                   vocab_size=16, progress=None):
    """Follow a state. parity: of the ones so far; count: the ones so far, modulo `modulo`; swaps: the order of three
    things of which each token swaps two (six orders; the swaps do not commute). In training (progress given) texts of
    `length` tokens, the state asked after each; held out, texts of test_length, asked beyond `length` only: whoever
    learned the rule, not the lengths, is right there too. Returns ids and targets, (b, t) int64; states come first in
    the vocabulary, then the tokens; -100 where nothing is asked."""
    table = moves(kind, modulo)
    n_states, n_tokens = table.shape
    symbols = n_states + n_tokens
    if not (0 < length < test_length and modulo >= 2 and symbols <= vocab_size):
        raise ValueError(f"state_tracking needs 0 < length < test_length, modulo >= 2 and vocab_size >= {symbols}, not "
                         f"length {length}, test_length {test_length}, modulo {modulo}, vocab_size {vocab_size}")
    t = test_length if progress is None else length
    tokens = torch.randint(n_tokens, (batch_size, t), generator=generator)
    state, states = torch.zeros(batch_size, dtype=torch.int64), []
    for token in tokens.unbind(dim=1):
        state = table[state, token]
        states.append(state)
    targets = torch.stack(states, dim=1)
    if progress is None:
        targets[:, :length] = -100
    return n_states + tokens, targets


MIXERS = {"linear_attention": LinearAttention, "relu": ReluAttention, "performer": PerformerAttention,
          "rfa": RFAttention, "cosformer": CosFormerAttention, "hedgehog": HedgehogAttention,
          "taylor": TaylorAttention, "taylor_full": TaylorFullAttention, "rebased": ReBasedAttention,
          "gated_rfa": GatedRFA, "retnet": RetNet, "lightning_attention": LightningAttention, "gla": GLA,
          "mlstm": MLSTM, "mamba2": Mamba2, "mamba3": Mamba3, "deltanet": DeltaNet, "gated_deltanet": GatedDeltaNet,
          "kda": KDA, "rwkv7": RWKV7, "rwkv6": RWKV6, "rwkv4": RWKV4, "gateloop": GateLoop}
TASKS = {"state_tracking": state_tracking}


# --------------------------------------------------------------------------------------- how well is softmax mimicked?


def normalise(W):
    return W / W.sum(dim=-1, keepdim=True).clamp(min=1e-6)


def ranks(x):
    return x.argsort(dim=-1).argsort(dim=-1).double()


def mimicry(d=16, n_queries=256, n_keys=64, spread=2 ** 0.5):
    """For softmax and every feature map, as they start: {name: (entropy of the weights in nats, their rank
    correlation with q . k, q . k / sqrt(d), the weights)}. q, k ~ N(0, spread^2). [Z24, section 3]: softmax is spiky
    and monotone."""
    torch.manual_seed(0)
    q, k = (spread * torch.randn(1, 1, n, d, dtype=torch.float64) for n in (n_queries, n_keys))
    scores, result = q @ k.mT / d ** 0.5, {}
    maps = {name: make(d, 1).double() for name, make in FEATURE_MAPS.items() if name != "taylor_full"}
    for name, phi in [("softmax", None), *maps.items()]:
        W = scores.softmax(dim=-1) if phi is None else normalise((phi(q) @ phi(k).mT).detach())
        P = W.clamp(min=0)
        entropy = -torch.xlogy(P, P).sum(dim=-1).mean().item()
        a, b = (ranks(x) - (n_keys - 1) / 2 for x in (W, scores))
        result[name] = entropy, ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).item(), scores, W
    return result


def distil(q, k, phi_q, phi_k, steps=300, lr=1e-2, weights=None):
    """Fit feature maps to the weights P of causal softmax attention, by their cross-entropy [Z24, eq. 7]:
    L = -sum_s P_ts log (phi(q_t) . phi(k_s) / sum_r phi(q_t) . phi(k_r)). q, k: (b, h, t, d) of a trained layer.
    weights(q, k): (b, h, t, s), another matrix with rows that sum to 1, in which the maps are a part.
    Returns the divergence L - entropy(P) before each step and after the last, in nats for each target."""
    t = q.shape[2]
    causal = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
    P = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~causal, -torch.inf).softmax(dim=-1).detach()
    entropy = -torch.xlogy(P, P).sum(dim=-1).mean()
    optimizer = torch.optim.Adam([*phi_q.parameters(), *phi_k.parameters()], lr=lr)
    divergences = []
    for step in range(steps + 1):
        if weights is None:
            W = phi_q(q.detach()) @ phi_k(k.detach()).mT
            W = normalise(W.clamp(min=0).masked_fill(~causal, 0))            # RFA's can be negative: that is no share
        else:
            W = weights(q.detach(), k.detach())
        loss = -(P * W.clamp(min=1e-30).log()).sum(dim=-1).mean()
        divergences.append((loss - entropy).item())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return divergences


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


def split_heads(x, n):
    """(b, t, n d) -> (b, n, t, d). Raises ValueError if n does not divide the width."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def join_heads(x):
    """(b, n, t, d) -> (b, t, n d)"""
    return x.transpose(1, 2).flatten(-2)


def check_depth(depth):
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be from 0 (the first layer) to 1 (the last), not {depth}")


def head_dim(d_model, n_heads):
    if n_heads < 1 or d_model % n_heads:
        raise ValueError(f"d_model {d_model} is not a multiple of n_heads {n_heads}")
    return d_model // n_heads


def linear(d_in, d_out, bias=False):
    return nn.Linear(d_in, d_out, bias=bias)


def own_settings(*parameters):
    """Mark parameters that train.py shall not decay."""
    for p in parameters:
        p.optim = {"weight_decay": 0.0}


def at_least_float32(x):
    return x if x is None else x.to(torch.promote_types(x.dtype, torch.float32))


def working_dtype(x):
    """What a linear layer makes of x: x's own dtype, or autocast's."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


# ------------------------------------------------------------------------------------------------------ look and check


def timed(f, *args, **more):
    """f's result, and its time in milliseconds: the shortest of up to five calls within a quarter of a second."""
    times = []
    while not times or len(times) < 5 and sum(times) < 0.25:
        start = time.perf_counter()
        y = f(*args, **more)
        times.append(time.perf_counter() - start)
    return y, 1e3 * min(times)


LARGE = ("gla", "kda", "rwkv7", "rwkv6", "rwkv4", "gateloop")


def compare_forms(t=128, d_model=64, long=1024):
    """Print how far the forms of every mixer are apart in float64, and the time of each form for `long` tokens in
    float32."""
    print(f"{'mixer':20}{'form':11}{f'time, t = {long}':>16}   largest difference from the forms above (t = {t})")
    with torch.no_grad():
        for name, make in MIXERS.items():
            torch.manual_seed(0)
            mixer, done = make(d_model), {}
            for p in mixer.parameters():
                p += 0.05 * torch.randn_like(p)              # some weights start at zero
            x, x_long = torch.randn(2, t, d_model, dtype=torch.float64), torch.randn(1, long, d_model)
            for form in (form for form in mixer.forms if form != "triton"):
                too_large = form == "parallel" and name in LARGE                                    # (t, t, d) numbers
                y = mixer.double()(x, form)
                mixer.float()
                spent = "too large" if too_large else f"{timed(mixer, x_long, form)[1]:.0f} ms"
                gaps = "   ".join(f"{other} {(y - z).abs().max():.0e}" for other, z in done.items())
                print(f"{'' if done else name:20}{form:11}{spent:>16}   {gaps}", flush=True)
                done[form] = y


def print_mimicry():
    print("\nfeature map   entropy of its weights (nats)   rank correlation of its weights with q . k")
    for name, (entropy, monotone, _, _) in mimicry().items():
        print(f"{name:14}{entropy:>12.2f}{monotone:>32.2f}")


def plot(path, d_model=32, t=48):
    """Above: weight against q . k for softmax and each feature map. Below: the mixing matrices of the decays."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    maps = mimicry()
    shown = ["retnet", "mamba2", "gla", "mlstm", "deltanet", "kda", "rwkv7", "rwkv4", "gateloop"]
    figure, axes = plt.subplots(2, 9, figsize=(24, 6), constrained_layout=True)
    for ax, (name, (entropy, monotone, scores, W)) in zip(axes[0], maps.items(), strict=True):
        ax.scatter(scores[0, 0, :24], W[0, 0, :24], s=1)
        ax.set_title(f"{name}\nentropy {entropy:.2f}, rank corr. {monotone:.2f}", fontsize=10)
        ax.set_ylim(min(0, W.min().item()), 1.05 * W[0, 0, :24].max().item())
        ax.set_xlabel("q . k / sqrt(d)", fontsize=8)
    axes[0, 0].set_ylabel("weight")
    torch.manual_seed(0)
    x = torch.randn(1, t, d_model)
    with torch.no_grad():
        for ax, name in zip(axes[1], shown, strict=True):
            M = MIXERS[name](d_model, n_heads=2).matrix(x)[0]
            M = M[len(M) // 2]                                           # a head (or channel) from the middle
            limit = M[M != 0].abs().quantile(0.95)
            ax.imshow(M, cmap="RdBu_r", vmin=-limit, vmax=limit)
            ax.set_title(name, fontsize=10)
            ax.set(xticks=[], yticks=[])
    axes[1, 0].set_ylabel("target")
    axes[1, 0].set_xlabel("source")
    figure.suptitle("Above: the weight that each feature map gives a key, against q . k.   "
                    "Below: mixing matrices at initialisation, red positive, blue negative")
    figure.savefig(path, dpi=90)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lesson 02: linear attention.")
    parser.add_argument("--plot", metavar="FILE.png", help="draw feature maps and mixing matrices instead")
    args = parser.parse_args()
    if args.plot:
        try:
            plot(args.plot)
        except (OSError, ValueError) as e:               # a folder that is not there, an ending that is no picture's
            parser.error(f"--plot {args.plot}: {e}")
    else:
        first()
        compare_forms()
        print_mimicry()

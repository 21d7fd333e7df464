"""Lesson 05. Just read twice: a state of fixed size must choose what to keep before it knows the question.

    [A: 4 names] [B: 256 names]  who is in both?      keep A, then look up each of B as it comes: 4 names to remember
    [A: 256 names] [B: 4 names]  who is in both?      keep A: 256 names, although 4 would have been enough

A causal recurrent model must remember the first set, however large; one that knows everything before it decides needs
only the smaller: min(|A|, |B|). Two ways to get there. JRT-prompt: show the text twice, to any model as it is. JRT-RNN:
let the prefix (the prompt) be read without causality by keys and values of its own, then go on causally,

    y_t = phi(q_t) . (sum_{s<=t} phi(k_s) v_s^T + sum_{s<M} phi(k'_s) v'_s^T) / (the same with v = v' = 1)

for a prefix of M tokens. Generation starts from the two sums added up: a state of the same size, a step of the same
cost. With M = 0 it is Based's linear attention, causal; with the second sum alone over everything, bidirectional. (One
such layer adds up what it sees, chooses nothing: the keys of the next layer, which know the whole prefix, can choose.)

Papers  [Ar24b] Arora et al. 2024, Just read twice        arXiv:2407.05483
        [Ar24] Arora et al. 2024, Based                  arXiv:2402.18668
        [K20]  Katharopoulos et al. 2020                 arXiv:2006.16236

Axes    b batch, t time (target), s source, h head, f width of q and k, D features (by Taylor 1 + f + f (f + 1) / 2),
        e value dim, c model width, M prefix length (in the formulas; the mixing matrix has no letter here).

mixer          forms                       training cost   state per sequence
jrt            chunked parallel recurrent  t D, prefix 2x  h D (e + 1); f = 16: D = 153
bidirectional  chunked parallel            t D             none: not causal, so it cannot generate
(jrt with the Taylor map also triton: one kernel, the default on a GPU in bfloat16)

    python 05_jrt.py                  forms compared, for prefixes from nothing to everything; the order effect
    python 05_jrt.py --plot FILE.png  the mixing matrix with its dense prefix; accuracy against state, for both orders
"""
import argparse
import math
import os
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

KERNELS = Path(__file__).with_name("kernels").is_dir()       # a lesson also runs alone, without its kernels


def first():
    """The lesson on four tokens, A c B A, with d = e = 2, q, k and v as in lesson 02, no feature map, no normaliser:
    read once, and read twice. Prints and returns q, k, v, M read once, M for the second reading, and M V of that."""
    A, B, c, nothing = (2.0, 0.0), (0.0, 2.0), (-1.0, -1.0), (0.0, 0.0)
    q = v = torch.tensor([A, c, B, A])                                               # (t, d), (t, e)
    k = torch.tensor([nothing, A, c, B])                                             # (t, d), the token before

    # Read once: S_t = S_{t-1} + k_t v_t^T. The first A cannot know what is to follow.
    S, once = torch.zeros(2, 2), []
    for t in range(4):
        S = S + k[t][:, None] * v[t]                                                 # (d, e)
        once.append(q[t] @ S)
    causal = (q @ k.T).tril()                                                        # (t, s)
    assert torch.equal(causal @ v, torch.stack(once))

    # Read twice, A c B A and A c B A again (JRT-prompt): the loop goes on from the S that the first reading left. The
    # second reading starts like the first, with nothing before its first A, so that q, k and v are the same.
    prompt = []
    for t in range(4):
        S = S + k[t][:, None] * v[t]
        prompt.append(q[t] @ S)

    # Or as a prefix (JRT-RNN): an encoder sums all k_s v_s^T first, a decoder goes on; here both have the same k, v.
    encoder = q @ k.T                                                                # (t, s): every token sees all
    S = k.T @ v                                                                      # (d, e)
    prefix = []
    for t in range(4):
        S = S + k[t][:, None] * v[t]
        prefix.append(q[t] @ S)
    M = causal + encoder
    assert torch.equal(M @ v, torch.stack(prompt)) and torch.equal(M @ v, torch.stack(prefix))

    print("four tokens, A c B A: read once, M is causal; read twice, or as a prefix, each token sees all")
    print("         M, read once             M, read twice            M V, read twice = prefix")
    for token, row, both, y in zip("AcBA", causal.tolist(), M.tolist(), (M @ v).tolist(), strict=True):
        print(f"    {token} " + "".join(f"{x:6g}" for x in row) + " " + "".join(f"{x:6g}" for x in both) + "   "
              + "".join(f"{x:6g}" for x in y))
    print("    the first A has the weight 0 at c, which follows it, in the first reading, and "
          f"{M[0, 1]:g} in the second; S stays 2 x 2\n")
    return q, k, v, causal, M, M @ v

# ------------------------------------------------------------------------------------------ prefix linear attention
#
# q, k, and the encoder's k', after phi: (b, h, t, D); v, v': (b, h, t, e). `inside`: (b, 1, t, 1), 1 in the prefix,
# 0 after it. A state S = sum phi(k) [v, 1]^T: (b, h, D, e + 1), with the normaliser in its last column.


def with_one(v):
    """v with a column of ones: its sum is the normaliser."""
    return F.pad(v, (0, 1), value=1.0)


def normalised(o):
    return o[..., :-1] / o[..., -1:].clamp(min=1e-6)


def matrices(q, k, k_enc, inside):
    """The mixing matrix in two parts, for v and for v': causal, and dense over the prefix. Their rows sum to 1
    together (to 0 where all weights are 0)."""
    decoder, encoder = (q @ k.mT).tril(), q @ (k_enc * inside).mT                            # (b, h, t, s)
    total = (decoder.sum(dim=-1, keepdim=True) + encoder.sum(dim=-1, keepdim=True)).clamp(min=1e-6)
    return decoder / total, encoder / total


def parallel(q, k, v, k_enc, v_enc, inside, S):
    """The definition, and what came before it in S."""
    v, v_enc = with_one(v), with_one(v_enc)
    o = (q @ k.mT).tril() @ v + q @ (k_enc * inside).mT @ v_enc + q @ S                      # (b, h, t, e + 1)
    return normalised(o), S + k.mT @ v + (k_enc * inside).mT @ v_enc


def encode(k_enc, v_enc, inside):
    """The prefix in one pass: sum_{s<M} phi(k'_s) [v'_s, 1]^T"""
    return (k_enc * inside).mT @ with_one(v_enc)


def chunked(q, k, v, k_enc, v_enc, inside, S, chunk=64):
    """The encoder's state first; then causal linear attention goes on from it, in chunks."""
    S, o = S + encode(k_enc, v_enc, inside), []
    for i in range(0, q.shape[2], chunk):
        q_i, k_i, v_i = (x[:, :, i:i + chunk] for x in (q, k, with_one(v)))
        o.append(normalised((q_i @ k_i.mT).tril() @ v_i + q_i @ S))
        S = S + k_i.mT @ v_i
    return torch.cat(o, dim=2), S


def recurrent(q, k, v, k_enc, v_enc, inside, S):
    """Two loops, one after the other: just read twice."""
    v, v_enc, o = with_one(v), with_one(v_enc), []
    for s in range(q.shape[2]):
        S = S + inside[:, :, s, :, None] * k_enc[:, :, s, :, None] * v_enc[:, :, s, None, :]
    for t in range(q.shape[2]):
        S = S + k[:, :, t, :, None] * v[:, :, t, None, :]
        o.append(normalised(q[:, :, t, None] @ S))
    return torch.cat(o, dim=2), S


def triton(q, k, v, k_enc, v_enc, inside, S):
    """The same as two kernels, on a GPU: kernels/taylor_attention.py. q, k, k' come before phi, in any dtype."""
    from kernels.taylor_attention import state_of, taylor_attention
    return taylor_attention(q, k, v, S if inside is None else S + state_of(k_enc, v_enc, inside[..., 0]))


# -------------------------------------------------------------------------------------------------------- feature maps


def products(x):
    """The d (d + 1) / 2 different products x_i x_j, so weighted that products(x) . products(y) = (x . y)^2."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    pick = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)        # products with 0 and 1: faster than indexing
    return (x @ pick[:, i]) * (x @ pick[:, j]) * x.new_full(i.shape, 2 ** 0.5).masked_fill(i == j, 1.0)


def taylor(x):
    """phi(x) = [1, x / f^{1/4}, x x^T / sqrt(2 f)] [Ar24, eq. 4], each product once: 1 + f + f (f + 1) / 2 features.
    phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(f), which is at least 1/2: positive, but below s = -1 it
    rises again, so that keys that point away from the query count as well."""
    x = x * x.shape[-1] ** -0.25
    return torch.cat([torch.ones_like(x[..., :1]), x, products(x) * 0.5 ** 0.5], dim=-1)


def elu(x):
    """[K20, eq. 7]"""
    return F.elu(x) + 1


FEATURE_MAPS = {"taylor": taylor, "elu": elu, "relu": F.relu}


# -------------------------------------------------------------------------------------------------------------- mixers


def split_heads(x, n):
    """(b, t, n d) -> (b, n, t, d)"""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def join_heads(x):
    """(b, n, t, d) -> (b, t, n d)"""
    return x.transpose(1, 2).flatten(-2)


def head_dim(d_model, n_heads):
    if n_heads < 1 or d_model % n_heads:
        raise ValueError(f"d_model {d_model} is not a multiple of n_heads {n_heads}")
    return d_model // n_heads


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(d_in, d_out, bias=False):
    return nn.Linear(d_in, d_out, bias=bias)


def find_map(name, feature_dim):
    if name not in list(FEATURE_MAPS):
        raise ValueError(f"unknown feature_map {name!r}; there are {', '.join(FEATURE_MAPS)}")
    if feature_dim < 1:
        raise ValueError(f"feature_dim {feature_dim} is below 1")
    return FEATURE_MAPS[name]


class JRT(nn.Module):
    """Prefix linear attention, the mixer of JRT-RNN [Ar24b, eq. 3].

    prefix, an argument more of forward, prefill and matrix: how many of these tokens, from the first, are the prefix
    that all tokens see, a number or (b,) of them; 0, the default, leaves a causal mixer. A model hands it on from the
    batch, as `reads` says. The prefix lies within the first call: ValueError for one below 0 or longer than x, and for
    one behind a state, be it a fresh one. feature_map: a name in FEATURE_MAPS, of q and k of feature_dim numbers."""
    forms = ("chunked", "parallel", "recurrent", "triton")
    functions = {"chunked": chunked, "parallel": parallel, "recurrent": recurrent}
    causal = True                                                # with an empty prefix
    reads = ("prefix",)

    def __init__(self, d_model, n_heads=4, feature_dim=16, feature_map="taylor"):
        super().__init__()
        self.n_heads, self.e, self.phi = n_heads, head_dim(d_model, n_heads), find_map(feature_map, feature_dim)
        self.qk, self.v = linear(d_model, 2 * n_heads * feature_dim), linear(d_model, d_model)
        self.k_enc, self.v_enc = linear(d_model, n_heads * feature_dim), linear(d_model, d_model)
        self.out = linear(d_model, d_model)
        self.n_features = self.phi(torch.zeros(feature_dim)).numel()
        if self.phi is not taylor or feature_dim > 24:                               # not what the kernel is made for
            self.forms = type(self).forms[:-1]

    def inputs(self, x, prefix=0):
        """q, k, v, k', v', and `inside`, or None if the prefix is empty."""
        shortest = longest = length = prefix             # a number needs no tensor: to look at one is to wait for it
        if not isinstance(prefix, int):
            prefix = torch.as_tensor(prefix)
            if prefix.is_floating_point() or prefix.numel() not in (1, len(x)):
                raise ValueError(f"prefix must be a whole number, or {len(x)}, one a sequence; not {prefix.tolist()}")
            shortest, longest = int(prefix.min()), int(prefix.max())
            length = longest if prefix.numel() == 1 else prefix.to(x.device).view(-1, 1)
        if shortest < 0 or longest > x.shape[1]:
            n = shortest if shortest < 0 else longest
            raise ValueError(f"a prefix of {n} tokens does not fit {x.shape[1]} tokens: it must come whole")
        inside = (torch.arange(x.shape[1], device=x.device) < length).view(-1, x.shape[1])   # (1 or b, t)
        inside = inside[:, None, :, None] if longest else None
        q, k = split_heads(self.qk(x), 2 * self.n_heads).chunk(2, dim=1)
        k_enc, v, v_enc = (split_heads(f(x), self.n_heads) for f in (self.k_enc, self.v, self.v_enc))
        return q, k, v, k_enc, v_enc, inside

    def features(self, q, k, v, k_enc, v_enc, inside):
        """What the forms in PyTorch take: phi of q, k, k', in float32 or better."""
        with torch.autocast(q.device.type, enabled=False):
            q, k, v, k_enc, v_enc = (at_least_float32(y) for y in (q, k, v, k_enc, v_enc))
            inside = torch.zeros_like(v[:1, :1, :, :1]) if inside is None else inside.to(v.dtype)
            return self.phi(q), self.phi(k), v, self.phi(k_enc), v_enc, inside

    def run(self, x, S, form, prefix):
        inputs = self.inputs(x, prefix)
        with torch.autocast(x.device.type, enabled=False):
            o, S = triton(*inputs, S) if form == "triton" else self.functions[form](*self.features(*inputs), S)
        return self.out(join_heads(o.to(x.dtype))), S

    def forward(self, x, form=None, prefix=0):
        chosen = pick_form(self, x, form)
        if form is None and chosen == "chunked" and x.shape[1] <= (1024 if x.is_cuda else 256):
            chosen = "parallel"
        return self.run(x, self.init_state(len(x)), chosen, prefix)[0]

    def init_state(self, batch_size):
        return at_least_float32(self.v.weight).new_zeros(batch_size, self.n_heads, self.n_features, self.e + 1)

    def prefill(self, x, state=None, prefix=0):
        """With a prefix: the state to generate from is the encoder's sum plus the decoder's."""
        if state is not None and torch.as_tensor(prefix).max() > 0:
            raise ValueError("the prefix comes first: prefill with a state goes on causally, without a prefix")
        return self.run(x, self.init_state(len(x)) if state is None else state, pick_form(self, x), prefix)

    def step(self, x_t, state):
        y, state = self.run(x_t[:, None], state, "recurrent", 0)
        return y[:, 0], state

    def values(self, x):
        """Decoder and encoder values as twice as many heads: (b, 2h, s, e)"""
        return torch.cat([split_heads(f(x), self.n_heads) for f in (self.v, self.v_enc)], dim=1)

    def output(self, o, x):
        """The sum of what came from decoder and encoder values."""
        return self.out(join_heads(sum(o.chunk(2, dim=1))))

    def matrix(self, x, prefix=0):
        q, k, _, k_enc, _, inside = self.features(*self.inputs(x, prefix))
        return torch.cat(matrices(q, k, k_enc, inside), dim=1)                               # (b, 2h, t, s)

    def state_size(self, t):
        return self.n_heads * self.n_features * (self.e + 1)


class Bidirectional(nn.Module):
    """Linear attention that sees everything, y_t = phi(q_t) . sum_s phi(k_s) v_s^T / (the same with v = 1): what JRT's
    encoder would be alone. It knows the question while it reads the text, but can only fill in, not generate."""
    forms = ("chunked", "parallel")
    causal = False

    def __init__(self, d_model, n_heads=4, feature_dim=16, feature_map="taylor"):
        super().__init__()
        head_dim(d_model, n_heads)
        self.n_heads, self.phi = n_heads, find_map(feature_map, feature_dim)
        self.qk = linear(d_model, 2 * n_heads * feature_dim)
        self.v, self.out = linear(d_model, d_model), linear(d_model, d_model)

    def features(self, x):
        qk = split_heads(self.qk(x), 2 * self.n_heads)
        with torch.autocast(x.device.type, enabled=False):
            return self.phi(at_least_float32(qk)).chunk(2, dim=1)

    def forward(self, x, form=None):
        form, v = pick_form(self, x, form), self.values(x)
        if form == "parallel":
            return self.output(self.matrix(x).to(v.dtype) @ v, x)
        q, k = self.features(x)
        with torch.autocast(x.device.type, enabled=False):
            o = normalised(q @ (k.mT @ with_one(at_least_float32(v))))           # one sum, then a look-up for each
        return self.output(o.to(v.dtype), x)

    def values(self, x):
        return split_heads(self.v(x), self.n_heads)

    def output(self, o, x):
        return self.out(join_heads(o))

    def matrix(self, x):
        q, k = self.features(x)
        M = q @ k.mT
        return M / M.sum(dim=-1, keepdim=True).clamp(min=1e-6)

    def state_size(self, t):
        return 0      # it keeps nothing, because it cannot go on


# ------------------------------------------------------------------------------------------------ task and transforms


SIZES = ((4, 16), (8, 32), (16, 64), (4, 128), (16, 256), (4, 256))        # of the sets that the authors train on


def set_disjointness(batch_size=32, generator=None, first=16, second=64, vocab_size=2048, prompt=True, mixed=0.0,
                     progress=1.0):
    """[1] A [2] B [3] and then the one token that is in both sets [Ar24b, code]: A has `first` tokens, B
    has `second`, all different but for the answer, in random places. Loss on the answer alone. prompt: also
    return {"prefix": t}, all of it is prompt, for a mixer that reads a prefix; without it that mixer is causal, too.
    mixed: while progress, the share of the training that is done, is below it, each batch has one of SIZES instead, in
    either order, drawn at random (from large sets alone little is learned).
    Returns ids and targets, (b, first + second + 3) int64; -100 where nothing is asked."""
    for a, b in ((first, second), *(SIZES if mixed else ())):
        if min(a, b) < 1 or a + b + 4 > vocab_size:
            raise ValueError(f"set_disjointness needs sets of 1 token or more, and vocab_size above their sum + 3; not "
                             f"first {a}, second {b}, vocab_size {vocab_size}")
    if progress < mixed:
        which = torch.randint(2 * len(SIZES), (), generator=generator)
        first, second = SIZES[which // 2][::1 if which % 2 else -1]
    tokens = 4 + torch.rand(batch_size, vocab_size - 4, generator=generator).topk(first + second, dim=1).indices
    A, B = tokens.split([first, second], dim=1)
    answer = A.gather(1, torch.randint(first, (batch_size, 1), generator=generator))
    B = B.scatter(1, torch.randint(second, (batch_size, 1), generator=generator), answer)
    one, two, three = (torch.full((batch_size, 1), i) for i in (1, 2, 3))
    ids = torch.cat([one, A, two, B, three], dim=1)
    targets = torch.full_like(ids, -100)
    targets[:, -1:] = answer
    return ids, targets, {"prefix": ids.shape[1]} if prompt else {}


# A transform takes the batch of any task, (ids, targets, extras), to another one. It is given a generator in training
# and None when it is to prepare a test.


def jrt_prompt(batch, generator=None):
    """JRT-prompt [Ar24b, section 3.2]: the text, then the text again; the loss counts only in the second copy.
    For any causal model. ValueError where the first copy would give the answers away: where the next token is asked."""
    ids, targets, extras = batch
    asked = targets[:, :-1] != -100
    if asked.sum() >= 16 and (targets[:, :-1] == ids[:, 1:])[asked].all():
        raise ValueError("jrt_prompt shows the text twice: where the next token is asked, the answer would be in it")

    def twice(name, x):
        if name == "prefix":
            return x + ids.shape[1]
        return torch.cat([torch.zeros_like(x), x], dim=1) if torch.is_tensor(x) and x.ndim > 1 else x
    nothing = torch.full_like(targets, -100)
    return ids.repeat(1, 2), torch.cat([nothing, targets], dim=1), {name: twice(name, x) for name, x in extras.items()}


def prefix_lm(batch, generator=None, prefix=64, masked=0.15, weight=0.25, mask=0):
    """JRT-RNN's training loss [Ar24b, eq. 5, and code]: the first `prefix` tokens are seen without causality, so the
    next token is asked from the first one behind the prefix on (the first answer is the token after that one); plus
    `weight` times another mean, over prefix tokens that are hidden, a share `masked` of them, whose original is asked.
    `mask` is put in their place: 0 is the NUL byte, which no text has (with gpt2's tokenizer say mask=188). A test
    hides nothing."""
    ids, targets, extras = batch
    if not 0 <= masked < 1 or not 0 <= weight < math.inf:
        raise ValueError(f"prefix_lm needs 0 <= masked < 1 and a finite weight >= 0, not {masked} and {weight}")
    prefix, i = min(prefix, ids.shape[1]), torch.arange(ids.shape[1])
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    if generator is not None:
        hidden = (i < prefix) & (torch.rand(ids.shape, generator=generator) < masked)
    unasked = (i < min(prefix, ids.shape[1] - 1)) | hidden               # the last token at least is asked
    weights = extras.get("weights", (targets != -100).float()).masked_fill(unasked, 0.0)
    share = weight * weights.sum() / hidden.sum().clamp(min=1)           # so that it is a mean next to a mean
    return (ids.masked_fill(hidden, mask), torch.where(hidden, ids, targets.masked_fill(unasked, -100)),
            extras | {"weights": torch.where(hidden, share, weights), "prefix": prefix})


MIXERS = {"jrt": JRT, "bidirectional": Bidirectional}
TASKS = {"set_disjointness": set_disjointness}
TRANSFORMS = {"jrt_prompt": jrt_prompt, "prefix_lm": prefix_lm}
PATTERNS = {"jrt_layers": "short_conv,jrt,window,short_conv,short_conv"}         # Based's, with the prefix form


# -------------------------------------------------------------------------------------- the order effect, untrained


def order_effect(first, second, f=16, readings=1, trials=1000):
    """How often a Taylor state finds the token that two sets share. Tokens are random keys of f numbers and length
    sqrt(f). A is stored, S = sum_{a in A} phi(a); then that b of B is named for which phi(b) . S is largest. readings=2
    is an ideal second reader, who stores the smaller set, whichever it is, and looks up each token of the other.
    Returns the accuracy, and the same rescaled so that guessing is 0: (accuracy - 1/n) / (1 - 1/n), n candidates."""
    generator = torch.Generator().manual_seed(0)
    stored, asked = (first, second) if readings == 1 else (min(first, second), max(first, second))
    right = 0
    for start in range(0, trials, 200):
        n = min(200, trials - start)
        A, B = (torch.randn(n, size, f, generator=generator) for size in (stored, asked))
        A, B = (f ** 0.5 * F.normalize(tokens, dim=-1) for tokens in (A, B))
        B[:, 0] = A[:, 0]                                                        # the shared token
        S = taylor(A).sum(dim=1, keepdim=True)                                   # (n, 1, D)
        right += ((taylor(B) * S).sum(dim=-1).argmax(dim=-1) == 0).sum().item()
    accuracy = right / trials
    return accuracy, (accuracy - 1 / asked) / (1 - 1 / asked) if asked > 1 else accuracy


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


# ------------------------------------------------------------------------------------------------------ look and check


def timed(f, *args, **more):
    """f's result, and its time in milliseconds: the shortest of up to five calls within a quarter of a second."""
    times = []
    while not times or len(times) < 5 and sum(times) < 0.25:
        start = time.perf_counter()
        y = f(*args, **more)
        times.append(time.perf_counter() - start)
    return y, 1e3 * min(times)


def compare_forms(t=256, d_model=64):
    """Print the time of every form, and the largest difference between every two, for prefixes of several lengths."""
    torch.manual_seed(0)
    x = torch.randn(2, t, d_model, dtype=torch.float64)
    cases = [("jrt", {"prefix": n}) for n in (0, 1, t // 2, t)] + [("bidirectional", {})]
    print(f"{'mixer':15}{'prefix':8}{'form':11}{'time':>10}   largest difference from the forms above (t = {t})")
    with torch.no_grad():
        for name, reads in cases:
            mixer, done = MIXERS[name](d_model).double(), {}
            for form in (form for form in mixer.forms if form != "triton"):
                y, ms = timed(mixer, x, form, **reads)
                gaps = "   ".join(f"{other} {(y - z).abs().max():.0e}" for other, z in done.items())
                head = "" if done else f"{name:15}{reads.get('prefix', ''):<8}"
                print(f"{head:23}{form:11}{ms:>7.1f} ms   {gaps}", flush=True)
                done[form] = y


def print_order_effect():
    print("\nA set in a Taylor state (f = 16, nothing trained): which of the other is in it? Accuracy (above chance)")
    print(f"    {'|A|':>4} {'|B|':>4}   {'A read, then B':>18}   {'read twice':>18}")
    for sizes in ((4, 64), (64, 4), (4, 256), (256, 4)):
        results = [order_effect(*sizes, readings=readings) for readings in (1, 2)]
        columns = "".join(f"{accuracy:12.3f} ({above:.3f})" for accuracy, above in results)
        print(f"    {sizes[0]:4} {sizes[1]:4}{columns}", flush=True)


def plot(path, t=40, prefix=16):
    """Left: the mixing matrix, decoder and encoder part. Right: what a state of given size recalls, in both orders."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    torch.manual_seed(0)
    mixer, x = JRT(32, n_heads=1), torch.randn(1, t, 32)
    figure, axes = plt.subplots(1, 4, figsize=(19, 4.6), constrained_layout=True, width_ratios=(1, 1, 1, 1.25))
    with torch.no_grad():
        for layer in (mixer.qk, mixer.k_enc):
            layer.weight *= 2
        decoder, encoder = mixer.matrix(x, prefix)[0]
    both = decoder + encoder
    shown = {"decoder: causal, all tokens": decoder, f"encoder: dense, the prefix of {prefix}": encoder,
             "prefix linear attention: both": both}
    for ax, (title, M) in zip(axes, shown.items(), strict=False):
        ax.imshow(M, cmap="Reds", vmin=0, vmax=both.quantile(0.97))
        ax.axvline(prefix - 0.5, color="gray", lw=0.8, ls=":")
        ax.set(title=title, xlabel="source", xticks=[0, prefix, t - 1], yticks=[0, prefix, t - 1])
    axes[0].set_ylabel("target")
    dims = (4, 6, 8, 12, 16, 24)
    sizes = [1 + f + f * (f + 1) // 2 for f in dims]
    for sizes_, readings, style in (((4, 256), 1, "o-"), ((256, 4), 1, "o-"), ((256, 4), 2, "s:")):
        above = [order_effect(*sizes_, f, readings, trials=400)[1] for f in dims]
        label = f"set of {sizes_[0]}, then set of {sizes_[1]}{', read twice' if readings == 2 else ''}"
        axes[3].plot(sizes, above, style, label=label)
    axes[3].set_xscale("log")
    axes[3].set_xticks(sizes, [f"{n}\nf = {f}" for n, f in zip(sizes, dims, strict=True)])
    axes[3].minorticks_off()
    axes[3].set(xlabel="size of the state, features", ylabel="accuracy above chance", ylim=(0, 1.02),
                title="Which token is in both sets? Nothing trained")
    axes[3].legend(fontsize=9)
    axes[3].grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lesson 05: just read twice.")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the mixing matrix and the order effect instead")
    args = parser.parse_args()
    if args.plot:
        try:
            plot(args.plot)
        except (OSError, ValueError) as e:               # a folder that is not there, an ending that is no picture's
            parser.error(f"--plot {args.plot}: {e}")
    else:
        first()
        compare_forms()
        print_order_effect()

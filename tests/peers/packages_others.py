"""Other people's packages as referees, beside transformers: flash-linear-attention's naive functions, scipy,
s5-pytorch, performer-pytorch, linformer, lru-pytorch, gateloop-transformer, mambapy, sru, accelerated-scan. Where a
package has the core of a layer only, what stands around it is written out here."""
import contextlib
import functools

import numpy as np
import torch
import torch.nn.functional as F
from packages_transformers import call, mamba_weights
from papers_attention import H, R, heads, joined
from papers_linear import before, rms, short_filter
from papers_ssm import causal_filter, complex_of, continuous, glu_behind_gelu, lin
from referees import file_of, in_double, peer, referee


def time_first(*xs):
    """(b, h, t, ...) -> (b, t, h, ...)"""
    return [x.transpose(1, 2) for x in xs]


def naive(path, name):
    """A function of fla, computing in float64: its files for reading import nothing of its kernels."""
    def function(*args, **named):
        with in_double():
            y = getattr(file_of("fla", f"ops/{path}"), name)(*args, **named)
        return y[0] if isinstance(y, tuple) else y
    return function


def qkv(p, x):
    return (heads(x, p[f"{name}.weight"]) for name in "qkv")


# ---------------------------------------------------------------------------------------------- flash-linear-attention


def normalised(sum_of, v):
    """sum_of(v) / sum_of(1)"""
    return sum_of(v) / sum_of(torch.ones_like(v))


@referee("linear_attention", by="fla's naive linear attention", needs=("fla", "einops"))
def linear_attention(p, x):
    q, k, v = time_first(*qkv(p, x))
    recurrence = naive("linear_attn/naive", "naive_recurrent_linear_attn")
    o = normalised(lambda v: recurrence(F.elu(q) + 1, F.elu(k) + 1, v), v)
    return o.flatten(-2) @ p["out.weight"].mT


@referee("taylor", "taylor_full", by="fla's naive Based", needs=("fla", "einops"))
def taylor(p, x):
    q, k, v = qkv(p, x)
    sums = naive("based/naive", "naive_parallel_based")
    return joined(normalised(lambda v: sums(q, k, v, use_norm=False), v), p["out.weight"])


@referee("rebased", by="fla's naive ReBased", needs=("fla", "einops"))
def rebased(p, x):
    """Its normaliser adds 1e-6 where the mixer's is at least that: left to us, too."""
    def norm(y, which):
        y = F.layer_norm(y, y.shape[-1:], p[f"phi_{which}.norm.weight"], p[f"phi_{which}.norm.bias"])
        return y.unflatten(-1, (H, -1)).transpose(1, 2)
    q, k, v = norm(lin(x, p, "q"), "q"), norm(lin(x, p, "k"), "k"), heads(x, p["v.weight"])
    def sums(v):
        return naive("rebased/naive", "naive_parallel_rebased")(q, k, v, use_norm=False)
    return joined(sums(v) / sums(torch.ones_like(v)).clamp(min=1e-6), p["out.weight"])


@referee("retnet", by="fla's naive retention", needs=("fla", "einops"), tolerance=1e-7)
def retnet(p, x):
    """The mixer's decays come out of float32 logarithms."""
    q, k, v = qkv(p, x)
    o = rms(naive("retention/naive", "naive_retention")(R(q), R(k), v), eps=1e-6).transpose(1, 2).flatten(-2)
    return (o * F.silu(lin(x, p, "gate"))) @ p["out.weight"].mT


@referee("gla", by="fla's naive GLA", needs=("fla", "einops"))
def gla(p, x):
    q, k, v = time_first(*qkv(p, x))
    g = F.logsigmoid(lin(lin(x, p, "decay.0"), p, "decay.1")).unflatten(-1, (H, -1)) / 16
    o = rms(naive("gla/naive", "naive_recurrent_gla")(q, k, v, g), eps=1e-5) * p["norm"]
    return (o.flatten(-2) * F.silu(lin(x, p, "gate"))) @ p["out.weight"].mT


def delta_inputs(p, x, beta_max=1):
    c = x.shape[-1]
    mixed = short_filter(lin(x, p, "qkv"), p["conv.conv.weight"])
    q, k, v = (y.unflatten(-1, (H, -1)) for y in mixed.split([c, c, mixed.shape[-1] - 2 * c], dim=-1))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))        # as fla's l2norm
    return q, k, v, beta_max * torch.sigmoid(lin(x, p, "beta"))


@referee("deltanet", by="fla's naive delta rule", needs=("fla", "einops"))
def deltanet(p, x, beta_max=1):
    o = naive("delta_rule/naive", "delta_rule_recurrence")(*time_first(*delta_inputs(p, x, beta_max)))
    return joined(rms(o, eps=1e-5) * p["norm"], p["out.weight"])


@referee("deltanet", by="fla's naive delta rule, beta up to 2", needs=("fla", "einops"), options={"beta_max": 2.0})
def deltanet_up_to_2(p, x):
    return deltanet(p, x, beta_max=2)


@referee("gated_deltanet", by="fla's naive gated delta rule", needs=("fla", "einops"))
def gated_deltanet(p, x):
    g = -F.softplus(lin(x, p, "decay") + p["dt_bias"]) * p["A_log"].exp()
    o = naive("gated_delta_rule/naive", "naive_recurrent_gated_delta_rule")(*delta_inputs(p, x), g)
    return ((rms(o, eps=1e-5) * p["norm"]).flatten(-2) * F.silu(lin(x, p, "gate"))) @ p["out.weight"].mT


def kda(p, x, rule, **options):
    """options: beta_max for the layer, the others for the rule. The gate of the decay is fla's naive one, written out:
    it stands in a file with kernels."""
    inputs = delta_inputs(p, x, options.pop("beta_max", 1))
    dt = F.softplus(lin(lin(x, p, "decay.0"), p, "decay.1") + p["dt_bias"]).unflatten(-1, (H, -1))
    *qkv, beta = inputs
    o = naive("kda/naive", rule)(*qkv, -p["A_log"][:, None].exp() * dt, beta, **options)
    gate = torch.sigmoid(lin(lin(x, p, "gate.0"), p, "gate.1"))
    return ((rms(o, eps=1e-5) * p["norm"]).flatten(-2) * gate) @ p["out.weight"].mT


@referee("kda", by="fla's naive KDA", needs=("fla", "einops"))
def kda_recurrent(p, x):
    return kda(p, x, "naive_recurrent_kda")


@referee("kda", by="fla's naive KDA, beta up to 2", needs=("fla", "einops"), options={"beta_max": 2.0})
def kda_up_to_2(p, x):
    return kda(p, x, "naive_recurrent_kda", beta_max=2)


@referee("kda", by="fla's naive KDA in chunks", needs=("fla", "einops"))
def kda_chunks(p, x):
    return kda(p, x, "naive_chunk_kda", chunk_size=7 if x.shape[1] % 7 == 0 else 1)


@referee("rwkv7", by="fla's naive DPLR delta rule", needs=("fla", "einops"))
def rwkv7(p, x):
    """o with 1 / sqrt(d), which RWKV-7 does not have."""
    mixed = [x + (before(x) - x) * mix for mix in p["mixes"]]
    low = [lin(y, p, f"down.{i}") for i, y in enumerate((mixed[1], mixed[4], mixed[5]))]
    w = -0.6065306597126334 * torch.sigmoid(torch.tanh(low[0]) @ p["up.0.weight"].mT + p["up.0.bias"])
    a = torch.sigmoid(low[1] @ p["up.1.weight"].mT + p["up.1.bias"])
    g = torch.sigmoid(low[2]) @ p["up.2.weight"].mT
    r, k, v = (lin(y, p, name) for y, name in ((mixed[0], "q"), (mixed[2], "k"), (mixed[3], "v")))
    kk, k = k * p["remove"], k + k * (a - 1) * p["keep"]
    r, w, k, v, kk, a = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in (r, w, k, v, kk, a))
    kk = F.normalize(kk, dim=-1)
    rule = naive("generalized_delta_rule/dplr/naive", "dplr_recurrence")
    o = rule(r * r.shape[-1] ** 0.5, k, v, -kk, kk * a, w).transpose(1, 2).flatten(2)
    o = F.group_norm(o.flatten(0, 1), H, p["norm.weight"], p["norm.bias"], eps=1e-5 * r.shape[-1]).view_as(x)
    own = ((r * k * p["bonus"]).sum(-1, keepdim=True) * v).transpose(1, 2).flatten(2)
    return ((o + own) * g) @ p["out.weight"].mT


@referee("rwkv6", by="fla's naive RWKV-6", needs=("fla", "einops"))
def rwkv6(p, x):
    step = before(x) - x
    down = torch.tanh((x + step * p["mix_all"]) @ p["mix_down"]).unflatten(-1, (5, -1))
    w, k, v, r, g = (x + step * (p["mixes"][i] + down[:, :, i] @ p["mix_up"][i]) for i in range(5))
    w = -torch.exp(p["w"] + torch.tanh(w @ p["w_down"]) @ p["w_up"]).unflatten(-1, (H, -1)).transpose(1, 2)
    r, k, v = (heads(y, p[f"{name}.weight"]) for y, name in ((r, "r"), (k, "k"), (v, "v")))
    o = naive("rwkv6/recurrent_naive", "naive_recurrent_rwkv6")(r, k, v, w, p["bonus"][:, 0], scale=1.0)
    o = F.group_norm(o.transpose(1, 2).flatten(2).flatten(0, 1), H, p["norm.weight"], p["norm.bias"], eps=64e-5)
    return (o.view_as(x) * F.silu(lin(g, p, "gate"))) @ p["out.weight"].mT


@referee("mamba2", by="fla's naive simple GLA", needs=("fla", "einops"))
def mamba2(p, x):
    inner = len(p["norm"])
    xBC = short_filter(lin(x, p, "xbc"), p["conv.conv.weight"], p["conv.conv.bias"])
    N = (xBC.shape[-1] - inner) // 2
    v, B, C = xBC.split([inner, N, N], dim=-1)
    dt = F.softplus(lin(x, p, "dt") + p["dt_bias"])                                  # (b, t, h)
    q, k, v = C[:, :, None].expand(-1, -1, H, -1), B[:, :, None] * dt[..., None], v.unflatten(-1, (H, -1))
    o = naive("simple_gla/naive", "naive_recurrent_simple_gla")(q, k, v, -dt * p["A_log"].exp(), scale=1.0)
    o = (o + p["skip"][:, None] * v).flatten(-2) * F.silu(lin(x, p, "z"))
    return (rms(o, eps=1e-5) * p["norm"]) @ p["out.weight"].mT


@referee("qrnn", by="fla's naive HGRN", needs=("fla", "einops"))
def qrnn(p, x):
    z, f, o = (lin(x, p, "now") + lin(before(x), p, "before")).chunk(3, dim=-1)
    scan = naive("hgrn/naive", "naive_recurrent_hgrn")
    return lin(scan(torch.tanh(z) * torch.sigmoid(-f), F.logsigmoid(f)) * torch.sigmoid(o), p, "out")


# -------------------------------------------------------------------------------------------------------------- others


@referee("performer", by="performer-pytorch", needs="performer_pytorch")
def performer(p, x):
    """Without the 1e-4 that it adds to its features, which is larger than they are."""
    module = peer("performer_pytorch.performer_pytorch")
    q, k, v = qkv(p, x)
    q, k = (module.softmax_kernel(y, projection_matrix=p["phi_q.w"], is_query=y is q, eps=0.0) for y in (q, k))
    return joined(module.causal_linear_attention_noncuda(q, k, v, chunk_size=1, eps=0.0), p["out.weight"])


@referee("linformer", by="linformer", needs="linformer", options={"k": 8, "max_len": 50})
def linformer(p, x):
    layer = peer("linformer.linformer").LinformerSelfAttention(x.shape[-1], 50, k=8, heads=H)
    q, k, v = p["qkv.weight"].chunk(3)
    return call(layer, {"to_q.weight": q, "to_k.weight": k, "to_v.weight": v, "proj_k": p["E"].mT, "proj_v": p["F"].mT,
                        "to_out.weight": p["out.weight"], "to_out.bias": torch.zeros(len(q), dtype=x.dtype)}, x)


@referee("gateloop", by="gateloop-transformer's operator", needs="gateloop_transformer")
def gateloop(p, x):
    """The operator alone: its layer's |a| = sigmoid(|z|) is at least a half."""
    operator = peer("gateloop_transformer.gateloop_transformer").gate_loop_operator
    size, turn = lin(x, p, "decay").mT.flatten(0, 1).unflatten(0, (len(x), 2, -1)).unbind(1)
    a = torch.polar(torch.sigmoid(size), turn).flatten(0, 1)[..., None, None]        # (b c, t, 1, 1)
    q, k, v = (lin(x, p, name).mT.flatten(0, 1)[..., None] for name in "qkv")        # (b c, t, 1)
    y = operator(q, k, v, a)[..., 0].unflatten(0, (len(x), -1)).mT
    return lin(y * F.silu(lin(x, p, "gate")), p, "out")


@functools.cache
def mambapy_block(c):
    module = peer("mambapy.mamba")
    return module.MambaBlock(module.MambaConfig(d_model=c, n_layers=1, d_state=16))


class Step(torch.nn.Module):
    """Its step as a forward, so that it can be called with our parameters."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, cache):
        return self.block.step(x, cache)


def mambapy_cached(p, x, s):
    """Step by step from the first token on: it has no prefill."""
    weights = {f"block.{name}": w for name, w in mamba_weights(p).items()}
    cache, step, y = (None, torch.zeros(len(x), len(p["D"]), 3, dtype=x.dtype)), Step(mambapy_block(x.shape[-1])), []
    with in_double():
        for x_t in x.unbind(1):
            y_t, cache = torch.func.functional_call(step, weights, (x_t, cache))
            y.append(y_t)
    return torch.stack(y, dim=1)


@referee("mamba", by="mambapy", needs="mambapy", cached=mambapy_cached)
def mamba(p, x):
    return call(mambapy_block(x.shape[-1]), mamba_weights(p), x)


@functools.cache
def sru_ops():
    """sru compiles C++ as soon as it is imported; its function in Python needs none of that."""
    import torch.utils.cpp_extension as extension
    load, script = extension.load, torch.jit.script
    extension.load, torch.jit.script = (lambda *args, **named: None), (lambda f: f)
    try:
        return peer("sru.ops")
    finally:
        extension.load, torch.jit.script = load, script


@referee("sru", by="sru's recurrence in Python, v = 0", needs="sru")
def sru(p, x):
    t, b, c = x.shape[1], *x.shape[::2]
    f, r = (x @ p["f_r.weight"].mT).chunk(2, dim=-1)
    U = torch.stack([lin(x, p, "z"), f, r], dim=-1).transpose(0, 1).flatten(-2)      # (t, b, 3 c)
    zero = torch.zeros(2 * c, dtype=x.dtype)
    with in_double(), torch.enable_grad(), contextlib.redirect_stderr(None):
        h, _ = sru_ops().elementwise_recurrence_naive(U, x.transpose(0, 1).contiguous(), zero, p["f_r.bias"], None,
                                                      0, c, False, True, torch.tensor(3 ** 0.5))
    return lin(h.view(t, b, c).transpose(0, 1), p, "out")


@referee("rglru", by="accelerated-scan's reference", needs="accelerated_scan", shortest=2)
def rglru(p, x):
    u = causal_filter(lin(x, p, "x"), p["short.conv.weight"], p["short.conv.bias"])
    r, i = (torch.sigmoid(u @ torch.block_diag(*W) + b) for W, b in zip(p["W"], p["bias"], strict=True))
    a = torch.exp(-8 * r * F.softplus(p["Lambda"]))
    h = peer("accelerated_scan.ref").scan(a.mT.contiguous(), (torch.sqrt(1 - a * a) * i * u).mT.contiguous()).mT
    return lin(h * F.gelu(lin(x, p, "gate")), p, "out")


@functools.cache
def s5_module():
    module = peer("s5.s5_model")
    module.as_complex.__defaults__ = (torch.complex128,)
    return module


def s5_system(h, n, liquid=False):
    """The package's system of n states, h channels in and out, whose own initial values do not matter."""
    one = torch.eye(n, dtype=torch.complex64)
    return s5_module().S5SSM(one[0], one, one, h, n, 1e-3, 1e-1, bcInit="complex_normal", liquid=liquid)


@referee("s5", by="s5-pytorch", needs="s5")
def s5(p, x):
    system = s5_system(x.shape[-1], len(p["log_dt"]))
    Lambda = torch.complex(-p["log_A_real"].exp(), p["A_imag"])
    weights = {"Lambda": Lambda, "B": p["B"], "C": 2 * complex_of(p, "C"), "D": p["skip"], "log_step": p["log_dt"]}
    return glu_behind_gelu(p, torch.stack([call(system, weights, one) for one in x]))


@referee("liquid_s4", by="s5-pytorch, liquid", needs="s5", options={"cut": False})
def liquid_s4(p, x):
    """A system of its own for each channel."""
    A, _, step, C = continuous(p)
    system = s5_system(1, A.shape[-1], liquid=True)
    one = torch.stack([torch.ones_like(A.real), torch.zeros_like(A.real)], dim=-1)   # B

    def channel(i, u):
        weights = {"Lambda": A[i], "B": one[i, :, None], "C": 2 * C[i, None], "D": p["D"][i, None],
                   "log_step": step[i].log().expand(A.shape[-1])}
        return call(system, weights, u[:, None])[:, 0]
    return glu_behind_gelu(p, each_channel(channel, x))


@referee("gss", by="gated-state-spaces-pytorch", needs="gated_state_spaces_pytorch")
def gss(p, x):
    """Its DSS with its LayerNorm; its layer has a norm before, and a residual, which a model has around ours."""
    A, _, _, C = continuous(p)
    dss = peer("gated_state_spaces_pytorch.gss").DSS(dim=len(C), kernel_N=A.shape[-1], dss_kernel_lambda_imag_exp=False)
    weights = {"norm.weight": p["norm.weight"], "norm.bias": p["norm.bias"], "C_real": 2 * C.real, "C_imag": 2 * C.imag,
               "Lambda_real": (-A.real[0]).log(), "Lambda_imag": A.imag[0], "param_D": p["D"]}
    v = call(dss, weights, F.gelu(lin(x, p, "down")))
    return lin(lin(v, p, "up") * F.gelu(lin(x, p, "gate")), p, "out")


@referee("lru", by="lru-pytorch", needs="LRU_pytorch")
def lru(p, x):
    """Its B and C are matrices; ours are these, with a block of n states for each channel."""
    c, n = p["nu"].shape
    layer = peer("LRU_pytorch").LRU(c, c, c * n)
    apart = torch.eye(c, dtype=x.dtype)
    B = (complex_of(p, "B")[..., None] * apart[:, None]).flatten(0, 1)               # (c n, c)
    C = (complex_of(p, "C") * apart[..., None]).flatten(1)                           # (c, c n)
    weights = {"nu_log": p["nu"].flatten(), "theta_log": p["theta"].flatten(), "gamma_log": p["log_gamma"].flatten(),
               "B": B, "C": C, "D": torch.diag(p["D"])}
    return glu_behind_gelu(p, call(layer, weights, x))


# --------------------------------------------------------------------------------------------------------------- scipy


def simulated(A, B, C, D, dt, u, method):
    """x' = A x + B u, y = Re(C x) + D u, through scipy: cont2discrete, then dlsim. Complex systems as real ones of
    twice the size. u: (t,). The output is read behind each step's input: C (Ad x + Bd u)."""
    signal = peer("scipy.signal")
    A, B, C = (np.asarray(y.detach()) for y in (A, B, C))
    if np.iscomplexobj(A):
        A, B, C = np.block([[A.real, -A.imag], [A.imag, A.real]]), np.r_[B.real, B.imag], np.r_[C.real, -C.imag]
    zero = np.zeros((1, 1))
    Ad, Bd, *_ = signal.cont2discrete((A, B[:, None], C[None], zero), float(dt), method)
    _, y, _ = signal.dlsim((Ad, Bd, C[None] @ Ad, C[None] @ Bd + float(D), float(dt)), u.detach().numpy())
    return torch.from_numpy(y[:, 0])


def each_channel(system, u):
    """system(channel, u: (t,)) -> (t,), for all of u: (b, t, c)"""
    return torch.stack([torch.stack([system(i, one[:, i]) for i in range(u.shape[-1])], dim=-1) for one in u])


@referee("lssl", by="scipy's cont2discrete, bilinear, and dlsim", needs="scipy", gradients=False)
def lssl(p, u):
    c = u.shape[-1]
    dt, A, B = p["log_dt"].exp().expand(c), p["A"].expand(c, -1, -1), p["B"].expand(c, -1)
    y = each_channel(lambda i, u: simulated(A[i], B[i], p["C"][i], p["D"][i], dt[i], u, "bilinear"), u)
    return glu_behind_gelu(p, y)


@referee("s4", by="scipy's cont2discrete, bilinear, and dlsim", needs="scipy", gradients=False)
def s4(p, u):
    c, P = u.shape[-1], complex_of(p, "P")
    A = torch.diag_embed(torch.complex(-p["log_real"].exp(), p["imag"])) - P[..., :, None] * P.conj()[..., None, :]
    dt, A, B, C = p["log_dt"].exp().expand(c), A.expand(c, -1, -1), complex_of(p, "B").expand(c, -1), complex_of(p, "C")
    y = each_channel(lambda i, u: simulated(A[i], B[i], C[i], p["D"][i], dt[i], u, "bilinear"), u)
    return glu_behind_gelu(p, y)


@referee("s4d", "s4d_inv", "s4d_legs", by="scipy's cont2discrete, zero-order hold, and dlsim", needs="scipy",
         gradients=False, options={"n_state": 8})
def s4d(p, u):
    A, B, dt, C = continuous(p)
    y = each_channel(lambda i, u: simulated(torch.diag(A[i]), B[i], 2 * C[i], p["D"][i], dt[i, 0], u, "zoh"), u)
    return glu_behind_gelu(p, y)


@referee("h3", by="scipy's cont2discrete, bilinear, and dlsim", needs="scipy", gradients=False,
         options={"n_state": 8, "shift": 6})
def h3(p, u):
    q, k, v = lin(u, p, "qkv").chunk(3, dim=-1)
    A, B, dt, C = continuous(p)

    def channel(i, u):
        return simulated(torch.diag(A[i]), B[i], 2 * C[i], p["skip"][i], dt[i, 0], u, "bilinear")
    return lin(q * each_channel(channel, causal_filter(k, p["short.conv.weight"]) * v), p, "out")

"""Exercises: a function is taken out of a lesson, you write it, and the lesson's other forms say how far off yours is.

    python exercises.py                  what there is to write, and what you have done
    python exercises.py start NAME       writes my_exercises/NAME.py: the equation, the shapes, an empty body
    python exercises.py check NAME       puts yours in the function's place: equal, or the first number that differs
    python exercises.py solution NAME    the lesson's own lines (also: check NAME --solution)

Here stand names, equations, questions that help, and the calls that judge; docstrings, shapes and bodies are read from
the lessons. Yours is judged in a second copy of the lesson, against a copy that nobody touched: a mask that all forms
share would make them agree with each other on the wrong thing.
"""
import _thread
import argparse
import ast
import difflib
import hashlib
import inspect
import json
import os
import signal
import sys
import textwrap
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tests"))

from judge import (  # noqa: E402
    BadInput,
    Exercise,
    Wrong,
    copy_for,
    found,
    inputs_of,
    judge,
    line_of,
    listed,
    run,
    shown,
    solution,
    source,
    untouched,
    without_body,
)

FOLDER = ROOT / "my_exercises"


# ------------------------------------------------------------------------------------------------------- the start file


def start_text(exercise, function=None):
    """The file that a reader begins with; `function`: in place of the one without a body."""
    node, tree = found(exercise.file, exercise.function)[1], source(exercise.file)[1].body
    used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    imports = [ast.unparse(part) for part in tree if isinstance(part, (ast.Import, ast.ImportFrom)) and (
        used | {"torch", "triton", "tl"}) & {name.asname or name.name for name in part.names}]

    def paragraph(title, *texts):
        return ["", title, "", *(textwrap.indent(text, "    ") for text in texts)] if any(texts) else []
    return "\n".join([
        f'r"""{exercise.task[0].upper()}{exercise.task[1:]}', "", textwrap.indent(exercise.equation, "    "),
        *paragraph(f"What {exercise.file} says above this part:", "\n\n".join(comments_above(exercise))),
        *paragraph("A call in the check, with the shapes of what goes in and of what is wanted:", example(exercise)),
        *paragraph("The lesson's own lines use these, which are there for you without an import:", *(
            textwrap.fill(name, 110, subsequent_indent="    ") for name in names_to_use(exercise, used))),
        "", f"    python exercises.py check {exercise.name}", '"""', *sorted(imports), "", "",
        function or without_body(exercise), ""])


def names_to_use(exercise, used):
    """The functions and classes of the lesson that its own lines name, with what their docstrings say first."""
    node, parts = found(exercise.file, exercise.function)[1], source(exercise.file)[1].body
    owner = found(exercise.file, exercise.function.split(".")[0])[1]
    inside = {part.name: part for part in owner.body if isinstance(part, ast.FunctionDef)}
    names = [says(part) for part in parts if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and part.name in used
             and part not in (node, owner)]
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and ast.unparse(part.value) in ("self", owner.name):
            names.append(f"{ast.unparse(part.value)}.{says(inside[part.attr]) if part.attr in inside else part.attr}")
    return list(dict.fromkeys(names))


def comments_above(exercise):
    """The comments under the nearest headline above the function, and the last ones before it: the lesson's shapes."""
    lines, node = found(exercise.file, exercise.function.split(".")[0])
    above = "\n".join(lines[:node.lineno - 1]).split("\n# ---")[-1].split("\n")[1:]
    blocks = "\n".join(line.removeprefix("#").removeprefix(" ") if line.startswith("#") else "\0" for line in above)
    blocks = [block.strip("\n") for block in blocks.split("\0") if block.strip("\n")]
    return list(dict.fromkeys([*blocks[:1], *blocks[-1:]]))


def says(node):
    """name(arguments): the beginning of its docstring."""
    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
    return f"{node.name}{arguments}: {text}".removesuffix(": ")


def example(exercise):
    """The shapes of a call of the untouched function, as the check makes it."""
    calls, original = [], untouched(exercise)
    for name in exercise.function.split("."):
        original = getattr(original, name)

    def spy(*args, **more):
        y = original(*args, **more)
        given = inspect.signature(getattr(original, "fn", original)).bind(*args, **more).arguments
        lines = [f"{name:10} {shape(x)}" for name, x in given.items() if name not in ("self", "ctx")]
        calls.append("\n".join(textwrap.fill(line, 110, subsequent_indent=" " * 11)
                               for line in [*lines, f"returns    {shape(y)}"]))
        return y
    spy.fn = spy                                                 # as Triton's scan in the interpreter calls it
    run(exercise.judges[0][1], copy_for(exercise, lambda names: spy), inputs_of(exercise, 5, exercise.cases[0]))
    return calls[0]


def shape(x):
    """The shape and dtype of a tensor, or of all tensors in x; or x."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        sizes = tuple(getattr(n, "value", n) for n in x.shape)                       # of Triton's: constexpr
        return f"{sizes if sizes else 'one'} {x.dtype}".replace("torch.", "")
    if isinstance(x, (tuple, list)):
        parts = [shape(y) for y in x]
        if hasattr(x, "_fields"):
            parts = [f"{field}: {part}" for field, part in zip(x._fields, parts, strict=True)]
        return f"{type(x).__name__ if hasattr(x, '_fields') else ''}({', '.join(parts)})"
    if isinstance(x, dict):
        return "{" + ", ".join(f"{name!r}: {shape(y)}" for name, y in x.items()) + "}"
    return getattr(x, "__name__", None) or repr(x)


# -------------------------------------------------------------------------------------------------------- the exercises
#
# By lesson, the easiest first. A call in `judges` has the names of the lesson, of the inputs, and of tests/judge.py.


def first(judge, n):
    """The same judge, with its n-th call first."""
    axes, *calls = judge
    return axes, calls[n], *calls[:n], *calls[n + 1:]


def by_mixer(name, *forms):
    """A whole mixer, in its forms and step by step."""
    return "btw", *(f"mixer({name})(x[:, :20], {form!r})" for form in forms), f"stepwise(mixer({name}), x[:, :20])"


def by_term(term):
    return "bhte", *(f"{form}({term}, q, k, v, {term}.init(v, 2, 2, 4, 3))[0]" for form in (
        "recurrent", "chunked", "parallel"))


QKV, SYSTEM_4 = "q:bhtd k:bhtd v:bhte", "bilinear_dense(dense(Lambda, P), B, dt)"
ATTENTION = ("bhte", "chunked_attention(size * q, k, v, window, padded(k), chunk=16)",
             "parallel_attention(size * q, k, v, window, padded(k))",
             "recurrent_attention(size * q, k, v, Cache(*empty(k, v, window or 0)), padded(k), window)[0]")
WINDOWS = ({"window": None, "size": 1}, {"window": 3, "size": 1})
LINEAR = ("bhte bhde", "recurrent(q, k, v, g, state)", "parallel(q, k, v, g, state)",
          "chunked(q, k, v, g, state=state, chunk=16)")
DELTA = ("bhte bhde", "general_parallel(q, k, v, g, a, b, state)", "general_recurrent(q, k, v, g, a, b, state)",
         "general_chunked(q, k, v, g, a, b, state=state, chunk=16)")
RWKV4 = ("bct", "rwkv_recurrent(size * k, v, w, u, no_sums(k))[0]", "rwkv_scan(size * k, v, w, u, no_sums(k))[0]",
         "rwkv_parallel(size * k, v, w, u, None)[0]")
STATES = ("bctn", "loop(a, b, h)", "scan_from(a, b, h)", "chunks(a, b, h, chunk=16)")
FLASH = ("1hte", "flash_attention(3 * q, k, v, window)", "reference(3 * q, k, v, window)")
SOFTMAX = "m' = max(m, rowmax S),   l' = 2^(m - m') l + rowsum 2^(S - m'),   O' = 2^(m - m') O + 2^(S - m') V"

EXERCISES = [
    Exercise(
        "mask", "01_attention.py", "visible", "mask the future: which source may a target see?",
        "target i stands at position s - t + i, and sees source j if 0 <= s - t + i - j < window",
        "Does a token see itself, and the one after it? If s is above t, where does target 0 stand?", QKV,
        [("ts", "visible(t, t, window)"), ("ts", "visible(t, t + 3, window)"),
         ("b1ts", "visible(t, t, window, padded(q))"),
         ("b1ts", "visible(t, t, window, padded(q), None, slice(t // 2, t), slice(0, t // 2 + 1))"), ATTENTION],
        cases=WINDOWS),
    Exercise(
        "rope", "01_attention.py", "rope", "rotary positions: turn pairs by an angle that grows with the position",
        "(x_i, x_{i + d/2}) -> (x_i cos - x_{i + d/2} sin, x_{i + d/2} cos + x_i sin) of the angle p base^(-2i/d)",
        "Which number is the partner of x_i, and which of the two has the minus? What is p of the first token?",
        "q:bhtd x:btw", [("bhtd", "rope(q, start=3)"), by_mixer("Attention", "parallel")]),
    Exercise(
        "ring", "01_attention.py", "overwrite", "the KV cache of a sliding window: a ring of w slots",
        "the key of position p goes to slot p mod w",
        "At which position does the first new token stand? If there are more of them than slots, which ones stay?", QKV,
        [("bhsd bhse bs -", "overwrite(Cache(*empty(k, v, window)), k, v, padded(k), window)"),
         ("bhsd bhse bs -", "overwrite(overwrite(Cache(*empty(k, v, window)), k[:, :, :3], v[:, :, :3], "
          "padded(k)[:, :3], window), k, v, padded(k), window)"), first(ATTENTION, 2)],
        cases=({"window": 4, "size": 1},)),
    Exercise(
        "rescaling", "01_attention.py", "FlashAttention.forward", "FlashAttention: one tile of scores more", SOFTMAX,
        "In units of which maximum are l and o so far, and in units of which must they be for the sum?", QKV,
        [ATTENTION], "The first tile is right: is all that was summed before it brought to the new maximum?",
        cases=(*WINDOWS, {"window": None, "size": 1000}), loop_only=True),
    Exercise(
        "recurrent", "02_linear_attention.py", "recurrent", "linear attention, token by token",
        "S_t = e^{g_t} * S_{t-1} + k_t v_t^T,   o_t = q_t^T S_t",
        "What decays at token t, the old state or the new key as well? Is S read before or after it is written?",
        f"{QKV} g:bhtd- state:bhde", [LINEAR], cases=({}, {"g": None}, {"state": None})),
    Exercise(
        "segment_sums", "02_linear_attention.py", "segment_sums", "the decays between a source and a target",
        "G_ts = g_{s+1} + ... + g_t for s < t, 0 elsewhere",
        "Does the source's own decay act on what it writes? Does the target's?", f"{QKV} g:bhtd- state:bhde",
        [("bhtsd", "segment_sums(g)"), first(LINEAR, 1)]),
    Exercise(
        "chunks", "02_linear_attention.py", "chunked", "the chunked form: what crosses from one chunk to the next?",
        "o, S = block(tokens of a chunk, S), chunk after chunk",
        "Which state does the first chunk begin with? Is every input cut at the same places?",
        f"{QKV} g:bht1- state:bhde", [first(LINEAR, 2)], "The first chunk is right: what crosses to the next one?",
        cases=({}, {"g": None}, {"state": None})),
    Exercise(
        "products", "02_linear_attention.py", "products", "Taylor's square as features, each product once",
        "(x . y)^2 = sum_{i <= j} (w_ij x_i x_j) (w_ij y_i y_j)",
        "x_1 x_2 and x_2 x_1 both stand in the square. By what must one of them be multiplied, in x and in y?",
        "x:bhtd y:bhsd", [("bhtd", "0 * products(x)"), ("bhts", "products(x) @ products(y).mT", "(x @ y.mT) ** 2")]),
    Exercise(
        "bonus", "02_linear_attention.py", "with_bonus", "RWKV reads before it writes: a bonus for the token itself",
        "o_t = q_t^T (S_{t-1} + diag(u) k_t v_t^T),   S_t = e^{g_t} * S_{t-1} + k_t v_t^T",
        "`form` reads after it writes. If it finds token t - 1 in the place of token t, what does it read? Which token "
        "is missing from the state at the end? And has g a time axis, or is it the same at all times?",
        f"{QKV} g:bhtd- bonus:1h1d state:bhde keys:bct values:bct w:c- u:c",
        [("bhte bhde", *(f"with_bonus({form}, q, k, v, g, bonus, state)" for form in ("recurrent", "parallel"))),
         ("bhte bhde", "with_bonus(recurrent, q, k, v, g[:, :, :1], bonus, state)"),
         ("bct", "rwkv_ratio(keys, values, w, u)", "rwkv_parallel(keys, values, w, u, None)[0]")],
        cases=({}, {"state": None})),
    Exercise(
        "rwkv_ratio", "02_linear_attention.py", "rwkv_read", "RWKV-4's average, however large k is",
        "(e^m p + e^{u + k} v) / (e^m q + e^{u + k}), with no exponent above 0",
        "A fraction stays the same if both of its parts are multiplied by e^{-x}. Which x leaves no exponent above 0?",
        "sum_v:bc sum_1:bc+ top:bc key:bc value:bc k:bct v:bct w:c- u:c",
        [("bc", "rwkv_read(sum_v, sum_1, size * top, size * key, value, u)"), RWKV4],
        cases=({"size": 1}, {"size": 500})),
    Exercise(
        "delta", "02_linear_attention.py", "read_before", "the delta rule: what a key finds in the state before it",
        "M_ts = sum_d b_td k_sd e^{g_{s+1} + ... + g_{t-1}} for s < t, 0 elsewhere; G_ts = g_{s+1} + ... + g_t",
        "Which row of G ends at t - 1? What does the first token find?",
        "q:bhtd k:bhtd| a:bhtd| b:bhtd| v:bhte g:bht1- state:bhde",
        [("bhts", "read_before(b, k, segment_sums(g))"), DELTA]),
    Exercise(
        "loop", "03_ssm.py", "loop", "a state space, token by token", "h_t = a_t h_{t-1} + b_t",
        "Does the state that comes in decay before the first token is added to it?", "x:btw a:bctn+ b:bctn h:bcn",
        [STATES, by_mixer("S4D, n_state=4", "recurrent", "conv")], cases=({}, {"h": None})),
    Exercise(
        "scan", "03_ssm.py", "scan", "the scan: what two steps are together, in log t rounds",
        "(a_1, b_1), then (a_2, b_2): (a_1 a_2, a_2 b_1 + b_2). Rounds join what is n = 1, 2, 4, ... apart",
        "h -> a_1 h + b_1 and then h -> a_2 h + b_2: what is it in one step? What stands before the first token?",
        "a:bctn+ b:bctn h:bcn", [("bctn", "scan(a, b)", "loop(a, b)"), first(STATES, 1)],
        "The first tokens are right: how many rounds reach from the last token to the first?"),
    Exercise(
        "padding", "03_ssm.py", "fft_conv", "a convolution by FFT: what must not wrap around",
        "y_t = sum_{s <= t} K_{t-s} u_s; a product of two spectra of length n wraps around after n",
        "How long is the convolution of two sequences of length t before it is cut off?", "u:bct K:ct",
        [("bct", "fft_conv(u, K)", "(toeplitz(K) @ u[..., None])[..., 0]")]),
    Exercise(
        "zoh", "03_ssm.py", "zoh", "a continuous system in steps: zero-order hold",
        "log a = dt A,   b = (e^{dt A} - 1) / A = dt (1 + dt A / 2 + ...)",
        "What is the integral of e^{A s} for s from 0 to dt? What is left of e^z - 1 in floating point for a small z?",
        "A:cn< dt:c1+ x:btw", [
            ("cn cn", "zoh(A, size * dt)"), ("cn cn", "decay(*zoh(A, size * dt), size * dt)",
                                "twice(*zoh(A, size * dt / 2), size * dt)"), by_mixer("S4D, n_state=4", "conv")],
        cases=({"size": 1}, {"size": 1e-7}, {"size": 1e-12})),
    Exercise(
        "bilinear", "03_ssm.py", "bilinear", "a continuous system in steps: the trapezoidal rule",
        "a = (1 + dt A / 2) / (1 - dt A / 2), of which log a is returned;   b = dt / (1 - dt A / 2)",
        "Half of the step is taken from the old state, half from the new one: on which side does each stand?",
        "A:n< dt:c+ x:btw", [("cn cn", "decay(*bilinear(A, dt[:, None]))",
                              "diagonal(*bilinear_dense(A.diag(), torch.ones_like(A), dt))"),
                             by_mixer("H3, n_state=4, shift=4", "conv", "recurrent")]),
    Exercise(
        "kernel", "03_ssm.py", "kernel_of", "the convolution kernel of a system that is the same at all times",
        "K_l = sum_n q_n e^{g_n l} k_n for l = 0, ..., t - 1",
        "How often does a act on an input that is read in the same step, and how often one step later?",
        "g:1c1n< k:1c1n~ q:1c1n~ u:bct h:bcn~",
        [("ct", "kernel_of(g, k, q, t)",
          "through_states(loop, torch.eye(1, t, dtype=g.dtype).expand(1, 3, t), g, k, q, None)[0][0]"),
         ("bct bcn", "convolved(u, g, k, q, h)", "through_states(loop, u, g, k, q, h)")],
        "The first lags are right: do the powers of a reach up to t - 1?"),
    Exercise(
        "gates", "03_ssm.py", "Mamba.gates", "selection: a, b and C made of the token",
        "g = dt_t A with A = -e^{self.log_A},   k = dt_t B_t,   q = C_t: each broadcasts to (b, c, t, n).\n"
        "The signals s hold what the token says: dt is s.g, B is s.k, C is s.q; and A is (c, n)",
        "B and C lie as (b, n, t): where do time and state stand in (b, c, t, n)? Which of the three has dt?",
        "u:bWt dt:bWt+ B:bnt C:bnt x:btw",
        [("bWtn bWtn bWtn", "wide(mixer(Mamba, n_state=4).gates(Signals(u, dt, B, C)), dt)"),
         by_mixer("Mamba, n_state=4", "recurrent", "chunked", "scan", "parallel")]),
    Exercise(
        "hippo", "03_ssm.py", "hippo_legs", "HiPPO's matrix: a state that remembers the whole past",
        "A_nk = -sqrt((2n + 1) (2k + 1)) for n > k, -(n + 1) for n = k, 0 for n < k;   B_n = sqrt(2n + 1)",
        "Which triangle is it, and what stands on the diagonal? What is the sign?", "u:t",
        [("nn n", "hippo_legs(t)"), ("t", "reconstruct(hippo_online(u.detach(), 5), t)")], lengths=(1, 2, 5, 12)),
    Exercise(
        "woodbury", "03_ssm.py", "by_woodbury", "S4's kernel: the Woodbury step, division in place of an inverse",
        "K(w) = 2 / (1 + w) C~ (r - A)^{-1} B with A = diag(Lambda) - P P^*, r = 2 / dt (1 - w) / (1 + w),\n"
        "(r - A)^{-1} = R - R P (1 + P^* R P)^{-1} P^* R with R = (r - Lambda)^{-1}, C~ = C (1 - a^t)",
        "Which of the four sums have P^*? How many factors 1 + w has each term if (1 + w) R is taken for R?",
        "Lambda:n< P:n~ B:n~ C:cn~ dt:c+",
        [("ct", f"by_woodbury(Lambda, P, B, dt, {SYSTEM_4}[0], C, roots_of_unity(t, B))",
          f"by_resolvent(dense(Lambda, P), B, dt, {SYSTEM_4}[0], C, roots_of_unity(t, B))",
          *(f"{find}(*{SYSTEM_4}, C, roots_of_unity(t, B))" for find in ("by_geometric_sum", "by_powers"))),
         ("ct", f"by_woodbury(Lambda, P, B, dt, {SYSTEM_4}[0], C, roots_of_unity(t + 1, B))",
          f"by_powers(*{SYSTEM_4}, C, roots_of_unity(t + 1, B))")], lengths=(1, 3, 15, 17, 65)),
    Exercise(
        "gate", "04_based.py", "BaseConv.output", "BaseConv: a gate times a convolution",
        "y = (u W + b_1) * (h conv u + b_2), where o is h conv u: (b, c, t, 1), and self.gate has W and b_1",
        "Where does time stand in o, and where in x? Which bias belongs to which factor?", "x:btw",
        [by_mixer("BaseConv, taps=5", "conv", "parallel")]),
    Exercise(
        "window", "04_based.py", "Window.matrix", "softmax over the last w tokens",
        "M_ts = softmax_s(q_t . k_s / sqrt(d)) over those s that stand 0 to w - 1 tokens back",
        "How far back is the token itself, and how far the oldest of w? Where does target 0 stand?", QKV,
        [("bhts", "Window(4).matrix(q[:, :, t // 2:], k)"), first(by_term("Window(4)"), 2)]),
    Exercise(
        "lookup", "04_based.py", "Taylor.lookup", "Based: look up in the state of Taylor features",
        "o = phi(q) S / (phi(q) z), where z = sum phi(k) is the last column of S",
        "How many columns has phi(q) S, and what is the last one for?", QKV,
        [("bhte", "Taylor().lookup(q, Taylor().write(Taylor().init(v, 2, 2, 4, 3), k, v))"), by_term("Taylor()")]),
    Exercise(
        "encode", "05_jrt.py", "encode", "JRT's prefix state: the prefix in one pass",
        "S = sum_{s < M} phi(k'_s) [v'_s, 1]^T for a prefix of M tokens",
        "Which tokens are in the sum, and which are not? What is the last column?",
        "q:bhtd+ k:bhtd+ v:bhte k2:bhtd+ v2:bhte",
        [("bhde", "encode(k2, v2, prefix(k))"), ("bhte bhde", *(
            f"{form}(q, k, v, k2, v2, prefix(k), torch.zeros(2, 2, 4, 4, dtype=k.dtype){chunk})" for form, chunk in (
                ("chunked", ", chunk=16"), ("parallel", ""), ("recurrent", ""))))]),
    Exercise(
        "jrt_prompt", "05_jrt.py", "jrt_prompt", "JRT-prompt: show any model the text twice",
        "ids ids; nothing, then what was asked; what is more comes twice as well, with 0 in the first copy",
        "What is asked in the first copy, and with which weights? How long is a prefix now?", "x:bt",
        [("bt bt", "jrt_prompt(batch(x))[:2]"),
         ("bt b", "[jrt_prompt(batch(x))[2][name] for name in ('weights', 'prefix')]"), ("-", "refuses(jrt_prompt)")]),
    Exercise(
        "triton_mask", "kernels/flash_attention.py", "hidden", "a mask: what these targets may not see",
        "source j is hidden from target i if j > i, or j <= i - window",
        "What is the shape of a column compared with a row? Is the token itself hidden?", "q:1htd k:1htd v:1hte",
        [FLASH], cases=({"window": None}, {"window": 3}), lengths=(1, 40)),
    Exercise(
        "triton_combine", "kernels/scan.py", "after", "the scan's combine",
        "h -> a_1 h + b_1, then h -> a_2 h + b_2, is h -> a h + b: returns a, b",
        "Put a_1 h + b_1 into a_2 h + b_2: what does b_1 get?", "a:1ct+ b:1ct h:1c",
        [("1ct 1c", "scan(a, b, h)", "reference(a, b, h)")],
        "The first tile is right: is the product a right, with which the state before a tile comes in?",
        lengths=(1, 2, 15, 16, 17, 40), settings={"tile": lambda t, is_complex: (16, 1)}),
    Exercise(
        "triton_load", "kernels/tiles.py", "load", "a tile of a matrix, and nothing beside it",
        "x_ij = x[rows_i stride + cols_j]; 0 in rows from `end` on, and in columns from WIDTH on",
        "Which rows and columns of the tile are outside of the matrix, and what do they get?", "q:1htD k:1htD v:1hte",
        [("1hte 1hDe", "linear_attention(q, k, v)", "reference(q, k, v)")], lengths=(1, 2, 40),
        used_in="kernels/linear_attention.py"),
    Exercise(
        "triton_halving", "kernels/gla.py", "at_level", "gated linear attention: a chunk that is cut in two",
        "Z = q 2^{G - G_r} behind a cut, k 2^{G_r - G} before it; blocks of 2h = 2^{level + 1} rows are cut in two, "
        "and r is the row before the cut. Returns Z, 2^{...}, the rows behind (C, 1), and the pairs it parts (C, C)",
        "Row i is in block i // h. Which of these lie behind a cut, which two are parted, and which row is r?",
        "q:1htd k:1htd v:1hte g:1htd- state:1hde",
        [("1hte 1hde", "gla(q, k, v, g, state)", "reference(q, k, v, g, state)")],
        "Tokens 0 and 1 are parted at level 0: which of them is r?", lengths=(1, 2, 40)),
    Exercise(
        "triton_blocks", "kernels/flash_attention.py", "sources_of", "FlashAttention: which sources a block looks at",
        "three stretches of sources for the targets first to last: on the window's edge, seen by all of them, on the "
        "diagonal; returns where each begins, in multiples of BN, and where the last one ends; S sources in all",
        "The first target sees from first - window + 1 to itself: from where to where does nobody need a mask?",
        "q:1htd k:1htd v:1hte", [FLASH],
        "Which sources does the last target of a block see, which the first one?",
        cases=({"window": None}, {"window": 3}), lengths=(1, 40, 130)),
]
NAMES = {exercise.name: exercise for exercise in EXERCISES}


# --------------------------------------------------------------------------------------------------------- command line


def done():
    """{name: fingerprint of the file that was equal}"""
    try:
        return json.loads((FOLDER / "done.json").read_text())
    except (OSError, ValueError):
        return {}


def fingerprint(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def state(exercise):
    mine = fingerprint(FOLDER / f"{exercise.name}.py")
    return "" if mine is None else "done" if done().get(exercise.name) == mine else "begun"


def go_on():
    left = [exercise.name for exercise in EXERCISES if state(exercise) != "done"]
    command = "check" if left and state(NAMES[left[0]]) == "begun" else "start"
    return f"To go on: python exercises.py {command} {left[0]}" if left else "That was the last one!"


def show_list():
    place = None
    for exercise in EXERCISES:
        if place != (place := exercise.file.split("/")[0]):
            print(f"\n{place}{', in Triton, whose interpreter needs no GPU' if place == 'kernels' else ''}")
        print(f"    {exercise.name:18}{state(exercise):7}{exercise.task}")
    print(f"\n{sum(state(e) == 'done' for e in EXERCISES)} of {len(EXERCISES)} are done. {go_on()}")


def start(exercise):
    path = FOLDER / f"{exercise.name}.py"
    if path.exists():
        raise BadInput(f"{shown(path)} is there already, and stays as it is: python exercises.py check {exercise.name}")
    text = start_text(exercise)
    FOLDER.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{shown(path)} is written. Fill it in, then: python exercises.py check {exercise.name}")


def check(exercise, file, limit):
    """Prints what the judge says. Is the reader's function equal?"""
    path, expired = Path(file) if file else FOLDER / f"{exercise.name}.py", []
    if not path.exists():
        begin = "" if file else f": python exercises.py start {exercise.name} writes it"
        raise BadInput(f"{shown(path)} does not exist{begin}")
    watch = threading.Timer(limit, lambda: (expired.append(True), _thread.interrupt_main()))
    watch.daemon = True
    before = signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background ignores interrupts
    watch.start()
    try:
        largest = judge(exercise, path)
    except Wrong as error:
        print(f"{exercise.name}: {error}")
        return False
    except KeyboardInterrupt as error:
        if not expired:
            raise
        line = line_of(error, path)
        where = f", in line {line.lineno}, `{line.line}`" if line else ""
        print(f"{exercise.name}: stopped after {limit:g} seconds{where}. Does it end? (--limit allows more.)")
        return False
    finally:
        watch.cancel()
        signal.signal(signal.SIGINT, before)
    print(f"{exercise.name}: equal, gradients too, with t = {listed(exercise.lengths)}, in")
    for call in dict.fromkeys(call for _, *calls in exercise.judges for call in calls):
        print(f"    {call}")
    print(f"The largest difference from a lesson that nobody touched is {largest:.1e}.")
    if not file:
        (FOLDER / "done.json").write_text(json.dumps(done() | {exercise.name: fingerprint(path)}, indent=1))
    print(go_on())
    return True


def nearest(name, names):
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def chosen(args):
    """The command and the exercise that are meant."""
    commands, functions = ("list", "start", "check", "solution"), {e.function.split(".")[-1]: e.name for e in EXERCISES}
    if args.command in NAMES and args.solution:
        args.command, args.name = "solution", args.command
    if args.command not in commands:
        near = f"; did you mean start {args.command}?" if args.command in NAMES else nearest(args.command, commands)
        raise BadInput(f"{args.command!r} is no command: there are {listed(commands)}{near}")
    if args.command == "list":
        return "list", None
    if args.name is None:
        raise BadInput(f"{args.command} which exercise? python exercises.py lists them")
    if args.name not in NAMES:
        near = f"; did you mean {functions[args.name]}?" if args.name in functions else nearest(args.name, NAMES)
        raise BadInput(f"{args.name!r} is no exercise: python exercises.py lists them{near}")
    if not 0 < args.limit < float("inf"):
        raise BadInput(f"--limit {args.limit:g}: a check needs some seconds")
    return "solution" if args.solution else args.command, NAMES[args.name]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (python exercises.py --help)")


def main(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="list", help="list, start, check or solution")
    parser.add_argument("name", nargs="?", help="of an exercise")
    parser.add_argument("--file", help="check this file in place of my_exercises/NAME.py")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a check is stopped (60)")
    parser.add_argument("--solution", action="store_true", help="show the lesson's lines")
    try:
        args = parser.parse_args(arguments)
        command, exercise = chosen(args)
        if command == "list":
            show_list()
        elif command == "start":
            start(exercise)
        elif command == "solution":
            print(solution(exercise))
        elif not check(exercise, args.file, args.limit):
            sys.exit(1)
    except BadInput as error:
        print(f"exercises.py: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                                      # whoever read the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()

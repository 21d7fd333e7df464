"""The exercises: the lesson's own function passes each of them, three plausible mistakes do not, and are told where."""
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import exercises
from exercises import EXERCISES, NAMES, Wrong, judge, main, solution, start_text

ROOT = Path(exercises.__file__).parent
INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
BY_NAME = [pytest.param(e.name, marks=pytest.mark.skipif(
    e.file.startswith("kernels/") and not INTERPRETED, reason="run by Triton's interpreter")) for e in EXERCISES]

# Three mistakes for each exercise: what the lesson's lines say, and what somebody might write there.
MISTAKES = {
    "mask": [("distance >= 0 if", "distance > 0 if"), ("distance < window)", "distance <= window)"),
             ("torch.arange(s - t, s,", "torch.arange(0, t,")],
    "rope": [("[-sin, sin]", "[sin, -sin]"), ("x.roll(d // 2, -1)", "x.roll(1, -1)"), ("(start + ", "(")],
    "ring": [("(length - n + ", "(length + "), ("cache.length + k.shape[2], min", "k.shape[2], min"),
             ("k[:, :, -n:]", "k[:, :, :n]")],
    "rescaling": [("shrink * l[:, :, rows]", "l[:, :, rows]"), ("shrink * o[:, :, rows]", "o[:, :, rows]"),
                  ("m[:, :, rows] = m_new", "m[:, :, rows] = m_new * 0")],
    "recurrent": [("g[:, :, t, :, None].exp() * S", "S"), ("g[:, :, t, :, None]", "g[:, :, t - 1, :, None]"),
                  (" if state is None else state", "")],
    "segment_sums": [("tril(-1)", "tril(0)"), ("g.unsqueeze(-2)", "g.unsqueeze(-3)"), ("dim=-3", "dim=-2")],
    "chunks": [("o_i, state = block", "o_i, _ = block"), ("state=state)\n", "state=None if i else state)\n"),
               ("for x in (q, k, v, g, *more))", "for x in (q, k, v, g.roll(1, 2), *more))")],
    "products": [("2 ** 0.5", "2.0"), ("masked_fill(i == j, 1.0)", "masked_fill(i == j, 2.0)"),
                 (" * x.new_full", " + x.new_full")],
    "bonus": [("for x in (k, v, g)), state", "for x in (k, v)), g, state"), ("(q * u * k)", "(q * k)"),
              ("S = g[:, :, -1, :, None].exp() * S", "S = S")],
    "rwkv_ratio": [("own * v", "v"), ("torch.maximum(m, u + k)", "torch.zeros_like(m)"),
                   ("old * q + own", "q + own")],
    "delta": [("roll(1", "roll(0"), ("tril(-1)", "tril(0)"), ("weights(b, k", "weights(k, b")],
    "loop": [("if h is None else h", "if True else h"), ("apply(a, b,", "apply(a, b.roll(1, 2),"),
             ("apply(a, b,", "apply(a, a * b,")],
    "scan": [("b + a * F.pad(b, pad)", "b + F.pad(a * b, pad)"), ("n *= 2", "n += 2"),
             ("while n < b", "while n < 16 and n < b")],
    "padding": [("n = 2 * u.shape[-1]", "n = u.shape[-1]"), ("[..., :u.shape[-1]]", "[..., -u.shape[-1]:]"),
                ("U * V", "U * V.conj()")],
    "zoh": [("dt * quotient", "quotient"), ("dt * quotient", "(z.exp() - 1) / A"), ("1 + z / 2, ", "1 + z, ")],
    "bilinear": [("(1 + dt * A / 2) /", "(1 + dt * A) /"), ("dt / (1 - dt * A / 2)", "dt / (1 + dt * A / 2)"),
                 ("dt / (1 - dt * A / 2)", "dt / (1 - dt * A)")],
    "kernel": [("powers(g, m)", "powers(g, m).flip(-1)"), ("(q * k)", "(q * k.conj())"),
               ("-(-t // m), m)", "-(-t // m), m + 1)")],
    "gates": [("A = -at", "A = at"), ("dt[..., None] * B.mT[:, None]", "B.mT[:, None]"),
              ("* A[:, None], ", "* A[:, None] / 2, ")],
    "hippo": [("tril(-1)", "triu(1)"), ("torch.diag(q + 1)", "torch.diag(q)"), ("A = -(root", "A = (root")],
    "woodbury": [("P.conj() * x", "P * x"), ("(1 + (1 + w) * PP)", "(1 + PP)"), ("2 * (CB", "(CB")],
    "gate": [(" + self.b2)", ")"), ("self.gate(x) *", "self.gate(x).sigmoid() *"),
             ("[..., 0].mT", "[..., 0].mT.roll(1, 1)")],
    "window": [("back >= self.w", "back > self.w"), ("back < 0", "back < -1"), (" * q.shape[-1] ** -0.5", "")],
    "lookup": [("normalised(self.phi(q) @ S)", "(self.phi(q) @ S)[..., :-1]"), ("self.phi(q)", "self.phi(q / 2)"),
               ("self.phi(q) @ S", "self.phi(q) @ S.cumsum(dim=-1)")],
    "encode": [("k_enc * inside", "k_enc"), ("with_one(v_enc)", "F.pad(v_enc, (0, 1))"),
               ("* inside", "* (1 - inside)")],
    "jrt_prompt": [("torch.full_like(targets, -100)", "targets"), ("return x + ids.shape[1]", "return x"),
                   ("if asked.sum() >= 16 and", "if asked.sum() < 0 and")],
    "triton_mask": [("sources > targets", "sources >= targets"), ("<= targets - window", "< targets - window"),
                    ("(sources > targets) | ", "")],
    "triton_combine": [("a_2 * b_1 + b_2", "a_1 * b_1 + b_2"), ("a_1 * a_2,", "a_2,"),
                       ("a_2 * b_1 + b_2", "b_1 + b_2")],
    "triton_load": [("(cols[None, :] < WIDTH)", "(cols[None, :] < 2 * WIDTH)"),
                    ("rows[:, None] * stride", "rows[:, None] * WIDTH"),
                    ("(rows[:, None] < end) &", "(rows[:, None] <= end) &")],
    "triton_halving": [("% 2 == 1", "% 2 == 0"), ("+ h - 1", "+ 2 * h - 1"), ("(block ^ 1)", "block")],
    "triton_blocks": [("seen_by_first // BN * BN)", "seen_by_first // BN * BN + BN)"),
                      ("first - window + 1", "first + 1"), ("first + 1), S)", "last + 1), S)")],
}
PLACE = (r"not equal yet\.\n\n    in (.|\n)*    where      ([a-z ]+ \d|its only number)(.|\n)*"
         r"    expected   .*\n    found      .*\n\n(.|\n)*\?$")
OUTSIDE = r"line \d+, `.*`: IndexError: .* are of no argument of the kernel"


def written(tmp_path, exercise, function=None):
    """A reader's file, with this function in it."""
    path = tmp_path / f"{exercise.name}.py"
    path.write_text(start_text(exercise, function), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", BY_NAME)
def test_the_lessons_own_function_passes_and_an_empty_one_does_not(name, tmp_path):
    exercise = NAMES[name]
    assert judge(exercise, written(tmp_path, exercise, solution(exercise))) < 1e-4
    with pytest.raises(Wrong, match=r"line \d+, still says `raise NotImplementedError`"):
        judge(exercise, written(tmp_path, exercise))


@pytest.mark.parametrize("name", BY_NAME)
def test_three_mistakes_are_told_their_place(name, tmp_path):
    exercise, lines = NAMES[name], solution(NAMES[name])
    assert len(MISTAKES[name]) == 3
    for right, wrong in MISTAKES[name]:
        assert right in lines, f"the lesson has changed, {right!r} is not in it any more: think of a new mistake"
        with pytest.raises(Wrong) as error:
            judge(exercise, written(tmp_path, exercise, lines.replace(right, wrong, 1)))
        assert re.search(f"{PLACE}|{OUTSIDE}", str(error.value)), f"{wrong}: {error.value}"


# Right as well, but not as the lesson has it.
OTHER_WAYS = {
    "products": "squares = [x[..., i] ** 2 for i in range(x.shape[-1])]\n"
                "    pairs = torch.combinations(torch.arange(x.shape[-1]))\n"
                "    return torch.stack(squares + [2 ** 0.5 * x[..., i] * x[..., j] for i, j in pairs], dim=-1)",
    "chunks": "g, o = gates(g, q), []\n    for i in range(0, q.shape[2], 7):\n        part, state = block("
              "*(x[:, :, i:i + 7] for x in (q, k, v, g, *more)), state=state)\n        o.append(part)\n"
              "    return torch.cat(o, dim=2), state",
    "loop": "h, states = 0 * b[:, :, 0] if h is None else h, []\n    for t in range(b.shape[2]):\n"
            "        states.append(h := a[:, :, t] * h + b[:, :, t])\n    return torch.stack(states, dim=2)",
    "padding": "n = 2 ** (2 * u.shape[-1]).bit_length()\n"
               "    return torch.fft.ifft(torch.fft.fft(u, n) * torch.fft.fft(K, n)).real[..., :u.shape[-1]]",
    "kernel": "a_l = torch.exp(g[0, :, 0, :, None] * torch.arange(t))\n"
              "    return torch.einsum('cn,cnt->ct', (q * k)[0, :, 0], a_l)",
    "woodbury": "A = torch.diag(Lambda) - torch.outer(P, P.conj())\n"
                "    r = (2 / dt[:, None] * (1 - w) / (1 + w))[..., None, None]\n"
                "    R = torch.linalg.inv(r * torch.eye(len(P), dtype=P.dtype) - A)\n"
                "    return 2 / (1 + w) * torch.einsum('cn,ctnm,m->ct', shortened(a, C, len(w)), R, B)",
    "triton_mask": "back = targets - sources\n    return (back < 0) | (back >= window)",
}


@pytest.mark.parametrize("name", [name for name in BY_NAME if name.values[0] in OTHER_WAYS])
def test_another_way_to_write_it_passes(name, tmp_path):
    path = written(tmp_path, NAMES[name])
    path.write_text(path.read_text().replace("raise NotImplementedError", OTHER_WAYS[name]))
    assert judge(NAMES[name], path) < 1e-4


# --------------------------------------------------------------------------------------------------- what a reader sees


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(exercises, "FOLDER", tmp_path / "my_exercises")
    return tmp_path / "my_exercises"


def refused(capsys, *arguments):
    """The one line on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as error:
        main(list(arguments))
    output = capsys.readouterr()
    assert error.value.code == 2 and not output.out and output.err.count("\n") == 1
    return output.err


def told(capsys, *arguments):
    """What a check prints that ends with exit code 1."""
    with pytest.raises(SystemExit) as error:
        main(["check", *arguments])
    assert error.value.code == 1
    return capsys.readouterr().out


def test_the_list_has_all_in_the_order_of_the_lessons(folder, capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("    ")]
    assert names == [e.name for e in EXERCISES] and len(set(names)) == len(names) >= 25
    assert [line.split(",")[0] for line in lines if line and line[0] in "0k"][:6] == [
        "01_attention.py", "02_linear_attention.py", "03_ssm.py", "04_based.py", "05_jrt.py", "kernels"]
    assert sum(e.file.startswith("kernels/") for e in EXERCISES) == 5
    assert lines[-1] == f"0 of {len(EXERCISES)} are done. To go on: python exercises.py start mask"


def test_a_reader_begins_writes_and_is_done(folder, capsys):
    main(["start", "mask"])
    text = (folder / "mask.py").read_text()
    for part in ("0 <= s - t + i - j < window", "q: (b, h, t, d)", "t          5", "returns    (5, 5) bool",
                 "import torch", "def visible(t, s, window=None, real=None,", '"""May a target see a source?',
                 "    raise NotImplementedError"):
        assert part in text
    assert "distance" not in text                                                    # nothing of the body
    main([])
    assert re.search("mask +begun", capsys.readouterr().out)
    (folder / "mask.py").write_text(start_text(NAMES["mask"], solution(NAMES["mask"])))
    main(["check", "mask"])
    said = capsys.readouterr().out
    assert "mask: equal, gradients too, with t = 1, 2, 15, 16, 17 and 130" in said and "start rope" in said
    main([])
    assert re.search("mask +done", capsys.readouterr().out)
    (folder / "mask.py").write_text("# thought again")
    main([])
    assert re.search("mask +begun", capsys.readouterr().out)


def test_a_file_is_never_overwritten(folder, capsys):
    main(["start", "scan"])
    (folder / "scan.py").write_text("mine")
    capsys.readouterr()
    assert "stays as it is" in refused(capsys, "start", "scan") and (folder / "scan.py").read_text() == "mine"


def test_a_file_names_what_the_lessons_lines_use_and_no_more(folder):
    for name in ("bonus", "lookup", "triton_halving"):
        if not name.startswith("triton") or INTERPRETED:
            main(["start", name])
    text = (folder / "bonus.py").read_text()
    assert "    gates(g, q): g with a time axis of its own" in text and "    triton(" not in text
    assert "import torch.nn.functional as F" in text and "import triton" not in text and "import math" not in text
    text = (folder / "lookup.py").read_text()
    assert "    normalised(o)" in text and "    self.phi\n" in text
    if INTERPRETED:
        text = (folder / "triton_halving.py").read_text()
        assert "import triton.language as tl" in text and "import differentiable_gradients" in text
        assert "G_i        (" in text and "@triton.jit\ndef at_level" in text


def test_only_the_loop_of_flash_attention_is_taken_out(folder):
    main(["start", "rescaling"])
    text = (folder / "rescaling.py").read_text()
    assert "        raise NotImplementedError\n    l = l.clamp" in text and "shrink" not in text.split("def forward")[1]


@pytest.mark.parametrize("ask", [["solution", "zoh"], ["check", "zoh", "--solution"], ["zoh", "--solution"]])
def test_the_solution_is_the_lessons(ask, capsys):
    main(ask)
    assert capsys.readouterr().out.strip() in (ROOT / "03_ssm.py").read_text()


@pytest.mark.parametrize("arguments, says", [
    (["chek", "mask"], "'chek' is no command: there are list, start, check and solution; did you mean check?"),
    (["start", "msak"], "'msak' is no exercise: python exercises.py lists them; did you mean mask or"),
    (["start", "visible"], "did you mean mask?"),
    (["mask"], "did you mean start mask?"),
    (["check"], "check which exercise?"),
    (["check", "mask"], "does not exist: python exercises.py start mask writes it"),
    (["check", "mask", "--file", "nowhere.py"], "nowhere.py does not exist"),
    (["check", "mask", "--file", "."], "cannot be read"),
    (["check", "mask", "--limit", "0"], "--limit 0"),
    (["check", "mask", "--limit", "soon"], "invalid float value: 'soon'"),
    (["check", "mask", "--fast"], "unrecognized arguments: --fast")])
def test_a_command_that_cannot_be_followed_gets_one_line(arguments, says, folder, capsys):
    assert says in refused(capsys, *arguments)


@pytest.mark.parametrize("function, says", [
    ("def zoh(A, dt):\n    return dt +", "line 2, is not Python yet: invalid syntax"),
    ("def hold(A, dt):\n    return A, dt", "has no function zoh that begins at the left margin"),
    ("def zoh(A):\n    return A, A", "line 1: zoh(A) has not the arguments of the lesson's zoh(A, dt)"),
    ("def zoh(A, dt):\n    z = dt * A\n    return z, z[9]", "line 3, `return z, z[9]`: IndexError: index 9 is out of"),
    ("import nothing_like_it\ndef zoh(A, dt):\n    pass", "line 1, `import nothing_like_it`: ModuleNotFoundError"),
    ("def zoh(A, dt):\n    exit()", "line 2, `exit()`: SystemExit"),
    ("def zoh(A, dt):\n    return A, dt, A", "what       the number of results"),
    ("def zoh(A, dt):\n    return None", "expected   2\n    found      1"),
    ("def zoh(A, dt):\n    return A * dt, None", "expected   complex128 of (3, 4)\n    found      NoneType"),
    ("def zoh(A, dt):\n    return A * dt, dt", "expected   complex128 of (3, 4)\n    found      float64 of (3, 1)"),
    ("def zoh(A, dt):\n    return A * dt, A / (0 * dt)", "Is an exponent above 0 somewhere, a 0 divided by 0"),
    ("def zoh(A, dt):\n    return (A * dt).detach(), (dt * A).expm1() / A", "the gradient for A"),
    ("def zoh(A, dt):\n    return (A * dt).detach(), (dt * A).expm1() / A", "is something cut off from its gradient")])
def test_code_that_does_not_run_or_fit_gets_one_message(function, says, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(function)
    said = told(capsys, "zoh", "--file", str(tmp_path / "mine.py"))
    assert says in said and "Traceback" not in said


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def test_a_loop_without_end_is_stopped_in_its_line(tmp_path, capsys, handler):
    """Also where interrupts are ignored, as in what a shell starts in the background."""
    (tmp_path / "mine.py").write_text("def zoh(A, dt):\n    while True:\n        A = 1 * 1\n")
    before = signal.signal(signal.SIGINT, handler)
    try:
        said = told(capsys, "zoh", "--file", str(tmp_path / "mine.py"), "--limit", "1")
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert re.search(r"stopped after 1 seconds, in line [23], `.*`. Does it end\?", said)


def test_a_reader_may_add_functions_without_changing_the_lesson(tmp_path):
    """A mask that all forms of a copy would share is seen, because the other copy is untouched."""
    path = tmp_path / "mine.py"
    path.write_text("def gates(g, q):\n    return 1 / 0\n\n" + solution(NAMES["segment_sums"]))
    assert judge(NAMES["segment_sums"], path) < 1e-9
    path.write_text(solution(NAMES["mask"]).replace(">= 0", ">= -1"))
    with pytest.raises(Wrong, match="expected   False\n    found      True"):
        judge(NAMES["mask"], path)


def test_as_a_script_from_another_folder(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "exercises.py", "check", "mask", "--file", "none.py"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr == "exercises.py: none.py does not exist\n"


def test_git_and_ruff_leave_the_readers_files_alone():
    assert "my_exercises/" in (ROOT / ".gitignore").read_text().splitlines()
    assert '"my_exercises"' in (ROOT / "pyproject.toml").read_text()

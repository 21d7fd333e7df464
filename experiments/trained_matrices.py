"""What trained models look at, beside the ideal: A 3 B 7 ... A ?, through six small models that were trained to answer,
and through an attention that learned languages in context.

    python experiments/trained_matrices.py [--jobs 6] [--quick] [--draw]

The ideal is two steps: compare (which token before is this one?) and shift (what stood behind it?). That is the n-gram
head of lesson 01, of order 1; order n compares the last n tokens. Each model has two layers, a short gated convolution
and the mixer (Hyena and Mamba, which have a convolution in them: two of these), and learns multi-query associative
recall (lesson 04's mqar, 4 pairs of 31 keys and 32 values in 32 tokens); attention, of three layers, also learns random
automata (lesson 01's icll, 256 letters). Measured is how much of its weight the best head or channel of a model puts on
the ideal places of orders 1 to 3, in the rows that are asked; best on other texts. Writes trained_matrices.csv, .npz
(the first seed's matrices), trained_matrices.png, ngram_heads.png, and docs/trained.png (one row, in the text).
"""
import importlib
from functools import partial

import lab
import matplotlib.patches
import numpy as np
import torch
from lab import train

ngram_heads = importlib.import_module("01_attention").NGram.matrix
MODELS = {"attention": "short_conv,attention", "convolution (Hyena)": "hyena,hyena", "Based": "short_conv,based",
          "Mamba": "mamba,mamba", "gated linear attention": "short_conv,gla", "delta rule": "short_conv,deltanet"}
SHOWN = ("attention", "convolution (Hyena)", "Based")                                        # in docs/trained.png
LEARNER = "attention, automata"
LEARNERS = {LEARNER: "attention,attention,attention",
            "convolution + attention, automata": "short_conv,attention,attention"}
CHOOSING, SEEDS, ORDERS = 100, (0, 1, 2), (1, 2, 3)


# ------------------------------------------------------------------------------------------------------------- measure


@torch.no_grad()
def matrices(model, ids):
    """Each layer's matrix, of every head or channel, in shares of its rows: (b, h, t, s)."""
    x, extras = model.embed(ids), {"ids": ids}
    for block in model.blocks:
        M = block.mixer.matrix(block.norm(x).float(), **block.inputs(extras)).abs()
        yield M / M.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        x = block(x, extras)


def ideal(ids):
    """Where the n-gram heads of orders 1 to 3 look: (b, 3, t, s), 0 or 1."""
    class Orders:
        orders = ORDERS
    return (ngram_heads(Orders, torch.zeros(*ids.shape, 1), ids) > 0).float()


def shares(model, ids, asked):
    """Of each layer's heads the share of their weight on the ideal places, over the rows that are asked and have any:
    [(3, h), ...]"""
    places = ideal(ids)                                                                      # (b, 3, t, s)
    rows = (places.sum(dim=-1) > 0) & asked[:, None]                                         # (b, 3, t)
    found = []
    for M in matrices(model, ids):
        on = torch.einsum("bnts,bhts->bnht", places, M)
        found.append(torch.where(rows[:, :, None], on, 0).sum(dim=(0, 3)) / rows.sum(dim=(0, 2))[:, None].clamp(min=1))
    return found


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
    return [torch.where(rows, x, 0).sum(dim=(0, 2)) / rows.sum(dim=(0, 2)).clamp(min=1) for x in (even, first)]


def right(model, batches):
    """The share of right answers; what is right may be several tokens ("valid")."""
    hits = [extras["valid"][targets != -100].gather(1, answer[:, None])[:, 0] if "valid" in extras
            else answer == targets[targets != -100] for ids, targets, extras in batches
            for answer in [model(ids)[targets != -100].argmax(dim=-1)]]
    return torch.cat(hits).float().mean().item()


@torch.no_grad()
def look(model, data):
    """The columns of a trained model, and for each order its best head's matrix of the first text: (3, t, t)."""
    first, *rest = data.held_out(8, 5)
    choose = shares(model, first[0], first[1] != -100)
    ids, asked = torch.cat([ids for ids, *_ in rest]), torch.cat([targets != -100 for _, targets, _ in rest])
    found, (even, one), row, shown = shares(model, ids, asked), baselines(ids, asked), {}, []
    for n in ORDERS:
        layer, head = best_head(choose, n)
        row |= {f"head_{n}": f"layer {layer + 1} head {head}", f"share_{n}": found[layer][n - 1, head].item(),
                f"even_{n}": even[n - 1].item(), f"of_order_1_{n}": one[n - 1].item()}
        shown.append(list(matrices(model, first[0][:1]))[layer][0, head])
    row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
    return {"accuracy": round(right(model, rest), 4)} | row, torch.stack(shown).numpy()


def measure(parts, cell):
    """Trains, looks, and keeps the matrices of the seed that is drawn in the folder `parts`."""
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
    recall = {"task": "mqar:length=32:n_pairs=4:vocab_size=64", "d_model": 64, "batch_size": 64, "warmup": 100}
    automata = recall | {"task": "icll:length=128", "batch_size": 32}
    steps, lrs, seeds = (3000, 12000), (1e-3, 3e-3), (CHOOSING, *SEEDS)
    if quick:
        steps, lrs, seeds = (60, 60), (3e-3,), SEEDS[:1]
        recall |= {"d_model": 32, "warmup": 20}
        automata |= {"d_model": 32, "warmup": 20, "task": "icll:length=48"}
    runs = [(name, mixer, recall | {"steps": steps[0]}) for name, mixer in MODELS.items()]
    runs += [(name, mixer, automata | {"steps": steps[1]}) for name, mixer in LEARNERS.items()]
    return [{"model": name, "mixer": mixer} | flags | {"lr": lr, "seed": seed}
            for name, mixer, flags in runs for seed in seeds for lr in lrs]


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


def draw_matrices(args, kept, results):
    ids, targets = torch.from_numpy(kept["ids"])[None], torch.from_numpy(kept["targets"])
    tokens, t = named(kept["ids"].tolist()), len(kept["ids"])
    same = (ids[0][:, None] == ids[0]).tril(-1).float() * (ids[0] > 0)                       # (t, s)
    shift = torch.diag(torch.ones(t - 1), -1)
    wanted = ideal(ids)[0, 0] * (ids[0] > 0)[:, None]
    at = [(i, int(wanted[i].argmax())) for i in (targets != -100).nonzero()[:, 0].tolist()]
    fig, axes = lab.figure(13.5, 14, rows=3, columns=3)
    theory = {"shift: each place knows the token before it": shift, "compare: where was this token?": same,
              "both, the ideal: before which place was it?": wanted}
    for ax, (title, M) in zip(axes[0], theory.items(), strict=True):
        show(ax, M.numpy(), tokens, title, at if "ideal" in title else [])
    for ax, name, M in zip(axes[1:].flat, kept["names"], kept["M"], strict=False):
        mean, low, high = results["share_1"].get((name,), (0, 0, 0))
        show(ax, M, tokens, f"{name}: {mean:.2f} ({low:.2f} to {high:.2f})", at)
    for ax in axes[:, 0]:
        ax.set_ylabel("token that asks")
    for ax in axes[2]:
        ax.set_xlabel("token that is looked at")
    fig.suptitle("Compare and shift, and what six trained models look at in a text they have not seen.\n"
                 "Boxed: the values asked for; the number: the share of the weight on them", fontsize=14)
    lab.save(fig, args.out / "trained_matrices.png")


def draw_rows(path, kept):
    """The text once for each of three models, each token as dark as the row that asks gives it weight."""
    tokens, targets = named(kept["ids"].tolist()), torch.from_numpy(kept["targets"])
    asks = int((targets != -100).nonzero()[-1])
    wanted = int((kept["ids"][:asks] == int(targets[asks])).nonzero()[0][0])
    fig, axes = lab.figure(11, 3.6, rows=len(SHOWN), columns=1)
    for ax, name in zip(axes.flat, [name for name in SHOWN if name in kept["names"]], strict=False):
        i = list(kept["names"]).index(name)
        row = kept["M"][i][asks, :asks + 1]
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


def draw_heads(args, kept, results, rows):
    """Left a head of a trained attention on one automaton's text, right the shares of all orders."""
    fig, (left, axis) = lab.figure(13, 6, columns=2, width_ratios=(5, 4))
    n, t = 2, min(40, len(kept["automaton"]))
    letters = ["|" if i == 18 else chr(97 + i) for i in kept["automaton"][:t].tolist()]
    places = ideal(torch.from_numpy(kept["automaton"])[None])[0, n - 1, :t, :t]
    show(left, kept["heads"][n - 1][:t, :t], letters, "a trained head; boxed: behind earlier ones of the last two",
         places.nonzero().tolist(), "C0")
    left.set(xlabel="letter that is looked at", ylabel="letter that asks")
    for i, name in enumerate(LEARNERS):
        found = [(n, *results[f"share_{n}"][name,]) for n in ORDERS if (name,) in results[f"share_{n}"]]
        if found:
            n, mean, low, high = map(np.array, zip(*found, strict=True))
            axis.errorbar(n + 0.1 * i - 0.05, mean, [mean - low, high - mean], fmt="o", ms=8, capsize=4,
                          label=f"{name.removesuffix(', automata')}, its best head")
    row = next(row for row in rows if row["model"] in LEARNERS)
    for n in ORDERS:
        for key, style, label in (("even", ":", "a row that looks everywhere alike"),
                                  ("of_order_1", "--", "a perfect head of order 1")):
            axis.plot([n - 0.25, n + 0.25], [row[f"{key}_{n}"]] * 2, style, color="black",
                      label=label if n == 1 else None)
    axis.set_xticks(ORDERS, ["the last letter", "the last two", "the last three"])
    axis.set(ylim=(-0.03, 1.05), ylabel="share of the weight behind earlier occurrences of", xlim=(0.6, 3.4))
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=9)
    lab.save(fig, args.out / "ngram_heads.png")


def merge(parts, path):
    """What has been trained here, in one file."""
    found = {name: np.load(parts / f"{name}.npz") for name in (*MODELS, LEARNER) if (parts / f"{name}.npz").exists()}
    names = [name for name in MODELS if name in found]
    if names:
        learner = {"automaton": found[LEARNER]["ids"], "heads": found[LEARNER]["M"]} if LEARNER in found else {}
        np.savez_compressed(path, names=names, M=np.stack([found[name]["M"][0] for name in names]),
                            accuracy=[found[name]["accuracy"] for name in names], **learner,
                            **{key: found[names[0]][key] for key in ("ids", "targets")})


if __name__ == "__main__":
    args = lab.options(__doc__)
    table = args.out / "trained_matrices.npz"
    parts = args.out / "parts" if args.quick else lab.ROOT / "runs" / "trained_matrices"
    rows = lab.sweep(args, "trained_matrices", cells(args.quick), partial(measure, parts), ("model",), "accuracy")
    if not args.draw:                                                        # else what was trained elsewhere stays
        merge(parts, table)
    reported = [row for row in rows if row["seed"] != CHOOSING] or rows
    results = {key: lab.best(reported, ("model",), key, judge="accuracy")
               for key in ("accuracy", *(f"share_{n}" for n in ORDERS))}
    for (name,), value in results["accuracy"].items():
        print(f"{name:36}{value[0]:.3f} right   best head on the ideal places of order " + "   ".join(
            "{}: {:.2f} ({:.2f} to {:.2f})".format(n, *results[f"share_{n}"][name,]) for n in ORDERS))
    kept = np.load(table)
    draw_matrices(args, kept, results)
    draw_rows((lab.ROOT / "docs" if not args.quick else args.out) / "trained.png", kept)
    if "heads" in kept:
        draw_heads(args, kept, results, rows)

"""Zoology's Figure 2: accuracy on MQAR against model width. Attention needs a constant width, gated convolutions one
that grows with the length.

    python experiments/mqar_width.py [--jobs 4] [--quick]

The authors' settings: two layers of attention or four of another mixer (Based, here: two), without MLP, vocabulary
8192, 100,000 examples 64 times over, in batches of 512 (256 tokens: 256), their rates from 0.00046 to 0.01 (their
0.0001 was too small for the first three mixers) and beyond if the best is at the edge, dropout 0.1 of the embedding,
linear weights N(0, 0.02^2); learned positions for attention alone; BaseConv with 3 taps and with as many as tokens in
turn (theirs are made by a network, and it adds its input, too); H3 with head_dim 2 and as many states as tokens. A run
ends when all of its kind have an accuracy of 0.99 (the authors stop there, too). Hollow, dashed: mqar_width_small.csv,
two layers, 10,000 steps of 128 or 64 examples, rates up to 0.003. Writes mqar_width.csv, .txt and .png.
"""
import lab

LAYERS = {"attention": ["attention:rope=false:n_positions={n}"],                             # two: train.py's default
          "BaseConv": ["baseconv_short", "baseconv:taps={n}"] * 2, "H3": ["h3:head_dim=2:n_state={n}"] * 4,
          "Hyena": ["hyena"] * 4, "RWKV-4": ["rwkv4"] * 4,
          "Based": ["short_conv", "taylor:feature_dim=8"], "conv + attention": ["short_conv", "attention"]}
WIDER = "BaseConv", "Hyena"                                                      # the grid, for these: also 0.046
COLOURS = {name: f"C{i}" for i, name in enumerate(LAYERS)}
PAPER = {64: {"attention": (1, 1, 1, 1), "BaseConv": (.70, .94, .97, 1), "H3": (.93, 1, .99, .98),
              "Hyena": (.52, .75, .84, .86), "RWKV-4": (.76, .94, .96, .98)},
         128: {"attention": (1, 1, 1, 1), "BaseConv": (.37, .61, .84, .96), "H3": (.25, .74, .91, .76),
               "Hyena": (.18, .65, .73, .84), "RWKV-4": (.18, .50, .75, .93)},
         256: {"attention": (1, 1, 1, 1), "BaseConv": (.14, .34, .82, .94), "H3": (.10, .64, .62, .66),
               "Hyena": (.05, .13, .54, .69), "RWKV-4": (.05, .06, .67, .79)}}                 # read off its figure 2
WIDTHS = (64, 128, 256, 512)


def cells(quick):
    common = {"mlp": 0, "warmup": 100, "n_heads": 1, "dropout": 0.1, "init_std": 0.02}
    if quick:
        task = "mqar:length=32:vocab_size=64"
        common |= {"task": f"{task} 8000", "test": f"{task} 500", "seed": 0, "steps": 1500, "batch_size": 64}
        return [common | {"layers": name, "mixer": ",".join(LAYERS[name]).format(n=32), "d_model": d, "lr": 1e-2}
                for name in ("attention", "BaseConv") for d in (16, 32)]
    return [common | {"layers": name, "mixer": ",".join(LAYERS[name]).format(n=n), "task": f"mqar_{n} 100000",
                      "test": f"mqar_{n} 3000", "d_model": d, "lr": lr, "seed": seed, "steps": 6_400_000 // batch,
                      "batch_size": batch}
            for n, batch in ((64, 512), (128, 512), (256, 256)) for d in WIDTHS for name in LAYERS
            for seed in (100, 0, 1, 2) for lr in (4.6e-4, 2.2e-3, 1e-2, 4.6e-2)[:4 if name in WIDER else 3]]


def measure(cells):
    return lab.packed(cells, enough=0.99)


def run(args):
    return lab.sweep(args, "mqar_width", cells(args.quick), measure, ("task", "layers", "d_model"), "val_accuracy",
                     pack=4, enough=0.99, needed=False)


def smaller():
    """{(task, layers, d_model): (mean, low, high)} of the runs with a fifth of the examples or fewer."""
    return lab.best(lab.read(lab.ROOT / "experiments" / "results" / "mqar_width_small.csv"),
                    ("task", "layers", "d_model"), "accuracy")


def draw(ax, results, n, say, title, dodge=0, **style):
    for name in LAYERS:
        points = sorted((d, *y) for (task, layers, d), y in results.items()
                        if (task.split()[0].split(":")[0], layers) == (f"mqar_{n}", name))
        if points:
            d, mean, low, high = zip(*points, strict=True)
            aside = 1.03 ** (dodge * (list(LAYERS).index(name) - 2))                         # no mark on another
            ax.errorbar([x * aside for x in d], *lab.bars(list(zip(mean, low, high, strict=True))), capsize=3,
                        color=COLOURS[name], label=name, **style)
            say(f"{n:5} tokens, {title}: {name:17}" + "".join("  {}: {:.3f} ({:.3f} to {:.3f})".format(*p)
                                                              for p in points))


def draw_paper(ax, paper):
    for accuracies in paper.values():
        ax.plot(WIDTHS, accuracies, ":", color="gray", lw=1)
    height = -1
    for first, name in sorted((of_name[0], name) for name, of_name in paper.items()):
        height = max(first, height + 0.05)                                                   # no label on another
        ax.annotate(name, (WIDTHS[0], height), xytext=(-9, 0), textcoords="offset points", fontsize=9, color="gray",
                    ha="right", va="center")


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows, by = run(args), ("task", "layers", "d_model")
    results = lab.best(rows, by, "accuracy", judge="val_accuracy")
    say = lab.reporter(args.out / "mqar_width.txt")
    if args.quick:
        for (_, name, d), (mean, *_) in results.items():
            say(f"width {d}: {name} {mean:.3f}")
    fig, axes = lab.figure(13, 4.6, columns=3, sharey=True)
    for ax, n in zip(axes, PAPER, strict=True):
        draw_paper(ax, PAPER[n])
        draw(ax, smaller(), n, say, "fewer examples", fmt="s--", ms=4, lw=1, alpha=0.6, mfc="white")
        draw(ax, results, n, say, "the authors' size", dodge=1, fmt="o", ms=9)
        for (task, name, d), (row, *more) in lab.chosen(rows, by, "val_accuracy").items():
            if not more and (task, name, d) not in results and task.startswith(f"mqar_{n} "):
                ax.plot(d, row["accuracy"], "*", ms=12, color=COLOURS[name])
                say(f"{n:5} tokens, the authors' size, only the seed that chooses: {name} {d}: {row['accuracy']:.3f}")
        ax.axhline(16 / n, color="black", lw=0.8, ls="--")
        ax.set(xscale="log", xlabel="model width", ylim=(-0.02, 1.03), xlim=(30, 600),
               title=f"{n} tokens, {n // 16} pairs")
        ax.set_xticks(WIDTHS, WIDTHS)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    handles, labels = axes[1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(LAYERS), fontsize=10,
               title="large: the authors' size; small, dashed: fewer examples; gray: the paper; "
                     "black: naming any of the values")
    lab.save(fig, args.out / "mqar_width.png")

"""Based's Figure 2: recall against the bytes of state that a mixer really keeps.

    python experiments/recall_vs_state.py [--jobs 4] [--small retnet] [--quick]

The authors' settings: MQAR with random filler on their mixture of lengths (64 to 256) and pairs (4 to 64), 180,000
examples, in every epoch from easy to hard, 22,500 steps of 256; accuracy is the mean over seven tests, 4 pairs in 64
tokens to 256 in 1024. Two layers without MLP: a short convolution and the mixer, or two of Mamba, H3, Hyena; dropout
0.1 of the embedding; four rates from 0.001 to 0.03, and beyond. Right: recall_vs_state_small.csv, 32 pairs in 128
tokens only, 10,000 steps of 128, where also Mamba, H3 and Hyena stand behind a convolution; --small adds these mixers
there, and runs nothing else. Writes recall_vs_state.csv and .png.
"""
import lab

FAMILIES = {
    "Taylor": [f"short_conv,taylor:feature_dim={f}" for f in (8, 16, 24)],
    "attention": ["short_conv,attention"], "window": [f"short_conv,window:window={w}" for w in (16, 64)],
    "Mamba": [f"mamba:n_state={n}" for n in (8, 16, 24)], "Mamba-2": [f"mamba2:n_state={n}" for n in (8, 16, 24)],
    "H3": ["h3:head_dim=2:n_state=16"], "Hyena": ["hyena"],
    "DeltaNet": ["short_conv,deltanet"], "GLA": ["short_conv,gla"],
    "elu + 1": [f"short_conv,linear_attention:feature_dim={f}" for f in (45, 16, 153)],
    "Taylor without convolution": [], "Based": [],
    "RetNet": [], "BaseConv": [],                                                            # in the small setting only
}
SMALL = {"retnet": "RetNet", "baseconv:taps=128": "BaseConv"}
STYLES = {family: (("o-", "s--", "^:")[i // 10], f"C{i % 10}") for i, family in enumerate(FAMILIES)}
TRAIN = ((64, 4, 100000), (128, 8, 20000), (256, 16, 20000), (256, 32, 20000), (256, 64, 20000))
TEST = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
# read off Based's figure 2: bytes, accuracy
PAPER = {"Taylor": ((9e3, .67), (12e3, .72), (25e3, .84), (40e3, .91), (80e3, .985), (160e3, .99)),
         "Mamba-2": ((8e3, .52), (16e3, .69), (33e3, .785), (66e3, .83)),
         "window": ((10e3, .08), (34e3, .31), (67e3, .515), (130e3, .655), (260e3, .80)),
         "H3": ((8e3, .19), (33e3, .25), (130e3, .25)), "attention": ((520e3, 1.0),), "Hyena": ((520e3, .185),)}


def mixture(sizes):
    return ", ".join(f"mqar:length={n}:n_pairs={k}:filler=true {examples}" for n, k, examples in sizes)


def cells(quick):
    common = {"mlp": 0, "warmup": 100, "n_heads": 1, "dropout": 0.1, "init_std": 0.02}
    if quick:
        task = "mqar:length=32:n_pairs=8:vocab_size=64:filler=true"
        common |= {"task": f"{task} 8000", "test": f"{task} 500", "t": 32, "d_model": 32, "batch_size": 64}
        return [common | {"family": family, "mixer": f"short_conv,{mixer}", "lr": 1e-2, "seed": 0, "steps": 1500}
                for family, mixer in (("window", "window:window=4"), ("Taylor", "taylor:feature_dim=8"))]
    common |= {"task": mixture(TRAIN), "test": mixture([(*size, 1000) for size in TEST]), "t": 1024, "d_model": 64}
    return [common | {"family": family, "mixer": mixer, "batch_size": 256, "steps": 22500, "lr": lr, "seed": seed}
            | ({"form": "triton"} if family == "Mamba" else {"form": ""})
            for family, mixers in FAMILIES.items() for mixer in mixers for seed in (100, 0, 1, 2)
            for lr in (1e-3, 3.2e-3, 1e-2, 3.2e-2)]


def measure(cells):
    flags = {name: value for name, value in cells[0].items() if name in ("mixer", "n_heads", "d_model")}
    results = yield from lab.packed(cells)
    return [{"state_bytes": lab.state_bytes(flags, cells[0]["t"])} | result for result in results]


def small_cells(names):
    common = {"mlp": 0, "warmup": 100, "n_heads": 1, "task": "mqar_based_128:easy=0.25", "t": 128, "steps": 10000,
              "batch_size": 128, "d_model": 64}
    return [common | {"family": SMALL[name], "mixer": f"short_conv,{name}", "lr": lr, "seed": seed}
            for name in names for seed in (0, 1, 2) for lr in (3e-3, 1e-2)]


def measure_small(cells):
    """A quarter of the steps with 8 of the 32 pairs (easy=0.25), and no text twice."""
    n = cells[0]["steps"] * cells[0]["batch_size"] // 4
    more = {"task": f"mqar_based_128:n_pairs=8 {n}, mqar_based_128 {3 * n}", "test": "mqar_based_128 2000"}
    results = yield from lab.packed([cell | more for cell in cells], enough=0.997)
    flags = {name: cells[0][name] for name in ("mixer", "n_heads", "d_model")}
    return [{"state_bytes": lab.state_bytes(flags, cells[0]["t"]), "accuracy": result["accuracy"],
             "ended": result["ended"]} for result in results]


def run(args):
    if args.small:
        lab.sweep(args, "recall_vs_state_small", small_cells(args.small.split(",")), measure_small, pack=6,
                  needed=False)
        args.draw = True
    return lab.sweep(args, "recall_vs_state", cells(args.quick), measure, ("family", "mixer"), "val_accuracy", pack=4,
                     needed=False)


def draw(ax, results, title, say):
    """Mistakes, on a log axis, against bytes; each line is labelled where its state is smallest."""
    guessing = []
    for family, (style, colour) in STYLES.items():
        points = sorted((size, *y) for (f, _, size), y in results.items() if f == family)
        if points:
            say(f"{family:26}" + "".join("  {:,} B: {:.3f} ({:.3f} to {:.3f})".format(*point) for point in points))
            wrong = [[1 - x for x in (mean, high, low)] for _, mean, low, high in points]
            ax.errorbar([point[0] for point in points], *lab.bars(wrong), fmt=style, color=colour, ms=5, capsize=2)
            if min(wrong)[0] > 0.85:
                guessing.append(family)
                continue
            ax.annotate(family, (points[0][0], wrong[0][0]), xytext=(-5, -11 if family == "Taylor" else 4), ha="right",
                        textcoords="offset points", fontsize=9, color=colour)
    if guessing:
        ax.annotate(f"{', '.join(guessing)}: guessing", (0.99, 0.012), xycoords="axes fraction", ha="right", fontsize=8)
    ax.set(xscale="log", yscale="log", xlabel="state for each sequence, bytes", ylim=(1.6, 0.001), title=title)
    ax.grid(alpha=0.3)


def draw_paper(ax):
    for name, points in PAPER.items():
        sizes, wrong = [n for n, _ in points], [1 - x + 1e-3 for _, x in points]
        ax.plot(sizes, wrong, ".:", color="gray", lw=1)
        ax.annotate(name, (sizes[-1], wrong[-1]), xytext=(4, -12 if name == "attention" else 3), fontsize=9,
                    textcoords="offset points", color="gray")


if __name__ == "__main__":
    args = lab.options(__doc__, small=("these mixers, a,b, in the small setting", SMALL))
    rows = run(args)
    results = lab.best(rows, ("family", "mixer", "state_bytes"), "accuracy", judge="val_accuracy")
    small = lab.read(lab.ROOT / "experiments" / "results" / "recall_vs_state_small.csv")
    say = lab.reporter(args.out / "recall_vs_state.txt")
    fig, axes = lab.figure(12 if rows else 7.5, 5, columns=2 if rows else 1, squeeze=False)
    if rows:
        draw_paper(axes[0, 0])
        axes[0, 0].set_xlim(4e3, 1.4e6)
        draw(axes[0, 0], results, "the authors' mixture, mean of seven tests (gray: the paper)", say)
    draw(axes[0, -1], lab.best(small, ("family", "mixer", "state_bytes"), "accuracy"), "32 pairs in 128 tokens", say)
    axes[0, -1].axhline(31 / 32, color="black", lw=0.8, ls=":")
    axes[0, 0].set_ylabel("share of wrong answers (dotted: naming any of the values)")
    axes[0, -1].set_xlim(2e3, 2e5)
    lab.save(fig, args.out / "recall_vs_state.png")

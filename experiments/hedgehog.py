"""Hedgehog: which feature maps are spiky and monotone like softmax, and which can be taught a trained layer's weights.

    python experiments/hedgehog.py [--quick]

A one-layer attention model is trained on the plays; then every feature map, behind a learned matrix that starts as the
identity, is fitted to that layer's attention weights (cross-entropy), on another eight passages at each step, and
compared on passages of plays that neither has seen. Divergences in nats for each target. Writes hedgehog.csv, .txt and
.png.
"""
import importlib
import statistics

import lab
import torch
from lab import train

lesson = importlib.import_module("02_linear_attention")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {"elu": "elu + 1", "relu": "relu", "performer": "Performer", "rfa": "RFA", "cosformer": "cosFormer",
         "hedgehog": "Hedgehog", "taylor": "Taylor", "rebased": "ReBased"}


class Learned(torch.nn.Module):
    """A feature map of W x, W: (h, d, d) learned, the identity at first."""

    def __init__(self, name, d, n_heads):
        super().__init__()
        self.W = torch.nn.Parameter(torch.eye(d).repeat(n_heads, 1, 1))
        self.phi = lesson.FEATURE_MAPS[name](d, n_heads)

    def forward(self, x):
        return self.phi(x @ self.W.mT)


def trained_layer(args):
    """A function that gives q, k: (b, h, t, d) of a trained attention layer, for ids: (b, t), and the text."""
    cell = {"mixer": "attention", "n_layers": 1, "d_model": 64, "n_heads": 4, "context": 128,
            "batch_size": 16, "lr": 3e-3, "warmup": 50, "steps": args.steps or (60 if args.quick else 800)}

    def take(model):
        block = model.to(DEVICE).blocks[0]
        return torch.no_grad()(lambda ids: block.mixer.project(block.norm(model.embed(ids.to(DEVICE))))[:2])
    return lab.trained(cell, then=take), train.Text(lab.parsed(cell))


def fit(phi_q, phi_k, project, text, steps, lr, seed):
    """As lesson 02's distil(), but on other passages at each step: on the same ones a map learns these by heart."""
    optimizer = torch.optim.Adam([*phi_q.parameters(), *phi_k.parameters()], lr=lr)
    for step in range(steps):
        q, k = project(text.batch(8, torch.Generator().manual_seed((seed * 1000003 + step) % 2 ** 31))[0])
        optimizer.zero_grad()
        divergence(q, k, phi_q, phi_k).backward()
        optimizer.step()


def divergence(q, k, phi_q, phi_k):
    """Of the map's weights from softmax's, in nats a target [Zhang et al. 2024, eq. 7, less the entropy]."""
    future = torch.ones(2 * q.shape[2:3], dtype=torch.bool, device=q.device).triu(1)
    log_P = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).log_softmax(dim=-1)
    W = lesson.normalise((phi_q(q) @ phi_k(k).mT).clamp(min=0).masked_fill(future, 0))       # RFA's can be negative
    return (log_P.exp() * (log_P - W.clamp(min=1e-30).log()).masked_fill(future, 0)).sum(dim=-1).mean()


if __name__ == "__main__":
    args = lab.options(__doc__)
    if not args.draw:
        project, text = trained_layer(args)
        passages = torch.cat([ids for ids, *_ in text.held_out(8, 8)])
        validation, test = project(passages[::2]), project(passages[1::2])                   # 32 each
    mimicry = lesson.mimicry()

    def measure(cell):
        torch.manual_seed(cell["seed"])
        phi_q, phi_k = (Learned(cell["map"], test[0].shape[3], test[0].shape[1]).to(DEVICE) for _ in range(2))
        entropy, monotone, *_ = mimicry[cell["map"]]
        with torch.no_grad():
            start = divergence(*test, phi_q, phi_k).item()
        fit(phi_q, phi_k, project, text, cell["fit_steps"], cell["lr"], cell["seed"])
        with torch.no_grad():
            scores = {"validation": divergence(*validation, phi_q, phi_k).item(),
                      "test": divergence(*test, phi_q, phi_k).item()}
        return {"entropy": entropy, "rank_correlation": monotone, "softmax_entropy": mimicry["softmax"][0],
                "at_first": start} | scores

    names = ["hedgehog", "taylor", "performer", "elu", "relu", "rfa", "cosformer", "rebased"]
    fit_steps = args.steps or (15 if args.quick else 400)
    cells = [{"map": name, "fit_steps": fit_steps, "lr": lr, "seed": seed}
             for name in (names[:2] if args.quick else names) for seed in ([0] if args.quick else [100, 0, 1, 2])
             for lr in ([1e-2] if args.quick else [3e-3, 1e-2, 3e-2, 1e-1])]
    rows = lab.sweep(args, "hedgehog", cells, measure, ("map",), "-validation")
    found = lab.chosen(rows, ("map",), "-validation")                        # of an unfinished map: the chooser's best
    results = {key: {name: (statistics.mean(x), min(x), max(x)) for name, of in found.items()
                     if (x := [row[key] for row in of])} for key in ("at_first", "test")}
    say = lab.reporter(args.out / "hedgehog.txt")
    fig, (left, right) = lab.figure(12, 4.2, columns=2)
    for name, (entropy, monotone, *_) in mimicry.items():
        left.plot(entropy, monotone, "o", color="black" if name == "softmax" else "C0")
        under = name in ("relu", "elu")                          # relu stands where cosFormer does
        left.annotate(NAMES.get(name, name), (entropy, monotone), xytext=(-4, -12 if under else 5),
                      textcoords="offset points", fontsize=9, ha="right")
    left.set(xlabel="entropy of the weights, nats (spiky: low)", ylabel="rank correlation with q . k (monotone: 1)",
             title="As they start, on random q and k", xlim=(2.2, None), ylim=(-0.05, 1.1))
    order = sorted(results["test"], key=lambda name: results["test"][name][0])
    for j, (key, label) in enumerate((("at_first", "as it starts"), ("test", "fitted"))):
        mean, low, high = torch.tensor([results[key][name] for name in order]).T
        right.errorbar(mean, torch.arange(len(order)) + 0.24 * j - 0.12, xerr=[mean - low, high - mean], fmt="so"[j],
                       color=("gray", "C0")[j], mfc=("white", "C0")[j], capsize=3, label=label)
    for name in order:
        say(f"{name[0]:12}" + "   ".join(f"{key} {lab.spread(*results[key][name])}" for key in ("at_first", "test")) +
            f"   {len(found[name])} seed{'s' * (len(found[name]) > 1)}")
    right.set_yticks(range(len(order)), [NAMES.get(name, name) for name, in order])
    right.invert_yaxis()
    right.grid(alpha=0.3)
    right.set(xscale="log", xlabel="divergence from softmax, nats", title="To a trained layer's weights, on other text",
              xticks=(0.5, 1, 2, 3), xticklabels=("0.5", "1", "2", "3"))
    right.minorticks_off()
    right.legend()
    lab.save(fig, args.out / "hedgehog.png")

"""Hedgehog: which feature maps are spiky and monotone like softmax, and which can be taught a trained layer's weights.

    python experiments/hedgehog.py [--quick]

A one-layer attention model is trained on the plays; then every feature map, behind a learned matrix that starts as the
identity, is fitted to that layer's attention weights (cross-entropy) on some text (another for each seed), and compared
on other text. Divergences in nats for each target, at the learning rate that fits best. Writes hedgehog.csv and .png.
"""
import importlib

import lab
import torch
from lab import train

lesson = importlib.import_module("02_linear_attention")


class Learned(torch.nn.Module):
    """A feature map of W x, W: (h, d, d) learned, the identity at first."""

    def __init__(self, name, d, n_heads):
        super().__init__()
        self.W = torch.nn.Parameter(torch.eye(d).repeat(n_heads, 1, 1))
        self.phi = lesson.FEATURE_MAPS[name](d, n_heads)

    def forward(self, x):
        return self.phi(x @ self.W.mT)


def trained_layer(args):
    """q, k: (b, h, t, d) of a trained attention layer, on three texts to learn from, and on a fourth."""
    cell = {"mixer": "attention", "n_layers": 1, "d_model": 64, "n_heads": 4, "context": 128,
            "steps": args.steps or (60 if args.quick else 800)}

    def take(model):
        data, block = train.Text(lab.parsed(cell)), model.blocks[0]
        batches = [data.batch(8, torch.Generator().manual_seed(-1 - i)) for i in range(3)]
        batches.append(next(iter(data.held_out(8, 1))))
        with torch.no_grad():
            return [block.mixer.project(block.norm(model.embed(ids)))[:2] for ids, *_ in batches]
    return lab.trained(cell, then=take)


def divergence(q, k, phi_q, phi_k):
    with torch.no_grad():
        return lesson.distil(q, k, phi_q, phi_k, steps=0)[0]


if __name__ == "__main__":
    args = lab.options(__doc__)
    *texts, (q_new, k_new) = trained_layer(args)
    mimicry = lesson.mimicry()

    def measure(cell):
        torch.manual_seed(cell["seed"])
        q, k = texts[cell["seed"]]
        phi_q, phi_k = (Learned(cell["map"], q.shape[3], q.shape[1]) for _ in range(2))
        entropy, monotone, *_ = mimicry[cell["map"]]
        start = divergence(q_new, k_new, phi_q, phi_k)
        fitted = lesson.distil(q, k, phi_q, phi_k, steps=cell["fit_steps"], lr=cell["lr"])
        return {"entropy": entropy, "rank_correlation": monotone, "softmax_entropy": mimicry["softmax"][0],
                "at_first": start, "fitted": fitted[-1], "other_text": divergence(q_new, k_new, phi_q, phi_k)}

    names = [name for name in lesson.FEATURE_MAPS if name != "taylor_full"]
    fit = 15 if args.quick else 300
    cells = lab.grid(map=names[:2] if args.steps else names, fit_steps=[args.steps or fit],
                     lr=[1e-2] if args.quick else [1e-3, 3e-3, 1e-2], seed=[0] if args.quick else [0, 1, 2])
    rows = lab.sweep(args, "hedgehog", cells, measure)
    results = {key: lab.best(rows, ("map",), key, judge="-fitted") for key in ("at_first", "other_text")}
    fig, (left, right) = lab.figure(13, 4.5, columns=2)
    for name, (entropy, monotone, *_) in mimicry.items():
        left.plot(entropy, monotone, "o")
        left.annotate(name, (entropy, monotone), xytext=(4, 4), textcoords="offset points", fontsize=8)
    left.set(xlabel="entropy of the weights, nats (spiky: low)", ylabel="rank correlation with q . k (monotone: 1)",
             title="As they start, on random q and k")
    for i, (name,) in enumerate(results["other_text"]):
        for j, key in enumerate(results):
            mean, low, high = results[key][name,]
            right.bar(i + 0.4 * j - 0.2, mean, 0.38, yerr=[[mean - low], [high - mean]], color=f"C{j}", capsize=3,
                      label=("as it starts", "fitted")[j] if i == 0 else None)
        print(f"{name:18} divergence on other text {results['at_first'][name,][0]:8.4f} -> "
              f"{results['other_text'][name,][0]:.4f}")
    right.set_xticks(range(len(results["other_text"])), [name for name, in results["other_text"]], rotation=20)
    right.set(yscale="log", ylabel="divergence from softmax, nats", title="To a trained layer's weights, other text")
    right.legend()
    lab.save(fig, args.out / "hedgehog.png")

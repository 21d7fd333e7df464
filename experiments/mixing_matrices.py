"""The sequence mixing matrices of every mixer in one picture: Y = M V, and M is what they differ in (the talk's slide).

    python experiments/mixing_matrices.py [--quick]

Every mixer of every lesson as it starts (seed 0), on 48 random tokens, ten of which come twice; one head or channel
from the middle, red positive, blue negative. Writes mixing_matrices.png.
"""
import inspect

import lab
import torch
from lab import train

SKIP = ("relu", "cosformer", "taylor_full", "s4d_inv", "s4d_legs", "baseconv_short")      # as good as a neighbour


def matrix(name, make, ids, d_model=32):
    torch.manual_seed(0)
    heads = {"n_heads": 2} if train.options_of(make)["n_heads"] else {}
    small = {"max_len": 64} if "max_len" in inspect.signature(make.__init__).parameters else {}
    window = {"window": 12} if "window" in train.options_of(make) and name != "attention" else {}
    mixer = make(d_model, **heads, **small, **window)
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.02 * torch.randn_like(p)                                  # some start with zeros
        x = torch.nn.Embedding(int(ids.max()) + 1, d_model)(ids)
        reads = {"ids": ids, "prefix": 16}
        M = mixer.matrix(x, **{k: reads[k] for k in getattr(mixer, "reads", ())})[0]
    M = M.real if M.is_complex() else M
    return M[0] + M[len(M) // 2] if name == "jrt" else M[len(M) // 2]       # of jrt: decoder and encoder


if __name__ == "__main__":
    args = lab.options(__doc__)
    ids = torch.randperm(48, generator=torch.Generator().manual_seed(0))[None]
    ids[:, 30:40] = ids[:, 4:14]
    mixers = {name: make for name, make in train.from_lessons("MIXERS").items() if name not in SKIP}
    fig, axes = lab.figure(13, 14.5, rows=-(-len(mixers) // 7), columns=7)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (name, make) in zip(axes.flat, mixers.items(), strict=False):
        M = matrix(name, make, ids)
        others = (M - torch.diag(M.diagonal())).abs()                    # a skip connection would outshine the rest
        limit = others[others > 0].quantile(0.97).item()
        ax.imshow(M.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set_title(name if make.causal else f"{name} (sees all)", fontsize=13)
    fig.suptitle("Y = M V: what each token (row) takes from each other (column), in layers as they start.\n"
                 "Tokens 30 to 39 repeat tokens 4 to 13", fontsize=15)
    lab.save(fig, args.out / "mixing_matrices.png")

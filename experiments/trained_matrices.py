"""What trained models look at: one passage of code in which a name comes back, through six small models.

    python experiments/trained_matrices.py [--quick] [--draw] [--only attention,Based]

Each model has two layers, a short gated convolution and the mixer (Hyena and Mamba, which have a convolution in them:
two of these), is trained on the folder _inductor of the torch that is installed, and is asked, in a held-out file, for
the next token of a name that stood earlier. Drawn is, of all layers, heads and channels, the one that gives the token
to be looked up the largest share of its row. Writes trained_matrices.npz and trained_matrices.png (the matrices), and
docs/trained.png (the row, in the text). A model that is in the table is not trained again.
"""
from pathlib import Path

import lab
import numpy as np
import torch
from lab import train

MODELS = {"attention": "short_conv,attention", "convolution (Hyena)": "hyena,hyena", "Based": "short_conv,based",
          "Mamba": "mamba,mamba", "gated linear attention": "short_conv,gla", "delta rule": "short_conv,deltanet"}
SHOWN = ("attention", "convolution (Hyena)", "Based")            # in docs/trained.png
TEXT = Path(torch.__file__).parent / "_inductor"
LENGTH = 96


def passage(data):
    """The first held-out window in which a token pair that is at most three times in training comes twice, the second
    time near the end: ids: (t,), the place of the pair's second token, and the place that has to guess it again."""
    for start in range(0, len(data.val) - LENGTH, 16):
        ids = torch.from_numpy(data.val[start:start + LENGTH].astype(np.int64))[None]
        seen, count = data.bigram_statistics(ids[:, :-1], ids[:, 1:])
        for place in ((seen & (count <= 3))[0].nonzero()[:, 0]).tolist():
            pair = ids[0, place:place + 2]
            first = next(i for i in range(place) if torch.equal(ids[0, i:i + 2], pair))
            name = data.tokenizer.decode(pair.tolist()).strip()
            if place > LENGTH - 20 and place - first > 25 and name.isidentifier():
                return ids[0], first + 1, place
    raise SystemExit("no held-out window has a rare name twice")


def trained(spec, steps):
    args, _ = train.parse(["--mixer", spec, "--data", str(TEXT), "--context", "256", "--vocab_size", "1024",
                           "--steps", str(steps), "--batch_size", "4"])
    machine, data = train.Machine(args.device), train.Text(args)
    model = train.build_model(args, data.vocab_size).to(machine.device)
    optimizer = train.optimizer_for(model, args)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * train.schedule(step, args)
        batch = data.batch(args.batch_size, torch.Generator().manual_seed(step), step / steps)
        loss = train.train_step(model, optimizer, batch, args, machine)
        if step % 100 == 0:
            print(f"{spec}: step {step}/{steps}, loss {loss.item():.2f}", flush=True)
    return model.eval(), data


@torch.no_grad()
def look(model, ids, wanted, asks):
    """Of all layers, heads and channels the matrix with the largest share at the wanted token in the row that asks, and
    the chance that the model gives the right next token: (t, t), float."""
    device = next(model.parameters()).device
    ids = ids[None].to(device)
    x, extras, best = model.embed(ids[:, :-1]), {"ids": ids[:, :-1]}, (-1.0, None)
    for block in model.blocks:
        M = block.mixer.matrix(block.norm(x).float(), **block.inputs(extras))[0]             # (h or c, t, s)
        M = M.real if M.is_complex() else M
        share = M[:, asks, wanted].abs() / M[:, asks].abs().sum(dim=-1).clamp(min=1e-9)
        best = max(best, (share.max().item(), M[share.argmax()].cpu().numpy()), key=lambda pair: pair[0])
        x = block(x, extras)
    chance = model(ids[:, :-1])[0, asks].float().softmax(dim=-1)[ids[0, asks + 1]]
    return best[1], chance.item()


def draw_matrices(args, kept):
    fig, axes = lab.figure(15, 9.5, rows=2, columns=3)
    for i, ax in enumerate(axes.flat):
        name, M, chance = kept["names"][i], kept["M"][i], kept["chance"][i]
        off = np.abs(M - np.diag(np.diag(M)))
        limit = np.quantile(off[off > 0], 0.985)
        ax.imshow(M, cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.plot(kept["wanted"], kept["asks"], "s", ms=9, mfc="none", mec="black")
        ax.set(title=f"{name}: right with {chance:.0%}", xticks=[], yticks=[])
    axes[0, 0].set(ylabel="token that asks")
    axes[1, 0].set(ylabel="token that asks", xlabel="token that is looked at")
    fig.suptitle("Six trained models on one passage. Boxed: the token to be looked up")
    lab.save(fig, args.out / "trained_matrices.png")


def draw_rows(path, kept):
    """The text once for each of three models, each token as dark as the row that asks gives it weight."""
    tokens, asks, wanted = [str(t) for t in kept["tokens"]], int(kept["asks"]), int(kept["wanted"])
    fig, axes = lab.figure(11, 7.2, rows=len(SHOWN), columns=1)
    for ax, name in zip(axes.flat, SHOWN, strict=True):
        i = list(kept["names"]).index(name)
        row = np.abs(kept["M"][i][asks, :asks + 1])
        row, x, y = row / row.max(), 0.0, 0.0
        for s, token in enumerate(tokens[:asks + 1]):
            for j, piece in enumerate(token.split("\n")):
                x, y = (0.0, y - 1) if j or x > 84 else (x, y)
                shade = 1 - 0.85 * row[s]
                box = {"facecolor": (shade, shade, 1), "edgecolor": "black" if s == wanted else "none", "pad": 1.5,
                       "linewidth": 1.6}
                ax.text(x, y, piece or " ", family="monospace", fontsize=9, va="center", bbox=box,
                        color="white" if row[s] > 0.6 else "black")
                x += len(piece) + 0.6
        ax.text(x, y, f"  ... {tokens[asks + 1]}?", family="monospace", fontsize=9, va="center", color="darkred")
        ax.set(xlim=(-1, 96), ylim=(y - 1, 1))
        ax.axis("off")
        ax.set_title(f"{name}: gives the right next token {kept['chance'][i]:.0%}", loc="left", fontsize=11)
    lab.save(fig, path)


if __name__ == "__main__":
    args = lab.options(__doc__, only="these models, a,b,c")
    table, parts = args.out / "trained_matrices.npz", lab.ROOT / "runs" / "trained_matrices"
    if not args.draw:
        parts.mkdir(parents=True, exist_ok=True)
        for name in args.only.split(",") if args.only else MODELS:
            part = parts / f"{name.split()[0]}{'_quick' * args.quick}.npz"
            if not part.exists():
                model, data = trained(MODELS[name], args.steps or (5 if args.quick else 1500))
                ids, wanted, asks = passage(data)
                M, chance = look(model, ids, wanted, asks)
                print(f"{name:24} gives the right next token {chance:.1%}", flush=True)
                np.savez_compressed(part, M=M.astype(np.float32), chance=chance, wanted=wanted, asks=asks,
                                    tokens=[data.tokenizer.decode([i]) for i in ids.tolist()])
        found = [parts / f"{name.split()[0]}{'_quick' * args.quick}.npz" for name in MODELS]
        if not all(part.exists() for part in found):
            raise SystemExit("not there yet: " + ", ".join(part.stem for part in found if not part.exists()))
        found = [np.load(part) for part in found]
        np.savez_compressed(table, names=list(MODELS), M=np.stack([x["M"] for x in found]),
                            chance=[x["chance"] for x in found], machine=str(lab.machine()),
                            **{k: found[0][k] for k in ("tokens", "wanted", "asks")})
    kept = np.load(table)
    draw_matrices(args, kept)
    draw_rows((lab.ROOT / "docs" if not args.quick else args.out) / "trained.png", kept)

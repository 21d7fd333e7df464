"""What trained models look at: one passage in which a made-up name comes back, through six small models.

    python experiments/trained_matrices.py [--quick] [--draw]

The text is Shakespeare's plays in which every scene has names of its own (new_names.py), so that a name cannot be
known, only looked up. Each model has two layers, a short gated convolution and the mixer (Hyena and Mamba, which have a
convolution in them: two of these), and is asked to complete the name's second occurrence in a held-out scene. Drawn is
the last layer: of all heads or channels the one that gives the token to be looked up the largest share of its row.
Writes trained_matrices.npz, trained_matrices.png (the matrices) and docs/trained.png (the row, in the text).
"""
import lab
import new_names
import numpy as np
import torch
from lab import train

MODELS = {"attention": "short_conv,attention", "convolution (Hyena)": "hyena,hyena", "Based": "short_conv,based",
          "Mamba": "mamba,mamba", "gated linear attention": "short_conv,gla", "delta rule": "short_conv,deltanet"}
SHOWN = ("attention", "convolution (Hyena)", "Based")            # in docs/trained.png
LENGTH = 96


def passage(data):
    """The first held-out window in which a token pair that training has never seen comes twice, far apart: ids: (t,),
    the place of the first pair's second token, and the place that has to guess it again."""
    for start in range(0, len(data.val) - LENGTH, 16):
        ids = torch.from_numpy(data.val[start:start + LENGTH].astype(np.int64))[None]
        seen, count = data.bigram_statistics(ids[:, :-1], ids[:, 1:])
        for place in ((seen & (count == 0))[0].nonzero()[:, 0]).tolist():
            pair = ids[0, place:place + 2]
            first = next(i for i in range(place) if torch.equal(ids[0, i:i + 2], pair))
            letters = data.tokenizer.decode(pair.tolist())
            if place > LENGTH - 20 and place - first > 30 and letters.isalpha():
                return ids[0], first + 1, place
    raise SystemExit("no held-out window has a new name twice: another text, please")


def trained(spec, text, steps):
    args, _ = train.parse(["--mixer", spec, "--data", str(text), "--context", "256", "--vocab_size", "1024",
                           "--steps", str(steps), "--batch_size", "32", "--seed", "0"])
    machine, data = train.Machine(args.device), train.Text(args)
    model = train.build_model(args, data.vocab_size).to(machine.device)
    optimizer = train.optimizer_for(model, args)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * train.schedule(step, args)
        train.train_step(model, optimizer, data.batch(32, torch.Generator().manual_seed(step)), args, machine)
    return model.eval(), data


@torch.no_grad()
def look(model, ids, wanted, asks):
    """The last layer's matrix with the largest share at the wanted token in the row that asks, and the chance that the
    model gives the right next token: (t, t), float."""
    device = next(model.parameters()).device
    x, extras, ids = model.embed(ids[None, :-1].to(device)), {"ids": ids[None, :-1].to(device)}, ids.to(device)
    for block in model.blocks[:-1]:
        x = block(x, extras)
    block = model.blocks[-1]
    M = block.mixer.matrix(block.norm(x).float(), **block.inputs(extras))[0]
    M = M.real if M.is_complex() else M
    share = M[:, asks, wanted].abs() / M[:, asks].abs().sum(dim=-1).clamp(min=1e-9)
    chance = model(ids[None, :-1])[0, asks].float().softmax(dim=-1)[ids[asks + 1]]
    return M[share.argmax()].cpu().numpy(), chance.item()


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
    args = lab.options(__doc__)
    table = args.out / "trained_matrices.npz"
    if not args.draw:
        text = lab.ROOT / "runs" / "new_names.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text(new_names.text(), encoding="utf-8")
        found, where = [], None
        for name, spec in MODELS.items():
            model, data = trained(spec, text, args.steps or (5 if args.quick else 4000))
            where = where or passage(data)
            M, chance = look(model, *where)
            print(f"{name:24} gives the right next token {chance:.1%}", flush=True)
            found.append((name, M, chance))
        ids, wanted, asks = where
        names, matrices, chances = zip(*found, strict=True)
        tokens = [data.tokenizer.decode([i]) for i in ids.tolist()]
        np.savez_compressed(table, names=names, M=np.stack(matrices).astype(np.float32), chance=chances, tokens=tokens,
                            wanted=wanted, asks=asks, machine=str(lab.machine()))
    kept = np.load(table)
    draw_matrices(args, kept)
    draw_rows((lab.ROOT / "docs" if not args.quick else args.out) / "trained.png", kept)

"""What trained models look at: A 3 B 7 ... A ?, through six small models that were trained to answer.

    python experiments/trained_matrices.py [--quick] [--draw] [--only attention,Based]

Each model has two layers, a short gated convolution and the mixer (Hyena and Mamba, which have a convolution in them:
two of these), and learns multi-query associative recall (lesson 04's mqar, 4 pairs of 31 keys and 32 values in 32
tokens). Drawn is one question of a text that was not trained on: of all layers, heads and channels, the one that gives
the value to be looked up the largest share of the row that asks. Writes trained_matrices.npz and trained_matrices.png
(the matrices), and docs/trained.png (the row, in the text). A model in runs/trained_matrices is not trained again.
"""
import lab
import matplotlib.patches
import numpy as np
import torch
from lab import train

MODELS = {"attention": "short_conv,attention", "convolution (Hyena)": "hyena,hyena", "Based": "short_conv,based",
          "Mamba": "mamba,mamba", "gated linear attention": "short_conv,gla", "delta rule": "short_conv,deltanet"}
SHOWN = ("attention", "convolution (Hyena)", "Based")            # in docs/trained.png
FLAGS = "--task mqar:length=32:n_pairs=4:vocab_size=64 --d_model 64 --batch_size 64 --warmup 100"


def question(data):
    """Of a held-out text the last question: ids: (t,), the place of the value that it asks for, its own place, and the
    tokens as people write them."""
    ids, targets, _ = next(iter(data.held_out(1, 1)))
    ids, asks = ids[0], int((targets[0] != -100).nonzero()[-1])
    half = data.vocab_size // 2
    letters = [chr(64 + i) if i <= 26 else chr(70 + i) for i in range(half)]
    tokens = ["." if i == 0 else letters[i] if i < half else str(i - half) for i in ids.tolist()]
    return ids, int((ids[:asks] == targets[0, asks]).nonzero()[0]), asks, tokens


def trained(spec, steps):
    args, _ = train.parse([*FLAGS.split(), "--mixer", spec, "--steps", str(steps)])
    machine, data = train.Machine(args.device), train.Task(args)
    model = train.build_model(args, data.vocab_size).to(machine.device)
    optimizer = train.optimizer_for(model, args)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * train.schedule(step, args)
        batch = data.batch(args.batch_size, torch.Generator().manual_seed(step), step / steps)
        loss = train.train_step(model, optimizer, batch, args, machine)
        if step % 100 == 0:
            print(f"{spec}: step {step}/{steps}, loss {loss.item():.2f}", flush=True)
    return model.eval(), data, train.evaluate(model, data, args, machine, n_batches=8)["accuracy"]


@torch.no_grad()
def look(model, ids, wanted, asks):
    """Of all layers, heads and channels the matrix with the largest share at the wanted token in the row that asks:
    (t, t)."""
    ids = ids[None].to(next(model.parameters()).device)
    x, extras, best = model.embed(ids), {"ids": ids}, (-1.0, None)
    for block in model.blocks:
        M = block.mixer.matrix(block.norm(x).float(), **block.inputs(extras))[0]             # (h or c, t, s)
        M = M.real if M.is_complex() else M
        share = M[:, asks, wanted].abs() / M[:, asks].abs().sum(dim=-1).clamp(min=1e-9)
        best = max(best, (share.max().item(), M[share.argmax()].cpu().numpy()), key=lambda pair: pair[0])
        x = block(x, extras)
    return best[1]


def draw_matrices(args, kept):
    fig, axes = lab.figure(15, 9.5, rows=2, columns=3)
    for i, ax in enumerate(axes.flat):
        name, M, accuracy = kept["names"][i], kept["M"][i], kept["accuracy"][i]
        off = np.abs(M - np.diag(np.diag(M)))
        limit = np.quantile(off[off > 0], 0.985)
        ax.imshow(M, cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.plot(kept["wanted"], kept["asks"], "s", ms=9, mfc="none", mec="black")
        ax.set(title=f"{name}: {accuracy:.0%} right", xticks=[], yticks=[])
    axes[0, 0].set(ylabel="token that asks")
    axes[1, 0].set(ylabel="token that asks", xlabel="token that is looked at")
    fig.suptitle("Six models trained to recall, on one text that they have not seen. Boxed: the value to be looked up")
    lab.save(fig, args.out / "trained_matrices.png")


def draw_rows(path, kept):
    """The text once for each of three models, each token as dark as the row that asks gives it weight."""
    tokens, asks, wanted = [str(t) for t in kept["tokens"]], int(kept["asks"]), int(kept["wanted"])
    fig, axes = lab.figure(11, 3.6, rows=len(SHOWN), columns=1)
    for ax, name in zip(axes.flat, SHOWN, strict=True):
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


if __name__ == "__main__":
    args = lab.options(__doc__, only="these models, a,b,c")
    table, parts = args.out / "trained_matrices.npz", lab.ROOT / "runs" / "trained_matrices"
    if not args.draw:
        parts.mkdir(parents=True, exist_ok=True)
        for name in args.only.split(",") if args.only else MODELS:
            part = parts / f"{name.split()[0]}{'_quick' * args.quick}.npz"
            if not part.exists():
                model, data, accuracy = trained(MODELS[name], args.steps or (5 if args.quick else 1500))
                ids, wanted, asks, tokens = question(data)
                print(f"{name:24} {accuracy:.1%} right", flush=True)
                np.savez_compressed(part, M=look(model, ids, wanted, asks).astype(np.float32), accuracy=accuracy,
                                    wanted=wanted, asks=asks, tokens=tokens)
        found = [parts / f"{name.split()[0]}{'_quick' * args.quick}.npz" for name in MODELS]
        if not all(part.exists() for part in found):
            raise SystemExit("not there yet: " + ", ".join(part.stem for part in found if not part.exists()))
        found = [np.load(part) for part in found]
        np.savez_compressed(table, names=list(MODELS), M=np.stack([x["M"] for x in found]),
                            accuracy=[x["accuracy"] for x in found], machine=str(lab.machine()),
                            **{k: found[0][k] for k in ("tokens", "wanted", "asks")})
    kept = np.load(table)
    draw_matrices(args, kept)
    draw_rows((lab.ROOT / "docs" if not args.quick else args.out) / "trained.png", kept)

"""train.py's step against a plain GPT's on this CPU: tokens per second, side by side in one process.

The plain GPT is what nanoGPT's model computes, in PyTorch's own modules: learned positions, LayerNorm, fused SDPA, a GELU MLP
four times as wide, a tied head, AdamW. Same layers, width, heads, context, batch, vocabulary; parameters within 2%.

    python experiments/cpu_speed.py            prints the table and writes experiments/results/cpu_speed.csv
"""
import csv
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402


class PlainBlock(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(c, bias=False), nn.LayerNorm(c, bias=False)
        self.qkv, self.out = nn.Linear(c, 3 * c, bias=False), nn.Linear(c, c, bias=False)
        self.up, self.down = nn.Linear(c, 4 * c, bias=False), nn.Linear(4 * c, c, bias=False)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    def __init__(self, args, vocab_size):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab_size, args.d_model), nn.Embedding(args.context, args.d_model)
        self.blocks = nn.Sequential(*(PlainBlock(args.d_model, args.n_heads) for _ in range(args.n_layers)))
        self.norm = nn.LayerNorm(args.d_model, bias=False)

    def forward(self, ids):
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        return F.linear(self.norm(self.blocks(x)), self.embed.weight)


def plain_step(model, optimizer, batch):
    """One update, as in nanoGPT's loop."""
    ids, targets, _ = batch
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def measure(flags, rounds=40):
    """Tokens per second of both, from the medians of alternating steps."""
    args, _ = train.parse(flags.split())
    machine, data = train.Machine("cpu"), train.Text(args)
    ours = train.build_model(args, data.vocab_size)
    plain = PlainGPT(args, data.vocab_size)
    optimizers = train.optimizer_for(ours, args), torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True)
    times = [], []
    for i in range(rounds + 3):
        batch = data.batch(args.batch_size, torch.Generator().manual_seed(i))
        start = time.perf_counter()
        train.train_step(ours, optimizers[0], batch, args, machine).item()
        middle = time.perf_counter()
        plain_step(plain, optimizers[1], batch)
        times[0].append(middle - start)
        times[1].append(time.perf_counter() - middle)
    speeds = [args.batch_size * args.context / statistics.median(t[3:]) for t in times]
    sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, plain)]
    return speeds, sizes


if __name__ == "__main__":
    rows = []
    for name, flags in {"train.py's default": "", "4 x 192, context 256": "--n_layers 4 --d_model 192 --context 256",
                        "nanoGPT's CPU example": "--n_layers 4 --d_model 128 --context 64 --batch_size 12 --tokenizer byte"}.items():
        (ours, plain), (n_ours, n_plain) = measure(flags)
        rows.append({"setting": name, "flags": flags, "tokens_per_s": round(ours), "plain_gpt_tokens_per_s": round(plain),
                     "ratio": round(ours / plain, 3), "parameters": n_ours, "plain_gpt_parameters": n_plain,
                     "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
                     "torch": torch.__version__})
        print(f"{name:24} train.py {ours:>8,.0f} tokens/s   plain GPT {plain:>8,.0f} tokens/s   ratio {ours / plain:.2f}", flush=True)
    with open(Path(__file__).parent / "results" / "cpu_speed.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)

"""train.py's step against a plain GPT's on this CPU: tokens per second, side by side.

The plain GPT is what nanoGPT's model computes, in PyTorch's own modules: learned positions, LayerNorm, fused SDPA, a
GELU MLP four times as wide, a tied head, AdamW. Layers, width, heads, context, batch and vocabulary are the same.

    python experiments/cpu_speed.py            prints the table and writes experiments/results/cpu_speed.csv
"""
import csv
import functools
import multiprocessing
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
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


def seconds(step, data, args, i):
    batch = data.batch(args.batch_size, torch.Generator().manual_seed(i))
    start = time.perf_counter()
    step(batch)
    return time.perf_counter() - start


def measure(flags, rounds=40):
    """Tokens per second from medians: the plain GPT as it runs by itself; then, with glibc told to keep its memory (as
    train.py does), both in turns. To be called once in a process: the memory setting cannot be taken back."""
    args, _ = train.parse(["--optimizer", "adamw", *flags.split()])
    data = train.Text(args)
    ours, plain = train.build_model(args, data.vocab_size), PlainGPT(args, data.vocab_size)
    plain_step_ = functools.partial(plain_step, plain, torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True))
    alone = [seconds(plain_step_, data, args, i) for i in range(rounds)]
    machine, optimizer = train.Machine("cpu"), train.optimizer_for(ours, args)
    our_step = functools.partial(train.train_step, ours, optimizer, args=args, machine=machine)
    turns = [(seconds(our_step, data, args, i), seconds(plain_step_, data, args, i)) for i in range(rounds)]
    times = {"train_py": [t[0] for t in turns], "plain_gpt": alone, "plain_gpt_keeping_memory": [t[1] for t in turns]}
    speeds = {name: round(args.batch_size * args.context / statistics.median(t[3:])) for name, t in times.items()}
    sizes = {"parameters": sum(p.numel() for p in ours.parameters()),
             "plain_gpt_parameters": sum(p.numel() for p in plain.parameters())}
    return speeds | {"ratio": round(speeds["train_py"] / speeds["plain_gpt"], 2),
                     "ratio_keeping_memory": round(speeds["train_py"] / speeds["plain_gpt_keeping_memory"], 2)} | sizes


SETTINGS = {"default size of train.py": "--mixer attention",
            "4 x 192, context 256": "--mixer attention --n_layers 4 --d_model 192 --context 256",
            "nanoGPT's CPU example": "--mixer attention --n_layers 4 --context 64 --batch_size 12 "
                                     "--tokenizer byte"}

if __name__ == "__main__":
    where = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__}
    rows = []
    for name, flags in SETTINGS.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(measure, flags).result()
        rows.append({"setting": name, "flags": flags} | row | where)
        print(f"{name:24} tokens/s: train.py {row['train_py']:,}   plain GPT {row['plain_gpt']:,}, "
              f"keeping memory {row['plain_gpt_keeping_memory']:,}   "
              f"ratios {row['ratio']:.2f}, {row['ratio_keeping_memory']:.2f}", flush=True)
    with open(Path(__file__).parent / "results" / "cpu_speed.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)

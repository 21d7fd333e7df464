"""The loss, -log softmax(logits)[target], whose gradient softmax - 1_target is made where the log-softmax lies.

Of n tokens and v words, logits, log-softmax and gradient are n v numbers each, by far the largest arrays of a small
model: 16 x 128 tokens and 4096 words are 34 MB in float32. PyTorch's cross_entropy has the last two at once in memory,
here there is one. What it gives is the same: see tests/test_train.py.
"""
import torch


def cross_entropy(logits, targets):
    """-log softmax(logits)[target]: (n, v) and (n,) -> (n,). Computed in float32 or better; the gradient is rounded to
    the logits' precision as it leaves. It takes the log-softmax's memory, so one backward pass is all (unless with
    create_graph); RuntimeError for another."""
    return CrossEntropy.apply(logits, targets)[0]


class CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target]: (n,), and the log-softmax: (n, v). It is an output so that a gradient of the
    gradient, which depends on the logits through it, finds its way back."""

    @staticmethod
    def forward(ctx, logits, targets):
        log_p = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        ctx.save_for_backward(log_p, targets)
        ctx.set_materialize_grads(False)
        ctx.dtype = logits.dtype
        return -log_p.gather(1, targets[:, None])[:, 0], log_p

    @staticmethod
    def backward(ctx, grad, grad_log_p):
        log_p, targets = ctx.saved_tensors
        if torch.is_grad_enabled() or grad is None or grad_log_p is not None:                        # with create_graph
            p, grad = log_p.exp(), log_p.new_zeros(len(log_p)) if grad is None else grad
            d = p.scatter_add(1, targets[:, None], torch.full_like(p[:, :1], -1)) * grad[:, None]
            d = d if grad_log_p is None else d + grad_log_p - p * grad_log_p.sum(1, keepdim=True)
            return d.to(ctx.dtype), None
        p = log_p.exp_()
        p.scatter_add_(1, targets[:, None], torch.full_like(p[:, :1], -1))
        rounded = p if p.dtype == ctx.dtype else torch.empty_like(p, dtype=ctx.dtype)
        return torch.mul(p, grad[:, None], out=rounded), None

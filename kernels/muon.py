"""Muon, an optimizer for matrices [J24]: Jordan et al. 2024, kellerjordan.github.io/posts/muon.

A gradient G = U S V^T of a layer's weights has few large singular values: the directions that all tokens ask for. A
step along G, also with each number scaled by itself as AdamW does, goes far in these and hardly in the others. Muon
goes along U V^T of the averaged gradient, equally far in all directions. A step of train.py on two CPU cores takes a
tenth longer with it. No SVD is needed: five steps of Newton's and Schulz's iteration, three products each.
"""
import torch


def orthogonal(G):
    """About U V^T, for matrices G = U S V^T: (n, i, j). Five times, each singular value x, of at most 1, becomes
    3.4445 x - 4.7750 x^3 + 2.0315 x^5: all but the smallest then lie between 0.7 and 1.2.

        A = X X^T      X <- 3.4445 X + (2.0315 A A - 4.7750 A) X"""
    X = (G.mT if G.shape[1] > G.shape[2] else G) / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.mT if G.shape[1] > G.shape[2] else X


class Muon(torch.optim.AdamW):
    """Muon for the groups with a "momentum", each of matrices of one shape, which are made orthogonal at once; AdamW
    for others. Weight decay is AdamW's in both: p <- (1 - lr decay) p."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if "momentum" in group and p.grad is not None]
            for p in params:
                if not self.state[p]:                        # AdamW wants a step in every state that it loads
                    self.state[p].update(step=torch.zeros(()), momentum=torch.zeros_like(p))
            if not params:
                continue
            grads, means = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            torch._foreach_lerp_(grads, means, group["momentum"])                                      # Nesterov's
            G = torch.stack(grads)
            X = orthogonal(G.bfloat16() if G.is_cuda else G).to(G.dtype)     # 16 bits are enough, and faster on a GPU
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, (-group["lr"] * max(1, G.shape[1] / G.shape[2]) ** 0.5 * X).unbind())
            for p in params:
                p.grad = None                                # AdamW passes over what has no gradient
        super().step()

"""What the kernels share: tiles of tensors (b, t, h, d), which is how a lesson's heads lie in memory."""
import torch.nn.functional as F
import triton
import triton.language as tl


@triton.jit
def load(x, rows, cols, end, stride, WIDTH: tl.constexpr, MASK: tl.constexpr = True):
    """A tile of a head: these rows of it, `stride` numbers apart, and these of its WIDTH columns; 0 from row `end`
    on. MASK=False: all rows are before it."""
    at = x + rows[:, None] * stride + cols[None, :]
    if cols.shape[0] != WIDTH:
        x_i = tl.load(at, mask=(rows[:, None] < end) & (cols[None, :] < WIDTH), other=0.0)
    elif MASK:
        x_i = tl.load(at, mask=rows[:, None] < end, other=0.0)
    else:
        x_i = tl.load(at)
    return x_i


@triton.jit
def store(x, x_i, rows, cols, end, stride, WIDTH: tl.constexpr):
    """Write a tile back, in x's dtype."""
    mask = (rows[:, None] < end) & (cols[None, :] < WIDTH)
    tl.store(x + rows[:, None] * stride + cols[None, :], x_i.to(x.dtype.element_ty), mask=mask)


@triton.jit
def place(head, H, HEADS, T, WIDTH: tl.constexpr):
    """Where head (b, h) of H begins in a (b, t, HEADS, WIDTH) tensor; if HEADS < H, several share one."""
    return (head // H).to(tl.int64) * T * HEADS * WIDTH + head % H // (H // HEADS) * WIDTH


def in_one_piece(x, multiple=1):
    """(b, h, t, d) -> (b, t, h, d). Nothing is copied if x is a lesson's heads and d a multiple of `multiple`; if not,
    zeros fill up. ValueError for sequences so large that 32 bits cannot count their numbers."""
    x, missing = x.transpose(1, 2), -x.shape[-1] % multiple
    if x.shape[1] * x.shape[2] * (x.shape[3] + missing) >= 2 ** 31:
        raise ValueError(f"a sequence of {x.shape[1]} x {x.shape[2]} heads x {x.shape[3]} numbers: the kernels count "
                         "to 2^31 in a sequence; split it, and go on from the state")
    return (F.pad(x, (0, missing)) if missing else x).contiguous()

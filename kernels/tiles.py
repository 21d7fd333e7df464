"""What the kernels share: tiles of tensors (b, t, h, d), which is how a lesson's heads lie in memory; launches that
cost the host little; what a device has room for; gradients of gradients."""
import warnings

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.runtime import driver

ROOM = 232448                    # bytes of shared memory for a program where there is no GPU: as on an H100
SAID = set()
LAUNCHED, PROPERTIES = {}, {}


@triton.jit
def load(x, rows, cols, end, stride, WIDTH: tl.constexpr, MASK: tl.constexpr = True):
    """A tile of a head: these rows of it, `stride` numbers apart, and these of its WIDTH columns (if as many as WIDTH,
    all of them); 0 from row `end` on. MASK=False: all rows are before it."""
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


def cdiv(a, b):
    """a / b, rounded up. (triton.cdiv and triton.next_power_of_2 are made for kernels; on the host a call takes 10
    microseconds, as long as a launch.)"""
    return -(-a // b)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()


def run(kernel, grid, *args, **sizes):
    """kernel[grid](*args, **sizes). A GPU does in microseconds what Triton takes 20 to 60 to launch: at each call it
    looks through all arguments for what the compiled kernel may depend on. Here that is a key, under which the compiled
    kernel is found again."""
    if torch.compiler.is_compiling() or not isinstance(kernel, triton.JITFunction):          # or it is interpreted
        return kernel[grid](*args, **sizes)
    kinds = [(x.dtype, x.data_ptr() % 16) if type(x) is torch.Tensor else kind(x) for x in args]
    key = kernel, driver.active.get_current_device(), *sizes, *sizes.values(), *kinds
    compiled, constants = LAUNCHED.get(key, (None, None))
    if compiled is None:
        constants = [sizes.get(p.name, p.default) for p in kernel.params[len(args):]]
        LAUNCHED[key] = kernel[grid](*args, **sizes), constants
    else:
        compiled[(*grid, 1, 1)](*args, *constants)


def kind(x):
    """What a compiled kernel may depend on in an argument: of numbers, whether they are 1, and divisible by 16."""
    if isinstance(x, torch.Tensor):                              # a parameter
        return x.dtype, x.data_ptr() % 16
    if hasattr(x, "block_shape"):                                # a tensor's descriptor, of Triton's or of Gluon's kind
        return x.base.dtype, *x.block_shape
    return x


def check_dtypes(**tensors):
    """ValueError for tensors whose numbers the kernels do not compute with."""
    for name, x in tensors.items():
        if x is not None and x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} of {x.dtype}: the kernels take float32, bfloat16 and float16")


def in_one_piece(x, multiple=1):
    """(b, h, t, d) -> (b, t, h, d). Nothing is copied if x is a lesson's heads and d a multiple of `multiple`; if not,
    zeros fill up. ValueError for sequences so large that 32 bits cannot count their numbers."""
    x, missing = x.transpose(1, 2), -x.shape[-1] % multiple
    if x.shape[1] * x.shape[2] * (x.shape[3] + missing) >= 2 ** 31:
        raise ValueError(f"a sequence of {x.shape[1]} x {x.shape[2]} heads x {x.shape[3]} numbers: the kernels count "
                         "to 2^31 in a sequence; split it, and go on from the state")
    return (F.pad(x, (0, missing)) if missing else x).contiguous()


def without_zeros(x, width):
    """Undo in_one_piece: (b, t, h, d) -> (b, h, t, width)."""
    x = x.transpose(1, 2)
    return x if x.shape[-1] == width else x[..., :width]     # a slice, be it of all, has a copy for its gradient


def state_without_zeros(S, d, e):
    """The same for a state: (b, h, d, e)."""
    return S if S.shape[2:] == (d, e) else S[:, :, :d, :e]


def properties(device):
    """A GPU's, which PyTorch takes microseconds to tell: it is asked once."""
    if device not in PROPERTIES:
        PROPERTIES[device] = torch.cuda.get_device_properties(device)
    return PROPERTIES[device]


@torch.compiler.assume_constant_result       # asked once, also when torch.compile looks on
def shared_memory(device):
    """Bytes of it that a program can have: 232448 on an H100, 166912 on an A100, 101376 on the RTX cards since 2020."""
    return properties(device).shared_memory_per_block_optin if device.type == "cuda" else ROOM


@torch.compiler.assume_constant_result
def no_room(what, n_bytes, device):
    """Does a kernel ask for more shared memory than the device has? Then PyTorch computes it, which is said once."""
    if n_bytes <= shared_memory(device):
        return False
    if what not in SAID:
        SAID.add(what)
        warnings.warn(f"{what}: the kernel needs {n_bytes} bytes of shared memory, of which this device has "
                      f"{shared_memory(device)}; PyTorch computes it instead, which is slower", stacklevel=3)
    return True


def differentiable_gradients(twin, tensors, gradients):
    """The gradients of `tensors`, None where none is needed, from those of the outputs of twin(*tensors), by PyTorch.
    A kernel's backward returns them where torch.is_grad_enabled(): there it says that gradients will be differentiated
    themselves (create_graph=True), and of what a kernel has written autograd knows nothing."""
    with torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        own = [x if x is None else x.view_as(x) for x in tensors]            # apart, also if one is made from another
        wide = [x if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in own]
        outputs = twin(*wide)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs, gradients = zip(*((y, dy.to(y.dtype)) for y, dy in zip(outputs, gradients, strict=True)
                                   if dy is not None), strict=True)
        wanted = [x for x in own if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
        return tuple(next(found) if x is not None and x.requires_grad else None for x in own)

#!/usr/bin/env bash
# triton 3.7.1, torch 2.13.0, CPU: under TRITON_INTERPRET=1 a float32 is cut to bfloat16, not rounded to the nearest
# one, even where the kernel asks for fp_downcast_rounding="rtne" (to nearest, ties to even). Every result errs
# towards zero, by 0.27% on average, so a sum of such values does not average the error out. The guess was torch's
# cast, bit for bit. Issues 8322 and 11897 of triton are about the interpreter's rounding to 8 bits; none about this
# was found in November 2026. Seen: "torch: 499 of 1024 larger, mean error -0.005%; default: 0 of 1024 larger, mean
# error -0.270%; rtne: 0 of 1024 larger, mean error -0.270%".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat > "$folder/cast.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, default, rtne, n: tl.constexpr):
    i = tl.arange(0, n)
    value = tl.load(x + i)
    tl.store(default + i, value.to(tl.bfloat16))
    tl.store(rtne + i, value.to(tl.bfloat16, fp_downcast_rounding="rtne"))


torch.manual_seed(0)
x = torch.rand(1024)
default, rtne = torch.zeros(2, 1024, dtype=torch.bfloat16)
cast[(1,)](x, default, rtne, 1024)
errors = [(y.float() - x) / x for y in (x.bfloat16(), default, rtne)]
larger = [(error > 0).sum().item() for error in errors]
print(f"triton {triton.__version__}, torch {torch.__version__}")
print("; ".join(f"{name}: {m} of 1024 larger, mean error {error.mean().item():.3%}"
                for name, m, error in zip(("torch", "default", "rtne"), larger, errors)))
sys.exit(not (larger[0] > 400 and larger[1:] == [0, 0]))
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/cast.py"

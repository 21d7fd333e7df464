#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.Generator().manual_seed(n) takes any 64-bit n, and initial_seed() gives it back, but random
# numbers depend on its lower 32 bits only: seeds 5 and 2**32 + 5 draw the same. The guess was that seed * 2**32 + step
# would keep seeds apart, as it does in numpy 2.4.6. Seen: "same numbers: True; numpy: False".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import torch

low, high = 5, 2 ** 32 + 5
draws = [torch.randint(10 ** 9, (4,), generator=torch.Generator().manual_seed(seed)) for seed in (low, high)]
same = torch.equal(*draws)
kept = torch.Generator().manual_seed(high).initial_seed() == high
numpy_same = np.array_equal(*(np.random.default_rng(seed).integers(10 ** 9, size=4) for seed in (low, high)))
print(f"torch {torch.__version__}, numpy {np.__version__}")
print(f"initial_seed() is the whole number: {kept}; same numbers: {same}; numpy: {numpy_same}")
sys.exit(not (kept and same and not numpy_same))
PYTHON

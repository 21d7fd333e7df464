"""python -m kernels [NAME ...] [--time] [--peers]: all tables, or some, in one run on one card; the one `called` is of
what Python adds. What is printed is also written to kernels/results/NAME.txt; what --check prints, to
NAME_check.txt."""
import contextlib
import sys
import time
import traceback
from pathlib import Path

from kernels import bench, tables

NAMES = ("flash_attention", "fft_conv", "linear_attention", "gla", "called", "delta_rule", "selective_scan", "scan",
         "taylor_attention", "step")
RESULTS = Path(__file__).parent / "results"


class Both:
    """Two files to write to as to one."""

    def __init__(self, *files):
        self.files = files

    def write(self, text):
        for file in self.files:
            file.write(text)

    def flush(self):
        for file in self.files:
            file.flush()


def main(names):
    """Each table in turn. One that fails says so, and the others follow; returns whether one did."""
    bench.need_a_gpu()
    failed = False
    for name in names:
        start, path = time.time(), RESULTS / f"{name}{'_check' if '--check' in sys.argv else ''}.txt"
        with open(path, "w", encoding="utf-8") as file, contextlib.redirect_stdout(Both(sys.stdout, file)):
            try:
                getattr(tables, name)()
            except Exception as error:
                failed = True
                print(f"{name} stopped here: {type(error).__name__}: {error}")
                traceback.print_exc()
        print(f"{name} took {time.time() - start:.0f} s\n", flush=True)
    return failed


if __name__ == "__main__":
    chosen = [name for name in sys.argv[1:] if not name.startswith("--")]
    if unknown := [name for name in chosen if name not in NAMES]:
        sys.exit(f"no table {unknown[0]}; there are {', '.join(NAMES)}")
    sys.exit(main(chosen or [name for name in NAMES if name != "called" or "--check" not in sys.argv]))

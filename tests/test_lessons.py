"""A lesson stands alone: copied into an empty folder it runs with torch and numpy, and no other file of the repo."""
import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

import train

LESSONS = sorted(train.ROOT.glob("0*_*.py"))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_runs_alone_and_its_forms_agree(lesson, tmp_path):
    shutil.copy(lesson, tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, lesson.name], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    differences = [float(word) for word in done.stdout.split() if re.fullmatch(r"\d(\.\d+)?e[-+]\d+", word)]
    assert differences and max(differences) < 1e-9, done.stdout


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_draws_its_picture(lesson, tmp_path):
    shutil.copy(lesson, tmp_path)
    command = [sys.executable, lesson.name, "--plot", "M.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "M.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "M.png").stat().st_size > 10000


@pytest.mark.parametrize("file, words", [("no/folder/M.png", "No such file"), ("M.nonsense", "nonsense")])
def test_a_picture_that_cannot_be_written_is_said_in_one_line(file, words, tmp_path):
    shutil.copy(LESSONS[0], tmp_path)
    command = [sys.executable, LESSONS[0].name, "--plot", file]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and f"error: --plot {file}: " in last and words in last and "Trace" not in done.stderr


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_imports_only_torch_and_numpy_at_the_top(lesson):
    body = ast.parse(lesson.read_text()).body
    names = [a.name for n in body if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in body if isinstance(n, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {"torch", "numpy"} | sys.stdlib_module_names

"""The README's code runs as it stands, its links lead somewhere, and its own mixer keeps every promise."""
import re

import pytest
import torch
from harness import check_forms, check_matrix, check_split, sees_future

import train

README = (train.ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README + (train.ROOT / "docs" / "your_own.md").read_text("utf-8"), re.S)
PAGES = [train.ROOT / "README.md", *sorted((train.ROOT / "docs").glob("*.md")), train.ROOT / "kernels" / "README.md",
         train.ROOT / "experiments" / "README.md", train.ROOT / "docs" / "explore" / "README.md"]


def test_the_ten_lines_show_equal_forms(capsys):
    exec(BLOCKS[0], {})
    numbers = [float(word) for word in capsys.readouterr().out.split()]
    assert len(numbers) == 4 and max(numbers) < 1e-12


def test_a_mixer_of_your_own_is_one():
    names = {}
    exec(BLOCKS[1], names)
    mixer = names["Fade"](32).double()
    with torch.no_grad():
        mixer.a.normal_()
    for t in (1, 2, 65):
        check_forms(mixer, t)
        check_matrix(mixer, t)
    check_split(mixer, 70, 33, 50)
    assert not any(sees_future(mixer, form) for form in mixer.forms) and mixer.state_size(100) == 32
    for refused in (lambda: mixer(torch.zeros(1, 3, 32), "nonsense"), lambda: mixer.prefill(torch.zeros(1, 0, 32))):
        with pytest.raises(ValueError):
            refused()


def test_a_mixer_of_your_own_is_trained_by_its_name(tmp_path, monkeypatch):
    names = {}
    exec(BLOCKS[1], names)
    lesson = train.importlib.import_module("03_ssm")
    monkeypatch.setitem(lesson.MIXERS, "fade", names["Fade"])
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 200)
    scores = train.main(["--mixer", "fade", "--data", str(tmp_path / "text.txt"), "--tokenizer", "byte", "--steps", "3",
                         "--d_model", "16", "--context", "16", "--batch_size", "2", "--n_tokens", "2",
                         "--out", str(tmp_path / "run")])
    assert scores["loss"] > 0


def headings(page):
    """The anchors of a page: its headings, small, without points and the like, with - for each space."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "]", title).lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(train.ROOT).as_posix())
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if not path.startswith(("http:", "https:")):
            assert not path or (page.parent / path).exists(), f"{page.name}: {target}"
            if anchor and (not path or path.endswith(".md")):
                assert anchor in headings(page.parent / path if path else page), f"{page.name}: {target}"


def test_every_mixer_is_in_the_table():
    table = (train.ROOT / "docs" / "mixers.md").read_text(encoding="utf-8")
    for name, make in train.from_lessons("MIXERS").items():
        assert f"| `{name}`" in table, f"{name} is not in docs/mixers.md"
        assert make is not None

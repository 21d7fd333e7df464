"""The plays, with new names for all who speak in each scene: a text whose names cannot be known, only looked up.

    python experiments/new_names.py plays.txt

In the plays as they are a name is met so often that a small model learns it by heart. Here it is made up for one scene,
so that whoever is to spell it has to find it earlier in the text.
"""
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402

STARTS = "b br c ch d dr f fl g gr h j k l m n p pr qu r s sh st t tr v w z".split()
VOWELS = "a e i o u ai ea io ou".split()
ENDS = ["", "", *"l ld m n nt r rd s ss t th x".split()]


def made_up(rng):
    """Two or three syllables."""
    return "".join(rng.choice(STARTS) + rng.choice(VOWELS) + rng.choice(ENDS) for _ in range(rng.choice((2, 2, 3))))


def rename(scene, common, rng):
    """A scene in which the words of the speakers' names, but for the common ones, are others, each in its own case."""
    speakers = re.findall(r"^\*\*(.+?)\*\*", scene, re.M)
    names = {word.lower() for speaker in speakers for word in re.findall(r"[^\W_]{3,}", speaker)} - common
    new = {name: made_up(rng) for name in sorted(names)}

    def other(match):
        word = match[0]
        name = new.get(word.lower(), word)
        return name if name == word else name.upper() if word.isupper() else name.title()
    return re.sub(r"[^\W_]+", other, scene)


def text():
    """All plays, scene by scene, each with names of its own: the same at every call."""
    plays = "".join(path.read_text(encoding="utf-8") for path in train.corpus_files())
    common, rng = set(re.findall(r"\b[a-z]+\b", plays)), random.Random(0)
    return "".join(rename(scene, common, rng) for scene in re.split(r"(?=^### )", plays, flags=re.M))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text(), encoding="utf-8")

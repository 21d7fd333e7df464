"""Every citation of the lessons and kernels, [tag] or [tag, eq. n], stands in docs/papers.md, with the place that it
names; one tag is one paper everywhere, and nothing stands in the table that nobody cites."""
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LESSONS = sorted(ROOT.glob("0*_*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
TABLE = ROOT / "docs" / "papers.md"

TAG = r"[A-Z][A-Za-z]{0,3}\d\d[a-z]?"
CITED = re.compile(rf"\[(?={TAG}[\],;])([^\[\]]*)\]")
UNTAGGED = re.compile(r"\[[A-Z][^\[\]]*\b(?:19|20)\d\d\b[^\[\]]*\]")
LISTED = re.compile(rf"\[({TAG})\] +(\w+)(.*?)(?=\[{TAG}\]|\n|$)")
KINDS = "eq.", "section", "algorithm", "theorem", "lemma", "prop.", "figure", "table", "appendix"
PLACE = re.compile("|".join(re.escape(kind) for kind in KINDS) + r"|\bcode\b|\b\d+(?:\.\d+)*[a-z]?(?:-\d+)?")
STATUS = "seen", "second hand", "from memory"


def places(text):
    """'eq. 11-12, 16 and code' -> {'eq. 11', 'eq. 12', 'eq. 16', 'code'}. A number belongs to the kind of place that
    was named last; one without any names no place."""
    found, kind = set(), None
    for word in PLACE.findall(text):
        if word == "code":
            found.add(word)
        elif word in KINDS:
            kind = word
        elif kind and "-" in word:
            first, last = map(int, word.split("-"))
            found |= {f"{kind} {n}" for n in range(first, last + 1)}
        elif kind:
            found.add(f"{kind} {word}")
    return found


def prose(source):
    """The strings and comments of a source, each with the number of its first line."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            yield token.start[0], token.string


def citations(source):
    """(line, tag, places) of all that is cited, but for the list of papers. [V17, eq. 1; S21] cites two of them."""
    for start, text in prose(source):
        list_of_papers = range(*papers_in(text))
        for cited in CITED.finditer(text):
            for part in cited[1].split(";"):
                tag, _, rest = part.strip().partition(",")
                if re.fullmatch(TAG, tag) and cited.start() not in list_of_papers:
                    yield start + text.count("\n", 0, cited.start()), tag, places(rest)


def papers_in(text):
    """Where a docstring's list of papers begins and ends: from the word Papers to an empty line."""
    begin = text.find("\nPapers ")
    return (0, 0) if begin < 0 else (begin, text.find("\n\n", begin + 1))


def own_list(source):
    """What a lesson's docstring says of its papers: (line, tag, first word of the authors, the rest with the arXiv
    number)."""
    start, docstring = next(prose(source))
    begin, end = papers_in(docstring)
    for entry in LISTED.finditer(docstring, begin, end):
        yield start + docstring.count("\n", 0, entry.start()), entry[1], entry[2], entry[3]


def table(text):
    """Rows | [tag] | paper | arXiv | places, with the mixers in backticks | status | as (line, tag, paper, arXiv,
    places, status)."""
    for line, row in enumerate(text.splitlines(), 1):
        cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
        if re.fullmatch(rf"\[{TAG}\]", cells[0]):
            assert len(cells) == 5, f"docs/papers.md:{line}: a row has five cells, not {len(cells)}"
            yield line, cells[0][1:-1], *cells[1:3], places(re.sub("`[^`]*`", "", cells[3])), cells[4]


def wrong_rows(text):
    """What is wrong within the table."""
    rows, errors = list(table(text)), []
    for column, what in ((1, "tag"), (2, "paper"), (3, "arXiv number")):
        first = {}
        for row in rows:
            key = row[column].split()[0] if column == 3 else row[column]
            if first.setdefault(key, row) is not row and key != "-":
                errors.append(f"docs/papers.md:{row[0]}: the {what} {key} stands in line {first[key][0]} already")
    errors += [f"docs/papers.md:{row[0]}: the status of [{row[1]}] must begin with one of {', '.join(STATUS)}"
               for row in rows if not row[5].startswith(STATUS)]
    return errors


def wrong_citations(name, source, text):
    """What is wrong with a file's citations, given the table."""
    rows, errors = {row[1]: row for row in table(text)}, []
    for line, tag, cited in citations(source):
        if tag not in rows:
            errors.append(f"{name}:{line}: [{tag}] is not in docs/papers.md")
        else:
            errors += [f"{name}:{line}: docs/papers.md does not list {place} of [{tag}]" for place in
                       sorted(cited - rows[tag][4])]
    for start, string in prose(source):
        errors += [f"{name}:{start + string.count(chr(10), 0, found.start())}: {found[0]} has no tag"
                   for found in UNTAGGED.finditer(string) if not CITED.fullmatch(found[0])]
    return errors


def wrong_list(name, source, text):
    """What is wrong with a lesson's own list of papers: it must name what the lesson cites, as the table does."""
    rows, errors, listed = {row[1]: row for row in table(text)}, [], Counter()
    for line, tag, author, rest in own_list(source):
        listed[tag] += 1
        number = re.search(r"\d{4}\.\d{4,5}|$", rest)[0] or "-"
        if tag not in rows:
            errors.append(f"{name}:{line}: [{tag}] is not in docs/papers.md")
        elif not rows[tag][2].startswith(author):
            errors.append(f"{name}:{line}: [{tag}] is {author} here, but {rows[tag][2]} in docs/papers.md")
        elif number != rows[tag][3].split()[0]:
            errors.append(f"{name}:{line}: [{tag}] is {number} here, but {rows[tag][3]} in docs/papers.md")
        if listed[tag] > 1:
            errors.append(f"{name}:{line}: [{tag}] is listed twice")
    cited = {tag: line for line, tag, _ in reversed(list(citations(source)))}
    return (errors + [f"{name}:{line}: [{tag}] is not among this lesson's papers" for tag, line in cited.items()
                      if tag not in listed]
            + [f"{name}: [{tag}] is among this lesson's papers, but not cited" for tag in listed if tag not in cited])


def unused(sources, text):
    """Tags and places of the table that no source cites."""
    cited = Counter()
    for source in sources:
        for _, tag, where in citations(source):
            cited.update([tag, *((tag, place) for place in where)])
    return [f"docs/papers.md:{line}: nobody cites {f'{place} of ' if place else ''}[{tag}]"
            for line, tag, _, _, listed, _ in table(text)
            for place in ([None] if not cited[tag] else sorted(p for p in listed if not cited[tag, p]))]


def test_the_table_names_each_paper_once():
    errors = wrong_rows(TABLE.read_text())
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("file", LESSONS + KERNELS, ids=lambda file: file.name)
def test_every_citation_is_in_the_table(file):
    errors = wrong_citations(file.relative_to(ROOT), file.read_text(), TABLE.read_text())
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("file", LESSONS, ids=lambda file: file.name)
def test_a_lesson_lists_the_papers_that_it_cites(file):
    errors = wrong_list(file.relative_to(ROOT), file.read_text(), TABLE.read_text())
    assert not errors, "\n".join(errors)


def test_the_table_has_only_what_is_cited():
    errors = unused([file.read_text() for file in LESSONS + KERNELS], TABLE.read_text())
    assert not errors, "\n".join(errors)


# ---------------------------------------------------------------------------------------------- the checks, checked

GOOD = '''"""A lesson.

Papers  [V17]  Vaswani et al. 2017, Attention Is All You Need   arXiv:1706.03762
        [D22] Dao 2022, FlashAttention  arXiv:2205.14135      [Be87] Bentley 1987, Programming pearls

Axes    b batch
"""
# [V17, eq. 1-2; D22, algorithm 4], and [Be87]
"""A sum [V17,
section 3.2 and code]."""
'''
ROWS = """
| tag | paper | arXiv, version | where | status |
|---|---|---|---|---|
| [V17] | Vaswani et al. 2017, *Attention* | 1706.03762 v7 | eq. 1-2 `s4`; section 3.2 `mamba2`; code | seen |
| [D22] | Dao 2022, *FlashAttention* | 2205.14135 v2 | algorithm 4 | second hand: a summary |
| [Be87] | Bentley 1987, *Programming pearls* | - | | from memory |
"""


def all_errors(source, text):
    return [*wrong_rows(text), *wrong_citations("x.py", source, text), *wrong_list("x.py", source, text),
            *unused([source], text)]


def test_places_are_read():
    assert places(" eq. 11-13, 16 and code") == {"eq. 11", "eq. 12", "eq. 13", "eq. 16", "code"}
    assert places(" section 4.4, prop. 1b") == {"section 4.4", "prop. 1b"}
    assert places(" 360M") == set()


def test_good_citations_pass():
    assert [(line, tag) for line, tag, _ in citations(GOOD)] == [(8, "V17"), (8, "D22"), (8, "Be87"), (9, "V17")]
    assert not all_errors(GOOD, ROWS)


@pytest.mark.parametrize("old, new, message", [
    ("; D22,", "; D23,", "x.py:8: [D23] is not in docs/papers.md"),
    ("eq. 1-2", "eq. 1-3", "x.py:8: docs/papers.md does not list eq. 3 of [V17]"),
    ("V17, eq. 1-2;", "V17, eq. 1;", "docs/papers.md:4: nobody cites eq. 2 of [V17]"),
    ("[Be87]\n\"", "[Floyd, in Bentley 1987]\n\"", "x.py:8: [Floyd, in Bentley 1987] has no tag"),
    ("2205.14135  ", "2307.08691  ", "x.py:4: [D22] is 2307.08691 here, but 2205.14135 v2 in docs/papers.md"),
    ("Dao 2022, FlashAttention  ", "Dettmers 2022  ", "x.py:4: [D22] is Dettmers here"),
    ("[Be87] Bentley", "[D22] Bentley", "x.py:4: [D22] is listed twice"),
    ("[Be87] Bentley", "Bentley", "x.py:8: [Be87] is not among this lesson's papers"),
    ("and [Be87]", "and", "x.py: [Be87] is among this lesson's papers, but not cited"),
    ("| [D22] |", "| [V17] |", "docs/papers.md:5: the tag V17 stands in line 4 already"),
    ("| 2205.14135 v2", "| 1706.03762 v1", "docs/papers.md:5: the arXiv number 1706.03762 stands in line 4 already"),
    ("| from memory", "| believed", "docs/papers.md:6: the status of [Be87] must begin with one of"),
    ("| [Be87] | Bentley", "| [Kn97] | Knuth", "docs/papers.md:6: nobody cites [Kn97]"),
])
def test_a_wrong_citation_is_named_with_its_line(old, new, message):
    assert old in GOOD or old in ROWS
    errors = all_errors(GOOD.replace(old, new, 1), ROWS if old in GOOD else ROWS.replace(old, new, 1))
    assert any(error.startswith(message) for error in errors), errors

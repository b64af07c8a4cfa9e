# SPDX-License-Identifier: GPL-2.0-or-later
"""Documents: links lead somewhere, commands exist, and what is there in two languages says the same.

What is compared of two languages is what a translation keeps: headings and their levels, code (but for comments), the
shape of tables and diagrams, and for each section its links and what stands between backticks. Whoever changes one side
and not the other hears of it here.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from replicator.cli import cli
from scripts.packaging import man
from tests.available import ROOT

CHINESE = ".zh-CN.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TRANSLATED = [path for path in DOCUMENTS if path.name.endswith(CHINESE)]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^\s*```")


class Section(NamedTuple):
    """What stands between two headings."""

    level: int
    title: str
    text: str  # without code
    code: str


def sections(text: str) -> list[Section]:
    """A document in parts; the first one, before any heading, has level 0."""
    found: list[tuple[int, str, list[str], list[str]]] = [(0, "", [], [])]
    fenced, before = False, ""
    for line in text.splitlines():
        _level, _title, words, code = found[-1]
        if FENCE.match(line):
            fenced = not fenced
            code.append(line.strip())
        elif fenced or (line.startswith("    ") and (not before.strip() or before.startswith("    "))):
            code.append(line)
        elif heading := re.match(r"(#+) (.*)", line):
            found.append((len(heading[1]), heading[2], [], []))
        else:
            words.append(line)
        before = line
    return [Section(level, title, "\n".join(words), "\n".join(code)) for level, title, words, code in found]


def bare(code: str) -> list[str]:
    """Code without what a translator may change: comments, and the words in diagrams."""
    lines, drawing = [], False
    for line in code.splitlines():
        if FENCE.match(line):
            drawing = "mermaid" in line
        kept = re.sub(r"(^|\s+)#.*", "", line)
        if drawing:
            kept = re.sub(r'"[^"]*"', '""', kept)
            kept = re.sub(r"\[[^\]]*\]|\{[^}]*\}", "[]", kept)
            kept = re.sub(r"(participant \w+ as|Note over [\w,]+:|: ).*", r"\1", kept)
        if kept.strip():
            lines.append(kept.rstrip())
    return lines


def tables(text: str) -> list[int]:
    """For each row of each table, how many cells; 0 between tables."""
    return [line.count("|") if line.startswith("|") else 0 for line in text.splitlines() if line.startswith(("|", "#"))]


def links(text: str) -> list[str]:
    """Where a text leads, in no order; a translation may lead to translations."""
    return sorted(link.replace(CHINESE, ".md") for link in LINK.findall(text))


def quoted(text: str) -> set[str]:
    """What stands between backticks."""
    return set(re.findall(r"`([^`]+)`", text))


def anchor(title: str) -> str:
    """How a heading is called in a link."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def differences(original: str, translation: str) -> Iterator[str]:
    """What is in one and not in the other."""
    ours, theirs = sections(original), sections(translation)
    if [part.level for part in ours] != [part.level for part in theirs]:
        yield f"headings: {[part.title for part in ours]} and {[part.title for part in theirs]}"
        return
    for one, other in zip(ours, theirs, strict=True):
        where = one.title or "the beginning"
        if bare(one.code) != bare(other.code):
            yield f"{where}: the code"
        if tables(one.text) != tables(other.text):
            yield f"{where}: the shape of tables"
        if links(one.text) != links(other.text):
            yield f"{where}: links {set(links(one.text)) ^ set(links(other.text))}"
        if quoted(one.text) != quoted(other.text):
            yield f"{where}: {sorted(quoted(one.text) ^ quoted(other.text))}"


def test_the_readme_and_the_first_hour_are_there_in_chinese() -> None:
    assert {path.name for path in TRANSLATED} >= {f"README{CHINESE}", f"first-hour{CHINESE}"}


@pytest.mark.parametrize("path", TRANSLATED, ids=lambda path: path.name)
def test_translations_are_in_step(path: Path) -> None:
    original = path.with_name(path.name.removesuffix(CHINESE) + ".md")
    assert list(differences(original.read_text(), path.read_text())) == []
    chinese = len(re.findall(r"[\u4e00-\u9fff]", path.read_text()))
    assert chinese * 4 > len(re.findall(r"[A-Za-z]+", original.read_text()))  # it was translated, not copied


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("# A", "## A", "headings"),
        ("`two`", "`three`", "'three', 'two'"),
        ("(x.md)", "(y.md)", "links"),
        ("    run --fast", "    run --slow", "the code"),
        ("| b | c |", "| b |", "the shape"),
        ("| b | c |\n", "", "the shape"),
    ],
)
def test_a_difference_is_found(old: str, new: str, what: str) -> None:
    text = "# A\n\nOne `two` [three](x.md).\n\n    run --fast  # now\n\n| a | d |\n|---|---|\n| b | c |\n"
    assert list(differences(text, text.replace("# now", "# 现在").replace("One", "一"))) == []
    (found,) = differences(text, text.replace(old, new))
    assert what in found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall("\n".join(part.text for part in sections(path.read_text()))):
        if "://" in link:
            continue
        name, _, place = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if place:
            assert place in {anchor(part.title) for part in sections(target.read_text())}, link


def test_every_document_is_linked_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall((ROOT / "README.md").read_text())}
    unlinked = [path.name for path in DOCUMENTS if path not in linked and path not in TRANSLATED]
    assert [name for name in unlinked if name != "README.md"] == []


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "command.md").read_text()
    missing = [context.command_path for command, context in man.commands()[1:] if not isinstance(command, click.Group)
               and context.command_path.removeprefix("dpvs-probe ") not in text]  # fmt: skip
    assert missing == []


def commands_in(path: Path) -> Iterator[list[str]]:
    """The words after ``dpvs-probe`` on each line of code that begins with it."""
    for part in sections(path.read_text()):
        for line in part.code.splitlines():
            text = re.sub(r"\s+#.*|\\$", "", line.strip())
            text = re.sub(r"\$\([^)]*\)", "1", text)
            start = re.match(r"(\w+# )?(\S*/)?dpvs-probe ", text)
            if start:
                yield shlex.split(re.sub(r"\s{2,}\S.*|\[.*|<.*", "", text[start.end() :].strip()))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_exist(path: Path) -> None:
    for words in commands_in(path):
        command: click.Command = cli
        context = click.Context(cli, info_name="dpvs-probe", **cli.context_settings)
        for word in words:
            below = command.get_command(context, word) if isinstance(command, click.Group) else None
            if below is not None:
                context = click.Context(below, info_name=word, parent=context)
                command = below
            elif isinstance(command, click.Group) and not word.startswith("-") and word.islower():
                pytest.fail(f"{' '.join(words)}: there is no {word}")
            elif word.startswith("-") and word != "-":
                known = {name for each in command.get_params(context) for name in (*each.opts, *each.secondary_opts)}
                assert word.partition("=")[0] in known, " ".join(words)

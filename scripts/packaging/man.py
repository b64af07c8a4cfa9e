# SPDX-License-Identifier: GPL-2.0-or-later
"""Manual pages, made of the very text that --help shows: one page for the program and one for each command.

Rules: nothing is written twice. What a page says of a command is the command's docstring, what it says of an option is
the option's help; the rest (exit statuses, files) stands here because no command shows it. Pages are in section 8: the
program is for administrators.

    python -m scripts.packaging.man DIRECTORY
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from probes.anatomy import CACHE
from probes.choosing import DIRECTORY as LAYOUTS
from replicator.cli import cli
from replicator.console import version
from replicator.keys import KEYS_DIRECTORY
from replicator.rundir import DEFAULT as RUN_DIRECTORY
from replicator.settings import DEFAULT_FILE

PROGRAM = "dpvs-probe"
SECTION = "8"
STATUSES = (
    ("0", "done, or the answer is yes"),
    ("1", "an error, said in one line on standard error with what to do about it; or the answer is no"),
    ("2", "the command line makes no sense"),
    ("3", "(attach) the DPVS process ended"),
)
FILES = (
    (DEFAULT_FILE, "settings of attach, which the service runs by"),
    (KEYS_DIRECTORY, "keys of this node, made by dpvs-probe keys"),
    (str(LAYOUTS), "struct layouts that were added for builds of DPVS"),
    (RUN_DIRECTORY, "locks and admin sockets of running attaches, and what keepalived said last"),
    (CACHE, "what was read of DPVS's code; it may be removed at any time"),
    ("/usr/share/doc/dpvs-probe", "README.md, where the documents begin"),
)


def escaped(text: str) -> str:
    """Plain text as roff takes it."""
    text = text.replace("\\", "\\(rs").replace("-", "\\-").replace("'", "\\(aq")
    return "\\&" + text if text.startswith(".") else text


def prose(text: str) -> str:
    """One paragraph: what stands between backticks is bold."""
    words = " ".join(text.split())
    parts = re.split(r"`([^`]*)`", words)
    return "".join(f"\\fB{escaped(part)}\\fR" if number % 2 else escaped(part) for number, part in enumerate(parts))


def paragraphs(text: str) -> Iterator[str]:
    """A help text as roff. Click's mark for a paragraph that keeps its lines is kept."""
    for block in re.split(r"\n\s*\n", text.strip()):
        if block.startswith("\b"):
            yield ".PP\n.nf"
            yield from (escaped(line) for line in block.splitlines()[1:])
            yield ".fi"
        else:
            yield f".PP\n{prose(block)}"


def parameters(command: click.Command, context: click.Context) -> Iterator[str]:
    """One entry for each option, as --help has them."""
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option) and not parameter.hidden:
            names, said = parameter.get_help_record(context) or ("", "")
            yield f".TP\n\\fB{escaped(names)}\\fR\n{prose(said)}"


def walk(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """The command and all below it, each with its context."""
    yield command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from walk(below, click.Context(below, info_name=name, parent=context))


def commands() -> list[tuple[click.Command, click.Context]]:
    """Every command that the program has, the program itself first."""
    return list(walk(cli, click.Context(cli, info_name=PROGRAM, **cli.context_settings)))


def page_name(context: click.Context) -> str:
    """``dpvs-probe keys issue`` is in dpvs-probe-keys-issue."""
    return context.command_path.replace(" ", "-")


def page(command: click.Command, context: click.Context) -> str:
    """The manual page of one command."""
    name = page_name(context)
    said = command.help or ""
    first = " ".join(said.strip().partition("\n\n")[0].split())
    summary = re.split(r"(?<=[.:]) ", first)[0].rstrip(".:").replace("`", "")
    lines = [
        f'.TH "{name.upper()}" "{SECTION}" "" "{PROGRAM} {version()}" "{PROGRAM}"',
        f".SH NAME\n{escaped(name)} \\- {escaped(summary)}",
        f".SH SYNOPSIS\n\\fB{escaped(context.command_path)}\\fR "
        + escaped(" ".join(command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        *paragraphs(said),
    ]
    lines += [".SH OPTIONS", *parameters(command, context)]
    below = [(each, where) for each, where in walk(command, context) if where.parent is context]
    if below:
        lines.append(".SH COMMANDS")
    for each, where in below:
        lines.append(f".TP\n\\fB{escaped(page_name(where))}\\fR({SECTION})\n{prose(each.get_short_help_str(200))}")
    lines.append(".SH EXIT STATUS")
    lines += [f".TP\n{number}\n{prose(meaning)}" for number, meaning in STATUSES]
    lines.append(".SH FILES")
    lines += [f".TP\n{escaped(file)}\n{prose(meaning)}" for file, meaning in FILES]
    parent = context.parent
    if parent is not None:
        lines.append(f".SH SEE ALSO\n\\fB{escaped(page_name(parent))}\\fR({SECTION})")
    return "\n".join(lines) + "\n"


def write(directory: Path) -> list[Path]:
    """All pages into ``directory``; the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for command, context in commands():
        path = directory / f"{page_name(context)}.{SECTION}"
        path.write_text(page(command, context))
        written.append(path)
    return written


if __name__ == "__main__":
    for path in write(Path(sys.argv[1])):
        print(path)

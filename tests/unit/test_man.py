# SPDX-License-Identifier: GPL-2.0-or-later
"""Manual pages: everything the command can do is said, in --help and there alike."""

import re
from pathlib import Path

import click
import pytest

from scripts.packaging import completions, man

COMMANDS = man.commands()
MACROS = {".TH", ".SH", ".PP", ".TP", ".nf", ".fi"}


def plain(page: str) -> str:
    """A page's text without roff, words separated by one space."""
    text = re.sub(r"\\f[BR]|\\&", "", page).replace("\\-", "-").replace("\\(aq", "'").replace("\\(rs", "\\")
    return " ".join(text.split())


@pytest.mark.parametrize(("command", "context"), COMMANDS, ids=[man.page_name(context) for _, context in COMMANDS])
class TestEachCommand:
    def test_everything_has_a_help_text(self, command: click.Command, context: click.Context) -> None:
        assert (command.help or "").strip()
        for parameter in command.get_params(context):
            if isinstance(parameter, click.Option):
                assert (parameter.help or "").rstrip().endswith((".", ")")), parameter.name

    def test_every_option_is_in_its_page(self, command: click.Command, context: click.Context) -> None:
        text = plain(man.page(command, context))
        assert text.count("-h, --help") == 1
        for parameter in command.get_params(context):
            if isinstance(parameter, click.Option):
                assert all(name in text for name in parameter.opts)
                assert plain(parameter.help or "").replace("`", "") in text

    def test_the_page_is_sound_roff(self, command: click.Command, context: click.Context) -> None:
        lines = man.page(command, context).splitlines()
        assert lines[0].startswith(".TH ")
        assert all(line.partition(" ")[0] in MACROS for line in lines if line.startswith((".", "'")))
        for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "FILES"):
            assert lines.count(f".SH {section}") == 1
        (name,) = [lines[number + 1] for number, line in enumerate(lines) if line == ".SH NAME"]
        assert name.startswith(f"{man.escaped(man.page_name(context))} \\- ")  # as mandb reads it


def test_a_page_for_each_command(tmp_path: Path) -> None:
    names = {path.name for path in man.write(tmp_path)}
    assert {"dpvs-probe.8", "dpvs-probe-attach.8", "dpvs-probe-keys-issue.8"} <= names
    assert len(names) == len(COMMANDS)
    root = (tmp_path / "dpvs-probe.8").read_text()
    assert "dpvs\\-probe\\-attach\\fR(8)" in root


def test_roff_is_escaped() -> None:
    assert man.prose(".start `a-b` \\ it's") == "\\&.start \\fBa\\-b\\fR \\(rs it\\(aqs"


def test_completions_call_the_program(tmp_path: Path) -> None:
    paths = completions.write(tmp_path)
    assert len(paths) == 3
    for path in paths:
        assert "_DPVS_PROBE_COMPLETE=" in path.read_text()

# SPDX-License-Identifier: GPL-2.0-or-later
"""A group of commands whose modules are imported when they are needed.

Rules: the group knows the name of each command, where it lives and the line that --help has of it, and so shows and
completes names without importing any. That line is the first sentence of the command's own help; a test compares them.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem


class Part(NamedTuple):
    """Where a command is: an object of its name in ``replicator.<module>``."""

    module: str
    summary: str


class LazyGroup(click.Group):
    """Commands by name: ``parts``, and those that are added as ever."""

    def __init__(self, *arguments: Any, parts: Mapping[str, Part], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parts = dict(parts)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted({*self.parts, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now; None if there is none."""
        part = self.parts.get(cmd_name)
        if part is not None and cmd_name not in self.commands:
            command = getattr(import_module(f"replicator.{part.module}"), cmd_name)
            assert isinstance(command, click.Command)
            self.add_command(command, cmd_name)
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in --help."""
        names = self.list_commands(ctx)
        if names:
            limit = formatter.width - 6 - max(map(len, names))  # as click.Group has it
            with formatter.section("Commands"):
                formatter.write_dl([(name, self._summary(name, limit)) for name in names])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names that begin so; options as ever."""
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [
            CompletionItem(name, help=self._summary(name))
            for name in self.list_commands(ctx)
            if name.startswith(incomplete)
        ]

    def _summary(self, name: str, limit: int = 45) -> str:
        """The line of --help, cut to ``limit`` characters by click's own rules."""
        part = self.parts.get(name)
        command = click.Command(name, help=part.summary) if part else self.commands[name]
        return command.get_short_help_str(limit)

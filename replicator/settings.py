# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings of ``attach``: where a value comes from, and the configuration file.

Rules
- The options of ``attach`` are the one table of settings: name, type, default, help. A file has the same ones in its
  section ``[sync]``, by the option's long name with ``_`` for ``-``; options that may be repeated are lists there.
- The command line counts before the environment, that before the file, that before the default.
- Every mistake in a file has its line. An unknown key is a mistake, so that no setting is lost to a slip of a key.
- An option of class ``Live`` can change while an attach runs; the others need a restart, and that is said.
"""

import configparser
import difflib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from probes.errors import DpvsProbeError

SECTION = "sync"
DEFAULT_FILE = "/etc/dpvs-probe.conf"
NOT_IN_A_FILE = frozenset(("pid", "dry_run", "config", "help"))
MAX_BYTES = 1 << 20
_YES = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|min|h)", re.ASCII)


class Mistake(NamedTuple):
    """One thing that is wrong with a file."""

    line: int  # from 1 on; 0: the file as a whole
    text: str


class BadConfiguration(DpvsProbeError):
    """A configuration file that cannot be used. ``mistakes``: all of them, in order of lines."""

    help_text = "See all that is wrong with `dpvs-probe config check FILE`."

    def __init__(self, path: str, mistakes: Sequence[Mistake], *, help_text: str = "") -> None:
        first = mistakes[0]
        more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        super().__init__(f"{place(path, first.line)}: {first.text}{more}", help_text=help_text or self.help_text)
        self.path, self.mistakes = path, tuple(mistakes)


def place(path: str, line: int) -> str:
    """``FILE:LINE``."""
    return f"{path}:{line}" if line else path


# --- the options that are settings ---------------------------------------------------------------------------------


class Live(click.Option):
    """An option that SIGHUP changes without a restart."""


class Seconds(click.FloatRange):
    """A number of seconds, or with a unit: ``3``, ``3s``, ``500ms``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_in_unit(value, 1.0), param, ctx)


class Milliseconds(click.IntRange):
    """A whole number of milliseconds, or with a unit: ``100``, ``100ms``, ``0.1s``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = _in_unit(value, 1e-3)
        if isinstance(number, float):
            if number != int(number):
                self.fail(f"{value!r} is not a whole number of milliseconds", param, ctx)
            number = int(number)
        return super().convert(number, param, ctx)


def _in_unit(value: Any, unit_s: float) -> Any:
    """``value`` as a number of units if it is text with a unit, else as it is."""
    if isinstance(value, str) and (found := _SPAN.fullmatch(value.strip())):
        return round(float(found[1]) * _UNITS[found[2]] / unit_s, 9)
    return value


def settings_of(command: click.Command) -> dict[str, click.Option]:
    """The options of a command that a file may set, by their keys."""
    return {
        key_of(option): option
        for option in command.params
        if isinstance(option, click.Option) and option.name not in NOT_IN_A_FILE
    }


def key_of(option: click.Option) -> str:
    """What a file calls an option."""
    if option.multiple:
        return str(option.name)
    return option_name(option).removeprefix("--").replace("-", "_")


def option_name(option: click.Option) -> str:
    """Its long form on the command line."""
    return max(option.opts, key=len)


def typed(option: click.Option, text: str) -> Any:
    """The value that a file's text stands for; raises click.BadParameter."""
    if option.is_flag:
        if text.lower() not in _YES:
            raise click.BadParameter(f"{text!r} is neither yes nor no")
        return _YES[text.lower()]
    return option.type.convert(text, option, None)


def default_of(option: click.Option) -> Any:
    """Its value where nobody gives one."""
    given = option.to_info_dict()["default"]
    if option.multiple:
        return tuple(given or ())
    return bool(given) if option.is_flag else given


def shown(value: Any) -> str:
    """A value as a file would have it; "" where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- the file --------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One key of a file."""

    line: int
    value: Any


@dataclass
class File:
    """What a file says. Empty, and ``there`` false, where there is none."""

    path: str
    entries: dict[str, Entry] = field(default_factory=dict)  # by key
    mistakes: list[Mistake] = field(default_factory=list)
    there: bool = True


class _Lines:
    """Lines of a file, which one was read last, and where sections begin."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.number = 0
        self.sections: list[tuple[str, int]] = []
        self._lines = lines

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.number += 1
            if found := re.match(r"\[([^]]+)\]", line):
                self.sections.append((found[1], self.number))
            yield line


def parse(text: str, path: str, settings: Mapping[str, click.Option]) -> File:
    """A file's text. What is wrong is in ``mistakes``; what is right is in ``entries`` all the same."""
    file = File(path)
    lines = _Lines(text.splitlines(keepends=True))
    at: dict[str, int] = {}  # lines of keys

    def note(key: str) -> str:  # called as each key is read, so the line is the one that was read last
        key = key.strip().lower()
        if key in at:
            said = f"{key} stands here a second time; first in line {at[key]}"
            file.mistakes.append(Mistake(lines.number, said))
        at.setdefault(key, lines.number)
        return key

    parser = configparser.ConfigParser(
        interpolation=None, inline_comment_prefixes=("#", ";"), empty_lines_in_values=False, default_section="\n",
        strict=False,
    )  # fmt: skip
    parser.optionxform = note  # type: ignore[assignment,method-assign]
    try:
        parser.read_file(lines, path)
    except configparser.MissingSectionHeaderError as error:
        file.mistakes.append(Mistake(error.lineno, f"what stands here is in no section: begin with [{SECTION}]"))
    except configparser.ParsingError as error:
        file.mistakes += [Mistake(number, "this is not KEY = VALUE") for number, _ in error.errors]
    began = False
    for section, line in lines.sections:
        if section != SECTION:
            file.mistakes.append(Mistake(line, f"there is no section [{section}]; all settings stand in [{SECTION}]"))
        elif began:
            file.mistakes.append(Mistake(line, f"section [{section}] stands here a second time"))
        began = began or section == SECTION
    if parser.has_section(SECTION):
        for key, value in parser.items(SECTION):
            _take(file, key, value, at[key], settings)
    file.mistakes.sort()
    return file


def _take(file: File, key: str, text: str, line: int, settings: Mapping[str, click.Option]) -> None:
    option = settings.get(key)
    if option is None:
        near = difflib.get_close_matches(key, settings, 1)
        file.mistakes.append(Mistake(line, f"there is no setting {key}" + (f"; is {near[0]} meant?" if near else "")))
        return
    if not text.strip():
        file.mistakes.append(Mistake(line, f"{key} has no value; leave the line out for the default"))
        return
    if not option.multiple and "\n" in text:
        file.mistakes.append(Mistake(line, f"{key} takes one value on one line"))
        return
    values = []
    for number, row in enumerate(text.split("\n")):
        for word in re.split(r"[\s,]+", row.strip()) if option.multiple else [row.strip()]:
            try:
                if word:
                    values.append(typed(option, word))
            except (click.BadParameter, ValueError) as error:
                said = error.message if isinstance(error, click.BadParameter) else str(error)
                file.mistakes.append(Mistake(line + number, f"{key}: {said}"))
                return
    file.entries[key] = Entry(line, tuple(values) if option.multiple else values[0])


def read(path: str, settings: Mapping[str, click.Option], *, required: bool) -> File:
    """A file, with its mistakes. One that is not there is empty unless it is ``required``."""
    try:
        with open(path, "rb") as source:
            found = os.fstat(source.fileno())
            data = source.read(MAX_BYTES + 1)
    except FileNotFoundError:
        mistakes = [Mistake(0, "there is no such file")] if required else []
        return File(path, mistakes=mistakes, there=False)
    except OSError as error:
        return File(path, mistakes=[Mistake(0, f"cannot be read: {error.strerror}")])
    if len(data) > MAX_BYTES:
        return File(path, mistakes=[Mistake(0, f"more than {MAX_BYTES} bytes")])
    if stat.S_ISREG(found.st_mode) and (found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022):
        # Whoever writes it says where sessions go.
        return File(path, mistakes=[Mistake(0, "others may write to it: chown root, chmod 644")])
    try:
        return parse(data.decode(), path, settings)
    except UnicodeDecodeError as error:
        return File(path, mistakes=[Mistake(data[: error.start].count(b"\n") + 1, "this is not UTF-8 text")])


# --- what is in force -------------------------------------------------------------------------------------------------

# Given all values by parameter name: keys with what is wrong. A plain click.UsageError is about several settings
# together, anything else about that one.
Conflicts = Callable[[Mapping[str, Any]], Iterator[tuple[str, Exception]]]


class Change(NamedTuple):
    """A setting that has another value than the one in force."""

    key: str
    before: str
    after: str
    live: bool


class Configuration:
    """All settings of a command, each from where it counts. ``reload`` reads the file again."""

    def __init__(
        self,
        settings: Mapping[str, click.Option],
        path: str = DEFAULT_FILE,
        *,
        required: bool = False,
        given: Mapping[str, tuple[Any, str]] | None = None,
        conflicts: Conflicts | None = None,
    ) -> None:
        """``given``: values that count before the file's, by parameter name, and where they come from. Raises
        BadConfiguration, or what ``conflicts`` finds in what was given.
        """
        self.settings, self.path = dict(settings), path
        self._required, self._given, self._conflicts = required, dict(given or {}), conflicts
        self.values, self._origins = self._read()  # by parameter name; by key
        self._waiting: dict[str, str] = {}  # keys whose value in the file counts from the next start on

    @classmethod
    def of(cls, context: click.Context, path: str | None, conflicts: Conflicts | None = None) -> "Configuration":
        """What a command that was just called has to go by; ``path``: the file that was named, if any."""
        settings = settings_of(context.command)
        given = {}
        for option in settings.values():
            name = str(option.name)
            source = context.get_parameter_source(name)
            if source is ParameterSource.COMMANDLINE:
                given[name] = (context.params[name], "command line")
            elif source is ParameterSource.ENVIRONMENT:
                given[name] = (context.params[name], f"environment {option.envvar}")
        return cls(settings, path or DEFAULT_FILE, required=path is not None, given=given, conflicts=conflicts)

    def reload(self) -> list[Change]:
        """Read the file again; where it says another thing than what is in force. Live settings are in force from now
        on, the others stay as they are. Raises BadConfiguration, and keeps what it had.
        """
        try:
            values, origins = self._read()
        except click.ClickException as error:
            raise BadConfiguration(self.path, [Mistake(0, error.message)]) from error
        changes, self._waiting = [], {}
        for key, option in self.settings.items():
            name, live = str(option.name), isinstance(option, Live)
            if values[name] != self.values[name]:
                changes.append(Change(key, shown(self.values[name]), shown(values[name]), live))
                if not live:
                    self._waiting[key] = shown(values[name])
                    continue
            self.values[name], self._origins[key] = values[name], origins[key]
        return changes

    def rows(self) -> list[dict[str, Any]]:
        """For a person: each setting, its value, where it comes from, and what a restart would make of it."""
        return [
            {
                "setting": key,
                "value": shown(self.values[str(option.name)]),
                "from": self._origins[key],
                "live": isinstance(option, Live),
                "after_restart": self._waiting.get(key),
            }
            for key, option in self.settings.items()
        ]

    def _read(self) -> tuple[dict[str, Any], dict[str, str]]:
        file = read(self.path, self.settings, required=self._required)
        values, origins = self._merged(file)
        readable = not file.mistakes
        if self._conflicts is not None:
            for key, error in self._conflicts(values):
                if not readable and (type(error) is click.UsageError or key not in file.entries):
                    continue  # of several settings, some of which may be what could not be read
                if key not in file.entries or origins[key] != place(file.path, file.entries[key].line):
                    raise error
                said = error.message if isinstance(error, click.ClickException) else str(error)
                file.mistakes.append(Mistake(file.entries[key].line, f"{key}: {said}"))
        if file.mistakes:
            raise BadConfiguration(file.path, sorted(file.mistakes))
        return values, origins

    def _merged(self, file: File) -> tuple[dict[str, Any], dict[str, str]]:
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for key, option in self.settings.items():
            name = str(option.name)
            if name in self._given:
                values[name], origins[key] = self._given[name]
            elif key in file.entries:
                entry = file.entries[key]
                values[name], origins[key] = entry.value, place(file.path, entry.line)
            else:
                values[name], origins[key] = default_of(option), "default"
        return values, origins


# --- documents that are made of the table -----------------------------------------------------------------------------


def example(settings: Mapping[str, click.Option]) -> Iterator[str]:
    """A file with every setting at its default, as comments: lines."""
    yield f"[{SECTION}]"
    for key, option in settings.items():
        yield ""
        yield from (f"# {line}" for line in _wrapped(option.help or "", 110))
        if isinstance(option, Live):
            yield "# Can change alive: systemctl reload dpvs-probe."
        value = shown(default_of(option))
        yield f"#{key} = {value}" if value else f"#{key} ="


def table(settings: Mapping[str, click.Option]) -> Iterator[str]:
    """All settings as a table in Markdown: lines."""
    yield "| key | option | value | default | alive | |"
    yield "|---|---|---|---|---|---|"
    for key, option in settings.items():
        alive = "yes" if isinstance(option, Live) else ""
        value = shown(default_of(option))
        default = f"`{value}`" if value else ""
        names = "`, `".join([option_name(option), *option.secondary_opts])
        words = (option.help or "").replace("|", "\\|")
        yield f"| `{key}` | `{names}` | {kind(option)} | {default} | {alive} | {words} |"


def kind(option: click.Option) -> str:
    """What values it takes, in a few words."""
    kind = option.type
    many = ", several" if option.multiple else ""
    if option.is_flag:
        return "yes or no"
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices) + many
    unit = {Seconds: "s", Milliseconds: "ms"}.get(type(kind), "")
    if isinstance(kind, click.IntRange | click.FloatRange):
        low, high = kind.min, kind.max
        edge = f"{low:g} or more" if high is None else f"{low:g} to {high:g}"
        return " ".join(filter(None, (edge, unit)))
    return f"{option.metavar or 'text'}{many}"


def _wrapped(text: str, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word
    if line:
        yield line

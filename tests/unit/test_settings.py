# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/settings.py and `dpvs-probe config`: the file, its mistakes, and where values come from."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from replicator import settings
from replicator.cli import cli, main
from replicator.cli_attach import Given, attach, conflicts
from replicator.settings import BadConfiguration, Configuration, Mistake, settings_of
from replicator.transport.address import Address

ROOT = Path(__file__).parents[2]
SETTINGS = settings_of(attach)


def parsed(text: str) -> settings.File:
    return settings.parse(text, "/f", SETTINGS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "probe.conf"
    path.touch(mode=0o600)
    return path


def given(file: Path, *arguments: str) -> Given:
    """What ``attach`` goes by with these arguments."""
    found: list[Given] = []

    def instead(context: click.Context, /, **values: Any) -> None:
        found.append(Given(Configuration.of(context, values["config"], conflicts), values["pid"]))

    command = click.Command("attach", params=attach.params, callback=click.pass_context(instead))
    command.main(["--pid", "1", "--config", str(file), *arguments], standalone_mode=False)
    return found[0]


def row(source: Given, key: str) -> tuple[str, str]:
    (found,) = [row for row in source.rows() if row["setting"] == key]
    return found["value"], found["from"]


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def test_all_keys_that_users_of_session_sync_know() -> None:
    known = {
        "enable", "mode", "sync_interval", "sync_batch_size", "compress", "heartbeat_timeout", "peers", "listen",
        "replicas", "hash_points", "keys", "filter_services", "filter_min_age", "filter_states", "filter_rate",
        "inject", "policy",
    }  # fmt: skip
    assert known <= set(SETTINGS)
    text = """
[sync]
enable = yes
mode = tcp
sync_interval = 100
sync_batch_size = 32
compress = lz4
heartbeat_timeout = 3
"""
    assert parsed(text).mistakes == []


def test_values_of_each_kind() -> None:
    file = parsed("""# a comment
[sync]
Peers = 10.0.8.2:7700, 10.0.8.3:7700
        [fd00::4]:7700   # the third
sync_interval = 0.25s
heartbeat_timeout : 4500ms ; also a comment
inject = off
replicas = 2
""")
    assert file.mistakes == []
    assert {key: entry.value for key, entry in file.entries.items()} == {
        "peers": ("10.0.8.2:7700", "10.0.8.3:7700", "[fd00::4]:7700"),
        "sync_interval": 250,
        "heartbeat_timeout": 4.5,
        "inject": False,
        "replicas": 2,
    }
    assert {key: entry.line for key, entry in file.entries.items()} == {
        "peers": 3, "sync_interval": 5, "heartbeat_timeout": 6, "inject": 7, "replicas": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("sync_interval = 100\n", 1, "what stands here is in no section: begin with [sync]"),
        ("[sync]\n\nsync_intervall = 100\n", 3, "there is no setting sync_intervall; is sync_interval meant?"),
        ("[sync]\nsync_interval = 1oo\n", 2, "sync_interval: '1oo' is not a valid integer"),
        ("[sync]\nsync_interval = 1.5ms\n", 2, "sync_interval: '1.5ms' is not a whole number of milliseconds"),
        ("[sync]\nsync_interval = 0\n", 2, "sync_interval: 0 is not in the range 1<=x<=60000."),
        ("[sync]\n# x\nmode = carrier-pigeon\n", 3, "mode: 'carrier-pigeon' is not one of 'tcp', 'rdma', 'shm'."),
        ("[sync]\nenable = perhaps\n", 2, "enable: 'perhaps' is neither yes nor no"),
        ("[sync]\nlisten =\n", 2, "listen has no value; leave the line out for the default"),
        ("[sync]\nlisten = a:1\n  b:2\n", 2, "listen takes one value on one line"),
        ("[sync]\nreplicas = 1\nreplicas = 2\n", 3, "replicas stands here a second time; first in line 2"),
        ("[sync]\n[sync]\n", 2, "section [sync] stands here a second time"),
        ("[sync]\nreplicas = 1\n\n[sink]\n", 4, "there is no section [sink]; all settings stand in [sync]"),
        ("[sync]\nfilter_states = ESTABLISHED\n  ASLEEP\n", 3, "filter_states: 'ASLEEP' is not one of"),
        ("[sync]\nreplicas = 1\nnonsense\n", 3, "this is not KEY = VALUE"),
        ("[sync]\npid = 4\n", 2, "there is no setting pid"),
    ],
)
def test_each_mistake_has_its_line(text: str, line: int, says: str) -> None:
    (mistake,) = parsed(text).mistakes
    assert mistake.line == line
    assert mistake.text.startswith(says)


def test_all_mistakes_are_found_at_once() -> None:
    file = parsed("[sync]\nmode = x\nreplicas = 3\npeeers = a:1\nring_pages = -1\n")
    assert [mistake.line for mistake in file.mistakes] == [2, 4, 5]
    assert file.entries["replicas"].value == 3


def test_noise_is_mistakes_and_nothing_else(file: Path) -> None:
    for data in (b"\xff\xfe", b"[sync]\nnode = \xff\n", b"\0" * 100, b"[" * 1000, b"[sync]\n" + b" x\n" * 100):
        file.write_bytes(data)
        assert settings.read(str(file), SETTINGS, required=True).mistakes
    file.write_bytes(b"#" * (settings.MAX_BYTES + 1))
    assert settings.read(str(file), SETTINGS, required=True).mistakes == [Mistake(0, "more than 1048576 bytes")]


def test_a_file_that_others_may_write_is_not_used(file: Path) -> None:
    file.write_text("[sync]\n")
    file.chmod(0o664)
    (mistake,) = settings.read(str(file), SETTINGS, required=True).mistakes
    assert "others may write to it" in mistake.text


def test_the_command_line_counts_before_the_environment_and_that_before_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("[sync]\nreplicas = 3\nsync_interval = 20\nrun_dir = /a\npeers = h:1\ninject = no\nverbose = yes\n")
    monkeypatch.setenv("DPVS_PROBE_RUNDIR", "/b")
    source = given(file, "--replicas", "2", "--peer", "i:2", "--inject")
    assert row(source, "replicas") == ("2", "command line")
    assert row(source, "sync_interval") == ("20", f"{file}:3")
    assert row(source, "run_dir") == ("/b", "environment DPVS_PROBE_RUNDIR")
    assert row(source, "peers") == ("i:2", "command line")
    assert row(source, "inject") == ("yes", "command line")
    assert row(source, "compress") == ("auto", "default")
    options = source.options()
    assert (options.replicas, options.link.batch_ns, options.peers) == (2, 20_000_000, (Address("i", 2),))
    assert options.inject
    assert source.verbose


def test_sync_that_is_not_enabled_has_neither_peers_nor_a_port(file: Path) -> None:
    file.write_text("[sync]\nenable = no\npeers = h:1\nlisten = *:2\nrequire_peer = 3\n")
    options = given(file).options()
    assert (options.peers, options.listen, options.require_peer_s) == ((), None, None)


def test_settings_that_do_not_go_together_have_their_line(file: Path) -> None:
    file.write_text("[sync]\nheartbeat = 2\nheartbeat_timeout = 3\nring_pages = 3\nfilter_services = nowhere\n")
    with pytest.raises(BadConfiguration) as refused:
        given(file)
    assert [mistake.line for mistake in refused.value.mistakes] == [3, 4, 5]
    assert str(refused.value).startswith(f"{file}:3: heartbeat_timeout: --heartbeat-timeout must be twice")
    assert "(and 2 more)" in str(refused.value)
    with pytest.raises(click.UsageError, match="twice"):
        given(Path("/dev/null"), "--heartbeat", "2")
    file.write_text("[sync]\nheartbeat = 2\nheartbeat_timeout = much\nring_pages = 3\n")
    with pytest.raises(BadConfiguration) as refused:  # what was meant by a line that cannot be read, nobody knows
        given(file)
    assert [mistake.line for mistake in refused.value.mistakes] == [3, 4]


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(BadConfiguration, match="there is no such file"):
        given(tmp_path / "none")
    assert Configuration(SETTINGS, str(tmp_path / "none")).values["replicas"] is None


def test_reload_changes_what_can_change_alive_and_says_what_cannot(file: Path) -> None:
    file.write_text("[sync]\nsync_interval = 20\npeers = h:1\nlisten = *:1\n")
    source = given(file, "--sync-batch-size", "5")
    file.write_text(
        "[sync]\nsync_interval = 30\npeers = h:1 h:2\nlisten = *:2\nsync_batch_size = 6\nfilter_min_age = 2s\n"
    )
    changes = {change.key: change for change in source.reload()}
    assert set(changes) == {"sync_interval", "peers", "listen", "filter_min_age"}, "what the command line says stays"
    assert changes["sync_interval"] == ("sync_interval", "20", "30", True)
    assert changes["peers"] == ("peers", "h:1", "h:1 h:2", True)
    assert changes["listen"] == ("listen", "*:1", "*:2", False)
    options = source.options()
    assert options.link.batch_ns == 30_000_000
    assert options.filters.min_age_ns == 2_000_000_000
    assert options.peers == (Address("h", 1), Address("h", 2))
    assert options.listen == Address("*", 1)
    (listen,) = [row for row in source.rows() if row["setting"] == "listen"]
    assert (listen["value"], listen["after_restart"]) == ("*:1", "*:2")
    assert [change.key for change in source.reload()] == ["listen"]
    file.write_text("[sync]\nsync_interval = x\n")
    with pytest.raises(BadConfiguration):
        source.reload()
    assert row(source, "sync_interval") == ("30", f"{file}:2")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_config_check(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("[sync]\npeers = 10.0.0.2:7700\n")
    assert run(capsys, "config", "check", str(file)) == (0, f"{file}: no mistakes\n", "")
    file.write_text("[sync]\npeers = 10.0.0.2\nkees = /k\n")
    status, out, _ = run(capsys, "config", "check", str(file))
    assert status == 1
    assert out.splitlines() == [
        f"{file}:2: peers: '10.0.0.2' has no port",
        f"{file}:3: there is no setting kees; is keys meant?",
    ]
    file.write_text("[sync]\npeers = 10.0.0.2\n")
    status, out, _ = run(capsys, "config", "check", str(file), "--json")
    assert json.loads(out)["mistakes"] == [{"line": 2, "text": "peers: '10.0.0.2' has no port"}]
    assert run(capsys, "config", "check", "/no/such/file")[:2] == (1, "/no/such/file: there is no such file\n")
    status, _, err = run(capsys, "attach", "--pid", "1", "--config", str(file))
    assert status == 1
    assert err.startswith(f"dpvs-probe: {file}:2: peers: '10.0.0.2' has no port\n")


def test_config_show(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("[sync]\nsync_interval = 20ms\n")
    status, out, _ = run(capsys, "config", "show", str(file))
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["sync_interval", "20", f"{file}:2"] in lines
    assert ["sync_batch_size", "32", "default"] in lines
    rows = [json.loads(line) for line in run(capsys, "config", "show", str(file), "--json")[1].splitlines()]
    assert [row["setting"] for row in rows] == list(SETTINGS)


def test_the_example_holds_every_setting_and_is_one() -> None:
    lines = list(settings.example(SETTINGS))
    assert parsed("\n".join(lines)).mistakes == []
    keys = [line for line in lines if line[:1] == "#" and line[1] != " "]
    file = parsed("[sync]\n" + "\n".join(line[1:] for line in keys if not line.endswith("=")))
    assert file.mistakes == []
    defaults = {key: settings.default_of(option) for key, option in SETTINGS.items()}
    assert {key: entry.value for key, entry in file.entries.items()} == {
        key: value for key, value in defaults.items() if settings.shown(value)
    }
    assert [line[1:].split(" =")[0] for line in keys] == list(SETTINGS)


def test_the_document_has_every_setting() -> None:
    """Write it anew with ``python -m tests.unit.test_settings``."""
    assert document().read_text() == rewritten()


def document() -> Path:
    return ROOT / "docs/configuration.md"


def rewritten() -> str:
    before, mark, rest = document().read_text().partition("<!-- settings -->\n")
    _, end, after = rest.partition("<!-- end of settings -->\n")
    assert mark
    assert end
    return before + mark + "\n".join(settings.table(SETTINGS)) + "\n" + end + after


def test_every_command_of_config_is_listed() -> None:
    group = cli.get_command(click.Context(cli), "config")
    assert isinstance(group, click.Group)
    assert sorted(group.commands) == ["check", "example", "show"]


if __name__ == "__main__":
    document().write_text(rewritten())

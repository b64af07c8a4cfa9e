# SPDX-License-Identifier: GPL-2.0-or-later
import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from probes.errors import DpvsProbeError
from replicator import admin, admin_server
from replicator.admin import AdminError, Line, ask
from replicator.admin_server import AdminServer


async def handler(request: Mapping[str, Any]) -> AsyncIterator[list[Line]]:
    if request["command"] == "echo":
        yield [dict(request)]
    elif request["command"] == "many":
        for start in range(0, request["count"], 500):
            yield [{"n": n, "padding": "x" * 200} for n in range(start, start + 500)]
    elif request["command"] == "half":
        yield [{"n": 1}]
        raise DpvsProbeError("it broke", help_text="mend it")
    elif request["command"] == "bug":
        raise RuntimeError("a bug")
    else:
        raise admin_server.BadRequest(f"no command '{request['command']}'")


def serve(path: Path, client: Callable[[], None]) -> float:
    """Run ``client`` in a thread against a server; gives the longest that the server kept its loop from a tick."""
    worst = 0.0

    async def body() -> None:
        nonlocal worst
        server = AdminServer(path, handler)
        await server.start()
        done = asyncio.get_running_loop().run_in_executor(None, client)
        while not done.done():
            began = time.thread_time()
            await asyncio.sleep(0.001)
            worst = max(worst, time.thread_time() - began)
        await server.close()
        await done

    asyncio.run(body())
    return worst


def test_ask_and_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    path.touch()  # what a dead attach left

    def client() -> None:
        assert path.stat().st_mode & 0o777 == 0o600
        assert list(ask(path, "echo", pid=7)) == [{"command": "echo", "pid": 7}]
        assert [line["n"] for line in ask(path, "many", count=20000)] == list(range(20000))

    worst = serve(path, client)
    assert worst < 0.2
    assert not path.exists()


def test_errors_come_back_as_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"

    def client() -> None:
        got = []
        with pytest.raises(AdminError, match="it broke") as caught:
            for line in ask(path, "half"):
                got.append(line)
        assert got == [{"n": 1}]
        assert caught.value.help_text == "mend it"
        with pytest.raises(AdminError, match="no command 'dance'"):
            list(ask(path, "dance"))
        with pytest.raises(AdminError, match="broke off"):
            list(ask(path, "bug"))
        assert list(ask(path, "echo")) == [{"command": "echo"}]

    serve(path, client)


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"not json\n", "not JSON"),
        (b"[]\n", "names no command"),
        (b'{"command": 7}\n', "names no command"),
        (b"\xff\xfe\n", "not JSON"),
        (b"x" * 200_000 + b"\n", "too long"),
    ],
)
def test_nonsense(tmp_path: Path, sent: bytes, says: str) -> None:
    path = tmp_path / "a.sock"

    def client() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            try:
                sock.sendall(sent)
                answer = sock.makefile("rb").readline()
            except ConnectionError:  # it closed on the rest of what is too long
                assert len(sent) > 100_000
                return
            assert says in json.loads(answer)["error"]

    serve(path, client)


def test_a_client_that_leaves_or_says_nothing_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_server, "REQUEST_S", 0.2)
    path = tmp_path / "a.sock"

    def client() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(b'{"command": "many", "count": 100000}\n')
            sock.recv(10)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(path))
            assert sock.recv(10) == b""
        assert list(ask(path, "echo")) == [{"command": "echo"}]

    serve(path, client)


def test_other_users_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_server, "_peer_uid", lambda sock: 12345)
    path = tmp_path / "a.sock"

    def client() -> None:
        with pytest.raises(AdminError):
            list(ask(path, "echo"))

    serve(path, client)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(AdminError, match="no answer on"):
        list(ask(tmp_path / "none.sock", "echo"))


def test_a_server_that_dies_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()

    def half() -> None:
        client, _ = listening.accept()
        client.recv(1000)
        client.sendall(b'{"n": 1}\n')
        client.close()

    thread = threading.Thread(target=half)
    thread.start()
    with pytest.raises(AdminError, match="broke off"):
        list(ask(path, "echo"))
    thread.join()
    listening.close()


def test_a_request_too_deep_to_be_read() -> None:
    with pytest.raises(admin_server.BadRequest):
        admin_server._parse(b"[" * 60_000)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"7\n", "no object"),
        (b"null\n", "no object"),
        (b"[" * 60_000 + b"\n", "not JSON"),
        (b"\xff\n", "not JSON"),
        (b'{"error": 7, "help": [1]}\n', "^7$"),
        (b'{"error": " ", "help": null}\n', "no reason"),
        (b'{"error": "\\u001b[2J", "help": ""}\n', r"^\[2J$"),
        (b'{"a": 1}\n', "broke off"),
        (b"", "broke off"),
    ],
)
def test_answers_that_make_no_sense(answer: bytes, says: str) -> None:
    with pytest.raises(AdminError, match=says) as error:
        list(admin.read_answer(io.BytesIO(answer), "x.sock"))
    assert isinstance(error.value.help_text, str)


def test_a_line_without_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "ANSWER_BYTES", 100)
    with pytest.raises(AdminError, match="not JSON"):
        list(admin.read_answer(io.BytesIO(b'"' + b"x" * 1000), "x.sock"))

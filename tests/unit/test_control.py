# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/control.py against a server that behaves as DPVS does, and against ones that do not."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from probes.control import (
    GET,
    MAX_REPLY_BYTES,
    NOT_FOUND,
    SET,
    SET_CONN_TOKEN,
    ControlBroken,
    ControlRefused,
    ControlSocket,
    ControlTimeout,
    ControlUnavailable,
    ForbiddenRequest,
    SetConnToken,
)
from probes.layout import Layout

LAYOUT = Layout.load("1.10.2")
GET_INFO, GET_ALL, GET_ONE = 18, 90, 91
VERSION = 0x00010000
Serve = Callable[..., "tuple[Server, ControlSocket]"]
Handler = Callable[[socket.socket, tuple[int, int, int, int], bytes], None]


def reply(
    request: tuple[int, int, int, int], body: bytes = b"", *, code: int = 0, text: bytes = b"", **other: int
) -> bytes:
    """DPVS's answer to ``request``; ``other`` overrides version, id, type or len."""
    fields = {**dict(zip(("version", "id", "type"), request, strict=False)), "len": len(body), **other}
    head = (fields["version"], fields["id"], fields["type"], code, text, fields["len"])
    return struct.pack("<IIIi64sQ", *head) + body


def after(seconds: float, body: bytes = b"") -> Handler:
    """Answer, but not at once."""

    def handler(connection: socket.socket, request: tuple[int, int, int, int], _: bytes) -> None:
        time.sleep(seconds)
        connection.sendall(reply(request, body))

    return handler


class Server:
    """listen(1), one request a connection, read whole before it is answered; remembers what came and how."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self.requests: list[tuple[tuple[int, int, int, int], bytes]] = []
        self.first_reads: list[int] = []
        self._handler = handler
        self._socket = socket.socket(socket.AF_UNIX)
        cwd = os.getcwd()
        os.chdir(path.parent)  # the path may be longer than an address holds
        self._socket.bind(path.name)
        os.chdir(cwd)
        self._socket.listen(1)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                data = connection.recv(1 << 20)
                if not data:
                    continue
                self.first_reads.append(len(data))
                version, number, kind, length = struct.unpack("<IIIxxxxQ", data[:24])
                while len(data) < 24 + length:
                    data += connection.recv(1 << 20)
                request = (version, number, kind, length)
                self.requests.append((request, data[24:]))
                try:
                    self._handler(connection, request, data[24:])
                except OSError:
                    pass

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    servers: list[Server] = []

    def make(handler: Handler, path: Path | None = None, **limits: float) -> tuple[Server, ControlSocket]:
        path = path or tmp_path / "dpvs.ipc"
        servers.append(Server(path, handler))
        return servers[-1], ControlSocket(str(path), LAYOUT, **limits)

    yield make
    for server in servers:
        server.close()


def entry(port: int, state: bytes = b"TCP_EST") -> bytes:
    return struct.pack(
        "<HHHxx16s16s16s16s4H I B16s xxx", 2, 2, 6, b"\x0a\0\0\1", b"\x0a\0\1\1", b"\x0a\0\2\1", b"\x0a\0\3\1",
        *(socket.htons(p) for p in (port, 80, 1025, 8080)), 90, 1, state,
    )  # fmt: skip


def array(entries: list[bytes], result: int = 1, worker: int = 0) -> bytes:
    return struct.pack("<IIB", len(entries), result, worker) + b"".join(entries)


class TestRequests:
    def test_the_request_is_what_dpvs_reads(self, serve: Serve) -> None:
        server, control = serve(lambda c, r, b: c.sendall(reply(r, b"answer")))
        assert control.get(GET_INFO, b"question") == b"answer"
        assert server.requests == [((VERSION, GET_INFO, GET, 8), b"question")]

    def test_a_large_request_leaves_whole(self, serve: Serve) -> None:
        """512 records to the agent: one send, so that DPVS's master never waits for the second half."""
        server, control = serve(after(0.05))
        assert control.set(89, bytes(80000), allow_set_conn_token=SET_CONN_TOKEN) == 0
        assert server.requests[0][0] == (VERSION, 89, SET, 80000)
        assert len(server.requests[0][1]) == 80000

    def test_release(self, serve: Serve) -> None:
        _, control = serve(lambda c, r, b: c.sendall(reply(r, struct.pack("<IIII", 0x10A02, 0, 4, 2))))
        assert control.release() == 0x10A02

    def test_no_descriptor_is_left(self, serve: Serve) -> None:
        _, control = serve(lambda c, r, b: c.sendall(reply(r)))
        control.get(GET_INFO)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            control.get(GET_INFO)
        time.sleep(0.05)
        assert len(os.listdir("/proc/self/fd")) <= before + 1

    def test_a_path_longer_than_an_address(self, serve: Serve, tmp_path: Path) -> None:
        directory = tmp_path / ("d" * 120)
        directory.mkdir()
        _, control = serve(lambda c, r, b: c.sendall(reply(r, b"x")), directory / "dpvs.ipc")
        assert control.get(GET_INFO) == b"x"

    def test_the_backlog_of_one(self, serve: Serve) -> None:
        _, control = serve(after(0.02, b"x"))
        answers: list[bytes] = []
        threads = [threading.Thread(target=lambda: answers.append(control.get(GET_INFO))) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [b"x"] * 12


class TestNothingKillsDpvs:
    @pytest.mark.parametrize("number", [0, GET_INFO, 89, 90])
    def test_no_set_without_the_token(self, serve: Serve, number: int) -> None:
        server, control = serve(lambda c, r, b: c.sendall(reply(r)))
        for token in (None, SetConnToken(), "yes"):
            with pytest.raises(ForbiddenRequest):
                control.request(SET, number, b"", allow_set_conn_token=token)  # type: ignore[arg-type]
        assert server.requests == []

    @pytest.mark.parametrize("kind", [2, -1, 7])
    def test_no_other_type(self, serve: Serve, kind: int) -> None:
        server, control = serve(lambda c, r, b: None)
        with pytest.raises(ForbiddenRequest):
            control.request(kind, GET_INFO, b"", allow_set_conn_token=SET_CONN_TOKEN)
        assert server.requests == []


class TestBadAnswers:
    def test_an_error_has_its_code_and_text(self, serve: Serve) -> None:
        # With an error DPVS announces a body that it does not send.
        _, control = serve(lambda c, r, b: c.sendall(reply(r, code=-1, text=b"invalid parameter", len=100)))
        with pytest.raises(ControlRefused, match="invalid parameter") as error:
            control.get(GET_INFO)
        assert error.value.code == -1

    def test_no_answer_at_all(self, serve: Serve) -> None:
        """What DPVS does with a wrong version or an id that nobody handles."""
        _, control = serve(lambda c, r, b: None)
        with pytest.raises(ControlBroken):
            control.get(GET_INFO)

    @pytest.mark.parametrize(
        "answer",
        [
            lambda r: b"x" * 40,
            lambda r: reply(r, b"short", len=500),
            lambda r: reply(r, id=r[1] + 1),
            lambda r: reply(r, type=1 - r[2]),
            lambda r: reply(r, version=0x20000),
            lambda r: reply(r, len=MAX_REPLY_BYTES + 1),
        ],
    )
    def test_what_is_not_an_answer(self, serve: Serve, answer: Callable[..., bytes]) -> None:
        _, control = serve(lambda c, r, b: c.sendall(answer(r)))
        with pytest.raises(ControlBroken):
            control.get(GET_INFO)

    def test_a_silent_dpvs(self, serve: Serve) -> None:
        over = threading.Event()
        _, control = serve(lambda c, r, b: over.wait(60), reply_seconds=0.1)
        with pytest.raises(ControlTimeout):
            control.get(GET_INFO)
        over.set()

    def test_a_dripping_dpvs(self, serve: Serve) -> None:
        """The limit is for the whole answer, not for each byte."""

        dripped = 0

        def drip(connection: socket.socket, request: tuple[int, int, int, int], body: bytes) -> None:
            nonlocal dripped
            for byte in reply(request)[:20]:
                connection.sendall(bytes([byte]))
                dripped += 1
                time.sleep(0.05)

        _, control = serve(drip, reply_seconds=0.2)
        with pytest.raises(ControlTimeout):
            control.get(GET_INFO)
        assert dripped < 12  # 0.6 s

    def test_nobody_accepts(self, tmp_path: Path) -> None:
        path = tmp_path / "full.ipc"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen(0)
            waiting = []
            for _ in range(3):
                one = socket.socket(socket.AF_UNIX)
                one.setblocking(False)
                one.connect_ex(str(path))
                waiting.append(one)
            with pytest.raises(ControlTimeout):
                ControlSocket(str(path), LAYOUT, connect_seconds=0.1).get(GET_INFO)
            for one in waiting:
                one.close()

    def test_no_dpvs_there(self, tmp_path: Path) -> None:
        with pytest.raises(ControlUnavailable) as error:
            ControlSocket(str(tmp_path / "none.ipc"), LAYOUT).get(GET_INFO)
        assert error.value.help_text
        left_over = tmp_path / "left.ipc"
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(str(left_over))
        with pytest.raises(ControlUnavailable):
            ControlSocket(str(left_over), LAYOUT).get(GET_INFO)


class TestSessions:
    def test_all_pages(self, serve: Serve) -> None:
        pages = [array([entry(1), entry(2)], 3, 1), array([entry(3)], 3, 2), array([], 1, 0)]
        server, control = serve(lambda c, r, b: c.sendall(reply(r, pages[len(server.requests) - 1])))
        rows = control.sessions()
        assert rows["cport"].tolist() == [1, 2, 3]
        assert rows["state"].tolist() == [b"TCP_EST"] * 3
        assert rows["lcoreid"].tolist() == [1] * 3
        assert rows["laddr"][0][:4].tolist() == [10, 0, 2, 1]
        asked = [struct.unpack("<II", body[:8]) for _, body in server.requests]
        assert asked == [(1, 0), (3, 1), (3, 2)]  # all, then more from the worker that DPVS named
        assert all(len(body) == 48 for _, body in server.requests)

    def test_none(self, serve: Serve) -> None:
        _, control = serve(lambda c, r, b: c.sendall(reply(r, array([]))))
        assert len(control.sessions()) == 0

    def test_one(self, serve: Serve) -> None:
        server, control = serve(lambda c, r, b: c.sendall(reply(r, array([entry(40000)]))))
        row = control.session(2, 6, b"\x0a\0\0\1", 40000, b"\x0a\0\1\1", 80)
        assert row is not None
        assert int(row["cport"]) == 40000
        flag, whence, af, proto, sport, tport, sip, tip = struct.unpack("<IIHH2s2s16s16s", server.requests[0][1])
        assert (flag, whence, af, proto) == (4, 0, 2, 6)
        assert (sport, tport) == ((40000).to_bytes(2, "big"), (80).to_bytes(2, "big"))
        assert (sip[:4], tip[:4]) == (b"\x0a\0\0\1", b"\x0a\0\1\1")

    def test_one_that_is_not_there(self, serve: Serve) -> None:
        _, control = serve(lambda c, r, b: c.sendall(reply(r, code=NOT_FOUND, text=b"not exist")))
        assert control.session(2, 6, bytes(4), 1, bytes(4), 2) is None

    @pytest.mark.parametrize("body", [b"", b"\1\0\0", array([entry(1)])[:-1], struct.pack("<IIB", 10**9, 1, 0)])
    def test_a_list_that_lies(self, serve: Serve, body: bytes) -> None:
        _, control = serve(lambda c, r, b: c.sendall(reply(r, body)))
        with pytest.raises(ControlBroken):
            control.sessions()

    def test_an_address_too_long_is_not_sent(self, serve: Serve) -> None:
        server, control = serve(lambda c, r, b: None)
        with pytest.raises(ForbiddenRequest):
            control.session(10, 6, bytes(17), 1, bytes(16), 2)
        assert server.requests == []


class TestWordsOfDpvs:
    def test_they_can_be_printed(self, serve: Serve) -> None:
        _, control = serve(lambda c, r, b: c.sendall(reply(r, code=-1, text=b"\x1b[2Jno\nmemory \xff")))
        with pytest.raises(ControlRefused) as error:
            control.get(GET_INFO)
        assert str(error.value).isprintable()

    def test_a_list_without_end(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("probes.control.MAX_PAGES", 5)
        server, control = serve(lambda c, r, b: c.sendall(reply(r, array([entry(1)], result=2))))
        with pytest.raises(ControlBroken, match="without end"):
            control.sessions()
        assert len(server.requests) == 5


def services_reply(*entries: tuple[int, int, bytes, int]) -> bytes:
    """The list of services as DPVS packs it; offsets of 1.10.2, include/conf/service.h."""
    out = struct.pack("<BBH4x", 0, 0, len(entries))
    for af, proto, address, port in entries:
        entry = bytearray(264)
        entry[0:4], entry[4], entry[6:8] = af.to_bytes(4, "little"), proto, port.to_bytes(2, "big")
        entry[36:52] = address.ljust(16, b"\xee")  # DPVS leaves rubbish behind an IPv4 address
        out += entry
    return out


GET_SERVICES = 19
SIX = bytes(range(16))
LISTED = ((2, 6, b"\x0a\0\0\1", 80), (10, 17, SIX, 443), (2, 6, b"\0\0\0\0", 0), (2, 17, b"\x0a\0\0\1", 0))


def services_server(refuse: int = 0, cut: int = 0, said: int = len(LISTED)) -> Handler:
    """Lists LISTED, but refuses the first ``refuse`` times, and leaves the last ``cut`` bytes out."""
    left = refuse

    def handler(connection: socket.socket, request: tuple[int, int, int, int], body: bytes) -> None:
        nonlocal left
        if request[1] == GET_INFO:
            connection.sendall(reply(request, struct.pack("<4I", 0x010A02, 0, said, 1)))
            return
        assert (request[1], body) == (GET_SERVICES, struct.pack("<BBH4x", 0, 0, said))
        if left:
            left -= 1
            connection.sendall(reply(request, code=-4, text=b"no"))
            return
        data = services_reply(*LISTED)
        connection.sendall(reply(request, data[: len(data) - cut]))

    return handler


@pytest.mark.parametrize("refuse", [0, 2])
def test_services_with_an_address_and_a_port(serve: Serve, refuse: int) -> None:
    _, client = serve(services_server(refuse))
    found = client.services()
    assert found is not None
    assert found["af"].tolist() == [2, 10]
    assert found["proto"].tolist() == [6, 17]
    assert found["port"].tolist() == [80, 443]
    assert [row.tobytes() for row in found["addr"]] == [b"\x0a\0\0\1".ljust(16, b"\0"), SIX]


def test_no_services(serve: Serve) -> None:
    _, client = serve(services_server(said=0))
    found = client.services()
    assert found is not None
    assert len(found) == 0


def test_a_list_of_services_that_is_refused(serve: Serve) -> None:
    _, client = serve(services_server(refuse=3))
    with pytest.raises(ControlRefused, match="refused to list its services: no"):
        client.services()


def test_a_list_of_services_that_is_cut(serve: Serve) -> None:
    _, client = serve(services_server(cut=1))
    with pytest.raises(ControlBroken, match="4 services but sent 1063 bytes"):
        client.services()

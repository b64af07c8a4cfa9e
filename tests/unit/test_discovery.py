# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/discovery: how sources are written, and that an etcd that answers nonsense is a failure."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from replicator.discovery import gateway
from replicator.discovery.access import Access, BadAccess
from replicator.discovery.etcd import EtcdSource
from replicator.discovery.source import BadSource, EtcdPlace, Myself, SourceFailed, SrvPlace, name_of, parse
from replicator.transport.address import Address, BadAddress

OK = b"HTTP/1.1 200 OK\r\n"


def test_sources_as_they_are_written() -> None:
    assert parse("etcd://10.0.0.1:2379/lb/east") == EtcdPlace((Address("10.0.0.1", 2379),), "/lb/east/")
    two = parse("etcd://a:2379,[fd00::1]:2380//x/")
    assert two == EtcdPlace((Address("a", 2379), Address("fd00::1", 2380)), "/x/")
    assert parse("dns+srv://_dpvs-probe._tcp.lb.svc") == SrvPlace("_dpvs-probe._tcp.lb.svc", None)
    place = parse("dns+srv://127.0.0.1:5353/_dpvs-probe._tcp.lb.")
    assert place == SrvPlace("_dpvs-probe._tcp.lb.", Address("127.0.0.1", 5353))
    assert name_of(place) == "dns+srv _dpvs-probe._tcp.lb."
    assert name_of(two) == "etcd /x/"


@pytest.mark.parametrize(
    "text",
    ["", "etcd", "etcd://", "etcd://h:1", "etcd://h:1/", "etcd://h/x", "etcd:///x", "consul://h:1/x", "dns+srv://name",
     "dns+srv://_a.b", "dns+srv:///_a._tcp.b", "dns+srv://h/_a._tcp.b", "etcd://h:1/\x00"],
)  # fmt: skip
def test_what_names_no_source_is_refused(text: str) -> None:
    with pytest.raises((BadSource, BadAddress)):
        parse(text)


def test_the_end_of_a_prefix() -> None:
    assert gateway.after("/lb/") == "/lb0"  # the next character after a slash
    assert gateway.decoded(gateway.encoded("/lb/ü")) == "/lb/ü"
    with pytest.raises(SourceFailed):
        gateway.decoded("%%%")


@asynccontextmanager
async def server(answer: bytes, *, cut: int = 1 << 20, hang: bool = False) -> AsyncIterator[Address]:
    """Answers everything with the same bytes, ``cut`` at a time."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for start in range(0, len(answer), cut):
            writer.write(answer[start : start + cut])
            await asyncio.sleep(0)
        if hang:
            await reader.read()
        writer.close()

    started = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with started:
        yield Address("127.0.0.1", started.sockets[0].getsockname()[1])


def chunked(*chunks: bytes) -> bytes:
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
    return OK + b"Transfer-Encoding: chunked\r\n\r\n" + pieces


def sized(body: bytes, first: bytes = OK) -> bytes:
    return first + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def answers(answer: bytes, cut: int) -> list[dict[str, Any]]:
    async with server(answer, cut=cut) as at, gateway.watch(at, "/v3/watch", {}) as said:
        return [each async for each in said]


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_objects_however_the_stream_is_cut(cut: int) -> None:
    lines = b'{"result":{"created":true}}\n{"result":{"events":[{"kv":{}}]}}\n'
    expected = [json.loads(line) for line in lines.splitlines()]
    for split in (1, 10, len(lines)):
        chunks = [lines[start : start + split] for start in range(0, len(lines), split)]
        assert asyncio.run(answers(chunked(*chunks), cut)) == expected
    assert asyncio.run(answers(sized(b'{"ID":"7"}'), cut)) == [{"ID": "7"}]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "breaks off"),
        (b"nonsense\r\n\r\n", "empty answer|answers 0"),
        (OK + b"\r\n", "empty answer"),
        (sized(b'{"error":"lease not found","code":5}', b"HTTP/1.1 404 Not Found\r\n"), "answers 404: lease not found"),
        (sized(b'{"error":{"message":"compacted"}}'), "compacted"),
        (sized(b"[1]"), "no object"),
        (sized(b"{"), "etcd at"),
        (OK + b"Content-Length: 99999999\r\n\r\n", "99999999 bytes"),
        (OK + b"Content-Length: 9\r\n\r\n{}", "etcd at"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n", "268435455 bytes"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "etcd at"),
        (chunked(b'{"a":'), "breaks off"),
    ],
)
def test_what_makes_no_sense_is_a_failure(answer: bytes, why: str) -> None:
    async def ask() -> None:
        async with server(answer) as at:
            await gateway.call(at, "/v3/kv/range", {})

    with pytest.raises(SourceFailed, match=why):
        asyncio.run(ask())


def test_nobody_there_and_nobody_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent() -> None:
        async with server(b"", hang=True) as at:
            await gateway.call(at, "/v3/kv/range", {})

    monkeypatch.setattr(gateway, "ANSWER_S", 0.05)
    with pytest.raises(SourceFailed, match="no answer"):
        asyncio.run(silent())
    with pytest.raises(SourceFailed, match="connection refused"):
        asyncio.run(gateway.call(Address("127.0.0.1", 1), "/v3/kv/range", {}))


def test_mutated_answers_are_failures_and_nothing_worse() -> None:
    draw = random.Random(7)
    entry = {"key": gateway.encoded("/x/b"), "value": gateway.encoded('{"address": "10.0.0.2:7700"}')}
    good = chunked(json.dumps({"header": {"revision": "5"}, "kvs": [entry]}).encode() + b"\n")
    heard: list[list[str]] = []
    failed = 0

    async def once(answer: bytes) -> None:
        async with server(answer) as at:
            source = EtcdSource(EtcdPlace((at,), "/x/"), Myself("a", None, None))
            troubles: list[str] = []
            run = asyncio.create_task(source.run(heard.append, troubles.append))
            while not run.done() and not troubles:  # the answer to the range is no answer to a watch
                await asyncio.sleep(0.001)
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
            assert troubles

    async def all_of_them() -> None:
        nonlocal failed
        await once(good)
        assert heard == [["10.0.0.2:7700"]]
        for _ in range(150):
            bad = bytearray(good)
            for _ in range(draw.randint(1, 3)):
                bad[draw.randrange(len(bad))] = draw.randrange(256)
            before = len(heard)
            await once(bytes(bad))
            failed += len(heard) == before

    asyncio.run(asyncio.wait_for(all_of_them(), 30))
    assert failed > 20


def test_how_an_etcd_is_spoken_to(tmp_path: Path) -> None:
    place = parse("etcd+tls://e:2379/lb?ca=/c.pem&cert=/me.pem&key=/me.key&user=lb&password_file=/p")
    assert place == EtcdPlace((Address("e", 2379),), "/lb/", Access(True, "/c.pem", "/me.pem", "/me.key", "lb", "/p"))
    assert parse("etcd+tls://e:2379/lb") == EtcdPlace((Address("e", 2379),), "/lb/", Access(tls=True))
    assert name_of(place) == "etcd /lb/"
    for query, why in (
        ("user=lb", "belong together"), ("password_file=/p", "belong together"), ("key=/k", "key without cert"),
        ("pass=x", "there is no 'pass'"), ("ca", "is not KEY=VALUE"), ("ca=", "with a value"),
        ("ca=/a&ca=/b", "each once"),
    ):  # fmt: skip
        with pytest.raises(BadAccess, match=why):
            parse(f"etcd+tls://e:2379/lb?{query}")
    with pytest.raises(BadAccess, match="without TLS"):
        parse("etcd://e:2379/lb?user=lb&password_file=/p")


def test_a_password_is_in_a_file_of_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "password"
    access = Access(True, user="lb", password_file=str(file))
    with pytest.raises(BadAccess, match="No such file"):
        access.password()
    file.write_text("s3cret\n")
    file.chmod(0o640)
    with pytest.raises(BadAccess, match="open to others"):
        access.password()
    file.chmod(0o600)
    assert access.password() == "s3cret"
    for text in ("", "\n", "x" * 2000):
        file.write_text(text)
        with pytest.raises(BadAccess, match="has no password"):
            access.password()
    with pytest.raises(BadAccess, match=r"certificates for etcd \(/no/ca.pem\)"):
        Access(True, ca="/no/ca.pem").context()
    assert Access().context() is None

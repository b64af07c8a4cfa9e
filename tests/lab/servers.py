# SPDX-License-Identifier: GPL-2.0-or-later
"""Servers that know who the members of a cluster are: a real etcd, and a real DNS server.

Rules: each keeps its port and, etcd, its data when it is started again. What is still there at the end is killed.
"""

import random
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.available import ETCD
from tests.lab.process import LabError

LOCALHOST = "127.0.0.1"
START_S, TRIES = 90.0, 100
PORTS = range(15_000, 30_000)  # below those that the kernel gives to connections


def free_port() -> int:
    """A port of TCP and UDP that nobody has now, and no outgoing connection takes later."""
    for port in random.sample(PORTS, TRIES):
        with suppress(OSError), socket.socket() as probe, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            probe.bind((LOCALHOST, port))
            datagrams.bind((LOCALHOST, port))
            return port
    raise LabError(f"none of {TRIES} ports is free")


class _Server:
    """One process that listens on one TCP port."""

    def __init__(self, directory: Path, host: str = LOCALHOST) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.host, self.port = directory, host, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def _run(self, command: Sequence[str]) -> None:
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory)
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection((self.host, self.port), 1).close()
                return
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = (self.directory / "server.log").read_text(errors="replace")[-2000:]
                    raise LabError(f"{command[0]} does not come up: {error}\n{said}") from error
                time.sleep(0.02)

    def kill(self) -> None:
        """At once; the peers are told nothing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __exit__(self, *_: object) -> None:
        self.kill()


class Etcd(_Server):
    """An etcd of one member; with ``files`` (authority, certificate, key) by TLS, for those who have one too."""

    def __init__(self, directory: Path, host: str = LOCALHOST, *, files: tuple[Path, Path, Path] | None = None) -> None:
        super().__init__(directory, host)
        self._files = files

    def __enter__(self) -> "Etcd":
        self.start()
        return self

    def start(self) -> None:
        """With what it had when it was killed."""
        here = f"http{'s' if self._files else ''}://{self.host}:{self.port}"
        names = ("--trusted-ca-file", "--cert-file", "--key-file")
        tls = [f"{name}={file}" for name, file in zip(names, self._files or (), strict=False)]
        tls += ["--client-cert-auth"] if tls else []
        self._run([
            str(ETCD), "--data-dir", str(self.directory / "data"), "--listen-client-urls", here,
            "--advertise-client-urls", here, "--listen-peer-urls", f"http://{self.host}:0", "--unsafe-no-fsync", *tls,
        ])  # fmt: skip


class Dns(_Server):
    """A dnsmasq that serves one name."""

    def __init__(self, directory: Path, name: str) -> None:
        super().__init__(directory)
        self.name = name

    def __enter__(self) -> "Dns":
        return self

    def serve(self, ports: Iterable[int]) -> None:
        """From now on the name has these ports of this machine; with none of them it does not exist."""
        self.kill()
        records = [f"--srv-host={self.name},localhost,{port}" for port in ports]
        self._run([
            "dnsmasq", "--keep-in-foreground", f"--port={self.port}", f"--listen-address={LOCALHOST}",
            "--bind-interfaces", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--pid-file=", "--user=root",
            "--local-ttl=1", f"--local=/{self.name.partition('.')[2]}/", *records,
        ])  # fmt: skip

# SPDX-License-Identifier: GPL-2.0-or-later
"""Client of DPVS's control socket.

Rules, each from DPVS 1.10.2, src/ctrl.c:

* DPVS reads a request blocking, in the loop of its master lcore: a half-sent request stops its control plane. Every
  request leaves in one ``sendall`` into a send buffer that holds it whole, and everything has a time limit.
* One request a connection; ``listen(fd, 1)``: a full backlog is retried for a short while.
* A request with a wrong version, or an id nobody handles, gets no reply at all: the connection just closes.
* **A SET whose handler is NULL kills DPVS** (``SOCKOPT_SET_CONN`` and others). So nothing here sends any SET without
  ``SET_CONN_TOKEN``, which only ``probes/agent/client.py`` passes, after it has proven that its handler is in place.
"""

import errno
import os
import socket
import time
from typing import Final

import numpy as np
import numpy.typing as npt

from probes.errors import DpvsProbeError, NeedRoot
from probes.flow import SERVICE
from probes.layout import BadLayout, Layout

GET, SET = 0, 1
CONNECT_SECONDS = 2.0
REPLY_SECONDS = 5.0
RETRY_SECONDS = 0.005
SERVICES_TRIES = 3
MAX_REPLY_BYTES = 64 << 20
MAX_PAGES = 1 << 20  # of a list of sessions
_SUN_PATH = 107
SO_SNDBUFFORCE = 32  # asm-generic/socket.h; Python has no name for it

# enum conn_get_flags, conn_get_result: DPVS 1.10.2, include/conf/conn.h
FLAG_ALL, FLAG_MORE, FLAG_SPECIFIED, FLAG_TEMPLATE = 1, 2, 4, 8
RESULT_OK, RESULT_MORE = 1, 2
NOT_FOUND = -4  # EDPVS_NOTEXIST: DPVS 1.10.2, include/conf/common.h


class SetConnToken:
    """What a caller shows to be allowed a SET: it says "I have proven that the handler is there"."""


SET_CONN_TOKEN: Final = SetConnToken()


class ControlUnavailable(DpvsProbeError):
    help_text = "Is DPVS up? Its control socket is /var/run/dpvs.ipc unless it was started with -x."


class ControlTimeout(DpvsProbeError):
    help_text = "DPVS's control plane is busy or stuck: see whether ipvsadm -ln answers, then try again."


class ControlBroken(DpvsProbeError):
    help_text = "DPVS does not speak the control protocol of the chosen layout: run dpvs-probe doctor."


class ControlRefused(DpvsProbeError):
    """DPVS answered with an error; ``code`` is its negative errcode."""

    help_text = "DPVS's own log says more."

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class ForbiddenRequest(DpvsProbeError):
    """A programming error, stopped before it kills a load balancer."""

    help_text = "This is a mistake in dpvs-probe: please report it. Nothing was sent."


class ControlSocket:
    """``ControlSocket(path, layout)``: each call opens a connection of its own, so there is nothing to close."""

    def __init__(
        self,
        path: str,
        layout: Layout,
        *,
        connect_seconds: float = CONNECT_SECONDS,
        reply_seconds: float = REPLY_SECONDS,
    ) -> None:
        self.path = path
        self.layout = layout
        self._connect_seconds = connect_seconds
        self._reply_seconds = reply_seconds
        self.entry_dtype = _entry_dtype(layout)

    # --- one request -------------------------------------------------------------------------------------------------

    def request(
        self, kind: int, request_id: int, *body: bytes | memoryview, allow_set_conn_token: SetConnToken | None = None
    ) -> tuple[int, str, bytes]:
        """Send one request, its body given in parts, and return (errcode, errstr, body of the reply). The only function
        that talks to the socket.
        """
        if kind not in (GET, SET):
            raise ForbiddenRequest(f"control request of unknown type {kind}")
        if kind == SET and allow_set_conn_token is not SET_CONN_TOKEN:
            raise ForbiddenRequest(f"SET request {request_id} without proof that DPVS has a handler for it")
        size = sum(len(part) for part in body)
        header = {"version": self.layout.sockopt_version, "id": request_id, "type": kind, "len": size}
        message = b"".join((self._build("dpvs_sock_msg", **header), *body))
        try:
            with self._connect(len(message)) as connection:
                connection.settimeout(self._reply_seconds)
                connection.sendall(message)
                return self._reply(connection, kind, request_id)
        except TimeoutError:
            raise ControlTimeout(f"no answer from {self.path} within {self._reply_seconds:g} s") from None
        except (ConnectionError, EOFError) as error:
            raise ControlBroken(
                f"DPVS closed the control connection without an answer to request {request_id}: {error}"
            ) from None

    def get(self, request_id: int, body: bytes = b"") -> bytes:
        """Body of the reply to a GET; raises ControlRefused when DPVS reports an error."""
        code, text, data = self.request(GET, request_id, body)
        if code:
            raise ControlRefused(f"DPVS refused request {request_id}: {text or 'no reason'} ({code})", code)
        return data

    def set(self, request_id: int, *body: bytes | memoryview, allow_set_conn_token: SetConnToken) -> int:
        """errcode of a SET, 0 for success. See the module's rules."""
        return self.request(SET, request_id, *body, allow_set_conn_token=allow_set_conn_token)[0]

    # --- what DPVS can tell ------------------------------------------------------------------------------------------

    def release(self) -> int:
        """DPVS's version number, see ``probes.layout.release_name``: a cheap question to see that the socket works."""
        data = self.get(self.layout.sockopt_id("DPVS_SO_GET_INFO"))
        return self._unpack("dp_vs_getinfo", "version", data)

    def services(self) -> npt.NDArray[np.void] | None:
        """The services with an address and a port, shape (n,), dtype SERVICE; None if the layout does not know them.

        As ``ipvsadm -ln`` asks: each worker copies its counters, microseconds for a service.
        """
        if not self.layout.has("dp_vs_service_compat") or "DPVS_SO_GET_SERVICES" not in self.layout.sockopt_ids:
            return None
        request_id, size = self.layout.sockopt_id("DPVS_SO_GET_SERVICES"), self.layout.size("dp_vs_service_compat")
        for left in reversed(range(SERVICES_TRIES)):
            info = self.get(self.layout.sockopt_id("DPVS_SO_GET_INFO"))
            count = self._unpack("dp_vs_getinfo", "num_services", info)
            if count == 0:
                return np.empty(0, SERVICE)
            # It must name the number that there are; index 0 is the master (ip_vs_service.c: dp_vs_services_get_uc_cb).
            code, text, data = self.request(GET, request_id, self._build("dp_vs_services_front", count=count))
            if code == 0:
                break
            if left == 0:  # else a service came or went in between
                raise ControlRefused(f"DPVS refused to list its services: {text or 'no reason'} ({code})", code)
        first = self.layout.size("dp_vs_services_front")
        said = self._unpack("dp_vs_services_front", "count", data)
        if said > count or first + said * size > len(data):
            raise ControlBroken(f"DPVS says {said} services but sent {len(data)} bytes")
        found = np.zeros(said, SERVICE)
        for row, base in zip(found, range(first, len(data), size), strict=False):
            fields = {name: self.layout.unpack("dp_vs_service_compat", name, data, base) for name in ("af", "proto")}
            at, length = self.layout.field("dp_vs_service_compat", "addr")
            address = data[base + at : base + at + length]
            row["af"], row["proto"] = fields["af"] & 0xFF, fields["proto"]
            row["port"] = int.from_bytes(data[base + self.layout.offset("dp_vs_service_compat", "port") :][:2], "big")
            row["addr"] = np.frombuffer(address[:4].ljust(16, b"\0") if row["af"] == socket.AF_INET else address, "u1")
        named: npt.NDArray[np.bool_] = (found["port"] != 0) & found["addr"].any(axis=1)
        listed: npt.NDArray[np.void] = found[named]  # others go by mark or match, as SNAT does
        return listed

    def session(  # noqa: PLR0917 - a tuple of the field
        self, af: int, proto: int, saddr: bytes, sport: int, daddr: bytes, dport: int
    ) -> npt.NDArray[np.void] | None:
        """The session of one tuple, as seen from the side that sends to ``daddr``; None if DPVS has none.

        A hash look-up on each worker. Note that DPVS restarts the timer of a session that it finds this way
        (DPVS 1.10.2, ip_vs_conn.c: conn_get_msgcb_slave ends in dp_vs_conn_put). Addresses are 4 or 16 bytes in network
        order, ports are plain numbers.
        """
        pair = self._build(
            "ip_vs_sockpair", af=af, proto=proto, sip=saddr, tip=daddr,
            sport=sport.to_bytes(2, "big"), tport=dport.to_bytes(2, "big"),
        )  # fmt: skip
        body = self._build("ip_vs_conn_req", flag=FLAG_SPECIFIED, whence=0, sockpair=pair)
        code, text, data = self.request(GET, self.layout.sockopt_id("SOCKOPT_GET_CONN_SPECIFIED"), body)
        if code == NOT_FOUND:
            return None
        if code:
            raise ControlRefused(f"DPVS refused to look a session up: {text} ({code})", code)
        _, rows, _ = self._conn_array(data)
        return rows[0] if len(rows) else None

    def sessions(self) -> npt.NDArray[np.void]:
        """All sessions DPVS lists, shape (n,), fields of ``struct ip_vs_conn_entry``.

        Dear for DPVS: each worker walks its whole hash table while the master waits, and a second client that lists at
        the same time takes rows away from this one. For tests and for people, never for the running product.
        """
        pages: list[npt.NDArray[np.void]] = []
        flag, whence = FLAG_ALL, 0
        for _ in range(MAX_PAGES):
            body = self._build("ip_vs_conn_req", flag=flag, whence=whence)
            result, rows, worker = self._conn_array(self.get(self.layout.sockopt_id("SOCKOPT_GET_CONN_ALL"), body))
            pages.append(rows)
            if not result & RESULT_MORE:
                return np.concatenate(pages)
            flag, whence = FLAG_ALL | FLAG_MORE, worker
        raise ControlBroken(f"DPVS lists sessions without end: {MAX_PAGES} pages, and more")

    # --- packing -----------------------------------------------------------------------------------------------------

    def _build(self, struct_name: str, **values: int | bytes) -> bytes:
        """The bytes of a struct, little-endian, what is not given zero; bytes shorter than their field are padded."""
        out = bytearray(self.layout.size(struct_name))
        for name, value in values.items():
            offset, size = self.layout.field(struct_name, name)
            raw = value.to_bytes(size, "little") if isinstance(value, int) else value
            if len(raw) > size:
                raise ForbiddenRequest(f"{struct_name}.{name} holds {size} bytes, not {len(raw)}")
            out[offset : offset + len(raw)] = raw
        return bytes(out)

    def _conn_array(self, data: bytes) -> tuple[int, npt.NDArray[np.void], int]:
        """(result flags, rows, next worker) of a ``struct ip_vs_conn_array``."""
        count = self._unpack("ip_vs_conn_array", "nconns", data)
        first = self.layout.offset("ip_vs_conn_array", "array")
        if first + count * self.entry_dtype.itemsize > len(data):
            raise ControlBroken(f"DPVS says {count} sessions but sent {len(data)} bytes")
        rows = np.frombuffer(data, self.entry_dtype, count, first).copy()
        return self._unpack("ip_vs_conn_array", "resl", data), rows, self._unpack("ip_vs_conn_array", "curcid", data)

    def _unpack(self, struct_name: str, field: str, data: bytes) -> int:
        try:
            return self.layout.unpack(struct_name, field, data)
        except BadLayout:
            raise ControlBroken(f"DPVS's answer of {len(data)} bytes is too short for {struct_name}.{field}") from None

    # --- the socket --------------------------------------------------------------------------------------------------

    def _connect(self, size: int) -> socket.socket:
        deadline = time.monotonic() + self._connect_seconds
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                connection.setblocking(False)
                _make_room(connection, size)
                _connect_path(connection, self.path)
                return connection
            except BlockingIOError:  # the backlog of one is taken
                connection.close()
                if time.monotonic() >= deadline:
                    raise ControlTimeout(f"{self.path} took no connection in {self._connect_seconds:g} s") from None
                time.sleep(RETRY_SECONDS)
            except PermissionError:
                connection.close()
                raise NeedRoot(f"{self.path} may not be opened") from None
            except OSError as error:
                connection.close()
                raise ControlUnavailable(f"cannot reach {self.path}: {error.strerror or error}") from None
            except BaseException:
                connection.close()
                raise

    def _reply(self, connection: socket.socket, kind: int, request_id: int) -> tuple[int, str, bytes]:
        layout = self.layout
        deadline = time.monotonic() + self._reply_seconds
        head = _receive(connection, layout.size("dpvs_sock_msg_reply"), deadline)
        fields = {n: layout.unpack("dpvs_sock_msg_reply", n, head) for n in ("version", "id", "type", "errcode", "len")}
        if (fields["id"], fields["type"]) != (request_id, kind):
            raise ControlBroken(f"DPVS answered request {fields['id']} when asked {request_id}")
        if fields["version"] != layout.sockopt_version:
            raise ControlBroken(f"DPVS speaks control protocol {fields['version']:#x}, not {layout.sockopt_version:#x}")
        code = fields["errcode"] - (1 << 32) if fields["errcode"] >> 31 else fields["errcode"]
        offset, size = layout.field("dpvs_sock_msg_reply", "errstr")
        text = head[offset : offset + size].split(b"\0", 1)[0].decode("utf-8", "replace")
        text = "".join(c if c.isprintable() else " " for c in text)
        if code:  # DPVS sends no body with an error, whatever len says
            return code, text, b""
        if fields["len"] > MAX_REPLY_BYTES:
            raise ControlBroken(f"DPVS announces an answer of {fields['len']} bytes")
        return code, text, _receive(connection, fields["len"], deadline)


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        count = connection.recv_into(view[got:])
        if count == 0:
            raise EOFError(f"{got} of {size} bytes came")
        got += count
    return bytes(data)


def _make_room(connection: socket.socket, size: int) -> None:
    """Make the send buffer so large that a request of ``size`` bytes leaves at once, whatever becomes of us then.

    The kernel doubles the number and counts its own overhead: three times holds a whole request. Root may go beyond
    the system's limit (net.core.wmem_max); who may not sends the rest of a large request while DPVS reads.
    """
    try:
        connection.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, max(3 * size, 1 << 16))
    except PermissionError:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, max(3 * size, 1 << 16))


def _connect_path(connection: socket.socket, path: str) -> None:
    """Connect, also where the path is longer than a socket address holds (as below /proc/PID/root it may be)."""
    if len(os.fsencode(path)) <= _SUN_PATH:
        _checked_connect(connection, path)
        return
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _checked_connect(connection, f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    finally:
        os.close(directory)


def _checked_connect(connection: socket.socket, path: str) -> None:
    code = connection.connect_ex(path)
    if code in (errno.EAGAIN, errno.EINPROGRESS):
        raise BlockingIOError(code, os.strerror(code))
    if code:
        raise OSError(code, os.strerror(code))


def _entry_dtype(layout: Layout) -> np.dtype[np.void]:
    """``struct ip_vs_conn_entry``: addresses 16u1 and ports in network order."""
    formats = {
        "in_af": "<u2", "out_af": "<u2", "proto": "<u2", "caddr": "16u1", "vaddr": "16u1", "laddr": "16u1",
        "daddr": "16u1", "cport": ">u2", "vport": ">u2", "lport": ">u2", "dport": ">u2", "timeout": "<u4",
        "lcoreid": "u1", "state": "S16",
    }  # fmt: skip
    return np.dtype(
        {
            "names": list(formats),
            "formats": list(formats.values()),
            "offsets": [layout.offset("ip_vs_conn_entry", name) for name in formats],
            "itemsize": layout.size("ip_vs_conn_entry"),
        }
    )

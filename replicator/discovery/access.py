# SPDX-License-Identifier: GPL-2.0-or-later
"""How an etcd is spoken to: by TLS or not, with a certificate or not, as whom.

Rules: secrets are in files, never in what a command line or a log shows. Files are read anew for each connection, so
that renewed ones count at once. A password never goes over a connection that is not encrypted.
"""

import os
import ssl
import stat
from typing import NamedTuple
from urllib.parse import parse_qsl

from probes.errors import DpvsProbeError

MAX_PASSWORD_BYTES = 1024
KEYS = ("ca", "cert", "key", "user", "password_file")


class BadAccess(DpvsProbeError):
    """What cannot be used to speak to an etcd."""

    help_text = (
        "Write etcd+tls://HOST:2379/PREFIX?ca=FILE&cert=FILE&key=FILE&user=NAME&password_file=FILE; each of them may be"
        " left out."
    )


class Access(NamedTuple):
    """Files are named by their paths; None where there is none."""

    tls: bool = False
    ca: str | None = None  # of the server's certificate; None: what the system trusts
    cert: str | None = None  # ours, with ``key``
    key: str | None = None
    user: str | None = None
    password_file: str | None = None

    def context(self) -> ssl.SSLContext | None:
        """For a connection; None without TLS. Raises BadAccess."""
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except OSError as error:
            files = ", ".join(name for name in (self.ca, self.cert, self.key) if name)
            raise BadAccess(f"certificates for etcd ({files}): {error.strerror or error}") from error
        return context

    def password(self) -> str:
        """What the file says, without the end of its line. Raises BadAccess."""
        assert self.password_file is not None
        try:
            with open(self.password_file) as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                    raise BadAccess(f"{self.password_file} is open to others", help_text="chmod 600 it.")
                text = file.read(MAX_PASSWORD_BYTES + 1)
        except (OSError, UnicodeError) as error:
            raise BadAccess(f"{self.password_file}: {error}") from error
        password = text.rstrip("\r\n")
        if not password or len(text) > MAX_PASSWORD_BYTES:
            raise BadAccess(f"{self.password_file} has no password")
        return password


def parse(query: str, *, tls: bool) -> Access:
    """What stands behind ``?``. Raises BadAccess."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise BadAccess(f"'{query}' is not KEY=VALUE&...") from error
    said = dict(pairs)
    strange = [name for name in said if name not in KEYS]
    if strange or len(said) != len(pairs) or not all(said.values()):
        raise BadAccess(f"'{query}': " + (f"there is no '{strange[0]}'" if strange else "each once, and with a value"))
    if said and not tls:
        raise BadAccess(f"{', '.join(said)} without TLS", help_text="Write etcd+tls:// instead of etcd://.")
    if ("user" in said) != ("password_file" in said):
        raise BadAccess("user and password_file belong together")
    if "key" in said and "cert" not in said:
        raise BadAccess("key without cert")
    return Access(tls, **said)

# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands ``dpvs-probe keys``: make a cluster's authority and its nodes' keys, and look at them.

Rules: like ``cli.py``: errors are raised and ``main`` prints them.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
from cryptography import x509

from replicator import keys as k


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def keys() -> None:
    """Make and show the keys by which nodes know each other.

    One authority for a cluster: `keys init`. For each node: `keys issue NODE`, then copy the directory that it names
    to the node, as /etc/dpvs-probe/keys.
    """


directory_option = click.option(
    "--dir", "directory", type=click.Path(file_okay=False, path_type=Path), default=k.AUTHORITY_DIRECTORY,
    show_default=True, help="Where the authority is.",
)  # fmt: skip
days_type = click.IntRange(1, k.MAX_DAYS)


@keys.command()
@directory_option
@click.option("--name", default="dpvs-probe", show_default=True, help="Name of the cluster.")
@click.option("--days", type=days_type, default=k.AUTHORITY_DAYS, show_default=True, help="How long it is valid.")
@click.option("--force", is_flag=True, help="Replace the authority that is there: no node will be believed any more.")
def init(directory: Path, name: str, days: int, force: bool) -> None:
    """Make a new authority."""
    made = k.init_authority(directory, name, days=days, force=force)
    click.echo(f"authority {name} is in {made.directory}, valid until {made.description.not_after:%Y-%m-%d}")
    click.echo(f"  Whoever has {made.directory / k.CA_KEY} can add nodes to the cluster: keep it off the nodes.")


@keys.command()
@click.argument("node")
@directory_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to put the keys; nodes/NODE beside the authority by default.",
)
@click.option("--days", type=days_type, default=k.NODE_DAYS, show_default=True, help="How long they are valid.")
@click.option(
    "--address", "addresses", multiple=True, metavar="HOST|IP",
    help="Put this host name or address into the certificate; for other programs, we do not need it.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the keys that are there.")
def issue(node: str, directory: Path, *, out: Path | None, days: int, addresses: tuple[str, ...], force: bool) -> None:
    """Make keys for NODE, signed by the authority."""
    made = k.issue(directory, node, out, days=days, addresses=addresses, force=force)
    until = f"{made.description.not_after:%Y-%m-%d}"
    click.echo(f"keys of node {node} are in {made.directory}, valid until {until}")
    to = f"root@{node}"
    click.echo(
        f"  Copy them: ssh {to} mkdir -p {k.KEYS_DIRECTORY} && scp -rp {made.directory}/. {to}:{k.KEYS_DIRECTORY}"
    )


@keys.command()
@click.argument("path", type=click.Path(path_type=Path), default=k.KEYS_DIRECTORY)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON, one object a line.")
def show(path: Path, as_json: bool) -> int:
    """Show the certificates in PATH, a file or a directory with a node's or an authority's keys.

    A node's directory is checked as attach would. Exit status 0 if all is well, else 1.
    """
    now = datetime.now(UTC)
    good = True
    for file, certificate in _certificates(path):
        told = k.describe(certificate)
        warning = k.expiry_warning(certificate, now)
        good = good and now <= told.not_after
        if as_json:
            click.echo(json.dumps({"file": str(file), **told.as_dict(now), "warning": warning}))
            continue
        kind = "authority" if told.authority else f"node {told.node}" if told.node else "no node of a cluster"
        click.echo(f"{file}: {kind}")
        for label, text in (
            ("name", told.name),
            ("issuer", told.issuer),
            ("valid", f"{told.not_before:%Y-%m-%d %H:%M} to {told.not_after:%Y-%m-%d %H:%M} UTC"),
            ("addresses", ", ".join(told.addresses)),
            ("key", told.key),
            ("serial", told.serial),
            ("sha256", told.fingerprint),
            ("warning", warning),
        ):
            if text:
                click.echo(f"  {label:<10} {text}")
    if path.is_dir() and not (path / k.CA_KEY).exists():
        k.load_identity(path, now=now)  # raises what attach would say
        if not as_json:
            click.echo("key, certificate and authority fit together")
    return 0 if good else 1


def _certificates(path: Path) -> Iterator[tuple[Path, x509.Certificate]]:
    if path.is_dir():
        files = [file for name in (k.NODE_CERTIFICATE, k.CA_CERTIFICATE) if (file := path / name).exists()]
        if not files:
            raise k.KeysMissing(f"there are no certificates in {path}")
    else:
        files = [path]
    for file in files:
        for certificate in k.read_certificates(file):
            yield file, certificate

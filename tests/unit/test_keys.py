# SPDX-License-Identifier: GPL-2.0-or-later
import json
import os
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from probes.errors import DpvsProbeError
from replicator import keys as k
from replicator.cli_keys import keys as command

NOW = datetime(2030, 5, 17, 12, 0, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return k.init_authority(tmp_path / "authority", "east", now=NOW).directory


@pytest.fixture
def node(authority: Path) -> Path:
    return k.issue(authority, "lb1", now=NOW).directory


def modes(directory: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


def test_authority(authority: Path) -> None:
    assert modes(authority) == {"ca.crt": 0o600, "ca.key": 0o600}
    assert stat.S_IMODE(authority.stat().st_mode) == 0o700
    (certificate,) = k.read_certificates(authority / "ca.crt")
    told = k.describe(certificate)
    assert (told.name, told.issuer, told.node, told.authority, told.key) == ("east", "east", None, True, "EC secp256r1")
    assert (told.not_after - NOW).days == k.AUTHORITY_DAYS
    assert told.not_before < NOW


def test_node(authority: Path, node: Path) -> None:
    assert node == authority / "nodes" / "lb1"
    assert modes(node) == {"ca.crt": 0o600, "node.crt": 0o600, "node.key": 0o600}
    identity = k.load_identity(node, now=NOW)
    assert identity.node == "lb1" == k.node_of(identity.certificate)
    assert identity.warnings(NOW) == []
    assert b"PRIVATE" not in repr(identity).encode()
    told = k.describe(identity.certificate)
    assert (told.name, told.issuer, told.authority, told.addresses) == ("lb1", "east", False, ())
    assert (told.not_after - NOW).days == k.NODE_DAYS


def test_openssl_agrees(authority: Path) -> None:
    """The strict rules of OpenSSL hold, for both purposes."""
    out = k.issue(authority, "lb1", addresses=["lb1.example", "10.0.0.1", "fd00::1"], now=NOW).directory
    for purpose in ("sslserver", "sslclient"):
        command_line = [
            "openssl", "verify", "-x509_strict", "-purpose", purpose, "-attime", str(int(NOW.timestamp())),
            "-CAfile", str(out / "ca.crt"), str(out / "node.crt"),
        ]  # fmt: skip
        assert subprocess.run(command_line, check=False, capture_output=True, text=True).stdout.endswith(": OK\n")
    told = k.describe(k.read_certificates(out / "node.crt")[0])
    assert told.addresses == ("lb1.example", "10.0.0.1", "fd00::1")


def test_never_overwrites(authority: Path, node: Path) -> None:
    before = {path: path.read_bytes() for path in (*authority.glob("ca.*"), *node.iterdir())}
    with pytest.raises(k.KeysExist, match=r"ca\.key is there already") as caught:
        k.init_authority(authority, "west", now=NOW)
    assert "--force" in caught.value.help_text
    with pytest.raises(k.KeysExist, match=r"node\.key is there already"):
        k.issue(authority, "lb1", now=NOW)
    (node / "node.key").unlink()
    with pytest.raises(k.KeysExist, match=r"node\.crt is there already"):
        k.issue(authority, "lb1", now=NOW)
    assert not (node / "node.key").exists(), "nothing is written where not all can be"
    before.pop(node / "node.key")
    assert {path: path.read_bytes() for path in before} == before
    k.issue(authority, "lb1", now=NOW, force=True)
    assert (node / "node.crt").read_bytes() != before[node / "node.crt"]
    k.load_identity(node, now=NOW)
    assert not [name for name in os.listdir(node) if name.startswith(".")], "no drafts stay behind"


def test_out_directory(authority: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(k.KeyExposed, match="others may write to it"):
        k.issue(authority, "lb1", shared, now=NOW)
    assert not list(shared.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(k.KeysError, match=r"cannot make directory .*: it is a file"):
        k.issue(authority, "lb1", tmp_path / "file", now=NOW)


@pytest.mark.parametrize("name", ["", ".", "..", "../lb", "-lb", "a b", "a/b", "é", "a\n", "x" * 65, "lb\0", "lb."])
def test_bad_names(authority: Path, name: str) -> None:
    with pytest.raises(k.BadName):
        k.issue(authority, name, now=NOW)
    with pytest.raises(k.BadName):
        k.init_authority(authority / "other", name, now=NOW)


@pytest.mark.parametrize("address", ["10.0.0.300", "a b", "", "lb:80", "-x", "[::1]", "é.example", "x" * 64])
def test_bad_addresses(authority: Path, address: str) -> None:
    with pytest.raises(k.BadName, match="neither a host name nor an address"):
        k.issue(authority, "lb1", addresses=[address], now=NOW)


def test_bounds(authority: Path) -> None:
    with pytest.raises(k.BadName, match="65 addresses"):
        k.issue(authority, "lb1", addresses=["10.0.0.1"] * 65, now=NOW)
    for days in (0, -1, k.MAX_DAYS + 1):
        with pytest.raises(k.BadName, match="days"):
            k.issue(authority, "lb1", days=days, now=NOW)


def test_no_longer_than_the_authority(authority: Path) -> None:
    late = NOW + timedelta(days=k.AUTHORITY_DAYS - 10)
    told = k.issue(authority, "lb1", days=365, now=late).description
    assert told.not_after == k.describe(k.read_certificates(authority / "ca.crt")[0]).not_after
    with pytest.raises(k.Expired):
        k.issue(authority, "lb2", now=late + timedelta(days=11))


def test_expiry(node: Path) -> None:
    end = k.load_identity(node, now=NOW).certificate.not_valid_after_utc
    near = k.load_identity(node, now=end - timedelta(days=20))
    assert near.warnings(end - timedelta(days=20)) == [f"the certificate of lb1 expires in 20 days ({end:%Y-%m-%d})"]
    assert near.warnings(end - timedelta(hours=3)) == [f"the certificate of lb1 expires at {end:%Y-%m-%d %H:%M} UTC"]
    assert near.warnings(end + timedelta(days=1)) == [f"the certificate of lb1 has expired ({end:%Y-%m-%d})"]
    with pytest.raises(k.Expired, match=rf"node\.crt: the certificate of lb1 expired on {end:%Y-%m-%d}"):
        k.load_identity(node, now=end + timedelta(seconds=1))
    with pytest.raises(k.NotYetValid, match=r"the certificate of lb1 begins at .* UTC") as caught:
        k.load_identity(node, now=NOW - timedelta(days=1))
    assert "clock" in caught.value.help_text


def test_short_lives_warn_in_their_last_third(authority: Path) -> None:
    certificate = k.load_identity(k.issue(authority, "lb1", days=9, now=NOW).directory, now=NOW).certificate
    assert k.expiry_warning(certificate, NOW + timedelta(days=5)) is None
    assert k.expiry_warning(certificate, NOW + timedelta(days=7)) is not None


def test_expired_authority(authority: Path, node: Path) -> None:
    key = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    old = k.read_certificates(authority / "ca.crt")[0]
    ended = (
        x509.CertificateBuilder(old.issuer, old.subject, key.public_key(), old.serial_number)
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(NOW - timedelta(minutes=1))
    )
    for extension in old.extensions:
        ended = ended.add_extension(extension.value, extension.critical)
    (node / "ca.crt").write_bytes(ended.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    with pytest.raises(k.Expired, match=r"ca\.crt: the certificate of east expired"):
        k.load_identity(node, now=NOW)


def test_exposed(node: Path, authority: Path) -> None:
    for mode in (0o640, 0o604, 0o666):
        (node / "node.key").chmod(mode)
        with pytest.raises(k.KeyExposed, match=rf"others may read the key .*node\.key \(mode {mode:04o}\)") as caught:
            k.load_identity(node, now=NOW)
        assert "chmod 600" in caught.value.help_text
    (node / "node.key").chmod(0o400)
    (node / "ca.crt").chmod(0o666)
    with pytest.raises(k.KeyExposed, match=r"others may write .*ca\.crt"):
        k.load_identity(node, now=NOW)
    (node / "ca.crt").chmod(0o644)
    k.load_identity(node, now=NOW)
    (authority / "ca.key").chmod(0o644)
    with pytest.raises(k.KeyExposed, match=r"ca\.key"):
        k.issue(authority, "lb2", now=NOW)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_of_somebody_else(node: Path) -> None:
    os.chown(node / "node.crt", 65534, 65534)
    with pytest.raises(k.KeyExposed, match="belongs to uid 65534"):
        k.load_identity(node, now=NOW)


def test_what_does_not_fit(authority: Path, node: Path, tmp_path: Path) -> None:
    other = k.issue(authority, "lb2", now=NOW).directory
    certificate = (node / "node.crt").read_bytes()
    (node / "node.crt").write_bytes((other / "node.crt").read_bytes())
    with pytest.raises(k.KeyMismatch, match=r"node\.key is not the key of .*node\.crt"):
        k.load_identity(node, now=NOW)
    (node / "node.crt").write_bytes(certificate)
    stranger = k.init_authority(tmp_path / "stranger", "east", now=NOW).directory
    (node / "ca.crt").write_bytes((stranger / "ca.crt").read_bytes())
    with pytest.raises(k.NotSigned, match="is not signed by an authority in"):
        k.load_identity(node, now=NOW)
    (node / "ca.crt").write_bytes(certificate)
    with pytest.raises(k.BadKeys, match="lb1 is not an authority"):
        k.load_identity(node, now=NOW)
    (authority / "ca.key").write_bytes((stranger / "ca.key").read_bytes())
    with pytest.raises(k.KeyMismatch, match=r"ca\.key is not the key of a certificate in"):
        k.issue(authority, "lb3", now=NOW)


def test_missing_and_broken(node: Path) -> None:
    with pytest.raises(k.KeysMissing, match=r"there is no .*ca\.crt") as caught:
        k.load_identity(node / "nowhere", now=NOW)
    assert "keys init" in caught.value.help_text
    key = serialization.load_pem_private_key((node / "node.key").read_bytes(), None)
    for content, says in (
        (b"", "holds no private key"),
        (b"rubbish", "holds no private key"),
        (b"x" * 65536, "holds no private key"),
        (b"x" * 65537, "too long"),
        (
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            ),
            "locked with a passphrase",
        ),
    ):
        (node / "node.key").write_bytes(content)
        with pytest.raises(k.BadKeys, match=says):
            k.load_identity(node, now=NOW)
    (node / "node.crt").write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(k.BadKeys, match="holds no certificate"):
        k.load_identity(node, now=NOW)
    (node / "node.crt").unlink()
    (node / "node.crt").mkdir()
    with pytest.raises(k.KeysError, match=r"is a directory|is not a file"):
        k.load_identity(node, now=NOW)
    (node / "node.crt").rmdir()
    os.mkfifo(node / "node.crt")
    with pytest.raises(k.BadKeys, match="is not a file"):
        k.load_identity(node, now=NOW)


def foreign(authority: Path, uris: list[str], key: Any = None) -> x509.Certificate:
    """A certificate of our authority that ``issue`` would not make."""
    signing = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lb1")])
    public = (key or ec.generate_private_key(ec.SECP256R1())).public_key()
    issuer = k.read_certificates(authority / "ca.crt")[0].subject
    builder = x509.CertificateBuilder(issuer, subject, public, 7, NOW, NOW + timedelta(days=1))
    if uris:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signing, hashes.SHA256())


@pytest.mark.parametrize(
    ("uris", "node"),
    [
        ([], None),
        (["https://lb1"], None),
        (["dpvs-probe:node:lb1"], "lb1"),
        (["https://lb1", "dpvs-probe:node:lb1"], "lb1"),
        (["dpvs-probe:node:lb1", "dpvs-probe:node:lb2"], None),
        (["dpvs-probe:node:"], None),
        (["dpvs-probe:node:a b"], None),
        (["dpvs-probe:node:" + "x" * 65], None),
    ],
)
def test_whose_certificate(authority: Path, uris: list[str], node: str | None) -> None:
    """The common name alone makes no node, and nobody has two names."""
    assert k.node_of(foreign(authority, uris)) == node


def test_no_node_is_no_identity(authority: Path, node: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    (node / "node.key").write_bytes(k._key_pem(key))
    (node / "node.crt").write_bytes(foreign(authority, [], key).public_bytes(serialization.Encoding.PEM))
    with pytest.raises(k.BadKeys, match="names no node"):
        k.load_identity(node, now=NOW)


def test_other_kinds_of_keys(authority: Path, node: Path) -> None:
    """Whoever has means of their own to make keys may use them."""
    for key, name in (
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
        (rsa.generate_private_key(65537, 2048), "RSA"),
        (ec.generate_private_key(ec.SECP384R1()), "EC secp384r1"),
    ):
        certificate = foreign(authority, ["dpvs-probe:node:lb1"], key)
        (node / "node.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (node / "node.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        assert k.describe(k.load_identity(node, now=NOW).certificate).key == name


def test_two_authorities_while_one_replaces_the_other(authority: Path, node: Path, tmp_path: Path) -> None:
    new = k.init_authority(tmp_path / "new", "east", now=NOW).directory
    bundle = (new / "ca.crt").read_bytes() + (authority / "ca.crt").read_bytes()
    (node / "ca.crt").write_bytes(bundle)
    assert len(k.load_identity(node, now=NOW).authorities) == 2
    (new / "ca.crt").write_bytes(bundle)
    moved = k.issue(new, "lb2", now=NOW).directory
    assert (moved / "ca.crt").read_bytes() == bundle
    k.load_identity(moved, now=NOW)
    (new / "ca.crt").write_bytes(bundle * 9)
    with pytest.raises(k.BadKeys, match="18 certificates"):
        k.issue(new, "lb3", now=NOW)


def test_names_of_hosts_can_be_printed(authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(k, "_general_name", x509.DNSName)
    keys = k.issue(authority, "lb9", addresses=["a\x1b[2Jb"], now=NOW)
    assert keys.description.addresses == ("a?[2Jb",)


@given(st.binary(max_size=400))
def test_any_bytes_as_certificates(data: bytes) -> None:
    for pem in (data, b"-----BEGIN CERTIFICATE-----\n" + data + b"\n-----END CERTIFICATE-----\n"):
        try:
            for certificate in k.parse_certificates(pem, "here"):
                k.describe(certificate)
                k.node_of(certificate)
        except DpvsProbeError:
            pass


@given(st.data())
def test_changed_bytes_in_a_certificate(data: st.DataObject) -> None:
    changed = bytearray(_REAL.public_bytes(serialization.Encoding.DER))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    k.node_of_der(bytes(changed))
    try:
        certificate = x509.load_der_x509_certificate(bytes(changed))
    except (ValueError, x509.InvalidVersion):
        return
    try:
        k.describe(certificate)
    except DpvsProbeError:
        pass


def _real() -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = k._common_name("lb1")
    names = [x509.UniformResourceIdentifier("dpvs-probe:node:lb1"), k._general_name("lb1.example")]
    builder = k._builder(name, name, key, NOW, NOW + timedelta(days=1))
    return builder.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(key, hashes.SHA256())


_REAL = _real()


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value or 0, result.output


def test_commands(tmp_path: Path) -> None:
    where = tmp_path / "authority"
    code, said = run("init", "--dir", where, "--name", "east")
    assert (code, said.splitlines()[0][:22]) == (0, "authority east is in /")
    code, said = run("issue", "lb1", "--dir", where, "--out", tmp_path / "lb1", "--address", "10.0.0.1")
    assert code == 0
    assert f"{tmp_path}/lb1" in said
    code, said = run("show", tmp_path / "lb1")
    assert (code, said.splitlines()[-1]) == (0, "key, certificate and authority fit together")
    assert "node lb1" in said
    assert "10.0.0.1" in said
    code, said = run("show", tmp_path / "lb1", "--json")
    lines = [json.loads(line) for line in said.splitlines()]
    assert [(line["node"], line["authority"], line["warning"]) for line in lines] == [
        ("lb1", False, None),
        (None, True, None),
    ]
    assert lines[0]["days_left"] == k.NODE_DAYS - 1
    assert run("show", where)[0] == 0
    assert run("show", where / "ca.crt")[0] == 0
    assert "PRIVATE" not in said


def test_commands_that_fail(tmp_path: Path) -> None:
    with pytest.raises(k.KeysMissing):
        run("show", tmp_path)
    with pytest.raises(k.KeysMissing):
        run("issue", "lb1", "--dir", tmp_path / "nowhere")
    run("init", "--dir", tmp_path / "a")
    with pytest.raises(k.KeysExist):
        run("init", "--dir", tmp_path / "a")
    run("init", "--dir", tmp_path / "a", "--force")
    with pytest.raises(k.BadKeys):
        run("show", tmp_path / "a" / "ca.key")


def test_command_shows_what_has_ended(tmp_path: Path) -> None:
    old = datetime.now(UTC) - timedelta(days=30)
    k.init_authority(tmp_path / "a", "east", now=old)
    made = k.issue(tmp_path / "a", "lb1", days=3, now=old).directory
    code, said = run("show", made / "node.crt")
    assert code == 1
    assert "has expired" in said
    with pytest.raises(k.Expired):
        run("show", made)

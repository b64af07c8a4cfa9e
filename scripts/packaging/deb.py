# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package: our wheel and the libraries it needs, with all that a package of Debian 12 has around them.

Rules
- Debian's bcc and pyverbs are used as they are: they belong to the kernel's and the adapter's libraries there. Every
  other library comes along in /usr/lib/dpvs-probe, where no other program sees it: Debian 12 has none of them as new as
  we need.
- What comes along are the versions that this environment has, because the tests ran with these.
- Nothing is started or enabled by the installation: that needs keys and a peer, which only the administrator knows.
- What lies in scripts/packaging/systemd is installed as units, what lies in scripts/packaging/etc as configuration.

    ./scripts/deb [--output DIRECTORY] [--wheel FILE]
"""

import argparse
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

from scripts.packaging import completions, man

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "deb"
PROGRAM = "dpvs-probe"
LIBRARY = f"usr/lib/{PROGRAM}"
DOCUMENTS = f"usr/share/doc/{PROGRAM}"
MAINTAINER = "dpvs-probe <dpvs-probe@localhost>"
# libc6: the release that the compiled parts are built on. linux-libc-dev: headers for the BPF program, which is
# compiled when it is loaded.
DEPENDS = ("python3 (>= 3.11)", "python3 (<< 3.12)", "libc6 (>= 2.36)", "linux-libc-dev", "python3-bpfcc",
           "python3-pyverbs")  # fmt: skip
LAUNCHER = f"""#!/usr/bin/python3 -I
import sys

sys.path.insert(0, "/{LIBRARY}")

from replicator.cli import main

main()
"""
UNITS = "usr/lib/systemd/system"
POSTINST = f"""#!/bin/sh
set -e
if [ "$1" = configure ]; then
    py3compile -p {PROGRAM} /{LIBRARY}
    if [ -d /run/systemd/system ]; then systemctl daemon-reload || true; fi
fi
"""
PRERM = f"""#!/bin/sh
set -e
# An attach that runs goes on with what it has in memory; the next one that starts is the new release.
py3clean -p {PROGRAM} /{LIBRARY}
"""
POSTRM = f"""#!/bin/sh
set -e
if [ "$1" = purge ]; then rm -rf /var/cache/{PROGRAM}; fi  # what attach has read of DPVS's code
if [ -d /run/systemd/system ]; then systemctl daemon-reload || true; fi
"""
# Libraries carry their own tests, headers and programs along; nothing of that is ever used here.
NOT_NEEDED = ("bin", "include", "share", "**/tests", "**/__pycache__", "numpy/f2py", "numpy/_core/include",
              "numpy/_core/lib", "numpy/random/lib", "capstone/include", "**/*.pyi", "**/*.pyx")  # fmt: skip


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    subprocess.run([str(word) for word in command], check=True, cwd=cwd)


def pip(*arguments: str | Path) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments)


def our_wheel(work: Path) -> Path:
    """Built from a source archive, so that nothing stale of this tree travels."""
    build = f"import setuptools.build_meta as b; b.build_sdist({str(work)!r})"
    with (work / "build.log").open("wb") as log:
        subprocess.run([sys.executable, "-c", build], check=True, cwd=ROOT, stdout=log)
    (archive,) = work.glob("*.tar.gz")
    pip("wheel", "--no-build-isolation", "--no-deps", "-w", work, archive)
    (wheel,) = work.glob("*.whl")
    return wheel


def requirements(wheel: Path) -> list[str]:
    """What the wheel says that it needs, but for extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        fields = HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    return sorted(field for field in fields if "extra ==" not in field)


def libraries(wanted: list[str]) -> Path:
    """A directory of wheels of them and what they need, in the versions of this environment; kept in CACHE."""
    have = sorted({f"{each.metadata['Name']}=={each.version}" for each in metadata.distributions()})
    have = [line for line in have if not line.startswith(f"{PROGRAM}=")]
    print(f"deb: libraries for {len(wanted)} requirements", file=sys.stderr)
    name = hashlib.blake2b(repr((wanted, have, sys.version_info[:2])).encode(), digest_size=6).hexdigest()
    kept = CACHE / f"wheels-{name}"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob("wheels-*"):
            shutil.rmtree(old)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            constraints = Path(work) / "constraints"
            constraints.write_text("\n".join(have) + "\n")
            pip("wheel", "--only-binary", ":all:", "-c", constraints, "-w", Path(work) / "wheels", *wanted)
            (Path(work) / "wheels").rename(kept)
    return kept


def install_libraries(root: Path, wheel: Path) -> None:
    """Our wheel and all libraries below ``root``, without what is not needed."""
    target = root / LIBRARY
    wheels = sorted(libraries(requirements(wheel)).glob("*.whl"))
    pip("install", "--no-index", "--no-deps", "--no-compile", "--target", target, wheel, *wheels)
    for pattern in NOT_NEEDED:
        for path in list(target.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()


def put(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def packed(path: Path, data: bytes) -> None:
    """Compressed as Debian wants documents: no name and no time in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0))


def copyright_of(root: Path) -> str:
    """Ours, and what each library says of itself; the full texts lie beside each library."""
    lines = [
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/",
        f"Upstream-Name: {PROGRAM}",
        "",
        "Files: *",
        f"Copyright: the authors of {PROGRAM}",
        "License: GPL-2.0-or-later",
        " On Debian systems the text is in /usr/share/common-licenses/GPL-2.",
    ]
    for each in sorted(metadata.distributions(path=[str(root / LIBRARY)]), key=lambda each: each.metadata["Name"]):
        fields = each.metadata
        if fields["Name"] != PROGRAM:
            said = fields.json  # a plain dict, where what is not said is missing
            named = str(said.get("license_expression") or said.get("license") or "")
            short = named.strip().splitlines()[0] if named.strip() else "see its files"
            lines += [
                "",
                f"Files: {LIBRARY}/{re.sub('[-.]', '_', fields['Name'])}*",
                f"Copyright: the authors of {fields['Name']} {each.version}",
                f"License: {short}",
            ]
    return "\n".join(lines) + "\n"


def install_rest(root: Path) -> None:
    """Launcher, manual pages, completions, documents, units and configuration."""
    put(root / "usr/bin" / PROGRAM, LAUNCHER, 0o755)
    with tempfile.TemporaryDirectory() as work:
        for path in man.write(Path(work)):
            packed(root / f"usr/share/man/man{man.SECTION}/{path.name}.gz", path.read_bytes())
    completions.write(root)
    documents = root / DOCUMENTS
    put(documents / "copyright", copyright_of(root))
    packed(documents / "changelog.gz", (ROOT / "CHANGELOG.md").read_bytes())
    (root / "etc" / PROGRAM).mkdir(parents=True)  # keys come here, from another machine
    for path in ROOT.glob("README*.md"):
        put(documents / path.name, path.read_text())
    sources = (
        (ROOT / "docs", f"{DOCUMENTS}/docs"),
        (HERE / "systemd", UNITS),
        (HERE / "etc", "etc"),
    )
    for source, place in sources:
        for path in sorted(source.rglob("*")):
            if path.is_file():
                put(root / place / path.relative_to(source), path.read_text(), path.stat().st_mode & 0o777)


def files(root: Path) -> Iterable[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and "DEBIAN" not in path.parts)


def control(root: Path, version: str) -> None:
    """DEBIAN/: what dpkg wants to know."""
    size = sum(path.stat().st_size for path in files(root)) // 1024
    fields = {
        "Package": PROGRAM,
        "Version": version,
        "Architecture": "amd64",
        "Maintainer": MAINTAINER,
        "Section": "net",
        "Priority": "optional",
        "Installed-Size": str(size),
        "Depends": ", ".join(DEPENDS),
        "Enhances": "keepalived",
        "Description": "keeps the sessions of a DPVS load balancer alive when the machine dies\n"
        " Attaches to an unmodified, running DPVS, learns of every session, keeps the copies\n"
        " of its peers current, and has each peer put them into its own DPVS. When the traffic\n"
        " moves there, the connections go on.",
    }
    folder = root / "DEBIAN"
    put(folder / "control", "".join(f"{name}: {value}\n" for name, value in fields.items()))
    sums = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(root)}\n" for path in files(root)]
    put(folder / "md5sums", "".join(sums))
    configuration = [f"/{path.relative_to(root)}\n" for path in files(root / "etc")] if (root / "etc").exists() else []
    if configuration:
        put(folder / "conffiles", "".join(configuration))
    for name, text in (("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)):
        put(folder / name, text, 0o755)


def package(output: Path, wheel: Path | None = None) -> Path:
    """Build it; the file."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        wheel = wheel or our_wheel(Path(work))
        version = wheel.name.split("-")[1]
        root = Path(work) / "root"
        root.mkdir(mode=0o755)
        install_libraries(root, wheel)
        install_rest(root)
        for path in root.rglob("*"):  # whatever the umask of whoever builds
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        control(root, version)
        built = output / f"{PROGRAM}_{version}_amd64.deb"
        run("dpkg-deb", "--root-owner-group", "-Zzstd", "-z9", "--build", root, built)
    return built


def main() -> None:
    parser = argparse.ArgumentParser(prog="deb", description="Build the Debian package.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="where it goes; dist by default")
    parser.add_argument("--wheel", type=Path, help="of this wheel of ours; one is built if not given")
    given = parser.parse_args()
    os.umask(0o022)
    try:
        print(package(given.output.resolve(), given.wheel and given.wheel.resolve()))
    except subprocess.CalledProcessError as error:
        sys.exit(f"deb: {error.cmd[0]} ended with status {error.returncode}")


if __name__ == "__main__":
    main()

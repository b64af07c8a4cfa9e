# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel that the virtual machine boots: Debian's own, unpacked and never installed.

Rules: the package comes through apt and is checked by it. What is kept of it, below build/vm, is the kernel as an ELF
file (booted without its decompressor, which takes seconds in an emulated machine) and the modules that the guest loads,
in the order in which it loads them. What is there is used as it is, without asking apt. `python -m tests.vm.kernel`
sees to it that there is one; the tests themselves fetch nothing.
"""

import hashlib
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CACHE = Path(__file__).resolve().parents[2] / "build" / "vm"
PACKAGE = "linux-image-amd64"  # not the cloud kernel: it has neither 9p nor rdma_rxe
# What the guest needs; what these depend on comes by itself, what is built into the kernel is not there.
MODULES = (
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "dummy",
    "crc32_generic",
    "crc32_pclmul",
    "ib_uverbs",
    "rdma_rxe",
)
XZ = b"\xfd7zXZ\0"
ELF = b"\x7fELF"


class NoKernel(Exception):
    """There is no kernel for the virtual machine."""


class Kernel(NamedTuple):
    """A kernel ready to boot."""

    image: Path
    modules: list[Path]  # in the order of loading


def _kept(cache: Path) -> Path:
    wanted = hashlib.blake2b(repr(MODULES).encode(), digest_size=4).hexdigest()
    return cache / f"kernel-{wanted}"


def is_there(cache: Path = CACHE) -> bool:
    """Whether ``get`` has nothing to fetch."""
    return _kept(cache).exists()


def get(cache: Path = CACHE) -> Kernel:
    """The kernel kept in ``cache``; fetched first when there is none. Raises NoKernel."""
    kept = _kept(cache)
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            fresh = Path(work) / "kernel"
            _keep(_unpack(Path(work)), fresh)
            try:
                fresh.rename(kept)
            except OSError:  # another run was quicker
                if not kept.exists():
                    raise
    order = (kept / "order").read_text().split()
    return Kernel(kept / "vmlinux", [kept / name for name in order])


def _unpack(work: Path) -> Path:
    """Package files below the returned directory."""
    depends = _output("apt-cache", "depends", "--important", PACKAGE)
    names = [line.split()[-1] for line in depends.splitlines() if "Depends: linux-image" in line]
    if not names:
        raise NoKernel(f"apt knows no {PACKAGE}: run apt-get update")
    _output("apt-get", "-qq", "download", names[0], cwd=work)
    packages = list(work.glob("*.deb"))
    if len(packages) != 1:
        raise NoKernel(f"apt downloaded {len(packages)} packages for {names[0]}")
    root = work / "package"
    _output("dpkg-deb", "--extract", os.fspath(packages[0]), os.fspath(root))
    return root


def _output(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise NoKernel(f"no {command[0]} here: the kernel is a Debian package") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["no reason given"]
        raise NoKernel(f"{' '.join(command[:3])}: {said[-1]}") from error
    return done.stdout


def _keep(package: Path, kept: Path) -> None:
    """Move what is needed out of an unpacked package."""
    kept.mkdir()
    images = list(package.glob("boot/vmlinuz-*"))
    if not images:
        raise NoKernel(f"no kernel in {PACKAGE}")
    (kept / "vmlinux").write_bytes(_inner(images[0].read_bytes()))
    found = {_module_name(path): path for path in package.rglob("*.ko*")}
    order = list(_closure(found))
    for name in order:
        (kept / name).write_bytes(_module(found[name]))
    (kept / "order").write_text("\n".join(order))


def _inner(image: bytes) -> bytes:
    """The ELF file that a bzImage unpacks when it starts."""
    at = image.find(XZ)
    while at >= 0:
        try:
            inner = lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(image[at:])
            if inner.startswith(ELF):
                return inner
        except lzma.LZMAError:
            pass
        at = image.find(XZ, at + 1)
    raise NoKernel("the kernel is not packed with xz")


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _module(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if data.startswith(XZ) else data


def _closure(found: dict[str, Path]) -> Iterator[str]:
    """MODULES and what they depend on, each after what it depends on."""
    done: set[str] = set()

    def visit(name: str) -> Iterator[str]:
        if name in done or name not in found:
            return
        done.add(name)
        for needed in _depends(_module(found[name])):
            yield from visit(needed)
        yield name

    for wanted in MODULES:
        yield from visit(wanted.replace("-", "_"))


def _depends(module: bytes) -> list[str]:
    """What a module says in its section of strings, each ended by a zero: ``depends=a,b``."""
    _, _, rest = module.partition(b"\0depends=")
    names = rest.partition(b"\0")[0].decode()
    return [name.replace("-", "_") for name in names.split(",") if name]


def forget(cache: Path = CACHE) -> None:
    """Throw away what is kept, so that the next ``get`` fetches anew."""
    for kept in cache.glob("kernel-*"):
        shutil.rmtree(kept, ignore_errors=True)


if __name__ == "__main__":
    if not is_there():
        print(f"kernel: fetching {PACKAGE} for the virtual machine")
    try:
        get()
    except (NoKernel, OSError) as error:
        sys.exit(f"kernel: {error}")

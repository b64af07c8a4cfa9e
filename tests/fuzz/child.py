# SPDX-License-Identifier: GPL-2.0-or-later
"""The process in which one target is fuzzed: ``python -m tests.fuzz.child TARGET [OPTIONS OF LIBFUZZER]``.

Rules: what is to be followed is imported under atheris; all that is imported before it is not. The working directory
is a temporary one of our own: the corpus goes into ``corpus``, an input that is a finding into ``finding-*``.
"""

import importlib
import logging
import os
import resource
import sys
import zlib
from pathlib import Path

import atheris

from tests.fuzz import judge

MORE = {"elf": ["elftools"]}  # other people's code to follow


def main() -> None:
    name, options = sys.argv[1], sys.argv[2:]
    logging.disable(logging.CRITICAL)
    module = f"tests.fuzz.targets.{name}"
    with atheris.instrument_imports(include=[*judge.PACKAGES, *MORE.get(name, [])], enable_loader_override=False):
        importlib.import_module(module)
    target = judge.load(name)
    corpus = Path("corpus")
    corpus.mkdir()
    longest = 0
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number:03}").write_bytes(seed)
        longest = max(longest, len(seed))
    judge.must(longest <= target.MAX_BYTES, f"a seed of {longest} bytes is cut at {target.MAX_BYTES}")
    if target.WORDS:
        lines = ('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.WORDS)
        Path("words").write_text("".join(lines))
        options.append("-dict=words")
    arguments = [
        sys.argv[0], *options, f"-max_len={target.MAX_BYTES}", f"-timeout={judge.TIMEOUT_S}",
        "-rss_limit_mb=0", "-artifact_prefix=finding-", "-print_final_stats=1",
        str(corpus),
    ]  # fmt: skip

    def one(data: bytes) -> None:
        if zlib.crc32(data) % judge.MEASURED == 0:
            judge.judge(target, data)
        else:
            target.check(data)

    mutate = getattr(target, "mutate", None)
    for path in sorted(corpus.iterdir()):  # what is made once, at the first use, is not any input's
        target.check(path.read_bytes())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (judge.MEMORY_MIB << 20), resource.RLIM_INFINITY))
    atheris.Setup(arguments, one, **({"custom_mutator": mutate} if mutate else {}))
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()

# SPDX-License-Identifier: GPL-2.0-or-later
"""``./scripts/fuzz``: see there."""

import argparse
import sys
from pathlib import Path

from tests.fuzz import session
from tests.fuzz.judge import judge, load


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Fuzz the decoders.")
    parser.add_argument("seconds", nargs="?", type=int, default=60, help="for each target (60)")
    parser.add_argument("targets", nargs="*", help="which ones (all): " + ", ".join(session.names()))
    parser.add_argument("--seed", type=int, default=0, help="of the mutations; 0, the default, takes another each time")
    parser.add_argument("--repeat", nargs=2, metavar=("TARGET", "INPUT"), help="judge one input: hex digits, or a file")
    arguments = parser.parse_args()
    if arguments.repeat:
        return repeat(*arguments.repeat)
    failed = 0
    for target in arguments.targets or session.names():
        outcome = session.fuzz(target, arguments.seconds, seed=arguments.seed)
        print(outcome.line(), flush=True)
        if outcome.failed:
            failed += 1
            print(outcome.report(), flush=True)
    return 1 if failed else 0


def repeat(name: str, text: str) -> int:
    """Judge one input as the fuzzer would, with a traceback if it is a finding."""
    path = Path(text)
    data = path.read_bytes() if len(text) < 256 and path.is_file() else bytes.fromhex(text)
    target = load(name)
    for seed in target.seeds():
        target.check(seed)
    judge(target, data)
    print(f"target {name}: nothing wrong with these {len(data)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

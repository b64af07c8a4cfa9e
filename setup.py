# SPDX-License-Identifier: GPL-2.0-or-later
"""What pyproject.toml cannot say: what is compiled into the package.

probes/agent/agent.so is plain C without any header of DPDK or DPVS, to be loaded into a foreign process; it is no
Python extension. The modules in ``LOOPS`` are Python that Cython compiles, with their types in the .pxd file beside
each. A wheel gets both freshly compiled, for this machine and this version of Python; an editable install gets them
next to their sources.
"""

import os
import subprocess
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

AGENT = Path("probes/agent")
LOOPS = ["collector.rows", "probes.gathering", "replicator.packing"]
CFLAGS = ["-std=gnu11", "-O2", "-g", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]


for name in LOOPS:
    types = Path(name.replace(".", "/") + ".pxd")
    if not types.exists():  # it would compile all the same, to something slow that gives numpy's numbers back
        raise SystemExit(f"{types} is missing")


def compile_agent(target: Path) -> None:
    """Compile the agent to ``target`` in one step, replacing it atomically: a process may have the old one mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(".so.new")
    sources = [str(path) for path in sorted(AGENT.glob("*.c"))]
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *CFLAGS, "-o", str(fresh), *sources], check=True)
    fresh.replace(target)


class BuildPy(build_py):
    def _agent(self) -> Path:
        root = Path() if self.editable_mode else Path(self.build_lib)
        return root / AGENT / "agent.so"

    def run(self) -> None:
        super().run()
        compile_agent(self._agent())

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(self._agent())]


setup(
    cmdclass={"build_py": BuildPy},
    ext_modules=cythonize(
        [Extension(name, [name.replace(".", "/") + ".py"], extra_compile_args=["-O3", "-g0"]) for name in LOOPS],
        build_dir="build/cython",
        compiler_directives=dict.fromkeys(
            ("annotation_typing", "boundscheck", "wraparound", "initializedcheck"), False
        ),
    ),
)

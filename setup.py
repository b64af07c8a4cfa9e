# SPDX-License-Identifier: GPL-2.0-or-later
"""The one thing pyproject.toml cannot say: the agent is compiled into the package.

probes/agent/agent.so is plain C without any header of DPDK or DPVS, to be loaded into a foreign process. It is no
Python extension, so it depends on the machine but on no Python version: the wheel is tagged py3-none-linux_x86_64.
A wheel gets a freshly compiled agent; an editable install compiles it next to its source.
"""

import os
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

AGENT = Path("probes/agent")
CFLAGS = ["-std=gnu11", "-O2", "-g", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]


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


class PlatformWheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", "linux_x86_64"


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": PlatformWheel}, distclass=PlatformDistribution)

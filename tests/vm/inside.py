# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of ``remote.py`` that runs in the guest: runs the tests that are wanted, in that order, and writes down what
becomes of each.
"""

import json

import pytest

from tests.vm.remote import GUEST_JOB, REPORTS, WANTED


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = {item.nodeid: item for item in items}
    wanted = (GUEST_JOB / WANTED).read_text().splitlines()
    items[:] = [found[nodeid] for nodeid in wanted if nodeid in found]


class _Writer:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._file = (GUEST_JOB / REPORTS).open("a")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._file.write(json.dumps(data) + "\n")
        self._file.flush()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Writer(config))

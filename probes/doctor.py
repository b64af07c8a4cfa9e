# SPDX-License-Identifier: GPL-2.0-or-later
"""Each thing that attach needs: found or not, and what to do.

Rules: looks and asks, changes nothing: no probe is attached, no agent loaded, no program given to the kernel. A check
whose ground is missing is left out rather than failed a second time. ``ok`` is True, False, or None for what is worth
knowing but stops nothing.
"""

import os
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from probes import loader, processors, uprobe
from probes.agent import abi, loading
from probes.agent.client import Door
from probes.anatomy import Anatomy
from probes.choosing import choose
from probes.control import ControlSocket
from probes.errors import DpvsProbeError, NeedRoot
from probes.judging import faults, supported
from probes.layout import BadLayout, Layout, release_name
from probes.memory import SessionPool
from probes.proof import Injection, LayoutDisproved, prove
from probes.sites import session_sites
from probes.target import ProcessGone, Target

HUGEPAGES = Path("/sys/kernel/mm/hugepages")


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool | None
    detail: str
    help: str = ""


def examine(
    pid: int,
    *,
    layout_name: str | None = None,
    lock_holder: int | None = None,
    inject: bool = True,
    probes: bool = True,
) -> Iterator[Check]:
    """All checks for attaching to ``pid``, as they are made. ``lock_holder``: the dpvs-probe that is attached now.

    ``inject`` False leaves out what only the agent needs, ``probes`` False what only probes need.
    """
    yield _privileges()
    machine = platform.machine()
    if machine != "x86_64":
        yield Check("machine", False, f"{machine}: dpvs-probe runs on x86_64 only")
    if probes:
        yield from _kernel()
    with ExitStack() as stack:
        try:
            target = stack.enter_context(Target.open(pid))
        except DpvsProbeError as error:
            yield _failed("process", error)
            return
        yield Check("process", True, f"{target.exe}, build id {target.build_id or 'none'}")
        yield _lock(pid, lock_holder)
        yield _processors(target.worker_cpus())
        try:
            layout, source = choose(target, layout_name)
        except DpvsProbeError as error:
            yield _failed("layout", error)
            return
        yield Check("layout", True, f"{layout.name}, {source} (shipped: {', '.join(Layout.shipped())})")
        if wrong := faults(layout):
            yield Check("layout", False, f"it does not agree with itself: {'; '.join(wrong)}", BadLayout.help_text)
            return
        control = ControlSocket(target.ipc_path, layout)
        answers = _control(control)
        yield answers
        anatomy = Anatomy.of(target)
        layout, left_out = supported(layout, anatomy)
        yield from _memory(target, layout, control if answers.ok else None, anatomy)
        if left_out:
            yield Check("not used", None, f"not proven, nor are sessions that need it: {', '.join(left_out)}")
        if probes:
            yield from _sites(target)
        if inject:
            yield from _agent(target, layout)


def _privileges() -> Check:
    if os.geteuid() == 0:
        return Check("privileges", True, "root")
    return Check("privileges", False, f"uid {os.geteuid()}, not root", NeedRoot.help_text)


def _kernel() -> Iterator[Check]:
    if uprobe.supported():
        yield Check("uprobes", True, f"kernel {platform.release()}")
    else:
        yield Check("uprobes", False, f"kernel {platform.release()} has none", uprobe.ProbeFailed.help_text)
    try:
        loader.available()
    except NeedRoot:
        pass  # said already
    except DpvsProbeError as error:
        yield _failed("bcc and headers", error)
        return
    named = os.environ.get(loader.SOURCE_VARIABLE)
    if named:
        good = Path(named, "include/linux").is_dir()
        detail = f"{loader.SOURCE_VARIABLE}={named}" + ("" if good else ", where there are none")
        yield Check("bcc and headers", good, detail, f"Correct {loader.SOURCE_VARIABLE} or leave it unset.")
        return
    headers = loader.kernel_headers()
    yield Check("bcc and headers", True, str(headers) if headers else "linux-libc-dev with our shim")


def _lock(pid: int, holder: int | None) -> Check:
    if holder is None:
        return Check("not attached yet", True, f"no dpvs-probe is attached to pid {pid}")
    who = f"dpvs-probe (pid {holder})" if holder else "another dpvs-probe"
    return Check("not attached yet", False, f"{who} is attached", "End it first: dpvs-probe detach")


def _processors(workers: Mapping[int, Collection[int]]) -> Check:
    allowed = os.sched_getaffinity(0)
    left = processors.without(allowed, workers.values())
    busy = processors.shown(frozenset().union(*workers.values()))
    many = f"{len(workers)} worker{'' if len(workers) == 1 else 's'}"
    if left is not None:
        return Check("processors", True, f"{many} on {busy}, attach would run on {processors.shown(left)}")
    advice = (
        "attach would run on all of them, and what it takes there a worker lacks. Leave two more to the system:"
        " fewer workers, or another CPUAffinity= of dpvs-probe."
    )
    return Check("processors", None, f"{many} on {busy} of {processors.shown(allowed)}", advice)


def _control(control: ControlSocket) -> Check:
    try:
        return Check("control socket", True, f"{control.path}: DPVS {release_name(control.release())} answers")
    except DpvsProbeError as error:
        return _failed("control socket", error)


def _memory(target: Target, layout: Layout, control: ControlSocket | None, anatomy: Anatomy) -> Iterator[Check]:
    try:
        with SessionPool.open(target, layout) as pool:
            proof = prove(target, layout, pool, control, anatomy)
            if not pool.shared:
                yield Check("shared memory", None, "DPVS's memory cannot be mapped, it is copied: slower scans")
    except ProcessGone:
        raise
    except DpvsProbeError as error:
        yield _failed("session pool", error)
        return
    for check in proof.checks:
        ok = {"ok": True, "failed": False, "not yet": None}[check.status]
        yield Check(check.name, ok, check.detail, LayoutDisproved.help_text if ok is False else "")
    yield _injection(proof.injection)
    sizes = sorted(p.name.removeprefix("hugepages-") for p in HUGEPAGES.glob("hugepages-*") if _count(p))
    yield Check("hugepages", None if not sizes else True, ", ".join(sizes) or "none reserved: DPVS uses other memory")


def _injection(found: Injection) -> Check:
    if found.wrong:
        advice = "Attach with --no-inject, or find the layout of this build: dpvs-probe layout generate."
        return Check("fields to inject", False, f"wrong, or not there: {', '.join(found.wrong)}", advice)
    late = (*found.missing, *found.missing_fullnat)
    if late:
        return Check(
            "fields to inject", None, f"not proven yet: {', '.join(late)}", "Nothing is put in until they are."
        )
    return Check("fields to inject", True, "all proven")


def _sites(target: Target) -> Iterator[Check]:
    try:
        sites = session_sites(target.function)
    except DpvsProbeError as error:
        yield _failed("probe sites", error)
        return
    for point, site in zip(("create", "free"), sites, strict=True):
        detail = f"{site.function}: {site.mnemonic} ({site.why})"
        dear = (
            f"About {site.cost_ns / 1000:.0f} us of a worker's time a hit: there is no cheaper place in this binary."
            " attach measures it and keeps it under --probe-budget; --scan-only does without."
        )
        yield Check(f"{point} site", True if site.cheap else None, detail, dear)
    total = sum(site.cost_ns for site in sites)
    yield Check(
        "probe cost", True, f"about {total / 1000:.1f} us of a worker's time a session, as measured elsewhere; "
        f"attach measures it here"
    )  # fmt: skip


def _agent(target: Target, layout: Layout) -> Iterator[Check]:
    """What putting peers' sessions in needs; a node with --no-inject or without --listen does without."""
    advice = "Attach with --no-inject to replicate without it."
    try:
        thread = target.control_thread()
        yield Check("control thread", True, f"thread {thread} can take the agent in")
    except DpvsProbeError as error:
        yield Check("control thread", False, str(error), advice)
    tracer = loading.tracer_of(target.pid)
    if tracer:
        yield Check("tracer", False, f"process {tracer} traces it", "Detach the debugger.")
    if not loading.LIBRARY.exists():
        yield Check("agent", False, "the agent is not built", "Reinstall dpvs-probe (scripts/setup builds it).")
        return
    try:
        door = Door.find(target)
    except DpvsProbeError as error:
        yield _failed("agent", error)
        return
    if door is None:
        yield Check("agent", True, "not in DPVS yet, would be loaded")
        return
    found = f"version {door.version} (build {door.build}) is in DPVS"
    if not door.is_installed():
        yield Check("agent", True, f"{found} and never came up ({door.error}), another would be loaded")
        return
    try:
        ours = loading.is_ours(door, layout)
    except DpvsProbeError as error:
        yield Check("agent", False, str(error), advice)
        return
    found += f", {door.state.name.lower()}"
    yield Check("agent", True, found if ours else f"{found}; ours (build {abi.BUILD}) would take over from it")


def _failed(name: str, error: DpvsProbeError) -> Check:
    return Check(name, False, str(error), error.help_text)


def _count(pages: Path) -> int:
    try:
        return int((pages / "nr_hugepages").read_text())
    except (OSError, ValueError):
        return 0

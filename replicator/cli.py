# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``dpvs-probe``. Only it and the modules of its commands print (``cli_*``, ``console``); it
turns errors into exit statuses.

Exit statuses: 0 done, 1 an error (one line and what to do on standard error), 2 wrong usage, 3 (attach) the DPVS
process ended while we were attached.

The module of a command is imported when the command is run: keepalived runs `ready` every second or two, and
all of them together take several times as long as that needs.
"""

import os
import sys

import click

from probes.errors import DpvsProbeError
from replicator.lazy import LazyGroup, Part

PARTS = {
    "agent": Part("cli_agent", "The library that puts peers' sessions into DPVS."),
    "attach": Part(
        "cli_attach",
        "Attach to a running DPVS and replicate its sessions, until SIGINT, SIGTERM or `dpvs-probe detach`.",
    ),
    "config": Part("cli_config", "The configuration file of attach."),
    "decode": Part(
        "cli_decode", "Show the frames of sync links in FILE, a capture (pcap or pcapng; - is standard input)."
    ),
    "demote": Part("cli_ask", "The addresses leave this node: take out the copies that wait for packets."),
    "detach": Part("cli_ask", "End a running attach cleanly, and wait until it has left the DPVS process."),
    "diff": Part("cli_diff", "Compare two tables of sessions: by digest, and where that differs session by session."),
    "doctor": Part("cli_doctor", "Look for each thing that attach needs, and say what to do about what is missing."),
    "drill": Part("cli_drill", "Rehearse a failover with synthetic sessions on nodes that work, and say how it went."),
    "keys": Part("cli_keys", "Make and show the keys by which nodes know each other."),
    "layout": Part("cli_layout", "Struct layouts of DPVS builds: which there are, and how to make one."),
    "notify": Part(
        "cli_notify", "What keepalived says of this node: MASTER promotes it, BACKUP, FAULT and STOP demote it."
    ),
    "orphans": Part("cli_packets", "Flows to a service that no session here covers, those active last first."),
    "peers": Part("cli_ask", "Links with peers: to those that take our sessions, and from those that send us theirs."),
    "promote": Part(
        "cli_ask",
        "The addresses come to this node: put all that its peers have into DPVS, and say how many and how long it"
        " took.",
    ),
    "ready": Part(
        "cli_notify", "Whether this node may get traffic: its own sessions are read, and those of its peers are here."
    ),
    "sessions": Part("cli_ask", "Sessions that a running attach knows: of its own DPVS, and copies of its peers'."),
    "snapshot": Part(
        "cli_snapshot", "This node's own sessions in a file, so that DPVS can be started anew and go on with them."
    ),
    "status": Part("cli_ask", "How a running attach is doing: sessions, probes, injection, counters."),
    "sysdump": Part(
        "cli_sysdump",
        "Pack what a maintainer needs to know into FILE, a tar.gz: versions, doctor, layouts, maps, counters, logs.",
    ),
    "top": Part(
        "cli_live",
        "A live view of a running attach: sessions by service, real server, state and worker, rates, peers and their"
        " lag.",
    ),
    "watch": Part(
        "cli_live",
        "A line for each session that is created, changes or ends in the DPVS of a running attach, as it happens.",
    ),
}


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from replicator.console import version

        click.echo(f"dpvs-probe, version {version()}")
        context.exit()


@click.group(
    cls=LazyGroup, parts=PARTS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
def cli() -> None:
    """Keeps the sessions of a DPVS load balancer alive when the machine under it dies.

    Start `dpvs-probe attach` next to each DPVS; the other commands ask a running attach. What looks at a DPVS or asks
    an attach needs root.
    """


def main(arguments: list[str] | None = None) -> None:
    """The console entry point."""
    try:
        code = cli.main(arguments, prog_name="dpvs-probe", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except DpvsProbeError as error:
        click.echo(f"dpvs-probe: {error}", err=True)
        if error.help_text:
            click.echo(f"  {error.help_text}", err=True)
        code = 1
    except BrokenPipeError:  # `dpvs-probe sessions | head`: nobody reads on, which is nobody's fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1  # as click itself does where it notices first
    except (KeyboardInterrupt, click.Abort):
        code = 130
    sys.exit(code)

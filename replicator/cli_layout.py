# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe layout``: make layouts, keep them, look at them."""

from pathlib import Path

import click


@click.group()
def layout() -> None:
    """Struct layouts of DPVS builds: which there are, and how to make one."""


@layout.command("list")
def list_() -> int:
    """What is shipped, and what was added, with the releases that each is for."""
    from probes import choosing
    from probes.layout import SESSION, Layout

    for name in Layout.shipped():
        one = Layout.load(name)
        click.echo(f"{name:<10} DPVS {', '.join(one.releases)}, DPDK {one.dpdk}, {one.size(SESSION)} bytes a session")
    for path in choosing.added():
        one = choosing.from_file(path)
        click.echo(f"{path}: DPVS {', '.join(one.releases)}, DPDK {one.dpdk}, {one.size(SESSION)} bytes a session")
    return 0


@layout.command()
@click.argument("name")
@click.argument("struct", required=False)
def show(name: str, struct: str | None) -> int:
    """The structs of a layout, shipped or in a file: offset, bytes, field. STRUCT: of that one only."""
    from probes import choosing

    one = choosing.by_name(name)
    for each in [one.struct(struct)] if struct else one.structs.values():
        click.echo(f"{each.name}: {each.size} bytes")
        for member, (offset, size) in sorted(each.fields.items(), key=lambda item: item[1]):
            click.echo(f"  {offset:5} {size:4}  {member}")
    return 0


@layout.command()
@click.option("--tree", type=click.Path(path_type=Path), help="Source tree of the DPVS; its headers are compiled.")
@click.option(
    "--include", "includes", multiple=True, type=click.Path(path_type=Path),
    help="Directory of its DPDK's headers (PREFIX/include); may be given several times.",
)  # fmt: skip
@click.option(
    "--cflag", "flags", multiple=True, help="Option that it is built with beyond stock: -DCONFIG_TIMER_DEBUG."
)
@click.option(
    "--debug", type=click.Path(path_type=Path), help="A build of it with debug information, or its debug file."
)
@click.option("--release", "releases", multiple=True, required=True, help="Release that it is: 1.9.4.")
@click.argument("file", type=click.Path(path_type=Path))
def generate(
    *, tree: Path | None, includes: tuple[Path, ...], flags: tuple[str, ...], debug: Path | None,
    releases: tuple[str, ...], file: Path,
) -> int:  # fmt: skip
    """Make a layout FILE: of a source tree and its DPDK's headers, or of a build with debug information.

    Nothing of DPVS is run. Then `dpvs-probe layout add FILE --pid PID`, or `attach --layout ./FILE`.
    """
    from probes import making

    if (tree is None) == (debug is None):
        raise making.CannotMake("give either --tree or --debug", help_text="See dpvs-probe layout generate --help.")
    content = making.of_debug_build(debug, releases) if debug else making.of_tree(tree, includes, flags, releases)  # type: ignore[arg-type]
    making.write(content, file)
    structs = {**content["dpvs"]["structs"], **content["dpdk"]["structs"]}
    click.echo(f"{file}: {len(structs)} structs, {structs['dp_vs_conn']['size']} bytes a session")
    return 0


@layout.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--build-id", help="Of the DPVS that it is for.")
@click.option("--pid", type=int, help="A running DPVS that it is for.")
def add(file: Path, build_id: str | None, pid: int | None) -> int:
    """Keep a layout FILE for a build: attach takes it from then on wherever that build runs."""
    from probes import choosing
    from probes.target import Target

    if (build_id is None) == (pid is None):
        raise choosing.NotAdded("give either --build-id or --pid", help_text="`file /path/to/dpvs` tells the build id.")
    if pid is not None:
        with Target.open(pid) as target:
            build_id = target.build_id
    click.echo(f"kept as {choosing.add(file, build_id or '')}")
    return 0

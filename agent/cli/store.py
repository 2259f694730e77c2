"""``failover-agent store``: copy a coordinator's store, back it up, and trust one that was restored."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click

from agent.cli.options import settings_flags, sources
from agent.errors import ConfigError
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.fields import settings_of

ETCD = "etcd"

ETCD_KEYS = (
    *(one.name for one in settings_of(CoordinatorSettings) if one.name.startswith("etcd_")),
    "shards",
    "insecure",
)


@click.group("store")
def command() -> None:
    """Copy the store of coordinators, back it up, and trust a restored one."""


@command.command("backup")
@settings_flags(CoordinatorSettings, ("data_dir",))
@click.option(
    "--to", "file", type=click.Path(path_type=Path), required=True, metavar="FILE", help="New file."
)
def backup(*, file: Path, **given: Any) -> int:
    """Back up the SQLite store in --data-dir. Its coordinator may be running.

    To restore, stop the coordinator, put the file into an empty data directory as coordinator.db, and start it.
    """
    from agent.coordinator.store.copy import backup as write  # noqa: PLC0415 - not for --help

    settings = sources(CoordinatorSettings, given).load()
    write(settings.data_dir, file)
    click.echo(f"{settings.data_dir} is backed up in {file}")
    return 0


@command.command("copy")
@settings_flags(CoordinatorSettings, ETCD_KEYS)
@click.option("--from", "origin", required=True, metavar="DIRECTORY|etcd", help="The source.")
@click.option("--to", "target", required=True, metavar="DIRECTORY|etcd", help="The copy.")
@click.option("--clone", is_flag=True, help="Give the copy an id of its own; both may be served.")
def copy(*, origin: str, target: str, clone: bool, **given: Any) -> int:
    """Copy a store from a data directory to etcd, or back. The copy is checked.

    Stop all coordinators of both stores first. The copy keeps the id of the store, so agents go on with it
    without a change of role; its source cannot be served again until it is the target of a copy.
    """
    if (origin == ETCD) == (target == ETCD):
        raise click.UsageError("one of --from and --to must be etcd, the other one a directory")
    click.echo(asyncio.run(_copy(_etcd_settings(given), origin, target, clone=clone)))
    return 0


@command.command("trust")
@click.argument("place", metavar="DIRECTORY|etcd")
@settings_flags(CoordinatorSettings, ETCD_KEYS)
def trust(*, place: str, **given: Any) -> int:
    """Trust a store that 'serve --restored' has declared. New groups in it can then be used at once.

    Do this when every group that the restored copy lacks has been created again and lifted, or is not needed
    any more: the primary of such a group may be active without the coordinator. Stop the coordinator of a data
    directory first; those over etcd may run. Groups that are restricted stay so until 'failsafe lift'.
    """
    if place == ETCD:
        was_restored = asyncio.run(_trust_etcd(_etcd_settings(given)))
    else:
        was_restored = _trust_directory(Path(place))
    click.echo(
        f"new groups in {place} are not restricted any more"
        if was_restored
        else f"{place} was not declared as restored: nothing was changed"
    )
    return 0


def _etcd_settings(given: dict[str, Any]) -> CoordinatorSettings:
    given |= {"store": ETCD, "advertise": "http://localhost"}  # needed together, and not used here
    origin = sources(CoordinatorSettings, given)
    if "etcd_endpoint" not in {**origin.file, **origin.environment, **origin.flags}:
        raise ConfigError("etcd_endpoint is not set: name one with --etcd-endpoint")
    return origin.load()


def _trust_directory(directory: Path) -> bool:
    """Trust the store of a data directory; return whether it was declared as restored."""
    from agent.coordinator.store.copy import SqlitePlace  # noqa: PLC0415 - not for --help

    place = SqlitePlace.open_source(directory)
    try:
        return place.trust()
    finally:
        place.close()


async def _trust_etcd(settings: CoordinatorSettings) -> bool:
    """Trust the store in etcd; return whether it was declared as restored."""
    from agent.coordinator.cluster import connect  # noqa: PLC0415 - not for --help
    from agent.coordinator.store.copy import trust_etcd  # noqa: PLC0415 - likewise

    etcd = connect(settings)
    try:
        return await trust_etcd(etcd, settings.etcd_prefix)
    finally:
        await etcd.aclose()


async def _copy(settings: CoordinatorSettings, origin: str, target: str, *, clone: bool) -> str:
    from agent.coordinator.store import copy as copies  # noqa: PLC0415 - not for --help

    async with _places(settings, origin, target) as (source, to):
        snapshot = await copies.copy(source, to, clone=clone)
        tenures = sum(map(len, snapshot.history.values()))
        return (
            f"{source.name} is copied to {to.name} and checked: {len(snapshot.groups)} groups,"
            f" {tenures} tenures, {len(snapshot.access)} access lists"
        )


@asynccontextmanager
async def _places(
    settings: CoordinatorSettings, origin: str, target: str
) -> AsyncIterator[tuple[Any, Any]]:
    """Source and target, opened."""
    from agent.coordinator.cluster import connect  # noqa: PLC0415 - not for --help
    from agent.coordinator.store.copy import EtcdPlace, SqlitePlace  # noqa: PLC0415 - likewise

    etcd = connect(settings)
    try:
        if target == ETCD:
            source = SqlitePlace.open_source(Path(origin))
            try:
                yield (
                    source,
                    await EtcdPlace.open_target(
                        etcd, settings.etcd_prefix, settings.shards, source.store_id
                    ),
                )
            finally:
                source.close()
            return
        async with EtcdPlace.open_source(etcd, settings.etcd_prefix) as place:
            directory = SqlitePlace.open_target(Path(target), place.store_id)
            try:
                yield place, directory
            finally:
                directory.close()
    finally:
        await etcd.aclose()

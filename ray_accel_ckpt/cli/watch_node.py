"""`ray-accel-ckpt watch-node`."""

from __future__ import annotations

import logging
import re
import signal
from enum import StrEnum
from typing import Annotated

import typer

from ray_accel_ckpt.cli import output
from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.runtime.node_watch import NodeWatch, WatchEvent, WatchSettings
from ray_accel_ckpt.runtime.notices.detect import Cloud, source_of
from ray_accel_ckpt.runtime.notices.metadata import DEFAULT_URL
from ray_accel_ckpt.runtime.notices.notice import Kind
from ray_accel_ckpt.runtime.ray_node import RayNode

logger = logging.getLogger(__name__)


class OnRebalance(StrEnum):
    LOG = "log"
    DRAIN = "drain"


_DRAINS = {
    OnRebalance.LOG: frozenset({Kind.TAKEN}),
    OnRebalance.DRAIN: frozenset({Kind.TAKEN, Kind.AT_RISK}),
}


def watch_node(
    cloud: Annotated[
        Cloud, typer.Option(help="Whose notices to poll. none: wait for SIGTERM only.")
    ] = Cloud.AUTO,
    address: Annotated[
        str,
        typer.Option(
            help="The Ray cluster, as host:port. "
            "auto: RAY_ADDRESS, or the cluster that Ray on this machine belongs to."
        ),
    ] = "auto",
    node_id: Annotated[
        str | None,
        typer.Option(
            help="The Ray node to drain, in hex. Needed only if several run on this machine.",
            show_default="the one on this machine",
        ),
    ] = None,
    poll: Annotated[float, typer.Option(help="Seconds between two polls.")] = 1.0,
    margin: Annotated[
        float, typer.Option(help="Seconds by which Ray is told an earlier end than announced.")
    ] = 5.0,
    grace: Annotated[
        float, typer.Option(help="Seconds that are left to this machine after SIGTERM.")
    ] = 25.0,
    on_rebalance: Annotated[
        OnRebalance,
        typer.Option(
            help="What to do when AWS recommends to rebalance, or GCP announces maintenance of an "
            "unknown kind: the machine may be taken away, or never."
        ),
    ] = OnRebalance.LOG,
    metadata_url: Annotated[
        str, typer.Option(help="Where the cloud's metadata service is.")
    ] = DEFAULT_URL,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print each notice and each drain on stdout, a JSON document a line. "
            "The log stays on stderr.",
        ),
    ] = False,
) -> None:
    """Drain this machine's Ray node before the cloud takes the machine away.

    Run one beside Ray on each machine. It polls the cloud's metadata service for the announced
    end of the machine (AWS: spot interruption; GCP: preemption, host maintenance that ends it;
    Azure: scheduled events), and then has Ray drain the node, so that a Ray Train run can save
    and move away in time. SIGTERM is such a notice too: it drains, waits until the node or the
    grace is gone, and exits. Ctrl-C exits without draining.
    """
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", metadata_url):
        raise ConfigurationError(
            f"{metadata_url!r} is no URL of a metadata service",
            where="--metadata-url",
            remedy=f"give one like {DEFAULT_URL}",
        )
    settings = WatchSettings(poll=poll, margin=margin, grace=grace, drains=_DRAINS[on_rebalance])
    node = RayNode(address=None if address == "auto" else address, node_id=node_id)
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    watch = NodeWatch(
        source=source_of(cloud, metadata_url),
        node=node,
        settings=settings,
        tell=_print if as_json else None,
    )
    signal.signal(signal.SIGTERM, lambda *_: watch.terminate())
    watch.run()


def _print(event: WatchEvent) -> None:
    try:
        output.emit_line(event)
    except OSError as error:
        # Whoever read stdout is gone; the machine has to be watched all the same.
        logger.warning("an event is not printed: %s", error)


class _OneLine(logging.Formatter):
    """One line an event, for journals that are searched by line."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(super().format(record).split())

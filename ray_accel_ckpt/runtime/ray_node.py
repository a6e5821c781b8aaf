"""The node of Ray that runs on this machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_accel_ckpt.errors import ConfigurationError, DrainError, NodeNotFoundError

_CALL = Path(__file__).with_name("gcs_call.py")
_NODE_ID = re.compile(r"[0-9a-f]{56}")
_ADDRESS = re.compile(r"\S+:\d{1,5}")


@dataclass(frozen=True, kw_only=True)
class RayNode:
    """One node of a Ray cluster.

    Looked up anew at each call: a raylet that was started again is another node.

    Attributes:
        address: of the cluster's GCS, `host:port`; None finds it as `ray` commands do, by
            `RAY_ADDRESS` or by what runs on this machine.
        node_id: in hex; None finds the node that runs on this machine.
        timeout: seconds that a call may take.

    Raises:
        ConfigurationError: one of these cannot be.
    """

    address: str | None = None
    node_id: str | None = None
    timeout: float = 15.0

    def __post_init__(self) -> None:
        if self.address is not None and (
            "://" in self.address or not _ADDRESS.fullmatch(self.address)
        ):
            raise ConfigurationError(
                f"{self.address!r} is no address of a Ray cluster",
                where="address",
                remedy="give it as host:port, the one that `ray start --address` takes",
            )
        if self.node_id is not None and not _NODE_ID.fullmatch(self.node_id):
            raise ConfigurationError(
                f"{self.node_id!r} is no id of a Ray node",
                where="node id",
                remedy="give the 56 hex digits that `ray list nodes` shows",
            )
        if not self.timeout > 0:
            raise ConfigurationError(
                f"no call ends within {self.timeout} s",
                where="timeout",
                remedy="give seconds",
            )

    def find(self) -> str:
        """Its id. Blocks for `timeout` at most.

        Raises:
            NodeNotFoundError: Ray answers, and has no such living node.
            DrainError: Ray does not answer.
        """
        return self._call(reason=None, deadline=None)

    def drain(self, reason: str, deadline: float | None) -> str:
        """Ask Ray to take nothing new onto the node, and to count its end as a preemption.

        Args:
            reason: for Ray's logs.
            deadline: when the node will end, in seconds since the epoch; None if nobody knows.

        Returns:
            The node's id; Ray has accepted. Blocks for `timeout` at most.

        Raises:
            NodeNotFoundError: Ray answers, and has no such living node.
            DrainError: Ray does not answer, or refuses.
        """
        return self._call(reason=reason, deadline=deadline)

    def _call(self, *, reason: str | None, deadline: float | None) -> str:
        answer = self._answer(
            {
                "address": self.address,
                "node_id": self.node_id,
                "timeout": self.timeout,
                "reason": reason,
                # To Ray, 0 is no deadline.
                "deadline_ms": 0 if deadline is None else max(1, int(deadline * 1000)),
            }
        )
        node_ids: list[str] = answer["node_ids"]
        if not node_ids:
            raise NodeNotFoundError(
                "there is no node of Ray to drain",
                where=self._where,
                why=answer["why"],
                remedy="start Ray on this machine, or name its node with --node-id",
            )
        if len(node_ids) > 1:
            raise DrainError(
                "several nodes of Ray run on this machine",
                where=self._where,
                why=", ".join(node_ids),
                remedy="name one with --node-id",
            )
        if reason is not None and not answer["accepted"]:
            raise DrainError(
                f"Ray refused to drain node {node_ids[0]}",
                where=self._where,
                why=answer["refusal"],
            )
        return node_ids[0]

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        # -P: else the files beside it would be modules to import.
        command = [sys.executable, "-P", str(_CALL)]
        try:
            done = subprocess.run(  # noqa: S603
                command,
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=self.timeout,
                check=True,
            )
            answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired as error:
            raise self._unreachable(f"no answer within {self.timeout:g} s") from error
        except subprocess.CalledProcessError as error:
            raise self._unreachable(_last_line(error.stderr)) from error
        return answer

    def _unreachable(self, why: str) -> DrainError:
        return DrainError(
            "Ray cannot be reached",
            where=self._where,
            why=why,
            remedy="see that Ray runs here, or give the address of its head with --address",
        )

    @property
    def _where(self) -> str:
        return self.address or "the cluster found on this machine"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "the process that asked ended without a word"

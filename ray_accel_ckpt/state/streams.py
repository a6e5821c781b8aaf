"""Iterable data: each rank reads a stream of its own, and goes on where its state says."""

from __future__ import annotations

import collections
import inspect
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from ray_accel_ckpt.errors import ElasticDataError
from ray_accel_ckpt.state.cursor import Cursor
from ray_accel_ckpt.state.entrances import ByDataset, entrance_of, has_state
from ray_accel_ckpt.state.part import Differences
from ray_accel_ckpt.state.rng import NOT_A_STATE, OwnStreams, check_host, derived_seed
from ray_accel_ckpt.state.source import Served, require_in_order
from ray_accel_ckpt.state.tree import Json, encoded_items, flatten, tensor_refs, unflatten

logger = logging.getLogger(__name__)

_END = object()


class StreamSource:
    """Reads an iterable dataset; `consumed` counts this rank's batches.

    Where a pass stands in the middle is an *entry*, a dict of

    - `at`: batches that had been handed out then;
    - `kind` and `state`: see `Entrance`;
    - `streams`: the random streams that the dataset draws from in this process,
      or None: they are new.
    """

    per_rank = True
    units = None
    members = frozenset({"loader_workers", "entry"})

    def __init__(self, loader: DataLoader[Any], *, name: str, rank: int, world_size: int) -> None:
        require_in_order(loader, name)
        self._loader = loader
        self._name = name
        self._rank, self._world_size = rank, world_size
        self._generator = torch.Generator()
        self._entrance = entrance_of(loader, self._generator)
        self._running: tuple[int, OwnStreams] | None = None
        self._entry: tuple[int, dict[str, Any]] | None = None
        if rank == 0 and has_state(loader.dataset) and not self._entrance.kind:
            logger.warning(
                "loader %r will be read again from its beginning when the run resumes: %s",
                name,
                self._entrance.why_not,
            )

    def length(self, cursor: Cursor) -> int:
        del cursor
        return len(self._loader)

    def position(self, cursor: Cursor, num_batches: int) -> int:
        del cursor
        return num_batches

    def batches(self, cursor: Cursor) -> Iterator[Served]:
        if hasattr(self._loader.dataset, "set_epoch"):
            self._loader.dataset.set_epoch(cursor.epoch)
        seed = derived_seed(cursor.seed, cursor.epoch, "workers")
        self._generator.manual_seed(seed)
        own = OwnStreams(seed)
        entry = self._entry_into(cursor)
        with own.scope():
            batches = self._entrance.begin(entry["state"] if entry else None)
        at = 0
        if entry is not None:
            at = entry["at"]
            # Only now: what a dataset draws when it begins, it drew at the beginning.
            own = OwnStreams(derived_seed(seed, "at", at))
            if entry["streams"] is not None:
                own.load(entry["streams"])
        self._read_again(batches, cursor.consumed - at, own)
        for consumed in itertools.count(cursor.consumed + 1):
            with own.scope():
                batch = next(batches, _END)
            if batch is _END:
                return
            self._running = cursor.epoch, own
            yield Served(batch=batch, consumed=consumed)

    # --- the state ---------------------------------------------------------------------

    def state(self, position: Mapping[str, Any]) -> dict[str, Any]:
        entered = position["started"] and not position["spent"] and self._entrance.kind
        entry = self._entry_of(position) if entered else None
        return {"loader_workers": self._loader.num_workers, "entry": entry}

    def compare(self, saved: Mapping[str, Json], differences: Differences) -> None:
        other = {"rows": "an iterable of batches", "unit": "data by index"}
        for member, what in other.items():
            if member in saved:
                differences.differing.append(
                    f"{self._name} (checkpoint: {what}, dataset: iterable)"
                )
                return
        if saved.get("units") is not None:
            differences.differing.append(
                f"{self._name} (checkpoint: {saved['units']} samples, dataset: iterable)"
            )
        workers, now = saved.get("loader_workers"), self._loader.num_workers
        inside = saved.get("started") is True and saved.get("spent") is not True
        if workers not in (None, now) and inside and saved.get("consumed"):
            # Each loader worker makes batches of its own: with others, these are other batches.
            differences.differing.append(
                f"{self._name} (checkpoint: in the middle of a stream read by {workers} loader "
                f"workers, registered: num_workers={now})"
            )

    def understands(self, state: Mapping[str, Any]) -> bool:
        entry = state.get("entry")
        if entry is None:
            return True
        if not isinstance(entry, dict) or set(entry) != {"at", "kind", "state", "streams"}:
            return False
        if type(entry["at"]) is not int or not 0 <= entry["at"] <= state["consumed"]:
            return False
        if entry["kind"] == ByDataset.kind:
            inner = entry["state"]
            if not isinstance(inner, dict) or set(inner) != {"dataset", "ended"}:
                return False
        return entry["streams"] is None or _are_streams(entry["streams"])

    def apply(self, state: Mapping[str, Any]) -> None:
        self._running = None
        entry = state.get("entry")
        self._entry = None if entry is None else (state["epoch"], entry)

    def _entry_of(self, position: Mapping[str, Any]) -> dict[str, Any] | None:
        epoch = position["epoch"]
        if self._running is not None and self._running[0] == epoch:
            return {
                "at": position["consumed"],
                "kind": self._entrance.kind,
                "state": self._entrance.state(),
                # Loader workers have streams of their own, in their processes.
                "streams": self._running[1].state() if self._loader.num_workers == 0 else None,
            }
        if self._entry is not None and self._entry[0] == epoch:
            return self._entry[1]
        return None

    def _entry_into(self, cursor: Cursor) -> dict[str, Any] | None:
        """The entry into the cursor's pass, if there is one, before where it stands."""
        if self._entry is None or self._entry[0] != cursor.epoch:
            return None
        entry = self._entry[1]
        usable = entry["kind"] == self._entrance.kind and entry["at"] <= cursor.consumed
        return entry if usable else None

    def _read_again(self, batches: Iterator[Any], count: int, own: OwnStreams) -> None:
        if not count:
            return
        logger.warning(
            "loader %r: reading %d batches again to get back to the position of the checkpoint: %s",
            self._name,
            count,
            self._entrance.why_not,
        )
        with own.scope():
            collections.deque(itertools.islice(batches, count), maxlen=0)

    # --- another number of workers -----------------------------------------------------

    def dealt_anew(self, saved: Sequence[Json]) -> Json:
        ranks = [encoded_items(value) for value in saved]
        first = {**ranks[0], "world_size": self._world_size, "entry": None}
        first["consumed"] = max((_count(rank.get("consumed")) for rank in ranks), default=0)
        passes = {(str(r.get("epoch")), str(r.get("started")), str(r.get("spent"))) for r in ranks}
        if len(passes) > 1:
            raise self._cannot(len(saved), "some of the ranks had ended their pass, others had not")
        inside = first.get("started") is True and first.get("spent") is not True
        if not inside or first["consumed"] == 0:
            return first
        state = self._state_dealt_anew([encoded_items(rank.get("entry")) for rank in ranks])
        kind = ByDataset.kind
        first["entry"] = {"at": first["consumed"], "kind": kind, "state": state, "streams": None}
        return first

    def _state_dealt_anew(self, entries: list[dict[str, Json]]) -> dict[str, Json]:
        states = [encoded_items(entry.get("state")) for entry in entries]
        if all(state.get("ended") is True for state in states):
            return {"dataset": None, "ended": True}
        if any(entry.get("kind") != ByDataset.kind for entry in entries):
            raise self._cannot(
                len(entries), "each of them read a stream of its own, and its state was not saved"
            )
        if not isinstance(self._entrance, ByDataset) or not self._reshards():
            raise self._cannot(
                len(entries),
                "the dataset has no reshard(states, num_workers), or is read by "
                "loader workers (num_workers above 0)",
            )
        # What a stream's state says after its end is the dataset's own affair: nothing is left.
        inner = [state.get("dataset") for state in states if state.get("ended") is not True]
        if tensor_refs(inner):
            raise self._cannot(len(entries), "the states of the dataset hold tensors or arrays")
        dataset: Any = self._loader.dataset
        left = [unflatten(state, {}) for state in inner]
        try:
            dealt = dataset.reshard(left, self._world_size)
        except Exception as e:
            raise self._cannot(len(entries), f"reshard() raised {type(e).__name__}: {e}") from e
        if not isinstance(dealt, list) or len(dealt) != self._world_size:
            raise self._cannot(
                len(entries), f"reshard() must return a list of {self._world_size} states"
            )
        flat = flatten(dealt[self._rank], self._name)
        if flat.tensors:
            raise self._cannot(len(entries), "reshard() returned tensors or arrays")
        if self._rank == 0:
            logger.warning(
                "loader %r: the streams of %d workers are dealt out anew to %d",
                self._name,
                len(entries),
                self._world_size,
            )
        return {"dataset": flat.value, "ended": False}

    def _reshards(self) -> bool:
        """🤗 datasets have a `reshard` too, which takes nothing and means something else."""
        reshard = getattr(self._loader.dataset, "reshard", None)
        try:
            return callable(reshard) and bool(inspect.signature(reshard).bind([], 1))
        except (TypeError, ValueError):
            return False

    def _cannot(self, before: int, why: str) -> ElasticDataError:
        return ElasticDataError(
            f"loader {self._name!r} cannot go on with {self._world_size} workers in the middle "
            f"of a pass that {before} had begun",
            why=why,
            remedy="resume with as many workers as before; give the dataset reshard(states, "
            "num_workers), which returns num_workers states for the states of all old workers; "
            "use a map-style dataset; or load_state(parts=...) without the loader",
        )


def _are_streams(state: Any) -> bool:
    try:
        check_host(state)
    except NOT_A_STATE:
        return False
    return True


def _count(value: Json) -> int:
    return value if type(value) is int else 0

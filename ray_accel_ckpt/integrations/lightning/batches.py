"""The training batches as Lightning gets them, with a place between each two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ray_accel_ckpt.state.loader import PreparedLoader, another_has_begun


class Batches:
    """What stands in for the user's train loader.

    Between two batches there is a moment when Lightning is done with the one, its validation
    and schedules too, and has begun nothing of the next: when it asks for it. No
    hook is called there, so this calls `between`.

    Lightning makes iterators that it does not use: a pass begins when its first batch is asked for.
    """

    def __init__(self, loader: PreparedLoader, between: Callable[[], None]) -> None:
        self.loader = loader
        self._between = between
        self._pass: Iterator[Any] | None = None

    @property
    def dataset(self) -> Any:
        return self.loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return _Pass(self)

    def end(self) -> None:
        """The pass under way is over, whatever is left of it."""
        if self._pass is not None:
            self._pass.close()  # type: ignore[attr-defined]
            self._pass = None

    def reenter(self) -> None:
        """The next pass is the one that was loaded, whatever was looked at since."""
        self.end()
        self.loader.reenter()

    def first(self) -> Iterator[Any]:
        """Begin a pass; what is between it and the one before belongs to neither."""
        self.end()
        self._between()
        self._pass = iter(self.loader)
        return self._pass

    def next_of(self, batches: Iterator[Any]) -> Any:
        """
        Raises:
            ConfigurationError: a hook has begun another pass meanwhile.
        """
        if batches is not self._pass:
            raise another_has_begun(self.loader.name)
        self._between()
        return next(batches)

    # Lightning asks whether a loader can be resumed. It can: its position is saved with the rest.

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


class _Pass:
    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._begun: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._begun is None:
            self._begun = self._batches.first()
            return next(self._begun)
        return self._batches.next_of(self._begun)

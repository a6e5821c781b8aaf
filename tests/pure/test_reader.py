"""Any tensor out of any number of shards, and only out of shards that fit together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_accel_ckpt.errors import CorruptCheckpointError, NotACheckpointError
from ray_accel_ckpt.image import hashing as images
from ray_accel_ckpt.image import staged as staging
from ray_accel_ckpt.image.image import Hashing, Image
from ray_accel_ckpt.image.pieces import Piece
from ray_accel_ckpt.image.reader import Located, Snapshot
from ray_accel_ckpt.image.staged import Staged
from ray_accel_ckpt.image.staging import bytes_of as view_of
from ray_accel_ckpt.state.part import Scope
from tests.helpers_image import Small, bytes_of, image_of, part_of, small_image


class Shards:
    """The images of all ranks, and what is read of them."""

    def __init__(self, images: list[Image]) -> None:
        self.data = [bytearray(image.data) for image in images]
        self.reads: list[tuple[int, int, int]] = []
        self.manifests = []
        for image in images:
            hashing = Hashing(image)
            for _ in hashing.chunks():
                pass
            self.manifests.append(hashing.manifest())

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.manifests, "there")

    def fetch(self, rank: int, offset: int, into: memoryview) -> None:
        self.reads.append((rank, offset, len(into)))
        into[:] = self.data[rank][offset : offset + len(into)]

    def staged(self, rank: int, names: set[str] | None = None) -> Staged:
        """All slices of a shard, or those named."""
        infos = [i for i in self.manifests[rank].slices if names is None or i.name in names]
        return self.read(rank, map(Piece.whole, infos))

    def read(self, rank: int, pieces: Iterable[Piece]) -> Staged:
        staged = Staged(rank, pieces, block=self.manifests[rank].shard.block)
        buffer = torch.empty(staged.nbytes, dtype=torch.uint8)
        staged.read(self.fetch, buffer, where="the shard")
        return staged


def _small(world_size: int, number: int = 1) -> Shards:
    ranks = range(world_size)
    return Shards([small_image(number, rank=rank, world_size=world_size) for rank in ranks])


_tensors = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.tuples(
        st.lists(st.integers(0, 7), max_size=3),
        st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.complex128]),
    ),
    max_size=6,
)


def _whole(shards: Shards, name: str) -> torch.Tensor:
    found = []
    for piece in shards.snapshot.located(name, 0):
        staged = shards.staged(piece.shard, {name})
        found.append(staged.rows(Piece.whole(piece.info)))
    return torch.cat(found) if found[0].dim() else found[0]


@given(_tensors, st.integers(1, 8))
def test_every_tensor_is_put_together_again(found: Mapping[str, Any], world_size: int) -> None:
    value = {}
    for name, (shape, dtype) in found.items():
        raw = torch.randint(0, 256, (torch.Size(shape).numel() * dtype.itemsize,))
        empty = torch.empty(shape, dtype=dtype)
        value[name] = raw.to(torch.uint8).view(dtype).reshape(shape) if raw.numel() else empty
    captured = part_of(value)
    ranks = range(world_size)
    shards = Shards([image_of(captured, rank=rank, world_size=world_size) for rank in ranks])
    for name, tensor in value.items():
        whole = _whole(shards, f"part/{name}")
        assert (whole.dtype, whole.shape) == (tensor.dtype, tensor.shape)
        assert bytes_of(whole) == bytes_of(tensor)


def test_neighbouring_slices_are_read_at_once() -> None:
    shards = _small(1)
    shards.staged(0)
    header = shards.manifests[0].shard.header_nbytes
    assert shards.reads == [(0, header, len(shards.data[0]) - header)]


def test_slices_that_are_not_neighbours_are_read_alone() -> None:
    shards = _small(1)
    infos = sorted((i for i in shards.manifests[0].slices), key=lambda i: i.begin)
    chosen = {infos[0].name, infos[1].name, infos[3].name}
    shards.staged(0, chosen)
    assert sum(nbytes for _, _, nbytes in shards.reads) == sum(
        i.end - i.begin for i in infos if i.name in chosen
    )
    assert len(shards.reads) == 2


def test_a_long_slice_is_read_in_stretches_of_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "BLOCK", 64)
    monkeypatch.setattr(staging, "_STRETCH", 200)
    x = torch.arange(1000, dtype=torch.uint8)
    shards = Shards([image_of(part_of({"x": x}))])
    begin = shards.manifests[0].slices[0].begin
    staged = shards.staged(0)
    assert torch.equal(staged.rows(Piece.whole(shards.manifests[0].slices[0])), x)
    lengths = [192] * 5 + [40]
    expected = [(0, begin + 192 * i, length) for i, length in enumerate(lengths)]
    assert sorted(shards.reads) == expected


def test_proving_reads_all_and_keeps_a_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "BLOCK", 64)
    monkeypatch.setattr(staging, "_STRETCH", 128)
    shards = Shards([image_of(part_of({"x": torch.arange(500), "y": torch.zeros(3, 5)}))])
    (manifest,) = shards.manifests
    staged = Staged(0, map(Piece.whole, manifest.slices), block=manifest.shard.block)
    staged.prove(shards.fetch, where="the shard")
    assert sum(nbytes for *_, nbytes in shards.reads) == manifest.shard.nbytes - (
        manifest.shard.header_nbytes
    )
    assert max(nbytes for *_, nbytes in shards.reads) == 128
    shards.data[0][-1] ^= 1
    with pytest.raises(CorruptCheckpointError, match="part/y"):
        staged.prove(shards.fetch, where="the shard")


@pytest.mark.parametrize("stretch", [64, 200, 10_000])
def test_slices_go_to_memory_of_their_own_or_to_the_buffer(
    monkeypatch: pytest.MonkeyPatch, stretch: int
) -> None:
    monkeypatch.setattr(images, "BLOCK", 64)
    monkeypatch.setattr(staging, "_STRETCH", stretch)
    value = {name: torch.arange(n, dtype=torch.int16) for n, name in enumerate("abcd", 90)}
    shards = Shards([image_of(part_of(value))])
    (manifest,) = shards.manifests
    places = {f"part/{name}": torch.zeros(value[name].nbytes, dtype=torch.uint8) for name in "bd"}
    staged = Staged(0, map(Piece.whole, manifest.slices), block=manifest.shard.block, places=places)
    buffer = torch.empty(staged.nbytes, dtype=torch.uint8)
    assert staged.nbytes < manifest.shard.nbytes - sum(p.numel() for p in places.values())
    staged.read(shards.fetch, buffer, where="the shard")
    for info in manifest.slices:
        piece, expected = Piece.whole(info), value[info.name[-1]]
        assert torch.equal(staged.rows(piece), expected)
        assert staged.in_place(piece) is (info.name in places)
    assert all(torch.equal(p.view(torch.int16), value[n[-1]]) for n, p in places.items())
    ranges = sorted((offset, nbytes) for _, offset, nbytes in shards.reads)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(ranges))
    begin = next(info.begin for info in manifest.slices if info.name == "part/d")
    shards.data[0][begin + 70] ^= 1
    with pytest.raises(CorruptCheckpointError, match="part/d"):
        staged.read(shards.fetch, buffer, where="the shard")


def test_what_is_no_whole_blocks_goes_to_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "BLOCK", 64)
    x = torch.arange(100)
    shards = Shards([image_of(part_of({"x": x}))])
    (info,) = shards.manifests[0].slices
    piece = Piece(info=info, first=3, stop=50)
    place = torch.zeros(piece.nbytes, dtype=torch.uint8)
    staged = Staged(0, [piece], block=64, places={info.name: place})
    staged.read(shards.fetch, torch.empty(staged.nbytes, dtype=torch.uint8), where="the shard")
    assert torch.equal(staged.rows(piece), x[3:50])
    assert not staged.in_place(piece)
    assert not place.any()


def test_a_damaged_block_is_named_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "BLOCK", 64)
    shards = Shards([image_of(part_of({"x": torch.zeros(100)}))])
    begin = shards.manifests[0].slices[0].begin
    shards.data[0][begin + 130] ^= 1
    with pytest.raises(CorruptCheckpointError, match="part/x") as caught:
        shards.staged(0)
    assert caught.value.where == f"the shard, bytes {begin + 128} to {begin + 192}"


def test_each_rank_sees_its_own_and_what_is_shared() -> None:
    snapshot = _small(3).snapshot
    for rank in range(3):
        parts = snapshot.parts(rank)
        assert set(parts) == {"model", "shared", "own"}
        assert parts["own"].value["rank"] == rank
        (piece,) = snapshot.located("own/noise", rank)
        assert piece.shard == rank


def test_a_rank_the_checkpoint_does_not_know_sees_no_part_of_a_rank() -> None:
    snapshot = _small(2).snapshot
    assert set(snapshot.parts(2)) == {"model", "shared"}
    assert snapshot.per_rank_parts() == {"own"}


def test_what_a_tensor_is_is_known_without_reading_it() -> None:
    shards = _small(2)
    parts = shards.snapshot.parts(0)
    model = Small(1).model.state_dict()
    for name, tensor in model.items():
        saved = parts["model"].tensors[f"model/{name}"]
        assert (saved.dtype, saved.shape) == (tensor.dtype, tuple(tensor.shape))
    assert shards.reads == []


def test_a_tensor_nobody_has_is_nowhere() -> None:
    assert _small(2).snapshot.located("model/none", 0) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_share_is_noticed(rank: int) -> None:
    """The manifest is there, and says less than it should."""
    captured = part_of({"x": torch.zeros(4, 3)})
    shards = Shards([image_of(captured, rank=r, world_size=2) for r in range(2)])
    empty = shards.manifests[rank].model_copy(update={"slices": []})
    shards.manifests[rank] = empty
    with pytest.raises(NotACheckpointError, match="row for row"):
        _ = shards.snapshot


def test_slices_of_another_shape_are_noticed() -> None:
    captured = part_of({"x": torch.zeros(4, 3)})
    shards = Shards([image_of(captured, rank=r, world_size=2) for r in range(2)])
    (info,) = shards.manifests[1].slices
    other = info.model_copy(update={"shape": [4, 5]})
    shards.manifests[1] = shards.manifests[1].model_copy(update={"slices": [other]})
    with pytest.raises(NotACheckpointError, match="differ in shape"):
        _ = shards.snapshot


def test_a_tensor_that_is_shared_to_one_rank_and_its_own_to_another_is_noticed() -> None:
    """The ranks would wait for each other's broadcasts for ever."""
    shards = _small(2)
    last = shards.manifests[1]
    slices = [
        info.model_copy(update={"scope": "per_rank", "name": "shared/moments"})
        if info.name == "own/noise"
        else info
        for info in last.slices
    ]
    shards.manifests[1] = last.model_copy(update={"slices": slices})
    with pytest.raises(CorruptCheckpointError, match="its own to another"):
        _ = shards.snapshot


def test_a_part_is_each_ranks_own_on_all_ranks_or_on_none() -> None:
    shards = _small(2)
    last = shards.manifests[1]
    parts = {**last.parts, "shared": last.parts["own"]}
    shards.manifests[1] = last.model_copy(update={"parts": parts})
    assert shards.snapshot.parts(1)["shared"] == shards.snapshot.parts(0)["shared"]


def test_manifests_of_two_saves_are_noticed() -> None:
    first, second = _small(2, 1), _small(2, 2)
    first.manifests[1] = second.manifests[1]
    with pytest.raises(NotACheckpointError, match="different saves"):
        _ = first.snapshot


def test_each_rank_has_its_own_tensor_of_a_name() -> None:
    for scope, ranks in ((Scope.PER_RANK, [0, 1, 2]), (Scope.RANK_ZERO, [0, 0, 0])):
        captured = part_of({"x": torch.zeros(4)}, scope=scope)
        shards = Shards([image_of(captured, rank=r, world_size=3) for r in range(3)])
        located = [shards.snapshot.located("part/x", rank) for rank in range(3)]
        assert [piece.shard for (piece,) in located] == ranks


def test_the_bytes_of_a_buffer_are_its_memory() -> None:
    buffer = torch.zeros(4, dtype=torch.uint8)
    view_of(buffer)[2] = 7
    assert buffer.tolist() == [0, 0, 7, 0]
    assert isinstance(Located(shard=0, info=_small(1).manifests[0].slices[0]).shard, int)

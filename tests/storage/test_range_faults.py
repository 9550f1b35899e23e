"""Servers and networks that do wrong: what is read is right, or it is refused."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from range_server import LASTING, PASSING, RangeServer

from outliermerge.errors import OutlierMergeError
from outliermerge.storage import ranges
from outliermerge.storage.objects import Objects
from outliermerge.storage.range_cache import CachedObject, RangeCache
from outliermerge.storage.stamps import ChangedInputError
from outliermerge.storage.system import read_at

CHUNK = 4096
SIZE = 40 * CHUNK + 123
ADDRESSES = ("{url}/bucket/weights", "s3://bucket/weights")

_OBJECTS: list[Objects] = []

Made = tuple[RangeServer, bytes]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less than a user's run does."""
    monkeypatch.setattr(ranges, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(ranges, "LONGEST_WAIT_SECONDS", 0.005)
    monkeypatch.setattr(ranges, "STALL_SECONDS", 1.0)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    content = random.Random(5).randbytes(SIZE)
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "weights").write_bytes(content)
    with RangeServer(tmp_path, stall_seconds=2.0) as server:
        for name, value in server.s3().items():
            monkeypatch.setenv(name, value)
        yield server, content


@pytest.fixture(autouse=True)
def objects() -> Iterator[Objects]:
    made = Objects()
    _OBJECTS.append(made)
    yield made
    made.close()


def _opened(cache: RangeCache, address: str) -> CachedObject:
    remote = _OBJECTS[-1].open(address)
    first = ranges.persistently(address, partial(remote.first, 100))
    assert first is not None
    return cache.add(remote, first[0], CHUNK)


def _read(cache: RangeCache, found: CachedObject, start: int, stop: int) -> bytes:
    out = bytearray(stop - start)
    release = cache.take([(found, start, stop)])
    try:
        assert read_at(found.descriptor, start, memoryview(out)) == len(out)
    finally:
        release()
    return bytes(out)


def _address(form: str, server: RangeServer) -> str:
    if form.startswith("s3"):
        pytest.importorskip("obstore")
    return form.format(url=server.url)


def _try(made: Made, form: str, folder: Path, seed: int, kinds: tuple[str, ...]) -> Counter[str]:
    """Read random ranges while requests fail at random; return how often what went wrong."""
    server, content = made
    draw, did = random.Random(seed), Counter[str]()
    address = _address(form, server)
    cache = RangeCache(folder, 8 * CHUNK)
    try:
        found = _opened(cache, address)

        def fault(name: str, start: int, stop: int) -> str:
            kind = draw.choice(kinds) if draw.random() < 0.4 else ""
            did[kind] += 1
            return kind

        server.fault = fault
        starts = [draw.randrange(SIZE - 1) for _ in range(12)]
        wanted = [(start, min(SIZE, start + draw.randrange(1, 5 * CHUNK))) for start in starts]
        cache.read_ahead((found, *each) for each in wanted)
        for start, stop in wanted:
            try:
                got = _read(cache, found, start, stop)
            except OutlierMergeError as error:
                did["refused"] += 1
                assert address in str(error)
                assert isinstance(error, ChangedInputError) or "tries" in str(error)
            else:
                assert got == content[start:stop], (seed, start, stop)
                did["right"] += 1
    finally:
        server.fault = lambda name, start, stop: ""
        cache.close()
    return did


@pytest.mark.parametrize("form", ADDRESSES)
@pytest.mark.parametrize("num_faults", [25, pytest.param(500, marks=pytest.mark.faults)])
def test_faults_never_give_wrong_bytes(
    made: Made, form: str, num_faults: int, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    done, seed = Counter[str](), 0
    while sum(done[kind] for kind in (*PASSING, *LASTING)) < num_faults:
        done += _try(made, form, tmp_path, seed, (*PASSING, *LASTING))
        seed += 1
    assert done["right"] > 0
    record_property("points", num_faults)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", ADDRESSES)
@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_is_tried_again(made: Made, form: str, kind: str, tmp_path: Path) -> None:
    server, content = made
    cache = RangeCache(tmp_path, 100 * CHUNK)
    try:
        found = _opened(cache, _address(form, server))
        left = [kind, kind]
        server.fault = lambda name, start, stop: left.pop() if left else ""
        assert _read(cache, found, 100, 3 * CHUNK) == content[100 : 3 * CHUNK]
        assert not left
    finally:
        cache.close()


@pytest.mark.parametrize("form", ADDRESSES)
@pytest.mark.parametrize("kind", LASTING)
def test_another_state_is_refused_by_name(made: Made, form: str, kind: str, tmp_path: Path) -> None:
    server, _ = made
    address = _address(form, server)
    cache = RangeCache(tmp_path, 100 * CHUNK)
    try:
        found = _opened(cache, address)
        server.fault = lambda name, start, stop: kind
        with pytest.raises(ChangedInputError, match="since the merge was planned") as caught:
            _read(cache, found, 0, 3 * CHUNK)
        assert address in str(caught.value)
    finally:
        cache.close()


@pytest.mark.parametrize("form", ADDRESSES)
def test_an_object_written_again_is_refused(made: Made, form: str, tmp_path: Path) -> None:
    server, content = made
    cache = RangeCache(tmp_path, 100 * CHUNK)
    try:
        found = _opened(cache, _address(form, server))
        assert _read(cache, found, 0, 10) == content[:10]
        (server.folder / "bucket" / "weights").write_bytes(content[::-1])
        with pytest.raises(ChangedInputError):
            _read(cache, found, 20 * CHUNK, 21 * CHUNK)
    finally:
        cache.close()


def test_a_server_that_gives_no_ranges_is_named(made: Made, tmp_path: Path) -> None:
    server, _ = made
    cache = RangeCache(tmp_path, 100 * CHUNK)
    try:
        found = _opened(cache, f"{server.url}/bucket/weights")
        server.fault = lambda name, start, stop: "whole"
        with pytest.raises(OutlierMergeError, match=r"bucket/weights.*whole files, no ranges"):
            _read(cache, found, 0, 10)
    finally:
        cache.close()


def test_the_cache_keeps_within_its_bounds(made: Made, tmp_path: Path) -> None:
    server, content = made
    cache = RangeCache(tmp_path, 8 * CHUNK)
    try:
        found = _opened(cache, f"{server.url}/bucket/weights")
        cache.read_ahead([(found, 0, SIZE)])
        for start in range(0, SIZE, 1000):
            stop = min(SIZE, start + 1000)
            assert _read(cache, found, start, stop) == content[start:stop]
            assert cache.kept_bytes <= 9 * CHUNK
        asked = [stop - start for _, start, stop in server.ranges[1:]]
        assert sum(asked) == SIZE  # each byte once
    finally:
        cache.close()


def test_what_is_read_before_its_turn_leaves_no_gap_behind(made: Made, tmp_path: Path) -> None:
    server, content = made
    cache = RangeCache(tmp_path, 100 * CHUNK)
    try:
        found = _opened(cache, f"{server.url}/bucket/weights")
        for number in (2, 5, 6, 10):
            assert _read(cache, found, number * CHUNK, (number + 1) * CHUNK)
        cache.read_ahead([(found, 0, SIZE)])
        assert _read(cache, found, 0, SIZE) == content
        asked = [stop - start for _, start, stop in server.ranges[1:]]
        assert sum(asked) == SIZE
    finally:
        cache.close()


def test_a_chunk_goes_when_all_its_tensors_are_done(made: Made, tmp_path: Path) -> None:
    server, content = made
    cache = RangeCache(tmp_path, 100 * CHUNK)
    try:
        found = _opened(cache, f"{server.url}/bucket/weights")
        edges = [0, CHUNK // 2, 2 * CHUNK + 100, 3 * CHUNK]
        pieces = [(found, *pair) for pair in pairwise(edges)]
        held = [cache.take([piece]) for piece in pieces]
        kept = []
        for piece, release in zip(pieces, held, strict=True):
            cache.drop([piece])
            cache.drop([piece])  # once more: it counts once
            release()
            kept.append(cache.kept_bytes)
        assert kept == [3 * CHUNK, CHUNK, 0]
        assert _read(cache, found, 0, CHUNK) == content[:CHUNK]  # again
    finally:
        cache.close()

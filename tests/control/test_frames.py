"""Frames: any split of the octets, garbage, frames that are too large."""

import itertools
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.control import frames
from relaymta.control.frames import UNSET, Broken, Frame, Frames, pack
from relaymta.errors import RelayError

idents = st.one_of(st.none(), st.integers(0, 2**64 - 1))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)
whole = st.one_of(
    st.builds(Frame, id=idents, op=st.text(), args=st.dictionaries(st.text(), values, max_size=3)),
    st.builds(Frame, id=idents, ok=values, missing=st.lists(st.integers(0, 100))),
    st.builds(Frame, id=idents, error=st.text()),
    st.builds(Frame, id=idents, piece=values),
    st.builds(Frame, id=idents, more=st.sampled_from([0, 1])),
)


def fed(data: bytes, cuts: list[int]) -> list[Frame | Broken]:
    reader, found = Frames(), []
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        found += reader.feed(data[start:end])
    return found


@given(st.lists(whole, max_size=5), st.lists(st.integers(0, 400), max_size=12))
def test_any_split_gives_the_same_frames(sent, cuts):
    data = b"".join(map(pack, sent))
    assert fed(data, cuts) == sent


# What is between two frames: (octets, id, whether it is a request)
def framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def large(head: bytes, over: int) -> bytes:
    return struct.pack(">I", frames.LIMIT + over) + head + bytes(frames.LIMIT + over - len(head))


@given(
    st.one_of(st.binary(max_size=60).map(framed), st.tuples(st.binary(max_size=30), st.integers(1, 50))),
    st.lists(st.integers(0, 400), max_size=12),
    whole,
)
def test_garbage_and_what_is_too_large_is_refused_and_the_next_frame_read(garbage, cuts, after):
    was, frames.LIMIT = frames.LIMIT, 200
    try:
        garbage = large(*garbage) if isinstance(garbage, tuple) else garbage  # by the small limit: the other is 64 MiB
        one = fed(garbage, cuts)
        both = fed(garbage + pack(after), cuts) if len(pack(after)) < 200 else [*one, after]
    except RelayError:  # `after` is larger than this small limit
        return
    finally:
        frames.LIMIT = was
    assert len(one) == 1 and both == [*one, after]


@pytest.mark.parametrize("ident", [0, 1, 127, 128, 255, 256, 70_000, 1 << 33, (1 << 64) - 1])
def test_the_id_of_a_refused_frame_is_read(ident, monkeypatch):
    request, answer = pack(Frame(ident, "op", {"x": bytes(300)})), pack(Frame(ident, ok=bytes(300)))
    broken = framed(pack(Frame(ident, "op"))[4:] + b"\xc1")
    monkeypatch.setattr(frames, "LIMIT", 100)
    for data, asks in ((request, True), (answer, False), (broken, True)):
        for cuts in ([], list(range(len(data)))):
            (found,) = fed(data, cuts)
            assert isinstance(found, Broken)
            assert (found.ident, found.asks) == (ident, asks)


def test_a_skipped_frame_is_not_collected():
    reader = Frames()
    assert len(list(reader.feed(struct.pack(">I", 0xFFFFFFFF) + bytes(1 << 16)))) == 1
    for _ in range(2000):
        assert list(reader.feed(bytes(1 << 16))) == []
        assert len(reader._buffer) == 0


@pytest.mark.parametrize(
    "value",
    ["\ud800", 1 << 64, object(), bytes(frames.LIMIT), msgspec.UNSET.__class__],
    ids=["surrogate", "int", "object", "large", "class"],
)
def test_what_cannot_be_sent_is_refused_with_a_sentence(value):
    with pytest.raises(RelayError, match=r"cannot be sent|too many for one"):
        pack(Frame(1, ok=value))


def test_nesting_without_end_is_refused():
    (found,) = Frames().feed(framed(b"\x82\xa2id\x05\xa4args" + b"\x91" * 100_000))
    assert isinstance(found, Broken) and found.ident == 5
    assert Frame(1).ok is UNSET

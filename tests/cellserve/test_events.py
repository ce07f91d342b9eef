"""Server-sent events, cut out of a stream of bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellserve.errors import AnswerTooLarge
from cellserve.protocol.events import Event, EventParser

STREAM = b'id: 1\nevent: output\ndata: {"position":1}\n\ndata: bare\n\nevent: end\ndata: {"position":2}\n\n'
EVENTS = [Event("output", b'{"position":1}'), Event("message", b"bare"), Event("end", b'{"position":2}')]


@given(st.sets(st.integers(0, len(STREAM))))
def test_events_are_the_same_wherever_the_network_cuts_them(cuts: set[int]) -> None:
    parser, found = EventParser(len(STREAM)), []
    edges = [0, *sorted(cuts), len(STREAM)]
    for begin, end in pairwise(edges):
        parser.feed(STREAM[begin:end])
        while (event := parser.next_event()) is not None:
            found.append(event)
    assert found == EVENTS


def test_an_incomplete_event_is_not_returned() -> None:
    parser = EventParser(len(STREAM))
    parser.feed(STREAM[:20])
    assert parser.next_event() is None


def test_an_event_without_end_is_refused() -> None:
    parser = EventParser(100)
    parser.feed(b"data: " + b"x" * 94)
    assert parser.next_event() is None
    with pytest.raises(AnswerTooLarge, match=r"more than 100 bytes.*max_answer_bytes"):
        parser.feed(b"x")

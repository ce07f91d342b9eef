"""Server-sent events, cut out of a stream of bytes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cellserve.protocol.events import Event, EventParser

STREAM = b'id: 1\nevent: output\ndata: {"position":1}\n\ndata: bare\n\nevent: end\ndata: {"position":2}\n\n'
EVENTS = [Event("output", b'{"position":1}'), Event("message", b"bare"), Event("end", b'{"position":2}')]


@given(st.sets(st.integers(0, len(STREAM))))
def test_events_are_the_same_wherever_the_network_cuts_them(cuts: set[int]) -> None:
    parser, found = EventParser(), []
    edges = [0, *sorted(cuts), len(STREAM)]
    for begin, end in pairwise(edges):
        parser.feed(STREAM[begin:end])
        while (event := parser.next_event()) is not None:
            found.append(event)
    assert found == EVENTS


def test_an_incomplete_event_is_not_returned() -> None:
    parser = EventParser()
    parser.feed(STREAM[:20])
    assert parser.next_event() is None

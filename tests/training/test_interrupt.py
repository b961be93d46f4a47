"""Requests to stop inside one another, as of a run in a table."""

from __future__ import annotations

import os
import signal

from scatterbrain.training.interrupt import StopRequest


def test_a_signal_between_two_requests_reaches_the_inner_one():
    with StopRequest() as outer:
        os.kill(os.getpid(), signal.SIGTERM)
        with StopRequest() as inner:
            assert inner.check() and inner.signal == signal.SIGTERM
        with StopRequest() as next_one:
            assert next_one.check()
        assert outer.check()
    with StopRequest() as later:
        assert not later.check()


def test_whether_a_stop_was_asked_for_is_known_before_anyone_checks():
    assert not StopRequest.is_asked()
    with StopRequest():
        assert not StopRequest.is_asked()
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            assert StopRequest.is_asked()
        assert StopRequest.is_asked()
    assert not StopRequest.is_asked()


def test_a_second_signal_acts_as_usual_also_for_a_request_inside_another():
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with StopRequest() as outer, StopRequest() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.check() and received == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
            assert outer.check()
    finally:
        signal.signal(signal.SIGTERM, before)

"""The order of the host's calls: at once, delayed, or between the graphs of a capture."""

import pytest

from memory_ops.tables.host_calls import HostCalls


def test_calls_run_at_once_and_delayed_ones_in_order():
    calls, seen = HostCalls(), []
    calls.delay(lambda: seen.append("first"))
    calls.delay(lambda: seen.append("second"))
    calls.call(lambda: seen.append("call"))
    assert seen == ["call"] and not calls.is_capturing
    calls.mark()
    calls.catch_up()
    calls.catch_up()
    assert seen == ["call", "first", "second"]


def test_work_that_is_delayed_after_the_mark_waits_for_the_next_one():
    calls, seen = HostCalls(), []
    calls.delay(lambda: seen.append("before"))
    calls.mark()
    calls.delay(lambda: seen.append("after"))
    calls.catch_up()
    assert seen == ["before"]
    calls.mark()
    calls.catch_up()
    assert seen == ["before", "after"]


def test_delayed_work_of_a_failed_step_is_dropped():
    calls, seen = HostCalls(), []
    calls.delay(lambda: seen.append("due"))
    calls.mark()
    calls.delay(lambda: seen.append("delayed"))
    calls.drop_delayed()
    calls.mark()
    calls.catch_up()
    assert not seen


def test_a_capture_cuts_and_runs_nothing():
    calls, seen, cuts = HostCalls(), [], []
    with pytest.raises(RuntimeError, match="a kernel failed"), calls.capture(cuts.append):
        calls.call(lambda: seen.append("call"))
        assert calls.is_capturing
        raise RuntimeError("a kernel failed")
    assert not seen and not calls.is_capturing
    cuts[0]()
    assert seen == ["call"]

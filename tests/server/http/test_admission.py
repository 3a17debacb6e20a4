"""Admission: limits, slow arrivals that give way, and shares that come back."""

import pytest

from engine.errors import RequestError
from server.http.admission import GRACE_S, Admission
from server.http.errors import OverloadedError

LIMITS = {"prompts": 4, "tokens": 100, "body_bytes": 1000}


class Desk:
    """An admission with a clock that stands still until it is set."""

    def __init__(self):
        self.now, self.rejected, self.evicted = 0.0, [], []
        self.admission = Admission(LIMITS, self.rejected.append, lambda: self.now)

    def place(self, name, **amounts):
        place = self.admission.open(lambda: self.evicted.append(name))
        for resource, count in amounts.items():
            place.enlarge(resource, count)
        return place


@pytest.mark.parametrize(
    ("resource", "reason"),
    [("prompts", "queue_full"), ("tokens", "too_many_tokens"), ("body_bytes", "too_many_bytes")],
)
def test_each_limit_rejects_with_its_reason(resource, reason):
    desk, limit = Desk(), LIMITS[resource]
    first = desk.place("first", **{resource: limit - 1})
    first.keep()
    with pytest.raises(OverloadedError) as caught:
        desk.place("second", **{resource: 2})
    assert caught.value.status == 503 and caught.value.headers == {"Retry-After": "1"}
    assert desk.rejected == [reason] and desk.admission.used[resource] == limit - 1
    with pytest.raises(RequestError):
        desk.place("third", **{resource: limit + 1})
    first.reduce(resource, 1)
    desk.place("fourth", **{resource: 2})
    first.close()
    first.close()
    assert desk.admission.used[resource] == 2
    assert desk.rejected == [reason] and not desk.evicted


def test_a_share_is_enlarged_and_given_back_in_parts():
    desk = Desk()
    place = desk.place("one", prompts=1)
    place.enlarge("prompts", 3)
    place.enlarge("prompts", 2)
    assert desk.admission.used["prompts"] == 3
    for left in (2, 1, 0, 0):
        place.reduce("prompts", 1)
        assert desk.admission.used["prompts"] == left


def test_slow_arrivals_give_way_but_not_those_that_just_began_or_are_whole():
    desk = Desk()
    desk.place("whole", prompts=1).keep()
    slow = [desk.place(f"slow {i}", prompts=1) for i in range(3)]
    with pytest.raises(OverloadedError):
        desk.place("early", prompts=1)
    desk.now = GRACE_S
    desk.place("late", prompts=2)
    assert desk.evicted == ["slow 0", "slow 1"]
    with pytest.raises(OverloadedError):
        desk.place("greedy", prompts=2)
    slow[0].close()
    assert desk.admission.used["prompts"] == 3


def test_a_slow_arrival_that_asks_for_more_is_refused_and_keeps_what_it_holds():
    desk = Desk()
    slow = desk.place("slow", body_bytes=600)
    desk.place("whole", body_bytes=400).keep()
    desk.now = GRACE_S
    with pytest.raises(OverloadedError):
        slow.enlarge("body_bytes", 601)
    assert desk.admission.used["body_bytes"] == 1000 and not desk.evicted
    slow.close()
    assert desk.admission.used["body_bytes"] == 400

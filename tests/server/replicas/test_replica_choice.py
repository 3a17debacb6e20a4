"""Tests of the choice of a replica."""

from server.replicas.relayed_request import RoutingText
from server.replicas.replica_choice import ReplicaChoice

PROMPT = RoutingText("", "a long prompt that several requests begin with " * 8)
LONGER = RoutingText("", PROMPT.prompt + "and go on with this")
REPLICAS = ("a", "b", "c")


def other(number):
    return RoutingText("", f"{number} is a prompt that no other one begins with")


def test_a_known_prefix_leads_to_its_replica():
    choice = ReplicaChoice(slack=2)
    choice.began("b", "1", PROMPT)
    assert choice.ranked(REPLICAS, LONGER)[0] == "b"
    choice.began("b", "2", LONGER)
    assert choice.ranked(REPLICAS, LONGER)[0] == "b"


def test_a_replica_with_too_long_a_queue_is_left_alone():
    choice = ReplicaChoice(slack=2)
    for number in range(3):
        choice.began("b", f"{number}", PROMPT)
    assert choice.ranked(REPLICAS, LONGER)[-1] == "b"
    choice.ended("b", "0")
    assert choice.ranked(REPLICAS, LONGER)[0] == "b"


def test_unknown_prompts_go_to_the_least_loaded():
    choice = ReplicaChoice(slack=2)
    choice.began("a", "1", None)
    choice.began("c", "2", None)
    assert choice.ranked(REPLICAS, other(1))[0] == "b"
    choice.began("b", "3", None)
    firsts = {choice.ranked(REPLICAS, other(number))[0] for number in range(50)}
    assert firsts == set(REPLICAS)


def test_a_short_common_beginning_is_no_reason():
    choice = ReplicaChoice(slack=8)
    start = "x" * 64
    choice.began("a", "1", RoutingText("", start))
    assert choice.ranked(REPLICAS, RoutingText("", start + PROMPT.prompt * 4))[0] != "a"


def test_requests_without_a_prompt_spread():
    choice = ReplicaChoice(slack=2)
    assert {choice.ranked(REPLICAS, None)[0] for _ in range(50)} == set(REPLICAS)


def test_every_ingress_chooses_the_same_replica_for_a_new_prompt():
    first, second = ReplicaChoice(slack=2), ReplicaChoice(slack=2)
    for number in range(20):
        assert first.ranked(REPLICAS, other(number)) == second.ranked(REPLICAS, other(number))


def test_turns_through_several_ingresses_find_their_replica_while_loads_are_equal():
    ingresses = [ReplicaChoice(slack=2) for _ in range(3)]
    for number in range(10):
        turns = [
            RoutingText("", f"conversation {number} " * 40 + "and more " * n) for n in range(6)
        ]
        chosen = set()
        for turn, text in enumerate(turns):
            choice = ingresses[turn % 3]
            chosen.add(replica := choice.ranked(REPLICAS, text)[0])
            choice.began(replica, f"{number} {turn}", text)
            choice.ended(replica, f"{number} {turn}")
        assert len(chosen) == 1


def test_an_ingress_counts_its_own_requests_only():
    first, second = ReplicaChoice(slack=2), ReplicaChoice(slack=2)
    best = first.ranked(REPLICAS, PROMPT)[0]
    first.began(best, "1", None)
    assert first.ranked(REPLICAS, PROMPT)[0] != best
    assert second.ranked(REPLICAS, PROMPT)[0] == best


def test_a_replica_that_has_ended_is_forgotten():
    choice = ReplicaChoice(slack=2)
    choice.began("b", "1", PROMPT)
    choice.keep_only(("a", "c"))
    choice.ended("b", "1")  # its last request
    assert choice.ranked(("a", "c"), LONGER)[0] != "b"
    assert choice.ranked((), LONGER) == []


def test_a_replica_whose_only_request_ended_early_is_forgotten():
    choice = ReplicaChoice(slack=2)
    choice.ended("b", "1")
    choice.began("b", "1", PROMPT)
    choice.keep_only(("a", "c"))
    choice.keep_only(REPLICAS)
    assert not choice._index.shares(PROMPT.scope, PROMPT.prompt)


def test_requests_that_were_refused_or_ended_early_are_no_load():
    choice = ReplicaChoice(slack=0)
    for number in range(3000):
        choice.ended("a", f"refused {number}")
    choice.ended("a", "early")
    choice.began("a", "early", None)
    choice.began("b", "runs", None)
    choice.began("c", "runs too", None)
    assert choice.ranked(REPLICAS, other(1))[0] == "a"
    choice.began("a", "third", None)
    assert {choice.ranked(REPLICAS, other(number))[0] for number in range(50)} == set(REPLICAS)

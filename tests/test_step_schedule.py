"""The bookkeeping of steps, without a pool."""

import random

import pytest

from ray_merge.step_schedule import Schedule, Step


def chains(n_chains, n_places, back=False):
    """Steps chain by chain: through all places, and back again with the hidden value of the way there."""
    steps = []
    for chain in range(n_chains):
        places = [*range(n_places), *(reversed(range(n_places)) if back else ())]
        for at, place in enumerate(places):
            there = 2 * n_places - 1 - at
            needs = [f"{chain}/{at - 1}"] if at else []
            if at >= n_places and there:
                needs.append(f"{chain}/{there - 1}")
            steps.append(Step(f"{chain}/{at}", chain, place, tuple(needs), str(chain)))
    return steps


def take_any(schedule, n_places, chance):
    ready = [index for place in range(n_places) if (index := schedule.peek(place)) is not None]
    return chance.choice(ready) if ready else None


@pytest.mark.parametrize("seed", range(12))
def test_every_step_ends_once_under_losses_and_interruptions_and_no_value_is_left(seed):
    chance = random.Random(seed)
    steps = chains(4, 3, back=True)
    schedule, flying, new, n_begun = Schedule(steps, 3, in_flight=2), {}, [], 0
    while schedule.left:
        index = take_any(schedule, 3, chance)
        if index is not None and (not flying or chance.random() < 0.6):
            given = schedule.begin(index)
            # A value names its step and how often anything had begun when it was made.
            assert [value[0] for value in given] == list(schedule.needs(index))
            flying[index], n_begun = given, n_begun + 1
            continue
        index = chance.choice(list(flying))
        given = flying.pop(index)
        event = chance.random() if n_begun < 300 else 1.0
        if event < 0.2:
            schedule.give_back(index)
        elif event < 0.4 and given:
            schedule.give_back(index)
            schedule.lost(given[0][0], given[0])
        elif schedule.finish(index, (index, n_begun)):
            new.append(index)
    for index in list(flying):
        schedule.finish(index, None)
    assert sorted(new) == list(range(len(steps)))
    assert schedule._values == {}
    assert n_begun > len(steps)


def test_what_is_lost_is_made_again_from_the_first_step_whose_value_is_gone():
    steps = [*chains(1, 3), Step("late", None, 0, ("0/1", "0/2"))]
    schedule = Schedule(steps, 3, None)
    begun = []

    def do(place):
        index = schedule.peek(place)
        begun.append(steps[index].id)
        return index, schedule.begin(index)

    for place in range(3):
        index, _ = do(place)
        assert schedule.finish(index, [index])
    late, (old, kept) = do(0)
    assert (old, kept) == ([1], [2])
    schedule.give_back(late)
    assert not schedule.lost(1, [1])  # an equal value is not the same
    assert schedule.lost(1, old)
    # Another step with the same old value finds that out later; the value made since then stays.
    index, _ = do(0)
    assert not schedule.finish(index, [0])
    index, _ = do(1)
    assert not schedule.finish(index, [1, "again"])
    assert not schedule.lost(1, old)
    late, given = do(0)
    assert given == [[1, "again"], [2]]
    assert schedule.finish(late, None)
    assert begun == ["0/0", "0/1", "0/2", "late", "0/0", "0/1", "late"]
    assert schedule.left == 0


def test_so_many_chains_are_open_and_steps_of_earlier_ones_go_first():
    schedule = Schedule(chains(5, 2), 2, in_flight=2)
    for expected in (0, 2):
        assert schedule.peek(0) == expected
        schedule.begin(expected)
        schedule.finish(expected, expected)
    assert schedule.peek(0) is None  # two chains are open
    assert schedule.peek(1) == 1
    schedule.begin(1)
    assert schedule.peek(0) is None
    schedule.finish(1, None)
    assert schedule.peek(0) == 4


def test_a_chain_that_needs_one_that_has_not_begun_does_not_wait_for_ever():
    steps = [
        Step("a/0", 0, 0, chain="a"),
        Step("b/0", 0, 0, chain="b"),
        Step("a/1", 0, 0, ("b/0",), "a"),
    ]
    schedule, order = Schedule(steps, 1, in_flight=1), []
    while schedule.left:
        index = schedule.peek(0)
        schedule.begin(index)
        schedule.finish(index, index)
        order.append(steps[index].id)
    assert order == ["a/0", "b/0", "a/1"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Step("a", 0, 0), Step("a", 0, 0)], "step id 'a' stands at positions 0 and 1"),
        ([Step("a", 0, 0, ("b",)), Step("b", 0, 0)], "step 'a' needs 'b', which no step before it makes"),
        ([Step("a", 0, 2)], "step 'a' is for place 2, but the pool has 2"),
    ],
)
def test_a_list_that_cannot_be_run_is_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        Schedule(steps, 2, None)

from collections import Counter
from random import Random

import pytest

from ray_merge.runtime.crew import Job
from ray_merge.runtime.waiting import Held, Waiting


def jobs(*named: str, lost: int = 0) -> list[Job]:
    """`ab7` is unit 7, which reads a and b."""
    return [Job(name, name, lost=lost, data=frozenset(name.rstrip("0123456789"))) for name in named]


def taken(waiting: Waiting, places: str) -> list[str]:
    return [waiting.take(place).id for place in places]


def test_units_without_data_keep_their_order_wherever_they_run():
    waiting = Waiting(jobs("1", "2", "3", "4"), Held())
    assert taken(waiting, "xyyx") == ["1", "2", "3", "4"]
    assert len(waiting) == 0
    with pytest.raises(IndexError, match="no unit waits"):
        waiting.take("x")


def test_one_place_takes_all_in_their_order_when_each_data_is_used_once_begun():
    waiting = Waiting(jobs("a1", "a2", "b1", "b2"), Held())
    assert taken(waiting, "xxxx") == ["a1", "a2", "b1", "b2"]


def test_one_merge_is_finished_before_the_next_one_is_begun_where_all_data_are():
    held = Held()
    for place in "xy":
        held.read(place, frozenset("abc"))
    waiting = Waiting(jobs("a1", "b1", "b2", "b3", "c1", "a2", "c2"), held)
    assert taken(waiting, "xyxxyyx") == ["a1", "a2", "b1", "b2", "b3", "c1", "c2"]


def test_places_divide_the_data_and_help_each_other_at_the_end():
    waiting = Waiting(jobs("a1", "a2", "b1", "b2", "b3", "b4"), Held())
    assert taken(waiting, "xyxy") == ["b1", "a1", "b2", "a2"]  # the longer queue is begun first
    assert taken(waiting, "xy") == ["b3", "b4"]


def test_of_what_is_not_there_the_nearest_is_read():
    held = Held()
    held.read("x", frozenset("ab"))
    waiting = Waiting(jobs("cd1", "bc1", "ab1"), held)
    assert taken(waiting, "xxx") == ["ab1", "bc1", "cd1"]


def test_a_unit_that_reads_part_of_what_is_there_lacks_nothing():
    held = Held()
    held.read("x", frozenset("abc"))
    assert held.lacking("x", frozenset("ac")) == 0
    assert held.lacking("y", frozenset("ac")) == 2
    assert held.places(frozenset("ac")) == 1
    assert held.places(frozenset("ad")) == 0


def test_what_was_read_in_one_run_counts_in_the_next():
    held = Held()
    taken(Waiting(jobs("a0", "b0"), held), "xy")
    waiting = Waiting(jobs("a1", "b1"), held)
    assert taken(waiting, "yx") == ["b1", "a1"]


def test_what_was_put_back_comes_first_in_its_order_and_says_that_it_was_lost():
    waiting = Waiting(jobs("a1", "a2"), Held())
    assert not waiting.has_lost
    waiting.put_back(jobs("b1", "b2", lost=1))
    assert waiting.has_lost
    assert len(waiting) == 4
    assert taken(waiting, "xxx") == ["b1", "b2", "a1"]
    assert not waiting.has_lost


def test_what_a_place_lacks_is_known_as_if_it_were_counted_anew():
    held, draw = Held(), Random(0)
    held.read("w", frozenset("ah"))
    sets = [frozenset(draw.sample("abcdefgh", 3)) for _ in range(12)]
    waiting = Waiting([Job(f"{number}", number, data=draw.choice(sets)) for number in range(60)], held)
    for number in range(60):
        waiting.take("wxyz"[draw.randrange(4)])
        if number % 10 == 9:
            waiting.put_back([Job("again", 0, data=frozenset("h"))])
            waiting.take("x")
        for data in waiting._queues:
            assert waiting._places[data] == held.places(data)
            assert all(held.lacking(place, data) == known[data] for place, known in waiting._lacking.items())
    assert len(waiting) == 0


def test_each_data_is_read_by_few_of_many_places():
    named = [f"{data}{number}" for data in "abcdefgh" for number in range(40)]
    waiting, held = Waiting(jobs(*named), Held()), []
    for turn in range(len(named)):
        place = "wxyz"[turn % 4]
        held.append((place, waiting.take(place).id[0]))
    assert len(waiting) == 0
    assert len(set(held)) <= 12  # of 32 pairs; taken in the recipe's order it would be all 32
    assert Counter(place for place, _ in held) == {place: 80 for place in "wxyz"}

"""Batches over a bounded crew of threads."""

import threading

import pytest

from aici_vllm.recursive.fanout import Crew


class Gauge:
    """The largest number of threads that were inside at once."""

    def __init__(self):
        self.lock, self.inside, self.most = threading.Lock(), set(), 0

    def __enter__(self):
        with self.lock:
            self.inside.add(threading.get_ident())
            self.most = max(self.most, len(self.inside))

    def __exit__(self, *exc_info):
        with self.lock:
            self.inside.discard(threading.get_ident())


def test_results_keep_the_order_of_the_items():
    assert Crew().map(lambda n: n * n, range(100), 8) == [n * n for n in range(100)]
    assert Crew().map(str, [], 8) == []


def test_width_workers_are_really_at_work_together():
    barrier = threading.Barrier(8, timeout=20)
    Crew().map(lambda _: barrier.wait(), range(8), 8)


def test_one_worker_is_the_caller():
    assert Crew().map(lambda _: threading.current_thread(), range(3), 1) == [threading.current_thread()] * 3


def test_ten_thousand_items_use_no_more_threads_than_the_width():
    gauge, threads = Gauge(), set()

    def item(n):
        with gauge:
            threads.add(threading.get_ident())
        return n

    assert Crew().map(item, range(10_000), 8) == list(range(10_000))
    assert gauge.most <= 8 and len(threads) <= 8


@pytest.mark.parametrize("width", [1, 2, 5])
def test_nested_batches_stay_within_the_width_and_do_not_deadlock(width):
    crew, gauge = Crew(), Gauge()

    def tree(depth):
        if depth == 0:
            with gauge:
                return 1
        return sum(crew.map(tree, [depth - 1] * 5, width))

    assert tree(4) == 5**4
    assert gauge.most <= width


def test_free_helpers_join_a_batch_that_is_already_running():
    crew = Crew()
    together = threading.Barrier(2, timeout=20)

    def outer(kind):
        if kind == "short":
            return
        crew.map(lambda _: together.wait(), range(2), 2)

    crew.map(outer, ["short", "long"], 2)


def test_an_error_comes_out_after_all_items_are_done():
    done = []

    def item(n):
        if n == 1:
            raise ValueError("item 1")
        done.append(n)

    with pytest.raises(ValueError, match="item 1"):
        Crew().map(item, range(6), 3)
    assert sorted(done) == [0, 2, 3, 4, 5]


def test_a_width_below_one_is_refused():
    with pytest.raises(ValueError, match="max_batch_workers"):
        Crew().map(str, [1], 0)

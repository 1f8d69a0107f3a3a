import threading

from shardserve.agent.lifetime import Lifetime
from shardserve.wire.messages import Generation


def test_actions_are_called_once_in_order_by_the_thread_that_ends_it():
    lifetime = Lifetime(Generation(1, 2))
    called = []
    for i in range(3):
        lifetime.on_end(lambda i=i: called.append((i, lifetime.ended, threading.current_thread().name)))
    assert not lifetime.ended
    thread = threading.Thread(target=lifetime.end, name="reader")
    thread.start()
    thread.join()
    lifetime.end()
    assert called == [(i, True, "reader") for i in range(3)]


def test_an_action_that_comes_after_the_end_is_called_at_once():
    lifetime = Lifetime(Generation(1, 2))
    lifetime.end()
    called = []
    lifetime.on_end(lambda: called.append(1))
    assert called == [1]


def test_no_action_is_forgotten_or_called_twice_while_it_ends():
    for _ in range(200):
        lifetime = Lifetime(Generation(1, 2))
        called = []
        begin = threading.Barrier(3)

        def add(lifetime=lifetime, called=called, begin=begin):
            begin.wait()
            for i in range(20):
                lifetime.on_end(lambda i=i: called.append(i))

        def end(lifetime=lifetime, begin=begin):
            begin.wait()
            lifetime.end()

        threads = [threading.Thread(target=target) for target in (add, end, end)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(called) == list(range(20))

import threading

import pytest

from shardserve.agent.lifetime import Lifetime
from shardserve.agent.rendezvous import WorkerStore
from shardserve.wire.messages import Generation, group


def test_other_threads_take_no_answers():
    lifetime, sent, raised = Lifetime(Generation(1, 1)), [], []

    def answer(call):
        sent.append(call)
        lifetime.answer(group.StoreReply(call.generation, call.call, b"value"))

    store = WorkerStore(answer, lifetime, "stage0/", 10.0)
    assert store.get("key") == b"value"

    def call():
        with pytest.raises(RuntimeError, match="get of key: this store is for forming a group") as caught:
            store.get("key")
        raised.append(caught)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert raised
    assert [(each.operation, each.keys) for each in sent] == [("get", ("stage0/key",))]

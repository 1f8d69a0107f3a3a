"""kill -9 of every process but the ranks, under load: what must go on goes on, within some seconds."""

import os
import signal

from load import SECONDS_TO_RECOVER, Load

# By a fork server: 1.3 to 4 s, and more on a machine that others use, too.
SECONDS_TO_IMPORT_TORCH = 20


def test_the_worker(transformer, up):
    """Main keeps the requests, the agents their weights."""
    before = up.pids()
    (worker,) = up.of("shardserve.worker")
    with Load(up, transformer.model) as load:
        os.kill(worker, signal.SIGKILL)
        assert load.wait(1) < SECONDS_TO_RECOVER
        load.wait(20)
        assert up.pids() == before
        assert up.of("shardserve.worker") != [worker]


def test_main(transformer, up):
    """Connections end with it; clients that call again are answered."""
    before = up.pids()
    (main,) = up.of("shardserve.main")
    with Load(up, transformer.model, allowed_errors=("UNAVAILABLE",)) as load:
        os.kill(main, signal.SIGKILL)
        assert load.wait(1) < SECONDS_TO_RECOVER
        load.wait(20)
        assert up.pids() == before


def test_the_fork_server(transformer, up):
    """Its agents die with it; another one forks them anew."""
    before = up.pids()
    with Load(up, transformer.model) as load:
        os.kill(up.fork_server(), signal.SIGKILL)
        assert load.wait(1) < SECONDS_TO_IMPORT_TORCH + SECONDS_TO_RECOVER
        load.wait(20)
        assert not set(up.pids()) & set(before)


def test_the_fork_server_while_it_forks(transformer, up):
    """All ranks die at once, and the fork server with them, before it could fork any of them anew."""
    with Load(up, transformer.model, clients=2) as load:
        for _ in range(2):
            agents, server = up.pids(), up.fork_server()
            # Else it would fork the first one anew before the last one is dead.
            os.kill(server, signal.SIGSTOP)
            for pid in (*agents, server):
                os.kill(pid, signal.SIGKILL)
            assert load.wait(1) < SECONDS_TO_IMPORT_TORCH + SECONDS_TO_RECOVER
            load.wait(5)


def test_every_process_in_turn(transformer, up):
    agents = up.pids()
    victims = [*agents, up.fork_server(), *up.of("shardserve.worker"), *up.of("shardserve.main")]
    with Load(up, transformer.model, clients=2, allowed_errors=("UNAVAILABLE",)) as load:
        for pid in victims:
            # One of the fork server's deaths may have taken this agent already.
            if pid in up.alive():
                os.kill(pid, signal.SIGKILL)
                load.wait(2)

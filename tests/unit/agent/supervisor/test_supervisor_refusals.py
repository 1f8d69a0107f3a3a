"""Starts that fail: the supervisor ends by itself with the error."""

import json
import os
import re
import socket

import psutil
import pytest
from asynchronous import asynchronous

from shardserve.errors import ConfigError, JoinRefused, ShardError, StartError
from shardserve.wire.messages import group

from ..scripted import HOST, Host, ScriptedWorker
from ..shards import write_shards

pytestmark = pytest.mark.usefixtures("nothing_left")


async def fails(host, kind, said):
    """The supervisor ends by itself with this error, and with all that it had started."""
    await host.life
    with pytest.raises(kind) as caught:
        host.ready.result()
    assert str(caught.value) == said
    assert host.supervisor._agents._fork_server is None or not psutil.pid_exists(
        host.supervisor._agents._fork_server.pid
    )


@asynchronous
async def test_files_that_are_missing(tmp_path, ports):
    models = write_shards(tmp_path)
    os.unlink(models[1])
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1]) as host:
        await worker.supervisor(0, 1)
        await fails(host, ConfigError, f"model_files: rank 1: there is no file {models[1]}")
    models = write_shards(tmp_path / "next")
    config = tmp_path / "next" / "device0" / "group_config.json"
    config.unlink()
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1]) as host:
        await worker.supervisor(0, 1)
        await fails(host, ShardError, f"{config}: No such file or directory")


@asynchronous
async def test_weights_that_only_the_agent_can_miss(tmp_path, ports):
    models = write_shards(tmp_path)
    weights = tmp_path / "device1" / "weights.safetensors"
    weights.unlink()
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1]) as host:
        supervisor = await worker.supervisor(0, 1)
        await fails(host, ShardError, f"{weights}: No such file or directory")
        given_up = await supervisor.next(group.GaveUp)
        assert given_up == group.GaveUp(1, f"{weights}: No such file or directory")


@asynchronous
async def test_shard_of_another_device(tmp_path, ports):
    models = write_shards(tmp_path)
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models[::-1], ports[1]) as host:
        await worker.supervisor(0, 1)
        config = tmp_path / "device1" / "group_config.json"
        await fails(host, ConfigError, f"{config}: is the config of device1; rank 0 needs that of device0")


@asynchronous
async def test_port_in_use(tmp_path, ports):
    models = write_shards(tmp_path, 1, 2)
    with socket.socket() as busy:
        # Only agents that a previous pipeline stage connects to listen.
        busy.bind((HOST, ports[1] + 1))
        busy.listen()
        async with ScriptedWorker(ports[0], 2, 2) as worker, Host(ports[0], models, ports[1]) as host:
            await worker.supervisor(0, 1)
            said = f"rank 1: agent_start_port gives it {HOST}:{ports[1] + 1}: the port is in use"
            await fails(host, StartError, said)


@asynchronous
async def test_what_the_worker_refuses(tmp_path, ports):
    models = write_shards(tmp_path)
    async with (
        ScriptedWorker(ports[0], 2, hosts=("192.0.2.1", HOST)) as worker,
        Host(ports[0], models, ports[1]) as host,
    ):
        supervisor, enlist = await worker.introduced()
        # Of the roster, only what is this host's.
        assert enlist == group.Enlist((HOST,), None, None, 2)
        supervisor.send(group.Refuse("ConfigError", "2 model_files for 4 ranks"))
        await fails(host, ConfigError, "2 model_files for 4 ranks")
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1]) as host:
        await worker.supervisor(0, 1)
        agent = await worker.arrived.get()
        agent.send(group.Refuse("JoinRefused", "rank 0 is already there"))
        await fails(host, JoinRefused, "rank 0 is already there")


@asynchronous
async def test_torch_that_takes_too_long_to_import_each_time(tmp_path, ports, caplog):
    """Within no window: each try takes longer than that."""
    models = write_shards(tmp_path, 1)
    limits = {"start_timeout": 0.1, "restart_window": 0.01, "max_restarts": 1}
    async with ScriptedWorker(ports[0], 1) as worker, Host(ports[0], models, ports[1], **limits) as host:
        first = await host.fork_server()
        await worker.supervisor(0)
        await host.life
    advice = "if torch takes longer to import, raise SHARDSERVE_START_TIMEOUT"
    ending = f"did not answer within 0.1 s (start_timeout) and was killed; {advice}"
    assert f"servable 'net' version 1: the fork server (pid {first.pid}) {ending}; starting another" in caplog.messages
    with pytest.raises(StartError, match=rf"^the fork server \(pid \d+\) could not start: it {re.escape(ending)}$"):
        host.ready.result()


@asynchronous
async def test_a_config_that_is_damaged(tmp_path, ports):
    models = write_shards(tmp_path)
    config = tmp_path / "device0" / "group_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "stage_size": 0}))
    async with ScriptedWorker(ports[0], 2) as worker, Host(ports[0], models, ports[1]) as host:
        await worker.supervisor(0, 1)
        await host.life
        with pytest.raises(ShardError, match=rf"^{config}: "):
            host.ready.result()

import pytest
from asynchronous import asynchronous

from shardserve.errors import ConfigError, JoinRefused, ShardError, Unavailable
from shardserve.servable import add_stage, declare_distributed, declaring, register_method
from shardserve.settings import Settings
from shardserve.wire.messages import group
from shardserve.worker.group import ReplicaGroup
from shardserve.worker.rank_table import RankEntry, RankTable
from shardserve.worker.registry import Registry

from .harness import Owner, Stream


def servable(rank_size=2, stage_size=1, inputs=1, outputs=1):
    with declaring("net") as declared:
        model = declare_distributed(rank_size, stage_size)

        def predict(a, b):
            return add_stage(model, *(a, b)[:inputs], outputs_count=outputs)

        register_method([f"y{i}" for i in range(outputs)])(predict)
    return declared


def config(rank, rank_size=2, stage_size=1, export_id="e1"):
    tensor = {"name": "x", "dtype": "float32", "shape": ["batch", 3]}
    return {
        "format_version": 1,
        "export_id": export_id,
        "name": "net",
        "rank_size": rank_size,
        "stage_size": stage_size,
        "rank": rank,
        "signature": {"dims": {"batch": {"min": 1, "max": 4}}, "inputs": [tensor], "outputs": [tensor]},
        "receives": [tensor],
        "sends": [tensor],
        "graph_file": "net.graph.json",
        "graph_sha256": "0" * 64,
        "weights_file": "weights.safetensors",
        "weights_sha256": "0" * 64,
        "parameter_bytes": 0,
    }


class Setting:
    """Two replicas of two ranks, a replica on each of two hosts."""

    def __init__(self, declared=None):
        declared = declared or servable()
        size = declared.model.rank_size
        table = RankTable(tuple(RankEntry(r, "ab"[r // 2], str(r % 2)) for r in range(4)))
        self.owner = Owner()
        self.groups = [ReplicaGroup(r, size, 1, 2, self.owner, Settings()) for r in range(4 // size)]
        self.models = []
        self.registry = Registry(declared, 3, table, self.groups, self.models.append)

    def register(self, rank, shard=None, device="cpu", pid=None, by="somebody"):
        """by: the name of the agent's supervisor."""
        stream = Stream()
        shards = [shard or config(rank % 2)]
        message = group.Register(rank, pid or 100 + rank, by, device, 0, f"a:{7000 + rank}", shards)
        return stream, self.registry.register(stream, message, 7)

    def supervisor(self, pid=50, name=None):
        stream = Stream()
        return stream, self.registry.introduce(stream, group.Introduce(pid, name or f"of {pid}"))

    def enlist(self, hosts=(), count=2, agent_ip=None, rank_start=None, pid=50, name=None):
        stream, host = self.supervisor(pid, name)
        self.registry.enlist(host, group.Enlist(tuple(hosts), agent_ip, rank_start, count))
        return stream, host


@asynchronous
async def test_an_agent_joins_its_group():
    s = Setting()
    stream, (joined, agent) = s.register(3, device="cpu")
    assert stream.sent == [group.Registered(7)]
    assert joined is s.groups[1]
    assert (agent.rank, agent.local, agent.stage, agent.host, agent.pid) == (3, 1, 0, "b", 103)
    assert s.registry.agent(3) is agent
    assert s.registry.missing == [0, 1, 2]
    assert [model.inputs[0].name for models in s.models for model in models] == ["x"]
    s.register(2)
    assert len(s.models) == 1


@pytest.mark.parametrize(
    ("rank", "shard", "kind", "said"),
    [
        (4, None, JoinRefused, "rank 4: the rank table has ranks 0 to 3"),
        (-1, None, JoinRefused, "rank -1: the rank table has ranks 0 to 3"),
        (0, None, Unavailable, r"rank 0: is already there \(pid 100 on a\)"),
        (
            1,
            config(1, rank_size=4),
            ShardError,
            "rank 1: its shard is of rank_size=4, stage_size=1; servable 'net' declares 2, 1",
        ),
        (
            1,
            config(1, stage_size=2),
            ShardError,
            "rank 1: its shard is of rank_size=2, stage_size=2; servable 'net' declares 2, 1",
        ),
        (1, config(0), ShardError, "rank 1: needs the shard device1, was given device0"),
        (2, config(1), ShardError, "rank 2: needs the shard device0, was given device1"),
        (1, config(1, export_id="e2"), ShardError, "rank 1: its shard is of export e2, that of rank 0 of export e1"),
        (1, {"format_version": 9}, ShardError, "rank 1: group config: format_version is 9; this release reads 1 and 2"),
        (1, {**config(1), "rank": "1"}, ShardError, "rank 1: group config: Expected `int`, got `str`"),
        (
            1,
            {**config(1), "state": [{"name": "cache", "dtype": "float32", "shape": [2]}]},
            ShardError,
            r"rank 1: its shard keeps buffers between steps \(cache\), .* servable 'net' has to declare stateful=True",
        ),
    ],
)
@asynchronous
async def test_agent_that_does_not_fit(rank, shard, kind, said):
    s = Setting()
    s.register(0)
    with pytest.raises(kind, match=rf"^{said}"):
        s.register(rank, shard, pid=7, by="another")
    assert s.registry.missing == [1, 2, 3]


@asynchronous
async def test_what_does_not_fit_is_said_beside_the_lowest_rank_whoever_came_first():
    s = Setting()
    s.register(1)
    s.register(0)
    with pytest.raises(ShardError, match=r"^rank 2: its shard is of export e2, that of rank 0 of export e1"):
        s.register(2, config(0, export_id="e2"))


@asynchronous
async def test_an_agent_or_supervisor_that_comes_again_before_its_old_connection_ended_replaces_it():
    s = Setting()
    first, _ = s.register(0)
    second, (replica, agent) = s.register(0)
    assert first.aborted
    assert not second.aborted
    assert replica.agents[0] is agent
    _, host = s.enlist(("b",), pid=51)
    _, again = s.enlist(("b",), pid=51)
    assert host.stream.aborted
    assert not host.ranks
    assert again.ranks


@asynchronous
async def test_an_agent_that_its_supervisor_forked_anew_replaces_the_dead_one_whose_connection_has_not_ended():
    s = Setting()
    first, (replica, _) = s.register(0, pid=100, by="a supervisor")
    second, (_, agent) = s.register(0, pid=101, by="a supervisor")
    assert first.aborted
    assert not second.aborted
    assert replica.agents[0] is agent


@asynchronous
async def test_agents_of_the_supervisor_that_keeps_the_ranks_now_replace_those_of_one_that_is_gone():
    s = Setting()
    first, _ = s.register(0, by="gone")
    _, host = s.enlist(("a",), name="came later")
    with pytest.raises(Unavailable, match="rank 0: is already there"):
        s.register(0, pid=7, by="a stranger")
    assert not first.aborted
    _, (replica, agent) = s.register(0, pid=8, by="came later")
    assert first.aborted
    assert replica.agents[0] is agent
    assert host.ranks == (0, 1)


@asynchronous
async def test_supervisors_of_two_containers_may_have_the_same_pid():
    s = Setting()
    s.enlist(("a",), pid=1, name="one")
    with pytest.raises(JoinRefused, match=r"rank 0 is already kept by another startup_agents \(pid 1\)"):
        s.enlist(("a",), pid=1, name="two")


@asynchronous
async def test_agent_without_a_shard():
    s = Setting()
    with pytest.raises(ShardError, match=r"rank 0: brings no group config"):
        s.registry.register(Stream(), group.Register(0, 1, "s", "cpu", 0, "a:1", []), 7)


@asynchronous
async def test_all_ranks_run_on_the_same_kind_of_device():
    s = Setting()
    s.register(0, device="cuda:0")
    s.register(1, device="cuda:1")
    with pytest.raises(JoinRefused, match=r"rank 2: runs on cpu, rank 0 on cuda:0; all ranks run on the same kind"):
        s.register(2, device="cpu")


@asynchronous
async def test_another_export_may_come_when_all_agents_have_gone(caplog):
    s = Setting()
    _, (joined, agent) = s.register(0)
    joined.lost(agent)
    _, (joined, agent) = s.register(0)
    joined.lost(agent)
    assert not caplog.messages
    s.register(0, config(0, export_id="e2"))
    assert len(s.models) == 3
    assert caplog.messages == ["the export changed from e1, whose agents have all left, to e2"]
    with pytest.raises(ShardError, match=r"rank 1: its shard is of export e1, that of rank 0 of export e2"):
        s.register(1, config(1, export_id="e1"))


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"inputs": 2}, "method 'predict' gives the model 2 inputs; its shards take 1"),
        ({"outputs": 2}, "method 'predict': outputs_count=2; the model's shards give 1"),
    ],
)
@asynchronous
async def test_methods_that_do_not_fit_the_shards(declared, said):
    s = Setting(servable(**declared))
    with pytest.raises(ConfigError, match=said):
        s.register(0)
    assert s.models == []
    assert s.registry.missing == [0, 1, 2, 3]


@asynchronous
async def test_a_host_is_told_its_ranks_and_when_they_are_there():
    s = Setting()
    stream, host = s.supervisor()
    assert stream.sent == [group.Roster(("a", "b"))]
    s.registry.enlist(host, group.Enlist(("b",), None, None, 2))
    assert stream.sent[1:] == [group.Enlisted((2, 3), ("0", "1"), "b", 2, 1, "net", 3), group.HostWaits((2, 3))]
    s.register(2, by="of 50")
    s.register(0)
    assert stream.sent[3:] == [group.HostWaits((3,))]
    assert stream.take(group.HostReady) == []
    s.register(3, by="of 50")
    assert stream.take(group.HostReady) == [group.HostReady()]
    s.register(1)
    assert len(stream.take(group.HostReady)) == 1


@asynchronous
async def test_a_supervisor_that_comes_back_finds_its_agents_there():
    s = Setting()
    for rank in range(4):
        s.register(rank, by="of 50")
    stream, _ = s.enlist(("a", "b"), count=4)
    assert stream.sent[1:] == [
        group.Enlisted((0, 1, 2, 3), ("0", "1", "0", "1"), "a", 2, 1, "net", 3),
        group.HostReady(),
    ]


@asynchronous
async def test_agents_that_another_supervisor_has_left_behind_are_not_the_next_one_s():
    """Their connections may end after the next supervisor has come: it isn't ready by them."""
    s = Setting()
    for rank in (2, 3):
        s.register(rank, by="of 50")
    stream, _ = s.enlist(("b",), pid=51)
    assert stream.sent[2:] == [group.HostWaits((2, 3))]
    s.register(2, by="of 51")
    s.register(3, by="of 51")
    assert stream.sent[3:] == [group.HostWaits((3,)), group.HostReady()]


@asynchronous
async def test_a_host_that_the_table_does_not_know_says_who_it_is():
    s = Setting()
    stream, host = s.enlist((), agent_ip="10.9.9.9", rank_start=2)
    assert stream.sent[1:] == [group.Enlisted((2, 3), ("0", "1"), "10.9.9.9", 2, 1, "net", 3), group.HostWaits((2, 3))]
    assert host.ranks == (2, 3)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        (
            {"hosts": ()},
            ConfigError,
            r"none of the rank table's hosts \(a, b\) is an address of this host; give agent_ip and rank_start",
        ),
        (
            {"hosts": ("a",), "count": 3},
            ConfigError,
            "3 model_files for 2 ranks: the rank table gives this host rank 0, 1",
        ),
        (
            {"agent_ip": "c", "rank_start": 2, "count": 4},
            ConfigError,
            "4 model_files for 2 ranks: the rank table gives this host rank 2, 3",
        ),
        ({"agent_ip": "c", "rank_start": 4}, ConfigError, "rank_start=4: the rank table has ranks 0 to 3"),
        ({"agent_ip": "c", "rank_start": -1}, ConfigError, "rank_start=-1: the rank table has ranks 0 to 3"),
        (
            {"agent_ip": "c", "rank_start": 3},
            ConfigError,
            "rank_start=3: the rank table has rank 3 on host b, whose first rank is 2",
        ),
    ],
)
@asynchronous
async def test_host_that_does_not_fit(given, kind, said):
    with pytest.raises(kind, match=rf"^{said}"):
        Setting().enlist(**given)


@asynchronous
async def test_two_supervisors_of_one_rank():
    s = Setting()
    s.enlist(("a",), pid=50)
    s.enlist(("b",), pid=51)
    with pytest.raises(JoinRefused, match=r"rank 2 is already kept by another startup_agents \(pid 51\)"):
        s.enlist(("b",), pid=52)


@asynchronous
async def test_kill_goes_to_the_ranks_supervisor():
    s = Setting()
    mine, _ = s.enlist(("a",), pid=50)
    other, _ = s.enlist(("b",), pid=51)
    stream, (_, agent) = s.register(1)
    s.registry.kill(agent, "did not leave")
    assert mine.take(group.Kill) == [group.Kill(1, 101, "did not leave")]
    assert other.take(group.Kill) == []
    assert stream.aborted


@asynchronous
async def test_kill_is_said_again_to_a_supervisor_that_comes_back():
    """It may have lost its connection before it read the first; an agent that hangs would stay for ever."""
    s = Setting()
    _, (_, agent) = s.register(1, by="of 50")
    s.register(0, by="of 50")
    s.registry.kill(agent, "did not leave")
    another, _ = s.enlist(("b",), pid=51)
    assert another.take(group.Kill) == []
    stream, _ = s.enlist(("a",))
    assert stream.take(group.Kill) == [group.Kill(1, 101, "did not leave")]
    s.register(1, pid=102, by="of 50")
    stream, _ = s.enlist(("a",))
    assert stream.take(group.Kill) == []


@asynchronous
async def test_the_ranks_have_the_same_subgraphs():
    s = Setting()

    def register(rank, *exports):
        shards = [config(rank % 2, export_id=export) for export in exports]
        message = group.Register(rank, 100 + rank, "s", "cpu", 0, f"a:{7000 + rank}", shards)
        return s.registry.register(Stream(), message, 7)

    register(0, "e1", "e2")
    assert [len(signatures) for signatures in s.models] == [2]
    with pytest.raises(ShardError, match="rank 1: brings 1 subgraphs, rank 0 brought 2"):
        register(1, "e1")
    with pytest.raises(ShardError, match="rank 1, subgraph 1: its shard is of export e1, that of rank 0 of export e2"):
        register(1, "e1", "e1")
    register(1, "e1", "e2")


@asynchronous
async def test_agents_of_a_servable_that_is_not_distributed_are_told_what_to_load():
    s = Setting()
    s.registry._model_files = ("/m/net.graph.json",)
    stream, _ = s.enlist(hosts=["a"], count=0)
    assert stream.take(group.Enlisted)[0].model_files == ("/m/net.graph.json",)
    with pytest.raises(ConfigError, match="'net' is not distributed: start_servables starts its agents"):
        s.enlist(hosts=["b"], count=2, pid=51)

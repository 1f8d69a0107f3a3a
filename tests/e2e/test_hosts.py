"""Main and Worker on one host, agents on two others: secrets, certificates, deaths, and a host that is cut off."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from certificates import Authority
from hosts import Hosts, OnHosts, need_hosts
from serving import EXAMPLES, token_ids, transformer_instances, transformer_reference

TOLERANCE = 1e-5
SECONDS_TO_RECOVER = 20
# Which ranks of the 2 pipeline stages of 2 ranks are on the hosts 1 and 2.
PIPELINE = {1: [0, 1], 2: [2, 3]}
TENSOR_PARALLEL = {1: [0, 2], 2: [1, 3]}


@pytest.fixture(scope="module")
def hosts():
    need_hosts()
    with Hosts(3) as hosts:
        yield hosts


class Scene:
    """The example transformer on those hosts."""

    def __init__(self, hosts, transformer, folder):
        self.hosts, self.folder = hosts, folder
        self.model, self.model_dir = transformer.model, transformer.model_dir
        self.ids = token_ids(3, 9, seed=5)
        self.expected = transformer_reference(self.model, self.ids)
        self.secret = self.write_secret("secret", "a long and random secret")

    def write_secret(self, name, text):
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o600)
        return path

    def table(self, layout, addresses=None):
        """addresses: those in the table, where they aren't the hosts' own."""
        servers = [
            {
                "server_id": (addresses or {}).get(host) or self.hosts.address(host),
                "host_nic_ip": "reserve",
                "device": [
                    {"device_id": str(i), "device_ip": "0.0.0.0", "rank_id": str(rank)} for i, rank in enumerate(ranks)
                ],
            }
            for host, ranks in layout.items()
        ]
        path = self.folder / "ranks.json"
        path.write_text(json.dumps({"server_count": str(len(servers)), "server_list": servers}))
        return path

    def files(self, ranks):
        return [self.model_dir / f"device{rank}" / "transformer.graph.json" for rank in ranks]

    def start(self, on_hosts, layout, options, addresses=None, only=None):
        """Server and agents; options: for each host. They are ready when it returns. Or `only` some hosts' agents."""
        started = []
        if only is None:
            started.append(on_hosts.serve(EXAMPLES / "transformer", self.table(layout, addresses), *options(0)))
        for host, ranks in layout.items():
            if only is None or host in only:
                started.append(on_hosts.agents(host, self.files(ranks), *options(host)))
        on_hosts.wait_ready(*started)

    def check(self, client, timeout=60):
        for result, logits in zip(
            client.infer(transformer_instances(self.ids), timeout=timeout), self.expected, strict=True
        ):
            np.testing.assert_allclose(result["logits"], logits, atol=TOLERANCE)


@pytest.fixture
def scene(hosts, transformer, tmp_path):
    return Scene(hosts, transformer, tmp_path)


def stop(on_hosts):
    """The server's end ends the agents on the other hosts."""
    for process in on_hosts.started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            break
    for process in on_hosts.started:
        process.wait(60)
    on_hosts.wait_all_ended(20)


def refused(on_hosts, scene, host, ranks, *options, code=1):
    """What agents write that can't join."""
    process = on_hosts.agents(host, scene.files(ranks), *options)
    assert process.wait(90) == code
    output = on_hosts.log(on_hosts.started.index(process)).read_text()
    assert "Traceback" not in output
    return output


@pytest.mark.parametrize("layout", [PIPELINE, TENSOR_PARALLEL], ids=["pipeline", "tensor parallel"])
def test_a_join_secret_and_a_rank_that_is_killed_on_another_host(scene, layout, tmp_path):
    with OnHosts(scene.hosts, tmp_path / "run") as on_hosts:
        scene.start(on_hosts, layout, lambda host: ("--join-secret-file", scene.secret))
        with on_hosts.client("transformer", raise_errors=True) as client:
            scene.check(client)
            for rank in (layout[2][0], layout[1][1]):
                before = on_hosts.pids()
                os.kill(before[rank], signal.SIGKILL)
                scene.check(client, SECONDS_TO_RECOVER)
                assert on_hosts.pids()[rank] != before[rank]
        stop(on_hosts)


def test_agents_with_a_wrong_secret_or_none_are_refused_and_right_ones_are_taken_afterwards(scene, tmp_path):
    right = ("--join-secret-file", scene.secret)
    with OnHosts(scene.hosts, tmp_path / "run") as on_hosts:
        server = on_hosts.serve(EXAMPLES / "transformer", scene.table(PIPELINE), *right)
        wrong = scene.write_secret("wrong", "another secret")
        address = on_hosts.distributed
        output = refused(on_hosts, scene, 1, PIPELINE[1], "--join-secret-file", wrong)
        assert f"the Worker at {address}: wrong join secret" in output
        on_hosts.wait_in_log(0, f"refused {scene.hosts.address(1)}:")
        on_hosts.wait_in_log(0, "wrong join secret")
        output = refused(on_hosts, scene, 1, PIPELINE[1], "--insecure")
        assert "came without a join secret: give join_secret_file" in output
        on_hosts.wait_in_log(0, "came without a join secret")
        output = refused(on_hosts, scene, 1, PIPELINE[1], code=2)
        assert f"--distributed-address: {scene.hosts.address(0)} can be reached from other hosts" in output
        assert "--join-secret-file" in output
        scene.start(on_hosts, PIPELINE, lambda host: right, only=(1, 2))
        on_hosts.wait_ready(server)
        with on_hosts.client("transformer", raise_errors=True) as client:
            scene.check(client)
        stop(on_hosts)


def test_mutual_tls(scene, tmp_path):
    authority, stranger = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")

    def options(host, issuer=authority, trusted=authority):
        certificate, key = issuer.certificate(f"host{host}", scene.hosts.address(host))
        files = ("--certificate", certificate, "--private-key", key, "--custom-ca", trusted.custom_ca)
        return (*files, "--verify-client")

    with OnHosts(scene.hosts, tmp_path / "run") as on_hosts:
        server = on_hosts.serve(EXAMPLES / "transformer", scene.table(PIPELINE), *options(0))
        # The Worker's certificate is of no CA that this agent trusts.
        output = refused(on_hosts, scene, 1, PIPELINE[1], *options(1, trusted=stranger))
        assert f"the Worker at {on_hosts.distributed}: TLS: self-signed certificate in certificate chain" in output or (
            f"the Worker at {on_hosts.distributed}: TLS: unable to get local issuer certificate" in output
        )
        on_hosts.wait_in_log(0, "alert unknown ca")
        # This agent's own is of no CA that the Worker trusts.
        output = refused(on_hosts, scene, 1, PIPELINE[1], *options(1, issuer=stranger))
        assert "TLS: tlsv1 alert unknown ca" in output
        on_hosts.wait_in_log(0, "TLS: unable to get local issuer certificate")
        output = refused(on_hosts, scene, 1, PIPELINE[1], "--insecure")
        assert "came without TLS: give ssl_config" in output
        # A join secret in its place.
        output = refused(on_hosts, scene, 1, PIPELINE[1], "--join-secret-file", scene.secret)
        assert "came without TLS: give ssl_config" in output
        scene.start(on_hosts, PIPELINE, options, only=(1, 2))
        on_hosts.wait_ready(server)
        with on_hosts.client("transformer", raise_errors=True) as client:
            scene.check(client)
            os.kill(on_hosts.pids()[3], signal.SIGKILL)
            scene.check(client, SECONDS_TO_RECOVER)
        stop(on_hosts)


def test_agents_behind_an_address_that_the_table_does_not_know(scene, tmp_path):
    secret = ("--join-secret-file", scene.secret)

    def options(host):
        if host != 2:
            return secret
        return (*secret, "--agent-ip", scene.hosts.address(2), "--rank-start", 2)

    with OnHosts(scene.hosts, tmp_path / "run") as on_hosts:
        scene.start(on_hosts, PIPELINE, options, addresses={2: "192.0.2.7"})
        with on_hosts.client("transformer", raise_errors=True) as client:
            scene.check(client)
        stop(on_hosts)


def test_on_one_host_nothing_listens_beyond_loopback_whatever_the_table_calls_the_host(scene, tmp_path):
    with OnHosts(scene.hosts, tmp_path / "run") as on_hosts:
        on_hosts.distributed = "127.0.0.1:6200"
        scene.start(on_hosts, {0: [0, 1, 2, 3]}, lambda host: ())
        with on_hosts.client("transformer", raise_errors=True) as client:
            scene.check(client)
        lines = Path(f"/proc/{on_hosts.started[0].pid}/net/tcp").read_text().splitlines()[1:]
        listening = [fields[1] for fields in map(str.split, lines) if fields[3] == "0A"]
        assert listening
        # 127.0.0.1, as the kernel writes it on a little-endian machine.
        assert {address.partition(":")[0] for address in listening} == {"0100007F"}
        stop(on_hosts)


@pytest.mark.parametrize("layout", [PIPELINE, TENSOR_PARALLEL], ids=["pipeline", "tensor parallel"])
def test_a_host_that_is_cut_off_and_comes_back(scene, layout, tmp_path):
    with OnHosts(scene.hosts, tmp_path / "run", SHARDSERVE_PEER_TIMEOUT="2") as on_hosts:
        scene.start(on_hosts, layout, lambda host: ("--join-secret-file", scene.secret))
        with on_hosts.client("transformer", raise_errors=True) as client:
            scene.check(client)
            scene.hosts.cut(2)
            try:
                pending = client.infer_async(transformer_instances(scene.ids), timeout=60)
                on_hosts.wait_in_log(0, "is gone")
                on_hosts.wait_in_log(0, f", {scene.hosts.address(2)}:")
                on_hosts.wait_in_log(0, "): its connection is lost: ")
                # Main is told in the same moment, but by another way than the log.
                deadline = time.monotonic() + 60
                while on_hosts.replica()["state"] == "serving":
                    assert time.monotonic() < deadline
            finally:
                scene.hosts.mend(2)
            for result, logits in zip(pending.result(), scene.expected, strict=True):
                np.testing.assert_allclose(result["logits"], logits, atol=TOLERANCE)
            scene.check(client)
        stop(on_hosts)

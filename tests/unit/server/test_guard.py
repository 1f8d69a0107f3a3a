"""What start_servable and startup_agents refuse before anything is started."""

import pytest

from shardserve.errors import ConfigError, StartError
from shardserve.server import SSLConfig, distributed

SENTENCE = (
    "^distributed_address 192.0.2.1 can be reached from other hosts: give join_secret_file or ssl_config, or "
    "insecure=True if whoever reaches it may join$"
)


def start_servable(**options):
    distributed.begin_servable("d", "n", "ranks.json", distributed_address="192.0.2.1:6200", **options)


def startup_agents(**options):
    distributed.begin_agents("192.0.2.1:6200", ["no.graph.json"], **options)


@pytest.fixture(params=[start_servable, startup_agents])
def start(request, monkeypatch):
    monkeypatch.delenv("SHARDSERVE_JOIN_SECRET_FILE", raising=False)
    return request.param


def test_beyond_loopback_without_secret_or_tls(start):
    with pytest.raises(ConfigError, match=SENTENCE):
        start()


def test_the_secret_file_of_the_environment(start, monkeypatch, tmp_path):
    monkeypatch.setenv("SHARDSERVE_JOIN_SECRET_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=rf"^join_secret_file {tmp_path}/none: No such file or directory$"):
        start()
    empty = tmp_path / "empty"
    empty.touch(0o600)
    with pytest.raises(ConfigError, match=rf"^join_secret_file {empty}: is empty$"):
        start(join_secret_file=str(empty))


def test_tls_files_that_are_not_there(start, tmp_path):
    with pytest.raises(StartError, match=rf"^TLS file {tmp_path}/cert.pem: No such file or directory$"):
        start(ssl_config=SSLConfig(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")))


def test_an_agent_ip_of_another_host():
    with pytest.raises(ConfigError, match=r"^agent_ip='192.0.2.7' is not an address of this host$"):
        startup_agents(insecure=True, agent_ip="192.0.2.7", rank_start=0)

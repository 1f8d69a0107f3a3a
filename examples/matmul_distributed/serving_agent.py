"""The agents of this host: all 8 ranks, until a signal or until the server is stopped."""

from shardserve.server import distributed


def start():
    model_files = [f"model/device{rank}/matmul.graph.json" for rank in range(8)]
    group_config_files = [f"model/device{rank}/group_config.json" for rank in range(8)]
    distributed.startup_agents(
        distributed_address="127.0.0.1:6200",
        model_files=model_files,
        group_config_files=group_config_files,
        agent_start_port=7000,
        agent_ip=None,
        rank_start=None,
    )


if __name__ == "__main__":
    start()

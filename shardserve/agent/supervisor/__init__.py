"""What `startup_agents` runs on each host, in the user's process: the `supervisor` follows the Worker, and forks,
watches and forks anew the agents of this host (`processes`), one for each rank (`slots`). Imports no torch.
"""

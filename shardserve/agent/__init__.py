"""What runs on the hosts of the ranks: the supervisor, its fork server, and the agents, one process per rank.

The supervisor (`supervisor/`) lives in the user's process and imports no torch; the fork server and the agents, which
are all the rest, do.
"""

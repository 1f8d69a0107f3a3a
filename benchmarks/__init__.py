"""Measurements, each by one command, each beside a floor or a peer measured in the same run. Results go to results/."""

"""What the tests of supervisors and agents share."""

import pytest
from ports import free_ports


@pytest.fixture
def ports():
    """A port for the Worker, and the first of several free ones for the agents."""
    return tuple(free_ports(1 + 4)[:2])

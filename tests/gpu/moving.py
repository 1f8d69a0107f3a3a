"""Collectives for tensors that are on another kind of device."""


class Moving:
    """A collective to whose `device` tensors are brought, and its results back to where they were."""

    def __init__(self, collective, device):
        self.collective = collective
        self.rank, self.size = collective.rank, collective.size
        self._device = device

    def __getattr__(self, name):
        return lambda x, *arguments: getattr(self.collective, name)(x.to(self._device), *arguments).to(x.device)

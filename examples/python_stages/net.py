"""A bag of words: the mean of the words' vectors, through two layers, to three scores."""

import torch
from torch import Tensor, nn
from torch.export import Dim

WORDS = 512
LABELS = ("billing", "delivery", "returns")


class Net(nn.Module):
    """ids int64 [batch, length] (0: no word) → scores float32 [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(WORDS, 32)
        self.hidden = nn.Linear(32, 64)
        self.scores = nn.Linear(64, len(LABELS))

    def forward(self, ids: Tensor) -> Tensor:
        word = (ids != 0).to(torch.float32)[:, :, None]
        mean = (self.embedding(ids) * word).sum(1) / word.sum(1)
        return self.scores(torch.tanh(self.hidden(mean)))


def example():
    """For `shardserve export net:example`."""
    options = {
        "dynamic_shapes": {"ids": {0: Dim("batch", min=1, max=32)}},
        "input_names": ["ids"],
        "output_names": ["scores"],
    }
    return Net(), (torch.ones(2, 16, dtype=torch.int64),), options

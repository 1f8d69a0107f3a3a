"""A recurrent model of words with two subgraphs over the same weights: `Read` a prompt, then `Step` word by word."""

import torch
from torch import Tensor, nn
from torch.export import Dim

WORDS, WIDTH, PROMPT = 64, 32, 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(2 * WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def advance(self, state: Tensor, word: Tensor) -> Tensor:
        seen = torch.cat([state, self.embedding(word)], 1)
        return torch.tanh(self.down(torch.nn.functional.gelu(self.up(seen))))


class Read(nn.Module):
    """ids int64 [batch, 6] → scores float32 [batch, 64], state float32 [batch, 32]."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.zeros_like(self.net.embedding(ids[:, 0]))
        for i in range(PROMPT):
            state = self.net.advance(state, ids[:, i])
        return self.net.head(state), state


class Step(nn.Module):
    """state float32 [batch, 32], word int64 [batch] → scores float32 [batch, 64], state float32 [batch, 32]."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, state: Tensor, word: Tensor) -> tuple[Tensor, Tensor]:
        state = self.net.advance(state, word)
        return self.net.head(state), state


PLAN = {"parameters": {"net.up.*": "Shard(0)", "net.down.weight": "Shard(1)"}}


def read():
    """For `shardserve export net:read --tp 2`."""
    batch = {0: Dim("batch", min=1, max=8)}
    names = {"input_names": ["ids"], "output_names": ["scores", "state"]}
    return Read(Net()), (torch.ones(2, PROMPT, dtype=torch.int64),), {"dynamic_shapes": {"ids": batch}, **names}


def step():
    """For `shardserve export net:step --tp 2`."""
    batch = {0: Dim("batch", min=1, max=8)}
    names = {"input_names": ["state", "word"], "output_names": ["scores", "state"]}
    args = torch.ones(2, WIDTH), torch.ones(2, dtype=torch.int64)
    return Step(Net()), args, {"dynamic_shapes": {"state": batch, "word": batch}, **names}

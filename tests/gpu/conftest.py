import pytest
import torch


@pytest.fixture(autouse=True)
def _gpu():
    """`make test-gpu` was asked for: without a GPU it has failed."""
    assert torch.cuda.is_available(), "these tests need a CUDA device, and a torch that is built for it"
    # Convolutions would differ from the CPU's by more than rounding of float32.
    torch.backends.cudnn.allow_tf32 = False

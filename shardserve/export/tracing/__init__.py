"""From a plain nn.Module to one functional graph of whole operators: torch.export, and what it doesn't see."""

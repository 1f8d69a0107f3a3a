"""Models that tests export: small, plain PyTorch, of the kinds that people serve."""

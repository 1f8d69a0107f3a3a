"""What crosses process borders: frames, typed messages, tensor encoding and generated gRPC stubs. Imports no torch."""

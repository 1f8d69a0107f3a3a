"""One rank's part of the traced graph: how tensors lie on the ranks (`placements`), what operators do with parts
(`rules`), the local graph with its collectives (`propagate`, by means of `emit`), the buffers that a rank keeps
(`state`), and the pipeline stages (`cut`).
"""

"""The gRPC front end: `front` on `methods`, and the standard `health` service."""

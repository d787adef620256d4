"""Transport: the servicers, and everything that only gRPC needs."""

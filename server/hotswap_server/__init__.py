"""The adapter hot-swap inference server."""

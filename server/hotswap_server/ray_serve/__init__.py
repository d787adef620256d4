"""The server as an application of Ray Serve, whose proxy stands before replicas of it.

`edge.py` is what runs in that proxy, `replica.py` what stands behind it; the proxy imports the first alone.
"""

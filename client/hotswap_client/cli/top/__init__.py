"""`hotswap top`: a server's metrics as a live view."""

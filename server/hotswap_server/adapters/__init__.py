"""Adapters: store -> host cache -> device banks, one file per method."""

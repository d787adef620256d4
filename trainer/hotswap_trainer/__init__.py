"""Trains adapters and publishes them into a store."""

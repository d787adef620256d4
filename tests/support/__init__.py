"""Helpers of the engine's tests: tiny models, adapters made by PEFT, an engine that collects its events."""

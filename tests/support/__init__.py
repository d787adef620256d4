"""Helpers of the engine's tests: tiny random models, adapters made by PEFT, an engine that collects what it gives."""

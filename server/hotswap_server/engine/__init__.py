"""The engine: scheduler, batch, model runner, sampler."""

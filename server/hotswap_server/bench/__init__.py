"""`hotswap bench`: the engine beside transformers and PEFT, on one machine in one run."""

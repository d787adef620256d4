"""LoRA (Hu et al., 2021): W x + scaling * B A x, with rsLoRA's scaling (Kalajdzievski, 2023), and DoRA.

DoRA (Liu et al., 2024) scales each output by magnitude / ||W + scaling * B A||, a norm taken once at load. A
token embedding is the W of one-hot inputs; biases that an adapter brings stand in for the base's.
"""

from hotswap_server.adapters.methods.lora.method import LoraMethod

METHOD = LoraMethod()

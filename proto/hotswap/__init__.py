"""What the client, the server and the trainer must agree on: wire, names, store layout, bases, prompts."""

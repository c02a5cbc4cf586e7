"""Training steps, optimisers and checkpoints, in one process or in one of several; without Ray."""

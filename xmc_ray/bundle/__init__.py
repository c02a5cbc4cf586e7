"""Finished models: a folder anyone can open, ensembles of them, explanations, and labels added without training."""

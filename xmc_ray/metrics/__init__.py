"""How good predictions are, how far scores can be believed, and how labels shift from one night to the next."""

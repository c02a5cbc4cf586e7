"""Documents and labels as data: read from files, split, counted, grouped, put in order for training. Needs no torch."""

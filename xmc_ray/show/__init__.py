"""A page to look at runs and nights: served on this machine, to this machine alone; reads nights by their documented layout."""

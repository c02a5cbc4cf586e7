"""Files for clusters elsewhere, and a cluster of processes on this machine."""

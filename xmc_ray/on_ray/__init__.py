"""Everything that needs Ray: the jobs that train, tag and evaluate on a cluster, or on a Ray of their own on this machine."""

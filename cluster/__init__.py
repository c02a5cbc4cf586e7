"""Clusters: files for those elsewhere, and one of processes on this machine."""

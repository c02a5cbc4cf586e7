"""HTML reports of tagging and training runs: self-contained pages, without scripts and without network access."""

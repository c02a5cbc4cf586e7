"""HTML reports of nights and of training runs: self-contained pages, without a script or anything from the network."""

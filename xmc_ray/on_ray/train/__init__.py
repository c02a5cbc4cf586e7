"""The training job: documents are prepared, workers train on Ray Train, the best checkpoint becomes a bundle with a report."""

"""Rows of a batch: which sample comes next on which rank, read, matched to a stage, collated."""

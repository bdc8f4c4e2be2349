"""Offline data preparation: source -> Example -> WebDataset tar + index. Needs no torch."""

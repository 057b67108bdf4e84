"""Servers that can hold a model repository, one folder each. Only ``triton`` so far."""

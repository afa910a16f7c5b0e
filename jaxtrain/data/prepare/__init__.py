"""Tokenized rows to a prepared data set: packed, mixed, cached."""

"""Prepared data sets, and the batch of each step as a function of its number."""

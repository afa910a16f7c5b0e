"""Rows that are read, tokenized and packed while training goes on."""

"""Files to rows, rows to one canonical form, and their tokens."""

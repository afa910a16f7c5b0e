"""Held-out loss, generation, and metrics of the generated texts."""

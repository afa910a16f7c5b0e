"""Forward passes over the data before training: reference log-probs, difficulty."""

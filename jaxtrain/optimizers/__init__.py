"""Optimizers, their schedules, and updates of state that rests in host memory."""

"""The life of a run's processes: start, preemption, export."""

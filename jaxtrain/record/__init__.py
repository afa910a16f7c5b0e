"""What a run writes down: metrics, samples, throughput."""

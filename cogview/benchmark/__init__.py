"""Generation measured against the hardware's limits."""

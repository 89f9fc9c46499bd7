"""Process groups of the optimizer's own, and the transports between their ranks."""

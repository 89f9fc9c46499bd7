"""DeepSpeed's optimizers by name, for scripts that build one and hand it to initialize()."""

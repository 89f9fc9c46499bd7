"""What initialize() returns: the engine, by its parts."""

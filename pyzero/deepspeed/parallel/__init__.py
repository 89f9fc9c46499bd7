"""Who computes what: meshes, and layers that ranks share."""

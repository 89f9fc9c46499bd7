"""Meshes, and layers that several ranks share."""

"""Checks of what callers pass to an optimizer: options, groups, parameters. Errors say got, wanted, remedy."""

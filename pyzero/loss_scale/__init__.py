"""The loss scale: its policy, scaled backward passes, skipped steps."""

"""One optimizer per file: its update rule, and its arguments, which are torch's."""

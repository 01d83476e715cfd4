"""The honest measurement: what the heads gain, and whether any output changed."""

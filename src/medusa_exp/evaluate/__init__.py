"""Evaluation: decoding methods, their metrics, near ties, and where the time of a step goes."""

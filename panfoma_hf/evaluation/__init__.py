"""Metrics and baselines: what a score is worth."""

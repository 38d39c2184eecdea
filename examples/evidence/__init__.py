"""Measure routing on real traces, and what replay does to the trainer's log-probs."""

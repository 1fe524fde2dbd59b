"""Measure reward models and policies: best-of-N, step search, majority vote, reward hacking."""

"""Automatic annotation of steps: tree search with a policy, MC scores from outcomes, and node compression."""

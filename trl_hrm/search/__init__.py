"""Annotation without humans: tree search over the steps of a policy, values from outcomes, node compression."""

"""`trl-hrm demo`: both papers end to end on small arithmetic problems, on CPU."""

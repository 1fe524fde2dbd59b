"""Benchmarks of reward models: ProcessBench, PRMBench and BIG-Bench Mistake."""

"""Measurements that anyone can repeat: `python -m benchmarks list | run | table | plot`."""

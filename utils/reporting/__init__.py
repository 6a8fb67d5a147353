"""The report of a score: test.py --report."""

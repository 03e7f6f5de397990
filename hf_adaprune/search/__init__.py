"""The search: space, journal, strategies and the loop that joins them. Knows no model."""

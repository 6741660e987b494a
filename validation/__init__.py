"""Independent originals, comparison, tolerances and the report."""

"""Pairs of a query with and without an instruction: bundled, from files, in families; and their splits."""

"""Rows -> text -> tokens -> a mixture -> batches. Importing this package alone costs nothing (no torch)."""

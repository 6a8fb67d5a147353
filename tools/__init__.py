"""Small programs over the same functions."""

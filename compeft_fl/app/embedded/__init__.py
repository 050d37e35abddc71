"""Data that the package carries, with where it comes from and how to make it again."""

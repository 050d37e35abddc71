"""Files that survive: replaced as a whole, or grown line by line; and locks."""

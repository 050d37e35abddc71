"""The hot loops, per device; each device gives the same bytes."""

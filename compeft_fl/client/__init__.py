"""The client's half: the mod, and what a node remembers."""

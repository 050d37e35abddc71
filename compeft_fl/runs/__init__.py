"""One run: its scenario, its processes, and what the terminal shows of it."""

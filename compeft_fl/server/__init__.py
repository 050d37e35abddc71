"""The server's half: rounds, broadcast, intake of replies, checkpoints, observers."""

"""A deployment of processes: start, credentials, warm workers, the relay that counts bytes."""

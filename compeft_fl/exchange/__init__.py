"""Who knows what, between client and server: what a client has trained and not yet sent."""

"""The server: of rounds, of requests, and what both share."""

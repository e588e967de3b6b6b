"""Metrics of clients, and runs: read from their folders, compared in leaderboards, drawn."""

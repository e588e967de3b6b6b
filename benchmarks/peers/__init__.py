"""Rounds of training here and in other frameworks."""

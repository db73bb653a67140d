"""Turns rollouts into better weights."""

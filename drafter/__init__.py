"""Proposes draft tokens and learns from what was accepted; needs numpy only."""

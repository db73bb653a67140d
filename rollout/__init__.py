"""Turns requests into rollouts, fast, without changing one sampled token."""

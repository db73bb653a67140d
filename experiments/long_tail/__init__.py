"""Compares budget policies where the slowest rollout decides; see README.md."""

"""Prompts, built-in tasks, tokenizers and rewards."""

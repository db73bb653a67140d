"""Hydra groups (YAML) and the strict schema that decides (schema.py). Imports neither torch nor ray."""

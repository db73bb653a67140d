"""Predicts rollout times from traces and a cost model; see README.md."""

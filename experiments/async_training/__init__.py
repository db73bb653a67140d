"""Steps per hour of a job whose rollouts run ahead of the learner; see run.py."""

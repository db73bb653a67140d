"""How fast is the drafter's index, and how much of a rollout does it guess?"""

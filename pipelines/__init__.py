"""The corpus side: policies, prompts, trajectories, duplicates, pairs, groups and the lake.

Knows neither Dagster nor the trainer, and imports torch and transformers only inside functions.
"""

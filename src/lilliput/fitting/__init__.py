"""The main job: fit a workload into a budget. `run.py` reads top to bottom."""

"""What stands for a run: its recipe, its directory, its scores."""

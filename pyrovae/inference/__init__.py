"""What is done with a pair."""

"""What a plan does to weights."""

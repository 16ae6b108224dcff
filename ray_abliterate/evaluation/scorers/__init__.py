"""What every trial is scored by."""

"""What each fault costs: really caused, to processes that were started for it."""

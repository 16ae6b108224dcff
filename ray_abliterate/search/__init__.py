"""Plans, scores, trials, frontier, and the study over them. No Ray."""

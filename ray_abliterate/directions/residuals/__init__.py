"""Statistics of residuals that are exact under merging: any split, any order, float64."""

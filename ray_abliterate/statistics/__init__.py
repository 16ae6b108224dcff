"""Statistics of residuals that are exact under merging: any split, any order, float64.

Knows numpy and shards, nothing of models, torch or Ray, so that a process which reduces a shard
where it lies has little to load.
"""

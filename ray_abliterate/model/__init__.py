"""A loaded model: architecture table, loading, chat format, batches."""

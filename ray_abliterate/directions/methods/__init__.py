"""Direction methods: from two sets of residuals after one block to raw vectors between them."""

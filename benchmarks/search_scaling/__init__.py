"""How a search scales: throughput, the sampler, what a budget finds."""

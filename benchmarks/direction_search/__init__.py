"""All direction methods at the same search budget, on planted models and the demo's."""

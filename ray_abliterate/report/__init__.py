"""A run directory as HTML pages and plotly figures."""

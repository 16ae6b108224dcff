"""The figures of the report, as plain plotly dictionaries. No model, no HTML."""

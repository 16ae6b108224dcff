"""Contract tests and tiny models, for this package's own tests and for those of plug-ins."""

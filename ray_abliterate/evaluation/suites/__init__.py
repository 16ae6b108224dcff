"""What finished trials are measured by."""

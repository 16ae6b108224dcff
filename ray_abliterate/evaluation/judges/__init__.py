"""Second opinions on whether an answer refuses."""

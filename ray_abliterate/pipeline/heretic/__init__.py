"""Taking over a study of Heretic: its journal, and the run that is made of it."""

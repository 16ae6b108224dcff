"""What every benchmark uses; knows no claim."""

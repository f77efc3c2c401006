"""Neural networks as data."""

"""Populations of CNNs: training them, and published archives."""

"""Image sets: the embedded subsets and the full sets."""

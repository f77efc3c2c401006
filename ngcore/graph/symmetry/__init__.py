"""The permutations of neurons that keep a network's function."""

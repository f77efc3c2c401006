"""Neural networks as data."""

import warnings

# Libraries that we use import tqdm's widgets, which warns in notebooks that have none; our progress bars are of text.
warnings.filterwarnings("ignore", message="IProgress not found")

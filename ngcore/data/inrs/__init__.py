"""Implicit neural representations: fitting, sets, edits, augmentation, published archives."""

"""Plain, naive statements of what ngcore computes, which tests and the bench compare with."""

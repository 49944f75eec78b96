"""`make bench`: every figure against a bare baseline of the same run; never a timed test."""

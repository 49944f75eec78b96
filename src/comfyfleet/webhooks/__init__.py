"""Deliver one envelope: sign it in both families, post it through the guarded fetcher, retry, record the outcome."""

"""Where workers live: the provider's contract (`base`), and providers. Local processes by default."""

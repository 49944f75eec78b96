"""One worker: a wrapper around engines (`:18288`), and an agent behind tickets (`:3000`) when it is in a fleet."""

"""Everything about engines: one client for both kinds, their processes, readiness, faults and learned durations."""

"""The agent: what makes a wrapper a member of a fleet.

It proves the worker fast (benchmark), reports it (status, finished requests), and serves ticketed requests on the
worker's public port. Reading order: tickets, load_book, sessions, benchmark, startup, reporter, server, agent.
"""

"""Settings of each role: frozen values, read once from the environment and the command line, passed down in pieces.

One module per role (`control`, `worker`, `engine`, `client`); each has `from_environment(env)`. No other module reads
the environment.
"""

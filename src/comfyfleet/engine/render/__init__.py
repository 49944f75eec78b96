"""The render process: torch and the nodes live here, in a child of the engine's server.

A crash or an empty memory costs one job: the server survives, says what happened, and starts a fresh child. They talk
over the child's stdin and stdout in length-prefixed JSON (`messages`). The child ends by itself when its stdin closes,
so a killed server leaves nothing behind.
"""

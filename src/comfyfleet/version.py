"""This distribution's version; a module of its own, so that a role can say it without importing the client."""

__version__ = "0.1.0"

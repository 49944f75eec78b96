"""Fakes that ship with the product and pass the same contract tests as the real parts: clock, engine, fleet."""

"""What outlives a restart. Reading order: base (the contract), sql (every statement), migrations, writer (group
commit), sqlite and postgres (the two databases), store (the contract over either).
"""

"""How a policy is asked for an answer: one module per kind of engine."""

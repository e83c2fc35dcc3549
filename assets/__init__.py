"""The Dagster house: what exists, what depends on what, and what must hold. No algorithm here."""

"""The model side: from a groups file to a POLAR checkpoint, its scores and its evaluation.

Reads Parquet and JSONL only; knows neither Beam, DuckDB nor Dagster.
"""

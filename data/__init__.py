"""Acquire and read knowledge graphs: download, parse, validate, index."""

"""Codes to instruction data: code files, code text, one script per task."""

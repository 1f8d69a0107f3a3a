"""Thin commands over shardserve's exporter: `python export_tools/NAME.py` or `python -m export_tools.NAME`."""

"""Programs that measure: `python3 run.py bench NAME`."""

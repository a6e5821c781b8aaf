"""WHAT is saved: plain torch objects as named, scoped parts. No Ray, no files."""

"""Code that models write: found, checked, run in another process, judged, and sent back for fixing."""

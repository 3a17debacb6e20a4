"""Value tables: one protocol, and one file for each tier."""

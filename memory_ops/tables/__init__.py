"""Where value rows live: one protocol, one file a tier."""

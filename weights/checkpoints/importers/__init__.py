"""Other people's files to checkpoint folders, one file a format."""

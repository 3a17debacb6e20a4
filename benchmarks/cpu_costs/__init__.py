"""``memplus bench cpu-costs``: fits the times that ``memplus plan`` adds to a CPU's steps."""

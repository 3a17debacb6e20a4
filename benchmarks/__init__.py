"""What ``memplus bench`` runs; speed is measured here and nowhere asserted."""

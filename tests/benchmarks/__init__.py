"""What ``memplus bench`` runs; speed is measured there, and nothing of it asserted here."""

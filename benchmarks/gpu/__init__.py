"""``memplus bench gpu``: the whole check of a card, in parts."""

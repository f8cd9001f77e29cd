"""Models in the formats of other programs, with a card that says what they are."""

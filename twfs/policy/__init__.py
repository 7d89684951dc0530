"""Rules: what is let in, promised, worth keeping; and the access record that judges them."""

"""Model cards made of measured numbers, and what goes up to the Hub; imported as `modeling_sail.model_cards`."""

"""Studies: many runs under one launch, tuned alike, and the report on them."""

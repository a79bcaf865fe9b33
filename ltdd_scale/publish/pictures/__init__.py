"""Pictures: each a function from plain arrays to a matplotlib `Figure`. `canvas` saves them."""

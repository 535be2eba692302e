"""Language models: loading them, finding their layers, and passes through them."""
